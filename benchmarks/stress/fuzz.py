"""Damaged video files: frames in order with all damage told, or a sentence."""

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import av
import numpy as np
from stts_molmo import video_stts_molmo
from stts_molmo.processing_stts_molmo import STTSMolmoVideoProcessor

from ..common import TINY
from .files import CODECS, damaged, write_video
from .trial import Case

SEED = 11


@cache
def intact(container: str) -> bytes:
    return write_video(container)


@cache
def video_processor() -> STTSMolmoVideoProcessor:
    return STTSMolmoVideoProcessor.from_pretrained(TINY)


@contextlib.contextmanager
def warnings_of_ours() -> Iterator[list[str]]:
    """The warnings that the package logs in the meantime."""
    messages, logger = [], logging.getLogger("stts_molmo")
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    propagates, logger.propagate = logger.propagate, False
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


def seconds_marked_corrupt(video: io.BytesIO | str) -> set[float]:
    """When frames are shown that FFmpeg marks as corrupt, in seconds from the first, where all is decoded in order."""
    marks = {}
    with av.open(video, metadata_errors="ignore") as container:
        with contextlib.suppress(av.FFmpegError, IndexError):
            for frame in container.decode(video=0):
                if frame.pts is not None:
                    marks[frame.pts] = frame.is_corrupt
        tick = float(container.streams.video[0].time_base)
    return {round((pts - min(marks)) * tick, 3) for pts, is_corrupt in marks.items() if is_corrupt}


@contextlib.contextmanager
def marks_of_decoded_frames() -> Iterator[list[bool]]:
    """Of each frame that is decoded for a sample in the meantime, whether FFmpeg marks it as corrupt."""
    marks, decode_frames = [], video_stts_molmo.decode_frames

    def note(*arguments):
        for frame in decode_frames(*arguments):
            marks.append(frame.is_corrupt)
            yield frame

    video_stts_molmo.decode_frames = note
    try:
        yield marks
    finally:
        video_stts_molmo.decode_frames = decode_frames


def read(data: bytes, as_file: bool) -> str:
    """Sample frames of a file and look at what came: see the module."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip"
        path.write_bytes(data)
        with warnings_of_ours() as messages, marks_of_decoded_frames() as marks:
            (frames,), (metadata,) = video_processor().sample_videos(path if as_file else data)
        times = metadata.timestamps
        assert len(frames) == len(times) > 0, f"{len(frames)} frames and {len(times)} times"
        assert np.isfinite(times).all() and (np.diff(times) > 0).all(), f"times {times}"
        assert messages or not any(marks), "frames are marked as corrupt, and nothing says so"
        if messages:
            return "told"
        in_order = seconds_marked_corrupt(str(path) if as_file else io.BytesIO(data))
        return "marked only where all is decoded in order" if in_order & {round(time, 3) for time in times} else ""


def read_intact(container: str) -> None:
    note = read(intact(container), as_file=False)
    assert not note, "a warning about an intact file"


def cases(number: int) -> Iterator[Case]:
    """The intact files, then `number` variants: of container `i % 11`, damaged with the seed `[SEED, i]`."""
    for container in CODECS:
        yield Case("intact video files", container, partial(read_intact, container))
    for i in range(number):
        container = list(CODECS)[i % len(CODECS)]
        yield Case("damaged video files", f"{container} [{SEED}, {i}]", partial(read_variant, container, i))


def read_variant(container: str, i: int) -> str:
    return read(damaged(intact(container), [SEED, i]), as_file=i % 2 == 1)
