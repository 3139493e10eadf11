"""From any kind of video to the model's inputs: sampling, pixels, prompts, and what a checkpoint saves."""

import contextlib
import gzip
import http.server
import io
import json
import os
import shutil
import tempfile
import threading
import time
import urllib.request
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, write_video
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from stts_molmo.processing_stts_molmo import STTSMolmoProcessor, STTSMolmoVideoProcessor
from stts_molmo.video_stts_molmo import sample_frame_indices, sample_frame_times, scaled_num_frames
from transformers import (
    AutoProcessor,
    AutoVideoProcessor,
    Molmo2Config,
    Molmo2ForConditionalGeneration,
    Molmo2VideoProcessor,
    pipeline,
)
from transformers.video_utils import VideoMetadata

PROCESSOR_FILES = ["chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(scope="module")
def processor() -> STTSMolmoProcessor:
    processor = STTSMolmoProcessor.from_pretrained(TINY)
    processor.video_processor.allow_private_hosts = True  # the tests' servers are on this machine
    return processor


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """Four seconds at 10 fps."""
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    return str(write_video(path, num_frames=40, times=np.arange(40) / 10))


def frames(num_frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    """uint8 `(num_frames, height, width, 3)` of noise."""
    return np.random.default_rng(num_frames).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def metadata_of(num_frames: int, fps: float) -> dict:
    return {"total_num_frames": num_frames, "fps": fps}


def chat(video) -> list[dict]:
    return [{"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": "What?"}]}]


def apply_chat(processor, conversation, **processor_kwargs):
    return processor.apply_chat_template(
        conversation,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=processor_kwargs,
    )


def assert_equal(inputs, others):
    assert inputs.keys() == others.keys()
    for name, value in inputs.items():
        assert torch.equal(value, others[name]), name


# Sampling


@pytest.mark.parametrize(
    ("num_frames", "prune_ratio", "expected"),
    [(64, 0, 64), (64, 0.3, 92), (64, 0.4, 107), (64, 0.5, 128), (64, 0.9, 640), (16, 0.5, 32), (90, 0.7, 300)],
)
def test_scaled_num_frames_counts_in_decimals(num_frames, prune_ratio, expected):
    assert scaled_num_frames(num_frames, prune_ratio) == expected


@pytest.mark.parametrize("prune_ratio", [1, -0.1, 1.5, "0.5"])
def test_scaled_num_frames_refuses_a_bad_ratio(prune_ratio):
    with pytest.raises(ValueError, match=r"prune_ratio=.* must be a number in \[0, 1\)"):
        scaled_num_frames(64, prune_ratio)


@pytest.mark.parametrize(
    ("duration", "num_frames", "fps", "expected"),
    [
        (1.2, 64, 2, [0, 0.5, 1.0, 1.2]),
        (1.0, 64, 2, [0, 0.5, 1.0]),
        (0.0, 64, 2, [0]),
        (31.5, 64, 2, [*np.arange(63) / 2, 31.5]),  # 64 at 2 fps: still at most 64
        (90, 3, 2, [0, 45, 90]),
        (90, 1, 2, [90]),
        (3, None, 1, [0, 1, 2, 3]),
        (3, 4, None, [0, 1, 2, 3]),
    ],
)
def test_sample_frame_times(duration, num_frames, fps, expected):
    np.testing.assert_allclose(sample_frame_times(duration, num_frames, fps), expected)


def test_above_the_cap_sampling_is_uniform():
    times = sample_frame_times(31.6)
    assert len(times) == 64 and np.allclose(np.diff(times), 31.6 / 63)


