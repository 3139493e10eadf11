"""What the pruners keep: the share of blocks that survive, by what a block shows.

    python -m benchmarks.quality.kept checkpoints/stts-molmo-tiny --output benchmarks/results/quality_kept.json

First frames, which lose nothing, are not counted. "new" blocks show something that was not there a frame earlier.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from stts_molmo.tools.files import written_whole
from transformers.utils.logging import disable_progress_bar

from ..common import provenance, split_video, torch_threads
from .batches import make_batch
from .evaluate import load
from .scenes import FIRST_SEED, things_at
from .worlds import WORLDS, Film, film_questions, make_film, shoot

METHODS = ("scorer", "cosine", "random")


def blocks_shown(film: Film, times: np.ndarray) -> list[list[str]]:
    """What each cell of each frame shows."""
    frames, before, scene = [], {}, film.scene
    for time in times:
        dots = [dot for dot in film.dots if dot.start <= time < dot.start + scene.beat]
        things = {dot.cell: (dot, "dot") for dot in dots}
        things |= {thing.cell: (thing, name) for thing, name in things_at(scene, time)}
        shown = []
        for cell in range(9):
            name = "flicker" if cell in scene.flicker else "background"
            if cell in things:
                thing, name = things[cell]
                if name not in ("lamp", "ball", "star", "dot"):
                    name = "sign" if thing.color == "grey" else "still shape"
                name = f"{name}, new" if before.get(cell) != things[cell] else f"{name}, as before"
            shown.append(name)
        frames.append(shown)
        before = things
    return frames


@torch.no_grad()
def kept_shares(
    model, processor, clips: int, num_frames: int, method: str, world: str = "still"
) -> dict[str, dict[str, float]]:
    """Share kept and number of blocks by what they show, at the checkpoint's own ratio."""
    kept = defaultdict(list)
    for seed in range(FIRST_SEED["test"], FIRST_SEED["test"] + clips):
        film = make_film(seed, world, beats=num_frames)
        times = np.arange(num_frames) * film.scene.beat
        batch = make_batch(processor, [shoot(film, times)], [film_questions(film)[:1]], times)
        videos, _ = split_video(batch)
        keep_mask = model.model.get_video_features(**videos, method=method).keep_mask
        for names, flags in list(zip(blocks_shown(film, times), keep_mask.tolist(), strict=True))[1:]:
            for name, flag in zip(names, flags, strict=True):
                kept[name].append(flag)
    return {name: {"kept": round(float(np.mean(kept[name])), 4), "blocks": len(kept[name])} for name in sorted(kept)}


@torch_threads(1)
def main(arguments: Sequence[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--clips", type=int, default=128)
    parser.add_argument("--num-frames", type=int, default=8)
    parser.add_argument("--world", choices=WORLDS, default="still")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(arguments)
    disable_progress_bar()
    model, processor = load(args.checkpoint)
    sizes = (args.clips, args.num_frames)
    shares = {method: kept_shares(model, processor, *sizes, method, args.world) for method in METHODS}
    settings = {"checkpoint": Path(args.checkpoint).name, "clips": args.clips, "num_frames": args.num_frames}
    with written_whole(args.output) as draft:
        draft.write_text(json.dumps({**provenance(), **settings, "shares": shares}, indent=2) + "\n")


if __name__ == "__main__":
    main()
