"""The model against native Molmo2 and against itself: one by one, both padding sides, loss and gradients."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import BATCH, CASES, IMAGE_TOKEN, make_inputs, make_model, make_native, solo, video_tensors, with_labels
from stts_molmo.modeling_stts_molmo import labelled_states
from stts_molmo.prompt_stts_molmo import align_rows, consecutive_positions


@torch.no_grad()
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("case", CASES)
def test_nothing_pruned_equals_native_to_the_bit(case, attn):
    inputs = CASES[case]()
    native = make_native(attn=attn)(**inputs)
    ours = make_model(attn=attn)(**inputs, prune_ratio=0)
    assert torch.equal(ours.logits, native.logits)
    assert ours.input_keep_mask is None and ours.aux_loss is None


@torch.no_grad()
@pytest.mark.parametrize("case", ["text", "image", "multi-image"])
def test_images_and_text_are_native_at_any_ratio(case):
    inputs = CASES[case]()
    assert torch.equal(make_model(prune_ratio=0.9)(**inputs).logits, make_native()(**inputs).logits)


@torch.no_grad()
def test_method_none_equals_native():
    inputs = make_inputs([4, 2])
    assert torch.equal(make_model(method="none")(**inputs).logits, make_native()(**inputs).logits)


@torch.no_grad()
def test_one_frame_loses_nothing():
    outputs = make_model()(**make_inputs([1]))
    assert outputs.keep_mask.all() and outputs.input_keep_mask is None
    torch.testing.assert_close(outputs.logits, make_native()(**make_inputs([1])).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("method", ["scorer", "cosine", "random", "tome"])
@pytest.mark.parametrize("prune_ratio", [0.3, 0.5, 0.9])
def test_exactly_the_budget_is_dropped(method, prune_ratio):
    inputs = make_inputs([6, 4])
    outputs = make_model()(**inputs, prune_ratio=prune_ratio, method=method)
    for mask, frames in zip(outputs.keep_mask.split([6, 4]), [6, 4], strict=True):
        assert (~mask).sum() == min(int(round(prune_ratio * 100) * frames * 4 // 100), (frames - 1) * 4)
        assert mask[0].all()
    dropped = inputs["attention_mask"].bool() & ~outputs.input_keep_mask
    assert (inputs["input_ids"][dropped] == IMAGE_TOKEN).all()
    assert dropped.sum() == (~outputs.keep_mask).sum()
    assert (outputs.logits[~outputs.input_keep_mask] == 0).all()


@torch.no_grad()
def test_overrides_leave_the_config_alone():
    model, inputs = make_model(), make_inputs([4])
    before = model(**inputs).logits
    assert not torch.equal(model(**inputs, prune_ratio=0.25).logits, before)
    assert not torch.equal(model(**inputs, method="cosine").logits, before)
    assert torch.equal(model(**inputs).logits, before)
    assert model.config.stts_config.prune_ratio == 0.5 and model.config.stts_config.method == "scorer"


@torch.no_grad()
def test_video_features():
    features = make_model().get_video_features(**video_tensors([4, 6]))
    assert [tuple(tokens.shape) for tokens in features.pooler_output] == [(8, 32), (12, 32)]
    assert features.keep_mask.shape == features.token_scores.shape == (10, 4)
    assert features.keep_mask.sum() == 20 and features.aux_loss.ndim == 0
    as_tuple = make_model().get_video_features(**video_tensors([4, 6]), return_dict=False)
    assert torch.equal(as_tuple[1][0], features.pooler_output[0])


@torch.no_grad()
def test_features_computed_before_give_the_same_logits():
    model, inputs = make_model(), make_inputs([4, 6])
    expected = model(**inputs).logits
    videos = {name: inputs.pop(name) for name in ("pixel_values_videos", "video_token_pooling", "video_grids")}
    features = model.get_video_features(**videos)
    assert torch.equal(model(**inputs, mm_encoder_outputs={"video": features}).logits, expected)


@torch.no_grad()
def test_embeddings_instead_of_ids():
    model, inputs = make_model(), make_inputs([4, 2])
    expected = model(**inputs).logits
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", ["scorer", "cosine", "random", "tome"])
def test_a_batch_equals_one_by_one(method, side, attn):
    model, inputs = make_model(attn=attn, method=method), make_inputs(BATCH, side=side)
    batch = model(**inputs)
    for row in range(len(BATCH)):
        alone = model(**solo(inputs, row, BATCH))
        logits = batch.logits[row, inputs["attention_mask"][row].bool()]
        torch.testing.assert_close(logits, alone.logits[0], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_batch_equals_one_by_one_with_refilled_frames():
    num_frames = [4, 6, 3, 5]
    model, inputs = make_model(refill_lone_frames=True), make_inputs(num_frames)
    batch = model(**inputs)
    for row in range(len(num_frames)):
        alone = model(**solo(inputs, row, num_frames))
        logits = batch.logits[row, inputs["attention_mask"][row].bool()]
        torch.testing.assert_close(logits, alone.logits[0], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_video_does_not_leak_into_another():
    model, inputs = make_model(), make_inputs([4, 6, 3])
    before = model(**inputs)
    inputs["pixel_values_videos"][4:10] += 1.0
    after = model(**inputs)
    for row in (0, 2):
        torch.testing.assert_close(after.logits[row], before.logits[row], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(after.logits[1], before.logits[1], atol=1e-2)


@torch.no_grad()
def test_dropped_tokens_have_no_influence_after_the_bias_layer():
    """Editing what the LLM would have read at dropped placeholders changes nothing."""
    model, inputs = make_model(), make_inputs([6])
    outputs = model(**inputs)
    dropped = ~outputs.input_keep_mask
    types = inputs["mm_token_type_ids"].masked_fill(dropped, 0)
    assert torch.equal(model(**{**inputs, "mm_token_type_ids": types}).logits, outputs.logits)


@torch.no_grad()
def test_compact_and_masked_sequences_agree():
    """The short sequence equals the full one with dropped positions masked out and positions closed up."""
    model, inputs = make_model(), make_inputs([6])
    outputs = model(**inputs)
    videos = {n: inputs[n] for n in ("pixel_values_videos", "video_token_pooling", "video_grids")}
    features = model.get_video_features(**videos)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    placeholders = inputs["input_ids"] == IMAGE_TOKEN
    assert torch.equal(outputs.input_keep_mask[placeholders], outputs.keep_mask.flatten())
    kept = placeholders & outputs.input_keep_mask
    embeds[kept] += features.pooler_output[0]
    keep = outputs.input_keep_mask
    length = keep.shape[1]
    vision = inputs["mm_token_type_ids"].bool()[0]
    allowed = torch.ones(length, length).tril().bool() | (vision[:, None] & vision[None, :])
    allowed &= keep[0][None]
    mask = torch.zeros(1, 1, length, length).masked_fill(~allowed, torch.finfo(torch.float32).min)
    positions = keep.cumsum(1) - 1
    states = model.model.language_model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions)
    expected = model.lm_head(states.last_hidden_state)
    torch.testing.assert_close(outputs.logits[keep], expected[keep], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_hidden_states_have_the_inputs_length():
    inputs = make_inputs([4, 2])
    outputs = make_model()(**inputs, output_hidden_states=True)
    assert all(states.shape[:2] == inputs["input_ids"].shape for states in outputs.hidden_states)


def test_loss_equals_native_when_nothing_is_pruned():
    inputs = with_labels(make_inputs([4, None, 2]))
    torch.testing.assert_close(
        make_model()(**inputs, prune_ratio=0).loss, make_native()(**inputs).loss, atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_are_predicted_from_the_last_survivor(side):
    inputs = with_labels(make_inputs([4, 6], side=side))
    outputs = make_model().train()(**inputs, logits_to_keep=0)
    losses = []
    for logits, labels, keep in zip(outputs.logits, inputs["labels"], outputs.input_keep_mask, strict=True):
        logits, labels = logits[keep], labels[keep]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="none")[labels[1:] != -100])
    torch.testing.assert_close(outputs.loss, torch.cat(losses).mean() + outputs.aux_loss)


def test_labelled_states_without_pruning_is_the_usual_shift():
    states, labels = torch.arange(5.0)[None, :, None], torch.tensor([[-100, 8, 9, -100, -100]])
    found, targets = labelled_states(states, labels, None, vocab_size=10)
    assert found.flatten().tolist() == [1, 2] and targets.tolist() == [8, 9]


def test_a_label_with_no_survivor_before_it_is_left_out():
    states, labels = torch.arange(5.0)[None, :, None], torch.tensor([[-100, 7, 8, 9, -100]])
    keep = torch.tensor([[False, False, True, True, True]])
    found, targets = labelled_states(states, labels, keep, vocab_size=10)
    assert found.flatten().tolist() == [2, 3] and targets.tolist() == [8, 9]


def test_training_on_a_video_that_loses_nothing_gives_every_parameter_a_gradient():
    """Processes that train together wait for the same gradients of each other, whatever their videos."""
    gradients = []
    for num_frames in (1, 4):
        model = make_model().train()
        outputs = model(**with_labels(make_inputs([num_frames])))
        outputs.loss.backward()
        gradients.append({name for name, p in model.named_parameters() if p.grad is not None})
        assert (outputs.aux_loss == 0) == (num_frames == 1)
    assert gradients[0] == gradients[1]


def test_training_builds_no_full_logits_unless_asked():
    model, inputs = make_model().train(), with_labels(make_inputs([4]))
    assert model(**inputs).logits is None
    assert model(**inputs, logits_to_keep=0).logits.shape[1] == inputs["input_ids"].shape[1]
    assert model(**inputs, logits_to_keep=2).logits.shape[1] == 2
    assert model.eval()(**inputs).logits is not None


def scorer_gradients(model):
    return {n: p.grad for n, p in model.model.vision_tower.token_scorer.named_parameters()}


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("score_bias", ["log", "rescaled_log"])
def test_the_task_loss_alone_moves_the_scorer(score_bias, attn):
    model = make_model(attn=attn, aux_loss_weight=0.0, score_bias=score_bias).train()
    model(**with_labels(make_inputs([4, 3]))).loss.backward()
    for name, gradient in scorer_gradients(model).items():
        # A key bias shifts every logit of a query of one key alike: it has no gradient anywhere.
        assert name == "token_pooler.k_proj.bias" or gradient.abs().max() > 0, name


@pytest.mark.parametrize("aux_target", ["patches", "pooled"])
def test_the_auxiliary_loss_alone_moves_the_scorer(aux_target):
    model = make_model(aux_target=aux_target).train()
    model(**make_inputs([4, 3])).aux_loss.backward()
    for name, gradient in scorer_gradients(model).items():
        assert name == "token_pooler.k_proj.bias" or gradient.abs().max() > 0, name


@pytest.mark.parametrize("aux_target", ["patches", "pooled"])
def test_the_target_of_the_auxiliary_loss_is_detached(aux_target):
    """With constant scores only the target could carry a gradient to the features."""
    model = make_model(aux_target=aux_target).train()
    scorer = model.model.vision_tower.token_scorer
    torch.nn.init.zeros_(scorer.fc3.weight)
    model(**make_inputs([4])).aux_loss.backward()
    assert scorer.fc3.bias.grad.abs().max() > 0
    others = [p.grad for n, p in model.named_parameters() if not n.startswith("model.vision_tower.token_scorer.fc3")]
    assert all(gradient is None or gradient.abs().max() == 0 for gradient in others)


def test_eager_and_sdpa_have_the_same_gradients():
    gradients = []
    for attn in ("eager", "sdpa"):
        model = make_model(attn=attn).train()
        model(**with_labels(make_inputs([4, 6]))).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-3, msg=name)


@torch.no_grad()
def test_bfloat16():
    inputs = make_inputs([4, 6])
    outputs = make_model().bfloat16()(**inputs)
    assert outputs.logits.dtype == torch.bfloat16 and outputs.logits.isfinite().all()
    assert outputs.token_scores.dtype == torch.float32


@torch.no_grad()
def test_two_threads_share_a_model():
    model = make_model()
    batches = [make_inputs([6], seed=0), make_inputs([4, 3], seed=1)]
    ratios = [0.5, 0.25]
    alone = [model(**inputs, prune_ratio=ratio).logits for inputs, ratio in zip(batches, ratios, strict=True)]

    @torch.no_grad()
    def run(index):
        return model(**batches[index % 2], prune_ratio=ratios[index % 2]).logits

    with ThreadPoolExecutor(2) as pool:
        for index, logits in enumerate(pool.map(run, range(20))):
            assert torch.equal(logits, alone[index % 2])


@torch.no_grad()
@pytest.mark.parametrize(
    ("past", "positions"), [(True, True), (True, False), (False, False)], ids=["cache, positions", "cache", "no cache"]
)
def test_decoding_by_hand_with_the_returned_cache(past, positions):
    """A loop over `forward` may keep masks and positions of the full length."""
    model, inputs = make_model(), make_inputs([4, 6])
    generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    given = {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)} if positions else {}
    outputs = model(**inputs, **given, use_cache=past)
    for step in range(8):
        token = outputs.logits[:, -1].argmax(-1, keepdim=True)
        assert torch.equal(token[:, 0], generated[:, step])
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(token)], dim=1)
        if past:
            inputs["attention_mask"] = mask
            given = {"position_ids": mask.cumsum(1)[:, -1:] - 1} if positions else {}
            outputs = model(input_ids=token, attention_mask=mask, past_key_values=outputs.past_key_values, **given)
        else:
            inputs |= {
                "input_ids": torch.cat([inputs["input_ids"], token], dim=1),
                "attention_mask": mask,
                "mm_token_type_ids": torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(token)], dim=1),
            }
            outputs = model(**inputs)


@torch.no_grad()
@pytest.mark.parametrize(("side", "column"), [("left", -1), ("right", 0)])
def test_rows_are_padded_again_on_their_side(side, column):
    outputs = make_model()(**make_inputs([4, 6], side=side), use_cache=True)
    mask = outputs.past_key_values.stts_prompt.mask
    assert mask[:, column].all() and not mask.all()


def test_rows_are_aligned_on_both_sides():
    keep = torch.tensor([[1, 0, 1, 0, 1], [0, 1, 1, 1, 1]], dtype=torch.bool)
    values = torch.arange(10).view(2, 5)
    left, right = (align_rows(keep, [3, 4], side) for side in ("left", "right"))
    assert left.compact(values, -1).tolist() == [[-1, 0, 2, 4], [6, 7, 8, 9]]
    assert right.compact(values, -1).tolist() == [[0, 2, 4, -1], [6, 7, 8, 9]]
    for plan in (left, right):
        restored = plan.restore(plan.compact(values, -1)[..., None].float())[..., 0]
        assert torch.equal(restored, values.float().masked_fill(~keep, 0))
        assert plan.is_padded


def test_positions_close_gaps_sample_by_sample():
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    dropped = torch.tensor([[0, 1, 1, 0, 0, 1, 0, 0]], dtype=torch.bool)
    assert consecutive_positions(positions, dropped)[~dropped].tolist() == [0, 1, 0, 1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i | {"prune_ratio": 1.0}, r"prune_ratio=1.0 must be a number in \[0, 1\)"),
        (lambda i: i | {"method": "magic"}, "method='magic' is unknown"),
        (lambda i: i | {"input_ids": i["input_ids"][:, 5:]}, "placeholders, but the videos have 16"),
        (lambda i: i | {"video_grids": torch.tensor([[3, 2, 2]])}, "announces 3 frames and 12 pooled tokens"),
        (lambda i: i | {"video_grids": torch.tensor([[2, 2, 2], [4, 1, 2]])}, "mixes grids"),
        (lambda i: i | video_tensors([4], window=2), "pools 4 patches into a token"),
        (lambda i: i | {"attention_mask": torch.ones(1, 1, 29, 29)}, "needs a 2D mask"),
        (lambda i: i | {"pixel_values": i["pixel_values_videos"]}, "images or of videos, not of both"),
    ],
)
def test_bad_input_is_refused(change, message):
    inputs = change(make_inputs([4]))
    length = inputs["input_ids"].shape[1]
    inputs["mm_token_type_ids"] = inputs["mm_token_type_ids"][:, -length:]
    if inputs["attention_mask"].ndim == 2:
        inputs["attention_mask"] = inputs["attention_mask"][:, -length:]
    for call in (make_model(), make_model().generate):
        with pytest.raises(ValueError, match=message):
            call(**inputs)


def test_flash_attention_that_would_turn_vision_causal_is_refused():
    model, inputs = make_model(), make_inputs([4])
    model.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'text_config': 'sdpa'"):
        model(**inputs)


@torch.no_grad()
@pytest.mark.parametrize("batch", [[4], [4, 6]], ids=str)
def test_decoding_by_hand_without_a_mask(batch):
    """Positions of the full prompt, as natively; rows of different lengths have no padding of the caller's."""
    model, inputs = make_model(), make_inputs(batch)
    if len(batch) > 1:
        inputs = make_inputs([5, 5]) | video_tensors([5, 5], seed=3)
    del inputs["attention_mask"]
    length = inputs["input_ids"].shape[1]
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, length:]
    outputs = model(**inputs, use_cache=True)
    for step in range(4):
        token = outputs.logits[:, -1].argmax(-1, keepdim=True)
        assert torch.equal(token[:, 0], generated[:, step])
        position_ids = torch.full((len(token), 1), length + step)
        outputs = model(input_ids=token, position_ids=position_ids, past_key_values=outputs.past_key_values)


