"""One video and many questions: each road to an answer gives the same one, and a video is watched once."""

import json
import re
import shutil
from pathlib import Path

import pytest
import stts_molmo.tools.conversation
import torch
from helpers import CLIP, TINY, load_processor
from hypothesis import given
from hypothesis import strategies as st
from stts_molmo.generation_stts_molmo import VIDEO_INPUTS
from stts_molmo.pruning_stts_molmo import num_kept_tokens
from stts_molmo.tools.answer import WatchedVideo, answer_question, ask_about, ratio_of
from stts_molmo.tools.checkpoint import Checkpoint
from stts_molmo.tools.cli import app
from stts_molmo.tools.conversation import Conversation
from stts_molmo.tools.tables import read_rows
from transformers import GenerationConfig, pipeline
from transformers.generation.streamers import BaseStreamer
from typer.testing import CliRunner

QUESTIONS = ["What color is the still shape?", "Which way does the ball move?", "What color is the ball?"]
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


def test_what_nobody_asks_for_is_that_of_the_generation_config(tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "checkpoint")
    GenerationConfig(eos_token_id=2, pad_token_id=0, prune_ratio=0.25, method="random").save_pretrained(folder)
    checkpoint = Checkpoint(str(folder), device="cpu")
    answer = answer_question(checkpoint, CLIP, QUESTIONS[0])
    assert (answer.prune_ratio, answer.method, answer.vision_tokens["after"]) == (0.25, "random", 54)
    asked = answer_question(checkpoint, CLIP, QUESTIONS[0], max_vision_tokens=20)
    assert (asked.max_vision_tokens, asked.method, asked.vision_tokens["after"]) == (20, "random", 20)
    watched = WatchedVideo(checkpoint, CLIP)
    generated = checkpoint.model.find_pruning()
    assert generated == {"prune_ratio": 0.25, "method": "random", "max_vision_tokens": None}
    assert watched.pruning == checkpoint.config.stts_config.pruning(**generated)


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


