"""Renders the bundled example clips and lists their questions, ready to fine-tune on.

python -m benchmarks.quality.render_clips examples      # writes examples/clips/*.mp4 and examples/finetune.jsonl
"""

import argparse
import json
from pathlib import Path

from .scenes import FIRST_SEED, Scene, make_scene, questions, write_clip

CLIPS = {
    "quiet.mp4": make_scene(FIRST_SEED["demo"], level=1, beats=8),
    "busy.mp4": make_scene(FIRST_SEED["demo"] + 1, level=2, beats=16),
}


def question_rows(video: str, scene: Scene) -> list[dict[str, str]]:
    """What `examples/finetune.py` reads: a row a question."""
    return [{"video": video, "question": item.question, "answer": item.answer} for item in questions(scene)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    rows = []
    for name, scene in CLIPS.items():
        write_clip(str(folder / "clips" / name), scene)
        rows += question_rows(f"clips/{name}", scene)
    (folder / "finetune.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
