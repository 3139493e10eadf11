"""Packed attention in its two forms against a slow masked reference, values and gradients."""

import pytest
import torch
from helpers import layout_of, make_model
from hypothesis import given
from hypothesis import strategies as st
from stts_molmo import attention_stts_molmo
from stts_molmo.attention_stts_molmo import (
    Bins,
    first_fit_descending,
    fold_key_bias,
    pack_into_bins,
    plan_packing,
    refill_lone_frames,
    varlen_attention,
)


def brute_force_bins(counts: list[int], capacity: int) -> Bins:
    """Algorithm 1 with its arrays spelled out."""
    order = sorted(range(len(counts)), key=lambda i: (-counts[i], i))
    bins: list[list[int]] = [[] for _ in counts]
    assignment, offsets = [None] * len(counts), [None] * len(counts)
    for frame in order:
        for index, frames in enumerate(bins):
            load = sum(counts[f] for f in frames)
            if load + counts[frame] <= capacity:
                assignment[frame], offsets[frame] = index, load
                frames.append(frame)
                break
    return Bins(assignment, offsets, len({assignment[f] for f in order if counts[f]}))


@given(st.lists(st.integers(0, 12), min_size=1, max_size=30))
def test_first_fit_descending_equals_brute_force(counts):
    assert first_fit_descending(counts, 12) == brute_force_bins(counts, 12)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=30))
def test_bins_hold_every_frame_once_without_overlap(counts):
    assignment, offsets, num_bins = first_fit_descending(counts, 12)
    slots = [
        (b, offset + i) for b, offset, count in zip(assignment, offsets, counts, strict=True) for i in range(count)
    ]
    assert len(set(slots)) == sum(counts)
    assert all(0 <= b < num_bins and 0 <= slot < 12 for b, slot in slots)


