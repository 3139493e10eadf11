"""LongVideoBench with subtitles, for lmms-eval. Files are where its own LongVideoBench tasks have them."""

import json
import os
from pathlib import Path

from lmms_eval.utils import resolve_cache_dir
from stts_molmo.tools.evaluation import LETTERS, Row

FOLDER = "datasets/longvideobench"


def folder() -> Path:
    home = os.path.expanduser(os.getenv("HF_HOME", "~/.cache/huggingface"))
    return Path(resolve_cache_dir(FOLDER, base_dir=home))


def as_row(doc: dict) -> Row:
    """A question of the dataset, whose missing options are "N/A", as `stts-molmo eval` asks it and reads the answer."""
    options = [doc.get(f"option{number}") for number in range(5)]
    options = tuple(option for option in options if option not in (None, "N/A"))
    video = str(folder() / "videos" / doc["video_path"])
    return Row(video, doc["question"], options, LETTERS[doc["correct_choice"]])


def doc_to_visual(doc: dict) -> list[str]:
    return [as_row(doc).video]


def doc_to_text(doc: dict) -> str:
    subtitles = json.loads((folder() / "subtitles" / doc["subtitle_path"]).read_text(encoding="utf-8"))
    lines = subtitle_lines(subtitles, doc["starting_timestamp_for_subtitles"], doc["duration"])
    heading = "This video's subtitles are listed below, with the seconds at which they are shown:"
    return "\n".join([*([heading, *lines] if lines else ["This video has no subtitles."]), as_row(doc).prompt()])


def doc_to_target(doc: dict) -> str:
    return as_row(doc).answer


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    return {"lvb_acc": float(as_row(doc).is_right(results[0]))}


def subtitle_lines(subtitles: list[dict], start: float, duration: float) -> list[str]:
    """
    What is said while the video is shown, as `1.5 - 3.0: text`. The video begins `start` seconds into its subtitles.

    They come in two forms: `{"timestamp": [1.5, 3.0], "text": ...}`, of which the last end may be missing, and
    `{"start": "00:00:01.500", "end": "00:00:03.000", "line": ...}`.
    """
    lines = []
    for subtitle in subtitles:
        if "timestamp" in subtitle:
            (begin, end), text = subtitle["timestamp"], subtitle["text"]
        else:
            begin, end, text = seconds_of(subtitle["start"]), seconds_of(subtitle["end"]), subtitle["line"]
        begin, end = begin - start, duration if end is None else end - start
        if end > 0 and begin < duration:
            lines.append(f"{max(begin, 0):.1f} - {min(end, duration):.1f}: {' '.join(text.split())}")
    return lines


def seconds_of(timestamp: str) -> float:
    hours, minutes, seconds = timestamp.split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
