"""A video file to sampled frames: sample times, the index of a file, decoding, downloads.

Sampling is that of section 4.1 and, with test-time scaling, of section 5.3 of the STTS paper.
"""

import contextlib
import io
import itertools
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
import torch
from huggingface_hub.utils import httpx  # its export for others: httpx or httpx2, whichever it depends on
from PIL import Image
from transformers.models.molmo2.video_processing_molmo2 import Molmo2VideoProcessor
from transformers.utils import logging
from transformers.video_utils import VideoInput, VideoMetadata

from .configuration_stts_molmo import validate_prune_ratio

try:
    from torchcodec.decoders import VideoDecoder
except (ImportError, OSError, RuntimeError):  # not installed, or without the FFmpeg libraries that it was built for
    VideoDecoder = None

logger = logging.get_logger(__name__)

# Two clocks may differ in the last bit; a frame that starts less than this after a sample time counts as shown then.
TIME_TOLERANCE = 1e-6  # seconds

# A jump empties the decoder's threads, which costs about as much as decoding this many frames.
MIN_FRAMES_TO_JUMP = 8

# Formats that FFmpeg reads by opening the files which a text names, wherever those are.
PLAYLISTS = ("concat", "dash", "hls")


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------------


def scaled_num_frames(num_frames: int, prune_ratio: float) -> int:
    """
    Frame cap of test-time scaling: as many frames as cost the tokens of `num_frames` unpruned ones (section 5.3).

    It is `ceil(num_frames / (1 - prune_ratio))`, with `prune_ratio` read as the decimal it is written as.

    Raises:
        ValueError: `prune_ratio` is not in `[0, 1)`.

    Example: `scaled_num_frames(64, 0.5) -> 128`, `scaled_num_frames(64, 0.9) -> 640`.
    """
    return math.ceil(num_frames / (1 - Fraction(str(validate_prune_ratio(prune_ratio)))))


def sample_frame_times(duration: float, num_frames: int | None = 64, fps: float | None = 2) -> np.ndarray:
    """
    Times at which to look at a video: `fps` per second while that is at most `num_frames`, else `num_frames` uniform
    ones; the last frame is always among them (section 4.1).

    Args:
        duration (`float`): start of the last frame in seconds, counted from the start of the first.
        num_frames (`int`, *optional*): most frames to take; no cap when `None`.
        fps (`float`, *optional*): frames per second; always `num_frames` uniform ones when `None`.

    Returns:
        `np.ndarray`: float64 `(num_samples,)`, ascending seconds, the last one equal to `duration`.

    Raises:
        ValueError: neither `num_frames` nor `fps` is given, or one of them is not positive.

    Example: `sample_frame_times(1.2) -> [0.0, 0.5, 1.0, 1.2]`, `sample_frame_times(90, num_frames=3) -> [0, 45, 90]`.
    """
    if num_frames is None and fps is None:
        raise ValueError("Cannot sample frames without `num_frames` and `fps`; pass one of them.")
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"num_frames={num_frames} must be at least 1.")
    if fps is not None and not fps > 0:
        raise ValueError(f"fps={fps} must be more than 0.")
    if fps is not None:
        num_steps = math.ceil(duration * fps)
        if num_frames is None or num_steps + 1 <= num_frames:
            return np.append(np.arange(num_steps) / fps, duration)
    # Counted from the end: a single frame is then the last one.
    return np.linspace(duration, 0.0, num_frames)[::-1]


def sample_frame_indices(frame_times: np.ndarray, sample_times: np.ndarray) -> np.ndarray:
    """
    The frames on display at `sample_times`, each once.

    Args:
        frame_times (`np.ndarray`): float `(num_frames,)`, ascending start of each frame in seconds.
        sample_times (`np.ndarray`): float `(num_samples,)`, seconds on the same clock.

    Returns:
        `np.ndarray`: int64 `(<= num_samples,)`, ascending frame indices.

    Example: `frame_times=[0, 1, 5], sample_times=[0, 2, 4, 5] -> [0, 1, 2]`.
    """
    indices = np.searchsorted(frame_times, np.asarray(sample_times) + TIME_TOLERANCE, side="right") - 1
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


