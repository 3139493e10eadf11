"""
Triton ops beside their torch references. Without a GPU they run in Triton's interpreter (conftest.py turns it on), and
are compiled for GPUs that are not there.
"""

import subprocess
import sys

import pytest
import torch
from helpers import make_inputs, make_model
from stts_molmo import modeling_stts_molmo
from stts_molmo.attention_stts_molmo import torch_attention_pool
from stts_molmo.generation_stts_molmo import VIDEO_INPUTS
from stts_molmo.modeling_stts_molmo import STTSMolmoPoolingAttention
from transformers.models.molmo2.modeling_molmo2 import Molmo2VisionAttention

from stts_kernels import attention_pool

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Blocks, slots, heads, head_dim: Molmo2's sizes, none a power of two, single ones.
SHAPES = [(3, 9, 16, 72), (5, 6, 3, 10), (2, 1, 1, 1)]


def pool_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    blocks, slots, heads, head_dim = shape
    shapes = (blocks, heads, head_dim), shape, shape
    return [torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True) for shape in shapes]


def output_and_gradients(pool, inputs: list[torch.Tensor], grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    output = pool(*inputs, 0.3)
    return output, *torch.autograd.grad(output, inputs, grad.to(output).expand_as(output))


def one_by_one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    pooled = torch.zeros_like(query)
    for block in range(query.shape[0]):
        for head in range(query.shape[1]):
            weights = (key[block, :, head] @ query[block, head] * scaling).softmax(0)
            pooled[block, head] = weights @ value[block, :, head]
    return pooled


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("pool", [torch_attention_pool, attention_pool])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_pool_is_that_of_a_loop(shape, pool, dtype, tolerance):
    inputs = pool_inputs(shape, dtype)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    grad = torch.randn_like(exact[0])
    expected = output_and_gradients(one_by_one, exact, grad)
    for ours, theirs in zip(output_and_gradients(pool, inputs, grad), expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.float(), theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("pool", [torch_attention_pool, attention_pool])
def test_attention_pool_takes_no_block_at_all(pool):
    inputs = pool_inputs((0, 9, 2, 8), torch.float32)
    output, *gradients = output_and_gradients(pool, inputs, torch.ones(()))
    assert output.shape == (0, 2, 8)
    assert [x.shape for x in gradients] == [x.shape for x in inputs]


def test_attention_pool_takes_views():
    query, key, value = pool_inputs((4, 9, 2, 8), torch.float32)
    views = [x.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_() for x in (query, key, value)]
    grad = torch.randn_like(query).mT.contiguous().mT
    expected = output_and_gradients(torch_attention_pool, [query, key, value], grad)
    for ours, theirs in zip(output_and_gradients(attention_pool, views, grad), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_large_logits_do_not_overflow():
    query, key, value = (100 * x.detach() for x in pool_inputs((4, 9, 2, 8), torch.float32))
    expected = torch_attention_pool(query, key, value, 1.0)
    torch.testing.assert_close(attention_pool(query, key, value, 1.0), expected)


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import stts_kernels

op = sys.modules["stts_kernels.attention_pool"]
sizes = {"slots": 9, "heads": 16, "head_dim": 72, "SLOTS": 16, "CHANNELS": 128}
for kernel in op.attention_pool_forward, op.attention_pool_backward:
    for dtype in "fp32", "fp16", "bf16":
        types = {"scaling": "fp32", **dict.fromkeys(sizes, "constexpr")}
        source = ASTSource(kernel, {name: types.get(name, "*" + dtype) for name in kernel.arg_names}, sizes)
        for capability in 80, 90:
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 1})
            print(len(compiled.asm["cubin"]) > 0, f".target sm_{capability}" in compiled.asm["ptx"])
"""


def test_kernels_compile_for_gpus_that_are_not_here(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    result = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True)
    assert result.stdout.split() == ["True"] * 2 * 12, result.stderr


# ----------------------------------------------------------------------------------------------------------------------
# In the model
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda_path(monkeypatch):
    """What is done with tensors on a CUDA device, here with those on the CPU."""
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)


def adapter_attention(**stts_config):
    return make_model(**stts_config).to(DEVICE).model.multi_modal_projector.image_pooling_2d


@pytest.mark.parametrize("use_kernels", [False, True])
def test_blocks_are_pooled_as_by_the_native_attention(use_kernels, cuda_path):
    attention = adapter_attention(use_kernels=use_kernels)
    blocks = torch.randn(5, 9, 32, device=DEVICE, requires_grad=True)
    expected, _ = attention(blocks.mean(1, keepdim=True), blocks)
    ours, _ = attention(blocks.mean(1, keepdim=True), blocks, full_blocks=True)
    torch.testing.assert_close(ours, expected)
    grads = [torch.autograd.grad(x.square().sum(), blocks)[0] for x in (ours, expected)]
    torch.testing.assert_close(*grads)


def test_no_block_meets_a_kernel_for_sequences(cuda_path, monkeypatch):
    attention = adapter_attention()
    monkeypatch.setattr(Molmo2VisionAttention, "forward", None)
    query, blocks = torch.randn(5, 1, 32, device=DEVICE), torch.randn(5, 9, 32, device=DEVICE)
    assert attention(query, blocks, full_blocks=True)[0].shape == (5, 1, 16)


def test_dropout_is_left_to_the_native_attention(cuda_path):
    attention = adapter_attention().train()
    query, blocks = torch.randn(5, 1, 32, device=DEVICE), torch.randn(5, 9, 32, device=DEVICE)
    without, _ = attention(query, blocks, full_blocks=True)
    attention.attention_dropout = 0.5
    assert not torch.allclose(attention(query, blocks, full_blocks=True)[0], without)


def test_blocks_are_pooled_in_the_forward_of_a_module():
    """Where FSDP and accelerate bring weights and inputs; and both know it as one that is not split."""
    model, calls = make_model().to(DEVICE), []
    for module in model.modules():
        if isinstance(module, STTSMolmoPoolingAttention):
            module.register_forward_pre_hook(lambda module, args: calls.append(module))
    model(**{name: value.to(DEVICE) for name, value in make_inputs([4]).items()})
    assert calls == [
        model.model.vision_tower.token_scorer.token_pooler,
        model.model.multi_modal_projector.image_pooling_2d,
    ]
    assert "STTSMolmoPoolingAttention" in model._no_split_modules


def test_use_kernels_chooses_the_triton_op(monkeypatch, cuda_path):
    """In the scorer and in the adapter, and it can be changed on a loaded model."""
    calls = []
    monkeypatch.setattr(
        modeling_stts_molmo, "attention_pool", lambda *args: calls.append(args) or attention_pool(*args)
    )
    model = make_model(use_kernels=True).to(DEVICE)
    inputs = {name: value.to(DEVICE) for name, value in make_inputs([4, 6]).items()}
    videos = {name: inputs[name] for name in VIDEO_INPUTS}
    with torch.no_grad():
        pooled = model.model.get_video_features(**videos)
        assert len(calls) == 2
        model.config.stts_config.use_kernels = False
        expected = model.model.get_video_features(**videos)
    assert len(calls) == 2
    pooled, expected = torch.cat(pooled.pooler_output), torch.cat(expected.pooler_output)
    torch.testing.assert_close(pooled, expected, atol=1e-4, rtol=1e-4)


def test_use_kernels_without_the_package_says_what_to_do(monkeypatch, cuda_path):
    monkeypatch.setattr(modeling_stts_molmo, "attention_pool", None)
    attention = adapter_attention(use_kernels=True)
    with pytest.raises(ImportError, match="use_kernels=True .* stts_kernels, .* install stts-molmo and triton"):
        attention(torch.randn(5, 1, 32, device=DEVICE), torch.randn(5, 9, 32, device=DEVICE), full_blocks=True)
