"""Budget, scores, bias, selection and the auxiliary loss, against plain Python."""

import pytest
import torch
from helpers import config_dict, layout_of, make_model, make_native, video_tensors
from hypothesis import given
from hypothesis import strategies as st
from stts_molmo.configuration_stts_molmo import STTSMolmoConfig
from stts_molmo.modeling_stts_molmo import STTSMolmoForConditionalGeneration
from stts_molmo.pruning_stts_molmo import (
    auxiliary_loss,
    log_score_bias,
    mask_to_indices,
    num_kept_tokens,
    previous_frame,
    random_scores,
    select_tokens,
    temporal_dissimilarity,
)


@pytest.mark.parametrize(
    ("num_frames", "prune_ratio", "kept"),
    [
        (64, 0.0, 5184),
        (64, 0.3, 3629),
        (64, 0.4, 3111),
        (64, 0.5, 2592),
        (256, 0.5, 10368),
        (90, 0.7, 2187),  # binary floats drop one token less
        (2, 0.9, 81),  # frame 0 is never touched
        (1, 0.5, 81),
    ],
)
def test_budget(num_frames, prune_ratio, kept):
    assert num_kept_tokens(num_frames, 81, prune_ratio) == kept


@given(st.integers(1, 300), st.integers(1, 100), st.integers(0, 99))
def test_budget_is_exact_decimal_arithmetic(num_frames, tokens_per_frame, percent):
    kept = num_kept_tokens(num_frames, tokens_per_frame, percent / 100)
    total = num_frames * tokens_per_frame
    assert kept == max(total - total * percent // 100, tokens_per_frame)


@given(st.data())
def test_selection_equals_a_sorted_list(data):
    num_frames = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    ratio = data.draw(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9, 0.99]))
    # Few distinct values, so that ties are the rule.
    scores = torch.tensor(
        [[data.draw(st.sampled_from([0.1, 0.2, 0.3])) for _ in range(4)] for _ in range(sum(num_frames))]
    )
    num_kept = [num_kept_tokens(t, 4, ratio) for t in num_frames]
    mask = select_tokens(scores, num_frames, num_kept)
    for video_mask, video_scores, kept in zip(mask.split(num_frames), scores.split(num_frames), num_kept, strict=True):
        flat = video_scores.flatten().tolist()
        ranking = sorted(range(len(flat)), key=lambda i: (i >= 4, -flat[i] if i >= 4 else 0, i))
        assert video_mask.flatten().nonzero().flatten().tolist() == sorted(ranking[:kept])


def test_mask_to_indices():
    mask = torch.rand(7, 9) < 0.4
    assert mask_to_indices(mask, int(mask.sum())).tolist() == mask.flatten().nonzero().flatten().tolist()


def test_previous_frame_never_crosses_a_video():
    features = torch.arange(1.0, 6.0)[:, None]
    assert previous_frame(features, [2, 1, 2]).flatten().tolist() == [0, 1, 0, 0, 4]


def test_dissimilarity_equals_a_loop():
    num_frames = [3, 1, 70]
    features = torch.randn(74, 4, 5, dtype=torch.bfloat16)
    result = temporal_dissimilarity(features, num_frames)
    offset = 0
    for count in num_frames:
        for t in range(count):
            for i in range(4):
                a, b = features[offset + t - 1, i].double(), features[offset + t, i].double()
                expected = 0.0 if t == 0 else float(1 - a @ b / (a.norm() * b.norm()))
                assert result[offset + t, i].item() == pytest.approx(expected, abs=1e-5)
        offset += count


def test_auxiliary_loss_is_the_mean_over_all_tokens_and_spares_first_frames():
    scores = torch.tensor([[0.9, 0.1], [0.5, 0.2], [0.3, 0.3]], requires_grad=True)
    target = torch.tensor([[0.0, 0.0], [0.1, 0.4], [0.9, 0.9]], requires_grad=True)
    loss = auxiliary_loss(scores, target, [2, 1])
    assert loss.item() == pytest.approx((0.4**2 + 0.2**2) / 6)
    loss.backward()
    assert target.grad is None
    assert scores.grad[0].abs().sum() == scores.grad[2].abs().sum() == 0 and (scores.grad[1] != 0).all()


def test_log_bias_reaches_every_patch_of_a_block_and_spares_first_frames():
    layout = layout_of([2, 1])
    logits = torch.randn(3, 4)
    bias = log_score_bias(logits, layout, [6, 4], "log")
    assert (bias[0] == 0).all() and (bias[2] == 0).all()
    for block, patches in enumerate(layout.blocks):
        assert bias[1, patches].allclose(logits[1, block].sigmoid().log().expand(9))


def test_log_bias_of_a_tiny_score_is_finite_and_learns():
    logits = torch.tensor([[0.0] * 4, [-20.0, -200.0, 20.0, 0.0]], requires_grad=True)
    bias = log_score_bias(logits, layout_of([2]), [6], "log")
    bias.sum().backward()
    assert bias.isfinite().all() and logits.grad[1].tolist() == pytest.approx([9.0, 9.0, 0.0, 4.5], abs=1e-4)


