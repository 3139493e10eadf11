"""A video file to sampled frames: sample times, the index of a file, decoding; and what is taken for frames.

Sampling is that of section 4.1 and, with test-time scaling, of section 5.3 of the STTS paper.
"""

import contextlib
import io
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
import torch
from PIL import Image
from transformers.models.molmo2.video_processing_molmo2 import Molmo2VideoProcessor
from transformers.utils import logging
from transformers.video_utils import VideoInput, VideoMetadata

from .configuration_stts_molmo import validate_prune_ratio
from .download_stts_molmo import quoted

logger = logging.get_logger(__name__)

# Two clocks may differ in the last bit; a frame that starts less than this after a sample time counts as shown then.
TIME_TOLERANCE = 1e-6  # seconds

# At most so many samples are taken; more of them is a broken clock, or a slip.
MAX_SAMPLES = 10**7

# Times beyond this many ticks are broken, and sums of them would not fit into 64 bits.
MAX_PTS = 2**60

# Widest and highest frame that is decoded unless a caller says otherwise.
MAX_FRAME_SIZE = 16384

# A jump empties the decoder's threads, which costs about as much as decoding this many frames.
MIN_FRAMES_TO_JUMP = 8

# Formats that FFmpeg reads by opening the files which a text names, wherever those are.
PLAYLISTS = ("concat", "dash", "hls")


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------------


def scaled_num_frames(num_frames: int | Fraction, prune_ratio: float) -> int:
    """
    Frame cap of test-time scaling: as many frames as cost the tokens of `num_frames` unpruned ones (section 5.3).

    It is `ceil(num_frames / (1 - prune_ratio))`, with `prune_ratio` read as the decimal it is written as. A budget of
    tokens that is no whole number of frames makes `num_frames` a fraction.

    Raises:
        ValueError: `prune_ratio` is not in `[0, 1)`.

    Example: `scaled_num_frames(64, 0.5) -> 128`, `scaled_num_frames(64, 0.9) -> 640`.
    """
    return math.ceil(num_frames / (1 - Fraction(str(validate_prune_ratio(prune_ratio)))))


def sample_frame_times(
    duration: float, num_frames: int | None = 64, fps: float | None = 2, tolerance: float = TIME_TOLERANCE
) -> np.ndarray:
    """
    Times at which to look at a video: `fps` per second while that is at most `num_frames`, else `num_frames` uniform
    ones; the last frame is always among them (section 4.1).

    Args:
        duration (`float`): start of the last frame in seconds, counted from the start of the first.
        num_frames (`int`, *optional*): most frames to take; no cap when `None`.
        fps (`float`, *optional*): frames per second; always `num_frames` uniform ones when `None`.
        tolerance (`float`): seconds by which `duration` may be off.

    Returns:
        `np.ndarray`: float64 `(num_samples,)`, ascending seconds, the last one equal to `duration`.

    Raises:
        ValueError: neither `num_frames` nor `fps` is given, one of them is not positive, or more than `MAX_SAMPLES` are
            asked for.

    Example: `sample_frame_times(1.2) -> [0.0, 0.5, 1.0, 1.2]`, `sample_frame_times(90, num_frames=3) -> [0, 45, 90]`.
    """
    if num_frames is None and fps is None:
        raise ValueError("Cannot sample frames without `num_frames` and `fps`; pass one of them.")
    if num_frames is not None and not 1 <= num_frames <= MAX_SAMPLES:
        raise ValueError(f"num_frames={num_frames} must be at least 1 and at most {MAX_SAMPLES}.")
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"fps={fps} must be more than 0, and finite.")
    if fps is not None:
        num_steps = max(math.ceil((duration - tolerance) * fps), 0)
        if num_frames is None and num_steps >= MAX_SAMPLES:
            raise ValueError(
                f"fps={fps} would take {num_steps + 1} samples of a video whose last frame is at {duration:g} s; pass "
                "a lower fps, or num_frames=... (times that far apart may also come from a damaged file)."
            )
        if num_frames is None or num_steps + 1 <= num_frames:
            return np.append(np.arange(num_steps) / fps, duration)
    # Counted from the end: a single frame is then the last one.
    return np.linspace(duration, 0.0, num_frames)[::-1]


