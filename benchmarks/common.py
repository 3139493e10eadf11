"""What both benchmarks need."""

import datetime
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import av
import torch
import transformers
from stts_molmo.generation_stts_molmo import VIDEO_INPUTS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TINY = ROOT / "checkpoints" / "stts-molmo-tiny"


def provenance(device: str = "cpu") -> dict:
    """When, where and with what a result is made."""
    cpu = f"{platform.machine()}, {os.cpu_count()} CPU cores, torch threads: {torch.get_num_threads()}"
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "av": av.__version__,
        },
    }


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Torch computes with `number` threads here, and with as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def split_video(inputs: Mapping[str, torch.Tensor]) -> tuple[dict, dict]:
    """What a vision tower reads, and the rest."""
    return (
        {name: inputs[name] for name in VIDEO_INPUTS if name in inputs},
        {name: value for name, value in inputs.items() if name not in VIDEO_INPUTS},
    )


def init_by_fan_in(linear: torch.nn.Linear):
    """Weights ~ N(0, 1 / fan_in), biases 0: activations keep their scale, and bfloat16 tells tokens apart."""
    torch.nn.init.normal_(linear.weight, std=1 / math.sqrt(linear.in_features))
    if linear.bias is not None:
        torch.nn.init.zeros_(linear.bias)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"
