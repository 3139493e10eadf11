"""Reading video files, and preprocessing their frames."""

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch
from stts_molmo.processing_stts_molmo import STTSMolmoVideoProcessor
from stts_molmo.video_stts_molmo import FrameIndex, decode_clip, read_frame_index

try:
    from torchcodec.decoders import VideoDecoder
except (ImportError, OSError, RuntimeError):  # not installed, or without the FFmpeg libraries that it was built for
    VideoDecoder = None

from ..common import torch_threads
from .bench import Bench
from .measuring import summary

BATCH = 8  # files that are decoded together
TOGETHER = f"decode sampled frames of {BATCH} files"


def write_long_clip(path: Path, seconds: int):
    """A moving pattern at 640 x 360 and 30 frames a second, with a key frame every two seconds."""
    rows, columns = torch.meshgrid(torch.arange(360), torch.arange(640), indexing="ij")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=30, options={"g": "60"})
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        for tick in range(30 * seconds):
            channels = [rows + 2 * tick, columns + tick, (rows + columns) // 2 - tick]
            frame = (torch.stack(channels, dim=-1) % 256).to(torch.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")))
        container.mux(stream.encode())


def decode_all(path: str) -> None:
    """Decodes every frame to RGB, as a reader without seeking does."""
    with av.open(path) as container:
        container.streams.video[0].thread_type = "AUTO"
        for frame in container.decode(video=0):
            frame.to_ndarray(format="rgb24")


def decode_clip_with_torchcodec(path: str, index: FrameIndex, targets: np.ndarray) -> torch.Tensor:
    """What `decode_clip` gives, by another reader, which tells neither of damage nor frame by frame."""
    seconds = targets * float(index.time_base) + 1e-6
    return VideoDecoder(path, num_ffmpeg_threads=0).get_frames_played_at(torch.from_numpy(seconds)).data


def clip_seconds(path: str, rounds: int) -> tuple[dict[str, int], dict[str, list[tuple[float, float]]]]:
    """Frames sampled and frames in the file; and of each way to decode, and of preprocessing, CPU and wall seconds."""
    processor = STTSMolmoVideoProcessor(do_rescale=True, do_normalize=True)
    frames, metadata = processor.fetch_videos(path, sample_indices_fn=processor.sample_frames)

    def decode_sampled(decode: Callable):
        index = read_frame_index(path)
        return decode(path, index, index.pts[processor.sample_frames(index.metadata())])

    decode = partial(decode_sampled, decode_clip)
    preprocess = partial(
        processor, videos=[frames], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt"
    )

    def decode_then_preprocess():
        decode()
        preprocess()

    def decode_beside_preprocess():
        with ThreadPoolExecutor(1) as pool:
            decoding = pool.submit(decode)
            preprocess()
            decoding.result()

    stages = {
        "decode sampled frames": decode,
        TOGETHER: partial(processor.fetch_videos, [path] * BATCH, sample_indices_fn=processor.sample_frames),
        "decode every frame": partial(decode_all, path),
        "preprocess": preprocess,
        "decode, then preprocess": decode_then_preprocess,
        "decode beside preprocess": decode_beside_preprocess,  # what overlapping them could gain at best
    }
    if VideoDecoder is not None:
        stages["decode sampled frames, torchcodec"] = partial(decode_sampled, decode_clip_with_torchcodec)
    seconds = {stage: [] for stage in stages}
    for index in range(rounds + 1):
        for stage, step in stages.items():
            start = (time.process_time(), time.perf_counter())
            step()
            end = (time.process_time(), time.perf_counter())
            if index:  # the first round warms up
                seconds[stage].append(tuple(b - a for a, b in zip(start, end, strict=True)))
    return {"frames": len(frames), "file_frames": metadata.total_num_frames}, seconds


@torch_threads(os.cpu_count())
def measure_clip(bench: Bench) -> list[dict]:
    """
    Decoding of files of several lengths and preprocessing of what was sampled, at Molmo2's frame size, with as many
    threads as there are cores.
    """
    records = []
    for length in bench.preset.clip_seconds:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "clip.mp4"
            write_long_clip(path, length)
            counts, seconds = clip_seconds(str(path), bench.preset.parity_rounds)
        for stage, times in seconds.items():
            cpu, wall = (summary(list(values)) for values in zip(*times, strict=True))
            files = BATCH if stage == TOGETHER else 1
            records.append(
                {"section": "clip", **counts, "files": files, "stage": stage, "seconds": cpu, "wall_seconds": wall}
            )
    return records
