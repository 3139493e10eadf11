"""
Speed and memory of STTS on Molmo2 beside the native model of Transformers, all rows in one run.

    python benchmarks/throughput.py --preset cpu --output benchmarks/results/throughput_cpu.json

Weights are random and the same in every row; times do not depend on them. Rows take turns, so that a machine that gets
slower hits all alike, and a speedup is the median of the rounds' ratios. On a CPU a time is that of one thread of the
process, whatever else the machine does; on a GPU it is what CUDA events say. The plot is written beside the JSON.
"""

import argparse
import dataclasses
import datetime
import gc
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import av
import torch
import torch.nn.functional as F
import transformers
from operation_count import Shape, forward_operations, grid_sizes
from stts_molmo.attention_stts_molmo import attention_pool, torch_attention_pool
from stts_molmo.configuration_stts_molmo import STTSMolmoConfig
from stts_molmo.generation_stts_molmo import VIDEO_INPUTS
from stts_molmo.modeling_stts_molmo import STTSMolmoForConditionalGeneration
from stts_molmo.outputs_stts_molmo import STTSMolmoVideoFeatures
from stts_molmo.processing_stts_molmo import STTSMolmoVideoProcessor
from stts_molmo.pruning_stts_molmo import num_kept_tokens, select_tokens
from stts_molmo.tools.answer import answer_question
from stts_molmo.video_stts_molmo import (
    VideoDecoder,
    decode_clip_with_pyav,
    decode_clip_with_torchcodec,
    read_frame_index,
)
from throughput_plot import plot
from transformers import Molmo2Config, Molmo2ForConditionalGeneration
from transformers.models.molmo2.video_processing_molmo2 import arange_for_pooling
from transformers.utils.logging import disable_progress_bar

SEED = 0
LOGITS_TOLERANCE = 0.15  # bfloat16 rounds in each of 61 layers
BATCH = 8  # files that are decoded together
TOGETHER = f"decode sampled frames of {BATCH} files"


# ----------------------------------------------------------------------------------------------------------------------
# Rows and presets
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """`method` is a pruner of ours, `"native"` for the model of Transformers, or `"post_vit"`: see [`call`]."""

    name: str
    method: str
    prune_ratio: float


NATIVE, UNPRUNED = Row("native", "native", 0.0), Row("k=0", "scorer", 0.0)
PRUNED = tuple(Row(f"k={ratio}", "scorer", ratio) for ratio in (0.3, 0.4, 0.5))
COSINE, TOME = Row("cosine k=0.5", "cosine", 0.5), Row("ToMe k=0.5", "tome", 0.5)
POST_VIT = Row("post-ViT k=0.5", "post_vit", 0.5)
ROWS = (NATIVE, UNPRUNED, *PRUNED, COSINE, TOME, POST_VIT)
HALF = PRUNED[-1]


@dataclass(frozen=True)
class Preset:
    """Sizes of a run; each of `vit`, `prefill`, `training` and `growth` is measured at every shape it names."""

    config: dict
    device: str
    dtype: torch.dtype
    rounds: int
    gradient_checkpointing: bool
    vit: tuple[Shape, ...]
    prefill: tuple[Shape, ...]
    training: tuple[Shape, ...]
    request: Shape
    batch_sizes: tuple[int, ...]
    new_tokens: int
    growth: tuple[Shape, ...]
    growth_ratios: tuple[float, ...]
    parity_rounds: int
    clip_seconds: tuple[int, ...]


def scaled_shape(frames: int, videos: int = 1) -> Shape:
    """Text and delimiters in the proportions of the paper's 256-frame setting (section 4.3)."""
    return Shape(videos, frames, text=8 * frames, delimiters=10 * frames)


