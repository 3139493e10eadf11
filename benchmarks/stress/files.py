"""Small videos in many containers, and ways to damage them. All of it follows from a seed."""

import io
from collections.abc import Callable
from fractions import Fraction

import av
import numpy as np

H264 = {"bf": "2", "g": "12", "threads": "1"}
CODECS = {
    "mp4": ("libx264", H264),
    "mov": ("mpeg4", {"g": "12"}),
    "matroska": ("libx264", H264),
    "webm": ("libvpx", {"cpu-used": "8", "g": "12", "threads": "1"}),
    "mpegts": ("libx264", H264),
    "flv": ("libx264", {"bf": "0", "g": "12", "threads": "1"}),
    "avi": ("mpeg4", {"g": "12"}),
    "mpeg": ("mpeg2video", {"g": "12"}),
    "nut": ("mpeg4", {"g": "12"}),
    "asf": ("mpeg4", {"g": "12"}),
    "gif": ("gif", {}),
}


def write_video(
    container: str,
    num_frames: int = 36,
    size: tuple[int, int] = (64, 48),
    rate: int = 25,
    times: list[int] | None = None,
    **options,
) -> bytes:
    """
    A video of a square that moves, as the bytes of a file.

    Args:
        times: milliseconds at which the frames are shown, instead of `rate` a second.
        options: of the container.
    """
    codec, codec_options = CODECS[container]
    file = io.BytesIO()
    with av.open(file, "w", format=container, **options) as output:
        stream = output.add_stream(codec, rate=rate, options=codec_options)
        stream.width, stream.height = size
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(num_frames):
            pixels = np.full((size[1], size[0], 3), 40, np.uint8)
            left = number * size[0] // (2 * num_frames)
            pixels[size[1] // 4 : size[1] // 2, left : left + size[0] // 2] = (200, 80 + 4 * (number % 30), 30)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def flip_bits(data: bytearray, rng: np.random.Generator) -> bytearray:
    for position in rng.integers(0, len(data), rng.integers(1, 20)):
        data[position] ^= 1 << int(rng.integers(8))
    return data


def overwrite(data: bytearray, rng: np.random.Generator) -> bytearray:
    start = int(rng.integers(len(data)))
    length = int(rng.integers(1, 1 + max(1, len(data) // 4)))
    noise = rng.integers(0, 256, length, dtype=np.uint8).tobytes() if rng.random() < 0.5 else bytes(length)
    data[start : start + length] = noise[: len(data) - start]
    return data


def cut_end(data: bytearray, rng: np.random.Generator) -> bytearray:
    return data[: int(rng.integers(1, max(2, len(data))))]


def cut_out(data: bytearray, rng: np.random.Generator) -> bytearray:
    start = int(rng.integers(len(data)))
    del data[start : start + int(rng.integers(1, 1 + max(1, len(data) // 3)))]
    return data


def repeat(data: bytearray, rng: np.random.Generator) -> bytearray:
    start, stop = sorted(rng.integers(0, len(data), 2).tolist())
    position = int(rng.integers(len(data)))
    return data[:position] + data[start:stop] + data[position:]


def set_extreme(data: bytearray, rng: np.random.Generator) -> bytearray:
    """Write what breaks sizes and times into a few places, most of them near the start, where headers are."""
    for _ in range(int(rng.integers(1, 5))):
        width = int(rng.choice([1, 2, 4, 8]))
        position = int(len(data) * rng.random() ** 3)
        value = rng.choice([b"\x00", b"\xff", b"\x7f", b"\x80"]) * width
        data[position : position + width] = value[: len(data) - position]
    return data


def join(data: bytearray, rng: np.random.Generator) -> bytearray:
    """The file twice, the second time perhaps without its beginning."""
    return data + data[int(len(data) * rng.random() * (rng.random() < 0.5)) :]


DAMAGES: list[Callable[[bytearray, np.random.Generator], bytearray]] = [
    flip_bits,
    overwrite,
    cut_end,
    cut_out,
    repeat,
    set_extreme,
    join,
]


def damaged(data: bytes, seed: list[int]) -> bytes:
    """One to three of `DAMAGES`."""
    rng = np.random.default_rng(seed)
    variant = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        variant = rng.choice(DAMAGES)(variant, rng) or bytearray(1)
    return bytes(variant)
