"""
Speed and memory of STTS on Molmo2 beside the native model of Transformers, all rows in one run.

    python -m benchmarks.speed --preset cpu --output benchmarks/results/throughput_cpu.json

Weights are random and the same in every row; times do not depend on them. Rows take turns, so that a machine that gets
slower hits all alike, and a speedup is the median of the rounds' ratios. On a CPU a time is that of one thread of the
process, whatever else the machine does; on a GPU it is what CUDA events say. The plot is written beside the JSON.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from stts_molmo.tools.files import written_whole
from transformers.utils.logging import disable_progress_bar

from ..common import provenance, torch_threads
from .bench import Bench
from .measuring import CudaClock
from .models import SEED, build_models, call
from .plot import plot
from .presets import NATIVE, PRESETS, UNPRUNED, Preset, Row
from .sections import SECTIONS

LOGITS_TOLERANCE = 0.15  # bfloat16 rounds in each of 61 layers


@torch.no_grad()
def check_logits(bench: Bench) -> dict[str, float]:
    """
    Relative distances of our logits: at k = 0 from the native ones, and at k = 0.5 from those of eager attention with
    dense masks. Survivors are drawn at random: scores differ in the last bit between kernels, and so might the choice.

    Raises:
        ValueError: one is more than rounding explains, and no time means anything.
    """
    inputs, ours = bench.inputs(bench.preset.prefill[0]), bench.models.ours

    def logits(row: Row) -> torch.Tensor:
        return call(bench.models, row, inputs, logits_to_keep=1).logits.float()

    row = Row("random k=0.5", "random", 0.5)
    pruned = logits(row)
    ours.set_attn_implementation("eager")
    eager = logits(row)
    ours.set_attn_implementation("sdpa")
    pairs = {"native": (logits(NATIVE), logits(UNPRUNED)), "eager": (eager, pruned)}
    distances = {name: float((b - a).norm() / a.norm()) for name, (a, b) in pairs.items()}
    if not max(distances.values()) < LOGITS_TOLERANCE:
        raise ValueError(f"Our logits are too far from those they should equal, relative to their norm: {distances}.")
    return distances


def run(preset: Preset, sections: Sequence[str]) -> Iterator[dict]:
    """After each of the `sections` all records so far, and what they were measured on."""
    models = build_models(preset)
    bench = Bench(preset, models.ours.config, models)
    load_before = os.getloadavg()[0]
    origin = {
        "config": preset.config,
        "dtype": str(preset.dtype).removeprefix("torch."),
        "gradient_checkpointing": preset.gradient_checkpointing,
        "rounds": preset.rounds,
        "parity_rounds": preset.parity_rounds,
        "new_tokens": preset.new_tokens,
        "seed": SEED,
        "clock": "CUDA events" if bench.clock is CudaClock else "CPU time of the process, others run beside it",
        "logits_distance_from": check_logits(bench),
        **provenance(preset.device),
    }
    records = []
    for name in sections:
        records += SECTIONS[name](bench)
        print(f"{name}: {len(records)} records", flush=True)
        yield origin | {
            "load_average": [round(load, 2) for load in (load_before, os.getloadavg()[0])],
            "records": records,
        }


@torch_threads(1)
def main(arguments: Sequence[str] | None = None):
    parser = argparse.ArgumentParser(
        "python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, required=True)
    parser.add_argument("--output", type=Path, required=True, help="JSON file; the plot is OUTPUT with .png")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction)
    args = parser.parse_args(arguments)
    preset = PRESETS[args.preset]
    if args.gradient_checkpointing is not None:
        preset = dataclasses.replace(preset, gradient_checkpointing=args.gradient_checkpointing)
    disable_progress_bar()
    for result in run(preset, args.sections):  # written after each section: should time run out, these are there
        result = {"preset": args.preset, **result}
        with written_whole(args.output) as draft:
            draft.write_text(json.dumps(result, indent=1) + "\n")
        plot(result, args.output.with_suffix(".png"))
