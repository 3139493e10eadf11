"""Sizes of a run."""

from dataclasses import dataclass

from ..speed.presets import PRESETS as SPEED_PRESETS
from ..speed.presets import narrow_config

RATIOS = (0.0, 0.3, 0.5)


@dataclass(frozen=True)
class Preset:
    """
    config: of the model, whose weights are random.
    dtype: of its weights.
    num_frames: of the requests, which are of these lengths in turn.
    new_tokens: that each is answered with.
    concurrency: clients at a time; each sends its next request when it has the answer to the last.
    requests: for each client in a round.
    rounds: in which the ratios take turns.
    arguments: of the server.
    """

    config: dict
    dtype: str
    num_frames: tuple[int, ...]
    new_tokens: int
    concurrency: tuple[int, ...]
    requests: int
    rounds: int
    arguments: tuple[str, ...]


# vLLM has no attention with heads of 16 channels on a CPU.
WIDE_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}

PRESETS = {
    # Molmo2-4B, as in benchmarks.speed.
    "gpu": Preset(
        config=SPEED_PRESETS["gpu"].config,
        dtype="bfloat16",
        num_frames=(16, 64, 32),
        new_tokens=64,
        concurrency=(1, 2, 4, 8, 16, 32),
        requests=3,
        rounds=1,
        arguments=("--max-model-len=8192", "--max-num-batched-tokens=16384", "--max-num-seqs=32"),
    ),
    "cpu": Preset(
        config=narrow_config(
            27,
            {"num_hidden_layers": 13, "intermediate_size": 240},
            {"num_hidden_layers": 4, **WIDE_HEADS},
            prune_layer=1,
        ),
        dtype="float32",
        num_frames=(4, 16, 8),
        new_tokens=8,
        concurrency=(1, 2, 4, 8, 16, 32),
        requests=3,
        rounds=2,
        arguments=(
            "--max-model-len=2048",
            "--max-num-batched-tokens=8192",
            "--max-num-seqs=32",
            "--block-size=32",
            "--enforce-eager",
        ),
    ),
    "dry-run": Preset(
        config=narrow_config(
            6, {"num_hidden_layers": 7, "intermediate_size": 96}, {"num_hidden_layers": 2, **WIDE_HEADS}, prune_layer=1
        ),
        dtype="float32",
        num_frames=(4, 6),
        new_tokens=3,
        concurrency=(1, 2),
        requests=2,
        rounds=1,
        arguments=("--max-model-len=512", "--max-num-batched-tokens=512", "--block-size=32", "--enforce-eager"),
    ),
}
