"""What holds for every test: no network, kernels that run without a GPU, and nothing left behind."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the Hub's client is imported

import pytest
import torch
from transformers import logging

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
pytest.register_assert_rewrite("helpers")

# What reads each and what sets it. The last is what `convert` sets for its own process.
GLOBAL_SETTINGS = {
    "threads": (torch.get_num_threads, torch.set_num_threads),
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "gradients": (torch.is_grad_enabled, torch.set_grad_enabled),
    "deterministic algorithms": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    "float32 precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "verbosity of Transformers": (logging.get_verbosity, logging.set_verbosity),
}
MAY_CHANGE = {"verbosity of Transformers"}
AS_FOUND = {name: read() for name, (read, _) in GLOBAL_SETTINGS.items()}


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """Every test begins with the same seed and the same global settings; one that leaves another behind fails."""
    torch.manual_seed(0)
    logging.warning_once.cache_clear()  # what is told once is told once in each test
    yield
    changed = {name: value for name, (read, _) in GLOBAL_SETTINGS.items() if (value := read()) != AS_FOUND[name]}
    for name in changed:
        GLOBAL_SETTINGS[name][1](AS_FOUND[name])
    assert changed.keys() <= MAY_CHANGE, changed
