"""What needs a CUDA device: varlen kernels in half precision, and a vision tower that never waits for the device."""

import pytest
import torch
from helpers import (
    MASK_CASES,
    layout_of,
    make_inputs,
    make_model,
    make_native,
    outputs_and_gradients,
    torch_dense_mask,
    video_tensors,
)
from stts_molmo import modeling_stts_molmo
from stts_molmo.attention_stts_molmo import vision_causal_mask
from stts_molmo.configuration_stts_molmo import STTSMolmoConfig
from stts_molmo.modeling_stts_molmo import STTSMolmoPoolingAttention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_gpu(inputs, dtype=torch.float32):
    return {
        name: value.cuda().to(dtype) if value.is_floating_point() else value.cuda() for name, value in inputs.items()
    }


@torch.no_grad()
def test_nothing_pruned_equals_native_to_the_bit():
    inputs = on_gpu(make_inputs([4, 6]))
    assert torch.equal(make_model().cuda()(**inputs, prune_ratio=0).logits, make_native().cuda()(**inputs).logits)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.25)])
def test_logits_equal_those_of_the_cpu(dtype, tolerance):
    # Random scores: those of the scorer differ in the last bit between devices, and so might the survivors.
    inputs = make_inputs([4, 6])
    expected = make_model(method="random")(**inputs)
    outputs = make_model(method="random").cuda().to(dtype)(**on_gpu(inputs, dtype))
    assert torch.equal(outputs.keep_mask.cpu(), expected.keep_mask)
    torch.testing.assert_close(outputs.logits.float().cpu(), expected.logits, atol=tolerance, rtol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("method", ["scorer", "tome"])
def test_the_vision_tower_never_waits_for_the_device(method):
    tower = make_model().cuda().bfloat16().model.vision_tower
    layout = layout_of([4, 6])
    layout = layout._replace(blocks=layout.blocks.cuda())
    pixels = video_tensors([4, 6])["pixel_values_videos"].cuda().bfloat16()
    tower(pixels, layout=layout, num_kept=layout.num_kept(0.5), method=method)
    torch.cuda.set_sync_debug_mode("error")
    try:
        tower(pixels, layout=layout, num_kept=layout.num_kept(0.5), method=method)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_training_in_bfloat16_moves_the_scorer():
    model = make_model().cuda().bfloat16().train()
    inputs = on_gpu(make_inputs([4, 6]), torch.bfloat16)
    inputs["labels"] = torch.where(inputs["input_ids"] < 60, inputs["input_ids"], -100)
    model(**inputs).loss.backward()
    gradient = model.model.vision_tower.token_scorer.fc3.weight.grad
    assert gradient.isfinite().all() and gradient.abs().max() > 0


@pytest.mark.parametrize("use_kernels", [False, True])
def test_blocks_of_a_long_video_are_pooled_within_memory(use_kernels):
    """256 frames at Molmo2's sizes, for which the backward of a flash kernel would want 16 GB of scratch memory."""
    config = STTSMolmoConfig(stts_config={"use_kernels": use_kernels})
    config.vision_config._attn_implementation = "sdpa"
    attention = STTSMolmoPoolingAttention(config.vision_config, config.stts_config).cuda().bfloat16()
    blocks = torch.randn(256 * 81, 9, 1152, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    pooled, _ = attention(blocks.mean(1, keepdim=True), blocks, full_blocks=True)
    pooled.sum().backward()
    assert torch.cuda.max_memory_allocated() < 16 * blocks.nbytes  # 7 GB
    some = blocks.detach()[::1000]
    expected, _ = attention(some.mean(1, keepdim=True), some)
    torch.testing.assert_close(pooled[::1000], expected, atol=2e-2, rtol=2e-2)
    assert blocks.grad.isfinite().all()


@pytest.mark.parametrize("case", MASK_CASES)
def test_attention_without_a_mask_is_that_of_the_dense_mask(case):
    expected = outputs_and_gradients(case, torch_dense_mask)
    outputs = outputs_and_gradients(case, vision_causal_mask, torch.bfloat16, "cuda")
    for ours, dense in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, dense, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.bfloat16, False), (torch.float32, True)], ids=str)
def test_half_precision_takes_the_path_without_a_mask(dtype, autocast, monkeypatch):
    calls = []
    monkeypatch.setattr(modeling_stts_molmo, "MIN_UNMASKED_LENGTH", 0)
    monkeypatch.setattr(
        modeling_stts_molmo, "vision_causal_mask", lambda *args: calls.append(args) or vision_causal_mask(*args)
    )
    model, inputs = make_model(method="random").cuda().to(dtype), on_gpu(make_inputs([4, 6]), dtype)
    expected = make_model(method="random")(**make_inputs([4, 6]))
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        outputs = model(**inputs)
    assert len(calls) == 1
    torch.testing.assert_close(outputs.logits.float().cpu(), expected.logits, atol=0.25, rtol=0.25)


def test_float32_takes_the_dense_mask(monkeypatch):
    monkeypatch.setattr(modeling_stts_molmo, "MIN_UNMASKED_LENGTH", 0)
    monkeypatch.setattr(modeling_stts_molmo, "vision_causal_mask", None)
    make_model().cuda()(**on_gpu(make_inputs([4, 6])))
