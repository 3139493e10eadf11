"""Files that contradict themselves, are damaged, or are larger than they look: told, bounded, and nothing lost."""

import io
import os
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
import stts_molmo.video_stts_molmo as video_module
import torch
from helpers import TINY, frame_number, remux, write_video
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stts_molmo.processing_stts_molmo import STTSMolmoVideoProcessor
from stts_molmo.video_stts_molmo import (
    EncodedVideo,
    FrameIndex,
    iterate_packets,
    read_frame_index,
    read_video,
    sample_frame_times,
    seek_frames,
)

from benchmarks.stress.files import damaged
from benchmarks.stress.files import write_video as write_container


@pytest.fixture(scope="module")
def video_processor() -> STTSMolmoVideoProcessor:
    return STTSMolmoVideoProcessor.from_pretrained(TINY)


def read(data: bytes, sample=None):
    return read_video(EncodedVideo(io.BytesIO(data)), sample)


# A clock that goes back


@pytest.mark.parametrize("suffix", ["ts", "mkv"])
def test_joined_recordings_lose_nothing(tmp_path, suffix, caplog):
    """Two recordings one after the other, byte by byte: each begins at the same time."""
    first = write_video(tmp_path / f"a.{suffix}", num_frames=30, options={"bf": "2"})
    second = write_video(
        tmp_path / f"b.{suffix}",
        num_frames=20,
        options={"bf": "2"},
        paint=lambda number, pixels: pixels.fill(20 + 4 * (30 + number)),
    )
    clip, metadata = read(first.read_bytes() + second.read_bytes())
    assert [frame_number(frame) for frame in clip] == list(range(50))
    assert (np.diff(metadata.timestamps) > 0).all()
    assert metadata.timestamps[-1] == pytest.approx(49 / 30, abs=0.1)
    assert "has a clock that goes back" in caplog.text


def test_an_intact_file_has_a_clock_that_goes_on(tmp_path, caplog):
    path = str(write_video(tmp_path / "clip.ts", num_frames=30, options={"bf": "2"}))
    with video_module.open_video(path) as (container, stream):
        assert {restarts for _, restarts in iterate_packets(container, stream)} == {0}
    read_video(path)
    assert not caplog.records


# Damage


def test_corrupt_frames_are_counted(tmp_path, monkeypatch, caplog):
    """Half of the bytes of every tenth frame are noise: the decoder conceals that, and says so."""
    path = write_video(tmp_path / "clip.mp4", num_frames=40, codec="mpeg2video", options={"g": "1", "qmin": "1"})
    data, noise = bytearray(path.read_bytes()), np.random.default_rng(0)
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    for position, size in packets[::10]:
        start = position + size // 2
        data[start : position + size] = noise.integers(0, 256, position + size - start, dtype=np.uint8).tobytes()
    with av.open(io.BytesIO(bytes(data))) as container:
        marked = sum(frame.is_corrupt for frame in container.decode(video=0))
    assert marked
    clip, _ = read(bytes(data))
    assert len(clip) == 40
    assert f"is damaged: {marked} of 40 sampled frames are marked as corrupt" in caplog.text


def test_packets_that_the_container_marks_are_counted(caplog):
    """A transport stream that lost a packet in mid-file: the frame is there, and is told of."""
    data = write_container("mpegts", num_frames=60)
    for number in range(20, 60):
        start = 188 * number
        is_video, is_middle = data[start + 1 : start + 3] == b"\x01\x00", not data[start + 1] & 0x40
        if is_video and is_middle:
            break
    clip, _ = read(data[:start] + data[start + 188 :])
    assert len(clip) == 60
    assert "marked as corrupt" in caplog.text


# A codec that nobody knows, a container that appears in mid-file, a time before the first, no frames to sample, and
# nothing to show from the first key frame on.
DAMAGES = [
    ("mov", [1, 27]),
    ("asf", [1, 0]),
    ("nut", [1, 9]),
    ("mpegts", [1, 63]),
    ("webm", [1, 21]),
    ("mp4", [11, 12540]),
]


@pytest.mark.parametrize(("container", "seed"), DAMAGES, ids=str)
def test_damage_found_by_the_fuzzer(container, seed, video_processor):
    """Frames in order, or a sentence."""
    try:
        (frames,), (metadata,) = video_processor.sample_videos(damaged(write_container(container), seed))
    except ValueError as error:
        assert type(error) is ValueError and str(error).endswith((".", ")"))
    else:
        assert len(frames) == len(metadata.timestamps) > 0 and (np.diff(metadata.timestamps) >= 0).all()


class StubContainer:
    """A container whose every jump or read fails as PyAV's may."""

    def __init__(self, packets=(), error: Exception | None = None):
        self.packets, self.error = packets, error

    def demux(self, stream):
        yield from self.packets
        raise self.error

    def seek(self, *args, **kwargs):
        raise self.error


