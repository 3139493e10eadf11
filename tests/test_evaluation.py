"""`stts-molmo eval`: rows, how answers are read, intervals; a run that is killed, and one on two processes."""

import csv
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import CLIP, ROOT, TINY, load_processor, make_tokenized_model
from stts_molmo.tools import evaluation
from stts_molmo.tools.answer import answer_question
from stts_molmo.tools.checkpoint import Checkpoint
from stts_molmo.tools.cli import app
from stts_molmo.tools.conversion import initial_scorer
from stts_molmo.tools.evaluation import Row, evaluate, paired_difference, plan_settings, read_rows, wilson
from stts_molmo.tools.publishing import results_table
from typer.testing import CliRunner

BUSY = str(Path(CLIP).with_name("busy.mp4"))
QUESTIONS = [
    {"video": CLIP, "question": "Which shape stands still?", "options": None, "answer": "triangle"},
    {"video": CLIP, "question": "What color is the still shape?", "options": ["red", "green"], "answer": "B"},
    {"video": "missing.mp4", "question": "What color is the still shape?", "options": None, "answer": "red"},
    {"video": BUSY, "question": "What color is the still shape?", "options": None, "answer": "Green."},
    {"video": CLIP, "question": "Where is the still shape?", "options": None, "answer": "left"},
]
SETTINGS = {"num_frames": [8, 4], "prune_ratios": [0, 0.5], "methods": ["scorer", "random"], "max_vision_tokens": [20]}
FLAGS = ["--num-frames=8", "--num-frames=4", "--prune-ratio=0", "--prune-ratio=0.5", "--max-vision-tokens=20"]
FLAGS += ["--method=scorer", "--method=random"]


def write_rows(path: Path, rows: list[dict] = QUESTIONS) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=rows[0])
            writer.writeheader()
            writer.writerows(row | {"options": row["options"] and json.dumps(row["options"])} for row in rows)
    return path


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint(str(TINY), "cpu")


@pytest.fixture(scope="module")
def alone(checkpoint, tmp_path_factory) -> dict:
    """What one process finds, undisturbed."""
    folder = tmp_path_factory.mktemp("alone")
    rows = write_rows(folder / "rows.jsonl")
    return evaluate(checkpoint, rows, plan_settings(checkpoint, **SETTINGS), folder / "result.json")


# ----------------------------------------------------------------------------------------------------------------------
# Rows
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_rows_of_any_kind_of_file(kind, tmp_path):
    rows = read_rows(write_rows(tmp_path / f"rows.{kind}", [*QUESTIONS, {**QUESTIONS[0], "answer": "None"}]))
    assert rows[0] == Row(CLIP, "Which shape stands still?", (), "triangle")
    assert rows[1] == Row(CLIP, "What color is the still shape?", ("red", "green"), "B")
    assert rows[2].video == str(tmp_path / "missing.mp4")
    assert len(rows) == 6 and rows[5].answer == "None"


def test_the_answer_may_be_the_text_of_an_option():
    row = {"video": "https://example.org/a.mp4", "question": "Which?", "options": [3, 12], "answer": 12}
    assert evaluation.parse_row(row, Path("folder")) == Row("https://example.org/a.mp4", "Which?", ("3", "12"), "B")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": None}, "Row 2 of .* has no answer"),
        ({"question": ""}, "has no question"),
        ({"options": ["red", "green"], "answer": "C"}, "'C', which is none of its 2 options"),
        ({"options": ["B", "A"], "answer": "A"}, "'A', which is several of its 2 options"),
        ({"options": ["red"], "answer": "A"}, r"options=\['red'\]; expected a list of 2 to 26"),
        ({"options": list(map(str, range(27))), "answer": "3"}, "a list of 2 to 26"),
    ],
)
def test_a_row_that_lacks_something(change, message, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [QUESTIONS[0], {**QUESTIONS[0], **change}])
    with pytest.raises(ValueError, match=message):
        read_rows(rows)


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*rows.jsonl"):
        read_rows(tmp_path / "rows.jsonl")
    (tmp_path / "rows.txt").touch()
    with pytest.raises(ValueError, match="must end in .csv, .json, .jsonl, .parquet"):
        read_rows(tmp_path / "rows.txt")
    (tmp_path / "rows.jsonl").write_text('{"video": ')
    with pytest.raises(ValueError, match="cannot be read as json"):
        read_rows(tmp_path / "rows.jsonl")
    (tmp_path / "rows.csv").write_text("video,question,answer,options\na.mp4,Which?,A,red or green\n")
    with pytest.raises(ValueError, match="options='red or green'; expected a list"):
        read_rows(tmp_path / "rows.csv")


