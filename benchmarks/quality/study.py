"""The quality study: fine-tunes every row of the paper's ablations from one baseline and evaluates it.

    python -m benchmarks.quality.study runs/baseline/best --runs runs/rows \\
        --output benchmarks/results/quality_study.json

A row is a checkpoint converted by `convert_checkpoint` and trained with the model's own loss in the parameter groups
of the paper, all rates `--rate-scale` times the paper's, on clips the baseline has not seen. Rows that are done are not
done again, so several processes can share the work, each with some of the `--rows`; OUTPUT gets all that are done.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from stts_molmo.configuration_stts_molmo import STTSConfig
from stts_molmo.modeling_stts_molmo import STTSMolmoForConditionalGeneration
from stts_molmo.processing_stts_molmo import STTSMolmoProcessor
from stts_molmo.tools.conversion import convert_checkpoint
from stts_molmo.tools.files import written_whole
from stts_molmo.tools.training import parameter_groups
from stts_molmo.video_stts_molmo import scaled_num_frames
from transformers.utils.logging import disable_progress_bar

from ..common import provenance, torch_threads
from .batches import held_out_batches, hits_by_kind, sample_batch
from .evaluate import clip_batches
from .fit import fit
from .scenes import FIRST_SEED

NUM_FRAMES = 8  # of training, and of a short clip's beats
LONG_BEATS = 16
# Rows that are compared, trained with every seed; then those that are trained once.
COMPARED = {
    "unpruned": {"method": "none", "prune_ratio": 0.0},
    "stts 50": {"prune_ratio": 0.5},
    "cosine 50": {"method": "cosine", "prune_ratio": 0.5},
    "random 50": {"method": "random", "prune_ratio": 0.5},
    "stts 50 without aux": {"prune_ratio": 0.5, "aux_loss_weight": 0.0},
    "tome 50": {"method": "tome", "prune_ratio": 0.5},
    "stts 30": {"prune_ratio": 0.3},
    "stts 40": {"prune_ratio": 0.4},
}
ONCE = {
    "stts 50 log patches": {"prune_ratio": 0.5, "score_bias": "log", "aux_target": "patches"},
    "stts 50 rescaled patches": {"prune_ratio": 0.5, "score_bias": "rescaled_log", "aux_target": "patches"},
    "stts 50 rescaled pooled": {"prune_ratio": 0.5, "score_bias": "rescaled_log", "aux_target": "pooled"},
    **{f"stts 50 layer {layer}": {"prune_ratio": 0.5, "prune_layer": layer} for layer in (0, 2, 3)},
    **{f"stts {k}": {"prune_ratio": k / 100} for k in (60, 70, 80, 90)},
    **{f"random {k}": {"method": "random", "prune_ratio": k / 100} for k in (60, 70, 80, 90)},
}


def evaluate(model, processor, clips: int, row: str, prune_ratio: float) -> dict[str, dict[str, str]]:
    """Right ("1") or wrong of every question by kind, by evaluation: short and long clips and what the row adds."""
    short, long = (NUM_FRAMES, NUM_FRAMES), (LONG_BEATS, NUM_FRAMES)
    evaluations = {"short": (*short, {}), "long": (*long, {})}
    if row in ("stts 30", "stts 40", "stts 50"):
        evaluations["long, more frames"] = (LONG_BEATS, scaled_num_frames(NUM_FRAMES, prune_ratio), {})
    if row == "unpruned":
        for method in ("cosine", "tome"):
            evaluations |= {
                f"{length}, {method} 50 untrained": (*shape, {"method": method, "prune_ratio": 0.5})
                for length, shape in (("short", short), ("long", long))
            }
        evaluations |= {f"{length}, text only": (*shape, None) for length, shape in (("short", short), ("long", long))}
    results = {}
    for name, (beats, num_frames, pruning) in evaluations.items():
        batches = clip_batches(processor, clips, beats, num_frames, with_video=pruning is not None)
        hits = hits_by_kind(model, batches, processor.tokenizer.eos_token_id, **(pruning or {}))
        results[name] = {kind: "".join(str(int(hit)) for hit in right) for kind, right in hits.items()}
    return results


def prepare(baseline: str, stts_config: STTSConfig, seed: int) -> tuple:
    """Model and processor of a converted baseline, whose scorer is new."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = convert_checkpoint(baseline, Path(folder) / "model", stts_config, seed=seed)
        return (
            STTSMolmoForConditionalGeneration.from_pretrained(checkpoint),
            STTSMolmoProcessor.from_pretrained(checkpoint),
        )


