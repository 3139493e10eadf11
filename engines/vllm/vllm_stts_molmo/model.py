"""STTS on Molmo2 in vLLM: our vision tower as it is, and the language model on vLLM's layers."""

from collections.abc import Sequence

import torch
from stts_molmo.configuration_stts_molmo import METHODS
from stts_molmo.modeling_stts_molmo import STTSMolmoModel  # noqa: F401  (registers itself)
from stts_molmo.prompt_stts_molmo import plan_compaction
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.models.transformers import TransformersMultiModalForCausalLM
from vllm.multimodal import MULTIMODAL_REGISTRY

from .attention import VisionAttention, attach_vision_passes
from .processing import DummyVideoBuilder, VideoProcessingInfo, VideoProcessor

logger = init_logger(__name__)

FIELDS = ("pixel_values_videos", "video_token_pooling", "video_grid", "video_ids", "is_vision", "num_kept", "method")


@MULTIMODAL_REGISTRY.register_processor(VideoProcessor, info=VideoProcessingInfo, dummy_inputs=DummyVideoBuilder)
class STTSMolmoForConditionalGeneration(TransformersMultiModalForCausalLM):
    """
    Modifications of vLLM's Transformers backend: a video is its surviving tokens *and* the timestamps between them, in
    their true order, which only the encoder knows; and vision tokens see each other.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.is_vision: torch.Tensor | None = None  # of the step between `embed_input_ids` and `forward`

    def _get_attn_cls(self):
        return VisionAttention

    def load_weights(self, weights) -> set[str]:
        loaded = super().load_weights(weights)
        if self.model.vision_tower.token_scorer.is_untrained():
            logger.warning(
                "The token scorer was never trained: which tokens it drops is chance. Pass --mm-processor-kwargs "
                '\'{"method": "cosine"}\', which needs no training.'
            )
        return loaded

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return "<|video|>" if modality == "video" else None

    def embed_multimodal(self, **videos) -> list[torch.Tensor]:
        """
        Args:
            videos: what [`VideoProcessor`] made of each, by name.

        Returns:
            For each video `(length, C + 1)`: what stands in the prompt for it, and in the last column whether that is
            vision.
        """
        return [self.embed_video(*video) for video in zip(*(videos.get(name, ()) for name in FIELDS), strict=True)]

    def embed_video(self, pixel_values, token_pooling, grid, ids, is_vision, num_kept, method) -> torch.Tensor:
        """One video's `(length, C + 1)`, from its `FIELDS`."""
        pixel_values = pixel_values.to(self.model.dtype)
        features = self.model.get_video_features(
            pixel_values, token_pooling, grid[None], method=METHODS[method], max_vision_tokens=int(num_kept)
        )
        placeholders = ids == self.config.image_patch_id
        (kept,) = plan_compaction(placeholders[None], features.keep_mask, None).positions
        embeds = self.model.get_input_embeddings()(ids[kept])
        embeds[placeholders[kept]] += features.pooler_output[0].to(embeds)
        return torch.cat([embeds, is_vision[kept, None].to(embeds)], dim=1)

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: Sequence[torch.Tensor] | None = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not multimodal_embeddings:
            self.is_vision = None
            return super().embed_input_ids(input_ids, is_multimodal=is_multimodal)
        rows = torch.cat(list(multimodal_embeddings))
        self.is_vision = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        self.is_vision[is_multimodal.to(input_ids.device)] = rows[:, -1] > 0
        return super().embed_input_ids(input_ids, rows[:, :-1], is_multimodal=is_multimodal)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs):
        metadata = get_forward_context().attn_metadata
        if self.is_vision is not None and metadata is not None:
            attach_vision_passes(self.is_vision, list(metadata.values()))
        self.is_vision = None
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
