"""Tiny random models and inputs that every test of the model shares."""

import os

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import pytest
from stts_molmo.configuration_stts_molmo import STTSMolmoConfig
from stts_molmo.modeling_stts_molmo import STTSMolmoForConditionalGeneration
from transformers import Molmo2Config, Molmo2ForConditionalGeneration
from transformers.models.molmo2.video_processing_molmo2 import arange_for_pooling

VOCAB_SIZE = 64
IMAGE_TOKEN = 66  # <im_patch>
FRAME_START, FRAME_END = 68, 69
PATCH_DIM = 2 * 2 * 3


def config_dict(grid: int = 6, **stts_config) -> dict:
    """Config of a model with `grid * grid` patches a frame."""
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "image_size": [2 * grid, 2 * grid],
        "patch_size": 2,
    }
    adapter = {
        "vision_feature_layer": [4, -2],
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 24,
        "text_hidden_size": 32,
    }
    text = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCAB_SIZE,
        "additional_vocab_size": 16,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "max_position_embeddings": 30000,
    }
    token_ids = {
        "image_start_token_id": 64,
        "image_end_token_id": 65,
        "image_patch_id": IMAGE_TOKEN,
        "low_res_image_start_token_id": 67,
        "frame_start_token_id": FRAME_START,
        "frame_end_token_id": FRAME_END,
    }
    config = {"vision_config": vision, "adapter_config": adapter, "text_config": text, **token_ids}
    if stts_config:
        config["stts_config"] = {"prune_layer": 1, **stts_config}
    return config


def randomize(model: torch.nn.Module, seed: int = 0):
    """Weights large enough that outputs differ visibly between inputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def make_native(grid: int = 6, attn: str = "sdpa") -> Molmo2ForConditionalGeneration:
    config = Molmo2Config(**config_dict(grid))
    config._attn_implementation = attn
    model = Molmo2ForConditionalGeneration(config).eval()
    randomize(model)
    return model


def make_model(grid: int = 6, attn: str = "sdpa", **stts_config) -> STTSMolmoForConditionalGeneration:
    """The native model's weights under STTS."""
    config = STTSMolmoConfig(**config_dict(grid, **{"prune_ratio": 0.5, **stts_config}))
    config._attn_implementation = attn
    model = STTSMolmoForConditionalGeneration(config).eval()
    randomize(model, seed=1)
    missing, unexpected = model.load_state_dict(make_native(grid).state_dict(), strict=False)
    assert not unexpected and all("token_scorer" in name for name in missing)
    return model


def video_tensors(num_frames: list[int], grid: int = 6, window: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """What the processor returns for videos, with random pixels; frame `t` repeats much of frame `t - 1`."""
    generator = torch.Generator().manual_seed(seed)
    pixels, pooling, grids, offset = [], [], [], 0
    blocks, rows, columns = arange_for_pooling(torch.arange(grid * grid).view(grid, grid), window, window)
    for count in num_frames:
        video = torch.randn(count, grid * grid, PATCH_DIM, generator=generator)
        still = torch.rand(count, grid * grid, 1, generator=generator) < 0.4
        for t in range(1, count):
            video[t] = torch.where(still[t], video[t - 1], video[t])
        pixels.append(video)
        for _ in range(count):
            pooling.append(torch.where(blocks >= 0, blocks + offset, blocks))
            offset += grid * grid
        grids.append([count, rows, columns])
    return {
        "pixel_values_videos": torch.cat(pixels),
        "video_token_pooling": torch.cat(pooling),
        "video_grids": torch.tensor(grids),
    }


def prompt_ids(num_frames: int, tokens_per_frame: int, question: list[int]) -> list[int]:
    """Question after a video, with a timestamp and delimiters around each frame's placeholders."""
    ids = [1]
    for t in range(num_frames):
        ids += [2 + t % 7, FRAME_START, *[IMAGE_TOKEN] * tokens_per_frame, FRAME_END]
    return ids + question


def make_inputs(
    num_frames: list[int | None], grid: int = 6, window: int = 3, side: str = "left", seed: int = 0
) -> dict[str, torch.Tensor]:
    """A batch; `None` in `num_frames` is a row of text only."""
    tokens_per_frame = (-(-grid // window)) ** 2
    rows = [
        prompt_ids(count or 0, tokens_per_frame, [10 + index, 20, 30 + (seed + index) % 8, 9])
        for index, count in enumerate(num_frames)
    ]
    length = max(map(len, rows))
    pads = [[0] * (length - len(row)) for row in rows]
    pad = (lambda row, fill: fill + row) if side == "left" else (lambda row, fill: row + fill)
    input_ids = torch.tensor([pad(row, fill) for row, fill in zip(rows, pads, strict=True)])
    attention_mask = torch.tensor([pad([1] * len(row), fill) for row, fill in zip(rows, pads, strict=True)])
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "mm_token_type_ids": (input_ids == IMAGE_TOKEN).long(),
    }
    videos = [count for count in num_frames if count]
    return inputs | (video_tensors(videos, grid, window, seed) if videos else {})


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)
