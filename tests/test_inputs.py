"""The shapes in which users have their videos: each gives the inputs of the plain file, or an error that says why."""

import base64
import contextlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from helpers import load_processor, write_video
from PIL import Image
from stts_molmo.tools.answer import answer_question
from stts_molmo.tools.checkpoint import Checkpoint
from stts_molmo.tools.cli import BUNDLED_CHECKPOINT
from stts_molmo.video_stts_molmo import TimedVideoMetadata, read_video

FPS, NUM_FRAMES = 10, 40


@pytest.fixture(scope="module")
def processor():
    return load_processor()


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return str(write_video(tmp_path_factory.mktemp("clips") / "clip.mp4", NUM_FRAMES, fps=FPS))


def ask(processor, video, **part) -> dict:
    """All inputs of a chat about `video`."""
    content = [{"type": "video", "video": video, **part}, {"type": "text", "text": "What happens?"}]
    return ask_chat(processor, [{"role": "user", "content": content}])


def ask_chat(processor, chat, **processor_kwargs) -> dict:
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(chat, **options, processor_kwargs=processor_kwargs)


def assert_equal(inputs, expected) -> None:
    assert inputs.keys() == expected.keys()
    for name in inputs:
        assert torch.equal(inputs[name], expected[name]), name


class VideoDecoder:
    """What torchcodec's does, in Python: it takes a path or bytes, and gives frames with the times of each."""

    def __init__(self, source, dimension_order: str = "NCHW", **options):
        from stts_molmo.video_stts_molmo import wrap_video

        frames, metadata = read_video(wrap_video(source))
        self.frames = frames if dimension_order == "NCHW" else frames.permute(0, 2, 3, 1)
        self.times = torch.tensor(metadata.timestamps, dtype=torch.float64)
        self.metadata = SimpleNamespace(path=None)
        self.num_calls = 0

    def __len__(self) -> int:
        return len(self.frames)

    def get_frame_at(self, index: int):
        return SimpleNamespace(data=self.frames[index], pts_seconds=float(self.times[index]))

    def get_frames_at(self, indices: list[int]):
        self.num_calls += 1
        return SimpleNamespace(data=self.frames[indices], pts_seconds=self.times[indices])


@pytest.fixture
def torchcodec(monkeypatch):
    """`datasets` finds the decoder where it looks for torchcodec's."""
    decoders = ModuleType("torchcodec.decoders")
    decoders.VideoDecoder, decoders.AudioDecoder = VideoDecoder, type("AudioDecoder", (), {})
    monkeypatch.setitem(sys.modules, "torchcodec", ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)
    monkeypatch.setattr(datasets.config, "TORCHCODEC_AVAILABLE", True)


# ----------------------------------------------------------------------------------------------------------------------
# Columns of datasets, and decoders
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decode", [False, True], ids=["as it is", "decoded"])
@pytest.mark.parametrize("kind", ["path", "bytes"])
def test_a_column_of_videos(processor, clip, torchcodec, kind, decode):
    value = clip if kind == "path" else {"path": "clip.mp4", "bytes": Path(clip).read_bytes()}
    features = datasets.Features({"video": datasets.Video(decode=decode)})
    video = datasets.Dataset.from_dict({"video": [value]}, features=features)[0]["video"]
    assert isinstance(video, VideoDecoder if decode else dict)
    assert_equal(ask(processor, video), ask(processor, clip))
    assert_equal(ask(processor, video, video_start=1), ask(processor, clip, video_start=1))
    direct = processor(text="<|video|>", videos=[video], return_tensors="pt")
    assert_equal(direct, processor(text="<|video|>", videos=clip, return_tensors="pt"))
    if decode:
        assert video.num_calls == 0  # it was read as the file that it is


def test_an_answer_about_a_row_is_that_about_the_file(clip):
    checkpoint, row = Checkpoint(str(BUNDLED_CHECKPOINT), device="cpu"), {"path": clip, "bytes": None}
    answers = {answer_question(checkpoint, video, "Which shape?", max_new_tokens=5).answer for video in (row, clip)}
    assert len(answers) == 1


