"""Trains the tiny Molmo2 without pruning: the baseline that every row of the quality study starts from.

    python benchmarks/quality/train_baseline.py --output runs/baseline

Scenes grow along `CURRICULUM`. A clip is encoded once for several questions, each in a conversation of its own, and the
loss sees the answers only. The best weights by held-out accuracy are in OUTPUT/best; a run that is started again goes
on where it stopped.
"""

import argparse
from pathlib import Path

import torch
from batches import answer_logits, held_out_batches, sample_batch
from fit import fit
from scenes import FIRST_SEED
from tiny import build_model, build_processor
from torch.nn import functional as F
from transformers.utils.logging import disable_progress_bar

# (share of the run done when the stage ends, level of the scenes, beats a clip may have)
CURRICULUM = ((0.2, 0, (4,)), (0.3, 1, (4, 6)), (0.7, 2, (6, 8)), (1.0, 2, (8, 12, 16)))


def stage_of(step: int, total: int) -> tuple[int, tuple[int, ...]]:
    """Level and beats of the scenes at a step."""
    return next((level, beats) for share, level, beats in CURRICULUM if step < share * total)


def answer_loss(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    return F.cross_entropy(*answer_logits(model, batch))


def build_optimizers(model: torch.nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, head, biases and norms."""
    inner = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and not any(word in name for word in ("embed", "lm_head"))
    }
    outer = [parameter for name, parameter in model.named_parameters() if name not in inner]
    return [
        torch.optim.Muon(inner.values(), lr=learning_rate, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98)),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=8, help="clips a step")
    parser.add_argument("--questions", type=int, default=6, help="questions a clip")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    processor = build_processor()
    model = build_model(processor.tokenizer, args.seed)

    def batch_at(step: int) -> dict:
        level, choices = stage_of(step, args.steps)
        first_seed = FIRST_SEED["train"] * (args.seed + 1) + step * args.batch_size
        return sample_batch(processor, first_seed, args.batch_size, level, choices[step % len(choices)], args.questions)

    fit(
        model,
        processor,
        build_optimizers(model, args.learning_rate),
        batch_at,
        answer_loss,
        held_out_batches(processor),
        args.output,
        args.steps,
    )
