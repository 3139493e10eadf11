"""Writes the study's clips and questions as a folder that `datasets` loads and the Hub takes.

    python -m benchmarks.quality.publish_dataset runs/board-clips --train 200 --validation 50 --test 100

Each split is a JSON Lines file of `{"video", "question", "answer", "kind"}` beside a folder of mp4 files. Clips of a
split alternate between short ones of 8 beats and long ones of 16.
"""

import argparse
import json
from pathlib import Path

from .scenes import FIRST_SEED
from .worlds import film_questions, make_film, write_clip

BEATS = (8, 16)
CARD = """---
license: apache-2.0
task_categories:
- video-text-to-text
language: en
configs:
- config_name: default
  data_files:
{data_files}
---

# Board clips

Rendered clips of a 3x3 board with questions about what stands still, changes, flashes and moves on it, in fixed
wordings, made by `benchmarks/quality/publish_dataset.py` of stts-molmo. Grey noise and stripes in motion distract.

```python
from datasets import load_dataset

dataset = load_dataset("{name}")   # rows: video (a path relative to this folder), question, answer, kind
```
"""


def write_split(folder: Path, split: str, num_clips: int) -> None:
    (folder / split).mkdir(parents=True)
    rows = []
    for seed in range(FIRST_SEED[split], FIRST_SEED[split] + num_clips):
        film = make_film(seed, "still", beats=BEATS[seed % len(BEATS)])
        video = f"{split}/{seed}.mp4"
        write_clip(str(folder / video), film)
        rows += [{"video": video, **vars(item)} for item in film_questions(film)]
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new folder")
    for split, number in (("train", 200), ("validation", 50), ("test", 100)):
        parser.add_argument(f"--{split}", type=int, default=number, help="clips")
    args = parser.parse_args()
    splits = ("train", "validation", "test")
    for split in splits:
        write_split(args.folder, split, getattr(args, split))
    data_files = "\n".join(f"  - split: {split}\n    path: {split}.jsonl" for split in splits)
    (args.folder / "README.md").write_text(CARD.format(data_files=data_files, name=args.folder.name))