# ----------------------------------------------------------------------------------------------------------------------
# Answers
# ----------------------------------------------------------------------------------------------------------------------


def test_the_prompt_of_a_multiple_choice():
    lines = Row("a.mp4", "Which?", ("a ring", "a star"), "B").prompt().splitlines()
    assert lines[:3] == ["Which?", "A. a ring", "B. a star"] and "letter" in lines[3] and len(lines) == 4
    assert Row("a.mp4", "Which?", (), "B").prompt() == "Which?"


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" b \n", "B"),
        ("B.", "B"),
        ("B. a star", "B"),
        ("(b) a star", "B"),
        ("B, because", "B"),
        ("The answer is B.", "B"),
        ("The best option is (C)", "C"),
        ("Answer: A", "A"),
        ("A Star.", "B"),
        ("a  ring", "A"),
        ("a shape", None),
        ("D", None),
        ("", None),
        ("Both", None),
    ],
)
def test_how_a_letter_is_read(text, letter):
    row = Row("a.mp4", "Which?", ("a ring", "a star", "a cube"), "B")
    assert row.read(text) == letter
    assert row.is_right(text) == (letter == "B")


def test_the_text_of_two_options_is_neither():
    assert Row("a.mp4", "Which?", ("ring", "Ring.", "star"), "A").read("ring") is None


def test_how_an_open_answer_is_read():
    row = Row("a.mp4", "Which?", (), "A  ring.")
    assert row.read(" a Ring ") == "a ring"
    assert row.is_right("a RING.") and not row.is_right("ring") and not row.is_right("")


# ----------------------------------------------------------------------------------------------------------------------
# Intervals
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "total"), [(8, 10), (1, 3), (500, 1000)])
def test_wilson_ends_where_what_was_seen_is_just_likely(right, total):
    for share in wilson(right, total):
        spread = (share * (1 - share) / total) ** 0.5
        assert abs(right / total - share) == pytest.approx(1.959964 * spread)
    assert wilson(8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)


def test_wilson_at_its_ends():
    assert wilson(0, 10) == pytest.approx([0, 0.2775], abs=1e-4)
    assert wilson(10, 10) == pytest.approx([0.7225, 1], abs=1e-4)
    assert wilson(0, 0) is None


def test_paired_difference_is_walds_on_a_table_with_half_an_observation_more_in_each_cell():
    gained, lost, same = 5, 15, 80
    difference, interval = paired_difference(100, gained, lost)
    assert difference == pytest.approx(-0.1)
    # As counts of halves: each question twice, and one more in each of the four cells.
    halves = torch.tensor([1.0] * (2 * gained + 1) + [-1.0] * (2 * lost + 1) + [0.0] * (2 * same + 2)).double()
    half = 1.959964 * (halves.var(correction=0) / 102).sqrt()
    assert interval == pytest.approx([(halves.mean() - half).item(), (halves.mean() + half).item()])
    assert paired_difference(0, 0, 0) == (None, None)
    low, high = paired_difference(10, 0, 0)[1]
    assert low == -high < 0  # ten questions alike prove nothing of the eleventh


# ----------------------------------------------------------------------------------------------------------------------
# A whole run
# ----------------------------------------------------------------------------------------------------------------------


def test_settings_are_each_tried_once(checkpoint):
    settings = plan_settings(checkpoint, **SETTINGS)
    assert [(frames, *pruning) for frames, pruning in settings] == [
        (frames, *pruning)
        for frames in (8, 4)
        for pruning in (
            ("none", 0.0, None),
            ("scorer", 0.5, None),
            ("random", 0.5, None),
            ("scorer", 0.0, 20),
            ("random", 0.0, 20),
        )
    ]
    assert plan_settings(checkpoint) == [(8, checkpoint.config.stts_config.pruning())]
    with pytest.raises(ValueError, match="prune_ratio=2"):
        plan_settings(checkpoint, prune_ratios=[2])