def narrow_config(grid: int, vision: dict, text: dict, **stts_config) -> dict:
    """A model of 16 wide heads throughout, and frames of `grid * grid` patches."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    return {
        "vision_config": {"hidden_size": 64, "image_size": [2 * grid] * 2, "patch_size": 2, **heads, **vision},
        "adapter_config": {
            "vision_feature_layer": [-1, -4],
            "hidden_size": 64,
            "intermediate_size": 256,
            "text_hidden_size": 128,
            **heads,
        },
        "text_config": {
            "hidden_size": 128,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 1024,
            "intermediate_size": 384,
            "max_position_embeddings": 1 << 16,
            **text,
        },
        **{name: 1024 + index for index, name in enumerate(TOKEN_IDS)},
        "stts_config": stts_config,
    }


TOKEN_IDS = (
    "image_patch_id",
    "image_start_token_id",
    "image_end_token_id",
    "low_res_image_start_token_id",
    "frame_start_token_id",
    "frame_end_token_id",
)
PAPER_SHAPES = (Shape(2, 64, 2048, 603), Shape(1, 256, 2048, 2523))
QUESTION_SHAPES = (Shape(2, 64, 64, 603), Shape(1, 256, 64, 2523))  # a benchmark's question instead of 2048 tokens

PRESETS = {
    # Molmo2-4B: SigLIP2 So400m/14 at 378 px without its last two layers, and Qwen3-4B.
    "gpu": Preset(
        config={
            "adapter_config": {"intermediate_size": 9728, "text_hidden_size": 2560},
            "text_config": {"hidden_size": 2560, "intermediate_size": 9728},
        },
        device="cuda",
        dtype=torch.bfloat16,
        rounds=2,
        gradient_checkpointing=True,
        vit=PAPER_SHAPES,
        prefill=PAPER_SHAPES + QUESTION_SHAPES,
        training=PAPER_SHAPES,
        request=Shape(1, 64, 64, 603),
        batch_sizes=(1, 4, 8, 16, 32),
        new_tokens=16,
        growth=tuple(Shape(1, frames, 64, 10 * frames) for frames in (16, 32, 64, 128, 256, 512)),
        growth_ratios=(0.0, 0.1, 0.3, 0.5, 0.7, 0.9),
        parity_rounds=5,
        clip_seconds=(20, 120),
    ),
    "cpu": Preset(
        config=narrow_config(
            27, {"num_hidden_layers": 13, "intermediate_size": 240}, {"num_hidden_layers": 4}, prune_layer=1
        ),
        device="cpu",
        dtype=torch.float32,
        rounds=3,
        gradient_checkpointing=False,
        vit=(scaled_shape(16),),
        prefill=(scaled_shape(64),),
        training=(scaled_shape(16),),
        request=scaled_shape(8),
        batch_sizes=(1, 4, 8, 16, 32),
        new_tokens=8,
        growth=tuple(scaled_shape(frames) for frames in (16, 32, 64, 128, 256, 512)),
        growth_ratios=(0.0, 0.3, 0.5, 0.7, 0.9),
        parity_rounds=31,
        clip_seconds=(20, 120),
    ),
    "dry-run": Preset(
        config=narrow_config(
            6, {"num_hidden_layers": 6, "intermediate_size": 96}, {"num_hidden_layers": 2}, prune_layer=0
        ),
        device="cpu",
        dtype=torch.float32,
        rounds=1,
        gradient_checkpointing=True,
        vit=(scaled_shape(4),),
        prefill=(scaled_shape(4, videos=2),),
        training=(scaled_shape(4, videos=2), scaled_shape(8)),
        request=scaled_shape(2),
        batch_sizes=(1, 2),
        new_tokens=3,
        growth=(scaled_shape(4), scaled_shape(8)),
        growth_ratios=(0.0, 0.5),
        parity_rounds=1,
        clip_seconds=(2,),
    ),
}


# ----------------------------------------------------------------------------------------------------------------------
# Models and inputs
# ----------------------------------------------------------------------------------------------------------------------


class Models(NamedTuple):
    native: Molmo2ForConditionalGeneration
    ours: STTSMolmoForConditionalGeneration

    def train(self, mode: bool):
        for model in self:
            model.train(mode)


def init_weights_by_fan_in(module: torch.nn.Module):
    """Activations, and with them scores, of a scale at which bfloat16 tells tokens apart."""
    if isinstance(module, torch.nn.Linear):
        torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)


def build_models(preset: Preset) -> Models:
    """Both models on the same parameters."""
    torch.manual_seed(SEED)
    native_config = {name: value for name, value in preset.config.items() if name != "stts_config"}
    settings = {"dtype": preset.dtype, "attn_implementation": "sdpa"}
    with torch.device(preset.device):
        ours = STTSMolmoForConditionalGeneration._from_config(STTSMolmoConfig(**preset.config), **settings)
        native = Molmo2ForConditionalGeneration._from_config(Molmo2Config(**native_config), **settings)
    ours.apply(init_weights_by_fan_in)
    shared = {name: p for name, p in ours.state_dict(keep_vars=True).items() if "token_scorer" not in name}
    native.load_state_dict(shared, assign=True)
    if preset.gradient_checkpointing:
        for model in (native, ours):
            model.gradient_checkpointing_enable()
    return Models(native.eval(), ours.eval())


def make_inputs(config: STTSMolmoConfig, shape: Shape, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What the processor returns for videos of random pixels, each with text after it."""
    num_patches, tokens_per_frame = grid_sizes(config)
    vision = config.vision_config
    side, num_frames = round(num_patches**0.5), shape.videos * shape.frames
    generator = torch.Generator(device).manual_seed(SEED)
    random = {"generator": generator, "device": device}

    window = config.stts_config.pooling_size
    blocks, rows, columns = arange_for_pooling(torch.arange(num_patches).view(side, side), window, window)
    pooling = blocks + num_patches * torch.arange(num_frames)[:, None, None]  # the window divides the frame

    ends = [shape.delimiters * t // shape.frames for t in range(shape.frames + 1)]
    gaps = [end - start for start, end in zip(ends, ends[1:], strict=False)]
    is_patch = torch.cat(
        [torch.arange(gap + tokens_per_frame) >= gap for gap in gaps] + [torch.zeros(shape.text, dtype=torch.bool)]
    ).to(device)
    ids = torch.randint(config.text_config.vocab_size, (shape.videos, len(is_patch)), **random)
    return {
        "input_ids": ids.masked_fill(is_patch, config.image_patch_id),
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": is_patch.long().expand_as(ids),
        "pixel_values_videos": torch.randn(
            num_frames, num_patches, vision.patch_size**2 * vision.num_channels, dtype=dtype, **random
        ),
        "video_token_pooling": pooling.flatten(0, 1).to(device),
        "video_grids": torch.tensor([[shape.frames, rows, columns]] * shape.videos, device=device),
    }


def drop_after_vit(native: Molmo2ForConditionalGeneration, row: Row, inputs: dict) -> dict:
    """Inputs with the native features of a random choice of tokens in place of the pixels."""
    videos = {name: inputs[name] for name in VIDEO_INPUTS}
    pooled = native.model.get_video_features(**videos).pooler_output
    num_frames = [grid[0] for grid in inputs["video_grids"].tolist()]
    per_frame = len(pooled[0]) // num_frames[0]
    num_kept = [num_kept_tokens(t, per_frame, row.prune_ratio) for t in num_frames]
    scores = torch.rand(sum(num_frames), per_frame, device=pooled[0].device)
    keep_mask = select_tokens(scores, num_frames, num_kept)
    kept = torch.cat(pooled)[keep_mask.flatten()].split(num_kept)
    features = STTSMolmoVideoFeatures(pooler_output=kept, keep_mask=keep_mask)
    return {name: value for name, value in inputs.items() if name not in VIDEO_INPUTS} | {
        "mm_encoder_outputs": {"video": features}
    }


def call(models: Models, row: Row, inputs: dict, **kwargs):
    """
    One forward of a row. `"post_vit"` runs the native vision tower on all tokens and our language model on some: what
    a method that prunes between the two can gain at best, as choosing the tokens costs it nothing here.
    """
    if row.method == "native":
        return models.native(**inputs, **kwargs)
    if row.method == "post_vit":
        return models.ours(**drop_after_vit(models.native, row, inputs), **kwargs)
    return models.ours(**inputs, prune_ratio=row.prune_ratio, method=row.method, **kwargs)


def encode(models: Models, row: Row, inputs: dict) -> torch.Tensor:
    """The vision tower and adapter alone: tokens `(kept, text_hidden_size)` of all videos."""
    videos = {name: inputs[name] for name in VIDEO_INPUTS}
    if row.method == "native":
        return torch.cat(models.native.model.get_video_features(**videos).pooler_output)
    features = models.ours.model.get_video_features(**videos, prune_ratio=row.prune_ratio, method=row.method)
    return torch.cat(features.pooler_output)


@torch.no_grad()
def encode_step(models: Models, row: Row, inputs: dict):
    encode(models, row, inputs)


def encode_training_step(models: Models, row: Row, inputs: dict):
    try:
        encode(models, row, inputs).square().mean().backward()
    finally:
        models.ours.zero_grad()


@torch.no_grad()
def prefill_step(models: Models, row: Row, inputs: dict):
    call(models, row, inputs, logits_to_keep=1, use_cache=True)


def training_step(models: Models, row: Row, inputs: dict, num_labels: int):
    """Forward and backward, labels on the text after the video."""
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -num_labels:] = inputs["input_ids"][:, -num_labels:]
    try:
        call(models, row, inputs, labels=labels, use_cache=False).loss.backward()
    finally:
        models.ours.zero_grad()


