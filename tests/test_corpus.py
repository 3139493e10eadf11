"""A folder of videos to a table of answers: whole, each once, whatever ends the process on the way."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
import stts_molmo.tools.corpus
import torch
from helpers import CLIP, TINY, write_video
from rich.console import Console
from stts_molmo.tools import console
from stts_molmo.tools.answer import WatchedVideo
from stts_molmo.tools.checkpoint import Checkpoint
from stts_molmo.tools.cli import app
from stts_molmo.tools.corpus import COLUMNS, answer_corpus, find_videos
from stts_molmo.tools.tables import Journal, read_rows
from typer.testing import CliRunner

QUESTIONS = ["What color is the still shape?", "Which way does the ball move?"]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint(str(TINY), device="cpu")


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in ("ask", *arguments, "--device", "cpu")])


def make_folder(folder: Path, num_good: int = 2) -> dict[str, bool]:
    """Clips, every fifth of which is broken in one way or another; by name whether it is good."""
    (folder / "more").mkdir(parents=True)
    broken = [b"", b"Not a video.", Path(CLIP).read_bytes()[:300], b"\0" * 3000]
    names = {}
    for number in range(num_good):
        name = f"more/{number:02}.mp4" if number % 3 else f"{number:02}.MP4"
        write_video(folder / name, num_frames=2 + number, size=(32, 32), codec="mpeg4", format="mp4")
        names[name] = True
        if number % 4 == 0:
            bad = f"more/{number:02}-bad.webm"
            (folder / bad).write_bytes(broken[number // 4 % len(broken)])
            names[bad] = False
    (folder / "notes.txt").write_text("Not a video.")
    (folder / "._00.mp4").write_text("What macOS leaves behind.")
    return names


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips") / "few"
    make_folder(folder)
    return folder


def keys(rows: list[dict]) -> list[tuple[str, str]]:
    return [(row["video"], row["question"]) for row in rows]


# Children of one process that has imported everything, and computed nothing, before it has them.
KILL_TWICE = """
import os, signal, sys, time
from pathlib import Path
from stts_molmo.tools.checkpoint import Checkpoint
from stts_molmo.tools.corpus import answer_corpus, find_videos

folder, output, checkpoint = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
journal = output.with_name(output.name + ".partial")
for num_rows in (15, 40, None):
    child = os.fork()
    if not child:
        answer_corpus(Checkpoint(checkpoint, "cpu"), find_videos(folder), sys.argv[4:], output, max_new_tokens=3)
        os._exit(0)
    while num_rows and not (journal.exists() and len(journal.read_bytes().splitlines()) >= num_rows):
        time.sleep(0.01)
    if num_rows:
        os.kill(child, signal.SIGKILL)
        print(len(journal.read_bytes().splitlines()), output.exists())
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills what it forks")
def test_a_run_that_is_killed_twice_answers_every_clip_once(checkpoint, tmp_path):
    folder, output = tmp_path / "clips", tmp_path / "answers.parquet"
    is_good = make_folder(folder, num_good=40)
    assert len(is_good) == 50
    command = [sys.executable, "-c", KILL_TWICE, str(folder), str(output), str(TINY), QUESTIONS[0]]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    first, second = (line.split() for line in process.stdout.splitlines())
    assert 15 <= int(first[0]) < 40 <= int(second[0]) < 50 and first[1] == second[1] == "False"
    rows = read_rows(output)
    assert keys(rows) == [(name, QUESTIONS[0]) for name in sorted(is_good)]
    assert {row["video"]: row["error"] is None for row in rows} == is_good
    assert all((row["answer"] is None) != (row["error"] is None) for row in rows)
    assert [path.name for path in tmp_path.iterdir() if path != folder] == ["answers.parquet"]
    at_once = answer_corpus(checkpoint, find_videos(folder), QUESTIONS[:1], tmp_path / "b.parquet", max_new_tokens=3)
    assert at_once == rows
    assert (tmp_path / "b.parquet").read_bytes() == output.read_bytes()


