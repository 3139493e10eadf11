"""A Space that shows a checkpoint: `STTS_MODEL`, a directory or a Hub id, or the tiny one for trying things out."""

import os
from pathlib import Path

from stts_molmo.tools.checkpoint import Checkpoint
from stts_molmo.tools.cli import BUNDLED_CHECKPOINT
from stts_molmo.tools.demo import QUESTIONS, build, launch
from stts_molmo.tools.streaming import Answerer, Limits

LIMITS = Limits(max_bytes=32 * 2**20, max_video_seconds=120, max_frames=128, max_seconds=120, max_requests=8)
CLIPS = Path(__file__).parent / "clips"

answerer = Answerer(Checkpoint(os.environ.get("STTS_MODEL", str(BUNDLED_CHECKPOINT))), LIMITS)
page = build(answerer, [(CLIPS / name, question) for name, question in QUESTIONS.items()])

if __name__ == "__main__":
    launch(page, answerer, host="0.0.0.0", port=7860)