def training_batch(processor, seed: int, step: int, size: int, num_frames: int, **scenes) -> dict:
    """Clips that belong to a seed of a row, which the baseline has not seen."""
    first_seed = FIRST_SEED["train"] * (seed + 100) + step * size
    return sample_batch(processor, first_seed, size, 2, num_frames, **scenes)[0]


def fine_tune(
    model,
    processor,
    batch_at: Callable[[int], dict],
    output: Path,
    steps: int,
    rate_scale: float,
    scorer_rate: float = 1e-4,
    worlds: Sequence[str] = ("still",),
) -> None:
    """
    Trains with `rate_scale` times the paper's learning rates, but for the scorer's if another `scorer_rate` is given;
    OUTPUT/best holds the checkpoint.
    """
    groups = parameter_groups(model, scorer_learning_rate=scorer_rate)
    for group in groups:
        group["lr"] *= rate_scale
    optimizer, held_out = torch.optim.AdamW(groups, betas=(0.9, 0.98)), held_out_batches(processor, worlds)
    fit(model, processor, [optimizer], batch_at, held_out, output, steps, eval_every=steps)
    model.eval()


def train_row(baseline: str, row: str, seed: int, args: argparse.Namespace) -> dict:
    """Fine-tunes and evaluates one row; RUNS/row-seed/best holds its checkpoint."""
    torch.manual_seed(seed)
    stts_config = STTSConfig(**{"prune_layer": 1, "seed": seed, **(COMPARED | ONCE)[row]})
    model, processor = prepare(baseline, stts_config, seed)

    def batch_at(step: int) -> dict:
        return training_batch(processor, seed, step, args.batch_size, NUM_FRAMES)

    output = args.runs / f"{row}-{seed}".replace(" ", "_")
    fine_tune(model, processor, batch_at, output, args.steps, args.rate_scale)
    return {
        "row": row,
        "seed": seed,
        "knobs": (COMPARED | ONCE)[row],
        "hits": evaluate(model, processor, args.clips, row, stts_config.prune_ratio),
    }


@torch_threads(1)
def main(arguments: Sequence[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("baseline")
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", choices=[*COMPARED, *ONCE], help="all when not given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the compared rows")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8, help="clips a step")
    parser.add_argument("--rate-scale", type=float, default=30)
    parser.add_argument("--clips", type=int, default=128, help="test clips of each length")
    args = parser.parse_args(arguments)
    disable_progress_bar()
    jobs = [(row, seed) for seed in args.seeds for row in COMPARED] + [(row, args.seeds[0]) for row in ONCE]
    args.runs.mkdir(parents=True, exist_ok=True)
    for row, seed in jobs:
        result = args.runs / f"{row}-{seed}.json".replace(" ", "_")
        if not result.exists() and (args.rows is None or row in args.rows):
            done = json.dumps(train_row(args.baseline, row, seed, args))
            with written_whole(result) as draft:
                draft.write_text(done)
    done = [json.loads(file.read_text()) for file in sorted(args.runs.glob("*.json"))]
    settings = {name: getattr(args, name) for name in ("steps", "batch_size", "rate_scale", "clips")}
    with written_whole(args.output) as draft:
        draft.write_text(json.dumps({**provenance(), **settings, "num_frames": NUM_FRAMES, "runs": done}) + "\n")


if __name__ == "__main__":
    main()