def test_a_table_has_what_ask_says_of_each_video(folder, tmp_path):
    table = tmp_path / "answers.jsonl"
    (tmp_path / "questions.txt").write_text("\n".join(QUESTIONS))
    options = ["--prune-ratio", 0.7, "--num-frames", 3, "--max-new-tokens", 5]
    result = run(folder, "--questions", tmp_path / "questions.txt", "-o", table, *options)
    assert result.exit_code == 0 and f"Wrote {table}: 4 answers, and 2 errors" in result.stdout
    rows = read_rows(table)
    names = ["00.MP4", "more/00-bad.webm", "more/01.mp4"]
    assert keys(rows) == [(name, question) for name in names for question in QUESTIONS]
    for row in rows:
        assert list(row) == list(COLUMNS)
        assert json.loads(row["options"])["prune_ratio"] == 0.7
        alone = run(folder / row["video"], row["question"], "--json", *options)
        if row["video"] == "more/00-bad.webm":
            assert row["error"].removeprefix("ValueError: ") == alone.stderr.splitlines()[-1].removeprefix("Error: ")
            continue
        answer = json.loads(alone.stdout)
        assert {name: row[name] for name in answer if name in row} == {n: answer[n] for n in answer if n in row}
        assert answer["vision_tokens"] == {"before": row["tokens_before"], "after": row["tokens_after"]}


def test_a_table_grows_by_what_is_new(checkpoint, folder, tmp_path, monkeypatch):
    watched = []
    watch = WatchedVideo.__init__

    def note(self, checkpoint, video, **options):
        watched.append(video)
        watch(self, checkpoint, video, **options)

    monkeypatch.setattr(WatchedVideo, "__init__", note)
    output, videos = tmp_path / "answers.jsonl", find_videos(folder)
    few = dict(list(videos.items())[1:])
    answer_corpus(checkpoint, few, QUESTIONS[:1], output, max_new_tokens=3)
    before, written = output.read_bytes(), output.stat().st_mtime_ns
    answer_corpus(checkpoint, few, QUESTIONS[:1], output, max_new_tokens=3)
    assert len(watched) == 2 and output.stat().st_mtime_ns == written
    rows = answer_corpus(checkpoint, videos, QUESTIONS, output, max_new_tokens=3)
    assert len(watched) == 5  # each once for all that is left
    assert len(rows) == 6 and set(before.splitlines()) < set(output.read_bytes().splitlines())


def test_a_line_that_was_being_written_is_dropped(tmp_path):
    path = tmp_path / "journal"
    path.write_bytes(b'{"video": "a"}\n{"video": "\xc3')
    journal = Journal(path)
    journal.append({"video": "ß"})
    assert journal.rows == Journal(path).rows == [{"video": "a"}, {"video": "ß"}]


def test_what_ended_between_table_and_journal_counts_once(checkpoint, folder, tmp_path, monkeypatch):
    output, videos = tmp_path / "answers.jsonl", find_videos(folder)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", lambda journal: None)
        answer_corpus(checkpoint, videos, QUESTIONS[:1], output, max_new_tokens=3)
    table = output.read_bytes()
    assert (tmp_path / "answers.jsonl.partial").exists()
    answer_corpus(checkpoint, videos, QUESTIONS[:1], output, max_new_tokens=3)
    assert output.read_bytes() == table and not (tmp_path / "answers.jsonl.partial").exists()


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_answers_of_other_options_are_not_mixed(checkpoint, folder, tmp_path, suffix):
    output, videos = tmp_path / f"answers.{suffix}", find_videos(folder)
    answer_corpus(checkpoint, videos, QUESTIONS[:1], output, max_new_tokens=3)
    with pytest.raises(ValueError, match='holds answers of .*, not of .*"prune_ratio": 0.7.*; name another file'):
        answer_corpus(checkpoint, videos, QUESTIONS, output, max_new_tokens=3, prune_ratio=0.7)


def test_parquet_has_types_where_all_is_null(checkpoint, tmp_path):
    (tmp_path / "bad.mp4").touch()
    answer_corpus(checkpoint, find_videos(tmp_path), QUESTIONS, tmp_path / "answers.parquet")
    schema = pyarrow.parquet.read_schema(tmp_path / "answers.parquet")
    assert [str(schema.field(name).type) for name in ("answer", "frames", "prune_ratio")] == [
        "string",
        "int64",
        "double",
    ]


