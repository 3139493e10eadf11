"""Frames that a caller passes: converted rightly, or refused by name."""

import numpy as np
import pytest
import torch
from helpers import TINY
from PIL import Image
from stts_molmo.processing_stts_molmo import STTSMolmoVideoProcessor


@pytest.fixture(scope="module")
def video_processor() -> STTSMolmoVideoProcessor:
    return STTSMolmoVideoProcessor.from_pretrained(TINY)


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 40, 48, 3), dtype=np.uint8)


def pixels(video_processor, video, **kwargs) -> torch.Tensor:
    inputs = video_processor([video], do_sample_frames=False, return_tensors="pt", **kwargs)
    return inputs["pixel_values_videos"]


CONVERSIONS = {
    "floats from 0 to 1": lambda frames: frames / 255,
    "half floats from 0 to 1": lambda frames: (frames / 255).astype(np.float16),
    "bfloat16 from 0 to 255": lambda frames: torch.from_numpy(frames).bfloat16(),
    "floats from 0 to 255": lambda frames: frames.astype(np.float32),
    "16 bits that need 8": lambda frames: frames.astype(np.uint16),
    "32 bits that need 8": lambda frames: torch.from_numpy(frames.astype(np.int32)),
    "64 bits that need 8": lambda frames: frames.astype(np.int64),
    "channels first": lambda frames: frames.transpose(0, 3, 1, 2),
    "mirrored twice": lambda frames: frames[:, :, ::-1].copy()[:, :, ::-1],
}


@pytest.mark.parametrize("kind", CONVERSIONS)
def test_conversions(video_processor, frames, kind):
    converted = pixels(video_processor, CONVERSIONS[kind](frames))
    expected = pixels(video_processor, frames)
    # Of floats from 0 to 255 the resized values are not rounded, as in the native processor.
    exact = kind not in ("floats from 0 to 255", "bfloat16 from 0 to 255", "half floats from 0 to 1")
    assert torch.allclose(converted, expected, atol=0 if exact else 0.01)


def test_frames_that_the_caller_scaled_stay_as_they_are(video_processor, frames):
    scaled = torch.from_numpy(frames).float() / 255
    converted = pixels(video_processor, scaled, do_rescale=False)
    assert torch.allclose(converted, pixels(video_processor, frames), atol=0.01)


def test_booleans_are_black_and_white(video_processor, frames):
    mask = frames > 127
    assert torch.equal(pixels(video_processor, mask), pixels(video_processor, mask.astype(np.uint8) * 255))


@pytest.mark.parametrize("axis", [1, 3])
def test_one_channel_is_grey(video_processor, frames, axis):
    grey = frames[..., :1] if axis == 3 else frames[..., :1].transpose(0, 3, 1, 2)
    expected = pixels(video_processor, frames[..., :1].repeat(3, axis=3))
    assert torch.equal(pixels(video_processor, grey), expected)
    as_list = [Image.fromarray(frame[..., 0]) for frame in frames]
    assert torch.equal(pixels(video_processor, as_list), expected)


WRONG = {
    "16 bits": (lambda f: f.astype(np.uint16) * 257, "dtype torch.uint16 have values from .* to 65535"),
    "negative": (lambda f: f.astype(np.int64) - 300, "have values from -300 to"),
    "normalised": (lambda f: f / 127.5 - 1, "have values from -1 to 1; pass uint8 frames"),
    "floats of 16 bits": (lambda f: f * 257.0, "have values from 0 to 65535"),
    "not a number": (lambda f: np.where(f == 7, np.nan, f), "infinite or not a number"),
    "infinite": (lambda f: np.where(f == 7, np.inf, f), "infinite or not a number"),
    "complex": (lambda f: f.astype(np.complex64), "are not supported"),
    "text": (lambda f: f.astype(str), "dtype <U3 are not supported; convert them to uint8"),
    "objects": (lambda f: f.astype(object), "dtype object are not supported"),
    "four channels": (
        lambda f: f[..., [0, 1, 2, 0]],
        r"shape \(3, 40, 48, 4\) and dtype .*, height, width, 3\)",
    ),
    "no pixels": (lambda f: f[:, :0, :0], r"shape \(3, 0, 0, 3\) have no pixels"),
    "no width": (lambda f: f[:, :, :0], r"shape \(3, 40, 0, 3\) have no pixels"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_refused_by_name(video_processor, frames, kind):
    make, message = WRONG[kind]
    with pytest.raises(ValueError, match=message):
        pixels(video_processor, make(frames))


WRONG_INDICES = [[0, np.nan, 2], [-1, 0, 1], [2, 1, 0], [0, 2, 1], [0, 0.5, 1], ["a", "b", "c"], [0, 1, np.inf]]


@pytest.mark.parametrize("indices", WRONG_INDICES)
def test_indices_that_are_none(video_processor, frames, indices):
    metadata = {"total_num_frames": 9, "fps": 3, "frames_indices": indices}
    with pytest.raises(ValueError, match="frames_indices=.* must be whole numbers that ascend"):
        pixels(video_processor, frames, video_metadata=[metadata])


def test_indices_may_repeat(video_processor, frames):
    metadata = {"total_num_frames": 9, "fps": 3, "frames_indices": torch.tensor([0, 4, 4])}
    assert len(pixels(video_processor, frames, video_metadata=[metadata])) == 3


@pytest.mark.parametrize("name", ["image_mean", "image_std"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_settings_that_are_no_numbers(video_processor, frames, name, value):
    with pytest.raises(ValueError, match=f"{name}=.* must be finite"):
        pixels(video_processor, frames, **{name: [0.5, value, 0.5]})
