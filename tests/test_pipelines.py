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


def test_arguments_of_the_processor_and_of_generate(ask):
    frames = []
    hook = ask.model.model.vision_tower.register_forward_pre_hook(lambda module, args: frames.append(len(args[0])))
    messages = chat("quiet.mp4", "Where is the still shape?")
    ask(text=messages, **OPTIONS, processor_kwargs={"num_frames": 4}, generate_kwargs={"prune_ratio": 0.25})
    hook.remove()
    assert frames == [4]


def test_a_question_without_a_video(ask):
    messages = [{"role": "user", "content": [{"type": "text", "text": "What color is the still shape?"}]}]
    assert ask(text=messages, **OPTIONS)[0]["generated_text"]