def generate(models: Models, row: Row, inputs: dict, new_tokens: int):
    """A request from pixels to the last of `new_tokens` answer tokens."""
    length = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False}
    if row.method == "native":
        return models.native.generate(**inputs, **length)
    return models.ours.generate(**inputs, **length, prune_ratio=row.prune_ratio, method=row.method)


# ----------------------------------------------------------------------------------------------------------------------
# Measuring
# ----------------------------------------------------------------------------------------------------------------------


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


# ----------------------------------------------------------------------------------------------------------------------
# Sections
# ----------------------------------------------------------------------------------------------------------------------


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


def sdpa_pool(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """As `torch_attention_pool`, by the kernels that torch has for attention."""
    query, key, value = query[:, :, None], key.transpose(1, 2), value.transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value, scale=scaling)[:, :, 0]


def pool_step(pool: Callable, inputs: Sequence[torch.Tensor]):
    torch.autograd.grad(pool(*inputs, scaling=0.1).sum(), inputs)


def measure_pooling(bench: Bench) -> list[dict]:
    """
    Attention of one query to each block of patches, in the 16 heads of 72 of Molmo2, forward and backward, by every op
    that there is for it.
    """
    shape, vision = bench.preset.vit[0], STTSMolmoConfig().vision_config
    blocks = shape.videos * shape.frames * grid_sizes(bench.config)[1]
    heads = (vision.num_attention_heads, vision.head_dim)
    slots = bench.config.stts_config.pooling_size**2
    inputs = [
        torch.randn(size, device=bench.preset.device, dtype=bench.preset.dtype, requires_grad=True)
        for size in ((blocks, *heads), (blocks, slots, *heads), (blocks, slots, *heads))
    ]
    pools = {"SDPA": sdpa_pool, "torch": torch_attention_pool}
    if bench.preset.device == "cuda":
        pools["Triton"] = attention_pool
    steps = {name: partial(pool_step, pool, inputs) for name, pool in pools.items()}
    measurements = take_turns(steps, bench.clock, bench.preset.parity_rounds)
    return [
        {
            "section": "pooling",
            "name": name,
            "blocks": blocks,
            **measurement.times(),
            "speedup_over_sdpa": ratios(measurements["SDPA"], measurement),
            "peak_bytes": measurement.peak_bytes,
        }
        for name, measurement in measurements.items()
    ]