@pytest.mark.parametrize(
    ("num_frames", "fps", "message"),
    [
        (None, None, "pass one of them"),
        (0, 2, r"^num_frames=0 must be at least 1 "),
        (10**9, 2, r"^num_frames=1000000000 must be .* at most 10000000\.$"),
        (64, 0, r"^fps=0 must be more than 0, and finite\.$"),
        (None, np.nan, r"^fps=nan must be more than 0, and finite\.$"),
    ],
)
def test_sample_frame_times_refuses(num_frames, fps, message):
    with pytest.raises(ValueError, match=message):
        sample_frame_times(3, num_frames, fps)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 5000), min_size=0, max_size=300),
    st.integers(1, 80),
    st.sampled_from([0.5, 1, 2, 7.5]),
)
def test_sampling_any_timeline(gaps, num_frames, fps):
    frame_times = np.concatenate([[0], np.cumsum(gaps)]) / 1000
    times = sample_frame_times(frame_times[-1], num_frames, fps)
    indices = sample_frame_indices(frame_times, times)
    assert 1 <= len(indices) <= len(times) <= num_frames
    assert indices[-1] == len(frame_times) - 1
    assert (np.diff(indices) > 0).all()
    shown = {max(i for i, start in enumerate(frame_times) if start <= time + 1e-6) for time in times}
    assert set(indices.tolist()) == shown


def num_sampled(video_processor, total_num_frames, source_fps, **kwargs) -> int:
    metadata = [metadata_of(total_num_frames, source_fps)]
    outputs = video_processor(np.zeros((total_num_frames, 8, 8, 3), np.uint8), video_metadata=metadata, **kwargs)
    return int(outputs["video_grids"][0, 0])


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, 8),  # 10 s at 2 fps would be 21
        ({"num_frames": 64}, 21),
        ({"num_frames": 8}, 8),
        ({"num_frames": 64, "max_fps": 1}, 11),
        ({"fps": 1}, 11),
        ({"fps": 10}, 101),
        ({"fps": 1, "num_frames": None}, 11),
        ({"test_time_scaling": True, "prune_ratio": 0.2}, 10),
        ({"test_time_scaling": True, "prune_ratio": 0.5}, 16),
        ({"test_time_scaling": True, "prune_ratio": 0.5, "num_frames": 8}, 16),
        ({"test_time_scaling": True, "max_vision_tokens": 72}, 16),  # 8 frames of 9 tokens, at the checkpoint's 0.5
        ({"test_time_scaling": True, "max_vision_tokens": 40}, 9),  # ceil(40 / 9 / 0.5)
        ({"test_time_scaling": True, "max_vision_tokens": 40, "prune_ratio": 0.2}, 6),
        ({"test_time_scaling": True, "max_vision_tokens": 40, "prune_ratio": 0}, 5),
        ({"test_time_scaling": True, "max_vision_tokens": 400}, 21),  # there is no more to be had at 2 fps
        ({"do_sample_frames": False}, 101),
    ],
)
def test_sampling_arguments(processor, kwargs, expected):
    assert num_sampled(processor.video_processor, 101, 10.0, **kwargs) == expected


def test_sampling_on_its_own_follows_the_attributes():
    video_processor = STTSMolmoVideoProcessor(num_frames=8, max_fps=1, test_time_scaling=True, prune_ratio=0.5)
    metadata = VideoMetadata(**metadata_of(101, 10.0))
    assert len(video_processor.sample_frames(metadata)) == 11
    assert len(video_processor.sample_frames(metadata, prune_ratio=0)) == 8
    assert len(video_processor.sample_frames(metadata, test_time_scaling=False)) == 8
    assert len(video_processor.sample_frames(metadata, max_fps=5)) == 16


def test_a_rate_of_the_processors_own_gives_way_to_a_number():
    video_processor = STTSMolmoVideoProcessor(fps=1)
    assert num_sampled(video_processor, 101, 10.0) == 11
    assert num_sampled(video_processor, 101, 10.0, num_frames=8) == 8


def test_a_budget_of_the_processors_own_gives_way_to_any_argument():
    processor = STTSMolmoVideoProcessor(num_frames=8, test_time_scaling=True, prune_ratio=0.5, max_vision_tokens=810)
    assert processor.grid == (9, 9)
    assert processor.scaled_cap() == 20
    assert processor.scaled_cap(max_vision_tokens=64 * 81) == scaled_num_frames(64, 0.5)
    assert processor.scaled_cap(prune_ratio=0.2) == 10
    assert processor.scaled_cap(num_frames=4) == 8
    with pytest.raises(ValueError, match="num_frames=4 and max_vision_tokens=9 exclude each other"):
        processor.scaled_cap(num_frames=4, max_vision_tokens=9)
    with pytest.raises(ValueError, match="max_vision_tokens=0 must be a whole number"):
        processor.scaled_cap(max_vision_tokens=0)


