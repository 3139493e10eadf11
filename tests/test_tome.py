"""Token merging against plain loops, and through the whole model."""

import pytest
import torch
from helpers import layout_of, make_inputs, make_model, video_tensors, with_labels
from stts_molmo.attention_stts_molmo import fold_key_bias, plan_packing
from stts_molmo.configuration_stts_molmo import STTSMolmoConfig
from stts_molmo.pruning_stts_molmo import MERGED_AWAY_BIAS, merge_tokens, merging_shares


def merge_frame(patches, blocks, share):
    """
    One frame block by block: `patches` `(N, D)`, `blocks` a list of lists, -1 outside the frame.

    Returns `{block: {slot: (patch, size)}}` of the blocks left.
    """
    slots = {b: {s: (patches[p], 1) for s, p in enumerate(block) if p >= 0} for b, block in enumerate(blocks)}
    inside = {b: [patches[p] for p in block if p >= 0] for b, block in enumerate(blocks)}
    target_count = max(len(blocks) - share, 1)
    while len(slots) > target_count:
        alive = sorted(slots)
        means = {b: torch.stack(inside[b]).detach().mean(0) for b in alive}
        candidates = []
        for source in alive[::2]:
            likeness = [float(torch.cosine_similarity(means[source], means[b], dim=0)) for b in alive[1::2]]
            candidates.append((max(likeness), source, alive[1::2][likeness.index(max(likeness))]))
        candidates.sort(key=lambda pair: (-pair[0], pair[1]))
        for _, source, target in candidates[: min(len(alive) - target_count, len(alive) // 2)]:
            for s, (patch, size) in slots.pop(source).items():
                other, other_size = slots[target].get(s, (0.0, 0))
                mean = (patch * size + other * other_size) / (size + other_size)
                slots[target][s] = (mean, size + other_size)
            inside[target] += inside[source]
    inside_frame = {b: {s: slot for s, slot in slots[b].items() if blocks[b][s] >= 0} for b in slots}
    return inside_frame if share < len(blocks) else {}


def merge_by_loops(hidden_states, layout, num_kept):
    """Merged frames, each as [`merge_frame`] returns it."""
    frames, start = [], 0
    for count, kept in zip(layout.num_frames, num_kept, strict=True):
        shares = [0] * count
        for number in range(count * layout.tokens_per_frame - kept):
            shares[1 + number % (count - 1)] += 1
        for t in range(count):
            frames.append(merge_frame(hidden_states[start + t], layout.blocks.tolist(), shares[t]))
        start += count
    return frames


GRIDS = [6, 9, 5, 8, 10]  # 4, 9, 4, 9 and 16 blocks a frame; the window does not divide the last three
RATIOS = [0.1, 0.3, 0.5, 0.75, 0.9, 0.99]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("prune_ratio", RATIOS)
def test_merging_equals_loops_in_values_and_gradients(grid, prune_ratio):
    layout = layout_of([3, 1, 7], grid)
    num_kept = layout.num_kept(prune_ratio)
    hidden_states = torch.randn(11, grid * grid, 8, requires_grad=True)
    merged, bias, keep_mask = merge_tokens(hidden_states, layout, num_kept)
    expected = merge_by_loops(hidden_states, layout, num_kept)
    weight = torch.randn(grid * grid, 8)
    loss = expected_loss = 0.0
    for t, frame in enumerate(expected):
        assert keep_mask[t].nonzero().flatten().tolist() == sorted(frame)
        for b, slots in frame.items():
            for s, (patch, size) in slots.items():
                p = layout.blocks[b, s]
                torch.testing.assert_close(merged[t, p], patch)
                torch.testing.assert_close(bias[t, p], torch.tensor(float(size)).log())
                loss = loss + (merged[t, p] * weight[p]).sum()
                expected_loss = expected_loss + (patch * weight[p]).sum()
    gradients = [torch.autograd.grad(total, hidden_states, retain_graph=True)[0] for total in (loss, expected_loss)]
    torch.testing.assert_close(*gradients)


def test_blocks_alike_merge_and_what_is_merged_away_is_no_key():
    layout = layout_of([2])
    hidden_states = torch.randn(2, 36, 8)
    first, second = layout.blocks[0], layout.blocks[3]
    hidden_states[1, first] = 3 * hidden_states[1, second]  # one direction, another length
    merged, bias, keep_mask = merge_tokens(hidden_states, layout, [7])
    assert keep_mask.tolist() == [[True] * 4, [False, True, True, True]]
    assert torch.equal(merged[0], hidden_states[0]) and (bias[0] == 0).all()
    torch.testing.assert_close(merged[1, second], 2 * hidden_states[1, second])
    assert torch.equal(merged[1, layout.blocks[1]], hidden_states[1, layout.blocks[1]])
    assert bias[1, second].allclose(torch.tensor(2.0).log()) and (bias[1, first] == MERGED_AWAY_BIAS).all()


def test_autocast_merges_the_same_blocks():
    layout = layout_of([4], grid=9)
    hidden_states = 1 + 0.01 * torch.randn(4, 81, 8)  # likenesses that bfloat16 cannot tell apart
    expected = merge_tokens(hidden_states, layout, [20])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = merge_tokens(hidden_states, layout, [20])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_equal_blocks_merge_from_the_lowest_index():
    layout = layout_of([2], grid=9)
    _, bias, keep_mask = merge_tokens(torch.ones(2, 81, 4), layout, [15])
    # A is 0, 2, 4, 6, 8; the first three of it go into the first of B.
    assert keep_mask[1].nonzero().flatten().tolist() == [1, 3, 5, 6, 7, 8]
    assert bias[1, layout.blocks[1]].exp().allclose(torch.tensor(4.0))


@pytest.mark.parametrize(
    ("num_frames", "prune_ratio", "shares"),
    [
        ([3], 0.5, [0, 3, 3]),
        ([4], 0.5, [0, 3, 3, 2]),
        ([1, 3], 0.4, [0, 0, 2, 2]),
        ([2, 5], 0.9, [0, 4, 0, 4, 4, 4, 4]),
        ([21], 0.9, [0, *[4] * 15, *[3] * 5]),  # less than one block a frame is left
    ],
)
def test_shares_of_frames(num_frames, prune_ratio, shares):
    layout = layout_of(num_frames)
    found, largest = merging_shares(layout, layout.num_kept(prune_ratio))
    assert found.tolist() == shares and largest == max(shares)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_key_that_was_merged_away_gets_no_attention(dtype):
    """In the head width of Molmo2, 72, and with logits as high as 100."""
    query, key, value = (10 * torch.randn(5, 2, 72).to(dtype) for _ in range(3))
    bias = torch.tensor([0.0, MERGED_AWAY_BIAS, 4.4, MERGED_AWAY_BIAS, 0.0])
    query, key, _ = fold_key_bias(query, key, value, bias)
    logits = 80**-0.5 * torch.einsum("qhd,khd->hqk", query.float(), key.float())
    weights = logits.softmax(-1)
    assert weights.isfinite().all() and (weights[..., bias == MERGED_AWAY_BIAS] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("grid", [9, 8])
@pytest.mark.parametrize("prune_ratio", [0.5, 0.9])
def test_the_tower_equals_its_layers_on_the_merged_patches_alone(prune_ratio, grid, attn):
    """Frame by frame, on a sequence that has nothing but survivors in it."""
    tower = make_model(grid, attn).model.vision_tower
    layout, pixels = layout_of([6, 2], grid), video_tensors([6, 2], grid)["pixel_values_videos"]
    output = tower(pixels, layout=layout, num_kept=layout.num_kept(prune_ratio), method="tome")
    assert output.token_scores is None and output.aux_loss is None

    hidden_states = tower.patch_embedding(pixels) + tower.positional_embedding
    for layer in tower.layers[:2]:
        hidden_states = layer(hidden_states, None)
    num_kept = layout.num_kept(prune_ratio)
    hidden_states, bias, keep_mask = merge_tokens(hidden_states, layout, num_kept)
    assert torch.equal(keep_mask, output.keep_mask)
    indices = plan_packing(keep_mask, sum(num_kept), layout, refill=False).patches
    found = output.last_hidden_state[0].split((indices // grid**2).bincount(minlength=8).tolist())
    for t in range(8):
        patches = indices[indices // grid**2 == t] % grid**2
        if len(patches):
            states = tower.layers[2](hidden_states[t, patches][None], bias[t, patches][None, None, None])
            third = tower.layers[3](states, None)
            expected = torch.cat([tower.layers[4](third, None), third], dim=-1)[0]
            torch.testing.assert_close(found[t], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("prune_ratio", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("grid", [9, 8])
def test_a_video_in_a_batch_equals_the_video_alone(grid, prune_ratio):
    model, videos = make_model(grid, method="tome", prune_ratio=prune_ratio).double(), video_tensors([5, 1, 12], grid)
    videos["pixel_values_videos"] = videos["pixel_values_videos"].double()  # rounding differs by the number of threads
    together = model.get_video_features(**videos)
    assert [len(tokens) for tokens in together.pooler_output] == layout_of([5, 1, 12], grid).num_kept(prune_ratio)
    start = 0
    for index, count in enumerate([5, 1, 12]):
        frames, rows = slice(start, start + count), slice(9 * start, 9 * (start + count))
        pooling = videos["video_token_pooling"][rows]
        alone = model.get_video_features(
            videos["pixel_values_videos"][frames],
            torch.where(pooling >= 0, pooling - start * grid**2, pooling),
            videos["video_grids"][index : index + 1],
        )
        assert torch.equal(alone.keep_mask, together.keep_mask[frames])
        torch.testing.assert_close(alone.pooler_output[0], together.pooler_output[index])
        start += count


def test_eager_and_sdpa_train_alike_and_leave_the_scorer_alone():
    gradients = []
    for attn in ("eager", "sdpa"):
        model = make_model(attn=attn, method="tome").train()
        outputs = model(**with_labels(make_inputs([4, 6])))
        assert outputs.aux_loss is None and outputs.token_scores is None
        outputs.loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0]["model.vision_tower.patch_embedding.weight"].abs().max() > 0
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert "token_scorer" not in name
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-3, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("prune_ratio", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_generation(dtype, prune_ratio):
    model, inputs = make_model(method="tome", prune_ratio=prune_ratio).to(dtype), make_inputs([12, 3])
    outputs = model(**inputs)
    assert outputs.logits.dtype == dtype and outputs.logits.isfinite().all()
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape == (2, inputs["input_ids"].shape[1] + 3)


@torch.no_grad()
def test_lone_frames_are_not_refilled():
    """What the authors' preset gives back to a frame is in the survivors already."""
    inputs = make_inputs([6])
    plain, refilling = (make_model(method="tome", refill_lone_frames=refill)(**inputs) for refill in (False, True))
    assert torch.equal(plain.logits, refilling.logits)


def test_the_method_is_saved_with_the_config(tmp_path):
    model = make_model(method="tome")
    model.config.save_pretrained(tmp_path)
    assert STTSMolmoConfig.from_pretrained(tmp_path).stts_config.method == "tome"
