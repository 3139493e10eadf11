"""A vLLM plugin that serves STTS checkpoints of stts-molmo."""

ARCHITECTURE = "STTSMolmoForConditionalGeneration"


def register() -> None:
    """What vLLM calls in each of its processes: makes the architecture, its configuration and its files known."""
    # Registers the config and the processors with Transformers' Auto classes: no trust in remote code is needed.
    import stts_molmo.processing_stts_molmo  # noqa: F401
    from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, VIDEO_LOADER_REGISTRY

    from .options import EngineOptions
    from .video import BlamelessMediaConnector, EncodedVideoLoader

    VIDEO_PROCESSOR_MAPPING_NAMES["stts_molmo"] = "STTSMolmoVideoProcessor"  # where vLLM looks up who reads the files
    VIDEO_LOADER_REGISTRY.register("stts_molmo", video_processor="STTSMolmoVideoProcessor")(EncodedVideoLoader)
    MEDIA_CONNECTOR_REGISTRY.register("stts_molmo")(BlamelessMediaConnector)
    MODELS_CONFIG_MAP[ARCHITECTURE] = EngineOptions
    ModelRegistry.register_model(ARCHITECTURE, f"vllm_stts_molmo.model:{ARCHITECTURE}")