class FrameIndex(NamedTuple):
    """When each frame of a video is shown, in units of `time_base` seconds, read from its packets."""

    pts: np.ndarray  # int64 (num_frames,), ascending
    keyframes: np.ndarray  # int64 (num_keyframes,), ascending: where decoding can start
    time_base: Fraction
    average_rate: Fraction | None  # frames per second, as the container declares

    def metadata(self) -> "TimedVideoMetadata":
        frame_times = (self.pts - self.pts[0]) * self.time_base.numerator / self.time_base.denominator
        num_frames = len(frame_times)
        fps = float(self.average_rate or 0) or None
        if num_frames > 1:
            fps = (num_frames - 1) / float(frame_times[-1])
        return TimedVideoMetadata(
            total_num_frames=num_frames,
            fps=fps,
            duration=num_frames / fps if fps else 0.0,
            video_backend="pyav",
            frame_times=frame_times,
        )


@dataclass
class TimedVideoMetadata(VideoMetadata):
    """
    Metadata of a decoded file, with the time at which each of its frames is shown.

    Args:
        frame_times (`np.ndarray`): float64 `(total_num_frames,)`, seconds from the first frame. With a variable frame
            rate these are not `index / fps`.
    """

    frame_times: np.ndarray | None = field(default=None, repr=False, compare=False)

    @property
    def timestamps(self) -> list[float]:
        """Seconds from the first frame to each sampled one."""
        return self.frame_times[self.frames_indices].tolist()


