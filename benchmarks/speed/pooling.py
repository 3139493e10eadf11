"""The attention that pools a block of patches, by every op that there is for it."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from stts_molmo.attention_stts_molmo import attention_pool, torch_attention_pool
from stts_molmo.configuration_stts_molmo import STTSMolmoConfig
from stts_molmo.tools.operations import grid_sizes

from .bench import Bench
from .measuring import ratios, take_turns


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
