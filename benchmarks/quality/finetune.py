"""Fine-tunes one row of the quality study from the unpruned baseline: STTS, a simpler pruner, or none.

    python benchmarks/quality/finetune.py runs/baseline/best --output runs/stts-50 --method scorer --prune-ratio 0.5

The row is a checkpoint converted by `convert_checkpoint` and trained with the model's own loss in the parameter groups
of the paper, all rates `--rate-scale` times the paper's. OUTPUT/best holds the weights of the best held-out accuracy.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from batches import encode_clips, held_out_batches, sample_batch
from fit import fit
from scenes import FIRST_SEED
from stts_molmo.configuration_stts_molmo import METHODS, STTSConfig
from stts_molmo.conversion import convert_checkpoint
from stts_molmo.modeling_stts_molmo import STTSMolmoForConditionalGeneration
from stts_molmo.processing_stts_molmo import STTSMolmoProcessor
from stts_molmo.training import parameter_groups
from transformers.utils.logging import disable_progress_bar

BEATS = (8, 12, 16)


def model_loss(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    return model(**encode_clips(model, batch)).loss


def load_converted(
    baseline: str, stts_config: STTSConfig, seed: int
) -> tuple[STTSMolmoForConditionalGeneration, STTSMolmoProcessor]:
    """The baseline with a fresh scorer, and its processor."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = convert_checkpoint(baseline, Path(folder) / "model", stts_config, seed=seed)
        model = STTSMolmoForConditionalGeneration.from_pretrained(checkpoint)
        return model, STTSMolmoProcessor.from_pretrained(checkpoint)


if __name__ == "__main__":
    defaults = STTSConfig(prune_layer=1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("baseline")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--method", choices=METHODS, default=defaults.method)
    parser.add_argument("--prune-ratio", type=float, default=defaults.prune_ratio)
    parser.add_argument("--prune-layer", type=int, default=defaults.prune_layer)
    parser.add_argument("--score-bias", default=defaults.score_bias)
    parser.add_argument("--aux-target", default=defaults.aux_target)
    parser.add_argument("--aux-loss-weight", type=float, default=defaults.aux_loss_weight)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=8, help="clips a step")
    parser.add_argument("--questions", type=int, default=6, help="questions a clip")
    parser.add_argument("--rate-scale", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    disable_progress_bar()
    knobs = ("method", "prune_ratio", "prune_layer", "score_bias", "aux_target", "aux_loss_weight", "seed")
    stts_config = STTSConfig(**{name: getattr(args, name) for name in knobs})
    model, processor = load_converted(args.baseline, stts_config, args.seed)
    groups = parameter_groups(model)
    for group in groups:
        group["lr"] *= args.rate_scale

    def batch_at(step: int) -> dict:
        # Clips that the baseline has not seen.
        first_seed = FIRST_SEED["train"] * (args.seed + 100) + step * args.batch_size
        return sample_batch(processor, first_seed, args.batch_size, 2, BEATS[step % len(BEATS)], args.questions)

    fit(
        model,
        processor,
        [torch.optim.AdamW(groups, betas=(0.9, 0.98))],
        batch_at,
        model_loss,
        held_out_batches(processor),
        args.output,
        args.steps,
    )
