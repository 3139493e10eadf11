"""
Operations that Molmo2 with STTS needs, from a config: multiplications and additions of its matrix products.

What no result depends on is not counted, whether or not a program computes it: queries of tokens about to be dropped,
the last language layer and the logits at positions that nobody reads, masked pairs of an attention.
"""

from dataclasses import dataclass

from ..pruning_stts_molmo import num_kept_tokens


@dataclass(frozen=True)
class Shape:
    """
    A batch: `videos` rows, each a video of `frames` frames, `delimiters` tokens (timestamps among them) around its
    frames, and `text` tokens after it.
    """

    videos: int
    frames: int
    text: int
    delimiters: int

    def tokens(self, tokens_per_frame: int, prune_ratio: float) -> int:
        """Tokens of the batch that the language model sees."""
        kept = num_kept_tokens(self.frames, tokens_per_frame, prune_ratio)
        return self.videos * (kept + self.delimiters + self.text)


def grid_sizes(config) -> tuple[int, int]:
    """Patches and pooled tokens of a frame."""
    side, window = (
        config.vision_config.image_size[0] // config.vision_config.patch_size,
        config.stts_config.pooling_size,
    )
    return side**2, (-(-side // window)) ** 2


def attention(config, width: int, queries: float, keys: float, pairs: float) -> float:
    """Projections of `width` wide inputs, and both products over `pairs` of query and key."""
    inner, kv = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    return 2 * queries * inner * (width + config.hidden_size) + 2 * keys * 2 * width * kv + 4 * inner * pairs


def vision_layer(config, queries: float, keys: float, pairs: float) -> float:
    mlp = 2 * queries * 2 * config.hidden_size * config.intermediate_size
    return attention(config, config.hidden_size, queries, keys, pairs) + mlp


def language_layer(config, queries: float, keys: float, pairs: float) -> float:
    mlp = 2 * queries * 3 * config.hidden_size * config.intermediate_size
    return attention(config, config.hidden_size, queries, keys, pairs) + mlp


def scorer(config, tokens: float) -> float:
    """Pooling and scoring of `tokens` blocks of patches."""
    vision, window = config.vision_config, config.stts_config.pooling_size**2
    width, hidden = vision.hidden_size, config.stts_config.scorer_hidden_size or vision.intermediate_size
    mlp = 2 * tokens * (2 * width * hidden + hidden * hidden + hidden)
    return attention(vision, width, tokens, window * tokens, window * tokens) + mlp


def adapter(config, tokens: float) -> float:
    adapter, window = config.adapter_config, config.stts_config.pooling_size**2
    width = config.vision_config.hidden_size * len(adapter.vision_feature_layer)
    mlp = 2 * tokens * adapter.intermediate_size * (2 * adapter.hidden_size + adapter.text_hidden_size)
    return attention(adapter, width, tokens, window * tokens, window * tokens) + mlp


def forward_operations(
    config, shape: Shape, prune_ratio: float, method: str, num_read: int = 1, num_new: int = 0
) -> dict[str, float]:
    """
    Operations of one forward of a batch by stage, and of the tokens generated after it.

    Args:
        config: an `STTSMolmoConfig`.
        prune_ratio: 0 is the native model.
        method: `"scorer"`, `"cosine"`, `"tome"`, or `"post_vit"`: tokens are dropped before the language model only.
        num_read: positions at the end of each row whose logits are read.
        num_new: tokens that pass through the language model one by one afterwards.
    """
    vision, text = config.vision_config, config.text_config
    num_patches, tokens_per_frame = grid_sizes(config)
    frames, prune_layer = shape.frames, config.stts_config.prune_layer
    kept = num_kept_tokens(frames, tokens_per_frame, prune_ratio)

    # Survivors: all of frame 0, and equal shares of the other frames.
    prunes_vit = prune_ratio > 0 and method != "post_vit"
    seen = kept if prunes_vit else frames * tokens_per_frame
    share = (seen - tokens_per_frame) / max(frames - 1, 1) / tokens_per_frame
    full = frames * num_patches
    survivors = num_patches * (1 + (frames - 1) * share)
    pairs = num_patches**2 * (1 + (frames - 1) * share**2)
    num_layers = max(layer % vision.num_hidden_layers for layer in config.adapter_config.vision_feature_layer) + 1

    early = (prune_layer + 1) * vision_layer(vision, full, full, frames * num_patches**2)
    early += 2 * full * vision.patch_size**2 * vision.num_channels * vision.hidden_size
    late = vision_layer(vision, survivors, full, survivors * num_patches)
    late += (num_layers - prune_layer - 2) * vision_layer(vision, survivors, survivors, pairs)

    length = kept + shape.delimiters + shape.text
    seen_pairs = length * (length + 1) / 2 + kept * (kept - 1) / 2  # causal, and vision tokens see each other
    read_pairs = num_read * (2 * length - num_read + 1) / 2
    language = (text.num_hidden_layers - 1) * language_layer(text, length, length, seen_pairs)
    language += language_layer(text, num_read, length, read_pairs)
    logits = 2 * text.hidden_size * text.vocab_size
    new_token = text.num_hidden_layers * language_layer(text, 1, 1, length + (num_new + 1) / 2) + logits
    stages = {
        "early_vit": early,
        "score": scorer(config, frames * tokens_per_frame) if prunes_vit and method == "scorer" else 0.0,
        "late_vit": late,
        "adapter": adapter(config, seen),
        "language": language,
        "logits": num_read * logits,
        "new_token": num_new * new_token,
    }
    return {name: shape.videos * count for name, count in stages.items()}
