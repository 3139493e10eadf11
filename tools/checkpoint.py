"""What a checkpoint is, told from its configuration and the headers of its weight files."""

import math
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import get_local_safetensors_metadata, get_safetensors_metadata
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError, StrictDataclassError
from transformers import Molmo2Config

from ..configuration_stts_molmo import STTSConfig, STTSMolmoConfig
from ..pruning_stts_molmo import num_kept_tokens

# What a Hub repository carries: all Python files at the root but `__init__.py` and `setup.py`.
CODE_FILES = sorted(Path(__file__).parents[1].glob("*_stts_molmo.py"))
FRAME_COUNTS = (16, 32, 64, 128, 256)


def read_config(checkpoint: str) -> Molmo2Config | STTSMolmoConfig:
    """
    The configuration of a Molmo2 or STTS checkpoint, local or on the Hub; no weights are read.

    Raises:
        OSError: there is no such checkpoint.
        ValueError: it is one of another model, or its `config.json` is invalid.
    """
    if checkpoint.startswith((".", "/", "~")) and not Path(checkpoint).is_dir():
        raise FileNotFoundError(f"There is no directory {checkpoint}; check the path.")
    try:
        values, _ = STTSMolmoConfig.get_config_dict(checkpoint)
    except OSError as error:
        raise FileNotFoundError(
            f"{checkpoint} is no directory here that holds a checkpoint, and cannot be read from the Hub: {error}"
        ) from error
    if not isinstance(values, dict):
        raise ValueError(f"The config.json of {checkpoint} is no JSON object; fetch it again.")
    model_type = values.get("model_type")
    config_class = {"stts_molmo": STTSMolmoConfig, "molmo2": Molmo2Config}.get(model_type)
    if config_class is None:
        raise ValueError(f"{checkpoint} has model_type={model_type!r}; expected 'stts_molmo' or 'molmo2'.")
    try:
        return config_class.from_dict(values)
    except StrictDataclassError as error:
        raise ValueError(f"The config.json of {checkpoint} is invalid: {error}") from error


def require_stts(checkpoint: str) -> STTSMolmoConfig:
    """The configuration of an STTS checkpoint; a `ValueError` that says how to make one of a plain Molmo2."""
    config = read_config(checkpoint)
    if config.model_type == "molmo2":
        raise ValueError(
            f"{checkpoint} is a plain Molmo2 checkpoint without a token scorer; make an STTS checkpoint of it with "
            f"`stts-molmo convert {checkpoint} DST`, then pass `--model DST`."
        )
    return config


def read_tensor_shapes(checkpoint: str) -> dict[str, list[int]]:
    """
    Names and shapes of all tensors of a checkpoint, local or on the Hub, from the headers of its weight files.

    Raises:
        ValueError: there are no readable safetensors files.
    """
    read = get_local_safetensors_metadata if Path(checkpoint).is_dir() else get_safetensors_metadata
    try:
        metadata = read(checkpoint)
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise ValueError(f"{checkpoint} has no weights in readable safetensors files: {error}") from error
    return {name: info.shape for file in metadata.files_metadata.values() for name, info in file.tensors.items()}


def describe_checkpoint(checkpoint: str) -> dict[str, str]:
    """
    What `inspect` prints: a heading and its text for each line.

    Raises:
        OSError: there is no such checkpoint.
        ValueError: it is neither an STTS nor a Molmo2 checkpoint, or its weights are damaged.
    """
    config = read_config(checkpoint)
    is_stts = config.model_type == "stts_molmo"
    vision, stts = config.vision_config, config.stts_config if is_stts else STTSConfig(method="none")
    sizes = {name: math.prod(shape) for name, shape in read_tensor_shapes(checkpoint).items()}
    scorer = sum(size for name, size in sizes.items() if "token_scorer." in name)
    dtype = f" ({str(config.dtype).removeprefix('torch.')})" if config.dtype else ""
    lines = {
        "checkpoint": checkpoint,
        "kind": "STTS on Molmo2" if is_stts else f"plain Molmo2; for STTS: stts-molmo convert {checkpoint} DST",
        "parameters": f"{sum(sizes.values()):,}{dtype}",
        "scorer": f"{scorer:,} parameters" if scorer else "none",
    }
    if is_stts:
        lines["method"] = f"{stts.method}, after ViT layer {stts.prune_layer} of {vision.num_hidden_layers}"
        lines["prune ratio"] = f"{stts.prune_ratio:g}"
    tokens_per_frame = math.prod(math.ceil(side // vision.patch_size / stts.pooling_size) for side in vision.image_size)
    ratio = 0 if stts.method == "none" else stts.prune_ratio
    lines["frames"] = format_row(FRAME_COUNTS)
    lines["vision tokens"] = format_row(frames * tokens_per_frame for frames in FRAME_COUNTS)
    lines["after pruning"] = format_row(num_kept_tokens(frames, tokens_per_frame, ratio) for frames in FRAME_COUNTS)
    return lines


def format_row(numbers: Iterable[int]) -> str:
    return "".join(f"{number:>8}" for number in numbers)