def test_in_a_bin_a_frame_sees_itself_alone():
    counts = [4, 3, 0, 3, 1]  # frame 1 shares its bin with two empty slots
    packed = torch.arange(1.0, 12)[:, None]
    dense, mask, slots = pack_into_bins(packed, counts, capacity=5)
    frame = torch.full((dense.shape[0] * 5,), -1)
    frame[slots] = torch.arange(5).repeat_interleave(torch.tensor(counts))
    values = torch.zeros(dense.shape[0] * 5)
    values[slots] = packed[:, 0]
    assert torch.equal(dense.flatten(), values) and (values == 0).any()
    for query in slots.tolist():
        keys = (mask[query // 5, 0, query % 5] == 0).nonzero()[:, 0] + query // 5 * 5
        assert keys.tolist() == (frame == frame[query]).nonzero()[:, 0].tolist()


def test_a_frame_larger_than_a_bin_is_refused():
    with pytest.raises(ValueError, match="13 tokens does not fit a bin of 12"):
        first_fit_descending([3, 13], 12)


def masked_reference(tower, hidden_states, keep_mask, layout):
    """Late layers on full frames, where no token attends to a dropped patch; survivors block by block."""
    patch_keep = torch.zeros(hidden_states.shape[:2], dtype=torch.bool)
    for frame, block in keep_mask.nonzero().tolist():
        patch_keep[frame, layout.blocks[block][layout.blocks[block] >= 0]] = True
    mask = torch.zeros(patch_keep.shape).masked_fill(~patch_keep, torch.finfo(torch.float32).min)[:, None, None]
    outputs = {}
    for index in range(tower.stts_config.prune_layer + 2, max(tower.feature_layers) + 1):
        layer = tower.layers[index]
        attn = layer.self_attn
        normed = layer.layer_norm1(hidden_states)
        q, k, v = (p(normed).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for p in attn_projections(attn))
        weights = (q @ k.transpose(2, 3) * attn.scaling + mask).softmax(-1)
        hidden_states = hidden_states + attn.o_proj((weights @ v).transpose(1, 2).flatten(2))
        hidden_states = hidden_states + layer.mlp(layer.layer_norm2(hidden_states))
        outputs[index] = hidden_states
    features = torch.cat([outputs[index] for index in tower.feature_layers], dim=-1)
    rows = [
        features[frame, patch] if patch >= 0 else torch.zeros(features.shape[-1])
        for frame, block in keep_mask.nonzero().tolist()
        for patch in layout.blocks[block].tolist()
    ]
    return torch.stack(rows).unflatten(0, (-1, layout.blocks.shape[1]))


def attn_projections(attn):
    return attn.q_proj, attn.k_proj, attn.v_proj


KEEP_CASES = {
    "ragged": [[1, 1, 1, 1], [1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]],
    "frames with none": [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
    "all kept": [[1, 1, 1, 1]] * 3,
    "one frame": [[1, 1, 1, 1]],
}


def gather_features(tower, hidden_states, keep_mask, layout):
    packing = plan_packing(keep_mask, int(keep_mask.sum()), layout, tower.stts_config.refill_lone_frames)
    packed = hidden_states.flatten(0, 1)[packing.patches]
    features = torch.cat(tower.run_late_layers(packed, packing), dim=-1)
    if packing.slots is None:
        return features.unflatten(0, (-1, layout.blocks.shape[1]))
    return features[packing.slots.clamp_min(0)] * (packing.slots >= 0)[..., None]


@pytest.mark.parametrize("grid", [6, 5], ids=["dense blocks", "padded blocks"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"], ids=["bins", "varlen"])
@pytest.mark.parametrize("case", KEEP_CASES)
def test_packings_equal_the_masked_reference(case, attn, grid):
    tower = make_model(grid, attn).model.vision_tower
    keep_mask = torch.tensor(KEEP_CASES[case], dtype=torch.bool)
    layout = layout_of([len(keep_mask)], grid)
    results = []
    for run in (gather_features, masked_reference):
        tower.zero_grad()
        hidden_states = torch.randn(len(keep_mask), grid * grid, 16, generator=torch.Generator().manual_seed(1))
        hidden_states.requires_grad_()
        features = run(tower, hidden_states, keep_mask, layout)
        weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
        (features * weights).sum().backward()
        gradients = {n: p.grad.clone() for n, p in tower.named_parameters() if p.grad is not None}
        results.append((features, hidden_states.grad, gradients))
    (features, inputs, gradients), (expected_features, expected_inputs, expected_gradients) = results
    assert features.shape == (int(keep_mask.sum()), 9, 32)
    torch.testing.assert_close(features, expected_features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(inputs, expected_inputs, atol=1e-5, rtol=1e-4)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-4, rtol=1e-4, msg=name)


def torch_varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size):
    """What torch's kernel computes, its window too: frame by frame, the last query beside the last key."""
    outputs = []
    for i in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[i] : cu_seq_q[i + 1]]
        k, v = (x[cu_seq_k[i] : cu_seq_k[i + 1]] for x in (key, value))
        assert len(q) <= max_q and len(k) <= max_k
        distance = torch.arange(len(k)) - torch.arange(len(q))[:, None] - (len(k) - len(q))
        logits = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        logits = logits.masked_fill((distance < -window_size[0]) | (distance > window_size[1]), -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1), v))
    return torch.cat(outputs)


def test_torchs_kernel_is_asked_for_what_the_loop_computes(monkeypatch):
    query, (key, value) = torch.randn(12, 2, 8), torch.randn(2, 27, 2, 8)
    offsets = [torch.tensor(ends, dtype=torch.int32) for ends in ([0, 9, 9, 12], [0, 9, 18, 27])]
    by_loop = varlen_attention(query, key, value, *offsets, 9)
    monkeypatch.setattr(attention_stts_molmo, "has_varlen_kernel", lambda query: True)
    monkeypatch.setattr(attention_stts_molmo, "varlen_attn", torch_varlen_attn)
    torch.testing.assert_close(varlen_attention(query, key, value, *offsets, 9), by_loop)


def test_dropout_is_left_to_the_loop(monkeypatch):
    """Torch's kernel has none."""
    monkeypatch.setattr(attention_stts_molmo, "has_varlen_kernel", lambda query: True)
    monkeypatch.setattr(attention_stts_molmo, "varlen_attn", pytest.fail)
    states, offsets = torch.randn(5, 2, 8), torch.tensor([0, 2, 5], dtype=torch.int32)
    kept, halved = (varlen_attention(states, states, states, offsets, offsets, 3, dropout=p) for p in (0.001, 0.9))
    assert (halved == 0).all(-1).any() and not (kept == 0).all(-1).any()


def test_varlen_attention_in_bfloat16():
    query, key, value = torch.randn(3, 20, 2, 8)
    offsets = torch.tensor([0, 7, 7, 20], dtype=torch.int32)
    exact = varlen_attention(query, key, value, offsets, offsets, 13)
    half = varlen_attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), offsets, offsets, 13)
    torch.testing.assert_close(half.float(), exact, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_folded_bias_equals_an_additive_mask(dtype, tolerance):
    """Ragged queries, one frame without any, against all keys of each frame."""
    counts = [5, 0, 9, 2]
    query, (key, value) = torch.randn(16, 2, 8).double(), torch.randn(2, 4 * 9, 2, 8).double()
    results = []
    for fold in (True, False):
        bias = (torch.rand(36, generator=torch.Generator().manual_seed(3)) * 13 - 13.8).requires_grad_()
        tensors = [x.to(dtype if fold else torch.float64).requires_grad_() for x in (query, key, value)]
        if fold:
            q, k, v = fold_key_bias(*tensors, bias)
            cu_seqlens_q = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            cu_seqlens_k = torch.arange(5, dtype=torch.int32) * 9
            out = varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, 9)[..., :8]
        else:
            outs = []
            for q, k, v, b in zip(tensors[0].split(counts), *(x.split(9) for x in (*tensors[1:], bias)), strict=True):
                logits = torch.einsum("qhd,khd->hqk", q, k) * 8**-0.5 + b.double()
                outs.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1), v))
            out = torch.cat(outs)
        (out.float() * torch.arange(8)).sum().backward()
        results.append([out.float(), bias.grad, *(x.grad.float() for x in tensors)])
    for folded, expected in zip(*results, strict=True):
        torch.testing.assert_close(folded, expected, atol=tolerance * expected.abs().max().item(), rtol=tolerance)