def test_answers_are_those_of_ask(checkpoint, alone):
    rows = [Row(q["video"], q["question"], tuple(q["options"] or ()), q["answer"]) for q in QUESTIONS]
    settings = plan_settings(checkpoint, **SETTINGS)
    for number in (0, 1, 3, 4):
        for setting, record in zip(settings, alone["answers"][number]["settings"], strict=True):
            if setting.pruning.max_vision_tokens:
                assert record["vision_tokens"]["after"] == 20
                continue
            method, prune_ratio, _ = setting.pruning
            given = {"method": method, "prune_ratio": prune_ratio, "num_frames": setting.num_frames}
            row = rows[number]
            expected = answer_question(checkpoint, row.video, row.prompt(), **given, max_new_tokens=16)
            assert record["answer"] == expected.answer
            assert record["frames"] == expected.frames
            assert record["vision_tokens"] == expected.vision_tokens
            assert record["right"] == row.is_right(expected.answer)


def test_the_table_counts_the_answers(alone):
    names = ("frames", "method", "prune_ratio", "max_vision_tokens")
    assert [tuple(row[name] for name in names) for row in alone["rows"][:4]] == [
        (8, "none", 0.0, None),
        (8, "scorer", 0.5, None),
        (8, "random", 0.5, None),
        (8, "scorer", None, 20),
    ]
    first = [answer["settings"][0].get("right") for answer in alone["answers"]]
    for index, row in enumerate(alone["rows"]):
        records = [answer["settings"][index] for answer in alone["answers"]]
        right = [record.get("right") for record in records]
        assert right[2] is None and "missing.mp4" in records[2]["error"]
        assert (row["questions"], row["failed"]) == (4, 1)
        assert row["accuracy"] == right.count(True) / 4 and row["accuracy_95"] == wilson(right.count(True), 4)
        assert row["vision_tokens"] == [72, 36, 36, 20, 20, 36, 18, 18, 20, 20][index]
        assert row["unread"] == sum("read" in record and record["read"] is None for record in records)
        if index:
            assert row["difference"] == pytest.approx((right.count(True) - first.count(True)) / 4)
    assert alone["rows"][0]["difference"] is None and alone["rows"][0]["accuracy"] > 0
    assert all(set(seconds) == {"decode", "preprocess", "encode", "generate"} for seconds in alone["seconds"])


def test_a_video_is_decoded_once_for_each_number_of_frames_and_encoded_once_for_each_setting(checkpoint, monkeypatch):
    decoded, encoded = [], []

    def recorded(calls, function):
        return lambda *args, **kwargs: calls.append(kwargs) or function(*args, **kwargs)

    monkeypatch.setattr(evaluation, "read_clip", recorded(decoded, evaluation.read_clip))
    monkeypatch.setattr(evaluation, "WatchedVideo", recorded(encoded, evaluation.WatchedVideo))
    rows = [Row(CLIP, question, (), "red") for question in ("Which?", "Where?")]
    evaluation.answer_rows(checkpoint, rows, plan_settings(checkpoint, **SETTINGS), 4)
    assert [call["num_frames"] for call in decoded] == [8, 4]
    assert [call["num_frames"] for call in encoded] == 5 * [8] + 5 * [4]