def write_long_clip(path: Path, seconds: int):
    """A moving pattern at 640 x 360 and 30 frames a second, with a key frame every two seconds."""
    rows, columns = torch.meshgrid(torch.arange(360), torch.arange(640), indexing="ij")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=30, options={"g": "60"})
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        for tick in range(30 * seconds):
            channels = [rows + 2 * tick, columns + tick, (rows + columns) // 2 - tick]
            frame = (torch.stack(channels, dim=-1) % 256).to(torch.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")))
        container.mux(stream.encode())


def decode_all(path: str) -> None:
    """Decodes every frame to RGB, as a reader without seeking does."""
    with av.open(path) as container:
        container.streams.video[0].thread_type = "AUTO"
        for frame in container.decode(video=0):
            frame.to_ndarray(format="rgb24")


def clip_seconds(path: str, rounds: int) -> tuple[dict[str, int], dict[str, list[tuple[float, float]]]]:
    """Frames sampled and frames in the file; and of each way to decode, and of preprocessing, CPU and wall seconds."""
    processor = STTSMolmoVideoProcessor(do_rescale=True, do_normalize=True)
    frames, metadata = processor.fetch_videos(path, sample_indices_fn=processor.sample_frames)

    def decode_sampled(decode: Callable):
        index = read_frame_index(path)
        return decode(path, index, index.pts[processor.sample_frames(index.metadata())])

    decode = partial(decode_sampled, decode_clip_with_pyav)
    preprocess = partial(
        processor, videos=[frames], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt"
    )

    def decode_then_preprocess():
        decode()
        preprocess()

    def decode_beside_preprocess():
        with ThreadPoolExecutor(1) as pool:
            decoding = pool.submit(decode)
            preprocess()
            decoding.result()

    stages = {
        "decode sampled frames": decode,
        TOGETHER: partial(processor.fetch_videos, [path] * BATCH, sample_indices_fn=processor.sample_frames),
        "decode every frame": partial(decode_all, path),
        "preprocess": preprocess,
        "decode, then preprocess": decode_then_preprocess,
        "decode beside preprocess": decode_beside_preprocess,  # what overlapping them could gain at best
    }
    if VideoDecoder is not None:
        stages["decode sampled frames, torchcodec"] = partial(decode_sampled, decode_clip_with_torchcodec)
    seconds = {stage: [] for stage in stages}
    for index in range(rounds + 1):
        for stage, step in stages.items():
            start = (time.process_time(), time.perf_counter())
            step()
            end = (time.process_time(), time.perf_counter())
            if index:  # the first round warms up
                seconds[stage].append(tuple(b - a for a, b in zip(start, end, strict=True)))
    return {"frames": len(frames), "file_frames": metadata.total_num_frames}, seconds


def measure_clip(bench: Bench) -> list[dict]:
    """
    Decoding of files of several lengths and preprocessing of what was sampled, at Molmo2's frame size, with as many
    threads as there are cores.
    """
    records, num_threads = [], torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    for length in bench.preset.clip_seconds:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "clip.mp4"
            write_long_clip(path, length)
            counts, seconds = clip_seconds(str(path), bench.preset.parity_rounds)
        for stage, times in seconds.items():
            cpu, wall = (summary(list(values)) for values in zip(*times, strict=True))
            files = BATCH if stage == TOGETHER else 1
            records.append(
                {"section": "clip", **counts, "files": files, "stage": stage, "seconds": cpu, "wall_seconds": wall}
            )
    torch.set_num_threads(num_threads)
    return records


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
    root = Path(__file__).parents[1]
    answer_question(
        video=str(root / "examples/clips/busy.mp4"),
        question="What color is the still shape?",
        checkpoint=str(root / "checkpoints/stts-molmo-tiny"),
        prune_ratio=prune_ratio,
        method=None,
        num_frames=None,
        test_time_scaling=False,
        max_new_tokens=8,
        device=device,
        dtype="auto",
    )


def peak_resident_bytes() -> int:
    """High-water mark of this program. Not `ru_maxrss`: that begins with what the parent process had."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].split()[0])


def peak_rss(preset: Preset, row: Row) -> dict[str, int]:
    """Peak resident bytes of this process before and after its first training step."""
    torch.set_num_threads(1)
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


SECTIONS = {
    "vit": measure_vit,
    "prefill": measure_prefill,
    "training": measure_training,
    "serving": measure_serving,
    "growth": measure_growth,
    "stages": measure_stages,
    "pooling": measure_pooling,
    "clip": measure_clip,
    "ask": measure_ask,
    "parity": measure_parity,
    "memory": measure_memory,
}


def run(preset: Preset, sections: Sequence[str]) -> Iterator[dict]:
    """After each of the `sections` all records so far, and what they were measured on."""
    torch.set_num_threads(1)
    disable_progress_bar()
    models = build_models(preset)
    bench = Bench(preset, models.ours.config, models)
    load_before = os.getloadavg()[0]
    cpu = f"{platform.machine()}, {os.cpu_count()} CPU cores, 1 thread"
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
        "date": datetime.date.today().isoformat(),
        "hardware": torch.cuda.get_device_name() if preset.device == "cuda" else cpu,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "av": av.__version__,
            "torchcodec": None if VideoDecoder is None else version("torchcodec"),
        },
    }
    records = []
    for name in sections:
        records += SECTIONS[name](bench)
        print(f"{name}: {len(records)} records", flush=True)
        yield origin | {
            "load_average": [round(load, 2) for load in (load_before, os.getloadavg()[0])],
            "records": records,
        }


def main(arguments: Sequence[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, required=True)
    parser.add_argument("--output", type=Path, required=True, help="JSON file; the plot is OUTPUT with .png")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction)
    args = parser.parse_args(arguments)
    preset = PRESETS[args.preset]
    if args.gradient_checkpointing is not None:
        preset = dataclasses.replace(preset, gradient_checkpointing=args.gradient_checkpointing)
    for result in run(preset, args.sections):  # written after each section: should time run out, these are there
        result = {"preset": args.preset, **result}
        args.output.write_text(json.dumps(result, indent=1) + "\n")
        plot(result, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
