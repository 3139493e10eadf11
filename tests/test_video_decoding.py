"""Which frame of a file is taken, what its pixels are, and what happens with files that are no videos.

Every clip is written here. Frame `i` is a flat grey of `brightness(i)`, so a decoded frame tells its own number.
"""

import io

import av
import numpy as np
import pytest
import stts_molmo.video_stts_molmo as video_module
from helpers import NUM_LEVELS, brightness, frame_number, remux, write_video
from stts_molmo.video_stts_molmo import (
    EncodedVideo,
    decode_clip,
    read_frame_index,
    read_video,
    sample_frame_indices,
    sample_frame_times,
)

GREY_CODECS = {
    "h264.mp4": ("libx264", {"bf": "2"}),
    "open_gop.mp4": ("libx264", {"bf": "3", "x264-params": "open-gop=1"}),
    "mpeg4.mp4": ("mpeg4", {"qmin": "1", "qmax": "2"}),
    "vp8.webm": ("libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "realtime"}),
    "vp9.webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
    "h264.mkv": ("libx264", {"bf": "2"}),
    "h264.ts": ("libx264", {"bf": "2"}),
    "mpeg4.avi": ("mpeg4", {"qmin": "1", "qmax": "2", "bf": "2"}),
    "h264.flv": ("libx264", {"bf": "0"}),
    "frames.gif": ("gif", {}),
}


def cut(path, share):
    """Keep the first `share` of the bytes of a file."""
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def sampler(num_frames=64, fps=2):
    def sample(metadata):
        times = metadata.frame_times
        sample_times = sample_frame_times(times[-1], num_frames, fps, metadata.tolerance)
        return sample_frame_indices(times, sample_times, metadata.tolerance)

    return sample


def read(path, **sampling):
    return read_video(path if isinstance(path, EncodedVideo) else str(path), sampler(**sampling))


@pytest.fixture(params=GREY_CODECS, scope="module")
def container_clip(request, tmp_path_factory):
    """A clip of 60 frames at 30 fps, a key frame every 12, in each container."""
    codec, options = GREY_CODECS[request.param]
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no encoder {codec}")
    return str(write_video(tmp_path_factory.mktemp("clips") / request.param, codec=codec, options=options))


def test_each_container_gives_the_frames_shown_and_their_times(container_clip):
    clip, metadata = read(container_clip)
    assert clip.shape == (5, 3, 48, 64)
    assert metadata.total_num_frames == 60
    expected = [0, 15, 30, 45, 59]
    assert metadata.frames_indices.tolist() == expected
    if not container_clip.endswith("gif"):  # its palette has no room for 50 greys
        assert [frame_number(frame) for frame in clip] == [number % NUM_LEVELS for number in expected]
    np.testing.assert_allclose(metadata.timestamps, np.array(expected) / 30, atol=0.011)  # gif counts in 10 ms
    assert metadata.fps == pytest.approx(30, abs=0.1)


def test_jumping_and_decoding_on_give_the_same_pixels(container_clip, monkeypatch):
    index = read_frame_index(container_clip)
    targets = index.pts[[0, 1, 10, 11, 12, 13, 23, 24, 40, 41, 58, 59]]
    jumps = []
    seek_frames = video_module.seek_frames

    def count(*args):
        jumps.append(args)
        return seek_frames(*args)

    monkeypatch.setattr(video_module, "seek_frames", count)
    monkeypatch.setattr(video_module, "MIN_FRAMES_TO_JUMP", 10**6)
    sequential = decode_clip(container_clip, index, targets)
    assert not jumps
    monkeypatch.setattr(video_module, "MIN_FRAMES_TO_JUMP", 0)
    jumped = decode_clip(container_clip, index, targets)
    assert jumps or len(index.keyframes) == 1
    assert jumped.pts.tolist() == sequential.pts.tolist() == targets.tolist()
    assert jumped.frames.equal(sequential.frames)


def test_a_time_between_two_frames_shows_the_first_of_them(container_clip):
    index = read_frame_index(container_clip)
    chosen = index.pts[[0, 5, 30, 58]]
    clip = decode_clip(container_clip, index, (chosen + index.pts[[1, 6, 31, 59]]) // 2)
    assert clip.pts.tolist() == chosen.tolist()
    assert clip.frames.equal(decode_clip(container_clip, index, chosen).frames)


def test_far_apart_samples_skip_most_of_the_file(tmp_path, monkeypatch):
    path = str(write_video(tmp_path / "long.mp4", num_frames=600))
    decoded = []
    iterate_frames = video_module.iterate_frames

    def count(*args):
        for frame in iterate_frames(*args):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(video_module, "iterate_frames", count)
    clip, _ = read(path, num_frames=5, fps=None)
    assert [frame_number(frame) for frame in clip] == [0, 149 % 50, 299 % 50, 449 % 50, 599 % 50]
    assert len(decoded) < 5 * 12 + 5


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_frame_rate(tmp_path, suffix):
    """Frame numbers say which frame is on display at a time; index / fps would say another."""
    gaps = np.random.default_rng(0).integers(10, 400, 60) / 1000
    times = np.concatenate([[0], np.cumsum(gaps)])[:60]
    path = write_video(tmp_path / f"vfr.{suffix}", times=times)
    clip, metadata = read(path)
    sample_times = sample_frame_times(times[-1])
    shown = [int(np.flatnonzero(times <= time + 1e-3)[-1]) for time in sample_times]
    shown = sorted(set(shown))
    assert [frame_number(frame) for frame in clip] == [number % NUM_LEVELS for number in shown]
    np.testing.assert_allclose(metadata.timestamps, times[shown], atol=1e-3)
    assert metadata.timestamps[-1] == pytest.approx(times[-1], abs=1e-3)
    wrong = np.array(shown) / metadata.fps
    assert np.abs(wrong - times[shown]).max() > 0.3, "the clip must be one on which index / fps is wrong"


def test_times_count_from_the_first_frame(tmp_path):
    path = write_video(tmp_path / "late.mkv", num_frames=30, times=5 + np.arange(30) / 10)
    clip, metadata = read(path)
    assert metadata.timestamps == pytest.approx([0, 0.5, 1.0, 1.5, 2.0, 2.5, 2.9])
    assert [frame_number(frame) for frame in clip] == [0, 5, 10, 15, 20, 25, 29]


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_rotation_metadata_is_applied(tmp_path, turns):
    """A phone writes the picture as its sensor sees it, and a matrix that turns it clockwise for display."""

    def mark_top_left(number, pixels):
        pixels[:24, :32] = 250

    path = write_video(tmp_path / "phone.mp4", num_frames=3, paint=mark_top_left)
    one, minus_one = 0x10000, 0xFFFF0000
    matrices = [(one, 0, 0, one), (0, one, minus_one, 0), (minus_one, 0, 0, minus_one), (0, minus_one, one, 0)]

    def track_matrix(a, b, c, d):
        return b"".join(value.to_bytes(4, "big") for value in (a, b, 0, c, d, 0, 0, 0, 0x40000000))

    data = path.read_bytes()
    start = data.index(b"tkhd")
    position = data.index(track_matrix(*matrices[0]), start)
    path.write_bytes(data[:position] + track_matrix(*matrices[turns]) + data[position + 36 :])

    clip, metadata = read(path)
    assert clip.shape[-2:] == (metadata.height, metadata.width) == ((48, 64) if turns % 2 == 0 else (64, 48))
    quarters = [quarter.float().mean() for half in clip[0].chunk(2, dim=1) for quarter in half.chunk(2, dim=2)]
    clockwise_from_top_left = [quarters[0], quarters[1], quarters[3], quarters[2]]
    assert int(np.argmax(clockwise_from_top_left)) == turns


def test_one_frame(tmp_path):
    clip, metadata = read(write_video(tmp_path / "one.mp4", num_frames=1))
    assert clip.shape[0] == 1 and metadata.timestamps == [0.0] and metadata.total_num_frames == 1


def test_live_recording_declares_neither_duration_nor_frames(tmp_path, caplog):
    class Pipe(io.RawIOBase):
        def __init__(self):
            self.data = bytearray()

        def writable(self):
            return True

        def write(self, data):
            self.data += bytes(data)
            return len(data)

    pipe = Pipe()
    write_video(pipe, codec="libvpx", options={"deadline": "realtime"}, format="webm")
    path = tmp_path / "live.webm"
    path.write_bytes(pipe.data)
    with av.open(str(path)) as container:
        assert container.duration is None and container.streams.video[0].frames == 0
    clip, metadata = read(path)
    assert [frame_number(frame) for frame in clip] == [0, 15, 30, 45, 9]
    assert not caplog.records


def test_without_sampling_every_frame_is_decoded(tmp_path):
    clip, metadata = read_video(str(write_video(tmp_path / "all.mp4", num_frames=20)))
    assert [frame_number(frame) for frame in clip] == list(range(20))
    assert metadata.frames_indices.tolist() == list(range(20))


@pytest.mark.parametrize("kind", ["faststart", "fragmented", "mkv", "webm"])
def test_truncated_video_gives_the_frames_that_are_there(tmp_path, kind, caplog):
    whole = write_video(tmp_path / "whole.mp4", num_frames=240)
    path = tmp_path / "cut.mp4"
    if kind == "faststart":
        remux(whole, path, options={"movflags": "+faststart"})
    elif kind == "fragmented":
        remux(whole, path, options={"movflags": "+frag_keyframe+empty_moov"})
    elif kind == "mkv":
        path = remux(whole, tmp_path / "cut.mkv")
    else:
        options = {"deadline": "realtime"}
        path = write_video(tmp_path / "cut.webm", num_frames=240, codec="libvpx", options=options)
    cut(path, 0.7)
    clip, metadata = read(path, num_frames=10, fps=None)
    assert len(clip) == 10
    assert 60 < metadata.total_num_frames < 230
    assert metadata.frames_indices[-1] == metadata.total_num_frames - 1
    # The cut may take a B-frame and leave the frame after it, so times tell which frames these are.
    numbers = [frame_number(frame) for frame in clip]
    assert numbers == [round(time * 30) % NUM_LEVELS for time in metadata.timestamps]
    if kind != "fragmented":  # its header is written before the length is known
        assert "truncated" in caplog.text


@pytest.mark.parametrize("share", [0.4, 0.0])
def test_damaged_data_is_resampled_before_the_damage(tmp_path, share, caplog):
    """A download that was cut short in a file of full size: the index is whole, the rest of the data is zeros."""
    noise = np.random.default_rng(0)

    def paint(number, pixels):
        pixels[:, 32:] = noise.integers(0, 255, (48, 32, 3), dtype=np.uint8)
        pixels[:, :32] = brightness(number)

    whole = write_video(
        tmp_path / "whole.mp4", num_frames=240, codec="mpeg4", options={"qmin": "1", "qmax": "2"}, paint=paint
    )
    path = remux(whole, tmp_path / "zeros.mp4", options={"movflags": "+faststart"})
    with av.open(str(path)) as container:
        ends = [packet.pos + packet.size for packet in container.demux(video=0) if packet.size]
    intact = int(len(ends) * share)
    keep = ends[intact - 1] if intact else path.read_bytes().index(b"mdat") + 4
    path.write_bytes(path.read_bytes()[:keep] + bytes(path.stat().st_size - keep))
    if not intact:
        with pytest.raises(ValueError, match="No frame of .* can be decoded"):
            read(path)
        return
    clip, metadata = read(path, num_frames=10, fps=None)
    assert len(clip) == 10
    assert metadata.total_num_frames == pytest.approx(intact, abs=1)
    numbers = [frame_number(frame[..., :32]) for frame in clip]
    assert numbers == [index % NUM_LEVELS for index in metadata.frames_indices.tolist()]
    assert "damaged" in caplog.text


def write_audio(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_index_less(path):
    write_video(path, format="h264")


@pytest.mark.parametrize(
    ("name", "write", "error", "message"),
    [
        ("missing.mp4", lambda path: None, FileNotFoundError, "no video file .*missing.mp4"),
        ("folder", lambda path: path.mkdir(), ValueError, "is a directory"),
        ("empty.mp4", lambda path: path.touch(), ValueError, r"is empty \(0 bytes\)"),
        ("noise.mp4", lambda path: path.write_bytes(b"no video at all" * 99), ValueError, "cannot be read as a video"),
        ("notes.txt", lambda path: path.write_text("no video at all\n" * 99), ValueError, "is a text file"),
        ("sound.m4a", write_audio, ValueError, "has no video stream"),
        ("no_moov.mp4", lambda path: cut(write_video(path), 0.5), ValueError, "cannot be read .* complete file"),
        ("raw.h264", write_index_less, ValueError, "no frames with a presentation time"),
    ],
)
def test_bad_files(tmp_path, name, write, error, message):
    path = tmp_path / name
    write(path)
    with pytest.raises(error, match=message):
        read(path)


def test_bad_file_objects():
    with pytest.raises(ValueError, match="is empty"):
        read(EncodedVideo(io.BytesIO()))
    with pytest.raises(ValueError, match="cannot be read as a video"):
        read(EncodedVideo(io.BytesIO(b"no video at all" * 99)))


PLAYLISTS = {
    "ffconcat": ("list.mp4", "ffconcat version 1.0\nfile other.ts\n"),
    "hls": ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nother.ts\n#EXT-X-ENDLIST\n"),
}


@pytest.mark.parametrize("source", ["path", "file object", "bytes"])
@pytest.mark.parametrize("kind", PLAYLISTS)
def test_playlists_are_refused(tmp_path, monkeypatch, kind, source):
    """Whoever uploads one would choose a file on this machine."""
    monkeypatch.chdir(tmp_path)
    write_video("other.ts")
    name, text = PLAYLISTS[kind]
    (tmp_path / name).write_text(text)
    with open(name, "rb") as file:
        video = {"path": name, "file object": EncodedVideo(file), "bytes": EncodedVideo(io.BytesIO(file.read()))}
        with pytest.raises(ValueError, match="playlist" if source == "path" else "cannot be read .* not a playlist"):
            read(video[source])