@pytest.mark.parametrize(
    "kwargs", [{"prune_ratio": 0.9}, {"prune_ratio": 3}, {"max_vision_tokens": 9}, {"method": "cosine"}], ids=str
)
def test_what_only_the_model_can_do_is_refused(processor, clip, kwargs):
    (given,) = (f"{name}={value!r}" for name, value in kwargs.items())
    with pytest.raises(ValueError, match=f"{given} has no effect in a processor.*generate_kwargs=.*generation_config"):
        processor(text="<|video|>", videos=clip, **kwargs)
    if "method" not in kwargs:
        with pytest.raises(ValueError, match=f"{given} has no effect in a processor without test_time_scaling"):
            processor.video_processor(clip, **kwargs)


def test_rate_and_number_exclude_each_other(processor):
    with pytest.raises(ValueError, match="num_frames=8 and fps=1 exclude each other"):
        num_sampled(processor.video_processor, 101, 10.0, fps=1, num_frames=8)


@pytest.mark.parametrize("num_frames", [64, 256])
def test_real_geometry(processor, num_frames):
    """Molmo2's own 378 px and 27 x 27 patches: 729 patches, 81 tokens, two delimiters and one time a frame."""
    real = STTSMolmoProcessor(
        processor.image_processor,
        STTSMolmoVideoProcessor(),
        processor.tokenizer,
        chat_template=processor.chat_template,
    )
    video = np.zeros((num_frames + 10, 16, 16, 3), np.uint8)
    inputs = real(
        text="<|video|>",
        videos=[video],
        video_metadata=[metadata_of(len(video), 2.0)],
        num_frames=num_frames,
        return_metadata=True,
        return_tensors="pt",
    )
    assert inputs["pixel_values_videos"].shape == (num_frames, 27 * 27, 14 * 14 * 3)
    assert inputs["video_token_pooling"].shape == (num_frames * 81, 9)
    assert inputs["video_grids"].tolist() == [[num_frames, 9, 9]]
    prompt = processor.tokenizer.decode(inputs["input_ids"][0])
    assert prompt.count("<im_patch>") == num_frames * 81 == int(inputs["mm_token_type_ids"].sum()) - 2 * num_frames
    indices = inputs["video_metadata"][0].frames_indices
    assert indices[-1] == num_frames + 9
    string = " ".join(f"{index / 2:.1f} <frame_start>{'<im_patch>' * 81}<frame_end>" for index in indices)
    assert prompt.endswith(string)


# Pixels


@pytest.mark.parametrize("size", [(48, 64), (37, 53), (20, 20)])
@pytest.mark.parametrize("kind", ["numpy", "torch", "float"])
def test_pixels_are_those_of_the_native_processor(size, kind):
    native, ours = Molmo2VideoProcessor(), STTSMolmoVideoProcessor()
    videos = [frames(5, *size), frames(3, *size)]
    if kind != "numpy":
        videos = [torch.from_numpy(video).permute(0, 3, 1, 2) for video in videos]
    if kind == "float":
        videos = [video.float() + 0.25 for video in videos]
    kwargs = {"do_sample_frames": False, "return_tensors": "pt"}
    assert_equal(ours(videos, **kwargs), native(videos, **kwargs))


def test_pixels_stay_the_same_where_transformers_changes_what_it_calls(clip, monkeypatch):
    """The one step of the native processor's that we override, for memory's sake, may disappear."""
    video_processor = STTSMolmoVideoProcessor()
    inputs = video_processor([clip, clip], num_frames=6, return_tensors="pt")
    monkeypatch.delattr(STTSMolmoVideoProcessor, "_preprocess")
    assert_equal(video_processor([clip, clip], num_frames=6, return_tensors="pt"), inputs)


def test_frames_are_resized_one_by_one(monkeypatch):
    counts, resize = [], STTSMolmoVideoProcessor.resize

    def count(self, images, *args, **kwargs):
        counts.append(len(images))
        return resize(self, images, *args, **kwargs)

    monkeypatch.setattr(STTSMolmoVideoProcessor, "resize", count)
    STTSMolmoVideoProcessor()([frames(3), frames(2)], do_sample_frames=False)
    assert counts == [1] * 5


