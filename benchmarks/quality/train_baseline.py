"""Trains the tiny Molmo2 without pruning: the baseline that every row of the quality study starts from.

    python -m benchmarks.quality.train_baseline --output runs/baseline
    torchrun --nproc-per-node 2 -m benchmarks.quality.train_baseline --checkpoint runs/baseline/best \\
        --output runs/mixture --steps 1200

The model first learns words from captions of single frames and of pairs, then answers about clips that grow along
`CURRICULUM`. A clip's questions are one conversation, and the loss sees the answers only. The best weights by held-out
accuracy are in OUTPUT/best; a run that is started again goes on where it stopped. With `--checkpoint` a model that
knows the still world learns the mixture of all, along `MIXTURE_CURRICULUM`. `torchrun` shares the work of each step
between processes.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from stts_molmo.tools.files import written_whole
from transformers import Molmo2Config, Molmo2ForConditionalGeneration
from transformers.utils.logging import disable_progress_bar

from ..common import torch_threads
from .batches import held_out_batches, sample_batch
from .fit import fit
from .scenes import FIRST_SEED
from .tiny import build_model, build_processor
from .worlds import MIXTURE


class Stage(NamedTuple):
    """
    Part of the training: until which share of all steps; level of the scenes; frames a clip may have; clips a step (in
    batch sizes), questions (`None` for all), captions and lessons of each.
    """

    until: float
    level: int
    num_frames: tuple[int, ...]
    clips: int
    questions: int | None
    captions: int
    lessons: int = 0


CURRICULUM = (
    Stage(0.08, level=1, num_frames=(1,), clips=6, questions=0, captions=2),
    Stage(0.14, level=1, num_frames=(2,), clips=3, questions=0, captions=3),
    Stage(0.26, level=1, num_frames=(4,), clips=1, questions=9, captions=3),
    Stage(0.40, level=2, num_frames=(4, 6), clips=1, questions=13, captions=1),
    Stage(1.00, level=2, num_frames=(6, 8, 8, 16), clips=1, questions=None, captions=0),
)
MIXTURE_CURRICULUM = (  # of a model that knows the still world
    Stage(0.15, level=2, num_frames=(1,), clips=4, questions=0, captions=1, lessons=3),
    Stage(0.30, level=2, num_frames=(2,), clips=2, questions=0, captions=1, lessons=3),
    Stage(0.45, level=2, num_frames=(4,), clips=1, questions=None, captions=1, lessons=3),
    Stage(1.00, level=2, num_frames=(6, 8, 8, 16), clips=1, questions=None, captions=0, lessons=3),
)
ADAPTER_GROWTH = 4  # of the norm of the adapter's last matrix, which starts out small


def stage_of(step: int, total: int, curriculum: tuple[Stage, ...]) -> Stage:
    return next(stage for stage in curriculum if step < stage.until * total)


def load_plain(checkpoint: Path) -> Molmo2ForConditionalGeneration:
    """The native Molmo2 of a checkpoint, without the scorer if it has one."""
    config = json.loads((checkpoint / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in ("auto_map", "stts_config", "model_type")}
    return Molmo2ForConditionalGeneration.from_pretrained(checkpoint, config=Molmo2Config.from_dict(config))


def build_optimizers(
    model: torch.nn.Module, learning_rate: float, adapter_growth: float = ADAPTER_GROWTH
) -> list[torch.optim.Optimizer]:
    """
    Muon for the matrices inside the layers, AdamW for embeddings, head, biases and norms.

    The matrices' norms may not outgrow what the weights started with: nothing normalises the adapter's output, and
    beside vision tokens that grow what the language model's layers add to them is lost.
    """
    inner = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and not any(word in name for word in ("embed", "lm_head"))
    }
    outer = [parameter for name, parameter in model.named_parameters() if name not in inner]
    muon = torch.optim.Muon(inner.values(), lr=learning_rate, adjust_lr_fn="match_rms_adamw", weight_decay=0.0)
    limits = {
        matrix: (adapter_growth if "image_projector.down_proj" in name else 1) * matrix.detach().norm()
        for name, matrix in inner.items()
    }

    @torch.no_grad()
    def limit_norms(*_):
        for matrix, limit in limits.items():
            matrix.mul_((limit / matrix.norm()).clamp(max=1))

    muon.register_step_post_hook(limit_norms)
    return [muon, torch.optim.AdamW(outer, lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))]


def main(arguments: Sequence[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, help="to start from, on the mixture; fresh when not given")
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch-size", type=int, default=8, help="clips a step")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    disable_progress_bar()
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    processor = build_processor()
    model = load_plain(args.checkpoint) if args.checkpoint else build_model(processor.tokenizer, args.seed)
    worlds, curriculum = (MIXTURE, MIXTURE_CURRICULUM) if args.checkpoint else (("still",), CURRICULUM)
    optimizers = build_optimizers(model, args.learning_rate, 1 if args.checkpoint else ADAPTER_GROWTH)

    def batch_at(step: int) -> dict:
        stage = stage_of(step, args.steps, curriculum)
        size = args.batch_size * stage.clips // processes
        first_seed = FIRST_SEED["train"] * (args.seed + 1) + step * args.batch_size * CURRICULUM[0].clips + rank * size
        frames = stage.num_frames[step % len(stage.num_frames)]
        asked = (stage.questions, stage.captions, stage.lessons)
        return sample_batch(processor, first_seed, size, stage.level, frames, *asked, worlds)[0]

    with torch_threads(args.threads):
        best = fit(
            model,
            processor,
            optimizers,
            batch_at,
            held_out_batches(processor, worlds),
            args.output,
            args.steps,
        )
    if rank == 0:
        facts = {"steps": args.steps, "batch_size": args.batch_size, "seed": args.seed, "held_out": round(best, 4)}
        with written_whole(args.output / "best" / "training.json") as draft:
            draft.write_text(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
