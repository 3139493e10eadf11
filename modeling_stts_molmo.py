"""STTS (Spatio-Temporal Token Scoring) inside Molmo2.

The modules and what calls them, in the order in which data flows: scorer, layers, vision tower, adapter, model, head,
loss, generation. The maths is in `pruning_stts_molmo.py`, packing and attention are in `attention_stts_molmo.py`, and
what happens to the prompt is in `prompt_stts_molmo.py`. Sections cited as "section n" are those of the paper. Symbols:
`F` frames of all videos of a batch, `N` patches a frame, `P` pooled tokens a frame, `w` pooling window, `D` ViT width,
`k` prune ratio.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.models.molmo2.modeling_molmo2 import (
    Molmo2Adapter,
    Molmo2ForConditionalGeneration,
    Molmo2Model,
    Molmo2TextModel,
    Molmo2VisionAttention,
    Molmo2VisionEncoderLayer,
    Molmo2VisionModel,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import is_flash_attention_requested

from .attention_stts_molmo import (
    MIN_UNMASKED_LENGTH,
    Packing,
    attention_pool,
    fold_key_bias,
    has_flash_kernel,
    pack_into_bins,
    plan_packing,
    torch_attention_pool,
    varlen_attention,
    vision_causal_mask,
)
from .configuration_stts_molmo import STTSMolmoConfig, is_remote_code, validate_layers
from .generation_stts_molmo import PRUNING_OPTIONS, PrunedGenerationMixin, check_media, check_option_names
from .outputs_stts_molmo import (
    PruningOutput,
    STTSMolmoCausalLMOutputWithPast,
    STTSMolmoModelOutputWithPast,
    STTSMolmoVideoFeatures,
    STTSMolmoVisionOutput,
)
from .prompt_stts_molmo import (
    Compaction,
    compact_cached,
    compact_inputs,
    plan_compaction,
    remember_prompt,
    sample_starts,
)
from .pruning_stts_molmo import (
    VideoLayout,
    auxiliary_loss,
    gather_blocks,
    log_score_bias,
    mask_to_indices,
    merge_tokens,
    previous_frame,
    random_scores,
    select_tokens,
    temporal_dissimilarity,
)
from .saving_stts_molmo import OwnCodeMixin

# A class with its own `model_type` gets no conversion by default, and original checkpoints would load as noise.
register_checkpoint_conversion_mapping("stts_molmo", get_checkpoint_conversion_mapping("molmo2"), overwrite=True)


# ----------------------------------------------------------------------------------------------------------------------
# Scorer
# ----------------------------------------------------------------------------------------------------------------------


class STTSMolmoPoolingAttention(Molmo2VisionAttention):
    """Native attention that also pools full blocks of patches, on CUDA without a kernel for sequences."""

    def __init__(self, config, stts_config, hidden_size: int | None = None):
        super().__init__(config, hidden_size)
        self.stts_config = stts_config

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        full_blocks: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        As the native forward, and with `full_blocks` one query for each block, which sees all of the block's patches
        (section 3.1).

        Args:
            hidden_states: `(blocks, 1, C)`.
            encoder_hidden_states: `(blocks, w * w, C)`.

        Returns:
            `(blocks, 1, D)`, and the attention weights where the native forward has them.

        Raises:
            ImportError: `use_kernels` is set, and the Triton op cannot be imported.
        """
        # Not torch's kernels on CUDA: flash rounds one query up to 128, so that by its sizes the backward of 256 frames
        # wants 16 GB of scratch memory and overflows int32 (github.com/Dao-AILab/flash-attention/pull/2260), and some
        # releases fail beyond 65,535 blocks (github.com/pytorch/pytorch/issues/146704).
        if not full_blocks or not hidden_states.is_cuda or (self.training and self.attention_dropout):
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        query, key, value = (
            proj(x).unflatten(-1, (-1, self.head_dim))
            for proj, x in (
                (self.q_proj, hidden_states),
                (self.k_proj, encoder_hidden_states),
                (self.v_proj, encoder_hidden_states),
            )
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
            float32 `(frames, P)`, the scores before their sigmoid, higher is kept longer; pooled features
            `(frames, P, D)`.
        """
        patches, attention_mask = blocks.flatten(0, 1), None
        if layout.is_dense:
            query = patches.mean(1, keepdim=True)
        else:
            mask = (layout.blocks >= 0).repeat(blocks.shape[0], 1)
            query = patches.sum(1, keepdim=True) / mask.sum(1)[:, None, None]
            attention_mask = torch.zeros_like(mask, dtype=patches.dtype)
            attention_mask = attention_mask.masked_fill(~mask, torch.finfo(patches.dtype).min)[:, None, None]
        pooled, _ = self.token_pooler(query, patches, attention_mask, full_blocks=layout.is_dense)
        pooled = pooled.view(*blocks.shape[:2], -1)

        hidden_states = torch.cat([previous_frame(pooled, layout.num_frames), pooled], dim=-1)
        hidden_states = self.activation_fn(self.fc1(hidden_states))
        hidden_states = self.activation_fn(self.fc2(hidden_states))
        return self.fc3(hidden_states).squeeze(-1).float(), pooled

    def is_untrained(self) -> bool:
        """Whether all biases are zero, as in a fresh scorer: the first step of any training moves them."""
        biases = (p for name, p in self.named_parameters() if name.endswith("bias"))
        return not any(p.is_meta or bool(p.any()) for p in biases)  # offloaded ones cannot be read here


# ----------------------------------------------------------------------------------------------------------------------
# Vision tower
# ----------------------------------------------------------------------------------------------------------------------


class STTSMolmoVisionAttention(Molmo2VisionAttention):
    """Native attention that also takes packed frames, and for these a bias per key."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        key_bias: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        As the native forward, and with `cu_seqlens`:

        Args:
            hidden_states: packed `(1, tokens, D)`, the queries.
            encoder_hidden_states: `(frames, N, D)`, the keys; the queries themselves when not given.
            key_bias: float32 `(frames, N)`, added to the attention logits of each key.
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
        if key_bias is not None:
            query, key, value = fold_key_bias(query, key, value, key_bias.flatten())
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
        key_bias: torch.Tensor | None = None,
        packing: Packing | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        As the native forward, and with a `packing`: all patches `(frames, N, D)` and their `key_bias` `(frames, N)` in,
        packed survivors `(tokens, D)` out. Every patch is a key. What a dropped patch would be after the layer is read
        by nobody, so only survivors are queries (exact, gradients too).
        """
        if packing is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        normed = self.layer_norm1(hidden_states)
        survivors, queries = (x.flatten(0, 1).index_select(0, packing.patches) for x in (hidden_states, normed))
        attended, _ = self.self_attn(
            queries[None], normed, key_bias=key_bias, cu_seqlens=packing.cu_seqlens, max_seqlen=packing.capacity
        )
        survivors = survivors + attended[0]
        return survivors + self.mlp(self.layer_norm2(survivors))


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
        hidden_states = self.run_early_layers(pixel_values)
        refill = self.stts_config.refill_lone_frames
        if method == "tome":
            hidden_states, key_bias, keep_mask = merge_tokens(hidden_states, layout, num_kept)
            token_scores, aux_loss, refill = None, None, False  # what was merged away is in the survivors already
        else:
            token_scores, key_bias, aux_loss = self.score(hidden_states, layout, num_kept, method)
            keep_mask = select_tokens(token_scores, layout.num_frames, num_kept)
        packing = plan_packing(keep_mask, sum(num_kept), layout, refill)
        packed = self.run_bias_layer(hidden_states, key_bias, packing)
        features = torch.cat(self.run_late_layers(packed, packing), dim=-1)
        return STTSMolmoVisionOutput(
            last_hidden_state=features[None],
            pooled_patches_idx=packing.slots,
            token_scores=token_scores,
            keep_mask=keep_mask,
            aux_loss=aux_loss,
        )

    def run_early_layers(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Layers `0..l` on whole frames; features `(frames, N, D)`, which is what tokens are scored by."""
        hidden_states = self.patch_embedding(pixel_values.to(dtype=self.dtype))
        hidden_states = hidden_states + self.positional_embedding[None].to(hidden_states)
        for layer in self.layers[: self.stts_config.prune_layer + 1]:
            hidden_states = layer(hidden_states, None)
        return hidden_states

    def score(
        self, hidden_states: torch.Tensor, layout: VideoLayout, num_kept: Sequence[int], method: str
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
        score_logits, pooled = self.token_scorer(blocks, layout)
        token_scores = score_logits.sigmoid()
        with torch.no_grad():
            compared = pooled if self.stts_config.aux_target == "pooled" else blocks.flatten(2)
            target = temporal_dissimilarity(compared, layout.num_frames)
        key_bias = log_score_bias(score_logits, layout, num_kept, self.stts_config.score_bias)
        return token_scores, key_bias, auxiliary_loss(token_scores, target, layout.num_frames)

    def run_bias_layer(
        self, hidden_states: torch.Tensor, key_bias: torch.Tensor | None, packing: Packing
    ) -> torch.Tensor:
        """Layer `l + 1`, `(frames, N, D)` -> packed survivors `(tokens, D)`; `key_bias` is `(frames, N)`."""
        layer = self.layers[self.stts_config.prune_layer + 1]
        if self.config._attn_implementation == "eager":
            hidden_states = layer(hidden_states, None if key_bias is None else key_bias[:, None, None])
            return hidden_states.flatten(0, 1).index_select(0, packing.patches)
        # By position: reentrant checkpointing gives keywords no gradient of their own.
        return layer(hidden_states, None, key_bias, packing)

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
        pooled, _ = self.image_pooling_2d(blocks.mean(1, keepdim=True), blocks, full_blocks=True, **kwargs)
        return BaseModelOutput(last_hidden_state=self.image_projector(pooled[:, 0]))


# ----------------------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------------------


class STTSMolmoModel(OwnCodeMixin, Molmo2Model):
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
        max_vision_tokens: int | None = None,
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
            max_vision_tokens: the most tokens that each video keeps, in place of a ratio.

        Raises:
            ValueError: an option out of range, or inputs whose shapes do not belong together.
        """
        validate_layers(self.config)  # a loaded model's config may have been changed
        pruning = self.config.stts_config.pruning(prune_ratio, method, max_vision_tokens)
        layout = self.video_layout(pixel_values_videos, video_token_pooling, video_grids)
        num_kept = layout.num_kept(pruning.prune_ratio, pruning.max_vision_tokens)
        num_tokens = sum(layout.num_frames) * layout.tokens_per_frame
        # In training a scorer learns from videos that lose nothing, too.
        if pruning.method == "none" or (sum(num_kept) == num_tokens and not self.training):
            native = super().get_video_features(pixel_values_videos, video_token_pooling, video_grids, **kwargs)
            shape = (sum(layout.num_frames), layout.tokens_per_frame)
            keep_mask = torch.ones(shape, dtype=torch.bool, device=pixel_values_videos.device)
            return STTSMolmoVideoFeatures(**native, keep_mask=keep_mask)

        vision = self.vision_tower(pixel_values_videos, layout=layout, num_kept=num_kept, method=pruning.method)
        pooled = self.multi_modal_projector(vision.last_hidden_state, vision.pooled_patches_idx).last_hidden_state
        return STTSMolmoVideoFeatures(
            last_hidden_state=vision.last_hidden_state,
            pooler_output=pooled.split(num_kept),
            token_scores=vision.token_scores,
            keep_mask=vision.keep_mask,
            aux_loss=vision.aux_loss,
        )

    def video_layout(
        self, pixel_values_videos: torch.Tensor, video_token_pooling: torch.Tensor, video_grids: torch.Tensor
    ) -> VideoLayout:
        """
        How the frames of a batch belong together, from what the processor returned.

        Raises:
            ValueError: the inputs' shapes do not belong together, or not to the model.
        """
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
                f"{video_token_pooling.shape[0]} rows; pass what one call of the processor returned. In a "
                "pipeline leave batch_size out and pass a list of chats, which it answers one by one."
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
        pixel_values_videos: torch.Tensor | None = None,
        video_token_pooling: torch.Tensor | None = None,
        video_grids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        prune_ratio: float | None = None,
        method: str | None = None,
        max_vision_tokens: int | None = None,
        **kwargs,
    ) -> STTSMolmoModelOutputWithPast:
        """
        As [`Molmo2Model.forward`], with videos pruned. Hidden states keep the input's length; attentions and the
        cache, if any, are of the surviving positions only. Rows without `attention_mask` whose `position_ids` begin
        anew hold several packed samples, which do not see each other (natively their vision tokens do); position -1 is
        padding.

        Args:
            prune_ratio, method, max_vision_tokens: see [`~STTSMolmoModel.get_video_features`].
            mm_encoder_outputs: with `{"video": features}` from `get_video_features` the video is not encoded again.

        Raises:
            TypeError: an option is misspelt.
            ValueError: the placeholders of `input_ids` do not fit the videos, an `attention_mask` that is not 2D, or
                an attention implementation that cannot let vision tokens see each other.
        """
        check_option_names(kwargs)
        self._check_attention(mm_token_type_ids)
        check_media(kwargs.get("pixel_values"), pixel_values_videos)
        if pixel_values_videos is not None and mm_encoder_outputs is None:
            videos = (pixel_values_videos, video_token_pooling, video_grids)
            video = self.get_video_features(*videos, prune_ratio, method, max_vision_tokens)
            mm_encoder_outputs, pixel_values_videos = {"video": video}, None
        video = (mm_encoder_outputs or {}).get("video")
        if not isinstance(video, PruningOutput):  # absent, or encoded by the native model
            video = STTSMolmoVideoFeatures()

        length = (inputs_embeds if input_ids is None else input_ids).shape[1]
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "mm_token_type_ids": mm_token_type_ids,
            "inputs_embeds": inputs_embeds,
        }
        inputs = compact_cached(inputs, past_key_values, length)
        compaction = None
        if video.is_pruned:
            inputs, compaction = self._drop_tokens(inputs, video, past_key_values)
        is_compact = video.is_pruned or bool(video.prompt_is_compact)
        inputs["attention_mask"] = self._llm_mask(inputs, compaction, past_key_values, is_compact)

        outputs = super().forward(
            **inputs,
            pixel_values_videos=pixel_values_videos,
            past_key_values=past_key_values,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        if compaction is not None:
            outputs.last_hidden_state = compaction.restore(outputs.last_hidden_state)
            if outputs.hidden_states is not None:  # of some layers only, the others are `None`
                outputs.hidden_states = tuple(h if h is None else compaction.restore(h) for h in outputs.hidden_states)
            if outputs.past_key_values is not None:
                num_cached = outputs.past_key_values.get_seq_length() - compaction.positions.shape[1]
                remember_prompt(outputs.past_key_values, compaction.after(num_cached))
        return STTSMolmoModelOutputWithPast(
            **outputs,
            aux_loss=video.aux_loss,
            token_scores=video.token_scores,
            keep_mask=video.keep_mask,
            input_keep_mask=None if compaction is None else compaction.input_keep_mask,
        )

    def find_placeholders(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Bool `(batch, length)`, where a vision token goes."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        image_token = torch.full((), self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(image_token)).all(-1)

    def _drop_tokens(
        self, inputs: dict[str, torch.Tensor | None], video: STTSMolmoVideoFeatures, past_key_values: Cache | None
    ) -> tuple[dict[str, torch.Tensor | None], Compaction]:
        """Leave the placeholders of dropped tokens out of the aligned tensors."""
        placeholders = self.find_placeholders(inputs["input_ids"], inputs["inputs_embeds"])
        # Behind a text in the cache two of them begin with that text: Transformers reads them from position 0.
        num_cached = 0 if past_key_values is None else past_key_values.get_seq_length()
        cached = {}
        for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0)) if num_cached else ():
            value = inputs[name]
            if value is not None and value.ndim == 2:
                is_whole = value.shape[1] > placeholders.shape[1]
                cached[name] = value[:, :num_cached] if is_whole else value.new_full((len(value), num_cached), fill)
                inputs = inputs | {name: value[:, -placeholders.shape[1] :]}
        attended = inputs["attention_mask"]
        if attended is None and inputs["position_ids"] is not None:  # packed rows have no mask
            attended = (inputs["position_ids"] >= 0).expand_as(placeholders)
        compaction = plan_compaction(placeholders, video.keep_mask, attended)
        inputs = compact_inputs(inputs, compaction, self.pad_token_id)
        return inputs | {n: torch.cat([value, inputs[n]], dim=1) for n, value in cached.items()}, compaction

    @property
    def pad_token_id(self) -> int:
        return getattr(self.config.text_config, "pad_token_id", None) or 0

    def _llm_mask(
        self,
        inputs: dict[str, torch.Tensor | None],
        compaction: Compaction | None,
        past_key_values: Cache | None,
        is_compact: bool,
    ) -> torch.Tensor | None:
        """
        What the LLM is given as its mask: the 2D one, of which Transformers builds a `(length, length)` one, except

        - for a long pruned prompt under `sdpa` a [`VisionCausalMask`], where that holds nothing but padding, causality
          and vision (no cache with states or empty slots) and there is no dropout;
        - for packed samples, where neither fits, a 4D mask in which vision tokens see those of their own sample.
        """
        attention_mask, position_ids, token_types = (
            inputs[name] for name in ("attention_mask", "position_ids", "mm_token_type_ids")
        )
        config, language_model = self.config.text_config, self.language_model
        tokens = inputs["inputs_embeds"] if inputs["input_ids"] is None else inputs["input_ids"]
        shape = tokens.shape[:2]
        if token_types is None or token_types.shape != shape:
            return attention_mask
        starts = None
        if attention_mask is None and position_ids is not None and past_key_values is None:
            starts = sample_starts(position_ids.expand(shape))
            if not starts[:, 1:].any():
                starts = None
        if (
            is_compact
            and config._attn_implementation == "sdpa"
            and shape[1] >= MIN_UNMASKED_LENGTH
            and (attention_mask is None or attention_mask.shape == shape)
            and (past_key_values is None or not (past_key_values.is_compileable or past_key_values.get_seq_length()))
            and not (language_model.training and config.attention_dropout)
            and has_flash_kernel(language_model.embed_tokens.weight, config.head_dim)
        ):
            attended = compaction.mask if attention_mask is None and compaction is not None else attention_mask
            return vision_causal_mask(token_types, attended, starts)
        if starts is None:
            return attention_mask
        return create_causal_mask(
            config=config,
            inputs_embeds=language_model.embed_tokens.weight.new_empty(1).expand(*shape, 1),
            attention_mask=None,
            past_key_values=None,
            position_ids=position_ids,
            block_sequence_ids=torch.where(token_types == 1, starts.cumsum(1), -1),
        )

    def _check_attention(self, mm_token_type_ids: torch.Tensor | None):
        if is_flash_attention_requested(self.config.text_config) and mm_token_type_ids is not None:
            if not mm_token_type_ids.any():
                return
            raise ValueError(
                "attn_implementation='flash_attention_2' has no mask in which vision tokens see each other: "
                "Transformers would silently make them causal. Use attn_implementation={'vision_config': "
                "'flash_attention_2', 'text_config': 'sdpa'}, or 'sdpa' throughout."
            )


class STTSMolmoForConditionalGeneration(PrunedGenerationMixin, OwnCodeMixin, Molmo2ForConditionalGeneration):
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
        if any(getattr(self.generation_config, name, None) is not None for name in PRUNING_OPTIONS):
            self.generation_config._from_model_config = False  # of one made from the model's, loading keeps no options
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
        max_vision_tokens: int | None = None,
        **kwargs,
    ) -> STTSMolmoCausalLMOutputWithPast:
        """
        As [`Molmo2ForConditionalGeneration.forward`], with videos pruned.

        Args:
            labels: `(batch, sequence)`, -100 where there is no loss. A label is predicted from the last surviving
                position before it.
            shift_labels: the same shifted to the left by one, in place of `labels`. Not named in the signature: the
                Trainer would take no batch for labelled that lacks it, and report no loss of an evaluation.
            logits_to_keep: positions whose logits are computed; 0 for all. When not given: all, but none in training
                with labels, where only the loss is read.
            prune_ratio, method, max_vision_tokens: see [`~STTSMolmoModel.get_video_features`].

        Raises:
            ValueError: a label is a token that the model cannot write.
        """
        shift_labels = kwargs.pop("shift_labels", None)
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
            max_vision_tokens=max_vision_tokens,
            **kwargs,
        )

        if labels is not None and shift_labels is None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        logits = None
        if logits_to_keep is not None or shift_labels is None or not self.training:
            kept = logits_to_keep if isinstance(logits_to_keep, torch.Tensor) else slice(-(logits_to_keep or 0), None)
            logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if shift_labels is not None:
            num_items_in_batch = kwargs.get("num_items_in_batch")
            states, targets = labelled_states(
                outputs.last_hidden_state, shift_labels, outputs.input_keep_mask, self.vocab_size
            )
            loss = self.loss_function(
                logits=self.lm_head(states),
                labels=None,
                shift_labels=targets,
                vocab_size=self.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
            if self.training and outputs.aux_loss is not None:
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

    def has_untrained_scorer(self) -> bool:
        """Whether the scorer is as fresh as `convert` and the first load of a plain Molmo2 leave it."""
        return self.model.vision_tower.token_scorer.is_untrained()


def labelled_states(
    hidden_states: torch.Tensor, shift_labels: torch.Tensor, input_keep_mask: torch.Tensor | None, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The states that predict a label, and the labels: the last survivor before a label predicts it.

    Args:
        hidden_states: `(batch, length, C)`.
        shift_labels: `(batch, length)`, at each position the label of the next one; -100 for no label.
        input_keep_mask: bool `(batch, length)`, `None` when all survive.

    Returns:
        `(num_labels, C)` and `(num_labels,)`.

    Raises:
        ValueError: a label is no token of the `vocab_size` that the model can write.
    """
    targets = shift_labels.to(hidden_states.device)
    positions = torch.arange(targets.shape[1], device=targets.device).expand_as(targets)
    if input_keep_mask is not None:
        positions = positions.masked_fill(~input_keep_mask.to(targets.device), -1).cummax(1).values
    # A label with no survivor before it (the first one of a left-padded row) has nothing to be predicted from.
    is_read = (targets != -100) & (positions >= 0)
    num_read, highest = torch.stack([is_read.sum(), targets.max()]).tolist()  # one wait for the device
    if highest >= vocab_size:
        raise ValueError(
            f"labels hold {highest}, but the model writes tokens below {vocab_size} only: placeholders and "
            "delimiters of videos must be -100. stts_molmo.VideoQACollator makes such labels."
        )
    chosen = mask_to_indices(is_read, num_read)
    rows = chosen // targets.shape[1]
    return hidden_states[rows, positions.flatten()[chosen]], targets.flatten()[chosen]


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


STTSMolmoModel.register_for_auto_class("AutoModel")
STTSMolmoForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

if not is_remote_code(__name__):
    AutoModel.register(STTSMolmoConfig, STTSMolmoModel)
    AutoModelForImageTextToText.register(STTSMolmoConfig, STTSMolmoForConditionalGeneration)
    AutoModelForMultimodalLM.register(STTSMolmoConfig, STTSMolmoForConditionalGeneration)

__all__ = ["STTSMolmoForConditionalGeneration", "STTSMolmoModel", "STTSMolmoVisionModel"]
