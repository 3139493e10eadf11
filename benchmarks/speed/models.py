"""Both models on the same random weights, random inputs, and what a row does with them."""

from typing import NamedTuple

import torch
from stts_molmo.configuration_stts_molmo import STTSMolmoConfig
from stts_molmo.modeling_stts_molmo import STTSMolmoForConditionalGeneration
from stts_molmo.outputs_stts_molmo import STTSMolmoVideoFeatures
from stts_molmo.pruning_stts_molmo import num_kept_tokens, select_tokens
from stts_molmo.tools.operations import Shape, grid_sizes
from transformers import Molmo2Config, Molmo2ForConditionalGeneration
from transformers.models.molmo2.video_processing_molmo2 import arange_for_pooling

from ..common import init_by_fan_in, split_video
from .presets import Preset, Row

SEED = 0


class Models(NamedTuple):
    native: Molmo2ForConditionalGeneration
    ours: STTSMolmoForConditionalGeneration

    def train(self, mode: bool):
        for model in self:
            model.train(mode)


def build_models(preset: Preset) -> Models:
    """Both models on the same parameters."""
    torch.manual_seed(SEED)
    native_config = {name: value for name, value in preset.config.items() if name != "stts_config"}
    settings = {"dtype": preset.dtype, "attn_implementation": "sdpa"}
    with torch.device(preset.device):
        ours = STTSMolmoForConditionalGeneration._from_config(STTSMolmoConfig(**preset.config), **settings)
        native = Molmo2ForConditionalGeneration._from_config(Molmo2Config(**native_config), **settings)
    for module in ours.modules():
        if isinstance(module, torch.nn.Linear):
            init_by_fan_in(module)
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
    videos, others = split_video(inputs)
    pooled = native.model.get_video_features(**videos).pooler_output
    num_frames = [grid[0] for grid in inputs["video_grids"].tolist()]
    per_frame = len(pooled[0]) // num_frames[0]
    num_kept = [num_kept_tokens(t, per_frame, row.prune_ratio) for t in num_frames]
    scores = torch.rand(sum(num_frames), per_frame, device=pooled[0].device)
    keep_mask = select_tokens(scores, num_frames, num_kept)
    kept = torch.cat(pooled)[keep_mask.flatten()].split(num_kept)
    features = STTSMolmoVideoFeatures(pooler_output=kept, keep_mask=keep_mask)
    return others | {"mm_encoder_outputs": {"video": features}}


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
    videos, _ = split_video(inputs)
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