def complete_metadata(metadata: VideoMetadata, num_frames: int, fps: float | None) -> None:
    """
    Fill in what the metadata of `num_frames` frames leaves open: that they are all there are, at `fps` a second.

    Raises:
        ValueError: the metadata is of another number of frames.
    """
    if metadata.frames_indices is None:
        metadata.frames_indices = list(range(num_frames))
    if len(metadata.frames_indices) != num_frames:
        raise ValueError(
            f"The metadata has {len(metadata.frames_indices)} `frames_indices` for a video of {num_frames} frames; "
            "pass one for each frame."
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
    binary file objects into `EncodedVideo`, images into RGB. Strings and arrays stay as they are; lists are searched.

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
        "an array of frames or a list of frames."
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


def download(url: str) -> EncodedVideo:
    """
    Fetch `url` into a temporary file, which is on disk whatever its size.

    Raises:
        ValueError: the server cannot be reached or does not serve the file.
    """
    file = tempfile.TemporaryFile()
    try:
        with httpx.stream("GET", url, follow_redirects=True) as response:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                file.write(chunk)
    except httpx.HTTPError as error:
        raise ValueError(f"The video {url!r} cannot be downloaded ({error}); check the address.") from error
    return EncodedVideo(file, name=url)


@contextlib.contextmanager
def open_video(video: str) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """
    Open the first video stream of a file for threaded reading.

    Args:
        video (`str`): path of a file, or an `EncodedVideo`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, not a video, a playlist of other files, or has no video stream.
    """
    protocols = "none"  # by which FFmpeg may open what a file names: else an upload could choose a file of ours
    if isinstance(video, EncodedVideo):
        source = video.file
        size = source.seek(0, os.SEEK_END)
        source.seek(0)
    elif not os.path.exists(video):
        raise FileNotFoundError(f"There is no video file {video!r}; check the path.")
    elif os.path.isdir(video):
        raise ValueError(f"{video!r} is a directory; pass the path of one video file.")
    else:
        source = f"file:{video}"  # the protocol keeps FFmpeg from reading one out of a name like `a:b.mp4`
        size = os.path.getsize(video)
        protocols = "file"
    if size == 0:
        raise ValueError(f"The video {video!r} is empty (0 bytes); it was probably not written or copied completely.")
    # A packet cut short by the end of a truncated file counts as absent.
    options = {"fflags": "+discardcorrupt", "protocol_whitelist": protocols}
    try:
        # Without a mode PyAV takes that of the file object, and would write to one open as "w+b".
        container = av.open(source, mode="r", container_options=options, metadata_errors="ignore")
    except av.FFmpegError as error:
        raise ValueError(
            f"{video!r} cannot be read as a video ({error.strerror}); pass a complete file such as mp4, webm or mkv, "
            "not a playlist."
        ) from error
    with container:
        if container.format.name in PLAYLISTS:
            raise ValueError(f"{video!r} is a playlist of other files, not a video; pass one of these.")
        if container.format.name == "tty":  # FFmpeg would render plain text as a video of a terminal
            raise ValueError(f"{video!r} is a text file, not a video; pass a file such as mp4, webm or mkv.")
        cover = av.stream.Disposition.attached_pic  # the picture of an audio file
        stream = next((stream for stream in container.streams.video if not stream.disposition & cover), None)
        if stream is None:
            raise ValueError(f"{video!r} has no video stream (audio only?); pass a file that shows something.")
        stream.thread_type = "AUTO"
        yield container, stream


def read_frame_index(video: str) -> FrameIndex:
    """
    Read when each frame is shown. No frame is decoded, so this costs one pass over the bytes of the file.

    Warns where the file ends before the end that its container declares.

    Raises:
        FileNotFoundError, ValueError: as `open_video`; also when no packet tells when its frame is shown.
    """
    with open_video(video) as (container, stream):
        packets = []
        with contextlib.suppress(av.FFmpegError):  # data that cannot be read ends the video
            for packet in container.demux(stream):
                if packet.pts is not None:
                    end = packet.pts + (packet.duration or 0)
                    packets.append((packet.pts, end, packet.is_keyframe, packet.is_discard))
        if all(is_discard for *_, is_discard in packets):
            raise ValueError(f"{video!r} has no frames with a presentation time; re-encode it as mp4, webm or mkv.")
        pts, end, is_keyframe, is_discard = map(np.array, zip(*packets, strict=True))
        warn_if_truncated(video, container, stream, len(pts), float((end.max() - pts.min()) * stream.time_base))
        keyframes = np.unique(pts[is_keyframe]) if is_keyframe.any() else pts[:1]
        # Nothing before the first key frame can be decoded, in a recording that starts amid a stream.
        shown = np.unique(pts[~is_discard & (pts >= keyframes[0])])
        return FrameIndex(shown, keyframes, stream.time_base, stream.average_rate)


def warn_if_truncated(video: str, container, stream: av.VideoStream, num_frames: int, duration: float) -> None:
    """Warn if a file has less than its container declares: frames, or seconds where it does not count frames."""
    declared = (container.duration or 0) / av.time_base
    if num_frames < stream.frames:
        missing = f"{num_frames} of the {stream.frames} frames"
    elif not stream.frames and duration + 0.5 < declared:  # audio may well go on for a moment
        missing = f"{duration:.1f} of the {declared:.1f} seconds"
    else:
        return
    logger.warning(f"{video!r} looks truncated: it has {missing} that it declares. Using these.")


def decode_frames(video: str, index: FrameIndex, targets: np.ndarray) -> Iterator[av.VideoFrame]:
    """
    Decode the frames on display at given times, without holding on to them.

    Decoding goes on from frame to frame, and jumps to the last key frame before a target that is far ahead.

    Args:
        video (`str`): path of a file, or an `EncodedVideo`.
        index (`FrameIndex`): what `read_frame_index` returned for it.
        targets (`np.ndarray`): int `(num_targets,)`, ascending, in units of `index.time_base`.

    Yields:
        `av.VideoFrame`: per target the last decodable frame whose `pts` is at most the target; none where there is
        no such frame. Data that cannot be decoded ends a run of frames; the next jump starts another.
    """
    with open_video(video) as (container, stream):
        frames = iterate_frames(container, stream)
        position, shown, ahead = index.pts[0], None, None
        for target in targets:
            keyframes = index.keyframes[: np.searchsorted(index.keyframes, target, side="right")]
            start, stop = np.searchsorted(index.pts, [position, keyframes[-1]])
            if stop - start > MIN_FRAMES_TO_JUMP:
                frames, ahead = seek_frames(container, stream, keyframes, position), None
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
        yield from (frame for frame in container.decode(stream) if frame.pts is not None)


def seek_frames(
    container: av.container.InputContainer, stream: av.VideoStream, keyframes: np.ndarray, position: int
) -> Iterator[av.VideoFrame]:
    """
    The frames from the last of `keyframes` on.

    Where the container's index is inexact they start some key frames earlier, and where the data there is damaged
    at the last key frame up to `position`.
    """
    for keyframe in (*keyframes[:-4:-1], *keyframes[keyframes <= position][-1:]):
        container.seek(int(keyframe), stream=stream)
        frames = iterate_frames(container, stream)
        first = next(frames, None)
        if first is not None and first.pts <= keyframes[-1]:
            return itertools.chain([first], frames)
    return iter(())


def to_rgb(frame: av.VideoFrame, width: int, height: int) -> np.ndarray:
    """Convert a frame to uint8 `(rows, columns, 3)` at `width x height`, then turn it as its metadata says."""
    rgb = frame.to_ndarray(format="rgb24", width=width, height=height)
    return np.rot90(rgb, k=round(frame.rotation / 90))  # counterclockwise, as `rotation`


def decode_clip(video: str, index: FrameIndex, targets: np.ndarray) -> tuple[torch.Tensor | None, np.ndarray]:
    """
    Decode the frames on display at `targets` (as `decode_frames`), each once; with torchcodec where that is installed
    and manages the file, else with PyAV.

    Returns:
        `torch.Tensor`, `np.ndarray`: uint8 `(num_frames, 3, height, width)`, upright, and the frames' presentation
        times, int64 `(num_frames,)`. With damaged data `num_frames < num_targets`; with no frame at all the clip is
        `None`.
    """
    if VideoDecoder is not None:
        with contextlib.suppress(RuntimeError, ValueError, IndexError):
            clip, taken = decode_clip_with_torchcodec(video, index, targets)
            if np.array_equal(taken, np.unique(targets)):  # in some containers it lands beside the frame it should
                return clip, taken
    return decode_clip_with_pyav(video, index, targets)


def decode_clip_with_pyav(video: str, index: FrameIndex, targets: np.ndarray) -> tuple[torch.Tensor | None, np.ndarray]:
    """As `decode_clip`."""
    clip, taken = None, []
    for frame in decode_frames(video, index, targets):
        if taken and frame.pts == taken[-1]:
            continue
        if clip is None:
            width, height = frame.width, frame.height  # of all frames, should the stream change its size
            clip = np.empty((len(targets), 3, *to_rgb(frame, width, height).shape[:2]), dtype=np.uint8)
        # Copied by NumPy: torch's threads would fight with the decoder's for the cores.
        clip[len(taken)] = to_rgb(frame, width, height).transpose(2, 0, 1)
        taken.append(frame.pts)
    return None if clip is None else torch.from_numpy(clip[: len(taken)]), np.array(taken, dtype=np.int64)


def decode_clip_with_torchcodec(video: str, index: FrameIndex, targets: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """As `decode_clip`; raises `RuntimeError`, `ValueError` or `IndexError` on what torchcodec cannot decode."""
    source = video
    if isinstance(video, EncodedVideo):
        source = video.file
        source.seek(0)
    seconds = targets * index.time_base.numerator / index.time_base.denominator + TIME_TOLERANCE
    frames = VideoDecoder(source, num_ffmpeg_threads=0).get_frames_played_at(torch.from_numpy(np.unique(seconds)))
    taken = np.rint(frames.pts_seconds.numpy() / float(index.time_base)).astype(np.int64)
    taken, first = np.unique(taken, return_index=True)
    return frames.data[torch.from_numpy(first)], taken


def sample_clip(
    video: str, index: FrameIndex, sample_indices_fn: Callable | None
) -> tuple[torch.Tensor, TimedVideoMetadata, int]:
    """`read_video` with a given index; also returns how many of the sampled frames are missing."""
    metadata = index.metadata()
    indices = np.arange(len(index.pts)) if sample_indices_fn is None else sample_indices_fn(metadata=metadata)
    clip, taken = decode_clip(video, index, index.pts[indices])
    if clip is None:
        raise ValueError(f"No frame of {video!r} can be decoded; the file is damaged.")
    metadata.frames_indices = np.searchsorted(index.pts, taken, side="right") - 1
    metadata.height, metadata.width = clip.shape[-2:]
    return clip, metadata, len(indices) - len(taken)


def read_video(video: str, sample_indices_fn: Callable | None = None) -> tuple[torch.Tensor, TimedVideoMetadata]:
    """
    Decode the sampled frames of a video file. No others are held in memory.

    A damaged file is sampled again among the frames before the damage, with a warning.

    Args:
        video (`str`): path of a file, or an `EncodedVideo`.
        sample_indices_fn (`Callable`, *optional*): called with `metadata=TimedVideoMetadata`, returns the ascending
            indices of the frames to decode; every frame when not given.

    Returns:
        `torch.Tensor`, `TimedVideoMetadata`: uint8 `(num_frames, 3, height, width)`, upright; and the metadata, whose
        `frames_indices` and `timestamps` (seconds) are those of the frames returned.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, not a video, has no video stream or no decodable frame.
    """
    index = read_frame_index(video)
    clip, metadata, num_missing = sample_clip(video, index, sample_indices_fn)
    if num_missing:
        num_frames = metadata.frames_indices[-1] + 1
        logger.warning(
            f"{video!r} is damaged: {num_missing} of {num_missing + len(clip)} sampled frames cannot be decoded. "
            f"Sampling among the first {num_frames} of {len(index.pts)} frames."
        )
        index = index._replace(pts=index.pts[:num_frames])
        clip, metadata, _ = sample_clip(video, index, sample_indices_fn)
    return clip, metadata