def sample_frame_indices(
    frame_times: np.ndarray, sample_times: np.ndarray, tolerance: float = TIME_TOLERANCE
) -> np.ndarray:
    """
    The frames on display at `sample_times`, each once.

    Args:
        frame_times (`np.ndarray`): float `(num_frames,)`, ascending start of each frame in seconds.
        sample_times (`np.ndarray`): float `(num_samples,)`, seconds on the same clock.
        tolerance (`float`): seconds by which a frame may start after a time at which it counts as shown.

    Returns:
        `np.ndarray`: int64 `(<= num_samples,)`, ascending frame indices.

    Example: `frame_times=[0, 1, 5], sample_times=[0, 2, 4, 5] -> [0, 1, 2]`.
    """
    indices = np.searchsorted(frame_times, np.asarray(sample_times) + tolerance, side="right") - 1
    return np.unique(indices.clip(min=0))


# ---------------------------------------------------------------------------------------------------------------------
# Decoding
# ---------------------------------------------------------------------------------------------------------------------


class EncodedVideo(str):
    """An open video file that passes as the `str` which Transformers' batching of videos takes for a file."""

    def __new__(cls, file: io.IOBase, name: str | None = None):
        self = super().__new__(cls, name or f"<{type(file).__name__}>")
        self.file = file
        return self


class OpenDecoder(str):
    """
    A decoder as torchcodec has it, which passes as the `str` that Transformers' batching of videos takes for a file.
    """

    def __new__(cls, decoder):
        self = super().__new__(cls, f"<{type(decoder).__name__}>")
        self.decoder = decoder
        return self


class FrameIndex(NamedTuple):
    """When each frame of a video is shown, in units of `time_base` seconds, read from its packets."""

    pts: np.ndarray  # int64 (num_frames,), ascending
    keyframes: np.ndarray  # int64 (num_keyframes,), ascending: where decoding can start
    damaged: frozenset[int]  # pts of frames whose data the container marks as damaged
    time_base: Fraction
    average_rate: Fraction | None  # frames per second, as the container declares

    def frame_times(self) -> np.ndarray:
        """
        float64 `(num_frames,)`, seconds from the first frame, in whole milliseconds.

        Matroska and FLV know no finer time. Rounded as they round it, the same frames have the same times in every
        container, and are sampled alike. Only frames closer than a millisecond keep their file's own times.
        """
        tick = 1000 * self.time_base
        times = np.floor(self.pts.astype(np.float64) * tick.numerator / tick.denominator + 0.5)
        if (np.diff(times) <= 0).any():
            times = self.pts * float(tick)
        return (times - times[0]) / 1000

    def tolerance(self) -> float:
        """
        Seconds by which the clock may be off: half a tick, and half a millisecond at least. A clock that ticks about
        once a frame, as that of AVI, is exact.
        """
        tick = float(self.time_base)
        rounds = len(self.pts) > 1 and 2 <= np.median(np.diff(self.pts))
        return max(0.0005, tick / 2 if rounds else 0) + TIME_TOLERANCE

    def metadata(self) -> "TimedVideoMetadata":
        frame_times = self.frame_times()
        num_frames = len(frame_times)
        fps = float(self.average_rate or 0) or None
        if num_frames > 1:
            fps = float((num_frames - 1) / (int(self.pts[-1] - self.pts[0]) * self.time_base))
        return TimedVideoMetadata(
            total_num_frames=num_frames,
            fps=fps,
            duration=num_frames / fps if fps else 0.0,
            video_backend="pyav",
            frame_times=frame_times,
            tolerance=self.tolerance(),
        )


@dataclass
class TimedVideoMetadata(VideoMetadata):
    """
    Metadata of a decoded file, with the time at which each of its frames is shown.

    Args:
        frame_times (`np.ndarray`): float64 `(total_num_frames,)`, seconds from the first frame. With a variable frame
            rate these are not `index / fps`.
        tolerance (`float`): seconds by which each of them may be off.
    """

    frame_times: np.ndarray | None = field(default=None, repr=False, compare=False)
    tolerance: float = field(default=TIME_TOLERANCE, repr=False, compare=False)

    @property
    def timestamps(self) -> list[float]:
        """Seconds from the first frame to each sampled one."""
        return self.frame_times[self.frames_indices].tolist()