def test_the_native_processor_is_given_frames_alone(clip, monkeypatch):
    """So it does not matter how Transformers decodes and samples."""
    calls, preprocess = [], Molmo2VideoProcessor.preprocess

    def note(self, videos, **kwargs):
        calls.append((videos, kwargs["do_sample_frames"], kwargs["video_metadata"]))
        return preprocess(self, videos, **kwargs)

    monkeypatch.setattr(Molmo2VideoProcessor, "preprocess", note)
    video_processor = STTSMolmoVideoProcessor(num_frames=4)
    for video in (clip, Path(clip), Path(clip).read_bytes(), frames(10)):
        video_processor(video)
    for (video,), samples, (metadata,) in calls:
        assert video.shape[0] == len(metadata.frames_indices) == 4 and not samples
    assert len(calls) == 4


def test_a_file_gives_the_pixels_of_its_frames(processor, clip):
    """The file against the native processor on the frames that PyAV gives one by one."""
    import av

    with av.open(clip) as container:
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    chosen = [0, 5, 10, 15, 20, 25, 30, 35, 39]
    native = Molmo2VideoProcessor.from_pretrained(TINY)
    expected = native([decoded[chosen]], do_sample_frames=False, return_tensors="pt")
    assert_equal(processor.video_processor(clip, num_frames=16, return_tensors="pt"), expected)


# Kinds of input


@pytest.fixture(scope="module")
def served(clip):
    """The folder of the clip behind a local HTTP server."""
    handler = partial(QuietHandler, directory=Path(clip).parent)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def spool(clip: str) -> tempfile.SpooledTemporaryFile:
    """What FastAPI's `UploadFile.file` is."""
    file = tempfile.SpooledTemporaryFile()
    file.write(Path(clip).read_bytes())
    return file


def compress(clip: str) -> gzip.GzipFile:
    return gzip.GzipFile(fileobj=io.BytesIO(gzip.compress(Path(clip).read_bytes())))


def pipe(clip: str) -> io.BufferedReader:
    reader, writer = os.pipe()
    assert os.write(writer, Path(clip).read_bytes()) == Path(clip).stat().st_size
    os.close(writer)
    return open(reader, "rb")


def open_at_end(clip: str) -> io.BufferedReader:
    file = open(clip, "rb")
    file.seek(0, os.SEEK_END)
    return file


KINDS_OF_FILE = {
    "Path": lambda clip, url: Path(clip),
    "bytes": lambda clip, url: Path(clip).read_bytes(),
    "file object": lambda clip, url: open(clip, "rb"),
    "file object at its end": lambda clip, url: open_at_end(clip),
    "file object for appending": lambda clip, url: open(clip, "ab+"),
    "spooled file": lambda clip, url: spool(clip),
    "gzip": lambda clip, url: compress(clip),
    "pipe": lambda clip, url: pipe(clip),
    "connection": lambda clip, url: urllib.request.urlopen(url),
    "URL": lambda clip, url: url,
    "URL in capitals": lambda clip, url: url.replace("http", "HTTP"),
    "file URL": lambda clip, url: Path(clip).as_uri(),
}


@pytest.mark.parametrize("kind", KINDS_OF_FILE)
def test_each_kind_of_file(processor, clip, kind, served):
    with contextlib.ExitStack() as stack:

        def video():
            video = KINDS_OF_FILE[kind](clip, f"{served}/{Path(clip).name}")
            if hasattr(video, "close"):
                stack.callback(video.close)
            return video

        expected = apply_chat(processor, chat(clip))
        assert_equal(apply_chat(processor, chat(video())), expected)
        direct = processor(text="<|video|>", videos=video(), return_tensors="pt")
        assert_equal(direct, processor(text="<|video|>", videos=clip, return_tensors="pt"))
        alone = processor.video_processor(video(), return_tensors="pt")
        assert torch.equal(alone["pixel_values_videos"], expected["pixel_values_videos"])


def test_a_batch_of_files_is_decoded_in_threads(processor, clip):
    paths, threads = [clip] * 6, set()

    def sample(metadata):
        threads.add(threading.get_ident())
        return processor.video_processor.sample_frames(metadata)

    clips, _ = processor.video_processor.fetch_videos(paths, sample_indices_fn=sample)
    alone, _ = processor.video_processor.fetch_videos(clip, sample_indices_fn=sample)
    assert len(threads) > 2
    assert all(torch.equal(frames, alone) for frames in clips)


