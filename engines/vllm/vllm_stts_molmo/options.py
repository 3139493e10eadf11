"""What a request and an engine may ask for, and what is refused by name."""

from collections.abc import Mapping
from typing import NamedTuple

from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassError
from stts_molmo.configuration_stts_molmo import Pruning, STTSConfig
from stts_molmo.generation_stts_molmo import PRUNING_OPTIONS, first_pruning
from stts_molmo.processing_stts_molmo import STTSMolmoVideoProcessor
from vllm.model_executor.models.config import VerifyAndUpdateConfig

# A request's own: frames are chosen by the first two or by the third.
SAMPLING_OPTIONS = ("num_frames", "max_fps", "fps", "test_time_scaling")
OPTIONS = (*PRUNING_OPTIONS, *SAMPLING_OPTIONS)


class RequestOptions(NamedTuple):
    """
    pruning: how tokens are dropped.
    sampling: which frames are read, as the video processor's `sample_videos` takes it.
    """

    pruning: Pruning
    sampling: dict


def find_options(
    request: Mapping, engine: Mapping, generation: Mapping, stts_config: STTSConfig, test_time_scaling: bool
) -> RequestOptions:
    """
    What a request is answered with: its own `mm_processor_kwargs`, else the engine's, else the checkpoint's.

    Args:
        request, engine: `mm_processor_kwargs`.
        generation: the checkpoint's `generation_config.json`.
        test_time_scaling: whether the checkpoint's processor scales the number of frames.

    Raises:
        ValueError: an option is unknown or out of range, or two exclude each other.
    """
    for name in (*request, *engine):
        if name not in OPTIONS:
            raise ValueError(f"mm_processor_kwargs has {name!r}; what can be given is {', '.join(OPTIONS)}.")
    sources = ([source.get(name) for name in PRUNING_OPTIONS] for source in (request, engine, generation))
    pruning = stts_config.pruning(**first_pruning(sources))

    chosen = {name for name in SAMPLING_OPTIONS if request.get(name) is not None}
    sampling = {name: engine[name] for name in SAMPLING_OPTIONS if engine.get(name) is not None}
    for name, other in (("fps", "num_frames"), ("num_frames", "fps")):
        if name in chosen:
            sampling.pop(other, None)
    sampling |= {name: request[name] for name in chosen}
    try:
        validate_typed_dict(STTSMolmoVideoProcessor.valid_kwargs, sampling)
    except StrictDataclassError as error:
        raise ValueError(f"mm_processor_kwargs={sampling}: {error}") from error
    scales = sampling.get("test_time_scaling")
    if test_time_scaling if scales is None else scales:
        sampling["prune_ratio"] = pruning.prune_ratio
    return RequestOptions(pruning, sampling)


class EngineOptions(VerifyAndUpdateConfig):
    """What vLLM asks about an engine's configuration before it starts a process for it."""

    @staticmethod
    def verify_and_update_config(vllm_config) -> None:
        """
        Refuse what this plugin would answer wrongly.

        Raises:
            ValueError: the message names the option, and what to pass.
        """
        scheduler, parallel, lora = vllm_config.scheduler_config, vllm_config.parallel_config, vllm_config.lora_config
        context_parallel = parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size
        refused = {
            "chunked prefill, which would part vision tokens that see each other; pass --no-enable-chunked-prefill and "
            "as --max-num-batched-tokens at least --max-model-len": scheduler.enable_chunked_prefill,
            "--video-pruning-rate, which prunes after the vision transformer; pass --mm-processor-kwargs "
            "'{\"prune_ratio\": 0.5}'": vllm_config.model_config.multimodal_config.video_pruning_rate,
            "pipeline parallelism: only the first stage knows which tokens are vision; use "
            "--tensor-parallel-size": parallel.pipeline_parallel_size > 1,
            "context parallelism, in which no process has a prompt's keys in order": max(context_parallel) > 1,
            "micro-batches (--enable-dbo), which part a step's tokens": parallel.enable_dbo,
            "speculative decoding, which was never tried": vllm_config.speculative_config is not None,
            "LoRA on the vision tower or its connector; adapters may be on the language model": (
                lora is not None and lora.enable_tower_connector_lora
            ),
        }
        for reason, is_asked in refused.items():
            if is_asked:
                raise ValueError(f"vllm-stts-molmo does not serve with {reason}.")
