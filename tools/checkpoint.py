"""A checkpoint: what it is, told from its configuration and the headers of its weight files; and loaded, whole."""

import math
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import get_local_safetensors_metadata, get_safetensors_metadata
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from huggingface_hub.utils import SafetensorsRepoMetadata
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, Molmo2Config

from ..configuration_stts_molmo import STTSConfig, STTSMolmoConfig
from ..generation_stts_molmo import PRUNING_OPTIONS, first_pruning
from ..modeling_stts_molmo import STTSMolmoForConditionalGeneration
from ..processing_stts_molmo import STTSMolmoProcessor
from ..pruning_stts_molmo import num_kept_tokens
from .files import fetch, locate_tensors, weight_files

# What a Hub repository carries: all Python files at the root but `__init__.py` and `setup.py`.
CODE_FILES = sorted(Path(__file__).parents[1].glob("*_stts_molmo.py"))
FRAME_COUNTS = (16, 32, 64, 128, 256)

# The most that a config may call for, by its names and those of the original checkpoints: more than any model has.
SIZE_LIMITS = {
    "num_hidden_layers": 256,
    **dict.fromkeys(
        ("head_dim", "image_patch_size", "num_attention_heads", "num_key_value_heads", "patch_size", "pooling_size"),
        2**12,
    ),
    **dict.fromkeys(
        (
            "additional_vocab_size",
            "hidden_size",
            "image_default_input_size",
            "image_num_pos",
            "image_size",
            "intermediate_size",
            "max_position_embeddings",
            "num_position_embeddings",
            "scorer_hidden_size",
            "text_hidden_size",
            "vocab_size",
        ),
        2**24,
    ),
}