@pytest.mark.parametrize("error", [IndexError("index"), av.EOFError(5, "end"), av.PermissionError(1, "denied")])
def test_errors_of_the_reader_end_the_video(error):
    packet = av.Packet(b"data")
    packet.pts = packet.dts = 7
    packets = [packet for packet, _ in iterate_packets(StubContainer([packet], error), None)]
    assert [packet.pts for packet in packets] == [7]


def test_a_jump_that_fails_is_none():
    container = StubContainer(error=av.PermissionError(1, "Operation not permitted"))
    assert seek_frames(container, None, np.array([0, 10, 20]), 5) is None


def test_where_no_jump_works_frames_are_decoded_on(tmp_path, monkeypatch):
    path = str(write_video(tmp_path / "clip.mp4", num_frames=60))
    monkeypatch.setattr(video_module, "seek_frames", lambda *args: None)
    clip, metadata = read_video(path, lambda metadata: np.array([0, 50, 59]))
    assert [frame_number(frame) for frame in clip] == [0, 0, 9]


def test_frames_before_the_first_time_of_the_index(tmp_path, monkeypatch):
    """The decoder may give a frame other times than its packet's: still no sampling among zero frames."""
    path = str(write_video(tmp_path / "clip.mp4", num_frames=20))
    decode_frames = video_module.decode_frames

    def first_only(video, index, targets, *args):
        frame = next(decode_frames(video, index, targets, *args))
        frame.pts = int(index.pts[0]) - 5
        yield frame

    monkeypatch.setattr(video_module, "decode_frames", first_only)
    clip, metadata = read_video(path)
    assert len(clip) == 1 and metadata.timestamps == [0]


# Every frame, in every container


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "flv", "webm", "avi", "ts"])
def test_all_frames_at_their_own_rate(tmp_path, suffix, video_processor):
    """Matroska and FLV round times to milliseconds."""
    codec = {"webm": "libvpx", "avi": "mpeg4"}.get(suffix, "libx264")
    path = str(write_video(tmp_path / f"clip.{suffix}", num_frames=300, size=(32, 32), codec=codec))
    for options in ({"max_fps": 30, "num_frames": 300}, {"fps": 30}):
        (frames,), (metadata,) = video_processor.sample_videos(path, **options)
        assert metadata.frames_indices.tolist() == list(range(300))


RATES = [
    Fraction(24),
    Fraction(30000, 1001),
    Fraction(24000, 1001),
    Fraction(25, 2),
    Fraction(16),
    Fraction(60),
    Fraction(7),
]


@pytest.fixture(scope="module")
def containers(tmp_path_factory) -> dict[Fraction, list[FrameIndex]]:
    """Per rate the index of the same packets in several containers."""
    folder = tmp_path_factory.mktemp("containers")
    indices = {}
    for rate in RATES:
        name = str(rate).replace("/", "_")
        mp4 = write_video(folder / f"{name}.mp4", num_frames=90, fps=rate, size=(32, 32), options={"bf": "0"})
        others = [remux(mp4, folder / f"{name}.{suffix}") for suffix in ("mkv", "mov", "flv", "ts", "nut")]
        indices[rate] = [read_frame_index(str(path)) for path in (mp4, *others)]
    return indices


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(RATES),
    st.one_of(
        st.fixed_dictionaries({"num_frames": st.integers(1, 100), "max_fps": st.floats(0.3, 70)}),
        st.fixed_dictionaries({"fps": st.floats(0.3, 70)}),
        st.sampled_from([{"fps": float(rate)} for rate in RATES]),
    ),
)
def test_the_same_frames_in_every_container(containers, video_processor, rate, options):
    samples = [video_processor.sample_frames(index.metadata(), **options) for index in containers[rate]]
    assert all(np.array_equal(sample, samples[0]) for sample in samples)
    times = [index.frame_times()[sample].tolist() for index, sample in zip(containers[rate], samples, strict=True)]
    assert all(time == times[0] for time in times)


def test_frames_closer_than_a_millisecond_keep_their_times():
    index = FrameIndex(np.array([0, 3, 9]), np.array([0]), frozenset(), Fraction(1, 90000), None)
    assert index.frame_times().tolist() == pytest.approx([0, 3 / 90000, 9 / 90000])


# Sizes


def test_a_far_time_is_refused_before_memory_is_asked_for(video_processor):
    data = write_container("matroska", num_frames=10, times=[*range(0, 900, 100), 10**12])
    assert len(data) < 14_000
    with pytest.raises(ValueError, match="fps=1 would take .* samples of a video whose last frame is at 1e.09 s"):
        video_processor.sample_videos(data, fps=1)
    (frames,), (metadata,) = video_processor.sample_videos(data, num_frames=4)
    assert metadata.timestamps[-1] == pytest.approx(10**9, rel=1e-6)


