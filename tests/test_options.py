"""Ratio, method and budget of tokens: where they come from, what they do, and what is said of wrong ones."""

import logging

import pytest
import torch
from helpers import make_inputs, make_model, make_native, video_tensors, with_labels
from stts_molmo.configuration_stts_molmo import STTSConfig
from stts_molmo.pruning_stts_molmo import num_kept_tokens, select_tokens
from transformers import GenerationConfig

GREEDY = {"max_new_tokens": 4, "do_sample": False}


def num_kept(model, inputs, **options) -> int:
    """Tokens that reach the LLM in `generate`."""
    counts = []
    hook = model.model.multi_modal_projector.register_forward_hook(
        lambda module, args, output: counts.append(len(output.last_hidden_state))
    )
    model.generate(**inputs, **GREEDY, **options)
    hook.remove()
    return counts[0]


# ----------------------------------------------------------------------------------------------------------------------
# A budget instead of a ratio
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "expected"), [(81, 81), (4096, 4096), (5184, 5184), (6000, 5184)])
def test_a_budget_is_what_is_kept_of_longer_videos(budget, expected):
    assert num_kept_tokens(64, 81, prune_ratio=0.5, max_vision_tokens=budget) == expected


def test_a_budget_below_one_frame_is_refused():
    with pytest.raises(ValueError, match="max_vision_tokens=80 is less than the 81 tokens of a frame"):
        num_kept_tokens(64, 81, 0.5, max_vision_tokens=80)


@torch.no_grad()
@pytest.mark.parametrize("method", ["scorer", "cosine", "tome"])
def test_a_budget_equals_its_ratio_to_the_bit(method):
    model, inputs = make_model(method=method), make_inputs([6])
    ratio, budget = model(**inputs, prune_ratio=0.25), model(**inputs, max_vision_tokens=18)
    assert ratio.keep_mask.sum() == budget.keep_mask.sum() == 18
    assert torch.equal(ratio.logits, budget.logits)