def rgb_frames(video: np.ndarray | torch.Tensor, data_format: str | None = None) -> torch.Tensor:
    """
    Frames `(num_frames, 3, height, width)` or `(num_frames, height, width, 3)`, of those with one channel the same
    three times.

    Args:
        data_format (`str`, *optional*): `"channels_first"` or `"channels_last"`; told by the shape when not given.

    Raises:
        ValueError: `video` has another shape, no pixels, or no numbers.
    """
    if isinstance(video, np.ndarray):
        try:
            video = torch.from_numpy(np.ascontiguousarray(video))
        except TypeError as error:
            raise ValueError(f"Frames of dtype {video.dtype} are not supported; convert them to uint8.") from error
    shape = tuple(video.shape)
    axes = {"channels_first": [1], "channels_last": [3]}.get(data_format, [1, 3])
    axis = next((axis for axis in axes if shape[axis] in (1, 3)), None)
    if axis is None or video.is_complex():
        raise ValueError(
            f"Frames of shape {shape} and dtype {video.dtype} are not supported; pass (num_frames, height, width, 3) "
            "or (num_frames, 3, height, width)."
        )
    if 0 in shape[1:]:
        raise ValueError(f"Frames of shape {shape} have no pixels.")
    return video.expand(*(3 if i == axis else -1 for i in range(4))) if shape[axis] == 1 else video


def eight_bit_frames(video: torch.Tensor, is_scaled: bool = False) -> torch.Tensor:
    """
    Frames with values from 0 to 255: uint8 of booleans, of integers and of floats in [0, 1]; other floats as they are.

    Args:
        is_scaled (`bool`): floats in [0, 1] are wanted as they are.

    Raises:
        ValueError: a value is out of range, or not a number.
    """
    if video.dtype == torch.uint8 or video.numel() == 0:
        return video
    if video.dtype == torch.bool:
        return video.to(torch.uint8) * 255
    values = video if video.is_floating_point() else video.to(torch.int64)
    low, high = values.min().item(), values.max().item()
    advice = "pass uint8 frames from 0 to 255, or floats from 0 to 1."
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"Frames of dtype {video.dtype} have values that are infinite or not a number; {advice}")
    if not video.is_floating_point():
        if low < 0 or high > 255:
            raise ValueError(f"Frames of dtype {video.dtype} have values from {low} to {high}; {advice}")
        return video.to(torch.uint8)
    if is_scaled:
        return video
    if 0 <= low and high <= 1:
        return (video.float() * 255).round().to(torch.uint8)
    if high <= 1 or high >= 2 * 255:  # normalised already, or of more bits; a little beyond is what resizing leaves
        raise ValueError(f"Frames of dtype {video.dtype} have values from {low:g} to {high:g}; {advice}")
    return video


def complete_metadata(metadata: VideoMetadata, num_frames: int, fps: float | None) -> None:
    """
    Fill in what the metadata of `num_frames` frames leaves open: that they are all there are, at `fps` a second.

    Raises:
        ValueError: the metadata is of another number of frames, or its `frames_indices` do not ascend from 0 or more.
    """
    if metadata.frames_indices is None:
        metadata.frames_indices = list(range(num_frames))
    if len(metadata.frames_indices) != num_frames:
        raise ValueError(
            f"The metadata has {len(metadata.frames_indices)} `frames_indices` for a video of {num_frames} frames; "
            "pass one for each frame."
        )
    indices = np.asarray(metadata.frames_indices)
    are_counts = indices.dtype.kind in "iuf" and ((indices >= 0) & (indices % 1 == 0)).all()
    if not (are_counts and (np.diff(indices) >= 0).all()):
        raise ValueError(
            f"frames_indices={quoted(indices.tolist())} of the metadata must be whole numbers that ascend from 0 or "
            "more: the number of each frame in the video."
        )
    if getattr(metadata, "frame_times", None) is None:
        assume_frame_rate(metadata, fps)


