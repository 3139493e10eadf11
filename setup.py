from pathlib import Path

from setuptools import setup

README = Path(__file__).parent / "README.md"

# One a line: `make test-oldest` runs the suite with the lower bounds, `make test` with what is newest. An upper bound
# is the next major release after the one that the suite ran with (constraints.txt): what may break is not claimed.
# What `make lint` runs is bounded closer: a newer release finds other faults.
TRAIN = ["datasets>=4.8,<6"]
LORA = [
    "bitsandbytes>=0.49,<1",
    "peft>=0.18,<1",
]
QUANTIZE = ["torchao>=0.15,<1"]
PARQUET = ["pyarrow>=21,<27"]
RAY = [
    *PARQUET,
    "ray[data]>=2.50,<3",
]
TRL = ["trl>=1.15,<2"]
EVAL = ["lmms-eval[video-legacy]>=0.7.3,<1"]  # with decord, which its LongVideoBench imports
SERVE = [
    "openai>=2,<4",  # the client, with which docs/serving.md asks
    "starlette>=0.46,<2",
    "uvicorn>=0.34,<1",
]
DEMO = [
    "gradio>=6.31,<7",
    "starlette>=0.46,<2",
]
TEST_DEMO = [
    "playwright>=1.65,<2",
    "pytest>=8.4,<10",
]
TEST = [
    *TRAIN,
    "hypothesis>=6.100,<7",
    "packaging>=24,<27",
    *PARQUET,
    "pyright[nodejs]>=1.1.400,<=1.1.414",
    "pytest>=8.4,<10",
    "ruff>=0.17,<0.18",
    "setuptools>=77.0.3,<85",
    *TRL,
]

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
    packages=["stts_molmo", "stts_molmo.tools", "stts_molmo.tools.lmms", "stts_kernels"],
    package_dir={"stts_molmo": ".", "stts_kernels": "stts_kernels"},
    package_data={
        "stts_molmo": ["py.typed", "checkpoints/stts-molmo-tiny/*", "tools/entry/__main__.py"],
        "stts_molmo.tools.lmms": ["tasks/*"],
    },
    install_requires=[
        "accelerate>=1.10.1,<2",
        "av>=15,<19",
        "huggingface_hub>=1.31,<3",
        "jinja2>=3.1.6,<4",
        "matplotlib>=3.9,<4",
        "numpy>=2,<3",
        "pillow>=10.0.1,<14",
        "rich>=14.3,<16",
        "safetensors>=0.8,<1",
        "tokenizers>=0.23.1,<1",
        "torch>=2.11,<3",
        "torchvision>=0.26,<1",
        "transformers[chat-template,vision]>=5.20.2,<6",
        "typer>=0.24,<1",
    ],
    extras_require={
        "train": TRAIN,
        "lora": LORA,
        "quantize": QUANTIZE,
        "trl": TRL,
        "parquet": PARQUET,
        "serve": SERVE,
        "ray": RAY,
        "demo": DEMO,
        "eval": EVAL,
        "test": TEST,
        "test-demo": TEST_DEMO,
    },
    entry_points={
        "console_scripts": ["stts-molmo = stts_molmo.tools.cli:run"],
        "lmms_eval.models": ["stts_molmo = stts_molmo.tools.lmms:manifest"],
    },
)
