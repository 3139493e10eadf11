"""The two processors: videos and chats to Molmo2 inputs. Files are sampled and decoded by `video_stts_molmo.py`.

Everything after the frames is native Molmo2 and gives the same pixel values.
"""

import base64
import contextlib
import math
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from functools import partial
from numbers import Real
from urllib.request import url2pathname

import numpy as np
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from PIL import Image
from tokenizers import normalizers
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, AutoVideoProcessor
from transformers.configuration_utils import PreTrainedConfig
from transformers.image_processing_utils import BatchFeature
from transformers.models.molmo2.processing_molmo2 import Molmo2Processor
from transformers.models.molmo2.video_processing_molmo2 import (
    Molmo2VideoProcessor,
    Molmo2VideoProcessorKwargs,
    resize_and_normalize_image,
)
from transformers.processing_utils import Unpack
from transformers.utils import logging
from transformers.video_utils import VideoInput, VideoMetadata, make_batched_metadata, make_batched_videos

from .configuration_stts_molmo import STTSMolmoConfig, is_remote_code, validate_max_vision_tokens
from .download_stts_molmo import DOWNLOAD_SECONDS, MAX_DOWNLOAD_BYTES, download, is_link, quoted
from .video_stts_molmo import (
    MAX_FRAME_SIZE,
    MAX_SAMPLES,
    TIME_TOLERANCE,
    EncodedVideo,
    OpenDecoder,
    assume_frame_rate,
    complete_metadata,
    eight_bit_frames,
    read_video,
    rgb_frames,
    sample_frame_indices,
    sample_frame_times,
    scaled_num_frames,
    take_sampled_frames,
    wrap_encoded_videos,
)

logger = logging.get_logger(__name__)

# What the model prunes with, and a processor needs to know for `test_time_scaling` alone.
PRUNING_OPTIONS = ("prune_ratio", "max_vision_tokens")
SAMPLING_OPTIONS = ("do_sample_frames", "num_frames", "fps", "max_fps", "test_time_scaling", *PRUNING_OPTIONS)
FRAME_OPTIONS = ("size", "resample", "device", "do_rescale", "input_data_format")
TELL_THE_MODEL = (
    "Pass it to the model: model.generate(**inputs, prune_ratio=..., method=...), in a pipeline generate_kwargs="
    '{"prune_ratio": ..., "method": ...}, or for every call model.generation_config.prune_ratio = ...'
)
# What a processor may read and take. Whoever runs it decides, no checkpoint does, and no argument of a call.
LIMITS = (
    "allow_local_files",
    "allow_private_hosts",
    "max_download_bytes",
    "download_seconds",
    "max_frame_size",
    "max_video_seconds",
)

# What a part of a chat may ask of its video, and what it may say that only other models heed.
REQUESTS = ("video_start", "video_end", "fps", "nframes", "max_frames")
OF_OTHER_MODELS = ("min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width", "min_frames")

# Put into special tokens that a user typed. Unicode sets it aside for programs, so it is in no text; the tokenizer
# drops it after it looked for special tokens, and tokenizes what is around it as if it had never been there.
MARK = "\ufdd0"


class VideoRequest(str):
    """
    A video file with what its part of a chat asks of it, which passes as the `str` that Transformers' batching of
    videos takes for a file.

    Args:
        video (`str`): path of a file, an `EncodedVideo` or an `OpenDecoder`.
        seconds (`tuple[float, float]`): between which its frames are sampled.
        sampling (`dict`): options of `sample_frames` for this video.

    Raises:
        ValueError: these are no seconds in order.
    """

    def __new__(cls, video: str, seconds: tuple[float, float], sampling: dict):
        start, end = seconds
        if not all(isinstance(value, Real) for value in seconds) or not 0 <= start < end:
            raise ValueError(
                f"video_start={start!r} and video_end={end!r} must be seconds, 0 <= video_start < video_end."
            )
        self = super().__new__(cls, video)
        self.video, self.seconds, self.sampling = video, seconds, sampling
        return self


