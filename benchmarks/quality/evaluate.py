"""Accuracy of a checkpoint on held-out clips by kind of question, each question asked on its own.

    python benchmarks/quality/evaluate.py checkpoints/stts-molmo-tiny --prune-ratio 0.5 --output result.json

A clip has `--beats` half-second beats and is shown as at most `--num-frames` frames: with fewer frames than beats it is
a long clip, in which a short moment may fall between two frames.
"""

import argparse
import datetime
import json
import os
import platform
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import transformers
from batches import answer_hits, answer_logits, make_batch
from scenes import FIRST_SEED, make_scene, questions, render
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils.logging import disable_progress_bar


def repeat_video(video, copies: int):
    """Features of one video, as if it stood in each of `copies` rows of a batch."""
    fields = {"pooler_output": tuple(video.pooler_output) * copies}
    if getattr(video, "keep_mask", None) is not None:
        fields["keep_mask"] = video.keep_mask.repeat(copies, 1)
    return type(video)(**fields)


@torch.no_grad()
def accuracy(model, processor, seeds, level: int, beats: int, num_frames: int, **pruning) -> dict[str, list[bool]]:
    """Right or wrong for each question of each scene, by kind; `pruning` may hold `prune_ratio` and `method`."""
    hits = defaultdict(list)
    for seed in seeds:
        scene = make_scene(seed, level, beats)
        times = np.linspace(0, (beats - 1) * scene.beat, min(beats, num_frames))
        asked = questions(scene)
        batch = make_batch(processor, [render(scene, times)] * len(asked), [[item] for item in asked], times)
        names = ("pixel_values_videos", "video_token_pooling", "video_grids")
        pixels, pooling, grids = (batch.pop(name) for name in names)
        rows = len(pooling) // len(asked)
        video = model.model.get_video_features(pixels[: len(times)], pooling[:rows], grids[:1], **pruning)
        batch["mm_encoder_outputs"] = {"video": repeat_video(video, len(asked))}
        right = answer_hits(*answer_logits(model, batch), processor.tokenizer.eos_token_id)
        for item, hit in zip(asked, right, strict=True):
            hits[item.kind].append(hit)
    return hits


def summary(hits: dict[str, list[bool]]) -> dict:
    every = [hit for kind in hits.values() for hit in kind]
    return {
        "questions": len(every),
        "accuracy": float(np.mean(every)),
        "by_kind": {kind: float(np.mean(right)) for kind, right in hits.items()},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--prune-ratio", type=float, help="the checkpoint's own when not given")
    parser.add_argument("--method", help="the checkpoint's own when not given")
    parser.add_argument("--split", choices=FIRST_SEED, default="test")
    parser.add_argument("--clips", type=int, default=128)
    parser.add_argument("--level", type=int, default=2)
    parser.add_argument("--beats", type=int, default=16)
    parser.add_argument("--num-frames", type=int, default=16)
    parser.add_argument("--output", type=Path, help="JSON file; standard output when not given")
    args = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    model = AutoModelForImageTextToText.from_pretrained(args.checkpoint, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(args.checkpoint, trust_remote_code=True)
    pruning = {"prune_ratio": args.prune_ratio, "method": args.method}
    first = FIRST_SEED[args.split]
    hits = accuracy(
        model,
        processor,
        range(first, first + args.clips),
        args.level,
        args.beats,
        args.num_frames,
        **{name: value for name, value in pruning.items() if value is not None},
    )
    settings = {name: value for name, value in vars(args).items() if name not in ("checkpoint", "output")}
    result = {
        "checkpoint": Path(args.checkpoint).name,
        **settings,
        "first_seed": first,
        **summary(hits),
        "date": datetime.date.today().isoformat(),
        "hardware": f"{platform.machine()}, {os.cpu_count()} CPU cores, 1 thread",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    text = json.dumps(result, indent=2) + "\n"
    if args.output:
        args.output.write_text(text)
    else:
        print(text, end="")
