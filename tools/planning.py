"""What training an STTS checkpoint takes on a machine: memory, hours and cost, from the count of its operations."""

import math
from typing import NamedTuple

from ..configuration_stts_molmo import STTSMolmoConfig
from ..pruning_stts_molmo import num_kept_tokens
from .answer import ratio_of
from .checkpoint import read_metadata, require_stts
from .operations import Shape, forward_operations, grid_sizes

# The authors' training, by their public scripts.
STEPS, ROWS, ROW_TOKENS, FRAMES = 6250, 64, 9686, 64
# Assumed, as nobody has published it: question and answer of a video, tokens of an answer in an evaluation.
TEXT, ANSWER = 512, 16
# The share of its peak at which a GPU trains. The paper's baseline runs at about a fifth of an H100, going by its times
# and by the count of operations.
RATE = 0.2
LORA_RANK = 16


class Machine(NamedTuple):
    """
    gigabytes: memory of each GPU.
    teraflops: dense bfloat16 products a second of each, as its maker states them.
    price: of a GPU for an hour in US dollars, assumed.
    frozen_bytes: of each weight of the language model where adapters are trained beside it, in bfloat16 or, with its
        scales, in four bits; `None` where all weights are trained.
    """

    name: str
    gpus: int
    gigabytes: int
    teraflops: float
    price: float
    frozen_bytes: float | None

    @property
    def lora(self) -> bool:
        return self.frozen_bytes is not None


MACHINES = {
    "8xh100": Machine("8 x H100, all weights", 8, 80, 989, 3.0, None),
    "h100": Machine("1 x H100, LoRA", 1, 80, 989, 3.0, 2.0),
    "24gb": Machine("1 x 24 GB (RTX 4090), LoRA in 4 bits", 1, 24, 165, 0.5, 0.56),
}


class Parameters(NamedTuple):
    """Of each part of a model."""

    language: int
    vision: int
    scorer: int


def read_parameters(checkpoint: str) -> Parameters:
    """From the headers of a checkpoint's weight files, in its own names or the original ones."""
    sizes = {"scorer": 0, "vision": 0, "language": 0}
    for file in read_metadata(checkpoint).files_metadata.values():
        for name, tensor in file.tensors.items():
            vision = any(part in name for part in ("vision_tower.", "multi_modal_projector.", "vision_backbone."))
            part = "scorer" if "token_scorer." in name else "vision" if vision else "language"
            sizes[part] += math.prod(tensor.shape)
    return Parameters(**sizes)


def lora_parameters(config: STTSMolmoConfig, rank: int = LORA_RANK) -> int:
    """Of adapters beside all projections of the language model."""
    text = config.text_config
    heads, kv = (n * text.head_dim for n in (text.num_attention_heads, text.num_key_value_heads))
    attention = 2 * (text.hidden_size + heads) + 2 * (text.hidden_size + kv)
    return text.num_hidden_layers * rank * (attention + 3 * (text.hidden_size + text.intermediate_size))


def video_shape(frames: int, text: int = TEXT) -> Shape:
    """One video: each frame with about ten tokens of delimiters and timestamp, 603 for 64 frames, 2523 for 256."""
    return Shape(1, frames, text, delimiters=max(10 * frames - 37, 1))


def weight_bytes(parameters: Parameters, machine: Machine, config: STTSMolmoConfig) -> float:
    """
    Weights, gradients and AdamW's moments on each GPU: 16 bytes for each trained weight, shared by the GPUs; frozen
    ones are on each of them whole.
    """
    if not machine.lora:
        return 16 * sum(parameters) / machine.gpus
    trained = parameters.scorer + lora_parameters(config)
    return 16 * trained / machine.gpus + machine.frozen_bytes * parameters.language + 2 * parameters.vision


def activation_bytes(config: STTSMolmoConfig, row_tokens: int, num_frames: int) -> float:
    """
    With gradient checkpointing, bfloat16: the input of each layer, and all that the largest layer keeps while it is
    run again, estimated as 8 times its width and 3 times its MLP's for each token.
    """
    vision, text = config.vision_config, config.text_config
    patches = num_frames * grid_sizes(config)[0]

    def layers(tokens: int, config) -> tuple[int, int]:
        kept = config.num_hidden_layers * tokens * config.hidden_size
        return kept, tokens * (8 * config.hidden_size + 3 * config.intermediate_size)

    (kept, working), (text_kept, text_working) = layers(patches, vision), layers(row_tokens, text)
    return 2 * (kept + text_kept + max(working, text_working))