def test_a_file_object_may_come_twice(processor, clip):
    class SlowFile(io.BytesIO):
        def read(self, size=-1):
            time.sleep(0.001)  # another thread's turn
            return super().read(size)

    inputs = processor.video_processor([SlowFile(Path(clip).read_bytes())] * 4, return_tensors="pt")
    assert_equal(inputs, processor.video_processor([clip] * 4, return_tensors="pt"))


def test_frames_are_resized_on_a_device(processor, clip):
    # On "meta" nothing can have been computed on the host.
    inputs = apply_chat(processor, chat(clip), device="meta")
    assert inputs["pixel_values_videos"].is_meta
    assert inputs["pixel_values_videos"].shape == apply_chat(processor, chat(clip))["pixel_values_videos"].shape


@pytest.mark.parametrize("key", ["video", "path", "url"])
def test_each_key_of_a_chat_template(processor, clip, served, key):
    conversation = chat(None)
    video = f"{served}/{Path(clip).name}" if key == "url" else clip
    conversation[0]["content"][0] = {"type": "video", key: video}
    assert_equal(apply_chat(processor, conversation), apply_chat(processor, chat(clip)))


@pytest.mark.parametrize("kind", ["path", "bytes", "url"])
@pytest.mark.parametrize(
    ("span", "options", "times"),
    [
        ({"video_start": 1, "video_end": 2.5}, {}, [1.0, 1.5, 2.0, 2.5]),
        ({"video_start": 3.0, "video_end": None}, {}, [3.0, 3.5, 3.9]),
        ({"video_end": 1.04}, {"num_frames": 2}, [0.0, 1.0]),
        ({"video_start": 1.01, "video_end": 1.19}, {}, [1.1]),
        ({"video_start": 2, "video_end": 2.2}, {"do_sample_frames": False}, [2.0, 2.1, 2.2]),
        ({"video_start": None, "video_end": None}, {"fps": 1}, [0.0, 1.0, 2.0, 3.0, 3.9]),
    ],
    ids=str,
)
def test_seconds_of_a_video_in_a_chat(processor, clip, served, kind, span, options, times):
    """Sampled between them, with times as in the file."""
    video = {"path": clip, "bytes": Path(clip).read_bytes(), "url": f"{served}/{Path(clip).name}"}[kind]
    conversation = chat(video)
    conversation[0]["content"][0] |= span
    inputs = apply_chat(processor, [conversation], **options)
    clips, (metadata,) = processor.video_processor.fetch_videos([clip])
    wanted = np.rint(np.array(times) * 10).astype(int)
    metadata.frames_indices = wanted
    expected = apply_chat(processor, chat(clips[0][wanted]), do_sample_frames=False, video_metadata=[metadata])
    assert_equal(inputs, expected)
    assert conversation[0]["content"][0]["video"] is video  # the caller's own is left as it is


@pytest.mark.parametrize(
    ("span", "message"),
    [
        ({"video_start": 5}, r"video_start=5 and video_end=inf: the video's 40 frames begin in seconds 0 to 3.9"),
        ({"video_start": 1.01, "video_end": 1.02}, "No frame begins between"),
        ({"video_start": 2, "video_end": 1}, "video_start=2 and video_end=1 must be seconds"),
        ({"video_start": -1}, "must be seconds"),
        ({"video_end": float("nan")}, "must be seconds"),
        ({"video_start": "00:01"}, "video_start='00:01'"),
    ],
    ids=str,
)
def test_seconds_that_a_video_has_not(processor, clip, span, message):
    conversation = chat(clip)
    conversation[0]["content"][0] |= span
    with pytest.raises(ValueError, match=message):
        apply_chat(processor, conversation)


def test_seconds_are_for_files(processor):
    conversation = chat(frames(8))
    conversation[0]["content"][0]["video_start"] = 1
    with pytest.raises(ValueError, match="are for files"):
        apply_chat(processor, conversation)


