"""One video and many questions: each road to an answer gives the same one, and a video is watched once."""

import pytest
import torch
from helpers import CLIP, TINY, load_processor
from hypothesis import given
from hypothesis import strategies as st
from stts_molmo.generation_stts_molmo import VIDEO_INPUTS
from stts_molmo.pruning_stts_molmo import num_kept_tokens
from stts_molmo.tools.answer import WatchedVideo, answer_question, ask_about, ratio_of
from stts_molmo.tools.checkpoint import Checkpoint
from transformers.generation.streamers import BaseStreamer

QUESTIONS = ["What color is the still shape?", "Which shape moves?", "What color is the moving shape?"]
PRUNINGS = [{"prune_ratio": 0}, {"prune_ratio": 0.7}, {"max_vision_tokens": 20, "method": "cosine"}, {"method": "tome"}]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint(str(TINY), device="cpu")


# ----------------------------------------------------------------------------------------------------------------------
# A budget and its ratio
# ----------------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 2000), st.sampled_from([9, 49, 81, 729]), st.integers(0, 10**6))
def test_the_ratio_of_a_budget_keeps_as_many_tokens(num_frames, tokens_per_frame, more):
    before, budget = num_frames * tokens_per_frame, tokens_per_frame + more
    after = num_kept_tokens(num_frames, tokens_per_frame, 0.5, budget)
    assert after == min(before, budget)
    assert num_kept_tokens(num_frames, tokens_per_frame, ratio_of(before, after)) == after


def test_the_ratio_of_an_answer_is_the_one_that_was_used(checkpoint):
    budget = answer_question(checkpoint, CLIP, QUESTIONS[0], max_vision_tokens=20)
    ratio = answer_question(checkpoint, CLIP, QUESTIONS[0], prune_ratio=budget.prune_ratio)
    assert budget.vision_tokens == ratio.vision_tokens == {"before": 72, "after": 20}
    assert (budget.max_vision_tokens, budget.prune_ratio, ratio.max_vision_tokens) == (20, 0.722223, None)
    watched = [
        WatchedVideo(checkpoint, CLIP, **options).features
        for options in ({"max_vision_tokens": 20}, {"prune_ratio": ratio.prune_ratio})
    ]
    assert torch.equal(watched[0].pooler_output[0], watched[1].pooler_output[0])
    assert "(method scorer, at most 20 tokens, prune ratio 0.722223)" in budget.figures()


def test_a_short_video_loses_nothing_to_a_budget(checkpoint):
    answer = answer_question(checkpoint, CLIP, QUESTIONS[0], max_vision_tokens=100)
    assert (answer.prune_ratio, answer.vision_tokens) == (0, {"before": 72, "after": 72})


# ----------------------------------------------------------------------------------------------------------------------
# One road
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", [*QUESTIONS, "<|video|> <im_patch>"])
def test_inputs_are_those_of_the_processor(checkpoint, question):
    watched = WatchedVideo(checkpoint, CLIP)
    prompts = []
    watched.answer(question, max_new_tokens=1, streamer=Collector(prompts))
    content = [{"type": "video", "path": CLIP}, {"type": "text", "text": question}]
    processor = load_processor()
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert torch.equal(prompts[0], inputs["input_ids"])
    made = watched._all_inputs(inputs)
    assert all(torch.equal(made[name], inputs[name]) for name in VIDEO_INPUTS)


class Collector(BaseStreamer):
    def __init__(self, values: list):
        self.values = values

    def put(self, value):
        self.values.append(value)

    def end(self):
        pass


@pytest.mark.parametrize("pruning", PRUNINGS, ids=str)
def test_many_questions_are_answered_as_each_alone(checkpoint, pruning):
    watched = WatchedVideo(checkpoint, CLIP, **pruning)
    for question in [*QUESTIONS, QUESTIONS[0]]:
        alone = answer_question(checkpoint, CLIP, question, max_new_tokens=6, **pruning)
        assert watched.answer(question, max_new_tokens=6).answer == alone.answer


@pytest.mark.parametrize("pruning", PRUNINGS, ids=str)
def test_a_chat_goes_on_as_if_it_were_read_anew(checkpoint, pruning):
    watched, chat = WatchedVideo(checkpoint, CLIP, **pruning), [ask_about(QUESTIONS[0])]
    for question in [*QUESTIONS[1:], None]:
        answer = watched.answer(chat, max_new_tokens=6).answer
        assert answer == WatchedVideo(checkpoint, CLIP, **pruning).answer(chat, max_new_tokens=6).answer
        chat += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]


def num_read(checkpoint, watched, chat) -> int:
    """Tokens that the LLM reads of a prompt."""
    counts = []
    hook = checkpoint.model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: counts.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    watched.answer(chat, max_new_tokens=1)
    hook.remove()
    return counts[0]


@pytest.mark.parametrize("pruning", PRUNINGS, ids=str)
def test_a_video_is_encoded_and_read_once(checkpoint, pruning, monkeypatch):
    encoded = []
    encode = type(checkpoint.model.model).get_video_features
    monkeypatch.setattr(
        type(checkpoint.model.model), "get_video_features", lambda *a, **k: encoded.append(0) or encode(*a, **k)
    )
    watched = WatchedVideo(checkpoint, CLIP, **pruning)
    first, *others = (num_read(checkpoint, watched, question) for question in QUESTIONS)
    assert first > watched.vision_tokens["after"] and max(others) < 30
    assert len(encoded) == 1


def test_a_prompt_that_begins_otherwise_is_read_from_its_beginning(checkpoint):
    watched = WatchedVideo(checkpoint, CLIP)
    watched.answer(QUESTIONS[0], max_new_tokens=2)
    chat = [{"role": "system", "content": "Be brief."}, ask_about(QUESTIONS[0])]
    expected = WatchedVideo(checkpoint, CLIP).answer(chat, max_new_tokens=6).answer
    assert watched.answer(chat, max_new_tokens=6).answer == expected


def test_after_a_beam_search_nothing_is_known(checkpoint, monkeypatch):
    monkeypatch.setattr(checkpoint.model.generation_config, "num_beams", 2)
    watched = WatchedVideo(checkpoint, CLIP)
    for question in QUESTIONS:
        expected = WatchedVideo(checkpoint, CLIP).answer(question, max_new_tokens=6).answer
        assert watched.answer(question, max_new_tokens=6).answer == expected


def test_seconds_are_counted_once(checkpoint):
    watched = WatchedVideo(checkpoint, CLIP)
    assert list(watched.answer(QUESTIONS[0]).seconds) == ["load", "decode", "preprocess", "encode", "generate"]
    assert list(watched.answer(QUESTIONS[1]).seconds) == ["preprocess", "generate"]


def test_a_chat_has_one_video(checkpoint):
    watched = WatchedVideo(checkpoint, CLIP)
    for chat in ([{"role": "user", "content": "What?"}], [ask_about("What?"), ask_about("And?")]):
        with pytest.raises(ValueError, match=rf"The prompt has {2 * (len(chat) - 1)} videos in it; expected one"):
            watched.answer(chat)
    with pytest.raises(ValueError, match="The question ' ' is empty"):
        watched.answer(" ")