def test_a_video_that_loses_nothing_gets_no_bias():
    bias = log_score_bias(torch.randn(4, 4), layout_of([2, 2]), [8, 7], "log")
    assert (bias[:3] == 0).all() and (bias[3] != 0).all()


def test_rescaled_bias_stretches_each_row_of_patches():
    layout = layout_of([2])
    logits = torch.tensor([[0.5] * 4, [0.2, 0.6, 0.4, 0.4]]).logit()
    bias = log_score_bias(logits, layout, [6], "rescaled_log")[1].view(6, 6)
    assert bias[0, 0].item() == pytest.approx(-2, abs=1e-4) and bias[0, 5].item() == pytest.approx(0, abs=1e-4)
    assert (bias[3:] + 2).abs().max() < 1e-4  # a constant row sits at the minimum


def test_bias_with_a_window_that_does_not_divide_the_frame():
    layout = layout_of([2], grid=5)
    assert not layout.is_dense
    logits = torch.randn(2, 4)
    bias = log_score_bias(logits, layout, [6], "log")[1]
    for block, patches in enumerate(layout.blocks):
        inside = patches[patches >= 0]
        assert bias[inside].allclose(logits[1, block].sigmoid().log().expand(len(inside)))


def test_random_scores_are_seeded_per_video():
    alone, batch = random_scores(layout_of([3]), 5), random_scores(layout_of([2, 3]), 5)
    assert torch.equal(batch[2:], alone)
    assert not torch.equal(alone, random_scores(layout_of([3]), 6))
    assert not torch.equal(random_scores(layout_of([3]), None), random_scores(layout_of([3]), None))


def test_scores_of_a_video_do_not_depend_on_its_neighbours():
    scorer = make_model().model.vision_tower.token_scorer
    blocks = torch.randn(5, 4, 9, 16)
    together, _ = scorer(blocks, layout_of([2, 3]))
    alone, _ = scorer(blocks[2:], layout_of([3]))
    assert together[2:].allclose(alone, atol=1e-6)


def test_scores_with_padded_blocks_ignore_the_padding():
    scorer = make_model().model.vision_tower.token_scorer
    layout = layout_of([2], grid=5)
    blocks = torch.randn(2, 4, 9, 16).masked_fill((layout.blocks < 0)[None, :, :, None], 0)
    scores, pooled = scorer(blocks, layout)
    inside = (layout.blocks[0] >= 0).nonzero().flatten()
    patches = blocks[0, 0, inside]
    expected = scorer.token_pooler(patches.mean(0)[None, None], patches[None])[0]
    assert pooled[0, 0].allclose(expected.flatten(), atol=1e-6)


def test_the_budget_reads_the_ratio_as_a_decimal():
    assert int(0.29 * 100) == 28
    assert num_kept_tokens(num_frames=10, tokens_per_frame=10, prune_ratio=0.29) == 100 - 29


@torch.no_grad()
@pytest.mark.parametrize("setting", ["bfloat16", "autocast"])
def test_scores_of_half_precision_have_the_digits_of_float32(setting):
    """A sigmoid in bfloat16 gives many tokens one score, and which of them goes is then chance."""
    model, videos = make_model().model, video_tensors([4])
    if setting == "bfloat16":
        model = model.bfloat16()
    logits = []
    model.vision_tower.token_scorer.register_forward_hook(lambda module, args, output: logits.append(output[0]))
    with torch.autocast("cpu", torch.bfloat16, enabled=setting == "autocast"):
        scores = model.get_video_features(**videos).token_scores
    assert logits[0].dtype == scores.dtype == torch.float32
    assert torch.equal(scores, logits[0].sigmoid()) and (scores != scores.bfloat16()).any()


@pytest.mark.parametrize("origin", ["fresh", "from a plain Molmo2"])
def test_a_new_scorer_keeps_the_scale_of_what_goes_through_it(origin, tmp_path):
    config = STTSMolmoConfig(**config_dict(scorer_hidden_size=400))
    if origin == "fresh":
        model = STTSMolmoForConditionalGeneration(config)
    else:
        make_native().save_pretrained(tmp_path)
        model = STTSMolmoForConditionalGeneration.from_pretrained(tmp_path, config=config)
    for name, layer in model.model.vision_tower.token_scorer.named_modules():
        if isinstance(layer, torch.nn.Linear):
            assert layer.weight.std().item() * layer.in_features**0.5 == pytest.approx(1, abs=0.2), name
            assert not layer.bias.any(), name


def test_random_scores_are_drawn_anew_in_training_alone():
    model, videos = make_model(method="random").model, video_tensors([4])
    for is_training in (True, False):
        first, second = (model.train(is_training).get_video_features(**videos).token_scores for _ in range(2))
        assert torch.equal(first, second) != is_training


def test_random_scores_are_drawn_with_the_seed_of_the_config():
    videos = video_tensors([4])
    draws = [make_model(method="random", seed=seed).get_video_features(**videos).token_scores for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