def test_prompt_carries_the_times_of_the_frames_taken(processor, tmp_path):
    times = np.array([0, 0.1, 0.2, 0.9, 1.0, 1.7, 3.3])
    path = str(write_video(tmp_path / "vfr.mp4", num_frames=len(times), times=times))
    inputs = apply_chat(processor, chat(path), return_metadata=True)
    prompt = processor.tokenizer.decode(inputs["input_ids"][0]).replace("<im_patch>", "")
    taken = [0, 0.2, 1.0, 1.7, 3.3]  # on display at 0, 0.5, 1.0, 1.5 (1.0 still), 2.0 and on, and the last
    assert inputs["video_metadata"][0].timestamps == pytest.approx(taken)
    assert " ".join(f"{time:.1f} <frame_start><frame_end>" for time in taken) in prompt


def test_files_of_different_lengths_in_a_batch(processor, clip, tmp_path):
    short = str(write_video(tmp_path / "short.webm", num_frames=20, codec="libvpx", options={"deadline": "realtime"}))
    both = apply_chat(processor, [chat(clip), chat(short)], padding=True)
    singles = [apply_chat(processor, chat(video)) for video in (clip, short)]
    assert both["video_grids"].tolist() == [[8, 3, 3], [3, 3, 3]]
    pixels = torch.cat([single["pixel_values_videos"] for single in singles])
    assert torch.equal(both["pixel_values_videos"], pixels)
    for row, mask, single in zip(both["input_ids"], both["attention_mask"], singles, strict=True):
        assert row[mask.bool()].tolist() == single["input_ids"][0].tolist()


@pytest.mark.parametrize("kind", ["array", "tensor", "list of arrays", "list of images"])
def test_frames_with_metadata(processor, kind):
    video = frames(30)
    value = {
        "array": video,
        "tensor": torch.from_numpy(video).permute(0, 3, 1, 2),
        "list of arrays": list(video),
        "list of images": [Image.fromarray(frame) for frame in video],
    }[kind]
    inputs = processor(
        text="<|video|>",
        videos=[value],
        video_metadata=[metadata_of(30, 10.0)],
        return_metadata=True,
        return_tensors="pt",
    )
    chosen = [0, 5, 10, 15, 20, 25, 29]
    native = Molmo2VideoProcessor.from_pretrained(TINY)
    expected = native([video[chosen]], do_sample_frames=False, return_tensors="pt")
    assert torch.equal(inputs["pixel_values_videos"], expected["pixel_values_videos"])
    assert inputs["video_metadata"][0].timestamps == pytest.approx([index / 10 for index in chosen])


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_images_that_are_not_rgb(processor, mode):
    images = [Image.fromarray(frame).convert(mode) for frame in frames(4)]
    kwargs = {"do_sample_frames": False, "return_tensors": "pt"}
    expected = processor.video_processor([[image.convert("RGB") for image in images]], **kwargs)
    assert_equal(processor.video_processor([images], **kwargs), expected)


@pytest.mark.parametrize("fps", [None, 0, -1.0, np.nan, np.inf])
@pytest.mark.parametrize("do_sample_frames", [True, False])
def test_unknown_frame_rate(processor, fps, do_sample_frames):
    """It is taken as 2; where frames are sampled already, they are also taken as all frames of the video."""
    inputs = processor(
        text="<|video|>",
        videos=[frames(4)],
        video_metadata=[metadata_of(4, fps)],
        do_sample_frames=do_sample_frames,
        return_metadata=True,
    )
    assert inputs["video_metadata"][0].timestamps == [0, 0.5, 1.0, 1.5]


def test_list_of_frame_files(processor, tmp_path):
    video = frames(4)
    paths = [str(tmp_path / f"{number}.png") for number in range(4)]
    for frame, path in zip(video, paths, strict=True):
        Image.fromarray(frame).save(path)
    kwargs = {"do_sample_frames": False, "return_tensors": "pt"}
    assert_equal(
        processor.video_processor([[paths]], **kwargs),
        Molmo2VideoProcessor.from_pretrained(TINY)([video], **kwargs),
    )


def test_decoding_first_and_processing_later_is_the_same(processor, clip):
    """What the command line does, to time the two."""
    videos, metadata = processor.video_processor.sample_videos(clip, num_frames=6)
    kwargs = {"text": "<|video|>", "return_tensors": "pt"}
    later = processor(videos=videos, video_metadata=metadata, do_sample_frames=False, **kwargs)
    assert_equal(later, processor(videos=clip, num_frames=6, **kwargs))


