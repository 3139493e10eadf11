"""Transformers' pipelines, as a user calls them for video question answering."""

import pytest
from helpers import ROOT, TINY
from transformers import pipeline


def chat(clip: str, question: str) -> list[dict]:
    video = {"type": "video", "path": str(ROOT / "examples" / "clips" / clip)}
    return [{"role": "user", "content": [video, {"type": "text", "text": question}]}]


@pytest.fixture(scope="module", params=["image-text-to-text", "any-to-any"])
def ask(request):
    return pipeline(request.param, model=str(TINY), trust_remote_code=True)


OPTIONS = {"max_new_tokens": 6, "return_full_text": False}


def test_one_chat_and_a_list_of_chats(ask):
    chats = [chat("quiet.mp4", "What color is the still shape?"), chat("busy.mp4", "What color is the ball?")]
    alone = [ask(text=messages, **OPTIONS)[0]["generated_text"] for messages in chats]
    together = [result[0]["generated_text"] for result in ask(text=chats, **OPTIONS)]
    assert together == alone and all(isinstance(answer, str) and answer for answer in alone)


@pytest.fixture
def seen(ask):
    """Of each call: frames that the vision tower saw, and how many tokens it kept."""
    calls = []

    def note(module, args, kwargs):
        calls.append((len(args[0]), sum(kwargs["num_kept"])))

    hook = ask.model.model.vision_tower.register_forward_pre_hook(note, with_kwargs=True)
    yield calls
    hook.remove()


QUESTION = chat("quiet.mp4", "Where is the still shape?")


def test_arguments_of_the_processor_and_of_generate(ask, seen):
    ask(text=QUESTION, **OPTIONS, processor_kwargs={"num_frames": 4}, generate_kwargs={"prune_ratio": 0.25})
    assert seen == [(4, 27)]


def test_ratio_and_method_of_the_generation_config(ask, seen, monkeypatch):
    monkeypatch.setattr(ask.model.generation_config, "prune_ratio", 0.25, raising=False)
    ask(text=QUESTION, **OPTIONS, processor_kwargs={"num_frames": 4})
    monkeypatch.setattr(ask.model.generation_config, "method", "foo", raising=False)
    with pytest.raises(ValueError, match="method='foo' is unknown"):
        ask(text=QUESTION, **OPTIONS)
    assert seen == [(4, 27)]


@pytest.mark.parametrize(
    ("name", "value"), [("prune_ratio", 0.9), ("prune_ratio", 3), ("method", "foo"), ("max_vision_tokens", 9)]
)
def test_options_of_the_model_are_refused_where_they_would_be_ignored(ask, name, value):
    """An argument that a pipeline does not know goes to the processor."""
    for arguments in ({name: value}, {"processor_kwargs": {name: value}}):
        with pytest.raises(ValueError, match=f"{name}={value!r} has no effect in a processor.*generate_kwargs="):
            ask(text=QUESTION, **OPTIONS, **arguments)


def test_a_batch_is_passed_as_a_list_of_chats(ask):
    """Transformers' pipelines cannot put the videos of several chats into one batch."""
    with pytest.raises(ValueError, match="leave batch_size out and pass a list of chats"):
        ask(text=[QUESTION, QUESTION], **OPTIONS, batch_size=2)


def test_a_question_without_a_video(ask):
    messages = [{"role": "user", "content": [{"type": "text", "text": "What color is the still shape?"}]}]
    assert ask(text=messages, **OPTIONS)[0]["generated_text"]
