"""Memory of a training step, in a process of its own."""

import dataclasses
import multiprocessing

from ..common import torch_threads
from ..processes import peak_resident_bytes
from .bench import Bench
from .models import build_models, make_inputs, training_step
from .presets import HALF, NATIVE, UNPRUNED, Preset, Row


@torch_threads(1)
def peak_rss(preset: Preset, row: Row) -> dict[str, int]:
    """Peak resident bytes of this process before and after its first training step."""
    shape = preset.prefill[-1]
    models = build_models(preset)
    inputs = make_inputs(models.ours.config, shape, preset.device, preset.dtype)
    models.train(True)
    before = peak_resident_bytes()
    training_step(models, row, inputs, shape.text)
    return {"bytes_before": before, "peak_bytes": peak_resident_bytes()}


def measure_memory(bench: Bench) -> list[dict]:
    """A training step of each row in a process of its own; on a GPU the training records have their peaks."""
    records = []
    for row in (NATIVE, UNPRUNED, HALF) if bench.preset.device == "cpu" else ():
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak = pool.apply(peak_rss, (bench.preset, row))
        shape = dataclasses.asdict(bench.preset.prefill[-1])
        records.append({"section": "memory", **shape, **dataclasses.asdict(row), **peak})
    return records