def take_sampled_frames(
    video: np.ndarray | torch.Tensor, metadata: VideoMetadata, sample_indices_fn: Callable
) -> np.ndarray | torch.Tensor:
    """
    The frames of `video` that `sample_indices_fn(metadata=metadata)` chooses, noted in `metadata.frames_indices`.

    Raises:
        ValueError: `video` has fewer frames than its metadata says.
    """
    metadata.frames_indices = sample_indices_fn(metadata=metadata)
    try:
        return video[metadata.frames_indices]
    except IndexError as error:
        raise ValueError(
            f"The frames passed are fewer than their metadata says ({error}). If they are sampled already, pass "
            "do_sample_frames=False and their `frames_indices` in the metadata."
        ) from error


def assume_frame_rate(metadata: VideoMetadata, fps: float | None) -> None:
    """Take the frame rate as `fps` or Molmo2's, with a warning, where it is none: OpenCV says 0 for unknown."""
    if 0 < (metadata.fps or 0) < math.inf:
        return
    fps = fps or Molmo2VideoProcessor.max_fps
    logger.warning_once(
        f"The frame rate of the video is unknown (fps={metadata.fps}): taking it as {fps} fps, which sets the "
        "timestamps in the prompt. Pass `video_metadata` with its `fps`."
    )
    metadata.fps = fps


def wrap_encoded_videos(videos: VideoInput):
    """
    Turn what Transformers' batching of videos does not know into what it does: `os.PathLike` into `str`, bytes and
    binary file objects into `EncodedVideo`, images into RGB, torchcodec's decoders into `OpenDecoder`. What a column of
    videos in `datasets` holds is the file that it was made of, decoded or not. Strings and arrays stay as they are;
    lists are searched.

    Raises:
        ValueError: there is no video, something that is none, or a mixture of files and frames.
    """
    videos = wrap_video(videos)
    are_files = {isinstance(leaf, str) for leaf in iterate_leaves(videos)}
    if not are_files:
        raise ValueError(f"There is no video in videos={videos}; pass at least one, or None.")
    if len(are_files) > 1:
        raise ValueError("Files and frames cannot be mixed in one batch of videos; pass each kind in its own call.")
    return videos


def wrap_video(videos: VideoInput):
    source = getattr(videos, "_hf_encoded", None) or {}  # what `datasets` notes that a decoder reads
    if source.get("bytes") is not None or os.path.isfile(source.get("path") or ""):
        videos = source
    if isinstance(videos, Mapping):
        if videos.get("bytes") is not None:
            return EncodedVideo(io.BytesIO(videos["bytes"]), videos.get("path"))
        if videos.get("path") is None:
            raise ValueError(f'A video with the keys {sorted(videos)} has neither "bytes" nor a "path"; give it one.')
        return os.fspath(videos["path"])
    if hasattr(videos, "get_frames_at"):
        return OpenDecoder(videos)
    if isinstance(videos, os.PathLike):
        return os.fspath(videos)
    if isinstance(videos, (bytes, bytearray, memoryview)):
        return EncodedVideo(io.BytesIO(videos))
    if hasattr(videos, "read"):
        return EncodedVideo(seekable(videos))
    if isinstance(videos, (list, tuple)):
        return [wrap_video(video) for video in videos]
    if isinstance(videos, Image.Image) and videos.mode != "RGB":
        return videos.convert("RGB")
    if isinstance(videos, str) or hasattr(videos, "__array__") or hasattr(videos, "__array_interface__"):
        return videos
    raise ValueError(
        f"A video of type {type(videos).__name__} is not supported; pass a path, a URL, bytes, a binary file object, "
        "an array of frames, a list of frames, a decoder of torchcodec or what a column of `datasets` holds."
    )


def iterate_leaves(videos) -> Iterator:
    if isinstance(videos, list):
        for video in videos:
            yield from iterate_leaves(video)
    else:
        yield videos


def seekable(file: io.IOBase) -> io.IOBase:
    """
    The file, or what is left of one that cannot be sought in (a pipe, a connection), in memory.

    Raises:
        ValueError: the file gives text.
    """
    if isinstance(file.read(0), str):
        raise ValueError(f'The file {getattr(file, "name", file)!r} is open as text; open it in mode "rb".')
    can_seek = getattr(file, "seekable", lambda: hasattr(file, "seek"))
    return file if can_seek() else io.BytesIO(file.read())


