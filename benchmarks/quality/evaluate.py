"""Accuracy of a checkpoint on held-out clips by kind of question, each question asked on its own.

    python -m benchmarks.quality.evaluate checkpoints/stts-molmo-tiny --prune-ratio 0.5 --output result.json

A clip has `--beats` half-second beats and is shown as at most `--num-frames` frames: with fewer frames than beats it is
a long clip, in which a short moment may fall between two frames.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from stts_molmo.tools.files import written_whole
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils.logging import disable_progress_bar

from ..common import provenance, torch_threads
from .batches import accuracy, hits_by_kind, make_batch
from .scenes import FIRST_SEED, Question
from .worlds import WORLDS, film_questions, make_film, shoot


def clip_batches(
    processor,
    clips: int,
    beats: int,
    num_frames: int,
    split: str = "test",
    level: int = 2,
    with_video: bool = True,
    world: str = "still",
) -> Iterator[tuple[dict, list[list[Question]]]]:
    """One batch a film: each of its questions about `num_frames` frames of it, or one a beat if these are fewer."""
    for seed in range(FIRST_SEED[split], FIRST_SEED[split] + clips):
        film = make_film(seed, world, level, beats)
        times = np.linspace(0, (beats - 1) * film.scene.beat, min(beats, num_frames))
        chats = [[item] for item in film_questions(film)]
        yield make_batch(processor, [shoot(film, times)] if with_video else [], chats, times), chats


def load(checkpoint: str) -> tuple:
    """Model and processor of a checkpoint, with the code that it carries."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True).eval()
    return model, AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)


@torch_threads(1)
def main(arguments: Sequence[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--prune-ratio", type=float, help="the checkpoint's own when not given")
    parser.add_argument("--method", help="the checkpoint's own when not given")
    parser.add_argument("--split", choices=FIRST_SEED, default="test")
    parser.add_argument("--world", choices=WORLDS, default="still")
    parser.add_argument("--clips", type=int, default=128)
    parser.add_argument("--level", type=int, default=2)
    parser.add_argument("--beats", type=int, default=8)
    parser.add_argument("--num-frames", type=int, default=8)
    parser.add_argument("--output", type=Path, help="JSON file; standard output when not given")
    args = parser.parse_args(arguments)
    disable_progress_bar()
    model, processor = load(args.checkpoint)
    batches = clip_batches(processor, args.clips, args.beats, args.num_frames, args.split, args.level, world=args.world)
    pruning = {"prune_ratio": args.prune_ratio, "method": args.method}
    pruning = {name: value for name, value in pruning.items() if value is not None}
    hits = hits_by_kind(model, batches, processor.tokenizer.eos_token_id, **pruning)
    settings = {name: value for name, value in vars(args).items() if name not in ("checkpoint", "output")}
    result = {
        "checkpoint": Path(args.checkpoint).name,
        **settings,
        "first_seed": FIRST_SEED[args.split],
        "questions": sum(map(len, hits.values())),
        "accuracy": accuracy(hits),
        **provenance(),
    }
    text = json.dumps(result, indent=2) + "\n"
    if args.output:
        with written_whole(args.output) as draft:
            draft.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
