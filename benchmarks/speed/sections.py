"""The sections of a run, each from a bench to its records."""

import dataclasses
from collections.abc import Sequence
from functools import partial

from .ask import measure_ask
from .bench import VIT_STAGES, Bench
from .decoding import measure_clip
from .large import measure_large
from .memory import measure_memory
from .models import encode_step, encode_training_step, generate, prefill_step, training_step
from .packing import measure_packing
from .pooling import measure_pooling
from .presets import HALF, NATIVE, ROWS, UNPRUNED, Row
from .stages import measure_stages


def measure_vit(bench: Bench) -> list[dict]:
    records, rows = [], ROWS[:-1]  # before the language model, the post-ViT row is the native one
    for shape in bench.preset.vit:
        records += bench.measure("vit forward", shape, rows, encode_step, stages=VIT_STAGES)
        bench.models.train(True)
        records += bench.measure("vit training", shape, rows, encode_training_step, passes=3, stages=VIT_STAGES)
        bench.models.train(False)
    return records


def measure_prefill(bench: Bench) -> list[dict]:
    return [record for shape in bench.preset.prefill for record in bench.measure("prefill", shape, ROWS, prefill_step)]


def measure_training(bench: Bench) -> list[dict]:
    records = []
    bench.models.train(True)
    for shape in bench.preset.training:
        step = partial(training_step, num_labels=shape.text)
        records += bench.measure("training", shape, ROWS, step, passes=3, num_read=shape.text)
    bench.models.train(False)
    return records


def measure_serving(bench: Bench) -> list[dict]:
    """Batches of requests, each answered with a few tokens."""
    return measure_batches(bench, "serving", bench.preset.batch_sizes, (NATIVE, UNPRUNED, HALF))


def measure_batches(bench: Bench, section: str, batch_sizes: Sequence[int], rows: Sequence[Row]) -> list[dict]:
    records, num_new = [], bench.preset.new_tokens
    for batch_size in batch_sizes:
        shape = dataclasses.replace(bench.preset.request, videos=batch_size)
        step = partial(generate, new_tokens=num_new)
        records += bench.measure(section, shape, rows, step, num_new=num_new - 1)
    return records


def measure_growth(bench: Bench) -> list[dict]:
    """Prefill against the number of frames, and against k; long videos take minutes, so one round must do."""
    bench, records = bench.with_rounds(1), []
    for shape in bench.preset.growth:
        records += bench.measure("growth with frames", shape, (NATIVE, UNPRUNED, HALF), prefill_step)
    rows = [Row(f"k={ratio}", "scorer", ratio) for ratio in bench.preset.growth_ratios]
    middle = bench.preset.growth[(len(bench.preset.growth) - 1) // 2]
    return records + bench.measure("growth with k", middle, [UNPRUNED, *rows[1:]], prefill_step)


def measure_parity(bench: Bench) -> list[dict]:
    """k = 0 beside the native model, in enough rounds to tell whether it is slower."""
    bench = bench.with_rounds(bench.preset.parity_rounds)
    records, rows, shape = [], (NATIVE, UNPRUNED), bench.preset.training[0]
    records += bench.measure("parity vit forward", shape, rows, encode_step, stages=VIT_STAGES)
    records += bench.measure("parity prefill", shape, rows, prefill_step)
    bench.models.train(True)
    step = partial(training_step, num_labels=shape.text)
    records += bench.measure("parity training", shape, rows, step, passes=3, num_read=shape.text)
    bench.models.train(False)
    return records + measure_batches(bench, "parity serving", bench.preset.batch_sizes[:-1], rows)


SECTIONS = {
    "vit": measure_vit,
    "prefill": measure_prefill,
    "training": measure_training,
    "serving": measure_serving,
    "growth": measure_growth,
    "stages": measure_stages,
    "pooling": measure_pooling,
    "clip": measure_clip,
    "large": measure_large,
    "ask": measure_ask,
    "parity": measure_parity,
    "packing": measure_packing,
    "memory": measure_memory,
}
