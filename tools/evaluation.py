"""Accuracy on a file of questions about videos, at several settings in one run, on one process or on many."""

import hashlib
import itertools
import json
import math
import os
import re
import shutil
import string
from collections.abc import Iterable
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from accelerate import PartialState

from ..configuration_stts_molmo import Pruning
from .answer import Answer, WatchedVideo, require_usable
from .checkpoint import Checkpoint, find_device
from .console import progress_bar, stderr, timed
from .corpus import attempt
from .files import fetch, written_whole
from .tables import Journal
from .video import read_clip

try:
    from datasets import disable_progress_bars, load_dataset
    from datasets.exceptions import DatasetGenerationError
except ImportError as error:
    raise ImportError(
        "Rows are read with `datasets`, which is not installed; pip install 'stts-molmo[train]'."
    ) from error

LOADERS = {".json": ("json", {}), ".jsonl": ("json", {}), ".parquet": ("parquet", {})}
LOADERS[".csv"] = ("csv", {"keep_default_na": False})  # "None" is an answer
LETTERS = string.ascii_uppercase
ASK_FOR_LETTER = "Answer with the option's letter from the given choices directly."
# "B", "(b)", "B. a ring", "The answer is B.", and not "A ring".
LETTER = re.compile(
    r"\s*(?:(?:the )?(?:best |correct )?(?:answer|option)(?: is)?:? *)?(?:\(([A-Z])\)|([A-Z])(?:\s*$|[.):,]))",
    re.IGNORECASE,
)
Z = 1.959964  # 97.5 % of a normal distribution lie below
AS_GIVEN = {"test_time_scaling": False}  # a number of frames is taken as it is
TIMEOUT = timedelta(days=30)  # for which a process that is done waits for the others


# ----------------------------------------------------------------------------------------------------------------------
# Rows: questions, and how an answer is read
# ----------------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A question about a video; `answer` is a letter where there are options."""

    video: str
    question: str
    options: tuple[str, ...]
    answer: str

    def prompt(self) -> str:
        """What the model is asked: the question, and options by letter."""
        if not self.options:
            return self.question
        options = [f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=False)]
        return "\n".join([self.question, *options, ASK_FOR_LETTER])

    def read(self, text: str) -> str | None:
        """
        The answer in the model's `text`. With options it is a letter: the one that the text begins with, or the one of
        the option that the text is; `None` if it is neither. Without options it is the text. Case, spaces and a final
        full stop do not count.
        """
        if not self.options:
            return plain(text)
        match = LETTER.match(text)
        if match is not None:
            letter = (match[1] or match[2]).upper()
            return letter if LETTERS.index(letter) < len(self.options) else None
        same = [letter for letter, option in zip(LETTERS, self.options, strict=False) if plain(option) == plain(text)]
        return same[0] if len(same) == 1 else None

    def is_right(self, text: str) -> bool:
        return self.read(text) == (self.answer if self.options else plain(self.answer))


def plain(text: str) -> str:
    """`" A  Ring."` as `"a ring"`."""
    return " ".join(text.casefold().split()).removesuffix(".")


