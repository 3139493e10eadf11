"""The two processors: videos and chats to Molmo2 inputs. Files are sampled and decoded by `video_stts_molmo.py`.

Everything after the frames is native Molmo2 and gives the same pixel values.
"""

import contextlib
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from numbers import Real
from urllib.request import url2pathname

import numpy as np
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, AutoVideoProcessor
from transformers.configuration_utils import PreTrainedConfig
from transformers.image_processing_utils import BatchFeature
from transformers.models.molmo2.processing_molmo2 import Molmo2Processor
from transformers.models.molmo2.video_processing_molmo2 import Molmo2VideoProcessor, Molmo2VideoProcessorKwargs
from transformers.processing_utils import Unpack
from transformers.video_utils import VideoInput, VideoMetadata, make_batched_metadata, make_batched_videos

from .configuration_stts_molmo import STTSMolmoConfig, is_remote_code
from .video_stts_molmo import (
    TIME_TOLERANCE,
    EncodedVideo,
    assume_frame_rate,
    complete_metadata,
    download,
    read_video,
    sample_frame_indices,
    sample_frame_times,
    scaled_num_frames,
    take_sampled_frames,
    wrap_encoded_videos,
)

SAMPLING_OPTIONS = ("do_sample_frames", "num_frames", "fps", "max_fps", "test_time_scaling", "prune_ratio")
TELL_THE_MODEL = (
    "Pass it to the model: model.generate(**inputs, prune_ratio=..., method=...), in a pipeline generate_kwargs="
    '{"prune_ratio": ..., "method": ...}, or for every call model.generation_config.prune_ratio = ...'
)


class VideoSpan(str):
    """
    Some seconds of a video file, which pass as the `str` that Transformers' batching of videos takes for a file.

    Raises:
        ValueError: these are no seconds in order, or `video` is no file.
    """

    def __new__(cls, video, seconds: tuple[float, float]):
        start, end = seconds
        if not all(isinstance(value, Real) for value in seconds) or not 0 <= start < end:
            raise ValueError(
                f"video_start={start!r} and video_end={end!r} must be seconds, 0 <= video_start < video_end."
            )
        self = super().__new__(cls, video)
        self.video, self.seconds = video, seconds
        return self


def take_span(part: dict) -> dict:
    """A part of a chat whose `video_start` and `video_end`, in seconds, are in its video."""
    start, end = part.get("video_start"), part.get("video_end")
    if part.get("type") != "video" or start is end is None:
        return part
    seconds = (0 if start is None else start, math.inf if end is None else end)
    part = {name: value for name, value in part.items() if name not in ("video_start", "video_end")}
    for name in ("video", "url", "path"):
        if part.get(name) is not None:
            video = wrap_encoded_videos(part[name])
            if not isinstance(video, str):
                raise ValueError("video_start and video_end are for files; of frames pass those that are wanted.")
            part[name] = VideoSpan(video, seconds)
    return part


def take_spans(conversation):
    """A chat, or several, with [`take_span`] of each part."""
    if isinstance(conversation, (list, tuple)):
        return [take_spans(messages) for messages in conversation]
    if isinstance(conversation, dict) and isinstance(conversation.get("content"), (list, tuple)):
        return {
            **conversation,
            "content": [take_span(part) if isinstance(part, dict) else part for part in conversation["content"]],
        }
    return conversation