@torch.no_grad()
def test_a_short_video_loses_nothing_alone_or_in_a_batch():
    model, alone = make_model(), make_inputs([2])
    assert torch.equal(model(**alone, max_vision_tokens=10).logits, make_native()(**alone).logits)
    batch = model(**make_inputs([2, 6]), max_vision_tokens=10)
    assert batch.keep_mask[:2].all() and batch.keep_mask[2:].sum() == 10
    length = alone["input_ids"].shape[1]
    torch.testing.assert_close(batch.logits[0, -length:], make_native()(**alone).logits[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_budget_of_the_checkpoint_gives_way_to_a_ratio():
    model, videos = make_model(max_vision_tokens=9), video_tensors([4])
    assert model.get_video_features(**videos).keep_mask.sum() == 9
    assert model.get_video_features(**videos, prune_ratio=0.25).keep_mask.sum() == 12
    assert model.get_video_features(**videos, max_vision_tokens=5).keep_mask.sum() == 5
    with pytest.raises(ValueError, match="prune_ratio=0.5 and max_vision_tokens=9 exclude each other"):
        model.get_video_features(**videos, prune_ratio=0.5, max_vision_tokens=9)


# ----------------------------------------------------------------------------------------------------------------------
# Where options come from
# ----------------------------------------------------------------------------------------------------------------------


def test_generate_asks_its_arguments_then_generation_configs_then_the_checkpoint(tmp_path):
    model, inputs = make_model(prune_ratio=0.5), make_inputs([4])
    passed = GenerationConfig(**GREEDY, prune_ratio=0.75)
    assert num_kept(model, inputs) == 8
    model.generation_config.prune_ratio = 0.25
    assert num_kept(model, inputs) == 12
    assert num_kept(model, inputs, generation_config=passed) == 4
    assert num_kept(model, inputs, generation_config=passed, max_vision_tokens=9) == 9
    model.save_pretrained(tmp_path)
    assert num_kept(type(model).from_pretrained(tmp_path), inputs) == 12
    model.generation_config.method = "none"
    assert num_kept(model, inputs) == 16


@pytest.mark.parametrize("options", [{"prune_ratio": 3}, {"method": "foo"}, {"max_vision_tokens": 0}], ids=str)
def test_wrong_options_of_a_generation_config_are_refused(options):
    model, ((name, value),) = make_model(), options.items()
    setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        model.generate(**make_inputs([4]), **GREEDY)


@pytest.mark.parametrize("wrong", ["prune_ration", "methods", "max_vision_token"])
def test_misspelt_options_are_refused(wrong):
    with pytest.raises(TypeError, match=f"no argument '{wrong}'; did you mean"):
        make_model()(**make_inputs([4]), **{wrong: 0.5})


@pytest.mark.parametrize(
    ("name", "value"),
    [("prune_ratio", -1), ("prune_layer", -1), ("score_bias", "rescaled"), ("method", "foo"), ("max_vision_tokens", 0)],
)
def test_a_loaded_models_config_takes_no_wrong_value(name, value):
    model = make_model()
    with pytest.raises(ValueError, match=f"{name}="):
        setattr(model.config.stts_config, name, value)
    assert getattr(model.config.stts_config, name) != value


def test_a_layer_that_the_loaded_model_cannot_prune_after_is_refused():
    model = make_model()
    model.config.stts_config.prune_layer = 3
    with pytest.raises(ValueError, match="prune_layer=3"):
        model.get_video_features(**video_tensors([4]))


def test_a_saved_config_holds_its_own_knobs_only():
    saved = make_model().config.to_diff_dict()["stts_config"]
    assert set(saved) == {"model_type", *STTSConfig.__annotations__}


def test_another_attention_reaches_every_part_of_the_config():
    model = make_model()
    model.set_attn_implementation("eager")
    assert model.config.stts_config._attn_implementation == "eager"


# ----------------------------------------------------------------------------------------------------------------------
# A scorer that was never trained
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_model():
    model = make_model()
    for name, parameter in model.model.vision_tower.token_scorer.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    return model


def test_the_first_step_of_any_training_shows(fresh_model):
    assert fresh_model.has_untrained_scorer()
    fresh_model.train()(**with_labels(make_inputs([4]))).loss.backward()
    torch.optim.SGD(fresh_model.parameters(), lr=1e-5).step()
    assert not fresh_model.has_untrained_scorer()


def test_generate_warns_once_of_an_untrained_scorer(fresh_model, caplog):
    logging.getLogger("transformers").propagate = True
    inputs = make_inputs([4])
    fresh_model.generate(**inputs, **GREEDY, method="cosine")
    assert "never trained" not in caplog.text
    for _ in range(2):
        fresh_model.generate(**inputs, **GREEDY)
    assert caplog.text.count("never trained") == 1


# ----------------------------------------------------------------------------------------------------------------------
# Loss and outputs
# ----------------------------------------------------------------------------------------------------------------------


def test_the_auxiliary_loss_is_in_the_training_loss_only():
    inputs = with_labels(make_inputs([4]))
    evaluated, trained = (make_model(aux_loss_weight=5.0).train(mode)(**inputs) for mode in (False, True))
    torch.testing.assert_close(trained.loss, evaluated.loss + 5 * evaluated.aux_loss)


@torch.no_grad()
def test_shift_labels_are_labels_shifted():
    model, inputs = make_model(), with_labels(make_inputs([4, 6]))
    expected = model(**inputs).loss
    labels = inputs.pop("labels")
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    assert torch.equal(model(**inputs, shift_labels=shifted).loss, expected)


def test_a_label_on_a_placeholder_names_the_collator():
    inputs = make_inputs([4])
    with pytest.raises(ValueError, match="labels hold 69, but the model writes tokens below 64.*VideoQACollator"):
        make_model()(**inputs, labels=inputs["input_ids"])


@torch.no_grad()
def test_some_hidden_states_only():
    model, inputs = make_model(), make_inputs([4])
    every = model(**inputs, output_hidden_states=True).hidden_states
    some = model(**inputs, output_hidden_states=[1]).hidden_states
    if [state is None for state in some] != [True, False, True]:
        pytest.skip("this Transformers returns other layers when asked for some")
    assert torch.equal(some[1], every[1])


def test_nan_does_not_beat_the_first_frame():
    scores = torch.tensor([[0.1] * 4, [float("nan")] * 4, [0.5, 0.2, 0.9, float("nan")]])
    keep_mask = select_tokens(scores, [3], [7])
    assert keep_mask[0].all() and not keep_mask[1].any() and keep_mask[2].tolist() == [True, True, True, False]
