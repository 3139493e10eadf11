"""
Attention in which vision tokens of a prompt see each other, on the kernels of whatever backend vLLM chose.

Molmo2's text tokens are causal; a vision token sees all keys before it and all vision tokens behind it. vLLM's own
ranges of multimodal tokens cannot say that (a video's frames would not see each other, its timestamps would see what is
behind them), and its CPU backend ignores them. So a step runs the backend twice:

1. As always. This is right for all text, and it stores the keys and values in their places.
2. For each prompt with a video: its new keys are put in another order, *text before the video, vision, other text*. In
   this order, what a vision token sees is a prefix: all that was cached, all vision, and the text before itself. The
   tokens of a frame have the same prefix, so they are one sequence with a length of its own, without causality, and all
   of these share the prompt's blocks. Then the keys are put back.

It needs a video's remaining tokens in one step, whatever was cached before.
"""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata
from vllm.v1.attention.selector import get_attn_backend


class VisionPass(NamedTuple):
    """
    The second run for one prompt.

    tokens: its new tokens among those of the step.
    order: int64 `(tokens,)`, the same, vision moved before the text behind it.
    queries: int64 `(vision tokens,)`, among those of the step.
    slots: int64 `(tokens,)`, where their keys and values are in the cache.
    metadata: the backend's, of one sequence for each frame.
    """

    tokens: slice
    order: torch.Tensor
    queries: torch.Tensor
    slots: torch.Tensor
    metadata: Any


def vision_order(is_vision: torch.Tensor) -> torch.Tensor:
    """
    Text before the first vision token, vision, text behind it.

    >>> vision_order(torch.tensor([False, True, False, True, False]))
    tensor([0, 1, 3, 2, 4])
    """
    is_behind = is_vision.cumsum(0) > 0
    return torch.where(is_vision, 1, 2 * is_behind).argsort(stable=True)


def visible_keys(is_vision: torch.Tensor, num_cached: int) -> torch.Tensor:
    """
    How many keys each vision token sees: those up to itself, and the vision tokens behind it.

    >>> visible_keys(torch.tensor([False, True, True, False, True]), num_cached=10)
    tensor([14, 14, 15])
    """
    positions = is_vision.nonzero().flatten()
    num_behind = torch.arange(len(positions) - 1, -1, -1, device=positions.device)
    return num_cached + positions + 1 + num_behind


def plan_vision_passes(is_vision: torch.Tensor, builder: Any, common: CommonAttentionMetadata) -> list[VisionPass]:
    """
    Args:
        is_vision: bool `(tokens,)` of a step.
        builder: of the backend's metadata.
        common: what the step's own metadata was made of.
    """
    passes = []
    bounds, lengths = common.query_start_loc_cpu[: common.num_reqs + 1].tolist(), common.seq_lens.tolist()
    for row, (start, stop) in enumerate(pairwise(bounds)):
        of_prompt = is_vision[start:stop]
        if not of_prompt.any():
            continue
        seen, counts = visible_keys(of_prompt, lengths[row] - (stop - start)).unique_consecutive(return_counts=True)
        queries, slots = start + of_prompt.nonzero().flatten(), common.slot_mapping[start:stop]
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(common.query_start_loc)
        metadata = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts.cpu(),
            seq_lens=seen.to(common.seq_lens),
            num_reqs=len(seen),
            num_actual_tokens=len(queries),
            max_query_len=int(counts.max()),
            max_seq_len=int(seen[-1]),
            block_table_tensor=common.block_table_tensor[row].repeat(len(seen), 1),
            slot_mapping=common.slot_mapping.index_select(0, queries),
            causal=False,
            seq_lens_cpu_upper_bound=seen.to(common.seq_lens).cpu(),
        )
        passes.append(
            VisionPass(slice(start, stop), start + vision_order(of_prompt), queries, slots, builder.build(0, metadata))
        )
    return passes


def attach_vision_passes(is_vision: torch.Tensor, metadata: Sequence[Any]) -> None:
    """Plan the second run of a step for the metadata of its layers, which layers of a kind share."""
    for shared in {id(item): item for item in metadata}.values():
        shared.vision_passes = plan_vision_passes(is_vision, *shared.made_of)


@cache
def with_vision_passes(backend: type[AttentionBackend]) -> type[AttentionBackend]:
    """A backend of vLLM whose layers run the second time where [`attach_vision_passes`] planned it."""
    builder_cls, impl_cls = backend.get_builder_cls(), backend.get_impl_cls()

    class Builder(builder_cls):
        def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, *args, **kwargs):
            metadata = super().build(common_prefix_len, common_attn_metadata, *args, **kwargs)
            metadata.made_of = self, common_attn_metadata
            return metadata

    class Impl(impl_cls):
        def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs):
            result = super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
            for step in getattr(attn_metadata, "vision_passes", ()):
                self.do_kv_cache_update(layer, key[step.order], value[step.order], kv_cache, step.slots)
                inputs = (x.index_select(0, step.queries) for x in (query, key, value))
                attended = output.new_empty(len(step.queries), *output.shape[1:])
                super().forward(layer, *inputs, kv_cache, step.metadata, attended, *args, **kwargs)
                output[step.queries] = attended
                self.do_kv_cache_update(layer, key[step.tokens], value[step.tokens], kv_cache, step.slots)
            return result

    class Backend(backend):
        @staticmethod
        def get_builder_cls():
            return Builder

        @staticmethod
        def get_impl_cls():
            return Impl

    return Backend


class VisionAttention(Attention):
    """vLLM's layer on its own choice of a backend [`with_vision_passes`]."""

    def __init__(self, *, head_size: int, cache_config, **kwargs):
        backend = get_attn_backend(head_size, torch.get_default_dtype(), cache_config.cache_dtype)
        super().__init__(
            head_size=head_size, cache_config=cache_config, attn_backend=with_vision_passes(backend), **kwargs
        )
