"""The one road from a video to what the model makes of it: sampled frames, the model's inputs, its features."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from transformers import BatchFeature
from transformers.video_utils import VideoMetadata

from ..generation_stts_molmo import VIDEO_INPUTS
from ..modeling_stts_molmo import STTSMolmoForConditionalGeneration
from ..outputs_stts_molmo import STTSMolmoVideoFeatures
from ..processing_stts_molmo import STTSMolmoProcessor
from .prompts import render_prompt


class Clip(NamedTuple):
    """The sampled frames of a video, and when each is shown."""

    frames: np.ndarray | torch.Tensor  # (num_frames, height, width, 3) or (num_frames, 3, height, width)
    metadata: VideoMetadata


def read_clip(processor: STTSMolmoProcessor, video, **sampling) -> Clip:
    """
    Decode the frames that the processor samples.

    Args:
        video: anything that the processor takes: a path, a URL, bytes, an array.
        sampling: options of [`STTSMolmoVideoProcessor.sample_frames`], `num_frames` and the like.

    Raises:
        FileNotFoundError, ValueError: `video` or an option is not usable; the message says what to do.
    """
    (frames,), (metadata,) = processor.video_processor.sample_videos(video, **sampling)
    return Clip(frames, metadata)


def make_video_inputs(processor: STTSMolmoProcessor, clip: Clip, device: torch.device | str) -> BatchFeature:
    """The model's inputs for a clip's pixels, `VIDEO_INPUTS`, made on `device`."""
    options = {"video_metadata": [clip.metadata], "do_sample_frames": False, "device": device}
    inputs = processor.video_processor([clip.frames], **options, return_tensors="pt")
    return BatchFeature({name: inputs[name] for name in VIDEO_INPUTS}).to(device)


def make_prompt(processor: STTSMolmoProcessor, clip: Clip, messages: list[dict]) -> BatchFeature:
    """
    The model's inputs for the text of a chat about a clip.

    Args:
        messages: one of them has the part `{"type": "video"}`.

    Raises:
        ValueError: there is another number of videos in them, or the checkpoint's chat template is not usable.
    """
    grid = torch.tensor([len(clip.frames), *processor.video_processor.grid])
    clips = {"video_grids": [grid], "video_metadata": [clip.metadata]}
    prompt = render_prompt(processor, messages)  # in which no user's text holds the placeholder any more
    if prompt.count(processor.video_token) != 1:
        raise ValueError(f"The prompt has {prompt.count(processor.video_token)} videos in it; expected one.")
    text = prompt.replace(processor.video_token, processor.replace_video_token(clips, 0))
    return processor(text=text, return_tensors="pt")


@torch.no_grad()
def encode_video(model: STTSMolmoForConditionalGeneration, inputs: BatchFeature, **pruning) -> STTSMolmoVideoFeatures:
    """
    What the LLM reads of the video in `inputs`, pruned as the arguments of `get_video_features` say. The features of
    all patches, which the LLM does not read, are let go.
    """
    video = BatchFeature({name: inputs[name] for name in VIDEO_INPUTS}).to(model.device, dtype=model.dtype)
    features = model.get_video_features(**video, **pruning)
    return STTSMolmoVideoFeatures(
        pooler_output=features.pooler_output, keep_mask=features.keep_mask, token_scores=features.token_scores
    )


@contextlib.contextmanager
def explained_out_of_memory(clip: Clip, device: torch.device) -> Iterator[None]:
    """Say what to do where the memory of `device` is not enough for `clip`, as a `ValueError`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{device} has too little memory for {len(clip.frames)} frames; try fewer with `--num-frames`, a higher "
            "`--prune-ratio`, `--dtype bfloat16` or `--device cpu`."
        ) from error
