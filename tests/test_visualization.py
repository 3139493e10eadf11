import os

import av
import numpy as np
import pytest
import torch
from helpers import TINY, make_model, put_scratch_elsewhere
from PIL import Image
from stts_molmo.outputs_stts_molmo import STTSMolmoVideoFeatures
from stts_molmo.processing_stts_molmo import STTSMolmoProcessor
from stts_molmo.tools.visualization import GAP, TILE, draw_frames, save_mp4, save_png, unpatchify, visualize


@pytest.fixture(scope="module")
def processor():
    processor = STTSMolmoProcessor.from_pretrained(TINY)
    processor.video_processor.size = {"height": 12, "width": 12}
    processor.video_processor.patch_size = 2
    processor.video_processor.num_frames = 16
    return processor


def clip(num_frames: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (num_frames, 12, 12, 3), dtype=np.uint8)


def test_frames_come_back_from_their_patches(processor):
    frames = clip(3)
    inputs = processor.video_processor([frames], do_sample_frames=False, return_tensors="pt")
    restored = unpatchify(inputs["pixel_values_videos"], 2, processor.video_processor)
    assert np.array_equal(restored, frames)


def test_dropped_blocks_are_dark_and_kept_ones_are_not():
    frames = np.full((2, 12, 12, 3), 200, dtype=np.uint8)
    keep = torch.tensor([[True] * 4, [True, False, False, True]])
    features = STTSMolmoVideoFeatures(keep_mask=keep, token_scores=torch.tensor([[0.5] * 4, [0.9, 0.1, 0.0, 0.8]]))
    (first, _), (second, heat) = draw_frames(frames, features, (2, 2))
    quarter, far = TILE // 4, 3 * TILE // 4
    assert np.asarray(first).min() >= 199
    assert second.getpixel((quarter, quarter))[0] >= 199 > 60 > second.getpixel((far, quarter))[0]
    assert sum(heat.getpixel((quarter, 5))) > sum(heat.getpixel((far, 5)))  # 0.9 is brighter than 0.1


@pytest.mark.parametrize("scores", [torch.rand(2, 4), None], ids=["scored", "merged"])
def test_what_has_no_score_is_grey(scores):
    features = STTSMolmoVideoFeatures(keep_mask=torch.ones(2, 4, dtype=torch.bool), token_scores=scores)
    (_, first), (_, second) = draw_frames(clip(2), features, (2, 2))
    is_grey = [np.ptp(np.asarray(heat), axis=-1).max() == 0 for heat in (first, second)]
    assert is_grey == [True, scores is None]


@pytest.mark.parametrize(("save", "name"), [(save_png, "kept.png"), (save_mp4, "kept.mp4")])
def test_a_failed_write_leaves_the_old_file(save, name, tmp_path):
    (tmp_path / name).write_bytes(b"old")
    images = [Image.new("RGB", (32, 32)), None]
    with pytest.raises(AttributeError):
        save(images, tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"old" and os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(("save", "name"), [(save_png, "kept.png"), (save_mp4, "kept.mp4")])
def test_a_file_is_written_beside_its_place(save, name, tmp_path, monkeypatch):
    put_scratch_elsewhere(tmp_path / "scratch", monkeypatch)
    save([Image.new("RGB", (32, 32))], tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == [name, "scratch"]


@pytest.mark.parametrize("suffix", ["png", "mp4"])
def test_pictures_and_videos(suffix, processor, tmp_path):
    path = tmp_path / f"kept.{suffix}"
    video = tmp_path / "clip.mp4"
    save_mp4([Image.fromarray(frame).resize((48, 48)) for frame in clip(10)], video, fps=2)
    images = visualize(make_model(), processor, str(video), ("scorer", "tome"), columns=4 if suffix == "png" else 1)
    if suffix == "png":
        save_png(images, path)
        assert len(images) == 3 and Image.open(path).height == sum(image.height for image in images)
    else:
        save_mp4(images, path)
        with av.open(str(path)) as container:
            assert sum(1 for _ in container.decode(video=0)) == len(images) == 10


@pytest.mark.parametrize(("num_frames", "columns", "rows"), [(3, 8, [3]), (9, 8, [5, 4]), (16, 8, [8, 8]), (1, 8, [1])])
def test_rows_are_as_full_as_can_be(num_frames, columns, rows, processor):
    images = visualize(make_model(), processor, clip(num_frames), ("none",), columns=columns)
    assert [image.width for image in images] == [images[0].width] * len(rows)
    assert images[0].width == rows[0] * (TILE + GAP) + GAP
