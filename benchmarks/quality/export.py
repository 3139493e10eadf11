"""Puts a trained checkpoint where it ships: its weights and settings, with links to the code instead of copies.

python -m benchmarks.quality.export runs/stts-50/best checkpoints/stts-molmo-tiny
"""

import argparse
import os
import shutil
from pathlib import Path

from stts_molmo.tools.checkpoint import CODE_FILES


def export(trained: Path, destination: Path) -> None:
    """Copies every file of `trained` but code; code becomes relative links to the repository's root."""
    destination.mkdir(parents=True, exist_ok=True)
    for file in trained.iterdir():
        if file.suffix != ".py":
            shutil.copyfile(file, destination / file.name)
    for file in CODE_FILES:
        link = destination / file.name
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(file, destination))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", type=Path)
    parser.add_argument("destination", type=Path)
    args = parser.parse_args()
    export(args.trained, args.destination)
