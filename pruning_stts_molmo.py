"""The paper's own maths, in the order in which a video meets it: budget, blocks of patches, previous frame, similarity,
bias, auxiliary loss, selection, and merging in its place.

Functions on tensors, without a module or a model. Sections cited as "section n" are those of the paper. Symbols: `F`
frames of all videos of a batch, `N` patches a frame, `P` pooled tokens a frame, `w` pooling window, `D` ViT width, `k`
prune ratio.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .configuration_stts_molmo import exact_ratio

RESCALED_MIN_SCORE = math.exp(-2)  # authors' code
MERGED_AWAY_BIAS = -1000.0  # no attention weight is left in float32; finite in float16 even when divided by a scale


# ----------------------------------------------------------------------------------------------------------------------
# Budget
# ----------------------------------------------------------------------------------------------------------------------


def num_kept_tokens(
    num_frames: int, tokens_per_frame: int, prune_ratio: float, max_vision_tokens: int | None = None
) -> int:
    """
    Number of a video's pooled tokens that survive; known before any score is computed (section 3).

    `floor(k * T * P)` tokens are dropped, in decimal arithmetic, but never one of frame 0. With `max_vision_tokens` the
    ratio does not count, and that many are kept.

    Raises:
        ValueError: `max_vision_tokens` is less than a frame has.

    >>> num_kept_tokens(num_frames=90, tokens_per_frame=81, prune_ratio=0.7)  # drops 5103; binary floats say 5102
    2187
    """
    num_tokens = num_frames * tokens_per_frame
    if max_vision_tokens is None:
        num_dropped = int(exact_ratio(prune_ratio) * num_tokens)
        return num_tokens - min(num_dropped, num_tokens - tokens_per_frame)
    if max_vision_tokens < tokens_per_frame:
        raise ValueError(
            f"max_vision_tokens={max_vision_tokens} is less than the {tokens_per_frame} tokens of a frame, and the "
            f"first one is never pruned; allow {tokens_per_frame} or more."
        )
    return min(num_tokens, max_vision_tokens)


# ----------------------------------------------------------------------------------------------------------------------
# Blocks and frames
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

    def num_kept(self, prune_ratio: float, max_vision_tokens: int | None = None) -> list[int]:
        """Surviving tokens of each video, see [`num_kept_tokens`]."""
        return [num_kept_tokens(t, self.tokens_per_frame, prune_ratio, max_vision_tokens) for t in self.num_frames]


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


# ----------------------------------------------------------------------------------------------------------------------
# Scores, bias and loss
# ----------------------------------------------------------------------------------------------------------------------


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


def log_score_bias(score_logits: torch.Tensor, layout: VideoLayout, num_kept: Sequence[int], kind: str) -> torch.Tensor:
    """
    Scores before their sigmoid -> what is added to the attention logits of each key in layer `l + 1` (section 3.2).

    Args:
        score_logits: float32 `(frames, P)`.
        layout: of the batch.
        num_kept: survivors of each video; one that keeps all its tokens gets no bias, as where nothing is pruned.
        kind: `"log"`, or `"rescaled_log"`: the authors' code first stretches the scores of each row of patches
            to `[exp(-2), 1]`.

    Returns:
        float32 `(frames, N)`, zero in each video's first frame.
    """
    if kind == "rescaled_log":
        rows = score_logits.sigmoid().unflatten(1, layout.grid)
        low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
        rows = RESCALED_MIN_SCORE + (rows - low) * (1 - RESCALED_MIN_SCORE) / (high - low + 1e-6)
        bias = rows.flatten(1).log()
    else:
        bias = F.logsigmoid(score_logits)  # finite, and with a gradient, however small the score
    bias = zero_first_frames(bias, layout.num_frames)
    videos = zip(bias.split(layout.num_frames), num_kept, strict=True)
    bias = torch.cat([torch.zeros_like(video) if kept == video.numel() else video for video, kept in videos])
    return bias.index_select(1, patch_slots(layout) // layout.blocks.shape[1])


def auxiliary_loss(token_scores: torch.Tensor, target: torch.Tensor, num_frames: Sequence[int]) -> torch.Tensor:
    """
    Mean over all `(frames, P)` of `(score - target)^2`, zero in first frames (section 3.4). The target is detached:
    the scores learn the features' similarity, the features do not learn the scores.
    """
    return zero_first_frames((token_scores - target.detach()) ** 2, num_frames).mean()


# ----------------------------------------------------------------------------------------------------------------------
# Selection
# ----------------------------------------------------------------------------------------------------------------------


def mask_to_indices(mask: torch.Tensor, num_true: int) -> torch.Tensor:
    """
    Ascending flat indices of the `num_true` set entries; `nonzero` with a static shape.

    >>> mask_to_indices(torch.tensor([[True, False], [True, True]]), 3)
    tensor([0, 2, 3])
    """
    return mask.flatten().to(torch.int8).argsort(descending=True, stable=True)[:num_true]


def select_tokens(token_scores: torch.Tensor, num_frames: Sequence[int], num_kept: Sequence[int]) -> torch.Tensor:
    """
    Keep the `num_kept` highest scores of each video; every token of its first frame is kept, ties go to the lower
    index, and NaN is the lowest score (section 3.3). The sort is stable and shapes are static, so the result is the
    same on every device and nothing waits for it.

    Args:
        token_scores: `(frames, P)`.
        num_frames: frames of each video.
        num_kept: survivors of each video.

    Returns:
        bool `(frames, P)`.
    """
    masks = []
    for scores, kept in zip(token_scores.detach().split(list(num_frames)), num_kept, strict=True):
        others = scores[1:].nan_to_num(nan=-torch.inf)  # a sort would put NaN above the first frame
        first_frame_first = torch.cat([torch.full_like(scores[:1], torch.inf), others]).flatten()
        order = first_frame_first.argsort(descending=True, stable=True)
        mask = torch.zeros_like(order, dtype=torch.bool).index_fill(0, order[:kept], True)
        masks.append(mask.view_as(scores))
    return torch.cat(masks)


# ----------------------------------------------------------------------------------------------------------------------
# Merging
# ----------------------------------------------------------------------------------------------------------------------


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