def test_times_that_do_not_fit_into_64_bits_count_as_absent():
    packets = []
    for pts in (0, 2**62, 5):
        packet = av.Packet(b"data")
        packet.pts = packet.dts = pts
        packets.append(packet)
    container = StubContainer(packets, av.EOFError(5, "end"))
    assert [packet.pts for packet, _ in iterate_packets(container, None)] == [0, 5]


@pytest.mark.parametrize("size", [(16400, 16), (16, 16400)])
def test_a_declared_size_beyond_the_limit(tmp_path, size, video_processor):
    path = write_video(tmp_path / "wide.mkv", num_frames=1, size=size, codec="ffv1")
    assert path.stat().st_size < 20_000
    with pytest.raises(ValueError, match=rf"declares frames of {size[0]} x {size[1]} pixels; at most 16384"):
        video_processor.sample_videos(path)


def test_the_limit_is_a_setting_of_the_processor(monkeypatch):
    data = write_container("mp4")
    monkeypatch.setattr(video_module, "MAX_FRAME_SIZE", 16384)
    assert STTSMolmoVideoProcessor(max_frame_size=64).sample_videos(data)
    with pytest.raises(ValueError, match="64 x 48 pixels; at most 63"):
        STTSMolmoVideoProcessor(max_frame_size=63).sample_videos(data)


def test_frames_that_grow_in_mid_stream_are_not_decoded(caplog):
    """A transport stream may change its size; the declared one is that of its beginning."""
    data = write_container("mpegts") + write_container("mpegts", size=(128, 96))
    processor = STTSMolmoVideoProcessor(max_frame_size=64)
    (frames,), (metadata,) = processor.sample_videos(data, do_sample_frames=False)
    assert len(frames) < 72 and "cannot be decoded" in caplog.text


def test_a_pipe_is_no_file(tmp_path):
    """Opening it would wait for a writer."""
    os.mkfifo(tmp_path / "pipe.mp4")
    for name in (tmp_path / "pipe.mp4", "/dev/zero"):
        with pytest.raises(ValueError, match="is not a regular file"):
            read_video(str(name))


@pytest.mark.parametrize("size", [(64, 48), (50, 90), (36, 36), (640, 360)])
@pytest.mark.parametrize("options", [{}, {"size": {"height": 24, "width": 24}, "patch_size": 4}, {"resample": 3}])
def test_frames_resized_one_by_one_have_the_values_of_frames_resized_later(tmp_path, video_processor, size, options):
    noise = np.random.default_rng(0)

    def paint(number, pixels):
        pixels[:] = noise.integers(0, 256, pixels.shape, dtype=np.uint8)

    path = str(write_video(tmp_path / "noise.mp4", num_frames=4, size=size, paint=paint))
    frames, metadata = read_video(path)
    assert frames.shape == (4, 3, size[1], size[0])
    inputs = video_processor(path, do_sample_frames=False, return_metadata=True, **options)
    later = video_processor([frames], video_metadata=[metadata], do_sample_frames=False, **options)
    assert torch.equal(inputs["pixel_values_videos"], later["pixel_values_videos"])
    assert (inputs["video_metadata"][0].height, inputs["video_metadata"][0].width) == (size[1], size[0])


def test_memory_grows_neither_with_the_length_nor_with_the_resolution(tmp_path):
    """The peak of a process that reads a minute, an hour (its frames would be 200 MB) and 64 large frames (240 MB)."""
    write_video(tmp_path / "minute.mp4", 60, fps=1, size=(160, 120), codec="mpeg4")
    write_video(tmp_path / "hour.mp4", 3600, fps=1, size=(160, 120), codec="mpeg4")
    write_video(tmp_path / "large.mp4", 64, fps=1, size=(1600, 800), codec="mpeg4")
    program = f"""
import resource
from stts_molmo.processing_stts_molmo import STTSMolmoVideoProcessor
processor = STTSMolmoVideoProcessor(max_fps=1)
for name in ("minute", "hour", "large"):
    (frames,), (metadata,) = processor.sample_videos(f"{tmp_path}/{{name}}.mp4")
    print(metadata.total_num_frames, len(frames), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    del frames
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    minute, hour, large = (list(map(float, line.split())) for line in result.stdout.splitlines())
    assert (hour[:2], large[:2]) == ([3600, 64], [64, 64])
    assert hour[2] - minute[2] < 30, f"{hour[2] - minute[2]} MB more for an hour than for a minute"
    assert large[2] - hour[2] < 120, f"{large[2] - hour[2]} MB more for large frames than for small ones"


def test_a_rate_without_a_cap_is_bounded():
    with pytest.raises(ValueError, match="pass a lower fps, or num_frames"):
        sample_frame_times(1e9, None, 1)
    assert len(sample_frame_times(1e9, 64, 1)) == 64