def sample_between(seconds: tuple[float, float], sample_indices_fn: Callable | None, metadata) -> np.ndarray:
    """
    Sample as `sample_indices_fn` does, or take all, among the frames of a file that begin between two times.

    Raises:
        ValueError: none does.
    """
    times = metadata.frame_times
    first, stop = np.searchsorted(times, np.add(seconds, (-TIME_TOLERANCE, TIME_TOLERANCE)))
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
        Raise the cap on the number of frames to `ceil(num_frames / (1 - prune_ratio))`. Has no effect with `fps`.
    prune_ratio (`float`, *optional*):
        Share `k` of tokens that the model will drop, for `test_time_scaling` alone; the checkpoint's own when not
        given. The model must be told too: no processor drops tokens.
    """

    test_time_scaling: bool | None
    prune_ratio: float | int | None


class STTSMolmoVideoProcessor(Molmo2VideoProcessor):
    r"""
    [`Molmo2VideoProcessor`] that reads video files by presentation time with PyAV and always takes the last frame.

    It takes what the native processor takes, and `os.PathLike`, bytes and binary file objects as well. The files of a
    batch are decoded at the same time, in threads.

    Args:
        num_frames (`int`, defaults to 64): most frames to sample.
        max_fps (`int`, defaults to 2): frames per second to sample while these are at most `num_frames`.
        fps (`float`, *optional*): sample this many frames per second without a cap, instead of `num_frames`.
        test_time_scaling (`bool`, defaults to `False`): raise the cap to `ceil(num_frames / (1 - prune_ratio))`.
        prune_ratio (`float`, *optional*): ratio for `test_time_scaling`. `from_pretrained` reads it from
            `stts_config` in the checkpoint's `config.json`, which is the only place where it is saved.
            All other arguments are those of [`Molmo2VideoProcessor`].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: what was passed is not a video that can be decoded, `fps` and `num_frames` are both given, or
            `test_time_scaling` has no `prune_ratio`.

    Example:

    ```python
    >>> video_processor = AutoVideoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    >>> inputs = video_processor("clip.mp4", test_time_scaling=True, return_tensors="pt")
    ```
    """

    test_time_scaling = False
    prune_ratio = None
    valid_kwargs = STTSMolmoVideoProcessorKwargs

    def __init__(self, **kwargs: Unpack[STTSMolmoVideoProcessorKwargs]):
        super().__init__(**kwargs)

    @classmethod
    def get_video_processor_dict(cls, pretrained_model_name_or_path, **kwargs):
        hub_kwargs = {name: value for name, value in kwargs.items() if name != "trust_remote_code"}
        values, kwargs = super().get_video_processor_dict(pretrained_model_name_or_path, **kwargs)
        with contextlib.suppress(OSError):  # a processor saved without its model
            config, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub_kwargs)
            values["prune_ratio"] = (config.get("stts_config") or {}).get("prune_ratio")
        return values, kwargs

    def to_dict(self):
        values = super().to_dict()
        values.pop("prune_ratio", None)  # config.json has it
        return values

    def preprocess(self, videos: VideoInput, **kwargs: Unpack[STTSMolmoVideoProcessorKwargs]) -> BatchFeature:
        validate_typed_dict(self.valid_kwargs, kwargs)  # before files are decoded
        scales = self.test_time_scaling if kwargs.get("test_time_scaling") is None else kwargs["test_time_scaling"]
        if kwargs.get("prune_ratio") is not None and not scales:
            raise ValueError(
                f"prune_ratio={kwargs['prune_ratio']} has no effect in a processor without test_time_scaling=True: the "
                f"model drops the tokens. {TELL_THE_MODEL}"
            )
        sampling = {name: kwargs.get(name) for name in SAMPLING_OPTIONS}
        videos, metadata = self.sample_videos(videos, kwargs.get("video_metadata"), **sampling)
        return super().preprocess(videos, **{**kwargs, "video_metadata": metadata, "do_sample_frames": False})

    def sample_videos(
        self, videos: VideoInput, video_metadata=None, do_sample_frames: bool | None = None, **options
    ) -> tuple[list, list[VideoMetadata]]:
        """
        Read files, of videos or of single frames, and sample.

        Args:
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
            videos, video_metadata = self.fetch_videos(videos, sample_indices_fn=sample)
        else:
            if isinstance(videos[0], list):
                images = self.fetch_images(videos)
                videos = [torch.stack([self.process_image(image) for image in video]) for video in images]
            video_metadata = make_batched_metadata(videos, video_metadata=video_metadata)
            if sample is not None:
                pairs = zip(videos, video_metadata, strict=True)
                videos = [take_sampled_frames(video, metadata, sample) for video, metadata in pairs]
        for video, metadata in zip(videos, video_metadata, strict=True):
            complete_metadata(metadata, len(video), self.max_fps)
        return list(videos), list(video_metadata)

    def sample_frames(
        self,
        metadata: VideoMetadata,
        num_frames: int | None = None,
        fps: float | None = None,
        max_fps: float | None = None,
        test_time_scaling: bool | None = None,
        prune_ratio: float | None = None,
        **kwargs,
    ) -> np.ndarray:
        """
        Choose frames as section 4.1 does: `max_fps` per second up to `num_frames`, else uniform, the last always in.

        Returns:
            `np.ndarray`: int64 `(num_samples,)`, ascending frame indices.

        Raises:
            ValueError: `num_frames` and `fps` are both given, or `test_time_scaling` has no `prune_ratio`.
        """
        if fps is not None and num_frames is not None:
            raise ValueError(f"num_frames={num_frames} and fps={fps} exclude each other; pass one of them.")
        if fps is None and num_frames is None:
            fps = self.fps
        if fps is None:
            fps = self.max_fps if max_fps is None else max_fps
            num_frames = self.num_frames if num_frames is None else num_frames
            if self.test_time_scaling if test_time_scaling is None else test_time_scaling:
                num_frames = scaled_num_frames(num_frames, self._scaling_ratio(prune_ratio))

        frame_times = getattr(metadata, "frame_times", None)
        if frame_times is None:
            assume_frame_rate(metadata, fps)
            frame_times = np.arange(metadata.total_num_frames) / metadata.fps
        if len(frame_times) == 0:
            raise ValueError("The video has no frames; pass at least one.")
        return sample_frame_indices(frame_times, sample_frame_times(frame_times[-1], num_frames, fps))

    def _scaling_ratio(self, prune_ratio: float | None) -> float:
        prune_ratio = self.prune_ratio if prune_ratio is None else prune_ratio
        if prune_ratio is None:
            raise ValueError(
                "test_time_scaling needs a prune_ratio, and this processor was loaded from no checkpoint with an "
                "stts_config in its config.json; pass prune_ratio=..., such as 0.5."
            )
        return prune_ratio

    def fetch_videos(self, video_url_or_urls: str | list[str], sample_indices_fn: Callable | None = None):
        if isinstance(video_url_or_urls, VideoSpan):
            sample_indices_fn = partial(sample_between, video_url_or_urls.seconds, sample_indices_fn)
            video_url_or_urls = video_url_or_urls.video
        if isinstance(video_url_or_urls, list):
            videos = [video.video if isinstance(video, VideoSpan) else video for video in video_url_or_urls]
            files = [id(video.file) for video in videos if isinstance(video, EncodedVideo)]
            # A file object that comes twice cannot be read in two places at a time.
            with ThreadPoolExecutor(None if len(set(files)) == len(files) else 1) as pool:
                fetch = partial(self.fetch_videos, sample_indices_fn=sample_indices_fn)
                return list(zip(*pool.map(fetch, video_url_or_urls), strict=True))
        if video_url_or_urls.lower().startswith(("http://", "https://")):
            video = download(video_url_or_urls)
            with video.file:
                return read_video(video, sample_indices_fn)
        if video_url_or_urls.lower().startswith("file://"):
            video_url_or_urls = url2pathname(video_url_or_urls[len("file://") :])
        return read_video(video_url_or_urls, sample_indices_fn)

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
        values, kwargs = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)
        return cls.from_args_and_dict(parts, values, **kwargs)

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        for name in ("method", "max_vision_tokens"):
            if name in kwargs:
                raise ValueError(f"{name}={kwargs[name]!r} has no effect in a processor. {TELL_THE_MODEL}")
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        if videos is not None:
            videos = wrap_encoded_videos(videos)
        return super().prepare_inputs_layout(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def apply_chat_template(self, conversation, chat_template: str | None = None, **kwargs):
        """
        As `ProcessorMixin.apply_chat_template`. A video's part of a message may have `video_start` and `video_end`:
        frames are sampled between these seconds of the file, and the prompt tells their times in the file.
        """
        return super().apply_chat_template(take_spans(conversation), chat_template, **kwargs)

    def replace_video_token(self, video_inputs: dict, video_idx: int, **kwargs) -> str:
        metadata = video_inputs["video_metadata"][video_idx]
        if getattr(metadata, "frame_times", None) is None:
            return super().replace_video_token(video_inputs, video_idx, **kwargs)
        return self.get_video_string(video_inputs["video_grids"][video_idx], metadata.timestamps)


STTSMolmoVideoProcessor.register_for_auto_class()
STTSMolmoProcessor.register_for_auto_class()

if not is_remote_code(__name__):
    AutoVideoProcessor.register(STTSMolmoConfig, video_processor_class=STTSMolmoVideoProcessor)
    AutoProcessor.register(STTSMolmoConfig, STTSMolmoProcessor)

__all__ = ["STTSMolmoProcessor", "STTSMolmoVideoProcessor"]