def take_request(part: dict) -> dict:
    """
    A part of a chat with all that it asks of its video in the video itself: `video_start` and `video_end`, and what
    qwen-vl-utils takes, `fps` (up to `max_frames`) or `nframes`. OpenAI's `video_url` becomes `video`.

    Raises:
        ValueError: this is asked of frames, or cannot be done.
    """
    if part.get("type") == "video_url":
        link = part.get("video_url")
        part = {**part, "type": "video", "url": link.get("url") if isinstance(link, dict) else link}
    if part.get("type") != "video":
        return part
    if unheeded := [name for name in OF_OTHER_MODELS if name in part]:
        logger.warning_once(f"{', '.join(unheeded)} in a chat have no effect: Molmo2 sees all frames in one size.")
    asked = {name: part[name] for name in REQUESTS if part.get(name) is not None}
    part = {name: value for name, value in part.items() if name not in REQUESTS}
    if not asked:
        return part
    for name in ("video", "url", "path"):
        if part.get(name) is not None:
            video = wrap_encoded_videos(part[name])
            if not isinstance(video, str):
                raise ValueError(f"{' and '.join(asked)} are for files; of frames pass those that are wanted.")
            seconds = (asked.get("video_start", 0), asked.get("video_end", math.inf))
            part[name] = VideoRequest(video, seconds, requested_sampling(**asked))
    return part


def requested_sampling(
    fps: float | None = None, nframes: int | None = None, max_frames: int | None = None, **seconds
) -> dict:
    """The options of `sample_frames` that give the `nframes` or `fps` that a part of a chat asks for."""
    given = {"fps": fps, "nframes": nframes, "max_frames": max_frames}
    for name, value in given.items():
        if value is not None and not (isinstance(value, Real) and 0 < value < math.inf):
            raise ValueError(f"{name}={value!r} in a chat must be a number above 0.")
    if nframes is not None:
        if fps is not None:
            raise ValueError(f"nframes={nframes} and fps={fps} in a chat exclude each other; write one of them.")
        return {"num_frames": int(nframes), "max_fps": MAX_SAMPLES, "fps": None, "test_time_scaling": False}
    sampling = {} if fps is None else {"fps": None, "max_fps": fps}
    return sampling if max_frames is None else {"fps": None, **sampling, "num_frames": int(max_frames)}


def take_requests(conversation):
    """A chat, or several, with [`take_request`] of each part."""
    if isinstance(conversation, (list, tuple)):
        return [take_requests(messages) for messages in conversation]
    if isinstance(conversation, dict) and isinstance(conversation.get("content"), (list, tuple)):
        return {
            **conversation,
            "content": [take_request(part) if isinstance(part, dict) else part for part in conversation["content"]],
        }
    return conversation


def video_parts(conversation) -> Iterator[dict]:
    """The parts of a chat, or of several, that are videos."""
    if isinstance(conversation, (list, tuple)):
        for message in conversation:
            yield from video_parts(message)
    elif isinstance(conversation, dict) and isinstance(conversation.get("content"), (list, tuple)):
        yield from video_parts(conversation["content"])
    elif isinstance(conversation, dict) and conversation.get("type") == "video":
        yield conversation


def rates_of_frames(conversation) -> dict:
    """The option `video_metadata` for a chat whose videos are frames, `sample_fps` of them a second."""
    parts = list(video_parts(conversation))
    if not any("sample_fps" in part for part in parts):
        return {}
    rates = [float(part.get("sample_fps") or 0) or None for part in parts]
    videos = [part.get("video") for part in parts]
    lengths = [0 if video is None or isinstance(video, str) else len(video) for video in videos]
    pairs = zip(lengths, rates, strict=True)
    return {"video_metadata": [VideoMetadata(total_num_frames=length, fps=rate) for length, rate in pairs]}


def sample_between(seconds: tuple[float, float], sample_indices_fn: Callable | None, metadata) -> np.ndarray:
    """
    Sample as `sample_indices_fn` does, or take all, among the frames of a file that begin between two times.

    Raises:
        ValueError: none does.
    """
    times = metadata.frame_times
    first, stop = np.searchsorted(times, np.add(seconds, (-metadata.tolerance, metadata.tolerance)))
    if first == stop:
        raise ValueError(
            f"No frame begins between video_start={seconds[0]} and video_end={seconds[1]}: the video's "
            f"{len(times)} frames begin in seconds {times[0]:g} to {times[-1]:g}."
        )
    inside = replace(metadata, total_num_frames=int(stop - first), frame_times=times[first:stop] - times[first])
    return first + (np.arange(stop - first) if sample_indices_fn is None else sample_indices_fn(metadata=inside))


