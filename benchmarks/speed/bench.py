"""What every section has: a preset, its models and inputs, and rows that take turns."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from stts_molmo.configuration_stts_molmo import STTSMolmoConfig
from stts_molmo.tools.operations import Shape, forward_operations

from .measuring import CpuClock, CudaClock, describe, take_turns
from .models import Models, make_inputs
from .presets import Preset, Row

VIT_STAGES = ("early_vit", "score", "late_vit", "adapter")


class Bench(NamedTuple):
    preset: Preset
    config: STTSMolmoConfig
    models: Models

    @property
    def clock(self):
        return CudaClock if self.preset.device == "cuda" else CpuClock

    def inputs(self, shape: Shape) -> dict[str, torch.Tensor]:
        return make_inputs(self.config, shape, self.preset.device, self.preset.dtype)

    def with_rounds(self, rounds: int) -> "Bench":
        return self._replace(preset=dataclasses.replace(self.preset, rounds=rounds))

    def operations(self, shape: Shape, row: Row, num_read: int = 1, num_new: int = 0) -> dict[str, float]:
        return forward_operations(self.config, shape, row.prune_ratio, row.method, num_read, num_new)

    def measure(
        self,
        section: str,
        shape: Shape,
        rows: Sequence[Row],
        step: Callable,
        passes: int = 1,
        stages: Sequence[str] | None = None,
        **counted,
    ) -> list[dict]:
        """
        `step(models, row, inputs)` of each row in turns.

        Args:
            passes: 3 for forward and backward, which needs two products for each of the forward's.
            stages: that the step runs; all when not given.
            counted: `num_read` and `num_new` of [`forward_operations`].
        """
        inputs = self.inputs(shape)
        steps = {row: partial(step, self.models, row, inputs) for row in rows}
        needed = {}
        for row in rows:
            count = self.operations(shape, row, **counted)
            needed[row] = passes * sum(count[name] for name in stages or count)
        return describe(section, self.config, shape, take_turns(steps, self.clock, self.preset.rounds), needed)
