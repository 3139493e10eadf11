"""Renders the bundled example clips and lists their questions, ready to fine-tune on.

python -m benchmarks.quality.render_clips examples      # writes examples/clips/*.mp4 and examples/finetune.jsonl
"""

import argparse
import json
from pathlib import Path

from .scenes import FIRST_SEED
from .worlds import Film, film_questions, make_film, write_clip

CLIPS = {
    "quiet.mp4": make_film(FIRST_SEED["demo"], "still", level=1, beats=8),
    "busy.mp4": make_film(FIRST_SEED["demo"] + 1, "still", level=2, beats=16),
    "handheld.mp4": make_film(FIRST_SEED["demo"] + 2, "handheld", level=2, beats=8),
}


def question_rows(video: str, film: Film) -> list[dict[str, str]]:
    """What `examples/finetune.py` reads: a row a question."""
    return [{"video": video, "question": item.question, "answer": item.answer} for item in film_questions(film)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    rows = []
    for name, film in CLIPS.items():
        write_clip(str(folder / "clips" / name), film)
        rows += question_rows(f"clips/{name}", film)
    (folder / "finetune.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
