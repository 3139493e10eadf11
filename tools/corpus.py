"""The same questions about many videos: a table of answers that grows, whatever ends the process on the way."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .answer import MAX_NEW_TOKENS, WatchedVideo, require_usable
from .checkpoint import Checkpoint
from .console import progress_bar
from .tables import Journal, read_rows, require_table, write_rows

# Files by these names in a folder are videos; any other format can be named itself.
VIDEO_SUFFIXES = {
    *(".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf"),
    *(".ogv", ".ts", ".vob", ".webm", ".wmv"),
}
# Of a video that cannot be used all but `video`, `question`, `error` and `options` are `None`, of others `error` is.
COLUMNS = {
    "video": str,
    "question": str,
    "answer": str,
    "error": str,
    "frames": int,
    "method": str,
    "prune_ratio": float,
    "max_vision_tokens": int,
    "tokens_before": int,
    "tokens_after": int,
    "options": str,
}


def find_videos(folder: Path) -> dict[str, Path]:
    """
    The videos in a folder and those in it, by their paths within it, in order; hidden ones aside.

    Raises:
        ValueError: there are none.
    """
    paths = [path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()]
    # A name that is no UTF-8 is written with escapes: no table could hold it as it is.
    videos = {os.fsencode(path.relative_to(folder)).decode("utf-8", "backslashreplace"): path for path in paths}
    videos = {name: videos[name] for name in sorted(videos) if not f"/{name}".count("/.")}
    if not videos:
        raise ValueError(f"There is no video in {folder}; its name would end in {', '.join(sorted(VIDEO_SUFFIXES))}.")
    return videos


def read_questions(file: Path) -> list[str]:
    """
    The questions in a file, one a line; of lines that are JSON objects their `question`. Each comes once.

    Raises:
        OSError: there is no such file.
        ValueError: it holds no question, or a line is an object without one.
    """
    questions = []
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8 ({error}); save it as such.") from error
    for number, line in enumerate(lines, start=1):
        question = line.strip()
        if question.startswith("{"):
            try:
                question = json.loads(question)["question"].strip()
            except (ValueError, LookupError, AttributeError) as error:
                raise ValueError(
                    f'Line {number} of {file} is no JSON object with a `question`; write {{"question": "..."}}, or the '
                    "question alone."
                ) from error
        if question:
            questions.append(question)
    if not questions:
        raise ValueError(f"There is no question in {file}; write one a line.")
    return list(dict.fromkeys(questions))


class Task(NamedTuple):
    """What is left to be done about a video."""

    name: str  # stands for it in the table
    video: str
    questions: list[str]


def answer_corpus(
    checkpoint: Checkpoint, videos: dict[str, Path], questions: Sequence[str], output: Path, **options
) -> list[dict]:
    """
    Ask each question about each video, see [`grow_table`].

    Args:
        videos: by the names that stand for them in the table.
        options: of [`answer_video`].

    Raises:
        OSError, ValueError: checkpoint, options or `output` are not usable.
    """
    require_usable(checkpoint, **options)

    def answer(tasks: list[Task]) -> Iterator[dict]:
        for task in tasks:
            yield from answer_video(checkpoint, task, **options)

    settings = describe_options(checkpoint.path, dtype=checkpoint.dtype, **options)
    return grow_table(output, videos, questions, settings, answer)


def grow_table(
    output: Path,
    videos: dict[str, Path],
    questions: Sequence[str],
    settings: str,
    answer: Callable[[list[Task]], Iterable[dict]],
) -> list[dict]:
    """
    Add the rows that a table does not have yet. They are gathered in a file beside it, one by one, so that a process
    that was ended at any time is taken up by the next; the table itself is written whole, at the end.

    Args:
        output: JSON Lines or parquet by its name, with rows of `COLUMNS`; need not exist.
        settings: what [`describe_options`] says.
        answer: gives the rows of tasks, in any order.

    Returns:
        All rows, by video and question.

    Raises:
        OSError, ValueError: `output` cannot be written or read, or was made with other options.
    """
    require_table(output)
    known, journal = read_rows(output), Journal(output.with_name(f"{output.name}.partial"))
    if not all(row.keys() == COLUMNS.keys() for row in [*known, *journal.rows]):
        raise ValueError(f"{output} holds other rows than answers; name another file.")
    rows = {(row["video"], row["question"]): row for row in [*known, *journal.rows]}
    for other in {row["options"] for row in rows.values()} - {settings}:
        raise ValueError(f"{output} holds answers of {other}, not of {settings}; name another file, or remove it.")
    todo = {name: [question for question in questions if (name, question) not in rows] for name in videos}
    tasks = [Task(name, str(videos[name]), left) for name, left in todo.items() if left]
    if tasks or journal.rows:
        with progress_bar("answers", len(videos) * len(questions), sum(map(len, todo.values()))) as advance:
            for row in answer(tasks):
                journal.append(row)
                rows[row["video"], row["question"]] = row
                advance()
    order = {question: number for number, question in enumerate(questions)}
    table = sorted(rows.values(), key=lambda row: (row["video"], order.get(row["question"], -1)))
    if journal.rows:
        write_rows(table, COLUMNS, output)
    journal.remove()
    return table


def answer_video(
    checkpoint: Checkpoint, task: Task, *, max_new_tokens: int = MAX_NEW_TOKENS, **options
) -> Iterator[dict]:
    """
    A row of `COLUMNS` for each question about a video, which is watched once; what is wrong with it is told there.

    Args:
        options: of [`WatchedVideo`].
    """
    settings = describe_options(checkpoint.path, dtype=checkpoint.dtype, max_new_tokens=max_new_tokens, **options)
    watched, error = attempt(WatchedVideo, checkpoint, task.video, **options)
    for question in task.questions:
        row = dict.fromkeys(COLUMNS) | {"video": task.name, "question": question, "options": settings}
        if watched is not None:
            answer, error = attempt(watched.answer, question, max_new_tokens=max_new_tokens)
            if answer is not None:
                row |= {name: value for name, value in vars(answer).items() if name in COLUMNS}
                row |= {f"tokens_{when}": count for when, count in answer.vision_tokens.items()}
        yield row | {"error": error}


def attempt(function: Callable, *arguments, **options) -> tuple[Any, str | None]:
    """What a call returns, or what it raises in words."""
    try:
        return function(*arguments, **options), None
    except torch.AcceleratorError:  # after which the device answers nothing any more
        raise
    except Exception as error:  # whatever a file does to the libraries that read it
        return None, f"{type(error).__name__}: {error}"


def describe_options(model: str, *, dtype: str = "auto", max_new_tokens: int = MAX_NEW_TOKENS, **options) -> str:
    """What answers depend on, as JSON: the checkpoint, and the options that are not left to it."""
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    return json.dumps({"model": model, "dtype": dtype, "max_new_tokens": max_new_tokens, **given}, sort_keys=True)
