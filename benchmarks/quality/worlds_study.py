"""The study in which the frame before is no longer nearly the answer: rows trained and asked in every world.

    python -m benchmarks.quality.worlds_study runs/mixture/best --runs runs/worlds \\
        --output benchmarks/results/quality_worlds.json

As in `study.py`, a row is the baseline, converted and fine-tuned, here on the mixture of worlds, and rows that are done
are not done again. Test clips are mp4 files, read by the processor. A row is asked

- about 8 beats, each a frame, as it was trained, and which blocks it keeps;
- at 50 %, also at other ratios, and where it prunes nothing, also with fewer frames;
- with seed 0 also about 16 beats: of which it sees 8 frames, and half pruned all 16, which is as many tokens.
"""

import argparse
import functools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from stts_molmo.configuration_stts_molmo import STTSConfig
from stts_molmo.tools.files import written_whole
from stts_molmo.tools.warm_up import warm_up
from transformers.utils.logging import disable_progress_bar

from ..common import provenance, torch_threads
from .batches import hits_by_kind, make_file_batch, sample_batch
from .kept import kept_shares
from .scenes import FIRST_SEED, Question
from .study import LONG_BEATS, NUM_FRAMES, fine_tune, prepare, training_batch
from .worlds import MIXTURE, WORLDS, film_file, film_questions, make_film

CLIPS = {"still": 48, "handheld": 64, "screen": 32}  # short test clips
CURVES = ("still", "handheld")  # worlds in which rows are also asked at other numbers of tokens
OTHER_RATIOS = (30, 40, 60, 70, 80)
FEWER_FRAMES = (2, 3, 4, 5, 6)


class Row(NamedTuple):
    """
    Knobs of a row; for how many steps its scorer is warmed up; for which share of the steps all of it is fine-tuned
    after that, on how many frames of a clip; the scorer's learning rate, 1e-5 as the language model's or 1e-4 as in the
    paper, before `--rate-scale`; whether the weight of the auxiliary loss falls to 0.
    """

    knobs: dict
    warm_up: int = 0
    share_of_steps: float = 1.0
    num_frames: int = NUM_FRAMES
    scorer_rate: float = 1e-5
    aux_loss_falls: bool = False

    @property
    def is_half(self) -> bool:
        return self.knobs["prune_ratio"] == 0.5


UNPRUNED = Row({"method": "none", "prune_ratio": 0.0})
COSINE = Row({"method": "cosine", "prune_ratio": 0.5})
AS_PUBLISHED = Row({"prune_ratio": 0.5}, scorer_rate=1e-4)
WARMED_UP = Row({"prune_ratio": 0.5}, warm_up=200)


def with_knobs(**knobs) -> Row:
    return WARMED_UP._replace(knobs=WARMED_UP.knobs | knobs)