class STTSMolmoVideoProcessorKwargs(Molmo2VideoProcessorKwargs, total=False):
    """
    test_time_scaling (`bool`, *optional*):
        Spend what pruning saves on more frames: raise the cap on their number to that of
        [`STTSMolmoVideoProcessor.scaled_cap`]. Has no effect with `fps`.
    prune_ratio (`float`, *optional*):
        Share `k` of tokens that the model will drop, for `test_time_scaling` alone; the checkpoint's own when not
        given. The model must be told too: no processor drops tokens.
    max_vision_tokens (`int`, *optional*):
        The most tokens of a video that the model will keep, for `test_time_scaling` alone; as many frames are taken as
        fill them at `prune_ratio`. The checkpoint's own when neither is given. The model must be told too.
    """

    test_time_scaling: bool | None
    prune_ratio: float | int | None
    max_vision_tokens: int | None


class STTSMolmoVideoProcessor(Molmo2VideoProcessor):
    r"""
    [`Molmo2VideoProcessor`] that reads video files by presentation time with PyAV and always takes the last frame.

    It takes what the native processor takes, and `os.PathLike`, bytes and binary file objects as well. The files of a
    batch are decoded at the same time, in threads.

    Args:
        num_frames (`int`, defaults to 64): most frames to sample.
        max_fps (`int`, defaults to 2): frames per second to sample while these are at most `num_frames`.
        fps (`float`, *optional*): sample this many frames per second without a cap, instead of `num_frames`.
        test_time_scaling (`bool`, defaults to `False`): raise the cap to `ceil(num_frames / (1 - prune_ratio))`, or to
            the frames that fill `max_vision_tokens` at `prune_ratio`.
        prune_ratio (`float`, *optional*), max_vision_tokens (`int`, *optional*): for `test_time_scaling`.
            `from_pretrained` reads them from `stts_config` in the checkpoint's `config.json`, which is the only place
            where they are saved.
            All other arguments are those of [`Molmo2VideoProcessor`].

    What it may read and take is up to whoever runs it, so these are attributes that are never saved, nor arguments
    of a call:

    - `allow_local_files` (`bool`, defaults to `True`): whether a string, in a chat or in an argument, may name a file
      of this machine. A server sets it to `False`; links, bytes and open files stay.
    - `allow_private_hosts` (`bool`, defaults to `False`): whether links may lead to machines that the public internet
      does not reach, such as this one or a cloud's metadata service.
    - `max_download_bytes` (`int`, defaults to 2 GiB) and `download_seconds` (`float`, defaults to 600) for each link.
    - `max_frame_size` (`int`, defaults to 16384): most pixels that a file's frames may be wide or high.
    - `max_video_seconds` (`float`, defaults to infinity): when the last frame of a video may be shown.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: what was passed is not a video that can be decoded, or may not be read, `fps` and `num_frames` are
            both given, or `test_time_scaling` is not told what pruning saves.

    Example:

    ```python
    >>> video_processor = AutoVideoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    >>> inputs = video_processor("clip.mp4", test_time_scaling=True, return_tensors="pt")
    ```
    """

    test_time_scaling = False
    prune_ratio = None
    max_vision_tokens = None
    allow_local_files = True
    allow_private_hosts = False
    max_download_bytes = MAX_DOWNLOAD_BYTES
    download_seconds = DOWNLOAD_SECONDS
    max_frame_size = MAX_FRAME_SIZE
    max_video_seconds = math.inf
    valid_kwargs = STTSMolmoVideoProcessorKwargs

    def __init__(self, **kwargs: Unpack[STTSMolmoVideoProcessorKwargs]):
        super().__init__(**kwargs)

    @classmethod
    def get_video_processor_dict(cls, pretrained_model_name_or_path, **kwargs):
        hub_kwargs = {name: value for name, value in kwargs.items() if name != "trust_remote_code"}
        values, kwargs = super().get_video_processor_dict(pretrained_model_name_or_path, **kwargs)
        with contextlib.suppress(OSError):  # a processor saved without its model
            config, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub_kwargs)
            stts_config = config.get("stts_config") or {}
            values |= {name: stts_config.get(name) for name in PRUNING_OPTIONS}
        return {name: value for name, value in values.items() if name not in LIMITS}, kwargs

    def to_dict(self):
        values = super().to_dict()
        unsaved = (*PRUNING_OPTIONS, *LIMITS)  # config.json has the first
        return {name: value for name, value in values.items() if name not in unsaved}

    def preprocess(self, videos: VideoInput, **kwargs: Unpack[STTSMolmoVideoProcessorKwargs]) -> BatchFeature:
        validate_typed_dict(self.valid_kwargs, kwargs)  # before files are decoded
        scales = self.test_time_scaling if kwargs.get("test_time_scaling") is None else kwargs["test_time_scaling"]
        given = {name: kwargs[name] for name in PRUNING_OPTIONS if kwargs.get(name) is not None}
        for name, value in given.items() if not scales else ():
            raise ValueError(
                f"{name}={value!r} has no effect in a processor without test_time_scaling=True: the model drops the "
                f"tokens. {TELL_THE_MODEL}"
            )
        options = {name: kwargs.get(name) for name in (*SAMPLING_OPTIONS, *FRAME_OPTIONS)}
        videos, metadata = self.sample_videos(videos, kwargs.get("video_metadata"), **options)
        return super().preprocess(videos, **{**kwargs, "video_metadata": metadata, "do_sample_frames": False})

    def sample_videos(
        self,
        videos: VideoInput,
        video_metadata=None,
        do_sample_frames: bool | None = None,
        size=None,
        resample=None,
        device=None,
        do_rescale: bool | None = None,
        input_data_format: str | None = None,
        **options,
    ) -> tuple[list, list[VideoMetadata]]:
        """
        Read files, of videos or of single frames, and sample. Frames of video files are resized one by one as they are
        decoded, as `preprocess` resizes them: their memory does not grow with their resolution.

        Args:
            size, resample, device, do_rescale, input_data_format: as `preprocess` takes them.
            options: those of `sample_frames`.

        Returns:
            The frames of each video, `(num_samples, height, width, 3)` or `(num_samples, 3, height, width)`, and its
            metadata, which say when each is shown. Passed on with `do_sample_frames=False`, they give the same inputs.

        Raises:
            FileNotFoundError, ValueError: see the class.
        """
        videos = make_batched_videos(wrap_encoded_videos(videos))
        do_sample_frames = self.do_sample_frames if do_sample_frames is None else do_sample_frames
        sample = partial(self.sample_frames, **options) if do_sample_frames else None
        if isinstance(videos[0], str):
            resize = partial(self.resize_frame, size=size, resample=resample, device=device)
            videos, video_metadata = self.fetch_videos(videos, sample_indices_fn=sample, resize=resize)
        else:
            if isinstance(videos[0], list):
                images = self.fetch_images(videos)
                videos = [torch.stack([self.process_image(image) for image in video]) for video in images]
            videos = [rgb_frames(video, input_data_format) for video in videos]
            video_metadata = make_batched_metadata(videos, video_metadata=video_metadata)
            if sample is not None:
                pairs = zip(videos, video_metadata, strict=True)
                videos = [take_sampled_frames(video, metadata, sample) for video, metadata in pairs]
            do_rescale = self.do_rescale if do_rescale is None else do_rescale
            videos = [eight_bit_frames(video, is_scaled=not do_rescale) for video in videos]
        for video, metadata in zip(videos, video_metadata, strict=True):
            complete_metadata(metadata, len(video), self.max_fps)
        return list(videos), list(video_metadata)

    def resize_frame(self, frame: torch.Tensor, size=None, resample=None, device=None) -> torch.Tensor:
        """A frame, uint8 `(3, height, width)`, at the `size` that `preprocess` gives it, with the same values."""
        size = self._standardize_kwargs(size=self.size if size is None else size)["size"]
        resample = self.resample if resample is None else resample
        if device is not None:
            frame = frame.to(device)
        only_resize = (resample, False, None, False, None, None)
        return resize_and_normalize_image(self, frame[None], [size.height, size.width], *only_resize)[0]

    def sample_frames(
        self,
        metadata: VideoMetadata,
        num_frames: int | None = None,
        fps: float | None = None,
        max_fps: float | None = None,
        test_time_scaling: bool | None = None,
        prune_ratio: float | None = None,
        max_vision_tokens: int | None = None,
        **kwargs,
    ) -> np.ndarray:
        """
        Choose frames as section 4.1 does: `max_fps` per second up to `num_frames`, else uniform, the last always in.

        Returns:
            `np.ndarray`: int64 `(num_samples,)`, ascending frame indices.

        Raises:
            ValueError: `num_frames` and `fps` are both given, or see `scaled_cap`.
        """
        if fps is not None and num_frames is not None:
            raise ValueError(f"num_frames={num_frames} and fps={fps} exclude each other; pass one of them.")
        if fps is None and num_frames is None:
            fps = self.fps
        if fps is None:
            fps = self.max_fps if max_fps is None else max_fps
            if self.test_time_scaling if test_time_scaling is None else test_time_scaling:
                num_frames = self.scaled_cap(num_frames, prune_ratio, max_vision_tokens)
            elif num_frames is None:
                num_frames = self.num_frames

        frame_times = getattr(metadata, "frame_times", None)
        if frame_times is None:
            assume_frame_rate(metadata, fps)
            frame_times = np.arange(metadata.total_num_frames) / metadata.fps
        if len(frame_times) == 0:
            raise ValueError("The video has no frames; pass at least one.")
        if frame_times[-1] > self.max_video_seconds:
            raise ValueError(
                f"The video is {frame_times[-1]:.1f} seconds long; at most {self.max_video_seconds:g} are taken "
                "(`max_video_seconds` of the video processor)."
            )
        tolerance = getattr(metadata, "tolerance", TIME_TOLERANCE)
        sample_times = sample_frame_times(frame_times[-1], num_frames, fps, tolerance)
        return sample_frame_indices(frame_times, sample_times, tolerance)

    def scaled_cap(
        self, num_frames: int | None = None, prune_ratio: float | None = None, max_vision_tokens: int | None = None
    ) -> int:
        """
        Frame cap of `test_time_scaling`. With a ratio, as many frames as cost the tokens of `num_frames` unpruned ones.
        With a budget, as many as fill it at the ratio, so that a long video loses the share that the model is made for;
        one that is too short to be sampled so often loses less, or nothing.

        Args:
            num_frames, prune_ratio, max_vision_tokens: the processor's own when not given; its budget gives way to
                any argument.

        Raises:
            ValueError: `num_frames` and `max_vision_tokens` are both given, there is no ratio, or a value is out of
                range.
        """
        if num_frames is not None and max_vision_tokens is not None:
            raise ValueError(
                f"num_frames={num_frames} and max_vision_tokens={max_vision_tokens} exclude each other with "
                "test_time_scaling, which takes as many frames as fill the tokens; pass one of them."
            )
        if num_frames is prune_ratio is max_vision_tokens is None:
            max_vision_tokens = self.max_vision_tokens
        prune_ratio = self.prune_ratio if prune_ratio is None else prune_ratio
        if prune_ratio is None:
            raise ValueError(
                "test_time_scaling needs a prune_ratio, and this processor was loaded from no checkpoint with an "
                "stts_config in its config.json; pass prune_ratio=..., such as 0.5."
            )
        if validate_max_vision_tokens(max_vision_tokens) is not None:
            return scaled_num_frames(Fraction(max_vision_tokens, math.prod(self.grid)), prune_ratio)
        return scaled_num_frames(self.num_frames if num_frames is None else num_frames, prune_ratio)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of pooled tokens in a frame."""
        rows, columns = (self.size[side] // self.patch_size for side in ("height", "width"))
        return math.ceil(rows / self.pooling_size[0]), math.ceil(columns / self.pooling_size[1])

    def fetch_videos(
        self,
        video_url_or_urls: str | list[str],
        sample_indices_fn: Callable | None = None,
        resize: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        if isinstance(video_url_or_urls, VideoRequest):
            request, video_url_or_urls = video_url_or_urls, video_url_or_urls.video
            if sample_indices_fn is not None:
                sample_indices_fn = partial(sample_indices_fn, **request.sampling)
            if request.seconds != (0, math.inf):
                sample_indices_fn = partial(sample_between, request.seconds, sample_indices_fn)
        if isinstance(video_url_or_urls, list):
            videos = [video.video if isinstance(video, VideoRequest) else video for video in video_url_or_urls]
            open_already = [video for video in videos if isinstance(video, (EncodedVideo, OpenDecoder))]
            readers = [id(video.decoder if isinstance(video, OpenDecoder) else video.file) for video in open_already]
            # A file object or a decoder that comes twice cannot be read in two places at a time.
            with ThreadPoolExecutor(None if len(set(readers)) == len(readers) else 1) as pool:
                fetch = partial(self.fetch_videos, sample_indices_fn=sample_indices_fn, resize=resize)
                return list(zip(*pool.map(fetch, video_url_or_urls), strict=True))
        with self.named_file(video_url_or_urls) as video:
            return read_video(video, sample_indices_fn, resize, self.max_frame_size)

    def fetch_images(self, image_url_or_urls):
        if not isinstance(image_url_or_urls, str):
            return super().fetch_images(image_url_or_urls)
        with self.named_file(image_url_or_urls) as image:
            self.check_image_size(image)
            if isinstance(image, EncodedVideo):
                image.file.seek(0)
                image = "data:image/;base64," + base64.b64encode(image.file.read()).decode()
            try:
                return super().fetch_images(image)
            except (RuntimeError, ValueError) as error:
                raise ValueError(
                    f"{quoted(image_url_or_urls)} cannot be read as an image ({quoted(error)})."
                ) from error

    def check_image_size(self, image: str) -> None:
        """Raise a `ValueError` before a picture is decoded whose file declares more pixels than Pillow or we allow."""
        try:
            with Image.open(image.file if isinstance(image, EncodedVideo) else image) as header:
                size = header.size
        except Image.DecompressionBombError as error:
            raise ValueError(f"{quoted(image)} is too large an image ({error}).") from error
        except (OSError, ValueError):
            return  # no picture: whoever decodes it says so
        if max(size) > self.max_frame_size:
            raise ValueError(
                f"{quoted(image)} is an image of {size[0]} x {size[1]} pixels; at most {self.max_frame_size} a side "
                "are decoded (`max_frame_size` of the video processor)."
            )

    @contextlib.contextmanager
    def named_file(self, name: str) -> Iterator[str]:
        """
        What a string of a caller or of a chat names: a path, or an `EncodedVideo`.

        Raises:
            ValueError: it cannot be downloaded, or names a file of this machine where that is not allowed.
        """
        if isinstance(name, (EncodedVideo, OpenDecoder)):
            yield name
        elif is_link(name):
            limits = (self.max_download_bytes, self.download_seconds, self.allow_private_hosts)
            with download(name, *limits) as file:
                yield EncodedVideo(file, name)
        elif not self.allow_local_files:
            raise ValueError(
                f"{quoted(name)} is no link, and files of this machine may not be read (`allow_local_files` of the "
                "video processor); pass http://..., https://... or data:video/mp4;base64,..."
            )
        elif name.lower().startswith("file://"):
            yield url2pathname(name[len("file://") :])
        else:
            yield name

    def _validate_preprocess_kwargs(self, **kwargs):
        for name in ("image_mean", "image_std", "rescale_factor"):
            value = kwargs.get(name)
            if value is not None and not np.isfinite(value).all():
                raise ValueError(f"{name}={value} must be finite; mend it in the call or in processor_config.json.")
        super()._validate_preprocess_kwargs(**kwargs)

    def _preprocess(self, videos: list[torch.Tensor], return_tensors=None, **kwargs) -> BatchFeature:
        # Frame by frame: the float copy that the resize makes is then one frame, not the clip. Same values, faster.
        data = super()._preprocess([frame for video in videos for frame in video.split(1)], **kwargs)
        _, rows, columns = data["video_grids"][0].tolist()
        data["video_grids"] = torch.tensor([[len(video), rows, columns] for video in videos])
        return BatchFeature(data, tensor_type=return_tensors)


class STTSMolmoProcessor(Molmo2Processor):
    r"""
    [`Molmo2Processor`] whose prompts carry the times of the frames actually taken.

    Molmo2 writes the time in seconds before each frame. For a decoded file these are the frames' presentation times,
    also where the frame rate varies.

    Text in a chat stays text: special tokens that it contains, typed by a user, are tokenized as their characters.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        # Part by part: AutoVideoProcessor would ask the user to trust the checkpoint's copy of this very file, and
        # AutoTokenizer, for a model config that it does not need, that of the configuration.
        parts = [
            AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs),
            STTSMolmoVideoProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs),
            AutoTokenizer.from_pretrained(pretrained_model_name_or_path, config=PreTrainedConfig(), **kwargs),
        ]
        drop_marks(parts[-1])
        values, kwargs = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)
        return cls.from_args_and_dict(parts, values, **kwargs)

    def apply_chat_template(
        self, conversation, chat_template: str | None = None, *, sanitize_control_tokens: bool = True, **kwargs
    ):
        """
        As `ProcessorMixin.apply_chat_template`. A video's part of a message may have `video_start` and `video_end`:
        frames are sampled between these seconds of the file, and the prompt tells their times in the file. It may also
        have what qwen-vl-utils takes: `nframes`, `fps` and `max_frames` for files, `sample_fps` for lists of frames.

        Args:
            sanitize_control_tokens (`bool`, defaults to `True`): special tokens in the messages, also placeholders of
                images and videos, are what a user typed and stay text. The string that `tokenize=False` gives carries
                marks in them, which this processor's tokenizer drops. `False` is for text that a chat template wrote.

        Raises:
            ValueError: there is audio in the chat, which Molmo2 cannot hear.
        """
        if sanitize_control_tokens:
            drop_marks(self.tokenizer)
            conversation = self.as_text(conversation)
        conversation = take_requests(conversation)
        if rates := rates_of_frames(conversation):
            kwargs["processor_kwargs"] = rates | (kwargs.get("processor_kwargs") or {})
        return super().apply_chat_template(conversation, chat_template, **kwargs)

    def as_text(self, value):
        """
        A string, or messages with strings in them, with a mark in each special token and in each start of one at the
        end: what a template writes after it cannot complete it. Images and videos are left as they are.
        """
        if isinstance(value, str):
            return special_tokens_pattern(self.tokenizer).sub(lambda m: m[0][0] + MARK + m[0][1:], value)
        if isinstance(value, (list, tuple)):
            return [self.as_text(item) for item in value]
        if not isinstance(value, dict) or value.get("type") in ("image", "image_url", "video", "video_url"):
            return value
        if value.get("type") == "audio":
            raise ValueError("A chat with audio is not supported; Molmo2 takes text, images and videos.")
        return {name: self.as_text(item) for name, item in value.items()}

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        if "method" in kwargs:
            raise ValueError(f"method={kwargs['method']!r} has no effect in a processor. {TELL_THE_MODEL}")
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        if images is not None:
            images = self.video_processor.fetch_images(images)  # within its limits
        if videos is not None:
            videos = wrap_encoded_videos(videos)
        return super().prepare_inputs_layout(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def replace_video_token(self, video_inputs: dict, video_idx: int, **kwargs) -> str:
        metadata = video_inputs["video_metadata"][video_idx]
        if getattr(metadata, "frame_times", None) is None:
            return super().replace_video_token(video_inputs, video_idx, **kwargs)
        return self.get_video_string(video_inputs["video_grids"][video_idx], metadata.timestamps)


def drop_marks(tokenizer) -> None:
    """Make the tokenizer drop `MARK`, after it looked for special tokens."""
    backend = tokenizer.backend_tokenizer
    before = backend.normalizer
    if before is None or before.normalize_str(MARK):
        drop = normalizers.Replace(MARK, "")
        backend.normalizer = drop if before is None else normalizers.Sequence([drop, before])


def special_tokens_pattern(tokenizer) -> re.Pattern:
    """Finds special tokens, and at the end of a text the start of one."""
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    starts = {token[:length] for token in tokens for length in range(1, len(token))}
    whole, start = ("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) for texts in (tokens, starts))
    return re.compile(rf"{whole}|(?:{start})\Z")


STTSMolmoVideoProcessor.register_for_auto_class()
STTSMolmoProcessor.register_for_auto_class()

if not is_remote_code(__name__):
    AutoVideoProcessor.register(STTSMolmoConfig, video_processor_class=STTSMolmoVideoProcessor)
    AutoProcessor.register(STTSMolmoConfig, STTSMolmoProcessor)

__all__ = ["STTSMolmoProcessor", "STTSMolmoVideoProcessor"]
