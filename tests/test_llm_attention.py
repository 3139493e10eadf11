"""Attention of the LLM without a mask, against the dense mask of Transformers: values, gradients and memory."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    BATCH,
    BEAMS,
    GREEDY,
    MASK_CASES,
    make_inputs,
    make_model,
    new_tokens,
    outputs_and_gradients,
    torch_dense_mask,
    video_tensors,
    with_labels,
)
from stts_molmo import modeling_stts_molmo
from stts_molmo.attention_stts_molmo import Sample, VisionCausalMask, vision_causal_mask
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)], ids=str)
@pytest.mark.parametrize("case", MASK_CASES)
def test_values_and_gradients_are_those_of_the_dense_mask(case, dtype, tolerance):
    expected = outputs_and_gradients(case, torch_dense_mask)
    for ours, dense in zip(outputs_and_gradients(case, vision_causal_mask, dtype), expected, strict=True):
        torch.testing.assert_close(ours, dense, atol=tolerance, rtol=tolerance)


def test_gradients_are_those_of_finite_differences():
    mask = VisionCausalMask([Sample(0, 0, 7, torch.tensor([5, 4, 2, 1]))], num_rows=1)
    states = [torch.randn(1, 2, 7, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *x: F.scaled_dot_product_attention(*x, attn_mask=mask), states)


def test_padding_and_rows_of_nothing_else_are_zeros():
    states = torch.randn(2, 2, 6, 8)
    mask = vision_causal_mask(torch.zeros(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [0] * 6]))
    output = F.scaled_dot_product_attention(states, states, states, attn_mask=mask)
    assert (output[0, :, :2] == 0).all() and (output[1, :, 1:] == 0).all() and output.isfinite().all()


def test_grouped_heads_and_autocast():
    query, key = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8)
    mask = vision_causal_mask(torch.tensor([[0, 1, 1, 1, 0, 1, 1, 0, 0]]), None)
    expected = F.scaled_dot_product_attention(query, *[key.repeat_interleave(2, 1)] * 2, attn_mask=mask)
    grouped = F.scaled_dot_product_attention(query, key, key, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(grouped, expected)
    with torch.autocast("cpu", torch.bfloat16):
        half = F.scaled_dot_product_attention(query, key, key.bfloat16(), attn_mask=mask, enable_gqa=True)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=3e-2, rtol=3e-2)


def test_the_mask_keeps_its_rows_on_another_device():
    mask = vision_causal_mask(torch.ones(2, 4), None).to("meta")
    assert isinstance(mask, VisionCausalMask) and mask.device.type == "meta" and len(mask.samples) == 2


# ----------------------------------------------------------------------------------------------------------------------
# In the model
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def unmasked(monkeypatch) -> list:
    """Short prompts take the new path too; the calls of it."""
    calls = []

    def counted(*args):
        calls.append(args)
        return vision_causal_mask(*args)

    monkeypatch.setattr(modeling_stts_molmo, "MIN_UNMASKED_LENGTH", 0)
    monkeypatch.setattr(modeling_stts_molmo, "vision_causal_mask", counted)
    return calls


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_are_those_of_eager(side, unmasked):
    inputs = make_inputs(BATCH, side=side)
    expected = make_model(attn="eager", method="random")(**inputs)
    assert not unmasked
    outputs = make_model(method="random")(**inputs)
    assert len(unmasked) == 1
    torch.testing.assert_close(outputs.logits, expected.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_training_gives_the_gradients_of_eager(use_reentrant, unmasked):
    inputs = with_labels(make_inputs([4, None, 3], side="right"))
    gradients = []
    for attn in ("eager", "sdpa"):
        model = make_model(attn=attn, seed=3).train()
        if use_reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(**inputs).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(unmasked) == 1 and gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("options", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_generation_is_that_of_eager(options, unmasked):
    inputs = make_inputs(BATCH)
    expected = make_model(attn="eager").generate(**inputs, **options)
    assert torch.equal(make_model().generate(**inputs, **options), expected)
    assert len(unmasked) == 1  # the prefill


def test_a_later_turn_is_that_of_eager(unmasked):
    inputs, turns = make_inputs([4, 6]), []
    for attn in ("eager", "sdpa"):
        model = make_model(attn=attn)
        first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, torch.full((2, 1), 11)], dim=1)
        mask = F.pad(inputs["attention_mask"], (0, ids.shape[1] - inputs["input_ids"].shape[1]), value=1)
        turns.append(model.generate(ids, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY))
    assert torch.equal(*turns)
    assert len(unmasked) == 1


NATIVE_PATHS = {
    "eager": (lambda: make_model(attn="eager"), {}),
    "nothing pruned": (make_model, {"prune_ratio": 0}),
    "no token types": (make_model, {"mm_token_type_ids": None}),
}


@torch.no_grad()
@pytest.mark.parametrize("path", NATIVE_PATHS)
def test_what_takes_the_dense_mask(path, unmasked):
    build, options = NATIVE_PATHS[path]
    build()(**make_inputs([4]) | options)
    assert not unmasked


@torch.no_grad()
def test_generation_with_nothing_pruned_takes_the_dense_mask(unmasked):
    new_tokens(make_model(), make_inputs([4]), **GREEDY, prune_ratio=0)
    assert not unmasked


def test_dropout_takes_the_dense_mask(unmasked):
    model = make_model().train()
    model.config.text_config.attention_dropout = 0.1
    model(**make_inputs([4]))
    assert not unmasked


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operator returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_a_long_prompt_needs_no_square_tensor():
    """Above the length from which a dense mask costs more, forward and backward allocate nothing of that size."""
    num_frames, length = 4, modeling_stts_molmo.MIN_UNMASKED_LENGTH + 100
    video = make_inputs([num_frames])
    text = torch.full((1, length), 10)
    inputs = video_tensors([num_frames]) | {
        "input_ids": torch.cat([video["input_ids"], text], dim=1),
        "mm_token_type_ids": torch.cat([video["mm_token_type_ids"], torch.zeros_like(text)], dim=1),
    }
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] >= 64, -100)
    sizes = {}
    for ratio in (0.5, 0):
        with LargestTensor() as largest:
            make_model().train()(**inputs, prune_ratio=ratio).loss.backward()
        sizes[ratio] = largest.numel
    assert sizes[0] >= length**2 > 4 * sizes[0.5]