@torch.no_grad()
def test_a_video_after_a_text_in_the_cache():
    model, inputs = make_model(), make_inputs([5, 5])
    prefix = torch.randint(10, 40, (2, 5))
    whole = inputs | {
        "input_ids": torch.cat([prefix, inputs["input_ids"]], dim=1),
        "mm_token_type_ids": torch.nn.functional.pad(inputs["mm_token_type_ids"], (5, 0)),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (5, 0), value=1),
    }
    expected = model(**whole)
    cache = model(input_ids=prefix, use_cache=True).past_key_values
    outputs = model(**inputs | {"attention_mask": whole["attention_mask"]}, past_key_values=cache)
    torch.testing.assert_close(outputs.logits[:, -4:], expected.logits[:, -4:], atol=1e-5, rtol=1e-5)
    token = torch.full((2, 1), 11)
    mask = torch.nn.functional.pad(whole["attention_mask"], (0, 1), value=1)
    after = model(input_ids=token, attention_mask=mask, past_key_values=outputs.past_key_values)
    longer = whole | {
        "input_ids": torch.cat([whole["input_ids"], token], dim=1),
        "mm_token_type_ids": torch.nn.functional.pad(whole["mm_token_type_ids"], (0, 1)),
        "attention_mask": mask,
    }
    torch.testing.assert_close(after.logits[:, -1], model(**longer).logits[:, -1], atol=1e-5, rtol=1e-5)
