"""How survivors are packed, and the attention that runs on them: packing, bins, a bias folded into the keys, varlen,
pooling of blocks, and the LLM's mask without a matrix.

Torch's own kernels throughout; what only some releases or machines have is imported beside its use.
"""

import functools
import inspect
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .pruning_stts_molmo import VideoLayout, mask_to_indices

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None
if varlen_attn is not None and "window_size" not in inspect.signature(varlen_attn).parameters:
    varlen_attn = None  # torch before 2.11: a loop over frames computes the same

try:
    from stts_kernels import attention_pool
except ImportError:  # a checkpoint's code without the package, or no Triton: `torch_attention_pool` computes the same
    attention_pool = None


# ----------------------------------------------------------------------------------------------------------------------
# Packing
# ----------------------------------------------------------------------------------------------------------------------


class Packing(NamedTuple):
    """
    Where the patches that late layers see come from, frame after frame, and within a frame block after block.

    patches: int64 `(tokens,)`, their indices in the flattened `(frames * N,)` patches.
    counts: int64 `(frames,)`, patches of each frame.
    capacity: `N`, upper bound of a frame's patches.
    slots: int64 `(num_kept, w * w)`, the patches of each surviving block among them; -1 outside the frame. `None` when
        they are the surviving blocks one after the other, `w * w` patches each.
    """

    patches: torch.Tensor
    counts: torch.Tensor
    capacity: int
    slots: torch.Tensor | None

    @property
    def cu_seqlens(self) -> torch.Tensor:
        """Offsets of each frame: int32 `(frames + 1,)`."""
        return F.pad(self.counts.cumsum(0, dtype=torch.int32), (1, 0))


def plan_packing(keep_mask: torch.Tensor, num_kept: int, layout: VideoLayout, refill: bool) -> Packing:
    """
    Lay out the survivors for the late layers (section 3.3). All sizes are known beforehand, unless the window does
    not divide the frame or `refill` gives lone frames their tokens back.

    Args:
        keep_mask: bool `(frames, P)` with `num_kept` set entries.
    """
    context_mask, num_context = keep_mask, num_kept
    if refill:
        context_mask = refill_lone_frames(keep_mask, layout)
        num_context = int(context_mask.sum())
    tokens = mask_to_indices(context_mask, num_context)
    blocks = layout.blocks.index_select(0, tokens % layout.tokens_per_frame)
    frame = tokens // layout.tokens_per_frame
    patches, slots = (blocks + (frame * layout.num_patches)[:, None]).flatten(), None
    if refill or not layout.is_dense:
        inside = blocks.flatten() >= 0
        patches = patches[inside]
        slots = (inside.cumsum(0) - 1).masked_fill(~inside, -1).view_as(blocks)
        if refill:
            slots = slots.index_select(0, mask_to_indices(keep_mask.flatten()[tokens], num_kept))
    counts = ((layout.blocks >= 0).sum(1) * context_mask).sum(1)
    return Packing(patches, counts, layout.num_patches, slots)


class Bins(NamedTuple):
    """
    Result of [`first_fit_descending`].

    assignment: bin of each frame.
    offsets: first slot of each frame in its bin.
    num_bins: bins that hold a token.
    """

    assignment: list[int]
    offsets: list[int]
    num_bins: int


def first_fit_descending(counts: Sequence[int], capacity: int) -> Bins:
    """
    Algorithm 1 (appendix D): frames by falling count, each into the first bin with room for it.

    >>> first_fit_descending([2, 5, 3], capacity=5)
    Bins(assignment=[1, 0, 1], offsets=[3, 0, 0], num_bins=2)

    Raises:
        ValueError: a frame has more tokens than a bin has slots.
    """
    if max(counts, default=0) > capacity:
        raise ValueError(f"A frame with {max(counts)} tokens does not fit a bin of {capacity} slots.")
    load = [0] * len(counts)
    assignment, offsets = [0] * len(counts), [0] * len(counts)
    for frame in sorted(range(len(counts)), key=lambda frame: -counts[frame]):
        target = next(b for b, used in enumerate(load) if used + counts[frame] <= capacity)
        assignment[frame], offsets[frame] = target, load[target]
        load[target] += counts[frame]
    return Bins(assignment, offsets, sum(used > 0 for used in load))


