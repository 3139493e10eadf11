"""Renders the bundled example clips and their questions.

python benchmarks/quality/render_clips.py examples/clips
"""

import argparse
import json
from pathlib import Path

import numpy as np
from scenes import FIRST_SEED, enlarge, make_scene, questions, render, write_mp4

CLIPS = {"quiet.mp4": (FIRST_SEED["demo"], 1, 8), "busy.mp4": (FIRST_SEED["demo"] + 1, 2, 16)}
FPS, ENLARGEMENT = 10, 6

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for name, (seed, level, beats) in CLIPS.items():
        scene = make_scene(seed, level, beats)
        # The last frame starts on the last beat.
        times = np.arange((beats - 1) * scene.beat * FPS + 1) / FPS
        write_mp4(str(folder / name), enlarge(render(scene, times), ENLARGEMENT), FPS)
        asked = [vars(item) for item in questions(scene)]
        entries.append({"file": name, "seed": seed, "level": level, "beats": beats, "questions": asked})
    (folder / "questions.json").write_text(json.dumps(entries, indent=2) + "\n")
