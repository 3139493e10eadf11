from pathlib import Path

from setuptools import setup

README = Path(__file__).parent / "README.md"

TRAIN = ["datasets"]
TEST = [*TRAIN, "hypothesis", "pytest", "ruff", "setuptools", "trl"]

setup(
    script_name="setup.py",  # a build front end's own argv would hide it, and this file would be packed as a module
    name="stts-molmo",
    version="0.1.0",
    description="STTS (Spatio-Temporal Token Scoring) for Molmo2 on Hugging Face Transformers",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="The stts-molmo authors",
    license="Apache-2.0",
    python_requires=">=3.11",
    # The modules stay flat at the root, as a Hub repository needs them; installed, they are `stts_molmo.*`.
    packages=["stts_molmo", "stts_molmo.tools", "stts_kernels"],
    package_dir={"stts_molmo": ".", "stts_kernels": "stts_kernels"},
    package_data={"stts_molmo": ["py.typed", "checkpoints/stts-molmo-tiny/*", "tools/entry/__main__.py"]},
    install_requires=[
        "accelerate",
        "av>=15",
        "matplotlib",
        "torch",
        "torchvision",
        "transformers[chat-template,vision]>=5.20.2,<6",
        "typer",
    ],
    extras_require={"train": TRAIN, "test": TEST},
    entry_points={"console_scripts": ["stts-molmo = stts_molmo.tools.cli:app"]},
)
