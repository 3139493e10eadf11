"""`stts-molmo ask`, from file to answer."""

import dataclasses
from functools import partial

from stts_molmo.tools.answer import answer_question
from stts_molmo.tools.checkpoint import Checkpoint

from ..common import ROOT, TINY
from .bench import Bench
from .measuring import CpuClock, WallClock, ratios, take_turns
from .presets import HALF, UNPRUNED


def measure_ask(bench: Bench) -> list[dict]:
    """`stts-molmo ask` from file to answer with the bundled checkpoint, whose model is small beside all else."""
    rows = (UNPRUNED, HALF)
    steps = {row: partial(ask_once, row.prune_ratio, bench.preset.device) for row in rows}
    clock = CpuClock if bench.preset.device == "cpu" else WallClock
    measurements = take_turns(steps, clock, bench.preset.parity_rounds)
    return [
        {
            "section": "ask",
            **dataclasses.asdict(row),
            **measurements[row].times(),
            "speedup_over_k0": ratios(measurements[UNPRUNED], measurements[row]),
        }
        for row in rows
    ]


def ask_once(prune_ratio: float, device: str):
    checkpoint = Checkpoint(str(TINY), device)
    clip = str(ROOT / "examples/clips/busy.mp4")
    answer_question(checkpoint, clip, "What color is the still shape?", prune_ratio=prune_ratio, max_new_tokens=8)