@pytest.fixture(params=["ours", "torchcodec"])
def decoder_class(request):
    """That of this file, and torchcodec's own where it and an FFmpeg that it can load are installed."""
    if request.param == "ours":
        return VideoDecoder
    try:
        from torchcodec import decoders
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"torchcodec cannot be loaded here: {str(error).splitlines()[0]}")
    return decoders.VideoDecoder


@pytest.mark.parametrize("dimension_order", ["NCHW", "NHWC"])
@pytest.mark.parametrize("part", [{}, {"video_start": 1, "video_end": 2.5}, {"nframes": 3}], ids=str)
def test_a_decoder_of_its_own(processor, clip, decoder_class, dimension_order, part):
    decoder = decoder_class(clip, dimension_order=dimension_order)
    assert_equal(ask(processor, decoder, **part), ask(processor, clip, **part))


def test_times_of_a_decoder_are_those_of_its_frames(processor, decoder_class, tmp_path):
    times = np.array([0, 0.1, 0.2, 0.9, 1.0, 1.7, 3.3])
    path = str(write_video(tmp_path / "vfr.mp4", num_frames=len(times), times=times))
    clips, (metadata,) = processor.video_processor.sample_videos([decoder_class(path)])
    assert isinstance(metadata, TimedVideoMetadata)
    assert metadata.timestamps == pytest.approx(times[metadata.frames_indices])
    assert metadata.timestamps[-1] == pytest.approx(3.3)
    assert clips[0].shape[0] == len(metadata.timestamps) > 4


def test_decoders_of_one_and_of_no_frame(processor, clip):
    decoder = VideoDecoder(clip)
    decoder.frames, decoder.times = decoder.frames[:1], decoder.times[:1]
    _, (metadata,) = processor.video_processor.sample_videos([decoder])
    assert metadata.timestamps == [0]
    decoder.frames = decoder.frames[:0]
    with pytest.raises(ValueError, match="The decoder has no frames"):
        ask(processor, decoder)


def test_a_batch_of_decoders(processor, clip):
    decoder = VideoDecoder(clip)
    inputs = processor.video_processor([decoder, decoder, VideoDecoder(clip)], return_tensors="pt")
    assert_equal(inputs, processor.video_processor([clip] * 3, return_tensors="pt"))


@pytest.mark.parametrize("video", [{}, {"path": None, "bytes": None}, {"url": "clip.mp4"}], ids=str)
def test_a_row_without_a_video(processor, video):
    with pytest.raises(ValueError, match='has neither "bytes" nor a "path"'):
        ask(processor, video)


def test_a_row_may_not_name_a_file_where_strings_may_not(processor, clip, monkeypatch):
    monkeypatch.setattr(processor.video_processor, "allow_local_files", False)
    with pytest.raises(ValueError, match="files of this machine may not be read"):
        ask(processor, {"path": clip, "bytes": None})
    assert ask(processor, {"path": clip, "bytes": Path(clip).read_bytes()})


# ----------------------------------------------------------------------------------------------------------------------
# Links with the data in them, and pictures
# ----------------------------------------------------------------------------------------------------------------------


def data_link(file, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(Path(file).read_bytes()).decode()}"