def test_a_run_that_was_killed_goes_on(checkpoint, alone, tmp_path, monkeypatch):
    """Video by video."""
    rows, output = write_rows(tmp_path / "rows.jsonl"), tmp_path / "result.json"
    settings = plan_settings(checkpoint, **SETTINGS)
    asked, kill_after = [], 2
    answer_rows = evaluation.answer_rows

    def answer(checkpoint, rows, *arguments):
        if len(asked) == kill_after:
            raise KeyboardInterrupt
        asked.append([row.question for row in rows])
        return answer_rows(checkpoint, rows, *arguments)

    monkeypatch.setattr(evaluation, "answer_rows", answer)
    with pytest.raises(KeyboardInterrupt):
        evaluate(checkpoint, rows, settings, output)
    (journal,) = tmp_path.glob("result.json.partial/*/0.jsonl")
    with journal.open("a") as file:
        file.write('{"rows": [[0, ')  # as if it had been killed while it wrote
    assert not output.exists() and [len(questions) for questions in asked] == [3, 1]

    kill_after = 4
    with pytest.raises(KeyboardInterrupt):  # another run, which takes none of these
        evaluate(checkpoint, rows, settings[:2], output)
    assert asked[2:] == asked[:2]
    kill_after = None
    result = evaluate(checkpoint, rows, settings, output)
    assert asked[4:] == [[QUESTIONS[3]["question"]]]
    assert result["rows"] == alone["rows"] and result == json.loads(output.read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.json", "rows.jsonl"]


def test_nothing_to_count(checkpoint, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", QUESTIONS[2:3])
    with pytest.raises(ValueError, match="None of the 1 rows .* could be answered: .*missing.mp4"):
        evaluate(checkpoint, rows, plan_settings(checkpoint), tmp_path / "result.json")


def test_a_card_takes_the_result(alone, tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(alone))
    head, _, *lines = results_table(tmp_path / "result.json").splitlines()
    assert "| method | prune_ratio |" in head and len(lines) == 10 and "| random | 0.5 |" in lines[2]


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------


def test_two_processes_give_the_same_table(alone, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "stts_molmo", "eval", str(TINY), str(rows), "-o", str(tmp_path / "r.json"), *FLAGS]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            command, env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE
        )
        for rank in range(2)
    ]
    table, nothing = (process.communicate(timeout=300)[0].decode() for process in processes)
    assert [process.returncode for process in processes] == [0, 0] and not nothing
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["processes"] == 2 and alone["processes"] == 1
    assert result["rows"] == alone["rows"]
    one = CliRunner().invoke(app, ["eval", str(TINY), str(rows), "-o", str(tmp_path / "one.json"), *FLAGS])
    assert one.exit_code == 0, one.output
    assert table.split("\n\n")[0] == one.stdout.split("\n\n")[0] and "against the first" in table
    assert "1 of 5 questions failed" in one.stderr


def test_mistakes_are_told(tmp_path):
    untrained = make_tokenized_model()
    untrained.load_state_dict(initial_scorer(untrained.config, untrained.dtype, seed=0), strict=False)
    untrained.save_pretrained(tmp_path / "untrained")
    load_processor().save_pretrained(tmp_path / "untrained")
    rows = write_rows(tmp_path / "rows.jsonl", QUESTIONS[:1])
    output = tmp_path / "result.json"
    for arguments, message in {
        (str(TINY), str(rows), "-o", str(tmp_path / "nowhere" / "a.json")): "directory that is there",
        (str(TINY), str(tmp_path / "none.jsonl"), "-o", str(output)): "There is no file",
        (str(tmp_path / "untrained"), str(rows), "-o", str(output), "--device", "cpu"): "--allow-untrained",
        (str(TINY), str(rows), "-o", str(output), "--method", "cosin"): "'cosin' is unknown",
    }.items():
        result = CliRunner().invoke(app, ["eval", *arguments])
        assert result.exit_code == 2 and message in result.stderr, result.output
    arguments = ["eval", str(tmp_path / "untrained"), str(rows), "-o", str(output), "--allow-untrained"]
    assert CliRunner().invoke(app, arguments).exit_code == 0


def test_the_commands_of_the_page(tmp_path, monkeypatch):
    for name in ("checkpoints", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash run\n(.*?)```", page, re.DOTALL)
    assert blocks
    for block in blocks:
        program, *arguments = shlex.split(block.replace("\\\n", " "))
        result = CliRunner().invoke(app, arguments)
        assert program == "stts-molmo" and result.exit_code == 0, result.output
        assert len(json.loads(Path("evaluation.json").read_text())["rows"]) == 6


def test_commands_of_the_page_that_are_not_run_have_options_that_exist():
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    calls = re.findall(r"^(?:torchrun .* -m stts_molmo|stts-molmo) (eval|benchmark) (.*)$", page, re.MULTILINE)
    assert len(calls) == 4
    for command, arguments in calls:
        options = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
        for option in re.findall(r"--[\w-]+", arguments):
            assert option in options, option
