"""A training step on videos of different lengths: packed into rows, and a row for each with padding."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import torch
from stts_molmo.tools.operations import Shape, forward_operations, grid_sizes
from stts_molmo.tools.training import join_media, length_after_pruning, pack_samples
from transformers import BatchFeature

from .bench import Bench
from .measuring import ratios, take_turns


def make_samples(bench: Bench) -> list[BatchFeature]:
    """Batches of one, labels on the text after each video."""
    samples = []
    for shape in bench.preset.packing:
        sample = bench.inputs(shape)
        sample["labels"] = torch.full_like(sample["input_ids"], -100)
        sample["labels"][:, -shape.text :] = sample["input_ids"][:, -shape.text :]
        samples.append(BatchFeature(sample))
    return samples


def pad_samples(samples: Sequence[BatchFeature]) -> BatchFeature:
    """A row for each sample, padded on the right to the longest."""
    length = max(sample["input_ids"].shape[1] for sample in samples)
    fills = {"input_ids": 0, "attention_mask": 0, "mm_token_type_ids": 0, "labels": -100}
    rows = {
        name: torch.cat([torch.nn.functional.pad(s[name], (0, length - s[name].shape[1]), value=fill) for s in samples])
        for name, fill in fills.items()
    }
    return BatchFeature(rows | join_media(samples))


def packing_limit(config, shapes: Sequence[Shape], prune_ratio: float) -> float:
    """How many times as fast packed rows without any padding may be as padded ones, by the count of operations."""
    per_frame = grid_sizes(config)[1]
    lengths = [shape.tokens(per_frame, prune_ratio) for shape in shapes]

    def operations(padding: Sequence[int]) -> float:
        padded = [dataclasses.replace(s, text=s.text + more) for s, more in zip(shapes, padding, strict=True)]
        pairs = zip(padded, shapes, strict=True)
        return sum(sum(forward_operations(config, p, prune_ratio, "scorer", s.text).values()) for p, s in pairs)

    return operations([max(lengths) - length for length in lengths]) / operations([0] * len(shapes))


def train_on(model, batch: BatchFeature):
    try:
        model(**batch, use_cache=False).loss.backward()
    finally:
        model.zero_grad()


def measure_packing(bench: Bench) -> list[dict]:
    model = bench.models.ours
    config = model.config.stts_config
    unpacked, to_pack = pad_samples(make_samples(bench)), make_samples(bench)
    longest = max(length_after_pruning(sample, config) for sample in to_pack)
    packed = pack_samples(to_pack, longest, config).to(bench.preset.device)
    batches = {"unpacked": unpacked, "packed": packed}
    bench.models.train(True)
    steps = {name: partial(train_on, model, batch) for name, batch in batches.items()}
    measurements = take_turns(steps, bench.clock, bench.preset.rounds)
    bench.models.train(False)
    return [
        {
            "section": "packing",
            "name": name,
            "frames": [shape.frames for shape in bench.preset.packing],
            "prune_ratio": config.prune_ratio,
            "rows": len(batches[name]["input_ids"]),
            "max_length": longest,
            **measurement.times(),
            "speedup_over_unpacked": ratios(measurements["unpacked"], measurement),
            "limit": packing_limit(bench.config, bench.preset.packing, config.prune_ratio) if name == "packed" else 1.0,
            "peak_bytes": measurement.peak_bytes,
        }
        for name, measurement in measurements.items()
    ]
