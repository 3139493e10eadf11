"""STTS (Spatio-Temporal Token Scoring) inside Molmo2.

The file reads in the order in which data flows: budget, features, scores, bias, selection or merging, packing,
attention, the vision tower, compaction of the LLM's input, its attention, the model, loss and generation. Sections
cited as "section n" are those of the paper. Symbols: `F` frames of all videos of a batch, `N` patches a frame, `P`
pooled tokens a frame, `w` pooling window, `D` ViT width, `k` prune ratio.
"""

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.generation import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.models.molmo2.modeling_molmo2 import (
    Molmo2Adapter,
    Molmo2CausalLMOutputWithPast,
    Molmo2ForConditionalGeneration,
    Molmo2Model,
    Molmo2ModelOutputWithPast,
    Molmo2TextModel,
    Molmo2VisionAttention,
    Molmo2VisionEncoderLayer,
    Molmo2VisionModel,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import is_flash_attention_requested

from .configuration_stts_molmo import STTSMolmoConfig, validate_layers, validate_method, validate_prune_ratio

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

# A class with its own `model_type` gets no conversion by default, and original checkpoints would load as noise.
register_checkpoint_conversion_mapping("stts_molmo", get_checkpoint_conversion_mapping("molmo2"), overwrite=True)

MIN_SCORE = 1e-6  # keeps log(score) finite
RESCALED_MIN_SCORE = math.exp(-2)  # authors' code
MERGED_AWAY_BIAS = -1000.0  # no attention weight is left in float32; finite in float16 even when divided by a scale
# Shorter prompts get the dense mask: it is small, and where most tokens are vision, one pass over it is as fast as two
# without (measured on a CPU).
MIN_UNMASKED_LENGTH = 3072
VIDEO_INPUTS = ("pixel_values_videos", "video_token_pooling", "video_grids")


# ----------------------------------------------------------------------------------------------------------------------
# Budget
# ----------------------------------------------------------------------------------------------------------------------


def num_kept_tokens(num_frames: int, tokens_per_frame: int, prune_ratio: float) -> int:
    """
    Number of a video's pooled tokens that survive; known before any score is computed (section 3).

    `floor(k * T * P)` tokens are dropped, in decimal arithmetic, but never one of frame 0.

    >>> num_kept_tokens(num_frames=90, tokens_per_frame=81, prune_ratio=0.7)  # drops 5103; binary floats say 5102
    2187
    """
    num_tokens = num_frames * tokens_per_frame
    num_dropped = int(Decimal(str(prune_ratio)) * num_tokens)
    return num_tokens - min(num_dropped, num_tokens - tokens_per_frame)


# ----------------------------------------------------------------------------------------------------------------------
# Features and scores
# ----------------------------------------------------------------------------------------------------------------------


class VideoLayout(NamedTuple):
    """
    What is known of a batch of videos before any pixel is read.

    num_frames: frames of each video.
    grid: rows and columns of pooled tokens in a frame, `P = rows * columns`.
    num_patches: patches of a frame, `N`.
    blocks: int64 `(P, w * w)`, the patches of each block within its frame; -1 marks slots outside the frame.
    """

    num_frames: list[int]
    grid: tuple[int, int]
    num_patches: int
    blocks: torch.Tensor

    @property
    def tokens_per_frame(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def is_dense(self) -> bool:
        """Whether the window divides the frame, so that every slot of every block holds a patch."""
        return self.blocks.numel() == self.num_patches

    def num_kept(self, prune_ratio: float) -> list[int]:
        """Surviving tokens of each video."""
        return [num_kept_tokens(t, self.tokens_per_frame, prune_ratio) for t in self.num_frames]


def gather_blocks(hidden_states: torch.Tensor, layout: VideoLayout) -> torch.Tensor:
    """Patches `(frames, N, D)` -> patches by block `(frames, P, w * w, D)`, zeros in slots outside the frame."""
    blocks = layout.blocks
    gathered = hidden_states.index_select(1, blocks.clamp_min(0).flatten()).unflatten(1, blocks.shape)
    return gathered if layout.is_dense else gathered.masked_fill((blocks < 0)[None, :, :, None], 0)


def patch_slots(layout: VideoLayout) -> torch.Tensor:
    """Where each patch of a frame is in `layout.blocks.flatten()`: int64 `(N,)`."""
    blocks = layout.blocks.flatten()
    # Slots outside the frame (-1) write to a spare last entry.
    slots = blocks.new_zeros(layout.num_patches + 1)
    slots[blocks] = torch.arange(len(blocks), device=blocks.device)
    return slots[:-1]


def previous_frame(features: torch.Tensor, num_frames: Sequence[int]) -> torch.Tensor:
    """Shift `(frames, ...)` by one frame within each video; the frame before frame 0 is zeros (section 3.1)."""
    return torch.cat([torch.cat([torch.zeros_like(v[:1]), v[:-1]]) for v in features.split(list(num_frames))])


def zero_first_frames(values: torch.Tensor, num_frames: Sequence[int]) -> torch.Tensor:
    """Set the first frame of each video to zero in `(frames, ...)`."""
    return torch.cat([torch.cat([torch.zeros_like(v[:1]), v[1:]]) for v in values.split(list(num_frames))])


def temporal_dissimilarity(features: torch.Tensor, num_frames: Sequence[int]) -> torch.Tensor:
    """
    `1 - cos(f_{t-1}, f_t)` of each block with the same block one frame earlier (section 3.4).

    Args:
        features: `(frames, P, C)`, any float dtype.
        num_frames: frames of each video.

    Returns:
        float32 `(frames, P)`, zero in each video's first frame. Memory is linear in `frames * P`.
    """
    rows = []
    for video in features.split(list(num_frames)):
        rows.append(video.new_zeros(1, video.shape[1], dtype=torch.float32))
        # A few frames at a time: of all patches of a long video, float32 copies would take gigabytes.
        for before, after in zip(video[:-1].split(32), video[1:].split(32), strict=True):
            rows.append(1 - F.cosine_similarity(before.float(), after.float(), dim=-1))
    return torch.cat(rows)


def random_scores(layout: VideoLayout, seed: int | None) -> torch.Tensor:
    """
    Uniform float32 scores `(frames, P)`. With a `seed` a video gets the same scores wherever it stands in a batch;
    without one they come from torch's global generator, new at every step of a training.
    """
    scores = []
    for num_frames in layout.num_frames:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        scores.append(torch.rand(num_frames, layout.tokens_per_frame, generator=generator))
    return torch.cat(scores).to(layout.blocks.device)


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


class STTSMolmoPoolingAttention(Molmo2VisionAttention):
    """Native attention that also pools full blocks of patches, on CUDA without a kernel for sequences."""

    def __init__(self, config, stts_config, hidden_size: int | None = None):
        super().__init__(config, hidden_size)
        self.stts_config = stts_config

    def forward(
        self,
        hidden_states: torch.Tensor | None,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        As the native forward, and without `hidden_states` one query for each block: the mean of its patches
        (section 3.1).

        Args:
            encoder_hidden_states: `(blocks, w * w, C)`.

        Returns:
            `(blocks, 1, D)`, and the attention weights where the native forward has them.

        Raises:
            ImportError: `use_kernels` is set, and the Triton op cannot be imported.
        """
        if hidden_states is not None:
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        blocks = encoder_hidden_states
        query = blocks.mean(1, keepdim=True)
        # Not torch's kernels on CUDA: flash rounds one query up to 128, so that by its sizes the backward of 256 frames
        # wants 16 GB of scratch memory and overflows int32 (github.com/Dao-AILab/flash-attention/pull/2260), and some
        # releases fail beyond 65,535 blocks (github.com/pytorch/pytorch/issues/146704).
        if not blocks.is_cuda or (self.training and self.attention_dropout):
            return super().forward(query, blocks, attention_mask, **kwargs)
        query, key, value = (
            proj(x).unflatten(-1, (-1, self.head_dim))
            for proj, x in ((self.q_proj, query), (self.k_proj, blocks), (self.v_proj, blocks))
        )
        pooled = self.find_op()(query[:, 0], key, value, self.scaling)
        return self.o_proj(pooled.flatten(1)[:, None]), None

    def find_op(self) -> Callable:
        if not self.stts_config.use_kernels or torch.compiler.is_compiling():  # it makes a kernel itself
            return torch_attention_pool
        if attention_pool is None:
            raise ImportError(
                "use_kernels=True takes a Triton op of the package stts_kernels, which cannot be imported; install "
                "stts-molmo and triton, or set config.stts_config.use_kernels = False."
            )
        return attention_pool


def init_scorer_weights(module: nn.Module):
    """Fan-in scaled weights: with a fixed 0.02 a narrow scorer starts out constant and hardly learns."""
    if isinstance(module, nn.Linear):
        init.trunc_normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            init.zeros_(module.bias)


class TokenScorer(nn.Module):
    """
    The learned part of STTS: an attention layer that pools each block, and a three-layer MLP that scores it against
    the same block of the previous frame (section 3.1).
    """

    def __init__(self, vision_config, stts_config):
        super().__init__()
        width = vision_config.hidden_size
        hidden_size = stts_config.scorer_hidden_size or vision_config.intermediate_size
        self.token_pooler = STTSMolmoPoolingAttention(vision_config, stts_config)
        self.fc1 = nn.Linear(2 * width, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)
        self.fc3 = nn.Linear(hidden_size, 1)
        self.activation_fn = ACT2FN[stts_config.scorer_hidden_act]
        for module in self.modules():
            init_scorer_weights(module)

    def forward(self, blocks: torch.Tensor, layout: VideoLayout) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            blocks: `(frames, P, w * w, D)` features after layer `l`, zero in slots outside the frame.
            layout: of the batch; no score looks across a video's border.

        Returns:
            float32 scores in `(0, 1)` of shape `(frames, P)`, higher is kept longer; pooled features
            `(frames, P, D)`.
        """
        patches = blocks.flatten(0, 1)
        if layout.is_dense:
            pooled, _ = self.token_pooler(None, patches)
        else:
            mask = (layout.blocks >= 0).repeat(blocks.shape[0], 1)
            query = patches.sum(1, keepdim=True) / mask.sum(1)[:, None, None]
            attention_mask = torch.zeros_like(mask, dtype=patches.dtype)
            attention_mask = attention_mask.masked_fill(~mask, torch.finfo(patches.dtype).min)[:, None, None]
            pooled, _ = self.token_pooler(query, patches, attention_mask)
        pooled = pooled.view(*blocks.shape[:2], -1)

        hidden_states = torch.cat([previous_frame(pooled, layout.num_frames), pooled], dim=-1)
        hidden_states = self.activation_fn(self.fc1(hidden_states))
        hidden_states = self.activation_fn(self.fc2(hidden_states))
        return self.fc3(hidden_states).squeeze(-1).float().sigmoid(), pooled


def log_score_bias(token_scores: torch.Tensor, layout: VideoLayout, kind: str) -> torch.Tensor:
    """
    Scores -> what is added to the attention logits of each key in layer `l + 1` (section 3.2).

    Args:
        token_scores: float32 `(frames, P)` in `(0, 1)`.
        layout: of the batch.
        kind: `"log"`, or `"rescaled_log"`: the authors' code first stretches the scores of each row of patches
            to `[exp(-2), 1]`.

    Returns:
        float32 `(frames, N)`, zero in each video's first frame.
    """
    if kind == "rescaled_log":
        rows = token_scores.unflatten(1, layout.grid)
        low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
        rows = RESCALED_MIN_SCORE + (rows - low) * (1 - RESCALED_MIN_SCORE) / (high - low + 1e-6)
        token_scores = rows.flatten(1)
    bias = zero_first_frames(token_scores.clamp_min(MIN_SCORE).log(), layout.num_frames)
    return bias.index_select(1, patch_slots(layout) // layout.blocks.shape[1])


def auxiliary_loss(token_scores: torch.Tensor, target: torch.Tensor, num_frames: Sequence[int]) -> torch.Tensor:
    """
    Mean over all `(frames, P)` of `(score - target)^2`, zero in first frames (section 3.4). The target is detached:
    the scores learn the features' similarity, the features do not learn the scores.
    """
    return zero_first_frames((token_scores - target.detach()) ** 2, num_frames).mean()


# ----------------------------------------------------------------------------------------------------------------------
# Selection, merging and packing
# ----------------------------------------------------------------------------------------------------------------------


def select_tokens(token_scores: torch.Tensor, num_frames: Sequence[int], num_kept: Sequence[int]) -> torch.Tensor:
    """
    Keep the `num_kept` highest scores of each video; every token of its first frame is kept, ties go to the lower
    index (section 3.3). The sort is stable and shapes are static, so the result is the same on every device and
    nothing waits for it.

    Args:
        token_scores: `(frames, P)`.
        num_frames: frames of each video.
        num_kept: survivors of each video.

    Returns:
        bool `(frames, P)`.
    """
    masks = []
    for scores, kept in zip(token_scores.detach().split(list(num_frames)), num_kept, strict=True):
        first_frame_first = torch.cat([torch.full_like(scores[:1], torch.inf), scores[1:]]).flatten()
        order = first_frame_first.argsort(descending=True, stable=True)
        mask = torch.zeros_like(order, dtype=torch.bool).index_fill(0, order[:kept], True)
        masks.append(mask.view_as(scores))
    return torch.cat(masks)


def merging_shares(layout: VideoLayout, num_kept: Sequence[int]) -> tuple[torch.Tensor, int]:
    """
    Blocks that each frame loses to merging: none in a video's first frame, equal shares in the others, the spare ones
    in the earliest. A video of 3 frames of 4 blocks that keeps 5 loses `[0, 4, 3]`.

    Returns:
        int64 `(frames,)`, and the largest of them, known without looking at the device.
    """
    shares, largest = [], 0
    for num_frames, kept in zip(layout.num_frames, num_kept, strict=True):
        share, spare = divmod(num_frames * layout.tokens_per_frame - kept, max(num_frames - 1, 1))
        frame = torch.arange(num_frames, device=layout.blocks.device)
        shares.append(torch.where(frame > 0, share + (frame <= spare), 0))
        largest = max(largest, share + (spare > 0))
    return torch.cat(shares), largest


def block_members(owners: torch.Tensor) -> torch.Tensor:
    """The block each block is merged into, `(frames, P)` -> bool `(frames, P, P)`, row i marks those in block i."""
    return owners[:, None] == torch.arange(owners.shape[1], device=owners.device)[:, None]


@torch.no_grad()
def match_blocks(features: torch.Tensor, num_left: torch.Tensor, num_rounds: int) -> torch.Tensor:
    """
    Bipartite soft matching (Bolya et al. 2023), frame by frame. Each round deals the blocks alive to sets A and B in
    turn, finds for each of A the most similar of B, and merges the most similar pairs, at most half of the blocks. Ties
    go to the lower index.

    Args:
        features: float32 `(frames, P, C)`, the sum of each block's patches; a merged block's is that of its members,
            which points where their mean does.
        num_left: int64 `(frames,)`, blocks to stop at, 1 or more.
        num_rounds: enough for every frame; in a frame that is done a round changes nothing.

    Returns:
        int64 `(frames, P)`, the block that each block ends up in; itself for those left.
    """
    index = torch.arange(features.shape[1], device=features.device)
    owners = index.expand(features.shape[:2])
    for _ in range(num_rounds):
        alive = owners == index
        rank = alive.cumsum(1)
        in_a, in_b = alive & (rank % 2 == 1), alive & (rank % 2 == 0)
        normed = F.normalize(block_members(owners).to(features.dtype) @ features, dim=-1)
        similarity = (normed @ normed.mT).masked_fill(~(in_a[:, :, None] & in_b[:, None]), -torch.inf)
        best, target = similarity.max(-1)
        num_merges = torch.minimum(rank[:, -1] - num_left, rank[:, -1] // 2)
        place = best.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        owners = torch.where(place < num_merges[:, None], target, index).gather(1, owners)
    return owners


def merge_tokens(
    hidden_states: torch.Tensor, layout: VideoLayout, num_kept: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Token merging (ToMe) in place of selection, the baseline of Table 5. The paper says no more than that it merges
    "within the ViT" and passes "the modified, pooled patches to the LLM" (appendix C). Our choices: the unit is the
    block, as budget, adapter and LLM count blocks, and merging is done once, after layer `l`, within each frame;
    likeness is the cosine of the mean features (ToMe: of the attention's keys); a merged block is the mean of its
    members, slot by slot; proportional attention (`log(size)` per key) is in layer `l + 1` only. A frame whose share
    is all of its blocks loses the last one too. A slot outside the frame stays empty whatever the members have there.

    Args:
        hidden_states: `(frames, N, D)` after layer `l`.
        layout: of the batch.
        num_kept: survivors of each video.

    Returns:
        `(frames, N, D)` with merged blocks in the places of those they were merged into; float32 `(frames, N)`, the
        attention bias of layer `l + 1`, under which what was merged away is no key; bool `(frames, P)` keep mask.
    """
    blocks = gather_blocks(hidden_states, layout)
    shares, largest = merging_shares(layout, num_kept)
    num_left = (layout.tokens_per_frame - shares).clamp_min(1)
    num_rounds = math.ceil(math.log2(layout.tokens_per_frame / max(layout.tokens_per_frame - largest, 1)))
    with torch.autocast(blocks.device.type, enabled=False):  # likenesses rounded to bfloat16 are full of ties
        members = block_members(match_blocks(blocks.sum(2, dtype=torch.float32), num_left, num_rounds))
        sizes = members.float() @ (layout.blocks >= 0).float()
        merged = (members.to(blocks.dtype) @ blocks.flatten(2)).view_as(blocks)
    merged = merged / sizes.clamp_min(1)[..., None].to(blocks.dtype)
    bias = torch.where(sizes > 0, sizes.log(), MERGED_AWAY_BIAS)
    slots = patch_slots(layout)
    patches, bias = (x.flatten(1, 2).index_select(1, slots) for x in (merged, bias))
    is_left = members.diagonal(dim1=1, dim2=2) & (shares < layout.tokens_per_frame)[:, None]
    return patches, bias, is_left


def mask_to_indices(mask: torch.Tensor, num_true: int) -> torch.Tensor:
    """
    Ascending flat indices of the `num_true` set entries; `nonzero` with a static shape.

    >>> mask_to_indices(torch.tensor([[True, False], [True, True]]), 3)
    tensor([0, 2, 3])
    """
    return mask.flatten().to(torch.int8).argsort(descending=True, stable=True)[:num_true]


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
    Give each frame that shares its bin with no other frame of its video all its tokens back (authors' code). Frames
    without a survivor stay empty.

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
# Attention of the vision tower
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
    if varlen_attn is not None and query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and not dropout:
        # A window as wide as a frame changes nothing but the choice of the kernel. Newer releases prefer cuDNN's, which
        # is built anew for each number of survivors and counts elements in int32.
        window = (max_seqlen, max_seqlen)
        return varlen_attn(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen, max_seqlen, window_size=window)
    query, key, value = (
        x.transpose(0, 1)[None].split(cu_seqlens.diff().tolist(), dim=2)
        for x, cu_seqlens in ((query, cu_seqlens_q), (key, cu_seqlens_k), (value, cu_seqlens_k))
    )
    outputs = [
        F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        for q, k, v in zip(query, key, value, strict=True)
        if q.shape[2]
    ]
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)


class STTSMolmoVisionAttention(Molmo2VisionAttention):
    """Native attention that also takes packed frames, and for these a bias per key."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        As the native forward, and with `cu_seqlens`:

        Args:
            hidden_states: packed `(1, tokens, D)`, the queries.
            encoder_hidden_states: `(frames, N, D)`, the keys; the queries themselves when not given.
            attention_mask: float32 `(frames, N)`, a bias for each key.
            cu_seqlens: int32 `(frames + 1,)`, offsets of each frame's queries.
            max_seqlen: upper bound of a frame's tokens.
        """
        if cu_seqlens is None:
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        if encoder_hidden_states is None and is_flash_attention_requested(self.config):
            return super().forward(
                hidden_states,
                cu_seq_lens_q=cu_seqlens,
                cu_seq_lens_k=cu_seqlens,
                max_length_q=max_seqlen,
                max_length_k=max_seqlen,
                **kwargs,
            )

        queries, keys, cu_seqlens_k = hidden_states[0], hidden_states[0], cu_seqlens
        if encoder_hidden_states is not None:
            frames, length = encoder_hidden_states.shape[:2]
            keys = encoder_hidden_states.flatten(0, 1)
            cu_seqlens_k = torch.arange(frames + 1, dtype=torch.int32, device=keys.device) * length
        query = self.q_proj(queries).unflatten(-1, (-1, self.head_dim))
        key, value = (proj(keys).unflatten(-1, (-1, self.head_dim)) for proj in (self.k_proj, self.v_proj))
        if attention_mask is not None:
            query, key, value = fold_key_bias(query, key, value, attention_mask.flatten())
        dropout = self.attention_dropout if self.training else 0.0
        attn_output = varlen_attention(query, key, value, cu_seqlens, cu_seqlens_k, max_seqlen, dropout)
        return self.o_proj(attn_output[..., : self.head_dim].flatten(-2))[None], None


class STTSMolmoVisionEncoderLayer(Molmo2VisionEncoderLayer):
    """Native layer that can also take all patches in and give only the survivors out."""

    def __init__(self, config):
        super().__init__(config)
        self.self_attn = STTSMolmoVisionAttention(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        packing: Packing | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        As the native forward, and with a `packing`: `(frames, N, D)` and a bias for each key `(frames, N)` in, packed
        survivors `(tokens, D)` out. Every patch is a key. What a dropped patch would be after the layer is read by
        nobody, so only survivors are queries (exact, gradients too).
        """
        if packing is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        normed = self.layer_norm1(hidden_states)
        survivors, queries = (x.flatten(0, 1).index_select(0, packing.patches) for x in (hidden_states, normed))
        attended, _ = self.self_attn(queries[None], normed, attention_mask, packing.cu_seqlens, packing.capacity)
        survivors = survivors + attended[0]
        return survivors + self.mlp(self.layer_norm2(survivors))


# ----------------------------------------------------------------------------------------------------------------------
# Vision tower
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class STTSMolmoVisionOutput(BaseModelOutputWithPooling):
    """
    Args:
        last_hidden_state (`torch.Tensor` of shape `(1, tokens, D * len(feature_layers))`):
            Features of the patches that late layers saw, packed block by block.
        pooled_patches_idx (`torch.LongTensor` of shape `(kept, w * w)`):
            Where the patches of each surviving block are in `last_hidden_state`; -1 for slots outside the frame.
            `None` when every `w * w` patches in a row are a block.
        token_scores (`torch.FloatTensor` of shape `(frames, P)`; `None` when tokens were merged),
        keep_mask (`torch.BoolTensor` of shape `(frames, P)`),
        aux_loss (`torch.FloatTensor`, scalar; `None` unless the scorer scored).
    """

    pooled_patches_idx: torch.Tensor | None = None
    token_scores: torch.Tensor | None = None
    keep_mask: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


@dataclass
class STTSMolmoVideoFeatures(BaseModelOutputWithPooling):
    """
    Args:
        pooler_output (`tuple[torch.Tensor]`): the surviving tokens of each video, `(kept, text_hidden_size)`.
        token_scores (`torch.FloatTensor` of shape `(frames, P)`): higher is kept longer; `None` when nothing scored.
        keep_mask (`torch.BoolTensor` of shape `(frames, P)`): which pooled tokens survive.
        aux_loss (`torch.FloatTensor`, scalar): auxiliary loss; `None` unless the scorer scored.
    """

    token_scores: torch.Tensor | None = None
    keep_mask: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


@dataclass
class STTSMolmoPrunedTokens(BaseModelOutputWithPooling):
    """The tokens of videos for a prompt that has lost its dropped placeholders already."""


class STTSMolmoVisionModel(Molmo2VisionModel):
    """
    Modifications: after layer `prune_layer` tokens are scored (or merged), the scores (or the sizes) bias the attention
    of the next layer, and the layers after that run on the survivors. Without a `layout` it is the native tower.
    """

    _no_split_modules = ["STTSMolmoVisionEncoderLayer", "STTSMolmoPoolingAttention"]

    def __init__(self, config, stts_config, feature_layers: Sequence[int]):
        super().__init__(config)
        self.stts_config = stts_config
        self.feature_layers = [layer % config.num_hidden_layers for layer in feature_layers]
        self.layers = nn.ModuleList(STTSMolmoVisionEncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.token_scorer = TokenScorer(config, stts_config)
        self.post_init()

    def _init_weights(self, module):
        # Absent while the parent builds itself.
        if module in getattr(self, "token_scorer", nn.Module()).modules():
            init_scorer_weights(module)
        else:
            super()._init_weights(module)

    def forward(
        self,
        pixel_values: torch.Tensor,
        layout: VideoLayout | None = None,
        num_kept: Sequence[int] | None = None,
        method: str | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values: `(frames, N, patch_size * patch_size * channels)`.
            layout: of the videos the frames belong to; `None` for images and for videos kept whole.
            num_kept: surviving tokens of each video.
            method: `"scorer"`, `"cosine"`, `"random"` or `"tome"`.

        Returns:
            [`STTSMolmoVisionOutput`] with a layout, the native output without.
        """
        if layout is None:
            return super().forward(pixel_values, **kwargs)
        hidden_states = self.patch_embedding(pixel_values.to(dtype=self.dtype))
        hidden_states = hidden_states + self.positional_embedding[None].to(hidden_states)
        for layer in self.layers[: self.stts_config.prune_layer + 1]:
            hidden_states = layer(hidden_states, None)

        refill = self.stts_config.refill_lone_frames
        if method == "tome":
            hidden_states, bias, keep_mask = merge_tokens(hidden_states, layout, num_kept)
            token_scores, aux_loss, refill = None, None, False  # what was merged away is in the survivors already
        else:
            token_scores, bias, aux_loss = self.score(hidden_states, layout, method)
            keep_mask = select_tokens(token_scores, layout.num_frames, num_kept)
        packing = plan_packing(keep_mask, sum(num_kept), layout, refill)
        packed = self.run_bias_layer(hidden_states, bias, packing)
        features = torch.cat(self.run_late_layers(packed, packing), dim=-1)
        return STTSMolmoVisionOutput(
            last_hidden_state=features[None],
            pooled_patches_idx=packing.slots,
            token_scores=token_scores,
            keep_mask=keep_mask,
            aux_loss=aux_loss,
        )

    def score(
        self, hidden_states: torch.Tensor, layout: VideoLayout, method: str
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        The pruners that drop: features after layer `l`, `(frames, N, D)`, in; scores `(frames, P)`, attention bias
        `(frames, N)` and auxiliary loss out. Only the scorer has the last two.
        """
        if method == "random":
            return random_scores(layout, None if self.training else self.stts_config.seed), None, None
        blocks = gather_blocks(hidden_states, layout)
        if method == "cosine":
            with torch.no_grad():
                return temporal_dissimilarity(blocks.flatten(2), layout.num_frames), None, None
        token_scores, pooled = self.token_scorer(blocks, layout)
        with torch.no_grad():
            compared = pooled if self.stts_config.aux_target == "pooled" else blocks.flatten(2)
            target = temporal_dissimilarity(compared, layout.num_frames)
        bias = log_score_bias(token_scores, layout, self.stts_config.score_bias)
        return token_scores, bias, auxiliary_loss(token_scores, target, layout.num_frames)

    def run_bias_layer(self, hidden_states: torch.Tensor, bias: torch.Tensor | None, packing: Packing) -> torch.Tensor:
        """Layer `l + 1`, `(frames, N, D)` -> packed survivors `(tokens, D)`."""
        layer = self.layers[self.stts_config.prune_layer + 1]
        if self.config._attn_implementation == "eager":
            hidden_states = layer(hidden_states, None if bias is None else bias[:, None, None])
            return hidden_states.flatten(0, 1).index_select(0, packing.patches)
        return layer(hidden_states, bias, packing=packing)

    def run_late_layers(self, packed: torch.Tensor, packing: Packing) -> list[torch.Tensor]:
        """Layers `l + 2..` on packed patches `(tokens, D)`; the outputs of the feature layers, each `(tokens, D)`."""
        if self.config._attn_implementation == "eager":
            hidden_states, attention_mask, slots = pack_into_bins(packed, packing.counts.tolist(), packing.capacity)
            kwargs = {}
        else:
            hidden_states, attention_mask, slots = packed[None], None, None
            kwargs = {"cu_seqlens": packing.cu_seqlens, "max_seqlen": packing.capacity}
        outputs = {}
        # Layers past the last one that the adapter reads have no effect.
        for index in range(self.stts_config.prune_layer + 2, max(self.feature_layers) + 1):
            hidden_states = self.layers[index](hidden_states, attention_mask, **kwargs)
            if index in self.feature_layers:
                flat = hidden_states.flatten(0, 1)
                outputs[index] = flat if slots is None else flat.index_select(0, slots)
        return [outputs[index] for index in self.feature_layers]


class STTSMolmoAdapter(Molmo2Adapter):
    """Modifications: blocks that follow each other are pooled as they are, without a gather and without a mask."""

    _no_split_modules = ["STTSMolmoPoolingAttention"]

    def __init__(self, config, stts_config):
        super().__init__(config)
        self.block_size = stts_config.pooling_size**2
        width = self.image_pooling_2d.q_proj.in_features
        self.image_pooling_2d = STTSMolmoPoolingAttention(config, stts_config, width)
        self.post_init()

    def forward(
        self, image_features: torch.Tensor, pooled_patches_idx: torch.Tensor | None, **kwargs
    ) -> BaseModelOutput:
        """
        As the native forward; `pooled_patches_idx` may be `None` when every `w * w` of the features `(1, tokens, C)`
        are a block.
        """
        if pooled_patches_idx is not None:
            return super().forward(image_features, pooled_patches_idx, **kwargs)
        blocks = image_features[0].unflatten(0, (-1, self.block_size))
        pooled, _ = self.image_pooling_2d(None, blocks, **kwargs)
        return BaseModelOutput(last_hidden_state=self.image_projector(pooled[:, 0]))


# ----------------------------------------------------------------------------------------------------------------------
# Compaction of the LLM's input
# ----------------------------------------------------------------------------------------------------------------------


class Compaction(NamedTuple):
    """
    Where the surviving positions of a batch of sequences go.

    input_keep_mask: bool `(batch, length)`, positions that the LLM runs on.
    positions: int64 `(batch, compact_length)`, the input position behind each compact one.
    mask: bool `(batch, compact_length)`, False for padding.
    is_padded: whether `mask` has any padding.
    """

    input_keep_mask: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    is_padded: bool

    def compact(self, values: torch.Tensor, padding: int = 0) -> torch.Tensor:
        """`(batch, length)` -> `(batch, compact_length)`."""
        return values.gather(1, self.positions).masked_fill(~self.mask, padding)

    def restore(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, compact_length, C)` -> `(batch, length, C)`, zeros where the LLM did not run."""
        batch_size, length = self.input_keep_mask.shape
        # A model spread over devices may end on another one than it began on.
        positions, mask = (x.to(hidden_states.device)[..., None] for x in (self.positions, self.mask))
        restored = hidden_states.new_zeros(batch_size, length, hidden_states.shape[-1])
        return restored.scatter(1, positions.expand_as(hidden_states), hidden_states.masked_fill(~mask, 0))


def plan_compaction(input_keep_mask: torch.Tensor, lengths: Sequence[int], padding_side: str) -> Compaction:
    """
    Move the set positions of each row together, keeping their order, and pad on `padding_side`.

    Args:
        input_keep_mask: bool `(batch, length)`.
        lengths: set positions of each row, so that no size has to come from the device.

    >>> plan_compaction(torch.tensor([[True, False, True], [True, True, True]]), [2, 3], "left").positions
    tensor([[1, 0, 2],
            [0, 1, 2]])
    """
    compact_length = max(lengths)
    order = input_keep_mask.to(torch.int8).argsort(dim=1, descending=padding_side == "right", stable=True)
    positions = order[:, :compact_length] if padding_side == "right" else order[:, -compact_length:]
    mask = input_keep_mask.gather(1, positions)
    return Compaction(input_keep_mask, positions, mask, is_padded=min(lengths) < compact_length)


def consecutive_positions(position_ids: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    """
    Position ids `(batch, length)` that close the gaps of `dropped` positions, each packed sample on its own.

    >>> consecutive_positions(torch.tensor([[0, 1, 2, 0, 1]]), torch.tensor([[False, True, False, False, False]]))
    tensor([[0, 0, 1, 0, 1]])
    """
    shift = dropped.cumsum(1)
    is_start = F.pad(position_ids.diff(dim=1) != 1, (1, 0), value=True)
    shift_before_sample = torch.where(is_start, shift, 0).cummax(1).values
    return position_ids - (shift - shift_before_sample)


class CompactPrompt(NamedTuple):
    """
    What a cache filled from a compacted prompt carries along (as `cache.stts_prompt`), for later turns.

    length: of the prompt as the user knows it.
    input_ids, attention_mask: int64 `(batch, compact_length)`.
    """

    length: int
    input_ids: torch.Tensor
    attention_mask: torch.Tensor

    def replace_prefix(self, values: torch.Tensor, compact: torch.Tensor) -> torch.Tensor:
        """Swap the prompt's part of `(batch, length + n)` for its compact form."""
        return torch.cat([compact.to(values.dtype), values[:, self.length :]], dim=1)

    def attend(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """The compact form of a mask over `input_ids`, `(batch, length + n)`."""
        if len(input_ids) != len(self.input_ids):
            raise ValueError(
                f"input_ids has {len(input_ids)} rows, but past_key_values was filled with {len(self.input_ids)}."
            )
        if input_ids.shape[1] <= self.length:
            raise ValueError(
                f"input_ids has {input_ids.shape[1]} tokens, but past_key_values holds a prompt of {self.length}; pass "
                "the whole conversation, the prompt and what came after it."
            )
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.replace_prefix(attention_mask, self.attention_mask)

    def repeat(self, num_rows: int) -> "CompactPrompt":
        """For a cache whose rows were repeated, each in place, for beams or several sequences a prompt."""
        repeats = num_rows // len(self.input_ids)
        return self._replace(
            input_ids=self.input_ids.repeat_interleave(repeats, dim=0),
            attention_mask=self.attention_mask.repeat_interleave(repeats, dim=0),
        )


# ----------------------------------------------------------------------------------------------------------------------
# Attention of the LLM
# ----------------------------------------------------------------------------------------------------------------------


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, tuple]:
    """
    Flash attention in which query `i` sees keys `0..i`.

    Args:
        query, key, value: `(1, heads, length, head_dim)`, `length` at least 1.

    Returns:
        Output, shaped as `query`; float32 log-sum-exp `(1, heads, length)`; what the backward wants besides.
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


class VisionCausalMask(torch.Tensor):
    """
    Stands for the mask of Molmo2's LLM without being built: `F.scaled_dot_product_attention` hands over to it, as to
    `torch.nn.attention.bias.CausalBias`. It has four dimensions (and no element), because Transformers passes a 4D
    mask on as it is. Padded positions come out as zeros.

    Args:
        rows: for each sequence its first position that is not padding, the end of these, and int64 `(vision tokens,)`,
            the vision tokens' positions counted from the first, last one first.
    """

    @staticmethod
    def __new__(cls, rows: Sequence[tuple[int, int, torch.Tensor]]):
        mask = torch.empty(len(rows), 1, 1, 0, dtype=torch.bool, device=rows[0][2].device).as_subclass(cls)
        mask.rows = rows
        return mask

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return cls._attend(*args, **kwargs)
        result = super().__torch_function__(func, types, args, kwargs)
        if isinstance(result, cls):  # moved to another device
            result.rows = args[0].rows
        return result

    @staticmethod
    def _attend(query, key, value, attn_mask, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if dropout_p:
            raise NotImplementedError("VisionCausalMask has no dropout.")
        device, length = query.device, query.shape[2]
        if torch.is_autocast_enabled(device.type):  # it acts below what is called here
            query, key, value = (x.to(torch.get_autocast_dtype(device.type)) for x in (query, key, value))
        scaling = query.shape[-1] ** -0.5 if scale is None else scale
        outputs = []
        for row, (start, stop, vision) in enumerate(attn_mask.rows):
            inputs = (x[row : row + 1, :, start:stop] for x in (query, key, value))
            output = VisionCausalAttention.apply(*inputs, vision.to(device), scaling)
            outputs.append(F.pad(output, (0, 0, start, length - stop)))
        return torch.cat(outputs)


def vision_causal_mask(mm_token_type_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> VisionCausalMask:
    """
    The mask of a prompt that starts at position 0.

    Args:
        mm_token_type_ids: `(batch, length)`, 1 for vision tokens.
        attention_mask: `(batch, length)`, zero for padding on either side; `None` for none.
    """
    length = mm_token_type_ids.shape[1]
    is_vision = mm_token_type_ids == 1
    attended = torch.ones_like(is_vision)
    if attention_mask is not None:
        attended = attention_mask.to(is_vision.device).bool()
        is_vision = is_vision & attended
    # One wait for the device.
    starts, lengths, counts = torch.stack(
        [attended.to(torch.int8).argmax(1), attended.sum(1), is_vision.sum(1)]
    ).tolist()
    positions = (mask_to_indices(is_vision, sum(counts)) % length).split(counts)
    return VisionCausalMask(
        # Kernels want a position, also of a row that is all padding.
        [(a, a + max(n, 1), p.flip(0) - a) for a, n, p in zip(starts, lengths, positions, strict=True)]
    )


def has_flash_kernel(states: torch.Tensor, head_dim: int) -> bool:
    """Whether [`causal_attention`] runs where `states` are and in their dtype."""
    if states.device.type != "cuda":
        return states.device.type == "cpu"
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else states.dtype
    heads = states.new_empty(1, 1, 1, head_dim, dtype=dtype)
    parameters = torch.backends.cuda.SDPAParams(heads, heads, heads, None, 0.0, True, False)
    return head_dim % 8 == 0 and torch.backends.cuda.can_use_flash_attention(parameters)


# ----------------------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class STTSMolmoModelOutputWithPast(Molmo2ModelOutputWithPast):
    r"""
    Args:
        aux_loss (`torch.FloatTensor`, scalar, *optional*): auxiliary loss of the scorer, unweighted.
        token_scores (`torch.FloatTensor` of shape `(frames, P)`, *optional*): higher is kept longer.
        keep_mask (`torch.BoolTensor` of shape `(frames, P)`, *optional*): pooled tokens that survive.
        input_keep_mask (`torch.BoolTensor` of shape `(batch, sequence)`, *optional*): input positions that went
            through the LLM; hidden states and logits are zeros elsewhere. `None` when nothing was dropped.
    """

    aux_loss: torch.Tensor | None = None
    token_scores: torch.Tensor | None = None
    keep_mask: torch.Tensor | None = None
    input_keep_mask: torch.Tensor | None = None


@dataclass
class STTSMolmoCausalLMOutputWithPast(Molmo2CausalLMOutputWithPast):
    r"""
    Args:
        loss (`torch.FloatTensor`, scalar, returned with `labels`): task loss + `aux_loss_weight` * auxiliary loss.

    The other fields are those of [`Molmo2CausalLMOutputWithPast`] and [`STTSMolmoModelOutputWithPast`].
    """

    aux_loss: torch.Tensor | None = None
    token_scores: torch.Tensor | None = None
    keep_mask: torch.Tensor | None = None
    input_keep_mask: torch.Tensor | None = None


class STTSMolmoModel(Molmo2Model):
    """
    Modifications: videos lose tokens in the vision tower, and the LLM runs on what is left. Images and text take the
    native path.
    """

    config: STTSMolmoConfig

    def __init__(self, config: STTSMolmoConfig):
        # Not Molmo2Model.__init__: it would build a plain vision tower first.
        super(Molmo2Model, self).__init__(config)
        validate_layers(config)  # `from_pretrained` sets overrides on a config that is made already
        self.vision_tower = STTSMolmoVisionModel(
            config.vision_config, config.stts_config, config.adapter_config.vision_feature_layer
        )
        self.multi_modal_projector = STTSMolmoAdapter(config.adapter_config, config.stts_config)
        self.language_model = Molmo2TextModel(config.text_config)
        self.post_init()

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        video_token_pooling: torch.Tensor,
        video_grids: torch.Tensor,
        prune_ratio: float | None = None,
        method: str | None = None,
        **kwargs,
    ) -> STTSMolmoVideoFeatures:
        """
        The surviving tokens of each video, as the LLM reads them.

        Args:
            pixel_values_videos: `(frames, N, patch_size * patch_size * channels)`, all videos one after the other.
            video_token_pooling: int `(frames * P, w * w)`, the patches of each pooled token.
            video_grids: int `(videos, 3)`: frames, rows and columns of pooled tokens.
            prune_ratio: share of tokens to drop, in `[0, 1)`; the config's when not given.
            method: `"scorer"`, `"cosine"`, `"random"`, `"tome"` or `"none"`; the config's when not given.

        Raises:
            ValueError: a ratio or method out of range, or inputs whose shapes do not belong together.
        """
        stts_config = self.config.stts_config
        prune_ratio = validate_prune_ratio(stts_config.prune_ratio if prune_ratio is None else prune_ratio)
        method = validate_method(stts_config.method if method is None else method)
        layout = self._video_layout(pixel_values_videos, video_token_pooling, video_grids)
        if method == "none" or prune_ratio == 0:
            native = super().get_video_features(pixel_values_videos, video_token_pooling, video_grids, **kwargs)
            shape = (sum(layout.num_frames), layout.tokens_per_frame)
            keep_mask = torch.ones(shape, dtype=torch.bool, device=pixel_values_videos.device)
            return STTSMolmoVideoFeatures(**native, keep_mask=keep_mask)

        num_kept = layout.num_kept(prune_ratio)
        vision = self.vision_tower(pixel_values_videos, layout=layout, num_kept=num_kept, method=method)
        pooled = self.multi_modal_projector(vision.last_hidden_state, vision.pooled_patches_idx).last_hidden_state
        return STTSMolmoVideoFeatures(
            last_hidden_state=vision.last_hidden_state,
            pooler_output=pooled.split(num_kept),
            token_scores=vision.token_scores,
            keep_mask=vision.keep_mask,
            aux_loss=vision.aux_loss,
        )

    def _video_layout(
        self, pixel_values_videos: torch.Tensor, video_token_pooling: torch.Tensor, video_grids: torch.Tensor
    ) -> VideoLayout:
        grids = video_grids.tolist()
        num_frames = [grid[0] for grid in grids]
        if len({tuple(grid[1:]) for grid in grids}) != 1:
            raise ValueError(
                f"video_grids={grids} mixes grids of pooled tokens; process all videos of a batch at one `size`."
            )
        rows, columns = grids[0][1:]
        expected = (sum(num_frames), sum(num_frames) * rows * columns)
        if (pixel_values_videos.shape[0], video_token_pooling.shape[0]) != expected:
            raise ValueError(
                f"video_grids={grids} announces {expected[0]} frames and {expected[1]} pooled tokens, but "
                f"pixel_values_videos has {pixel_values_videos.shape[0]} frames and video_token_pooling "
                f"{video_token_pooling.shape[0]} rows; pass what one call of the processor returned."
            )
        pooling_size = self.config.stts_config.pooling_size
        if video_token_pooling.shape[1] != pooling_size**2:
            raise ValueError(
                f"The processor pools {video_token_pooling.shape[1]} patches into a token, but the model was "
                f"configured with pooling_size={pooling_size}; give both the same pooling size."
            )
        blocks = video_token_pooling[: rows * columns].long()
        return VideoLayout(num_frames, (rows, columns), pixel_values_videos.shape[1], blocks)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_token_pooling: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        image_num_crops: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_token_pooling: torch.Tensor | None = None,
        video_grids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        prune_ratio: float | None = None,
        method: str | None = None,
        **kwargs,
    ) -> STTSMolmoModelOutputWithPast:
        """
        As [`Molmo2Model.forward`], with videos pruned. Hidden states keep the input's length; attentions and the
        cache, if any, are of the surviving positions only.

        Args:
            prune_ratio, method: see [`~STTSMolmoModel.get_video_features`].
            mm_encoder_outputs: with `{"video": features}` from `get_video_features` the video is not encoded again.

        Raises:
            ValueError: the placeholders of `input_ids` do not fit the videos, an `attention_mask` that is not 2D, or
                an attention implementation that cannot let vision tokens see each other.
        """
        self._check_attention(mm_token_type_ids)
        _check_media(pixel_values, pixel_values_videos)
        if pixel_values_videos is not None and mm_encoder_outputs is None:
            video = self.get_video_features(pixel_values_videos, video_token_pooling, video_grids, prune_ratio, method)
            mm_encoder_outputs, pixel_values_videos = {"video": video}, None
        video = (mm_encoder_outputs or {}).get("video")
        keep_mask = getattr(video, "keep_mask", None)

        num_new = (inputs_embeds if input_ids is None else input_ids).shape[1]
        inputs = {
            "input_ids": input_ids,
            "attention_mask": _compact_cached_prompt(attention_mask, past_key_values, num_new),
            "position_ids": position_ids,
            "mm_token_type_ids": mm_token_type_ids,
            "inputs_embeds": inputs_embeds,
        }
        if position_ids is not None and inputs["attention_mask"] is not attention_mask:
            num_dropped = attention_mask.sum(1) - inputs["attention_mask"].sum(1)
            inputs["position_ids"] = position_ids - num_dropped[:, None]
        compaction = None
        if keep_mask is not None:
            compaction = self._plan_compaction(input_ids, inputs_embeds, attention_mask, video)
        if compaction is not None:
            inputs = self.compact_inputs(inputs, compaction)
        if compaction is not None or isinstance(video, STTSMolmoPrunedTokens):
            inputs["attention_mask"] = self._prefill_mask(inputs, past_key_values)

        outputs = super().forward(
            **inputs,
            pixel_values=pixel_values,
            image_token_pooling=image_token_pooling,
            image_grids=image_grids,
            image_num_crops=image_num_crops,
            pixel_values_videos=pixel_values_videos,
            past_key_values=past_key_values,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        if compaction is not None:
            outputs.last_hidden_state = compaction.restore(outputs.last_hidden_state)
            if outputs.hidden_states is not None:
                outputs.hidden_states = tuple(compaction.restore(h) for h in outputs.hidden_states)
            _remember_prompt(outputs.past_key_values, inputs["input_ids"], compaction)
        return STTSMolmoModelOutputWithPast(
            **outputs,
            aux_loss=getattr(video, "aux_loss", None),
            token_scores=getattr(video, "token_scores", None),
            keep_mask=keep_mask,
            input_keep_mask=None if compaction is None else compaction.input_keep_mask,
        )

    def _prefill_mask(
        self, inputs: dict[str, torch.Tensor | None], past_key_values: Cache | None
    ) -> torch.Tensor | None:
        """
        The mask of a pruned prompt: a [`VisionCausalMask`] for a long one under `sdpa`, else the given mask, of which
        Transformers builds a `(length, length)` one. So it does where that holds more than padding, causality and
        vision (a cache with states or empty slots, packed samples) and for dropout.
        """
        attention_mask, token_types = inputs["attention_mask"], inputs["mm_token_type_ids"]
        config, language_model = self.config.text_config, self.language_model
        shape = (inputs["inputs_embeds"] if inputs["input_ids"] is None else inputs["input_ids"]).shape[:2]
        if past_key_values is None:
            is_plain = attention_mask is not None or inputs["position_ids"] is None
        else:
            is_plain = not (past_key_values.is_compileable or past_key_values.get_seq_length())
        if (
            config._attn_implementation == "sdpa"
            and shape[1] >= MIN_UNMASKED_LENGTH
            and token_types is not None
            and token_types.shape == shape
            and (attention_mask is None or attention_mask.shape == shape)
            and is_plain
            and not (language_model.training and config.attention_dropout)
            and has_flash_kernel(language_model.embed_tokens.weight, config.head_dim)
        ):
            return vision_causal_mask(token_types, attention_mask)
        return attention_mask

    def _check_attention(self, mm_token_type_ids: torch.Tensor | None):
        if is_flash_attention_requested(self.config.text_config) and mm_token_type_ids is not None:
            if not mm_token_type_ids.any():
                return
            raise ValueError(
                "attn_implementation='flash_attention_2' has no mask in which vision tokens see each other: "
                "Transformers would silently make them causal. Use attn_implementation={'vision_config': "
                "'flash_attention_2', 'text_config': 'sdpa'}, or 'sdpa' throughout."
            )

    def _plan_compaction(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        video: STTSMolmoVideoFeatures,
        padding_side: str | None = None,
    ) -> Compaction | None:
        """
        Which input positions survive; `None` when no token was dropped.

        Args:
            padding_side: where rows are padded; found out from `attention_mask` when not given.
        """
        keep_mask = video.keep_mask
        if sum(len(tokens) for tokens in video.pooler_output) == keep_mask.numel():
            return None
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(
                f"attention_mask has {attention_mask.ndim} dimensions; pruning a video needs a 2D mask "
                "(batch, sequence), from which the mask of the shorter sequence is made."
            )
        if input_ids is None:
            image_token = torch.full((), self.config.image_token_id, device=inputs_embeds.device)
            placeholders = (inputs_embeds == self.get_input_embeddings()(image_token)).all(-1)
        else:
            placeholders = input_ids == self.config.image_token_id
        attended = torch.ones_like(placeholders) if attention_mask is None else attention_mask.bool()

        # Each placeholder's token. Not `masked_scatter`: with too few tokens a GPU would fail before the check below.
        token = placeholders.flatten().cumsum(0).view_as(placeholders) - 1
        keep = keep_mask.to(placeholders.device).flatten()
        dropped = placeholders & ~keep[token.clamp(0, len(keep) - 1)]
        # One wait for the device: what the host must know to give every later tensor its size.
        num_placeholders, num_attended, num_dropped, first, last = torch.stack(
            [placeholders.sum(1), attended.sum(1), dropped.sum(1), attended[:, 0], attended[:, -1]]
        ).tolist()
        if sum(num_placeholders) != keep_mask.numel():
            raise ValueError(
                f"The prompt has {sum(num_placeholders)} <im_patch> placeholders, but the videos have "
                f"{keep_mask.numel()} pooled tokens; pass text and video through one call of the processor, "
                "without truncation."
            )
        lengths = [a - d for a, d in zip(num_attended, num_dropped, strict=True)]
        if padding_side is None:
            padding_side = "left" if not all(first) and all(last) else "right"
        return plan_compaction(attended & ~dropped, lengths, padding_side)

    def compact_inputs(self, inputs: dict[str, torch.Tensor | None], compaction: Compaction) -> dict:
        """
        Drop the same positions from every aligned tensor `(batch, length)`; positions stay consecutive.

        Args:
            inputs: `input_ids` or `inputs_embeds`, and any of `attention_mask`, `position_ids` and
                `mm_token_type_ids`; the others are `None`.
        """
        compacted = dict.fromkeys(inputs)
        attention_mask, position_ids = inputs["attention_mask"], inputs["position_ids"]
        if inputs["input_ids"] is not None:
            padding = getattr(self.config.text_config, "pad_token_id", None) or 0
            compacted["input_ids"] = compaction.compact(inputs["input_ids"], padding)
        if inputs.get("inputs_embeds") is not None:
            index = compaction.positions[..., None].expand(-1, -1, inputs["inputs_embeds"].shape[-1])
            padding_mask = ~compaction.mask[..., None]
            compacted["inputs_embeds"] = inputs["inputs_embeds"].gather(1, index).masked_fill(padding_mask, 0)
        if inputs["mm_token_type_ids"] is not None:
            compacted["mm_token_type_ids"] = compaction.compact(inputs["mm_token_type_ids"])
        if attention_mask is not None or compaction.is_padded:
            dtype = torch.long if attention_mask is None else attention_mask.dtype
            compacted["attention_mask"] = compaction.mask.to(dtype)
        if position_ids is not None:
            dropped = ~compaction.input_keep_mask
            if attention_mask is not None:
                dropped &= attention_mask.bool()
            position_ids = consecutive_positions(position_ids.expand_as(dropped), dropped)
            compacted["position_ids"] = position_ids.gather(1, compaction.positions)
        return compacted


def _check_media(pixel_values: torch.Tensor | None, pixel_values_videos: torch.Tensor | None):
    if pixel_values is not None and pixel_values_videos is not None:
        raise ValueError(
            "pixel_values and pixel_values_videos are provided at the same time; Molmo2 takes batches of images or of "
            "videos, not of both."
        )


def _cached_prompt(cache: Cache | None) -> CompactPrompt | None:
    """The compacted prompt that `cache` was filled from; one that was reset has none, and forgets that it had."""
    prompt = getattr(cache, "stts_prompt", None)
    if prompt is not None and not cache.get_seq_length():
        cache.stts_prompt = prompt = None
    return prompt


def _compact_cached_prompt(
    attention_mask: torch.Tensor | None, past_key_values: Cache | None, num_new: int
) -> torch.Tensor | None:
    """Give a mask over the user's whole sequence the length of a cache that holds a compacted prompt."""
    if attention_mask is None or attention_mask.ndim != 2:  # first: compiled decoding must not ask for the length
        return attention_mask
    prompt = _cached_prompt(past_key_values)
    if prompt is None:
        return attention_mask
    if attention_mask.shape[1] == past_key_values.get_seq_length() + num_new:  # `generate` did it already
        return attention_mask
    return prompt.replace_prefix(attention_mask, prompt.attention_mask)


def _remember_prompt(cache: Cache | None, compact_ids: torch.Tensor | None, compaction: Compaction):
    if cache is not None:
        cache.stts_prompt = CompactPrompt(compaction.input_keep_mask.shape[1], compact_ids, compaction.mask.long())


class STTSMolmoForConditionalGeneration(Molmo2ForConditionalGeneration):
    """
    Modifications: the model underneath prunes videos, the loss is computed at labelled positions only and gains the
    auxiliary term, and `generate` prunes once, before the prompt is prefilled.
    """

    config: STTSMolmoConfig
    accepts_loss_kwargs = True  # the loss is a share of a mean over all labels of an accumulated batch

    def __init__(self, config: STTSMolmoConfig):
        # Not Molmo2ForConditionalGeneration.__init__: it would build a plain model first.
        super(Molmo2ForConditionalGeneration, self).__init__(config)
        self.model = STTSMolmoModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.vocab_size = config.text_config.vocab_size
        self.post_init()

    def save_pretrained(self, save_directory, *args, save_original_format: bool = False, **kwargs):
        """
        As `PreTrainedModel.save_pretrained`, except that tensors keep the modules' names: a `Trainer` resumes with
        `load_state_dict`, which does not know the original checkpoints' names and would leave all weights as they are.

        Args:
            save_original_format: write the original checkpoints' names; `from_pretrained` reads both.
        """
        return super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_token_pooling: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        image_num_crops: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_token_pooling: torch.Tensor | None = None,
        video_grids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        prune_ratio: float | None = None,
        method: str | None = None,
        **kwargs,
    ) -> STTSMolmoCausalLMOutputWithPast:
        """
        As [`Molmo2ForConditionalGeneration.forward`], with videos pruned.

        Args:
            labels: `(batch, sequence)`, -100 where there is no loss. A label is predicted from the last surviving
                position before it.
            logits_to_keep: positions whose logits are computed; 0 for all. When not given: all, but none in training
                with labels, where only the loss is read.
            prune_ratio, method: see [`~STTSMolmoModel.get_video_features`].
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_token_pooling=image_token_pooling,
            image_grids=image_grids,
            image_num_crops=image_num_crops,
            pixel_values_videos=pixel_values_videos,
            video_token_pooling=video_token_pooling,
            video_grids=video_grids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            mm_token_type_ids=mm_token_type_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            prune_ratio=prune_ratio,
            method=method,
            **kwargs,
        )

        logits = None
        if logits_to_keep is not None or labels is None or not self.training:
            kept = logits_to_keep if isinstance(logits_to_keep, torch.Tensor) else slice(-(logits_to_keep or 0), None)
            logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            num_items_in_batch = kwargs.get("num_items_in_batch")
            states, targets = labelled_states(outputs.last_hidden_state, labels, outputs.input_keep_mask)
            loss = self.loss_function(
                logits=self.lm_head(states),
                labels=None,
                shift_labels=targets,
                vocab_size=self.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
            if outputs.aux_loss is not None:
                weight = self.config.stts_config.aux_loss_weight
                loss = add_auxiliary_loss(loss, weight * outputs.aux_loss, len(targets), num_items_in_batch)

        return STTSMolmoCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            aux_loss=outputs.aux_loss,
            token_scores=outputs.token_scores,
            keep_mask=outputs.keep_mask,
            input_keep_mask=outputs.input_keep_mask,
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config=None,
        logits_processor=None,
        stopping_criteria=None,
        prefix_allowed_tokens_fn: Callable | None = None,
        synced_gpus: bool | None = None,
        assistant_model=None,
        streamer: BaseStreamer | None = None,
        prune_ratio: float | None = None,
        method: str | None = None,
        **kwargs,
    ):
        """
        As `GenerationMixin.generate`, with videos pruned: each video is encoded once, the prompt is shortened once,
        and whatever the caller sees (returned ids, streamer, logits processors, stopping criteria, lengths) speaks of
        the full prompt.

        Args:
            prune_ratio, method: see [`~STTSMolmoModel.get_video_features`]; without effect on a video that was encoded
                before and comes as `mm_encoder_outputs={"video": features}`.

        A cache that comes back from a call can be passed to the next turn together with the whole conversation's
        `input_ids` and `attention_mask`, without the pixels.
        """
        arguments = {
            "generation_config": generation_config,
            "synced_gpus": synced_gpus,
            "assistant_model": assistant_model,
        }
        callbacks = {
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
            "streamer": streamer,
        }
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        video_inputs = {name: kwargs.pop(name, None) for name in VIDEO_INPUTS}
        _check_media(kwargs.get("pixel_values"), video_inputs["pixel_values_videos"])
        video = (kwargs.get("mm_encoder_outputs") or {}).get("video")
        is_encoded = getattr(video, "keep_mask", None) is not None
        has_video = is_encoded or video_inputs["pixel_values_videos"] is not None
        cache = kwargs.get("past_key_values")
        cached_prompt = _cached_prompt(cache)

        if has_video and cached_prompt is not None:
            raise ValueError(
                "past_key_values already holds a video: pass the conversation's input_ids and attention_mask without "
                "pixel_values_videos, or start over without past_key_values."
            )
        if has_video and input_ids is None:
            raise ValueError("generate() with pixel_values_videos needs input_ids; inputs_embeds alone is not enough.")

        prompt = cached_prompt
        if has_video:
            if not is_encoded:
                video = self.model.get_video_features(**video_inputs, prune_ratio=prune_ratio, method=method)
            attention_mask = kwargs.get("attention_mask")
            if attention_mask is None:
                attention_mask = kwargs["attention_mask"] = self._infer_attention_mask(
                    input_ids, generation_config, kwargs
                )
            compaction = self.model._plan_compaction(input_ids, None, attention_mask, video, padding_side="left")
            # A copy: `generate` repeats its `pooler_output` in place for beams.
            tokens = BaseModelOutputWithPooling if compaction is None else STTSMolmoPrunedTokens
            kwargs["mm_encoder_outputs"] = {"video": tokens(pooler_output=tuple(video.pooler_output))}
            if compaction is not None:
                aligned = ("attention_mask", "position_ids", "mm_token_type_ids")
                compact = self.model.compact_inputs(
                    {"input_ids": input_ids, **{name: kwargs.get(name) for name in aligned}}, compaction
                )
                prompt = CompactPrompt(input_ids.shape[1], compact.pop("input_ids"), compaction.mask.long())
                kwargs.update(compact, attention_mask=prompt.attention_mask)
            del video  # the features of all patches would stay alive until the last token
        elif cached_prompt is not None:
            kwargs["attention_mask"] = cached_prompt.attend(input_ids, kwargs.get("attention_mask"))

        if prompt is None:
            return super().generate(input_ids, **arguments, **callbacks, **kwargs)

        view = FullPromptView(input_ids, prompt)
        arguments["generation_config"] = generation_config = copy.deepcopy(generation_config)
        self._translate_lengths(generation_config, kwargs, view.num_dropped)
        outputs = super().generate(view.compact_ids, **arguments, **view.wrap(**callbacks), **kwargs)
        if isinstance(outputs, torch.Tensor):
            sequences = outputs = view.restore(outputs)
        else:
            sequences = outputs.sequences = view.restore(outputs.sequences)
            cache = outputs.get("past_key_values", cache)
        if cache is not None:
            cache.stts_prompt = prompt.repeat(len(sequences))
        return outputs

    def _translate_lengths(self, generation_config, kwargs: dict, num_dropped: int):
        """`max_length` and `min_length` count the full prompt; make them count the short one, where they are given."""
        for name in ("max_length", "min_length"):
            length = self._generation_setting(name, generation_config, kwargs)
            if length and (generation_config is None or name in kwargs):
                kwargs[name] = max(length - num_dropped, 0)
            elif length:
                setattr(generation_config, name, max(length - num_dropped, 0))

    def _generation_setting(self, name: str, generation_config, kwargs: dict):
        """What `generate` takes for `name`: from its arguments, the config passed, or the model's own."""
        sources = (kwargs.get(name), getattr(generation_config, name, None), getattr(self.generation_config, name))
        return next((value for value in sources if value is not None), None)

    def _infer_attention_mask(self, input_ids: torch.Tensor, generation_config, kwargs: dict) -> torch.Tensor | None:
        """As `generate` does natively: padding is what no sequence ends with; `None` without padding."""
        pad, eos = (
            self._generation_setting(name, generation_config, kwargs) for name in ("pad_token_id", "eos_token_id")
        )
        is_eos = pad in eos if isinstance(eos, (list, tuple)) else pad == eos
        if pad is None or is_eos or not (input_ids == pad).any():
            return None
        return (input_ids != pad).long()


def labelled_states(
    hidden_states: torch.Tensor, labels: torch.Tensor, input_keep_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The states that predict a label, and the labels: the shift by one happens among surviving positions.

    Args:
        hidden_states: `(batch, length, C)`.
        labels: `(batch, length)`, -100 for no label.
        input_keep_mask: bool `(batch, length)`, `None` when all survive.

    Returns:
        `(num_labels, C)` and `(num_labels,)`.
    """
    targets = labels[:, 1:].to(hidden_states.device)
    positions = torch.arange(targets.shape[1], device=targets.device).expand_as(targets)
    if input_keep_mask is not None:
        positions = positions.masked_fill(~input_keep_mask[:, :-1].to(targets.device), -1).cummax(1).values
    # A label with no survivor before it (the first one of a left-padded row) has nothing to be predicted from.
    rows, columns = ((targets != -100) & (positions >= 0)).nonzero(as_tuple=True)
    return hidden_states[rows, positions[rows, columns]], targets[rows, columns]


def add_auxiliary_loss(
    loss: torch.Tensor, aux_loss: torch.Tensor, num_labels: int, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """
    The Trainer adds up the losses of micro-batches and devices: the task loss in them is a share of a mean over all
    their `num_items_in_batch` labels, and so must be the auxiliary loss. It comes from where the vision tower is, the
    task loss from where the language model ends.
    """
    share = 1.0 if num_items_in_batch is None else num_labels / num_items_in_batch
    if isinstance(share, torch.Tensor):
        share = share.to(loss.device)
    return loss + share * aux_loss.to(loss.device)


class FullPromptView:
    """
    Stands between `generate` on a compacted prompt and a caller who knows the full one.

    Args:
        input_ids: int64 `(batch, length)`, what the caller passed; in a later turn more than the prompt.
        prompt: the compacted part of it.
    """

    def __init__(self, input_ids: torch.Tensor, prompt: CompactPrompt):
        self.input_ids = input_ids
        self.compact_ids = prompt.replace_prefix(input_ids, prompt.input_ids)
        self.num_dropped = input_ids.shape[1] - self.compact_ids.shape[1]

    def restore(self, sequences: torch.Tensor) -> torch.Tensor:
        """Put the full prompt in front of what follows the compact one, in `(batch * n, compact_length + new)`."""
        full = self.input_ids.repeat_interleave(len(sequences) // len(self.input_ids), dim=0)
        return torch.cat([full, sequences[:, self.compact_ids.shape[1] :]], dim=1)

    def wrap(self, logits_processor, stopping_criteria, prefix_allowed_tokens_fn, streamer) -> dict:
        """Let the caller's own callbacks see full sequences."""

        def on_full_ids(callback: Callable) -> Callable:
            return lambda input_ids, scores, **kwargs: callback(self.restore(input_ids), scores, **kwargs)

        def allowed_tokens(batch_id: int, sequence: torch.Tensor) -> list[int]:
            full = torch.cat([self.input_ids[batch_id], sequence[self.compact_ids.shape[1] :]])
            return prefix_allowed_tokens_fn(batch_id, full)

        return {
            "logits_processor": logits_processor and LogitsProcessorList(map(on_full_ids, logits_processor)),
            "stopping_criteria": stopping_criteria and StoppingCriteriaList(map(on_full_ids, stopping_criteria)),
            "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn and allowed_tokens,
            "streamer": streamer and FullPromptStreamer(streamer, self.input_ids),
        }


class FullPromptStreamer(BaseStreamer):
    """Hands the full prompt to `streamer` where `generate` puts the compact one: in its first call."""

    def __init__(self, streamer: BaseStreamer, input_ids: torch.Tensor):
        self.streamer = streamer
        self.pending_prompt = input_ids

    def put(self, value):
        if self.pending_prompt is not None:
            value, self.pending_prompt = self.pending_prompt.cpu(), None
        self.streamer.put(value)

    def end(self):
        self.streamer.end()


STTSMolmoModel.register_for_auto_class("AutoModel")
STTSMolmoForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["STTSMolmoForConditionalGeneration", "STTSMolmoModel", "STTSMolmoVisionModel"]