ROWS = {
    "unpruned": UNPRUNED,
    "stts 50": WARMED_UP,
    "cosine 50": COSINE,
    "random 50": Row({"method": "random", "prune_ratio": 0.5}),
    "tome 50": Row({"method": "tome", "prune_ratio": 0.5}),
    "half of the frames": UNPRUNED._replace(num_frames=NUM_FRAMES // 2),
    "stts 50 fresh": AS_PUBLISHED,
    "stts 50 without aux": AS_PUBLISHED._replace(knobs=AS_PUBLISHED.knobs | {"aux_loss_weight": 0.0}),
    "stts 50 fast scorer": AS_PUBLISHED._replace(warm_up=200),
    "stts 50 falling aux": AS_PUBLISHED._replace(warm_up=200, aux_loss_falls=True),
    "stts 50 third of the steps": WARMED_UP._replace(share_of_steps=1 / 3),
    "stts 50 fresh third of the steps": AS_PUBLISHED._replace(share_of_steps=1 / 3),
    "cosine 50 third of the steps": COSINE._replace(share_of_steps=1 / 3),
    "warm-up alone": WARMED_UP._replace(share_of_steps=0),
    "cosine, no training": COSINE._replace(share_of_steps=0),
    "no pruning, no training": UNPRUNED._replace(share_of_steps=0),
    **{f"stts {k}": with_knobs(prune_ratio=k / 100) for k in OTHER_RATIOS},
    "stts 50 log patches": with_knobs(aux_target="patches"),
    "stts 50 rescaled pooled": with_knobs(score_bias="rescaled_log"),
    "stts 50 rescaled patches": with_knobs(score_bias="rescaled_log", aux_target="patches"),
}


class Asked(NamedTuple):
    """An evaluation: clips of how many beats in a world, shown as at most so many frames, and how they are pruned."""

    world: str
    beats: int = NUM_FRAMES
    num_frames: int = NUM_FRAMES
    clips: int = 48
    prune_ratio: float | None = None


def evaluations(name: str, is_seed_0: bool) -> dict[str, Asked]:
    """What a row is asked, by name; and with `is_seed_0` what takes longer."""
    row, short = ROWS[name], {world: Asked(world, clips=clips) for world, clips in CLIPS.items()}
    asked = {f"{world}, short": question for world, question in short.items()}
    if name == "half of the frames":
        return {f"{world}, short, 4 frames": question._replace(num_frames=4) for world, question in short.items()}
    for world in CURVES:
        if row.is_half:
            asked |= {f"{world}, short, {k} %": short[world]._replace(prune_ratio=k / 100) for k in OTHER_RATIOS}
        elif row.knobs["prune_ratio"] == 0.0:
            asked |= {f"{world}, short, {n} frames": short[world]._replace(num_frames=n) for n in FEWER_FRAMES}
        if is_seed_0:
            asked[f"{world}, long"] = Asked(world, LONG_BEATS)
        if is_seed_0 and row.is_half:
            asked[f"{world}, long, 16 frames"] = Asked(world, LONG_BEATS, LONG_BEATS)
    return asked


@functools.cache  # of one process, in which many rows are asked the same
def processor_of(baseline: str):
    return prepare(baseline, STTSConfig(), 0)[1]


@functools.cache
def file_batch(baseline: str, folder: Path, seed: int, asked: Asked) -> tuple[dict, list[list[Question]]]:
    """Each question about a film, and the mp4 file."""
    file = film_file(folder, seed, asked.world, asked.beats)
    chats = [[item] for item in film_questions(make_film(seed, asked.world, beats=asked.beats))]
    return make_file_batch(processor_of(baseline), str(file), chats, asked.num_frames), chats


@functools.lru_cache(maxsize=1000)  # rows of one seed follow each other, and see the same clips
def mixed_batch(baseline: str, seed: int, step: int, size: int, num_frames: int) -> dict:
    beats = None if num_frames == NUM_FRAMES else NUM_FRAMES
    return training_batch(processor_of(baseline), seed, step, size, num_frames, worlds=MIXTURE, beats=beats)


def file_batches(baseline: str, folder: Path, asked: Asked) -> Iterator[tuple[dict, list[list[Question]]]]:
    """A batch a film."""
    for seed in range(FIRST_SEED["test"], FIRST_SEED["test"] + asked.clips):
        yield file_batch(baseline, folder, seed, asked._replace(clips=0, prune_ratio=None))


def mixed_videos(processor, seed: int, steps: int, size: int) -> Iterator[dict]:
    """Batches for the warm-up: of clips that belong to the seed, and that nothing else is trained on."""
    for step in range(steps):
        first_seed = FIRST_SEED["train"] * (seed + 200) + step * size
        yield sample_batch(processor, first_seed, size, 2, NUM_FRAMES, num_questions=1, worlds=MIXTURE)[0]


def train_row(baseline: str, name: str, seed: int, args: argparse.Namespace) -> dict:
    """Warms up, fine-tunes and evaluates one row; RUNS/row-seed/best holds its checkpoint."""
    torch.manual_seed(seed)
    row, steps = ROWS[name], round(args.steps * ROWS[name].share_of_steps)
    stts_config = STTSConfig(**{"prune_layer": 1, "seed": seed, **row.knobs})
    model, processor = prepare(baseline, stts_config, seed)
    began, losses = time.process_time(), []
    if row.warm_up:
        losses = list(warm_up(model, mixed_videos(processor, seed, row.warm_up, args.batch_size)))
    seconds = {"warm-up": time.process_time() - began}

    def batch_at(step: int) -> dict:
        if row.aux_loss_falls:
            model.config.stts_config.aux_loss_weight = 1 - step / steps
        return mixed_batch(baseline, seed, step, args.batch_size, row.num_frames)

    if steps:
        output = args.runs / f"{name}-{seed}".replace(" ", "_")
        fine_tune(model, processor, batch_at, output, steps, args.rate_scale, row.scorer_rate, MIXTURE)
    seconds["training"] = time.process_time() - began - seconds["warm-up"]
    model.eval()
    hits = {}
    for evaluation, asked in evaluations(name, seed == 0).items():
        pruning = {} if asked.prune_ratio is None else {"prune_ratio": asked.prune_ratio}
        batches = file_batches(baseline, args.runs / "clips", asked)
        right = hits_by_kind(model, batches, processor.tokenizer.eos_token_id, **pruning)
        hits[evaluation] = {kind: "".join(str(int(hit)) for hit in flags) for kind, flags in right.items()}
    kept = {}
    if stts_config.method not in ("none", "tome"):
        kept = {world: kept_shares(model, processor, 64, NUM_FRAMES, stts_config.method, world) for world in WORLDS}
    return {
        "row": name,
        "seed": seed,
        "knobs": row.knobs,
        "hits": hits,
        "kept": kept,
        "cpu_seconds": {part: round(value, 1) for part, value in seconds.items()},
        "warm_up_loss": [round(loss, 5) for loss in losses[:: max(1, len(losses) // 10)]],
    }


@torch_threads(1)
def main(arguments: Sequence[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("baseline")
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="all when not given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=8, help="clips a step")
    parser.add_argument("--rate-scale", type=float, default=30)
    args = parser.parse_args(arguments)
    disable_progress_bar()
    (args.runs / "clips").mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(args, name) for name in ("steps", "batch_size", "rate_scale")}
    settings["baseline"] = json.loads((Path(args.baseline) / "training.json").read_text())
    known = read_runs(args.output, settings)
    for seed in args.seeds:
        for row in args.rows or ROWS:
            result = args.runs / f"{row}-{seed}.json".replace(" ", "_")
            if not result.exists() and (row, seed) not in known:
                print(f"{row}, seed {seed}", flush=True)
                done = train_row(args.baseline, row, seed, args)
                with written_whole(result) as draft:
                    draft.write_text(json.dumps(done))
    done = [json.loads(file.read_text()) for file in args.runs.glob("*.json")]
    known |= {(run["row"], run["seed"]): run for run in done}
    runs = [known[key] for key in sorted(known)]
    with written_whole(args.output) as draft:
        draft.write_text(json.dumps({**provenance(), **settings, "num_frames": NUM_FRAMES, "runs": runs}) + "\n")


def read_runs(output: Path, settings: dict) -> dict[tuple[str, int], dict]:
    """The rows that an earlier call wrote, by name and seed; a `ValueError` where it had other settings."""
    if not output.exists():
        return {}
    results = json.loads(output.read_text())
    differing = {name: results.get(name) for name, value in settings.items() if results.get(name) != value}
    if differing:
        raise ValueError(f"{output} has rows of other settings, {differing}; name another file with --output.")
    return {(run["row"], run["seed"]): run for run in results["runs"]}


if __name__ == "__main__":
    main()