def refill_lone_frames(keep_mask: torch.Tensor, layout: VideoLayout) -> torch.Tensor:
    """
    Give each frame that shares its bin with no other frame of its video all its tokens back. Frames without a survivor
    stay empty. The authors' code bins all videos of a batch together; here each is binned alone, so that a video's
    tokens do not depend on its batch. For single videos it is the same.

    Args:
        keep_mask: bool `(frames, P)`.

    Returns:
        bool `(frames, P)`, the tokens that late layers attend to.
    """
    lone, rest = [], ((layout.blocks >= 0).sum(1) * keep_mask).sum(1).tolist()
    for num_frames in layout.num_frames:
        counts, rest = rest[:num_frames], rest[num_frames:]
        bins = first_fit_descending(counts, layout.num_patches)
        used = [b for b, count in zip(bins.assignment, counts, strict=True) if count]
        lone += [count > 0 and used.count(b) == 1 for b, count in zip(bins.assignment, counts, strict=True)]
    return keep_mask | torch.tensor(lone, device=keep_mask.device)[:, None]


def pack_into_bins(
    packed: torch.Tensor, counts: Sequence[int], capacity: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Packed frames -> dense first-fit-descending bins, for attention without varlen (section 3.3, Algorithm 1).

    Args:
        packed: `(tokens, D)`, frames one after the other.
        counts: tokens of each frame.
        capacity: slots of a bin.

    Returns:
        `(bins, capacity, D)`; additive mask `(bins, 1, capacity, capacity)`, block-diagonal by frame; int64
        `(tokens,)`, the flat slot of each token.
    """
    bins = first_fit_descending(counts, capacity)
    starts = [b * capacity + offset for b, offset in zip(bins.assignment, bins.offsets, strict=True)]
    slots = torch.cat([torch.arange(start, start + count) for start, count in zip(starts, counts, strict=True)])
    slots = slots.to(packed.device)
    dense = packed.new_zeros(bins.num_bins * capacity, packed.shape[-1]).index_copy(0, slots, packed)
    # Empty slots share the id -1: they attend to each other, and nothing reads them.
    frame_ids = torch.full((bins.num_bins * capacity,), -1, device=packed.device)
    frame_ids[slots] = torch.arange(len(counts), device=packed.device).repeat_interleave(
        torch.tensor(counts, device=packed.device)
    )
    frame_ids = frame_ids.view(bins.num_bins, capacity)
    same_frame = frame_ids[:, None, :, None] == frame_ids[:, None, None, :]
    mask = torch.zeros_like(same_frame, dtype=packed.dtype).masked_fill(~same_frame, torch.finfo(packed.dtype).min)
    return dense.view(bins.num_bins, capacity, -1), mask, slots


# ----------------------------------------------------------------------------------------------------------------------
# Attention of packed frames, and of blocks
# ----------------------------------------------------------------------------------------------------------------------


def fold_key_bias(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, key_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Append columns to query and key so that `q @ k^T / sqrt(head_dim)` gains `key_bias`: any attention kernel then
    applies the bias, and its gradient reaches the scores without a `(queries, keys)` mask.

    Args:
        query: `(queries, heads, head_dim)`.
        key, value: `(keys, heads, head_dim)`.
        key_bias: float32 `(keys,)`.

    Returns:
        query, key, value with `head_dim` grown to the next multiple of 8 that has room for two columns. Two, because
        a bfloat16 bias alone would round log-scores to two digits: the second holds the rest.
    """
    head_dim, padding = key.shape[-1], -(key.shape[-1] + 2) % 8
    grown = head_dim + 2 + padding
    bias = (key_bias * grown**0.5)[:, None, None].expand(-1, key.shape[1], -1)
    high = bias.to(key.dtype)
    low = (bias - high.float()).to(key.dtype)
    # The query makes up for the other square root; its ones stay exact.
    query = F.pad(F.pad(query * (grown / head_dim) ** 0.5, (0, 2), value=1.0), (0, padding))
    key = F.pad(torch.cat([key, high, low], dim=-1), (0, padding))
    return query, key, F.pad(value, (0, padding + 2))


@torch.compiler.assume_constant_result
def is_flash_enabled(device_index: int) -> bool:
    """Whether a CUDA device has flash kernels (not before Ampere) and nobody has turned them off."""
    return torch.backends.cuda.flash_sdp_enabled() and torch.cuda.get_device_capability(device_index) >= (8, 0)


def has_varlen_kernel(query: torch.Tensor) -> bool:
    """Whether torch's varlen attention runs where `query` is and in its dtype."""
    if varlen_attn is None or not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    return is_flash_enabled(query.device.index)


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen: int,
    dropout: float = 0.0,
) -> torch.Tensor:
    """
    Attention of packed frames, each query to the keys of its own frame, scaled by `head_dim ** -0.5`; no padding, no
    mask.

    Args:
        query: `(queries, heads, head_dim)`, frames one after the other.
        key, value: `(keys, heads, head_dim)`, likewise.
        cu_seqlens_q, cu_seqlens_k: int32 `(frames + 1,)`, counts [2, 3] -> [0, 2, 5]; a frame may have no query.
        max_seqlen: upper bound of a frame's tokens.

    Returns:
        `(queries, heads, head_dim)`.
    """
    if has_varlen_kernel(query) and not dropout:
        # A window as wide as a frame changes nothing but the choice of the kernel. Newer releases prefer cuDNN's, which
        # is built anew for each number of survivors and counts elements in int32.
        window = (max_seqlen, max_seqlen)
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen, max_seqlen)
        return varlen_attn(query, key, value, *lengths, window_size=window)  # type: ignore
    queries, keys, values = (
        x.transpose(0, 1)[None].split(cu_seqlens.diff().tolist(), dim=2)
        for x, cu_seqlens in ((query, cu_seqlens_q), (key, cu_seqlens_k), (value, cu_seqlens_k))
    )
    outputs = [
        F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        for q, k, v in zip(queries, keys, values, strict=True)
        if q.shape[2]
    ]
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)