@contextlib.contextmanager
def open_video(
    video: str, max_frame_size: int = MAX_FRAME_SIZE
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """
    Open the first video stream of a file for threaded reading.

    Args:
        video (`str`): path of a file, or an `EncodedVideo`.
        max_frame_size (`int`): most pixels that its frames may be wide or high.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, not a video, a playlist of other files, has no video stream, none that can be
            decoded, or too large frames.
    """
    protocols = "none"  # by which FFmpeg may open what a file names: else an upload could choose a file of ours
    if isinstance(video, EncodedVideo):
        source = video.file
        size = source.seek(0, os.SEEK_END)
        source.seek(0)
    elif not os.path.exists(video):
        raise FileNotFoundError(f"There is no video file {quoted(video)}; check the path.")
    elif os.path.isdir(video):
        raise ValueError(f"{quoted(video)} is a directory; pass the path of one video file.")
    elif not os.path.isfile(video):  # a pipe would wait, a device never end
        raise ValueError(f"{quoted(video)} is not a regular file; save the video to one, or pass it opened.")
    else:
        source = f"file:{video}"  # the protocol keeps FFmpeg from reading one out of a name like `a:b.mp4`
        size = os.path.getsize(video)
        protocols = "file"
    if size == 0:
        raise ValueError(
            f"The video {quoted(video)} is empty (0 bytes); it was probably not written or copied completely."
        )
    options = {"protocol_whitelist": protocols}
    try:
        # Without a mode PyAV takes that of the file object, and would write to one open as "w+b".
        container = av.open(source, mode="r", container_options=options, metadata_errors="ignore")
    except av.FFmpegError as error:
        raise ValueError(
            f"{quoted(video)} cannot be read as a video ({error.strerror}); pass a complete file such as mp4, webm or "
            "mkv, not a playlist."
        ) from error
    with container:
        if container.format.name in PLAYLISTS:
            raise ValueError(f"{quoted(video)} is a playlist of other files, not a video; pass one of these.")
        if container.format.name == "tty":  # FFmpeg would render plain text as a video of a terminal
            raise ValueError(f"{quoted(video)} is a text file, not a video; pass a file such as mp4, webm or mkv.")
        cover = av.stream.Disposition.attached_pic  # the picture of an audio file
        stream = next((stream for stream in container.streams.video if not stream.disposition & cover), None)
        if stream is None:
            raise ValueError(f"{quoted(video)} has no video stream (audio only?); pass a file that shows something.")
        if stream.codec_context is None:
            raise ValueError(f"{quoted(video)} has a codec that FFmpeg cannot decode; re-encode it, as H.264 or VP9.")
        if max(stream.width, stream.height) > max_frame_size:
            raise ValueError(
                f"{quoted(video)} declares frames of {stream.width} x {stream.height} pixels; at most {max_frame_size} "
                "a side are decoded (`max_frame_size` of the video processor)."
            )
        stream.thread_type = "AUTO"
        stream.codec_context.options = {"max_pixels": str(max_frame_size**2)}  # for what the data declares later
        yield container, stream


def iterate_packets(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[tuple[av.Packet, int]]:
    """
    The packets from here on, up to the end or to data that cannot be read, on a clock that never goes back.

    Where that of the file does, at a key frame, as in recordings that were joined byte by byte, it goes on from the end
    of what came before.

    Yields:
        `av.Packet`, `int`: the packet, in the stream's ticks, and how often the clock has gone back up to it.
    """
    num_restarts, shift, last, end, held = 0, 0, -math.inf, 0, None
    # An IndexError is PyAV's, where a stream appears in mid-file.
    with contextlib.suppress(av.FFmpegError, IndexError):
        for packet in container.demux(stream):
            if held and (packet.size or packet.dts is not None):
                yield held, num_restarts
            held = None
            times = [time for time in (packet.pts, packet.dts) if time is not None]
            if any(abs(time) > MAX_PTS for time in times):
                continue
            if packet.pts is not None and packet.is_keyframe and packet.pts + shift < last:
                num_restarts += 1
                shift = end - min(times)
            if packet.dts is not None:
                packet.dts += shift
            if packet.pts is not None:
                packet.pts += shift
                last = max(last, packet.pts)
                end = max(end, packet.pts + (packet.duration or 0))
            if packet.is_corrupt:  # held back: at the end of a file it was cut short, and counts as absent
                held = packet
            else:
                yield packet, num_restarts


def read_frame_index(video: str, max_frame_size: int = MAX_FRAME_SIZE) -> FrameIndex:
    """
    Read when each frame is shown. No frame is decoded, so this costs one pass over the bytes of the file.

    Warns where the file ends before the end that its container declares, and where its clock goes back.

    Raises:
        FileNotFoundError, ValueError: as `open_video`; also when no packet tells when its frame is shown.
    """
    with open_video(video, max_frame_size) as (container, stream):
        packets, num_restarts = [], 0
        for packet, restarts in iterate_packets(container, stream):
            num_restarts = restarts
            if packet.pts is not None:
                end = packet.pts + (packet.duration or 0)
                packets.append((packet.pts, end, packet.is_keyframe, packet.is_discard, packet.is_corrupt))
        if all(is_discard for *_, is_discard, _ in packets):
            raise ValueError(
                f"{quoted(video)} has no frames with a presentation time; re-encode it as mp4, webm or mkv."
            )
        pts, end, is_keyframe, is_discard, is_corrupt = map(np.array, zip(*packets, strict=True))
        warn_if_truncated(video, container, stream, len(pts), float((end.max() - pts.min()) * stream.time_base))
        keyframes = np.unique(pts[is_keyframe]) if is_keyframe.any() else pts[:1]
        # Nothing before the first key frame can be decoded, in a recording that starts amid a stream.
        shown = np.unique(pts[~is_discard & (pts >= keyframes[0])])
        if not len(shown):
            raise ValueError(f"No frame of {quoted(video)} can be decoded; the file is damaged.")
        if num_restarts:
            logger.warning(
                f"{quoted(video)} has a clock that goes back {num_restarts} times, as that of recordings that were "
                "joined does. Their times are counted on, one after the other."
            )
            keyframes = keyframes[:1]  # a time that was counted on is not one to jump to
        return FrameIndex(shown, keyframes, frozenset(pts[is_corrupt].tolist()), stream.time_base, stream.average_rate)


def warn_if_truncated(video: str, container, stream: av.VideoStream, num_frames: int, duration: float) -> None:
    """Warn if a file has less than its container declares: frames, or seconds where it does not count frames."""
    declared = (container.duration or 0) / av.time_base
    if num_frames < stream.frames:
        missing = f"{num_frames} of the {stream.frames} frames"
    elif not stream.frames and duration + 0.5 < declared:  # audio may well go on for a moment
        missing = f"{duration:.1f} of the {declared:.1f} seconds"
    else:
        return
    logger.warning(f"{quoted(video)} looks truncated: it has {missing} that it declares. Using these.")


def decode_frames(
    video: str, index: FrameIndex, targets: np.ndarray, max_frame_size: int = MAX_FRAME_SIZE
) -> Iterator[av.VideoFrame]:
    """
    Decode the frames on display at given times, without holding on to them.

    Decoding goes on from frame to frame, and jumps to the last key frame before a target that is far ahead.

    Args:
        video (`str`): path of a file, or an `EncodedVideo`.
        index (`FrameIndex`): what `read_frame_index` returned for it.
        targets (`np.ndarray`): int `(num_targets,)`, ascending, in units of `index.time_base`.
        max_frame_size (`int`): as `open_video`.

    Yields:
        `av.VideoFrame`: per target the last decodable frame whose `pts` is at most the target; none where there is
        no such frame. Data that cannot be decoded ends a run of frames; the next jump starts another.
    """
    with open_video(video, max_frame_size) as (container, stream):
        frames = iterate_frames(container, stream)
        position, shown, ahead = index.pts[0], None, None
        for target in targets:
            keyframes = index.keyframes[: np.searchsorted(index.keyframes, target, side="right")]
            start, stop = np.searchsorted(index.pts, [position, keyframes[-1]])
            if stop - start > MIN_FRAMES_TO_JUMP:
                jump = seek_frames(container, stream, keyframes, position)
                frames, ahead = (frames, ahead) if jump is None else (jump, None)
            while shown is None or shown.pts < target:
                ahead = ahead or next(frames, None)
                if ahead is None or ahead.pts > target:
                    break
                shown, ahead = ahead, None
            if shown is not None:
                position = shown.pts
                yield shown


def iterate_frames(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """The frames from here on, up to the end or to data that cannot be decoded."""
    with contextlib.suppress(av.FFmpegError):
        for packet, _ in iterate_packets(container, stream):
            yield from (frame for frame in packet.decode() if frame.pts is not None)


def seek_frames(
    container: av.container.InputContainer, stream: av.VideoStream, keyframes: np.ndarray, position: int
) -> Iterator[av.VideoFrame] | None:
    """
    The frames from the last of `keyframes` on; `None` if the container cannot jump there.

    Where the container's index is inexact they start some key frames earlier, and where the data there is damaged
    at the last key frame up to `position`.
    """
    frames = None
    for keyframe in (*keyframes[:-4:-1], *keyframes[keyframes <= position][-1:]):
        try:
            container.seek(int(keyframe), stream=stream)
        except av.FFmpegError:
            continue
        frames = iterate_frames(container, stream)
        first = next(frames, None)
        if first is not None and first.pts <= keyframes[-1]:
            return itertools.chain([first], frames)
    return frames and iter(())


def to_rgb(frame: av.VideoFrame, width: int, height: int) -> np.ndarray:
    """Convert a frame to uint8 `(rows, columns, 3)` at `width x height`, then turn it as its metadata says."""
    rgb = frame.to_ndarray(format="rgb24", width=width, height=height)
    turns = round(frame.rotation / 90) % 4  # counterclockwise
    return np.ascontiguousarray(np.rot90(rgb, turns)) if turns else rgb


class DecodedClip(NamedTuple):
    """Frames of a file, each once."""

    frames: torch.Tensor  # uint8 (num_frames, 3, height, width), upright
    pts: np.ndarray  # int64 (num_frames,), ascending
    size: tuple[int, int]  # height and width before any resizing
    num_damaged: int  # of the frames, as the container or the decoder marks them


def decode_clip(
    video: str,
    index: FrameIndex,
    targets: np.ndarray,
    resize: Callable[[torch.Tensor], torch.Tensor] | None = None,
    max_frame_size: int = MAX_FRAME_SIZE,
) -> DecodedClip | None:
    """
    Decode the frames on display at `targets` (as `decode_frames`), each once. None but those returned are held.

    Args:
        resize (`Callable`, *optional*): called with each frame, uint8 `(3, height, width)`, as soon as it is decoded;
            returns what is held of it.

    Returns:
        `DecodedClip`: with damaged data of fewer frames than targets; `None` with no frame at all.
    """
    clip, taken, num_damaged = None, [], 0
    for frame in decode_frames(video, index, targets, max_frame_size):
        if taken and frame.pts == taken[-1]:
            continue
        if clip is None:
            width, height = frame.width, frame.height  # of all frames, should the stream change its size
        picture = to_rgb(frame, width, height).transpose(2, 0, 1)
        # Copies are NumPy's: torch's threads would fight with the decoder's for the cores.
        held = picture if resize is None else resize(torch.from_numpy(np.ascontiguousarray(picture)))
        if clip is None:
            size = picture.shape[1:]
            clip = torch.empty((len(targets), *held.shape), dtype=torch.uint8, device=held.device)
        if resize is None:
            np.copyto(clip[len(taken)].numpy(), picture)
        else:
            clip[len(taken)] = held
        taken.append(frame.pts)
        num_damaged += frame.is_corrupt or frame.pts in index.damaged
    if clip is None:
        return None
    return DecodedClip(clip[: len(taken)], np.array(taken, dtype=np.int64), size, num_damaged)


def sample_clip(
    video: str, index: FrameIndex, sample_indices_fn: Callable | None, **decoding
) -> tuple[DecodedClip, TimedVideoMetadata, int]:
    """`read_video` with a given index; also returns how many of the sampled frames are missing."""
    metadata = index.metadata()
    indices = np.arange(len(index.pts)) if sample_indices_fn is None else sample_indices_fn(metadata=metadata)
    clip = decode_clip(video, index, index.pts[indices], **decoding)
    if clip is None:
        raise ValueError(f"No frame of {quoted(video)} can be decoded; the file is damaged.")
    metadata.frames_indices = (np.searchsorted(index.pts, clip.pts, side="right") - 1).clip(min=0)
    metadata.height, metadata.width = clip.size
    return clip, metadata, len(indices) - len(clip.pts)


def read_decoder(
    decoder, sample_indices_fn: Callable | None = None, resize: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> tuple[torch.Tensor, TimedVideoMetadata]:
    """
    `read_video` for a decoder as torchcodec has it, which tells when a frame is shown only as it decodes it: frames are
    chosen as if they followed each other evenly, and the times of those chosen are their own.
    """
    num_frames = len(decoder)
    if not num_frames:
        raise ValueError("The decoder has no frames; pass one of a video that shows something.")
    start, end = (decoder.get_frame_at(index).pts_seconds for index in (0, num_frames - 1))
    metadata = TimedVideoMetadata(
        total_num_frames=num_frames,
        fps=(num_frames - 1) / (end - start) if end > start else None,
        duration=end - start,
        video_backend="torchcodec",
        frame_times=np.linspace(0, end - start, num_frames).round(3),
        tolerance=0.0005 + TIME_TOLERANCE,
    )
    indices = np.arange(num_frames) if sample_indices_fn is None else sample_indices_fn(metadata=metadata)
    batch = decoder.get_frames_at([int(index) for index in indices])
    frames = eight_bit_frames(rgb_frames(batch.data))
    if frames.shape[1] != 3:
        frames = frames.permute(0, 3, 1, 2)
    metadata.frames_indices = indices
    metadata.frame_times[indices] = (np.asarray(batch.pts_seconds.cpu()) - start).round(3)
    metadata.height, metadata.width = frames.shape[2:]
    return frames if resize is None else torch.stack([resize(frame) for frame in frames]), metadata


def read_video(
    video: str,
    sample_indices_fn: Callable | None = None,
    resize: Callable[[torch.Tensor], torch.Tensor] | None = None,
    max_frame_size: int = MAX_FRAME_SIZE,
) -> tuple[torch.Tensor, TimedVideoMetadata]:
    """
    Decode the sampled frames of a video file. No others are held in memory.

    A damaged file is sampled again among the frames before the damage. Warns of that, of frames that the decoder or
    the container marks as damaged, of a file that ends early and of a clock that goes back.

    Args:
        video (`str`): path of a file, an `EncodedVideo` or an `OpenDecoder`.
        sample_indices_fn (`Callable`, *optional*): called with `metadata=TimedVideoMetadata`, returns the ascending
            indices of the frames to decode; every frame when not given.
        resize (`Callable`, *optional*): called with each frame, uint8 `(3, height, width)`, upright, as soon as it is
            decoded; returns what is held of it.
        max_frame_size (`int`): most pixels that frames may be wide or high.

    Returns:
        `torch.Tensor`, `TimedVideoMetadata`: `(num_frames, 3, height, width)`, upright; and the metadata, whose
        `frames_indices` and `timestamps` (seconds) are those of the frames returned, `height` and `width` those of
        the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, not a video, has no video stream, no decodable frame or too large ones.
    """
    if isinstance(video, OpenDecoder):
        return read_decoder(video.decoder, sample_indices_fn, resize)
    decoding = {"resize": resize, "max_frame_size": max_frame_size}
    index = read_frame_index(video, max_frame_size)
    clip, metadata, num_missing = sample_clip(video, index, sample_indices_fn, **decoding)
    if num_missing:
        num_frames = metadata.frames_indices[-1] + 1
        logger.warning(
            f"{quoted(video)} is damaged: {num_missing} of {num_missing + len(clip.pts)} sampled frames cannot be "
            f"decoded. Sampling among the first {num_frames} of {len(index.pts)} frames."
        )
        index = index._replace(pts=index.pts[:num_frames])
        clip, metadata, _ = sample_clip(video, index, sample_indices_fn, **decoding)
    if clip.num_damaged:
        logger.warning(
            f"{quoted(video)} is damaged: {clip.num_damaged} of {len(clip.pts)} sampled frames are marked as corrupt. "
            "They are used as they are."
        )
    return clip.frames, metadata