# What to do about a scorer that was never trained.
TRAIN_OR_COSINE = "Train it with examples/finetune.py, or use --method cosine, which needs no training."


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
    except RecursionError as error:
        raise ValueError(f"The config.json of {checkpoint} is nested too deeply; fetch it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"The config.json of {checkpoint} is no JSON object; fetch it again.")
    model_type = values.get("model_type")
    if model_type not in ("stts_molmo", "molmo2"):
        raise ValueError(f"{checkpoint} has model_type={model_type!r}; expected 'stts_molmo' or 'molmo2'.")
    return make_config(STTSMolmoConfig if model_type == "stts_molmo" else Molmo2Config, values, checkpoint)


def make_config(
    config_class: type[Molmo2Config], values: dict, checkpoint: str | Path
) -> Molmo2Config | STTSMolmoConfig:
    """
    The configuration of the `values` in a `config.json`, which may say anything.

    Raises:
        ValueError: a value has the wrong type, or is a size that no model has.
    """
    try:
        check_sizes(values)
        return config_class.from_dict(values)
    except Exception as error:  # whatever Transformers stumbles over
        raise ValueError(f"The config.json of {checkpoint} is invalid: {error or type(error).__name__}") from error


def check_sizes(values: dict, prefix: str = "") -> None:
    """Raise a `ValueError` for a size that would keep a machine busy before a weight is looked at."""
    for name, value in values.items():
        if isinstance(value, dict):
            check_sizes(value, f"{prefix}{name}.")
        limit = SIZE_LIMITS.get(name)
        for size in value if isinstance(value, (list, tuple)) else [value]:
            if limit is not None and isinstance(size, (int, float)) and not 1 <= size <= limit:
                raise ValueError(f"{prefix}{name}={value} must be from 1 to {limit}.")


def require_stts(checkpoint: str) -> STTSMolmoConfig:
    """The configuration of an STTS checkpoint; a `ValueError` that says how to make one of a plain Molmo2."""
    config = read_config(checkpoint)
    if config.model_type == "molmo2":
        raise ValueError(
            f"{checkpoint} is a plain Molmo2 checkpoint without a token scorer; make an STTS checkpoint of it with "
            f"`stts-molmo convert {checkpoint} DST`, then pass `--model DST`."
        )
    return config


def read_metadata(checkpoint: str) -> SafetensorsRepoMetadata:
    """
    The headers of the weight files of a checkpoint, local or on the Hub.

    Raises:
        ValueError: there are no readable safetensors files.
    """
    is_local = Path(checkpoint).is_dir()
    if is_local:
        weight_files(Path(checkpoint))  # none that lies elsewhere
    try:
        return (get_local_safetensors_metadata if is_local else get_safetensors_metadata)(checkpoint)
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise ValueError(f"{checkpoint} has no weights in readable safetensors files: {error}") from error


def has_untrained_scorer(folder: str | Path) -> bool:
    """
    Whether the token scorer of a local checkpoint is as it was made: all its biases, and only they are read, are zero.

    Raises:
        ValueError: there are no readable safetensors files, or one that is damaged.
    """
    files = read_metadata(str(folder)).weight_map
    biases = [name for name in files if "token_scorer." in name and name.endswith(".bias")]
    try:
        for name in biases:
            with safe_open(Path(folder) / files[name], framework="pt") as file:
                if file.get_tensor(name).any():
                    return False
    except SafetensorError as error:
        raise damaged(folder, error) from error
    return bool(biases)


def damaged(checkpoint: str | Path, error: SafetensorError) -> ValueError:
    return ValueError(f"{checkpoint} has damaged weights ({error}); fetch or convert it again.")


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
    files = read_metadata(checkpoint).files_metadata.values()
    sizes = {name: math.prod(tensor.shape) for file in files for name, tensor in file.tensors.items()}
    dtype = f" ({str(config.dtype).removeprefix('torch.')})" if config.dtype else ""
    lines = {
        "checkpoint": checkpoint,
        "kind": "STTS on Molmo2" if is_stts else f"plain Molmo2; for STTS: stts-molmo convert {checkpoint} DST",
        "parameters": f"{sum(sizes.values()):,}{dtype}",
        "scorer": describe_scorer(checkpoint, sum(size for name, size in sizes.items() if "token_scorer." in name)),
    }
    pruning = stts.pruning()
    if is_stts:
        lines["method"] = f"{stts.method}, after ViT layer {stts.prune_layer} of {vision.num_hidden_layers}"
        budget = pruning.max_vision_tokens
        lines["prune ratio"] = f"{pruning.prune_ratio:g}" if budget is None else f"to {budget} tokens a video"
    tokens_per_frame = math.prod(math.ceil(side // vision.patch_size / stts.pooling_size) for side in vision.image_size)
    lines["frames"] = format_row(FRAME_COUNTS)
    lines["vision tokens"] = format_row(frames * tokens_per_frame for frames in FRAME_COUNTS)
    lines["after pruning"] = format_row(
        num_kept_tokens(frames, tokens_per_frame, *pruning[1:]) for frames in FRAME_COUNTS
    )
    return lines


def describe_scorer(checkpoint: str, size: int) -> str:
    if not size:
        return "none"
    if not Path(checkpoint).is_dir():
        return f"{size:,} parameters; trained or not, that is seen in local files alone"
    if has_untrained_scorer(checkpoint):
        return f"{size:,} parameters, not trained. {TRAIN_OR_COSINE}"
    return f"{size:,} parameters, trained"


def format_row(numbers: Iterable[int]) -> str:
    return "".join(f"{number:>8}" for number in numbers)


class Checkpoint:
    """
    An STTS checkpoint whose processor and model are loaded when they are first used, and once.

    Args:
        path: directory or Hub id.
        device: as torch names it; `"auto"` is a GPU if there is one.
        dtype: of the model's weights; `"auto"` is the checkpoint's own.

    Raises:
        OSError: there is no such checkpoint.
        ValueError: it is not an STTS checkpoint, or there is no such device; when the model is loaded, also that its
            weights are incomplete or damaged.
    """

    def __init__(self, path: str, device: str = "auto", dtype: str = "auto"):
        self.path, self.dtype = path, dtype
        self.config = require_stts(path)
        self.device = find_device(device)

    @cached_property
    def processor(self) -> STTSMolmoProcessor:
        processor = STTSMolmoProcessor.from_pretrained(self.path)
        check_processor(processor, self.config)
        return processor

    @cached_property
    def generation_config(self) -> GenerationConfig:
        try:
            return GenerationConfig.from_pretrained(self.path)
        except OSError:  # it has none
            return GenerationConfig()

    @cached_property
    def model(self) -> STTSMolmoForConditionalGeneration:
        return load_model(self.path, self.device, self.dtype)

    def find_pruning(
        self, prune_ratio: float | None = None, method: str | None = None, max_vision_tokens: int | None = None
    ) -> dict:
        """The pruning options: those given, else those of the generation config, as in `generate`; else `None`."""
        saved = [getattr(self.generation_config, name, None) for name in PRUNING_OPTIONS]
        return first_pruning([(prune_ratio, method, max_vision_tokens), saved])


def check_processor(processor: STTSMolmoProcessor, config: STTSMolmoConfig) -> None:
    """Raise a `ValueError` before frames are made of a size that the model does not take, and no memory may hold."""
    vision, video = config.vision_config, processor.video_processor
    made = [video.size.get("height"), video.size.get("width")], video.patch_size
    taken = list(vision.image_size), vision.patch_size
    if made != taken:
        raise ValueError(
            f"The processor makes frames of height and width {made[0]} with patches of {made[1]}, and the model takes "
            f"{taken[0]} with patches of {taken[1]}; give the checkpoint the processor that belongs to it."
        )


def find_device(name: str) -> torch.device:
    """The device called `name`; `auto` is a GPU if there is one. Raises a `ValueError` where it does not exist."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch raises one or the other, by build
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(f"--device {name} cannot be used here ({reason}); use `cpu`, or leave it out.") from error


def load_model(checkpoint: str, device: torch.device, dtype: str) -> STTSMolmoForConditionalGeneration:
    """
    Load a checkpoint for inference.

    Raises:
        OSError: there is no such checkpoint.
        ValueError: weights are missing, damaged or of other shapes than the config says; Transformers would warn and go
            on with random ones, of whatever size. Or they are integers that nothing explains.
    """
    folder = fetch(checkpoint)
    check_weights(folder, read_config(str(folder)))
    try:
        model, report = STTSMolmoForConditionalGeneration.from_pretrained(
            folder,
            dtype=dtype,
            device_map=device,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            use_safetensors=True,
        )
    except SafetensorError as error:
        raise damaged(checkpoint, error) from error
    bad = report["missing_keys"] | {name for name, *_ in report["mismatched_keys"]}
    if bad:
        what = "has no token scorer" if all("token_scorer" in name for name in bad) else "is incomplete"
        raise ValueError(
            f"{checkpoint} {what}: {len(bad)} tensors are missing or of another shape, {min(bad)} among them. "
            "Make it anew with `stts-molmo convert`."
        )
    return model.eval()


def check_weights(folder: Path, config: Molmo2Config) -> None:
    """Raise a `ValueError` before memory is filled with weights that a config calls for and `folder` does not hold."""
    held = sum(tensor.size for tensor in locate_tensors(folder).values())
    if getattr(config, "quantization_config", None) is not None:
        return  # several weights to a number
    with torch.device("meta"):
        wanted = sum(parameter.numel() for parameter in STTSMolmoForConditionalGeneration(config).parameters())
    if wanted > 2 * held:
        raise ValueError(
            f"{folder} is incomplete: its config.json calls for {wanted:,} weights, and its files hold {held:,}. "
            "Fetch it again."
        )