def plan(
    config: STTSMolmoConfig, parameters: Parameters, machine: Machine, frames: int = FRAMES, prune_ratio: float = 0.5
) -> dict[str, str]:
    """
    What each stage takes, a heading and its text for each line; every line says whether it is known, counted from the
    model's sizes, assumed, or an estimate built on these.

    Args:
        config: of the model.
        parameters: see [`read_parameters`].
        machine: one of `MACHINES`.
        frames: of each video.
        prune_ratio: share of a video's tokens to drop.

    Raises:
        ValueError: a ratio out of range.
    """
    tokens_per_frame = grid_sizes(config)[1]
    shape = video_shape(frames)
    length = shape.tokens(tokens_per_frame, prune_ratio)
    row_tokens = max(ROW_TOKENS, length)
    videos = row_tokens // length
    # Forward, backward (twice a forward; once where no weight is trained), and a second forward for checkpointing.
    passes = 3 if machine.lora else 4
    counted = sum(forward_operations(config, shape, prune_ratio, "scorer", num_read=TEXT).values())
    training = STEPS * ROWS * videos * passes * counted
    question = video_shape(frames, text=64)
    asked = sum(forward_operations(config, question, prune_ratio, "scorer", num_new=ANSWER).values())
    rate = machine.gpus * machine.teraflops * 1e12 * RATE
    weights = weight_bytes(parameters, machine, config) / 1e9
    activations = activation_bytes(config, row_tokens, videos * frames) / 1e9
    need = weights + activations
    fits = "fits" if need < 0.9 * machine.gigabytes else "does not fit: take fewer frames or shorter rows"
    checkpoint = 2 * sum(parameters) / 1e9
    kept = num_kept_tokens(frames, tokens_per_frame, prune_ratio)
    return {
        "machine": f"{machine.name}: {machine.gigabytes} GB and {machine.teraflops:g} TFLOP/s each (known), "
        f"{RATE:.0%} of that reached (assumed), ${machine.price:.2f} a GPU-hour (assumed)",
        "a video": f"{frames} frames, {kept} of {frames * tokens_per_frame} tokens kept (counted), {length} with "
        f"delimiters and {TEXT} of text (assumed)",
        "convert": f"no GPU; {checkpoint:.1f} GB copied in bfloat16 (counted)",
        "train": f"{STEPS} steps of {ROWS} rows of {ROW_TOKENS} tokens (known, the authors'), {videos} videos a row",
        "train, operations": f"{training:.2e}, {passes} times a forward of {counted / 1e12:.1f} TFLOP (counted)",
        "train, memory": f"{need:.0f} GB on each GPU, {weights:.0f} of weights, gradients and moments (counted), "
        f"{activations:.0f} of activations for one row (estimated): {fits}",
        "train, time": describe_time(training / rate, machine),
        "evaluate": f"{asked / 1e12:.1f} TFLOP a question (counted); 1,000 questions: "
        f"{describe_time(1000 * asked / rate, machine)}",
        "publish": f"no GPU; {checkpoint:.1f} GB sent (counted)",
    }


def describe_time(seconds: float, machine: Machine) -> str:
    hours = seconds / 3600
    cost = hours * machine.gpus * machine.price
    return f"{hours:.3g} hours, {hours * machine.gpus:.3g} GPU-hours, ${cost:,.2f} (estimated)"


def plan_checkpoint(
    checkpoint: str, machine: str, frames: int = FRAMES, prune_ratio: float | None = None
) -> dict[str, str]:
    """
    [`plan`] for a checkpoint on disk or on the Hub, with its own prune ratio or budget where none is given.

    Raises:
        OSError: there is no such checkpoint.
        ValueError: it is no STTS checkpoint, or there is no such machine.
    """
    if machine not in MACHINES:
        raise ValueError(f"--plan {machine} is unknown; choose one of {', '.join(MACHINES)}.")
    config = require_stts(checkpoint)
    pruning = config.stts_config.pruning(prune_ratio)
    num_tokens = frames * grid_sizes(config)[1]
    num_kept = num_kept_tokens(frames, grid_sizes(config)[1], pruning.prune_ratio, pruning.max_vision_tokens)
    ratio = pruning.prune_ratio if pruning.max_vision_tokens is None else ratio_of(num_tokens, num_kept)
    return plan(config, read_parameters(checkpoint), MACHINES[machine], frames, ratio)