def torch_attention_pool(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """
    `softmax(scaling * q @ k^T) @ v` with one query for each block.

    Args:
        query: `(blocks, heads, head_dim)`.
        key, value: `(blocks, slots, heads, head_dim)`.

    Returns:
        `(blocks, heads, head_dim)`.
    """
    logits = (query[:, None] * key).sum(-1, keepdim=True, dtype=torch.float32) * scaling
    return (logits.softmax(1).to(value.dtype) * value).sum(1)


# ----------------------------------------------------------------------------------------------------------------------
# Attention of the LLM
# ----------------------------------------------------------------------------------------------------------------------


# Shorter prompts get the dense mask: it is small, and where most tokens are vision, one pass over it is as fast as two
# without (measured on a CPU).
MIN_UNMASKED_LENGTH = 3072


# The private operators below, by the arguments that they are given. `F.scaled_dot_product_attention` calls the same,
# but keeps the log-sum-exp to itself, without which two passes cannot be merged.
FLASH_ARGUMENTS = {
    "_scaled_dot_product_flash_attention": "query key value dropout_p is_causal return_debug_mask scale",
    "_scaled_dot_product_flash_attention_backward": "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q "
    "max_k dropout_p is_causal philox_seed philox_offset scale",
    "_scaled_dot_product_flash_attention_for_cpu": "query key value dropout_p is_causal attn_mask scale",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "grad_out query key value out logsumexp dropout_p "
    "is_causal attn_mask scale",
}


@functools.cache
def are_flash_operators_known() -> bool:
    """Whether this torch has the operators that [`causal_attention`] calls, with the arguments that it gives them."""
    operators = {name: getattr(torch.ops.aten, name, None) for name in FLASH_ARGUMENTS}
    return all(
        operator is not None and [a.name for a in operator.default._schema.arguments] == FLASH_ARGUMENTS[name].split()
        for name, operator in operators.items()
    )


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, tuple]:
    """
    Flash attention in which query `i` sees keys `0..i`.

    Args:
        query, key, value: `(1, heads, length, head_dim)`, `length` at least 1.

    Returns:
        Output, shaped as `query`; float32 log-sum-exp `(1, heads, length)`; what the backward wants besides: on CUDA
        the offsets and lengths of the sequences and the state of the random generator, on a CPU nothing.
    """
    if query.is_cuda:
        output, logsumexp, *state, _ = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, True, scale=scaling
        )
        return output, logsumexp, tuple(state)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return *attend(query, key, value, 0.0, True, scale=scaling), ()


