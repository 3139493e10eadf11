"""Rows that are compared, and the sizes of a run."""

from dataclasses import dataclass

import torch
from stts_molmo.tools.operations import Shape


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
    large_size: tuple[int, int]
    packing: tuple[Shape, ...]


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
        large_size=(3840, 2160),
        packing=tuple(Shape(1, frames, 64, 10 * frames) for frames in (64, 8, 16, 32, 8, 16, 64, 8)),
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
        large_size=(3840, 2160),
        packing=tuple(map(scaled_shape, (16, 2, 4, 8, 2, 4, 16, 2))),
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
        large_size=(512, 256),
        packing=tuple(map(scaled_shape, (4, 1, 2, 1))),
    ),
}
