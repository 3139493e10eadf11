"""
STTS written down a second time, from the paper's equations: loops over videos, frames and blocks. It computes with the
parameters of a float64 model, so that gradients can be compared too. Of the product it calls nothing; of Molmo2 it
takes embeddings, norms, MLPs and the projector. Slow. Sections are those of the paper, `N` patches and `P` blocks a
frame, `D` the ViT's width.
"""

import math
from collections.abc import Sequence
from decimal import Decimal
from typing import NamedTuple

import torch

Blocks = Sequence[Sequence[int]]  # the patches of each block of a frame; -1 for a slot outside the frame


def linear(x: torch.Tensor, layer: torch.nn.Linear) -> torch.Tensor:
    return x @ layer.weight.T + layer.bias


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def attention(queries: torch.Tensor, keys: torch.Tensor, module, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Section 3.2: `softmax(Q K^T / sqrt(d) + S) V`, head by head; `(n, D)` and `(m, D)` -> `(n, D)`, `S` is `(m,)`."""
    heads = []
    size = module.head_dim
    q, k, v = linear(queries, module.q_proj), linear(keys, module.k_proj), linear(keys, module.v_proj)
    for start in range(0, q.shape[1], size):
        head = slice(start, start + size)
        logits = q[:, head] @ k[:, head].T / math.sqrt(size)
        if bias is not None:
            logits = logits + bias
        weights = torch.exp(logits - logits.detach().amax(1, keepdim=True))
        heads.append(weights / weights.sum(1, keepdim=True) @ v[:, head])
    return linear(torch.cat(heads, dim=1), module.o_proj)


def vit_layer(layer, patches: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """One layer on one frame, `(n, D)`."""
    normed = layer.layer_norm1(patches)
    patches = patches + attention(normed, normed, layer.self_attn, bias)
    return patches + layer.mlp(layer.layer_norm2(patches))


def members(patches: torch.Tensor, block: Sequence[int]) -> torch.Tensor:
    return torch.stack([patches[p] for p in block if p >= 0])


def pool(patches: torch.Tensor, module) -> torch.Tensor:
    """A block, `(w * w, C)` -> `(D,)`: its mean asks its patches."""
    return attention((sum(patches) / len(patches))[None], patches, module)[0]


def score_logits(pooled: Sequence[Sequence[torch.Tensor]], scorer) -> torch.Tensor:
    """Section 3.1: pooled features of one video, `T` times `P` of `(D,)` -> scores before their sigmoid `(T, P)`."""
    rows = []
    for t, frame in enumerate(pooled):
        row = []
        for i, current in enumerate(frame):
            previous = pooled[t - 1][i] if t else torch.zeros_like(current)
            hidden = silu(linear(torch.cat([previous, current]), scorer.fc1))
            hidden = silu(linear(hidden, scorer.fc2))
            row.append(linear(hidden, scorer.fc3)[0])
        rows.append(torch.stack(row))
    return torch.stack(rows)


def dissimilarity(features: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """`1 - cos` of each block and the same block one frame earlier, `(T, P)`; zero in frame 0 (section 3.4)."""
    rows = [[torch.zeros_like(f[0]) for f in features[0]]]
    for before, after in zip(features, features[1:], strict=False):
        rows.append([1 - (a @ b) / (a @ a).sqrt() / (b @ b).sqrt() for a, b in zip(before, after, strict=True)])
    return torch.stack([torch.stack(row) for row in rows])


def patch_bias(logits: torch.Tensor, blocks: Blocks, num_patches: int, columns: int, kind: str) -> list[torch.Tensor]:
    """Section 3.2: the logarithm of a block's score, for each of its patches; nothing in frame 0. `T` times `(N,)`."""
    biases = []
    for t, frame in enumerate(logits):
        scores = [1 / (1 + torch.exp(-logit)) for logit in frame]
        if kind == "rescaled_log":  # the authors' code
            low = math.exp(-2)
            for start in range(0, len(scores), columns):
                row = scores[start : start + columns]
                spread = max(row) - min(row) + 1e-6
                scores[start : start + columns] = [low + (score - min(row)) * (1 - low) / spread for score in row]
        bias = [torch.zeros((), dtype=logits.dtype)] * num_patches
        for score, block in zip(scores, blocks, strict=True):
            for patch in block:
                if t > 0 and patch >= 0:
                    bias[patch] = torch.log(score)
        biases.append(torch.stack(bias))
    return biases


def kept_blocks(scores: torch.Tensor, prune_ratio: float) -> list[list[int]]:
    """Section 3.3: the blocks of each frame left when the lowest `k` of the video's go; the first frame stays whole."""
    num_frames, num_blocks = scores.shape
    num_dropped = min(int(Decimal(str(prune_ratio)) * num_frames * num_blocks), (num_frames - 1) * num_blocks)
    candidates = [(scores[t, i].item(), -t, -i) for t in range(1, num_frames) for i in range(num_blocks)]
    dropped = {(-t, -i) for _, t, i in sorted(candidates)[:num_dropped]}
    return [[i for i in range(num_blocks) if (t, i) not in dropped] for t in range(num_frames)]


class Encoded(NamedTuple):
    """
    tokens: `(kept, text_hidden_size)`, of all videos.
    scores: `(frames, P)`.
    kept: blocks left of each frame.
    aux_loss: mean over all blocks (section 3.4); `None` unless the scorer scored.
    """

    tokens: torch.Tensor
    scores: torch.Tensor
    kept: list[list[int]]
    aux_loss: torch.Tensor | None


def encode(model, pixels: torch.Tensor, num_frames: Sequence[int], blocks: Blocks, columns: int) -> Encoded:
    """Pixels `(frames, N, C)` of videos -> what the LLM reads, by the settings in the model's config."""
    tokens, scores, kept, errors = [], [], [], []
    for video in pixels.split(list(num_frames)):
        video_tokens, video_scores, video_kept, video_errors = encode_video(model, video, blocks, columns)
        tokens += video_tokens
        scores.append(video_scores)
        kept += video_kept
        errors += video_errors
    return Encoded(torch.stack(tokens), torch.cat(scores), kept, sum(errors) / len(errors) if errors else None)


def encode_video(model, pixels: torch.Tensor, blocks: Blocks, columns: int) -> tuple:
    """Its surviving tokens, scores `(T, P)`, blocks left of each frame, and `L_sim(t, i)` of every block."""
    tower, settings = model.vision_tower, model.config.stts_config
    frames = [tower.patch_embedding(frame) + tower.positional_embedding for frame in pixels]
    for layer in tower.layers[: settings.prune_layer + 1]:
        frames = [vit_layer(layer, frame) for frame in frames]

    patches = [[members(frame, block) for block in blocks] for frame in frames]
    features, biases, errors = [[block.flatten() for block in frame] for frame in patches], [None] * len(frames), []
    if settings.method == "scorer":
        pooled = [[pool(block, tower.token_scorer.token_pooler) for block in frame] for frame in patches]
        logits = score_logits(pooled, tower.token_scorer)
        scores = 1 / (1 + torch.exp(-logits))
        kept = kept_blocks(scores, settings.prune_ratio)
        target = dissimilarity(pooled if settings.aux_target == "pooled" else features).detach()
        errors = [(scores[t, i] - target[t, i]) ** 2 * (t > 0) for t in range(len(frames)) for i in range(len(blocks))]
        if sum(map(len, kept)) < scores.numel():
            biases = patch_bias(logits, blocks, len(frames[0]), columns, settings.score_bias)
    else:
        scores = dissimilarity(features)
        kept = kept_blocks(scores, settings.prune_ratio)

    tokens = []
    for frame, bias, left in zip(frames, biases, kept, strict=True):
        frame = vit_layer(tower.layers[settings.prune_layer + 1], frame, bias)
        tokens += late_tokens(model, frame, [[p for p in blocks[i] if p >= 0] for i in left])
    return tokens, scores, kept, errors


def late_tokens(model, patches: torch.Tensor, left: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Section 3.3: the layers after the pruning on one frame's survivors, and what the LLM reads of each block left."""
    tower, adapter = model.vision_tower, model.multi_modal_projector
    survivors = [p for block in left for p in block]
    if not survivors:
        return []
    outputs, states = {}, patches[survivors]
    for index in range(tower.stts_config.prune_layer + 2, max(tower.feature_layers) + 1):
        states = outputs[index] = vit_layer(tower.layers[index], states)
    features = torch.cat([outputs[index] for index in tower.feature_layers], dim=1)
    rows = [members(features, [survivors.index(p) for p in block]) for block in left]
    return [adapter.image_projector(pool(row, adapter.image_pooling_2d)) for row in rows]
