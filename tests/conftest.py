"""What holds for every test: no network, kernels that run without a GPU, and nothing left behind."""

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
pytest.register_assert_rewrite("helpers")


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)
