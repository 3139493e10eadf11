"""Clocks, rounds in turns, and the records of what they gave."""

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from stts_molmo.configuration_stts_molmo import STTSMolmoConfig
from stts_molmo.tools.operations import Shape, grid_sizes

from .presets import NATIVE, UNPRUNED, Row


class CpuClock:
    """CPU time of this process."""

    mark = staticmethod(time.process_time)

    @staticmethod
    def seconds(start: float, end: float) -> float:
        return end - start


class CudaClock:
    """Time on the GPU's stream."""

    @staticmethod
    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @staticmethod
    def seconds(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1000


class WallClock:
    """For what ends with a result on the host."""

    mark = staticmethod(time.perf_counter)
    seconds = CpuClock.seconds


@dataclass
class Measurement:
    """Seconds of each round, peak memory where the device tells it, and why there are no more rounds."""

    seconds: list[float]
    peak_bytes: int | None = None
    failure: str | None = None

    def times(self) -> dict:
        return {"failure": self.failure} if self.failure else {"seconds": summary(self.seconds)}


def take_turns(steps: dict[Hashable, Callable], clock, rounds: int) -> dict[Hashable, Measurement]:
    """Run every step once to warm up, then once a round, every other time in reverse order, unless it fails."""
    measurements = {row: Measurement([]) for row in steps}
    for index in range(1 + rounds):
        for row in list(steps)[:: (-1) ** index]:
            measurement = measurements[row]
            if measurement.failure:
                continue
            if index == 0 and clock is CudaClock:
                torch.cuda.reset_peak_memory_stats()
            start = clock.mark()
            try:
                steps[row]()
            except RuntimeError as error:  # out of memory, or more than a kernel takes
                measurement.failure = f"{type(error).__name__}: {error}".splitlines()[0]
            if measurement.failure:
                gc.collect()
                torch.cuda.empty_cache()
            elif index > 0:
                measurement.seconds.append(clock.seconds(start, clock.mark()))
            elif clock is CudaClock:
                measurement.peak_bytes = torch.cuda.max_memory_allocated()
    return measurements


def summary(values: list[float]) -> dict[str, float]:
    """Median and spread, to four digits."""
    numbers = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in numbers.items()}


def ratios(numerator: Measurement | None, denominator: Measurement) -> dict[str, float] | None:
    if numerator is None or numerator.failure or denominator.failure:
        return None
    return summary([a / b for a, b in zip(numerator.seconds, denominator.seconds, strict=True)])


def describe(
    section: str,
    config: STTSMolmoConfig,
    shape: Shape,
    measurements: dict[Row, Measurement],
    operations: dict[Row, float],
) -> list[dict]:
    """One record a row: times, speedups over the native model and our own k = 0, and what arithmetic allows."""
    records = []
    for row, measurement in measurements.items():
        tokens = shape.tokens(grid_sizes(config)[1], row.prune_ratio)
        record = {"section": section, **dataclasses.asdict(shape), **dataclasses.asdict(row), "tokens": tokens}
        if measurement.failure:
            records.append(record | measurement.times())
            continue
        needed = operations[row]
        times = measurement.times()
        records.append(
            record
            | times
            | {
                "speedup_over_native": ratios(measurements.get(NATIVE), measurement),
                "speedup_over_k0": ratios(measurements.get(UNPRUNED), measurement),
                "limit": round(operations[UNPRUNED] / needed, 3),
                "operations": needed,
                "teraflops": round(needed / times["seconds"]["median"] / 1e12, 5),
                "peak_bytes": measurement.peak_bytes,
            }
        )
    return records