def causal_attention_backward(
    *tensors: torch.Tensor, state: tuple, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Gradients of query, key and value.

    Args:
        tensors: the output's gradient, query, key, value, output and log-sum-exp; the last two may be those of a
            softmax over more keys.
        state: from [`causal_attention`].
    """
    if state:
        *sizes, seed, offset = state
        backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
        return backward(*tensors, *sizes, 0.0, True, seed, offset, scale=scaling)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, 0.0, True, scale=scaling)


class VisionCausalAttention(torch.autograd.Function):
    """
    Causal attention in which vision tokens also see later vision tokens, without a `(length, length)` mask.

    The keys of a vision token are those up to itself and the vision tokens behind it. The second part is causal too,
    over the vision tokens in reverse. Two causal passes, merged by their log-sum-exp, are one softmax over both. In
    the backward, each pass is given the merged output and log-sum-exp, and the gradients add up.
    """

    @staticmethod
    def forward(ctx, query, key, value, vision, scaling):
        """
        Args:
            query, key, value: `(1, heads, length, head_dim)`.
            vision: int64 `(vision tokens,)`, their positions, last one first.
        """
        output, logsumexp, state = causal_attention(query, key, value, scaling)
        # Without itself: query `i` of the reversed tokens sees keys `0..i-1`, so the first has nothing to see.
        queries, keys, state_behind = vision[1:], vision[:-1], ()
        if len(queries):
            behind, logsumexp_behind, state_behind = causal_attention(
                query.index_select(2, queries), key.index_select(2, keys), value.index_select(2, keys), scaling
            )
            before, logsumexp_before = output.index_select(2, queries), logsumexp.index_select(2, queries)
            share = (logsumexp_behind - logsumexp_before).sigmoid()[..., None]
            merged = torch.lerp(before.to(share.dtype), behind.to(share.dtype), share)
            output.index_copy_(2, queries, merged.to(output.dtype))
            logsumexp.index_copy_(2, queries, torch.logaddexp(logsumexp_before, logsumexp_behind))
        ctx.save_for_backward(query, key, value, output, logsumexp, vision)
        ctx.states, ctx.scaling = (state, state_behind), scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        *saved, vision = ctx.saved_tensors
        tensors, (state, state_behind) = [grad.contiguous(), *saved], ctx.states
        grads = causal_attention_backward(*tensors, state=state, scaling=ctx.scaling)
        queries, keys = vision[1:], vision[:-1]
        if len(queries):
            indices = (queries, queries, keys, keys, queries, queries)
            tensors = [x.index_select(2, index) for x, index in zip(tensors, indices, strict=True)]
            behind = causal_attention_backward(*tensors, state=state_behind, scaling=ctx.scaling)
            for total, part, index in zip(grads, behind, (queries, keys, keys), strict=True):
                total.index_add_(2, index, part)
        return *grads, None, None


class Sample(NamedTuple):
    """
    A sequence within a row: whole rows without their padding, or several to a row where samples are packed.

    row: of the batch.
    start, stop: its positions in the row.
    vision: int64 `(vision tokens,)`, their positions counted from `start`, last one first.
    """

    row: int
    start: int
    stop: int
    vision: torch.Tensor


class VisionCausalMask(torch.Tensor):
    """
    Stands for the mask of Molmo2's LLM without being built: `F.scaled_dot_product_attention` hands over to it, as to
    `torch.nn.attention.bias.CausalBias`. It is a tensor, of four dimensions and no element, because Transformers passes
    a 4D mask on as it is, and torch asks only tensors' classes whether they want to take over. Positions outside of all
    samples come out as zeros.

    Args:
        samples: row after row, those of a row in their order; each row has one at least.
        num_rows: of the batch.
    """

    samples: Sequence[Sample]

    @staticmethod
    def __new__(cls, samples: Sequence[Sample], num_rows: int):
        mask = torch.empty(num_rows, 1, 1, 0, dtype=torch.bool, device=samples[0].vision.device).as_subclass(cls)
        mask.samples = samples
        return mask

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return cls._attend(*args, **(kwargs or {}))
        result = super().__torch_function__(func, types, args, kwargs)
        if isinstance(result, cls):  # moved to another device
            result.samples = args[0].samples
        return result

    @staticmethod
    def _attend(query, key, value, attn_mask, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if dropout_p:
            raise NotImplementedError("VisionCausalMask has no dropout.")
        device, length = query.device, query.shape[2]
        if torch.is_autocast_enabled(device.type):  # it acts below what is called here
            query, key, value = (x.to(torch.get_autocast_dtype(device.type)) for x in (query, key, value))
        scaling = query.shape[-1] ** -0.5 if scale is None else scale
        rows, ends = [[] for _ in range(len(query))], [0] * len(query)
        for row, start, stop, vision in attn_mask.samples:
            inputs = (x[row : row + 1, :, start:stop] for x in (query, key, value))
            output = VisionCausalAttention.apply(*inputs, vision.to(device), scaling)
            rows[row].append(F.pad(output, (0, 0, start - ends[row], 0)))
            ends[row] = stop
        return torch.cat(
            [F.pad(torch.cat(row, dim=2), (0, 0, 0, length - end)) for row, end in zip(rows, ends, strict=True)]
        )


def vision_causal_mask(
    mm_token_type_ids: torch.Tensor, attended: torch.Tensor | None = None, starts: torch.Tensor | None = None
) -> VisionCausalMask:
    """
    The mask of a prompt that starts at position 0.

    Args:
        mm_token_type_ids: `(batch, length)`, 1 for vision tokens.
        attended: `(batch, length)`, zero for padding; `None` for none. On either side, with packed rows on the right.
        starts: bool `(batch, length)`, where samples begin in rows that hold several; `None` where each row is one.
    """
    num_rows, length = mm_token_type_ids.shape
    is_vision = mm_token_type_ids == 1
    attended = torch.ones_like(is_vision) if attended is None else attended.to(is_vision.device).bool()
    is_vision = is_vision & attended
    if starts is None:
        # One wait for the device.
        begins, lengths, counts = torch.stack(
            [attended.to(torch.int8).argmax(1), attended.sum(1), is_vision.sum(1)]
        ).tolist()
        rows = range(num_rows)
        # A row of padding: kernels want a position.
        stops = [begin + max(count, 1) for begin, count in zip(begins, lengths, strict=True)]
    else:
        starts = starts & attended
        sample = starts.flatten().cumsum(0) - 1
        rows, begins = starts.nonzero().unbind(1)
        sums = torch.zeros(len(rows), 2, dtype=torch.long, device=sample.device)
        flags = torch.stack([attended.flatten(), is_vision.flatten()], dim=1)
        lengths, counts = sums.index_add(0, sample.clamp_min(0), flags.long()).unbind(1)
        stops = (begins + lengths).tolist()
        rows, begins, counts = rows.tolist(), begins.tolist(), counts.tolist()
    positions = (mask_to_indices(is_vision, sum(counts)) % length).split(counts)
    samples = [
        Sample(row, begin, stop, vision.flip(0) - begin)
        for row, begin, stop, vision in zip(rows, begins, stops, positions, strict=True)
    ]
    return VisionCausalMask(samples, num_rows)


def has_flash_kernel(states: torch.Tensor, head_dim: int) -> bool:
    """Whether [`causal_attention`] runs where `states` are and in their dtype."""
    if not are_flash_operators_known():
        return False
    if states.device.type != "cuda":
        return states.device.type == "cpu"
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else states.dtype
    heads = states.new_empty(1, 1, 1, head_dim, dtype=dtype)
    parameters = torch.backends.cuda.SDPAParams(heads, heads, heads, None, 0.0, True, False)
    return head_dim % 8 == 0 and torch.backends.cuda.can_use_flash_attention(parameters)