def test_pipeline(processor, clip):
    model = Molmo2ForConditionalGeneration(Molmo2Config(**tiny_config(processor))).eval()
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    outputs = pipe(
        text=chat(clip),
        max_new_tokens=2,
        return_full_text=False,
        processor_kwargs={"test_time_scaling": True, "prune_ratio": 0.5, "num_frames": 2},
    )
    assert isinstance(outputs[0]["generated_text"], str)


def tiny_config(processor) -> dict:
    def token_id(token):
        return processor.tokenizer.convert_tokens_to_ids(token)

    attention = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    return {
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "image_size": [36, 36],
            "patch_size": 4,
            **attention,
        },
        "adapter_config": {
            "vision_feature_layer": [-1, -2],
            "hidden_size": 16,
            "intermediate_size": 16,
            "text_hidden_size": 16,
            **attention,
        },
        "text_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "vocab_size": token_id("<im_patch>"),
            "additional_vocab_size": 10,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            **attention,
        },
        "image_patch_id": token_id("<im_patch>"),
        "image_start_token_id": token_id("<im_start>"),
        "low_res_image_start_token_id": token_id("<low_res_im_start>"),
        "image_end_token_id": token_id("<im_end>"),
        "frame_start_token_id": token_id("<frame_start>"),
        "frame_end_token_id": token_id("<frame_end>"),
    }


# Bad input


def test_unknown_kind_of_video(processor):
    with pytest.raises(ValueError, match="A video of type set is not supported"):
        processor(text="<|video|>", videos=[{"clip.mp4"}])


def test_file_open_as_text(processor, clip):
    with open(clip) as file, pytest.raises(ValueError, match='clip.mp4.* is open as text; open it in mode "rb"'):
        processor(text="<|video|>", videos=file)


@pytest.mark.parametrize("videos", [[], [[]]])
def test_no_videos(processor, videos):
    with pytest.raises(ValueError, match="There is no video in videos="):
        processor(text="What?", videos=videos)
    with pytest.raises(ValueError, match="There is no video in videos="):
        processor.video_processor(videos)


@pytest.mark.parametrize("order", [1, -1])
def test_files_and_frames_in_one_batch(processor, clip, order):
    with pytest.raises(ValueError, match="Files and frames cannot be mixed"):
        processor.video_processor([clip, frames(4)][::order])


def test_missing_file_and_page(processor, served):
    with pytest.raises(FileNotFoundError, match="nowhere.mp4"):
        apply_chat(processor, chat("nowhere.mp4"))
    with pytest.raises(ValueError, match="cannot be downloaded .*404"):
        apply_chat(processor, chat(f"{served}/nowhere.mp4"))
    with pytest.raises(ValueError, match="cannot be downloaded"):
        apply_chat(processor, chat("http://127.0.0.1:9/nowhere.mp4"))


def test_no_frames(processor):
    with pytest.raises(ValueError, match="has no frames"):
        processor.video_processor([frames(0)], video_metadata=[metadata_of(0, 10.0)])


def test_metadata_of_other_frames(processor):
    """The usual slip: frames already sampled, with the metadata of the whole file."""
    with pytest.raises(ValueError, match="fewer than their metadata says .*do_sample_frames=False"):
        processor.video_processor([frames(8)], video_metadata=[metadata_of(100, 10.0)])


def test_metadata_of_fewer_frames(processor):
    metadata = metadata_of(40, 10.0) | {"frames_indices": [0, 13, 26]}
    with pytest.raises(ValueError, match="3 `frames_indices` for a video of 4 frames"):
        processor.video_processor([frames(4)], video_metadata=[metadata], do_sample_frames=False)


# Checkpoints


@pytest.fixture
def checkpoint(tmp_path):
    """The tiny processor as saved by its own class, beside a model config of ratio 0.3."""
    folder = tmp_path / "checkpoint"
    STTSMolmoProcessor.from_pretrained(TINY).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "stts_molmo", "stts_config": {"prune_ratio": 0.3}}))
    return folder