def test_a_data_link(processor, clip):
    link, expected = data_link(clip, "video/mp4"), ask(processor, clip)
    assert_equal(ask(processor, link), expected)
    chat = [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": link}}]}]
    chat[0]["content"].append({"type": "text", "text": "What happens?"})
    assert_equal(ask_chat(processor, chat), expected)
    chat[0]["content"][0]["video_url"] = link
    assert_equal(ask_chat(processor, chat), expected)


KINDS_OF_PICTURE = {
    "names": str,
    "Paths": Path,
    "file links": lambda file: Path(file).as_uri(),
    "data links": lambda file: data_link(file, "image/png"),
    "bytes": lambda file: Path(file).read_bytes(),
    "open files": lambda file: open(file, "rb"),
    "images": Image.open,
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[str]:
    """Files of a clip's frames, in order; their names are not."""
    folder, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    files = [str(folder / f"{name}.png") for name in "ecadb"]
    for file in files:
        Image.fromarray(generator.integers(0, 255, (48, 64, 3), np.uint8)).save(file)
    return files


@pytest.mark.parametrize("kind", KINDS_OF_PICTURE)
def test_picture_files_in_order(processor, pictures, kind):
    frames = np.stack([np.asarray(Image.open(file)) for file in pictures])
    with contextlib.ExitStack() as stack:
        video = [KINDS_OF_PICTURE[kind](file) for file in pictures]
        for picture in video:
            if hasattr(picture, "close"):
                stack.callback(picture.close)
        assert_equal(ask(processor, video, sample_fps="4"), ask(processor, frames, sample_fps=4))
    prompt = processor.tokenizer.decode(ask(processor, frames, sample_fps=4)["input_ids"][0]).replace("<im_patch>", "")
    assert " ".join(f"{time:.1f} <frame_start><frame_end>" for time in (0, 0.5, 1)) in prompt


# ----------------------------------------------------------------------------------------------------------------------
# Messages as others write them
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "times"),
    [
        ({"nframes": 3}, [0, 1.9, 3.9]),  # 1.95 s in, the frame on display began at 1.9
        ({"nframes": 1}, [3.9]),
        ({"nframes": 100}, [number / FPS for number in range(NUM_FRAMES)]),
        ({"fps": 1.0}, [0, 1, 2, 3, 3.9]),
        ({"fps": 1.0, "max_frames": 2}, [0, 3.9]),
        ({"max_frames": 3}, [0, 1.9, 3.9]),
        ({"fps": 1, "video_start": 1, "video_end": 2.9}, [1, 2, 2.9]),
    ],
    ids=str,
)
def test_what_qwen_vl_utils_takes(processor, clip, part, times):
    inputs = ask(processor, Path(clip).as_uri(), **part)
    clips, (metadata,) = processor.video_processor.fetch_videos([clip])
    metadata.frames_indices = wanted = np.rint(np.array(times) * FPS).astype(int)
    content = [{"type": "video", "video": clips[0][wanted]}, {"type": "text", "text": "What happens?"}]
    chat = [{"role": "user", "content": content}]
    assert_equal(inputs, ask_chat(processor, chat, do_sample_frames=False, video_metadata=[metadata]))


def test_each_video_of_a_batch_is_sampled_as_it_asks(processor, clip):
    chats = [
        [{"role": "user", "content": [{"type": "video", "video": clip, **part}, {"type": "text", "text": "What?"}]}]
        for part in ({"nframes": 2}, {}, {"fps": 1})
    ]
    assert ask_chat(processor, chats, padding=True, fps=2)["video_grids"][:, 0].tolist() == [2, 9, 5]


def test_sizes_that_only_other_models_heed_are_told_of(processor, clip, caplog):
    inputs = ask(processor, clip, max_pixels=360 * 420, resized_height=280)
    assert_equal(inputs, ask(processor, clip))
    assert "max_pixels, resized_height in a chat have no effect" in caplog.text


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"nframes": 3, "fps": 1}, "nframes=3 and fps=1 in a chat exclude each other"),
        ({"nframes": 0}, "nframes=0 in a chat must be a number above 0"),
        ({"fps": "2"}, "fps='2' in a chat must be a number"),
        ({"max_frames": float("inf")}, "max_frames=inf in a chat"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_of_a_video(processor, clip, part, message):
    with pytest.raises(ValueError, match=message):
        ask(processor, clip, **part)


def test_of_frames_nothing_is_asked(processor, pictures):
    frames = [Image.open(file) for file in pictures]
    with pytest.raises(ValueError, match="fps and nframes are for files; of frames pass those that are wanted"):
        ask(processor, frames, fps=1, nframes=3)