def test_what_is_wrong_with_every_video_is_said_at_once(folder, tmp_path):
    table = tmp_path / "answers.jsonl"
    wrong = {
        "prune_ratio=3": ["--prune-ratio", 3],
        "less than the 9 tokens": ["--max-vision-tokens", 5],
        "exclude each other": ["--max-vision-tokens", 50, "--test-time-scaling", "--num-frames", 3],
    }
    for message, options in wrong.items():
        result = run(folder, QUESTIONS[0], "-o", table, *options)
        assert result.exit_code == 2 and message in result.stderr, result.output
    assert not list(tmp_path.iterdir())


def test_what_does_not_go_together(folder, tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "broken.jsonl").write_text("{")
    (tmp_path / "broken.parquet").write_text("{")
    (tmp_path / "others.jsonl").write_text('{"video": "a.mp4", "question": "What?"}\n')
    (tmp_path / "answers.jsonl.partial").write_text("{}\n[1]\n{")
    (tmp_path / "latin.txt").write_bytes("Où?".encode("latin-1"))
    question = QUESTIONS[0]
    wrong = {
        "is a directory; name a table": [folder, question],
        "takes questions that are known": [folder, "-o", tmp_path / "a.jsonl"],
        "exclude each other": [CLIP, question, "--questions", tmp_path / "q.txt"],
        "--json prints": [folder, question, "--json", "-o", tmp_path / "a.jsonl"],
        "must end in .jsonl or .parquet": [folder, question, "-o", tmp_path / "a.csv"],
        "is a directory": [folder, question, "-o", tmp_path / "folder.jsonl"],
        "There is no directory": [folder, question, "-o", tmp_path / "no/a.jsonl"],
        "There is no video in": [tmp_path / "folder.jsonl", question, "-o", tmp_path / "a.jsonl"],
        "others.jsonl holds other rows": [folder, question, "-o", tmp_path / "others.jsonl"],
        "answers.jsonl.partial holds no rows": [folder, question, "-o", tmp_path / "answers.jsonl"],
        "is no text in UTF-8": [CLIP, "--questions", tmp_path / "latin.txt"],
        "broken.jsonl holds no rows": [folder, question, "-o", tmp_path / "broken.jsonl"],
        "broken.parquet holds no rows": [folder, question, "-o", tmp_path / "broken.parquet"],
    }
    for message, arguments in wrong.items():
        result = run(*arguments)
        assert result.exit_code == 2 and message in result.stderr, result.output
    assert (tmp_path / "answers.jsonl.partial").read_text() == "{}\n[1]\n{"  # nothing of it was touched


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take no such names")
def test_a_name_that_is_no_text(checkpoint, tmp_path):
    for name in (b"caf\xe9.mp4", "café.mp4".encode()):
        shutil.copy(CLIP, tmp_path / os.fsdecode(name))
    for suffix in ("jsonl", "parquet"):
        output = tmp_path / f"answers.{suffix}"
        rows = answer_corpus(checkpoint, find_videos(tmp_path), QUESTIONS[:1], output, max_new_tokens=3)
        assert rows == read_rows(output) and [row["error"] for row in rows] == [None, None]
        assert [row["video"] for row in rows] == [r"caf\xe9.mp4", "café.mp4"]


def test_without_pyarrow(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    result = run(folder, QUESTIONS[0], "-o", tmp_path / "answers.parquet")
    assert result.exit_code == 2 and "pip install 'stts-molmo[parquet]'" in result.stderr


def test_a_device_that_is_lost_ends_the_run(checkpoint, folder, tmp_path, monkeypatch):
    def lose(*arguments, **options):
        raise torch.AcceleratorError("device-side assert")

    monkeypatch.setattr(stts_molmo.tools.corpus, "WatchedVideo", lose)
    with pytest.raises(torch.AcceleratorError):
        answer_corpus(checkpoint, find_videos(folder), QUESTIONS, tmp_path / "answers.jsonl")
    assert not list(tmp_path.iterdir())


def test_a_person_at_a_terminal_sees_how_far_it_is(checkpoint, folder, tmp_path, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(console, "stderr", Console(file=screen, force_terminal=True, width=120))
    answer_corpus(checkpoint, find_videos(folder), QUESTIONS, tmp_path / "answers.jsonl", max_new_tokens=3)
    assert "answers" in screen.getvalue() and "6/6" in screen.getvalue() and not console.BARS