def load(kind, folder, **kwargs):
    """The video processor of a checkpoint, by each way to load it."""
    if kind == "AutoProcessor":
        return AutoProcessor.from_pretrained(folder, trust_remote_code=True, **kwargs).video_processor
    if kind == "AutoVideoProcessor":
        return AutoVideoProcessor.from_pretrained(folder, trust_remote_code=True, **kwargs)
    if kind == "STTSMolmoProcessor":
        return STTSMolmoProcessor.from_pretrained(folder, **kwargs).video_processor
    return STTSMolmoVideoProcessor.from_pretrained(folder, **kwargs)


@pytest.mark.parametrize(
    "kind", ["AutoProcessor", "AutoVideoProcessor", "STTSMolmoProcessor", "STTSMolmoVideoProcessor"]
)
def test_ratio_comes_from_the_checkpoints_config(checkpoint, kind):
    video_processor = load(kind, checkpoint)
    assert type(video_processor).__name__ == "STTSMolmoVideoProcessor"
    assert video_processor.prune_ratio == 0.3
    assert num_sampled(video_processor, 400, 10.0, test_time_scaling=True) == 12  # ceil(8 / 0.7)
    assert num_sampled(video_processor, 400, 10.0, test_time_scaling=True, prune_ratio=0.5) == 16
    assert num_sampled(video_processor, 400, 10.0) == 8


def test_ratio_follows_config_json_and_is_saved_nowhere_else(checkpoint, tmp_path):
    again = tmp_path / "again"
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    processor.video_processor.test_time_scaling = True
    processor.save_pretrained(again)
    saved = (again / "processor_config.json").read_text()
    assert "prune_ratio" not in saved and "max_vision_tokens" not in saved
    stts_config = {"prune_ratio": 0.5}
    (again / "config.json").write_text(json.dumps({"model_type": "stts_molmo", "stts_config": stts_config}))
    second = AutoProcessor.from_pretrained(again, trust_remote_code=True)
    assert second.video_processor.prune_ratio == 0.5
    assert second.video_processor.test_time_scaling is True
    assert num_sampled(second.video_processor, 400, 10.0) == 16
    stts_config["max_vision_tokens"] = 45
    (again / "config.json").write_text(json.dumps({"model_type": "stts_molmo", "stts_config": stts_config}))
    assert num_sampled(load("STTSMolmoVideoProcessor", again), 400, 10.0) == 10


@pytest.mark.parametrize("config", [None, {"model_type": "molmo2"}])
def test_scaling_without_a_ratio(checkpoint, config):
    (checkpoint / "config.json").unlink()
    if config:
        (checkpoint / "config.json").write_text(json.dumps(config))
    video_processor = load("STTSMolmoVideoProcessor", checkpoint)
    with pytest.raises(ValueError, match="test_time_scaling needs a prune_ratio"):
        num_sampled(video_processor, 400, 10.0, test_time_scaling=True)
    with pytest.raises(ValueError, match="prune_ratio=1 must be"):
        num_sampled(video_processor, 400, 10.0, test_time_scaling=True, prune_ratio=1)
    assert num_sampled(video_processor, 400, 10.0) == 8


def test_saved_files_name_their_classes(checkpoint):
    saved = json.loads((checkpoint / "processor_config.json").read_text())
    assert saved["auto_map"]["AutoProcessor"] == "processing_stts_molmo.STTSMolmoProcessor"
    video_auto_map = saved["video_processor"]["auto_map"]
    assert video_auto_map["AutoVideoProcessor"] == "processing_stts_molmo.STTSMolmoVideoProcessor"
    assert saved["image_processor"]["image_processor_type"] == "Molmo2ImageProcessor"
    code = sorted(path.name for path in checkpoint.glob("*.py"))
    rooms = ["configuration", "download", "processing", "video"]
    assert code == [f"{room}_stts_molmo.py" for room in rooms]


def test_a_native_checkpoint_gets_our_video_processor(tmp_path):
    for name in PROCESSOR_FILES:
        shutil.copy(TINY / name, tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    settings["processor_class"], settings["video_processor"]["video_processor_type"] = (
        "Molmo2Processor",
        "Molmo2VideoProcessor",
    )
    for part in (settings, settings["video_processor"]):
        part.pop("auto_map", None)
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    processor = STTSMolmoProcessor.from_pretrained(tmp_path)
    assert type(processor.video_processor) is STTSMolmoVideoProcessor
    assert processor.video_processor.num_frames == 8