def read_rows(file: str | os.PathLike) -> list[Row]:
    """
    The questions of a JSON Lines, JSON, CSV or Parquet file.

    Its columns are `video` (a path, from the file's folder on, or a link), `question`, `answer`, and for multiple
    choice `options`: a list, in CSV one in JSON. The answer to these is a letter, or the text of one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another kind, damaged or empty, or a row lacks something.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file} with rows to evaluate; check the path.")
    if file.suffix.lower() not in LOADERS:
        raise ValueError(f"{file} is of no known kind; its name must end in {', '.join(sorted(LOADERS))}.")
    kind, options = LOADERS[file.suffix.lower()]
    disable_progress_bars()  # nobody waits for one file
    try:
        table = load_dataset(kind, data_files=str(file), split="train", **options)
    except (DatasetGenerationError, ValueError) as error:  # the second in datasets 4.8
        raise ValueError(f"{file} cannot be read as {kind}: {error.__cause__ or error}") from error
    if not len(table):
        raise ValueError(f"{file} has no rows.")
    rows = []
    for number, values in enumerate(table, start=1):
        try:
            rows.append(parse_row(values, file.parent))
        except ValueError as error:
            raise ValueError(f"Row {number} of {file} {error}") from error
    return rows


def parse_row(values: dict, folder: Path) -> Row:
    """A row of [`read_rows`]; a `ValueError` whose message goes on after "Row 3 ..."."""
    for name in ("video", "question", "answer"):
        if values.get(name) in (None, ""):
            raise ValueError(f"has no {name}; it needs `video`, `question`, `answer`, and may have `options`.")
    video, question, answer = (str(values[name]) for name in ("video", "question", "answer"))
    options = parse_options(values.get("options"))
    if options:
        named = {letter for letter, option in zip(LETTERS, options, strict=False) if answer in (letter, option)}
        if len(named) != 1:
            raise ValueError(
                f"has the answer {answer!r}, which is {'several' if named else 'none'} of its {len(options)} options; "
                "give a letter from A on, or the text of one option."
            )
        (answer,) = named
    return Row(video if "://" in video else str(folder / video), question, options, answer)


def parse_options(value) -> tuple[str, ...]:
    try:
        options = json.loads(value) if isinstance(value, str) and value else value or []
    except ValueError:
        options = value
    if not isinstance(options, list) or len(options) == 1 or len(options) > len(LETTERS) or None in options:
        raise ValueError(
            f"has options={value!r}; expected a list of 2 to {len(LETTERS)} texts (in CSV a list in JSON), or nothing "
            "for an open question."
        )
    return tuple(map(str, options))


# ----------------------------------------------------------------------------------------------------------------------
# Settings, and the answers that they give
# ----------------------------------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """At most so many frames of a video, and what is pruned of them."""

    num_frames: int
    pruning: Pruning

    def options(self) -> dict:
        """Arguments of `get_video_features`."""
        method, prune_ratio, max_vision_tokens = self.pruning
        budget = {"prune_ratio": prune_ratio} if max_vision_tokens is None else {"max_vision_tokens": max_vision_tokens}
        return {"method": method, **budget}


def plan_settings(
    checkpoint: Checkpoint,
    num_frames: Iterable[int] | None = None,
    prune_ratios: Iterable[float] | None = None,
    methods: Iterable[str] | None = None,
    max_vision_tokens: Iterable[int] | None = None,
) -> list[Setting]:
    """
    Every method at every ratio and every budget of tokens for every number of frames, each once: what nothing is pruned
    of is the same by any method. What is not given is the checkpoint's.

    Raises:
        ValueError: a value is out of range.
    """
    amounts = [(ratio, None) for ratio in prune_ratios or []] + [(None, tokens) for tokens in max_vision_tokens or []]
    prunings = [
        checkpoint.config.stts_config.pruning(ratio, method, tokens)
        for ratio, tokens in amounts or [(None, None)]
        for method in methods or [None]
    ]
    counts = num_frames or [checkpoint.processor.video_processor.num_frames]
    return list(dict.fromkeys(Setting(count, pruning) for count in counts for pruning in prunings))


def answer_rows(checkpoint: Checkpoint, rows: list[Row], settings: list[Setting], max_new_tokens: int) -> list[list]:
    """
    For each of several questions about the same video a record of each setting: the answer, how it was read, whether
    it is right, frames, tokens and seconds; or the error of a video that cannot be used. The video is decoded once for
    each number of frames and encoded once for each setting. No answer depends on the questions before it.
    """
    records: list[list] = [[] for _ in rows]
    for num_frames, group in itertools.groupby(settings, key=lambda setting: setting.num_frames):
        seconds: dict[str, float] = {}
        with timed("decode", seconds):
            clip, error = attempt(read_clip, checkpoint.processor, rows[0].video, num_frames=num_frames, **AS_GIVEN)
        for setting in group:
            watched = None
            if clip is not None:
                watched, error = attempt(
                    WatchedVideo, checkpoint, clip, num_frames=num_frames, allow_untrained=True, **setting.options()
                )
            spent = dict(seconds)
            for row, of_row in zip(rows, records, strict=True):
                record = {"error": error}
                if watched is not None:
                    watched.forget()
                    answer, error_here = attempt(watched.answer, row.prompt(), max_new_tokens=max_new_tokens)
                    record = {"error": error_here} if answer is None else describe_answer(row, answer, spent)
                    spent = {}
                of_row.append(record)
    return records


def describe_answer(row: Row, answer: Answer, seconds: dict[str, float]) -> dict:
    return {
        "answer": answer.answer,
        "read": row.read(answer.answer),
        "right": row.is_right(answer.answer),
        "frames": answer.frames,
        "vision_tokens": answer.vision_tokens,
        "seconds": {name: value for name, value in {**seconds, **answer.seconds}.items() if name != "load"},
    }


# ----------------------------------------------------------------------------------------------------------------------
# A whole run
# ----------------------------------------------------------------------------------------------------------------------


def join_processes(device: str) -> str:
    """
    Meet the processes that `torchrun` or `accelerate launch` started with this one, if any.

    Returns:
        The device of this one where `device` is `auto`, else `device`.
    """
    state = PartialState(cpu=find_device(device).type == "cpu", timeout=TIMEOUT)
    stderr.quiet = not state.is_main_process  # which shows how far it is
    return str(state.device) if device == "auto" and state.num_processes > 1 else device


def evaluate(
    checkpoint: Checkpoint,
    file: str | os.PathLike,
    settings: list[Setting],
    output: str | os.PathLike,
    *,
    max_new_tokens: int = 16,
    allow_untrained: bool = False,
) -> dict | None:
    """
    Ask every question of a file at every setting, and write `output`.

    Videos are shared out to the processes that met in [`join_processes`]. What is known of each is written into the
    folder `output`.partial: a run that was killed goes on there, also on another number of processes.

    Args:
        file: see [`read_rows`].
        output: JSON file; `rows`, one for each setting, are what `stts-molmo publish --results` takes.
        max_new_tokens: longest answer, in tokens.
        allow_untrained: let a scorer choose that was never trained.

    Returns:
        What was written, on the first process; `None` on others.

    Raises:
        OSError, ValueError: see [`read_rows`]; or checkpoint or a setting is not usable, or no row could be answered.
    """
    state, output, rows = PartialState(), Path(output), read_rows(file)
    for setting in settings:
        require_usable(checkpoint, allow_untrained=allow_untrained, **setting.options())
    dtype = str(checkpoint.model.dtype)  # loaded here: what is wrong with it is wrong with no row
    numbers: dict[str, list[int]] = {}  # of the rows about each video
    for number, row in enumerate(rows):
        numbers.setdefault(row.video, []).append(number)

    partial = Path(f"{output}.partial")
    folder = partial / fingerprint(checkpoint, rows, settings, max_new_tokens)
    folder.mkdir(parents=True, exist_ok=True)
    known = read_journals(folder)
    state.wait_for_everyone()  # all have read before the first one writes
    pending = [video for video, of_video in numbers.items() if of_video[0] not in known]
    own = pending[state.process_index :: state.num_processes]
    journal = Journal(folder / f"{state.process_index}.jsonl")
    with progress_bar("videos", len(own), len(own)) as advance:
        for video in own:
            asked = [rows[number] for number in numbers[video]]
            records = answer_rows(checkpoint, asked, settings, max_new_tokens)
            journal.append({"rows": list(zip(numbers[video], records, strict=True))})
            advance()
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    records = [record for _, record in sorted(read_journals(folder).items())]
    errors = [record["error"] for row in records for record in row if "error" in record]
    if len(errors) == len(rows) * len(settings):
        raise ValueError(f"None of the {len(rows)} rows of {file} could be answered: {errors[0]}")
    by_setting = list(zip(*records, strict=True))
    result = {
        "checkpoint": checkpoint.path,
        "dtype": dtype,
        "file": Path(file).name,
        "rows": [summarize(setting, own, by_setting[0]) for setting, own in zip(settings, by_setting, strict=True)],
        "intervals": "accuracy_95 is Wilson's; difference is to the first row, question by question, and "
        "difference_95 Agresti and Min's for pairs",
        "processes": state.num_processes,
        "seconds": [mean_seconds(own) for own in by_setting],
        "versions": {name: version(name) for name in ("stts-molmo", "torch", "transformers", "av")},
        "answers": [{"row": number, "settings": row} for number, row in enumerate(records, start=1)],
    }
    write_json(output, result)
    shutil.rmtree(partial)
    return result


def read_journals(folder: Path) -> dict[int, list[dict]]:
    """The records of the rows, by number, that the processes of a run have written so far."""
    lines = [line for path in folder.glob("*.jsonl") for line in Journal(path).rows]
    return {number: records for line in lines for number, records in line["rows"]}


def fingerprint(checkpoint: Checkpoint, *others) -> str:
    """Of a checkpoint's files and of `others`, values for JSON: another one does not go on where this one stopped."""
    stats = [(path.name, path.stat()) for path in sorted(fetch(checkpoint.path).iterdir()) if path.is_file()]
    files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    content = [files, checkpoint.dtype, checkpoint.device.type, version("stts-molmo"), *others]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def write_json(path: Path, content) -> None:
    with written_whole(path) as draft:
        draft.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# What it comes to