def test_a_folded_bias_keeps_its_digits_in_bfloat16():
    bias = torch.linspace(-13.8, 0, 50)
    query, key, value = torch.zeros(3, 50, 2, 8, dtype=torch.bfloat16)
    query, key, _ = fold_key_bias(query, key, value, bias)
    logits = (query.float() * key.float()).sum(-1) * 16**-0.5
    torch.testing.assert_close(logits[:, 0], bias, atol=2e-4, rtol=0)


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("grid", [6, 5], ids=["dense blocks", "padded blocks"])
def test_the_bias_layer_with_survivors_as_queries_equals_the_whole_layer(grid, with_bias):
    layout = layout_of([5], grid)
    keep_mask = torch.tensor(KEEP_CASES["ragged"], dtype=torch.bool)
    packing = plan_packing(keep_mask, int(keep_mask.sum()), layout, refill=False)
    results = []
    for attn in ("eager", "sdpa"):
        tower = make_model(grid, attn).model.vision_tower
        hidden_states = torch.randn(5, grid * grid, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        bias = (torch.rand(5, grid * grid, generator=torch.Generator().manual_seed(2)) * 5 - 5).requires_grad_()
        packed = tower.run_bias_layer(hidden_states, bias if with_bias else None, packing)
        (packed * torch.arange(16)).sum().backward()
        gradients = [p.grad for p in tower.layers[2].parameters()]
        results.append([packed, hidden_states.grad, *gradients, *([bias.grad] if with_bias else [])])
    for eager, sdpa in zip(*results, strict=True):
        torch.testing.assert_close(sdpa, eager, atol=1e-4, rtol=1e-4)


def test_refill_gives_lone_frames_their_tokens_back():
    layout = layout_of([4], 6)
    keep_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
    # Bins of four blocks: frame 0 is full, frame 1 leaves no room for two blocks, frames 2 and 3 share one.
    assert refill_lone_frames(keep_mask, layout).sum(1).tolist() == [4, 4, 2, 2]
    keep_mask[2] = False
    assert refill_lone_frames(keep_mask, layout).sum(1).tolist() == [4, 4, 0, 4]


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_refilled_frames_are_context_only(attn):
    tower = make_model(attn=attn, refill_lone_frames=True).model.vision_tower
    layout = layout_of([4], 6)
    keep_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
    hidden_states = torch.randn(4, 36, 16)
    features = gather_features(tower, hidden_states, keep_mask, layout)
    context = masked_reference(tower, hidden_states, refill_lone_frames(keep_mask, layout), layout)
    expected = context[keep_mask[refill_lone_frames(keep_mask, layout)]]
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


def test_the_adapter_pools_blocks_in_a_row_as_the_native_one_pools_indices():
    adapter = make_model().model.multi_modal_projector
    indices, results = torch.arange(5 * 9).view(5, 9), []
    for pooled_patches_idx in (indices, None):
        adapter.zero_grad()
        features = torch.randn(1, 5 * 9, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        pooled = adapter(features, pooled_patches_idx).last_hidden_state
        (pooled * torch.arange(32)).sum().backward()
        results.append([pooled, features.grad, *(p.grad.clone() for p in adapter.parameters())])
    for native, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, native, atol=1e-4, rtol=1e-5)


def test_dropout_of_packed_frames_is_for_training_alone():
    tower, layout = make_model().model.vision_tower, layout_of([4])
    hidden_states, keep_mask = torch.randn(4, 36, 16), torch.ones(4, 4, dtype=torch.bool)
    expected = gather_features(tower, hidden_states, keep_mask, layout)
    for layer in tower.layers:
        layer.self_attn.attention_dropout = 0.5
    assert torch.equal(gather_features(tower, hidden_states, keep_mask, layout), expected)
    assert not torch.allclose(gather_features(tower.train(), hidden_states, keep_mask, layout), expected)