def assert_as_if_read_anew(watched: WatchedVideo, chat, **pruning) -> str:
    """The answer, and what the LLM then remembers, are those of one that has read nothing before."""
    anew = WatchedVideo(watched.checkpoint, CLIP, **pruning)
    answer = watched.answer(chat, max_new_tokens=6).answer
    assert answer == anew.answer(chat, max_new_tokens=6).answer
    assert torch.equal(watched._read, anew._read)
    for layer, expected in zip(watched._cache.layers, anew._cache.layers, strict=True):
        torch.testing.assert_close(layer.keys, expected.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(layer.values, expected.values, atol=1e-4, rtol=1e-4)
    return answer


@pytest.mark.parametrize("pruning", PRUNINGS, ids=str)
def test_many_questions_are_answered_as_each_alone(checkpoint, pruning):
    watched = WatchedVideo(checkpoint, CLIP, **pruning)
    for question in [*QUESTIONS, QUESTIONS[-1], QUESTIONS[0]]:
        assert_as_if_read_anew(watched, question, **pruning)


@pytest.mark.parametrize("pruning", PRUNINGS, ids=str)
def test_a_chat_goes_on_as_if_it_were_read_anew(checkpoint, pruning):
    watched, chat = WatchedVideo(checkpoint, CLIP, **pruning), [ask_about(QUESTIONS[0])]
    for question in [*QUESTIONS[1:], None]:
        answer = assert_as_if_read_anew(watched, chat, **pruning)
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
        assert num_read(checkpoint, watched, question) > watched.vision_tokens["after"]


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


# ----------------------------------------------------------------------------------------------------------------------
# A conversation
# ----------------------------------------------------------------------------------------------------------------------


def run(*arguments, **options):
    return CliRunner().invoke(app, [str(argument) for argument in ("ask", *arguments, "--device", "cpu")], **options)


def test_a_conversation_is_the_chat_of_its_questions_and_answers(checkpoint):
    conversation = Conversation(WatchedVideo(checkpoint, CLIP))
    answers = [conversation.ask(question, max_new_tokens=6).answer for question in QUESTIONS]
    assert [message["role"] for message in conversation.messages] == 3 * ["user", "assistant"]
    texts = [message["content"][-1]["text"] for message in conversation.messages]
    assert texts == [text for pair in zip(QUESTIONS, answers, strict=True) for text in pair]
    alone = WatchedVideo(checkpoint, CLIP).answer(conversation.messages[:-1], max_new_tokens=6)
    assert alone.answer == answers[-1]
    with pytest.raises(ValueError, match="empty"):
        conversation.ask("")
    assert len(conversation.messages) == 6


def test_questions_that_come_in_by_a_pipe(checkpoint):
    conversation = Conversation(WatchedVideo(checkpoint, CLIP))
    expected = [conversation.ask(question).answer for question in QUESTIONS]
    result = run(CLIP, input="\n".join([QUESTIONS[0], "", *QUESTIONS[1:]]))
    assert (result.exit_code, result.stdout.splitlines()) == (0, expected)
    assert result.stderr.count("8 frames, vision tokens 72 -> 36 (method scorer, prune ratio 0.5), seconds: load") == 1
    rows = list(map(json.loads, run(CLIP, "--json", input="\n".join(QUESTIONS)).stdout.splitlines()))
    assert [(row["question"], row["answer"]) for row in rows] == list(zip(QUESTIONS, expected, strict=True))


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_questions_that_a_person_types(end, monkeypatch, capsys):
    typed = iter([QUESTIONS[0], " ", f" {QUESTIONS[1]} "])
    asked = []

    def type_a_line(prompt):
        asked.append(prompt)
        try:
            return next(typed)
        except StopIteration:
            raise end from None

    class Terminal:
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", type_a_line)
    assert list(stts_molmo.tools.conversation.typed_questions()) == QUESTIONS[:2]
    assert asked == 4 * ["> "]


def test_no_question_came_in():
    result = run(CLIP, input="")
    assert (result.exit_code, result.stdout) == (2, "") and "No question came in" in result.stderr


@pytest.mark.parametrize("kind", ["lines", "objects"])
def test_a_file_of_questions(checkpoint, kind, tmp_path):
    file = tmp_path / "questions.txt"
    line = {"lines": str, "objects": lambda question: json.dumps({"question": question, "id": 3})}[kind]
    file.write_text("\n\n".join(map(line, [*QUESTIONS, QUESTIONS[0]])))
    watched = WatchedVideo(checkpoint, CLIP)
    expected = [watched.answer(question).answer for question in QUESTIONS]
    lines = run(CLIP, "--questions", file).stdout.splitlines()
    assert lines == [line for pair in zip(QUESTIONS, expected, strict=True) for line in (f"> {pair[0]}", pair[1])]
    rows = list(map(json.loads, run(CLIP, "--questions", file, "--json").stdout.splitlines()))
    assert [(row["question"], row["answer"]) for row in rows] == list(zip(QUESTIONS, expected, strict=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n", "There is no question in"),
        ('What?\n{"text": "What?"}', "Line 2 of .* is no JSON object with a `question`"),
        ('{"question": 3}', "Line 1 of"),
        ("{What?", "Line 1 of"),
        (None, "No such file"),
    ],
)
def test_a_file_without_questions(text, message, tmp_path):
    file = tmp_path / "questions.txt"
    if text is not None:
        file.write_text(text)
    result = run(CLIP, "--questions", file)
    assert result.exit_code == 2
    assert re.search(message, result.stderr)


# ----------------------------------------------------------------------------------------------------------------------
# All roads
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pruning", [{"prune_ratio": 0.4}, {"max_vision_tokens": 30, "method": "cosine"}], ids=str)
def test_each_road_gives_the_same_answer(checkpoint, pruning, tmp_path):
    """The same video, question, pruning and frames, by whatever road."""
    question, num_frames, longest = QUESTIONS[1], 6, 6
    flags = [str(x) for name, value in pruning.items() for x in (f"--{name.replace('_', '-')}", value)]
    flags += ["--num-frames", str(num_frames), "--max-new-tokens", str(longest)]
    file = tmp_path / "questions.txt"
    file.write_text(question)
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "quiet.mp4").write_bytes(Path(CLIP).read_bytes())
    tables = [tmp_path / "answers.jsonl", tmp_path / "answers.parquet"]
    for table in tables:
        assert run(tmp_path / "clips", question, "-o", table, *flags).exit_code == 0

    content = [{"type": "video", "path": CLIP}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    model, processor = checkpoint.model, checkpoint.processor
    inputs = processor.apply_chat_template(
        chat,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_frames": num_frames},
    )
    sequences = model.generate(**inputs, max_new_tokens=longest, **pruning)
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    options = {"max_new_tokens": longest, "return_full_text": False, "generate_kwargs": pruning}
    answers = {
        "generate": processor.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True),
        "pipeline": pipe(text=chat, processor_kwargs={"num_frames": num_frames}, **options)[0]["generated_text"],
        "ask": run(CLIP, question, *flags).stdout.splitlines()[0],
        "ask --json": json.loads(run(CLIP, question, *flags, "--json").stdout)["answer"],
        "conversation": run(CLIP, *flags, input=question).stdout.strip(),
        "questions": run(CLIP, "--questions", file, *flags).stdout.splitlines()[1],
        "JSON Lines": read_rows(tables[0])[0]["answer"],
        "parquet": read_rows(tables[1])[0]["answer"],
    }
    assert len(set(answers.values())) == 1 and answers["ask"], answers
