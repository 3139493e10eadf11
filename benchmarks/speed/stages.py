"""Where the time of a request goes."""

import dataclasses
from collections.abc import Callable

from .bench import Bench
from .measuring import summary
from .models import generate
from .presets import HALF, NATIVE, UNPRUNED, Row

STAGES = ("early_vit", "score", "late_vit", "adapter", "language")


def stage_seconds(bench: Bench, row: Row, inputs: dict) -> dict[str, float]:
    """Where the time of one batch of requests goes; `other` is what lies between the stages of the prefill."""
    clock, num_new = bench.clock, bench.preset.new_tokens
    prune_layer = bench.config.stts_config.prune_layer
    model = (bench.models.native if row.method == "native" else bench.models.ours).model
    tower, projector, language = model.vision_tower, model.multi_modal_projector, model.language_model
    ends = [
        ("other", tower.register_forward_pre_hook),
        ("early_vit", tower.layers[prune_layer].register_forward_hook),
        ("score", tower.layers[prune_layer + 1].layer_norm1.register_forward_pre_hook),
        ("late_vit", tower.register_forward_hook),
        ("other", projector.register_forward_pre_hook),
        ("adapter", projector.register_forward_hook),
        ("other", language.register_forward_pre_hook),
        ("language", language.register_forward_hook),
    ]
    names, marks = [], []

    def on_end(name: str) -> Callable:
        def hook(*_):
            names.append(name)
            marks.append(clock.mark())

        return hook

    handles = [register(on_end(name)) for name, register in ends]
    start = clock.mark()
    generate(bench.models, row, inputs, num_new)
    end = clock.mark()
    for handle in handles:
        handle.remove()

    prefilled = names.index("language") + 1
    seconds = dict.fromkeys((*STAGES, "other"), 0.0)
    for name, begin, stop in zip(names[:prefilled], [start, *marks], marks, strict=False):
        seconds[name] += clock.seconds(begin, stop)
    return seconds | {"new_token": clock.seconds(marks[prefilled - 1], end) / (num_new - 1)}


def measure_stages(bench: Bench) -> list[dict]:
    records, shape, rows = [], bench.preset.prefill[-1], (NATIVE, UNPRUNED, HALF)
    inputs = bench.inputs(shape)
    rounds = {row: [] for row in rows}
    for index in range(bench.preset.rounds + 1):
        for row in rows:
            seconds = stage_seconds(bench, row, inputs)
            rounds[row] += [seconds] if index else []  # the first one warms up
    for row in rows:
        needed = bench.operations(shape, row, num_new=1)
        for stage in rounds[row][0]:
            seconds = summary([stages[stage] for stages in rounds[row]])
            rate = {"teraflops": round(needed[stage] / seconds["median"] / 1e12, 5)} if needed.get(stage) else {}
            records.append(
                {
                    "section": "stages",
                    **dataclasses.asdict(shape),
                    **dataclasses.asdict(row),
                    "stage": stage,
                    "seconds": seconds,
                    **rate,
                }
            )
    return records
