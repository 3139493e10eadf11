"""Reading a clip of high resolution: frames made small one by one, as they are decoded, or all of them afterwards."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch
from stts_molmo.processing_stts_molmo import STTSMolmoVideoProcessor
from stts_molmo.video_stts_molmo import read_video

from ..common import torch_threads
from ..processes import apart, peak_resident_bytes
from .bench import Bench
from .measuring import CpuClock, summary, take_turns

NUM_FRAMES = 64


def write_large_clip(file: Path, width: int, height: int) -> None:
    """A moving pattern at 2 frames a second, all of which are sampled."""
    pattern = ((np.arange(height * 3 // 2)[:, None] + np.arange(width)) // 4).astype(np.uint8)
    options = {"preset": "ultrafast", "g": "16"}
    with av.open(str(file), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=2, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(NUM_FRAMES):
            planes = pattern + np.uint8(3 * number)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
        container.mux(stream.encode())


def read_frame_by_frame(path: str) -> torch.Tensor:
    return STTSMolmoVideoProcessor()(path, return_tensors="pt")["pixel_values_videos"]


def read_then_resize(path: str) -> torch.Tensor:
    processor = STTSMolmoVideoProcessor()
    frames, metadata = read_video(path, processor.sample_frames)
    inputs = processor([frames], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt")
    return inputs["pixel_values_videos"]


WAYS = {"frame by frame": read_frame_by_frame, "all, then resized": read_then_resize}


def added_bytes(read: Callable[[str], torch.Tensor], path: str) -> int:
    """What reading adds to the peak memory of this process."""
    before = peak_resident_bytes()
    read(path)
    return peak_resident_bytes() - before


@torch_threads(1)
def measure_large(bench: Bench) -> list[dict]:
    """
    Memory and time of each way, in turns, with torch on one thread and the decoder on all cores.

    Raises:
        ValueError: they give other pixels.
    """
    width, height = bench.preset.large_size
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "clip.mp4")
        write_large_clip(Path(path), width, height)
        if not torch.equal(*(read(path) for read in WAYS.values())):
            raise ValueError("Frames resized as they are decoded differ from those resized afterwards.")
        added = {name: apart(added_bytes, read, path) for name, read in WAYS.items()}
        steps = {name: partial(read, path) for name, read in WAYS.items()}
        measurements = take_turns(steps, CpuClock, bench.preset.rounds)
    first = measurements["frame by frame"].seconds
    return [
        {
            "section": "large clip",
            "name": name,
            "frames": NUM_FRAMES,
            "width": width,
            "height": height,
            "added_bytes": added[name],
            **measurement.times(),
            "times_frame_by_frame": summary([b / a for a, b in zip(first, measurement.seconds, strict=True)]),
        }
        for name, measurement in measurements.items()
    ]
