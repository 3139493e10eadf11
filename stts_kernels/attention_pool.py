"""Attention with one query for each block of keys, forward and backward in one kernel each."""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable


@triton.jit
def locate(
    slots: tl.constexpr, heads: tl.constexpr, head_dim: tl.constexpr, SLOTS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Where this program's block and head are: offsets in the query, in the keys, and which of them exist."""
    block, head = tl.program_id(0).to(tl.int64) // heads, tl.program_id(0) % heads
    channel, slot = tl.arange(0, CHANNELS), tl.arange(0, SLOTS)
    head_offsets = (block * heads + head) * head_dim + channel
    key_offsets = ((block * slots + slot[:, None]) * heads + head) * head_dim + channel[None, :]
    return head_offsets, key_offsets, channel < head_dim, slot < slots


@triton.jit
def load_block(query, key, value, head_offsets, key_offsets, is_channel, is_slot, scaling):
    """Query `(channels,)`, keys and values `(slots, channels)` of one block and head, and the weights `(slots,)`."""
    q = tl.load(query + head_offsets, mask=is_channel, other=0.0).to(tl.float32)
    inside = is_slot[:, None] & is_channel[None, :]
    k = tl.load(key + key_offsets, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(value + key_offsets, mask=inside, other=0.0).to(tl.float32)
    logits = tl.where(is_slot, tl.sum(k * q[None, :], axis=1) * scaling, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, axis=0))
    return q, k, v, weights / tl.sum(weights, axis=0)


@triton.jit
def attention_pool_forward(
    query,
    key,
    value,
    output,
    scaling,
    slots: tl.constexpr,
    heads: tl.constexpr,
    head_dim: tl.constexpr,
    SLOTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    head_offsets, key_offsets, is_channel, is_slot = locate(slots, heads, head_dim, SLOTS, CHANNELS)
    _, _, v, weights = load_block(query, key, value, head_offsets, key_offsets, is_channel, is_slot, scaling)
    pooled = tl.sum(weights[:, None] * v, axis=0)
    tl.store(output + head_offsets, pooled.to(output.dtype.element_ty), mask=is_channel)


@triton.jit
def attention_pool_backward(
    query,
    key,
    value,
    grad,
    grad_query,
    grad_key,
    grad_value,
    scaling,
    slots: tl.constexpr,
    heads: tl.constexpr,
    head_dim: tl.constexpr,
    SLOTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    head_offsets, key_offsets, is_channel, is_slot = locate(slots, heads, head_dim, SLOTS, CHANNELS)
    q, k, v, weights = load_block(query, key, value, head_offsets, key_offsets, is_channel, is_slot, scaling)
    g = tl.load(grad + head_offsets, mask=is_channel, other=0.0).to(tl.float32)
    grad_weights = tl.sum(v * g[None, :], axis=1)
    grad_logits = weights * (grad_weights - tl.sum(weights * grad_weights, axis=0)) * scaling
    inside = is_slot[:, None] & is_channel[None, :]
    grad_q = tl.sum(grad_logits[:, None] * k, axis=0)
    tl.store(grad_query + head_offsets, grad_q.to(grad_query.dtype.element_ty), mask=is_channel)
    grad_k = grad_logits[:, None] * q[None, :]
    tl.store(grad_key + key_offsets, grad_k.to(grad_key.dtype.element_ty), mask=inside)
    grad_v = weights[:, None] * g[None, :]
    tl.store(grad_value + key_offsets, grad_v.to(grad_value.dtype.element_ty), mask=inside)


def launch(kernel, *tensors: torch.Tensor, shape: torch.Size, scaling: float):
    """One program of one warp for each block and head of keys of `shape`, the heads of a block one after the other."""
    blocks, slots, heads, head_dim = shape
    sizes = {"SLOTS": triton.next_power_of_2(slots), "CHANNELS": triton.next_power_of_2(head_dim)}
    with torch.cuda.device_of(tensors[0]):
        kernel[(blocks * heads,)](*tensors, scaling, slots, heads, head_dim, **sizes, num_warps=1)


class AttentionPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, scaling):
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        output = torch.empty_like(query)
        launch(attention_pool_forward, query, key, value, output, shape=key.shape, scaling=scaling)
        ctx.save_for_backward(query, key, value)
        ctx.scaling = scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        tensors = ctx.saved_tensors
        grads = tuple(torch.empty_like(x) for x in tensors)
        shape, scaling = tensors[1].shape, ctx.scaling
        launch(attention_pool_backward, *tensors, grad.contiguous(), *grads, shape=shape, scaling=scaling)
        return *grads, None


def attention_pool(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """
    `softmax(scaling * q @ k^T) @ v` with one query for each block, as `torch_attention_pool` of
    `modeling_stts_molmo.py`; each of query, keys and values is read once.

    Args:
        query: `(blocks, heads, head_dim)`, float32, float16 or bfloat16, on a CUDA device.
        key, value: `(blocks, slots, heads, head_dim)`, of the same dtype.

    Returns:
        `(blocks, heads, head_dim)`; sums are in float32.
    """
    return AttentionPool.apply(query, key, value, scaling)