# ----------------------------------------------------------------------------------------------------------------------


def summarize(setting: Setting, records: list[dict], first: list[dict]) -> dict:
    """A row of the table: a setting, its accuracy, and how far that is from that of the `first` records."""
    answered = [record for record in records if "error" not in record]
    right = sum(record["right"] for record in answered)
    pairs = [(a["right"], b["right"]) for a, b in zip(records, first, strict=True) if "error" not in a | b]
    gained, lost = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    difference, interval = (None, None) if records is first else paired_difference(len(pairs), gained, lost)
    method, prune_ratio, max_vision_tokens = setting.pruning
    return {
        "frames": setting.num_frames,
        "method": method,
        "prune_ratio": prune_ratio if max_vision_tokens is None else None,
        "max_vision_tokens": max_vision_tokens,
        "vision_tokens": round(mean(record["vision_tokens"]["after"] for record in answered)) if answered else None,
        "questions": len(answered),
        "accuracy": right / len(answered) if answered else None,
        "accuracy_95": wilson(right, len(answered)),
        "difference": difference,
        "difference_95": interval,
        "unread": sum(record["read"] is None for record in answered),
        "failed": len(records) - len(answered),
    }


def describe_row(row: dict) -> dict[str, str]:
    """A row of the table as a terminal has room for it, shares in per cent."""

    def percent(value: float | None, interval: list[float] | None) -> str:
        return "" if value is None else "{:.1f} ({:.1f} to {:.1f})".format(*(100 * x for x in (value, *interval)))

    budget = row["max_vision_tokens"]
    return {
        "frames": str(row["frames"]),
        "method": row["method"],
        "pruned": f"to {budget}" if budget else f"{row['prune_ratio']:.0%}",
        "tokens": str(row["vision_tokens"] or ""),
        "questions": str(row["questions"]),
        "right, %": percent(row["accuracy"], row["accuracy_95"]),
        "against the first": percent(row["difference"], row["difference_95"]),
        "unread": str(row["unread"]),
        "failed": str(row["failed"]),
    }


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def mean_seconds(records: list[dict]) -> dict[str, float]:
    """What a question takes, by step: decoding and encoding of a video are shared by all questions about it."""
    answered = [record["seconds"] for record in records if "error" not in record]
    names = dict.fromkeys(name for seconds in answered for name in seconds)
    return {name: round(mean(seconds.get(name, 0.0) for seconds in answered), 4) for name in names}


def wilson(right: int, total: int) -> list[float] | None:
    """
    95 % interval of a share, by Wilson's score; `None` of nothing.

    Example: `wilson(8, 10) -> [0.490, 0.943]`.
    """
    if not total:
        return None
    share, spread = right / total, Z**2 / total
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return [max(centre - half, 0.0), min(centre + half, 1.0)]


def paired_difference(total: int, gained: int, lost: int) -> tuple[float | None, list[float] | None]:
    """
    Difference of two shares of the same `total` questions, `gained` of which only the first answered right and `lost`
    of which only the second; and its 95 % interval, Wald's with half an observation added to each of the four cells
    (Agresti and Min 2005).

    Example: `paired_difference(100, 5, 15) -> (-0.1, [-0.186, -0.010])`.
    """
    if not total:
        return None, None
    size, centre = total + 2, (gained - lost) / (total + 2)
    half = Z * math.sqrt((gained + lost + 1) / size - centre**2) / math.sqrt(size)
    return (gained - lost) / total, [max(centre - half, -1.0), min(centre + half, 1.0)]
