"""The quality study's clips and questions: deterministic, balanced, answerable, the same from a file as from arrays."""

import json
import subprocess
import sys
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_dataset
from stts_molmo.processing_stts_molmo import STTSMolmoProcessor, STTSMolmoVideoProcessor
from transformers import PreTrainedTokenizerFast

from benchmarks.common import ROOT, TINY
from benchmarks.quality import scenes, worlds
from benchmarks.quality.batches import sample_batch
from benchmarks.quality.kept import blocks_shown
from benchmarks.quality.render_clips import CLIPS, question_rows
from benchmarks.quality.tiny import MULTIMODAL_TOKENS, VOCAB_SIZE, build_config, build_model, build_processor


@pytest.fixture(scope="module")
def processor():
    native = build_processor()
    settings = {name: getattr(native.video_processor, name) for name in ("size", "patch_size", "pooling_size")}
    sampling = {name: getattr(native.video_processor, name) for name in ("num_frames", "max_fps")}
    video_processor = STTSMolmoVideoProcessor(**settings, **sampling, do_rescale=True, do_normalize=True)
    return STTSMolmoProcessor(native.image_processor, video_processor, native.tokenizer, native.chat_template)


def beat_times(scene):
    return np.arange(round(scene.duration / scene.beat)) * scene.beat


def cell_of(frame, cell):
    row, column = divmod(cell, scenes.BOARD)
    side = scenes.CELL
    return frame[row * side : (row + 1) * side, column * side : (column + 1) * side].astype(int)


def color_in(frame, cell):
    """The palette colour that most saturated pixels of a cell are nearest to."""
    pixels = cell_of(frame, cell).reshape(-1, 3)
    pixels = pixels[pixels.max(1) - pixels.min(1) > 90]
    palette = np.array(list(scenes.COLORS.values()))
    nearest = np.abs(pixels[:, None] - palette).sum(-1).argmin(-1)
    return list(scenes.COLORS)[np.bincount(nearest).argmax()] if len(pixels) > 10 else None


def test_same_seed_same_scene_and_pixels():
    first, second = (scenes.make_scene(7) for _ in range(2))
    assert first == second and scenes.questions(first) == scenes.questions(second)
    times = beat_times(first)
    assert np.array_equal(scenes.render(first, times), scenes.render(second, times))
    assert scenes.make_scene(8) != first


def test_answers_are_balanced():
    answers = defaultdict(Counter)
    for seed in range(3000):
        for item in scenes.questions(scenes.make_scene(seed)):
            answers[item.kind][item.answer] += 1
    assert set(answers) == set(scenes.QUESTIONS)
    for kind, counts in answers.items():
        uniform = sum(counts.values()) / len(counts)
        # Two lanes in three end in corners.
        allowed = 1.5 if kind in ("ball start", "ball end") else 1.25
        assert max(counts.values()) < allowed * uniform, (kind, counts)


@pytest.mark.parametrize("level", range(len(scenes.LEVELS)))
def test_answers_follow_from_what_is_seen(level):
    for seed in range(20):
        scene = scenes.make_scene(seed, level, beats=12)
        answers = {item.kind: item.answer for item in scenes.questions(scene)}
        times = beat_times(scene)
        frames = scenes.render(scene, times)

        stars = [
            [
                star
                for star in scene.stars
                if star.start <= time < star.start + scene.beat and color_in(frame, star.cell)
            ]
            for time, frame in zip(times, frames, strict=True)
        ]
        order = [star for seen in stars for star in seen]
        assert order == list(scene.stars)
        assert answers["star count"] == scenes.COUNTS[len(order) - 1]
        assert answers["star first color"] == order[0].color
        assert answers["star first place"] == scenes.PLACES[order[0].cell]
        assert answers["star last color"] == order[-1].color

        still = scenes.PLACES.index(answers["still place"])
        assert color_in(frames[0], still) == color_in(frames[-1], still) == answers["still color"]
        for when, frame in (("start", frames[0]), ("end", frames[-1])):
            assert color_in(frame, scene.lamp_start.cell) == answers[f"lamp {when}"]

        sign = np.array([cell_of(frame, scenes.PLACES.index(answers["sign place"])) for frame in frames]).mean(-1)
        shown = sign[-1] - sign[0] > scenes.SIGN_CONTRAST / 2
        assert (shown == scenes.MASKS[answers["sign shape"]]).mean() > 0.95

        hops = frames[np.argmax(times >= scene.ball_start) :][:3]
        assert [color_in(frame, cell) for frame, cell in zip(hops, scene.ball_cells, strict=True)] == [
            answers["ball color"]
        ] * 3
        start, end = (scenes.PLACES.index(answers[f"ball {when}"]) for when in ("start", "end"))
        assert (start, end) == (scene.ball_cells[0], scene.ball_cells[-1])
        assert answers["ball direction"] == {2: "right", -2: "left", 6: "down", -6: "up"}[end - start]


def test_captions_tell_what_a_frame_shows():
    for seed in range(20):
        scene = scenes.make_scene(seed, level=0)
        for time, frame in zip(beat_times(scene), scenes.render(scene, beat_times(scene)), strict=True):
            by_place, by_thing = (item.answer for item in scenes.captions(scenes.things_at(scene, time), time))
            assert by_thing.count(scene.ball_color + " ") >= ("ball" in by_place)
            colors = {
                place: color
                for place, color in zip(scenes.PLACES, map(partial(color_in, frame), range(9)), strict=True)
            }
            colored = [place for place, color in colors.items() if color]
            assert all(f"{place} {colors[place]} " in by_place for place in colored)
            assert all(f" {colors[place]} {place}" in by_thing for place in colored)


def test_blocks_are_named_for_what_they_show():
    for seed in range(20):
        film = worlds.make_film(seed, "still", beats=8)
        scene = film.scene
        frames = blocks_shown(film, beat_times(scene))
        names = Counter(name for shown in frames for name in shown)
        assert names["ball, new"] == 3 and names["star, new"] == len(scene.stars)
        assert names["sign, new"] == 1 and frames[0].count("still shape, new") == 1
        assert all(shown[scene.still.cell] == "still shape, as before" for shown in frames[1:])
        assert set(scene.flicker) >= {cell for shown in frames for cell in range(9) if shown[cell] == "flicker"}


def test_labels_are_the_answers_and_their_ends(processor):
    batch, chats = sample_batch(processor, 0, 3, 2, 8)
    for chat, labels, ids in zip(chats, batch["labels"], batch["input_ids"], strict=True):
        expected = "".join(f"{item.answer}<|im_end|>" for item in chat)
        assert processor.tokenizer.decode(labels[labels != -100]) == expected
        assert torch.equal(labels[labels != -100], ids[labels != -100])
        assert sorted(item.kind for item in chat) == sorted(scenes.QUESTIONS)


def test_every_question_word_is_one_token(processor):
    for item in scenes.questions(scenes.make_scene(0)):
        assert len(processor.tokenizer.tokenize(item.question)) == len(item.question.split()) + 1
        assert len(processor.tokenizer.tokenize(item.answer)) == len(item.answer.split())


def test_checkpoint_has_this_tokenizer_and_template(processor):
    saved = PreTrainedTokenizerFast.from_pretrained(TINY)
    assert saved.get_vocab() == processor.tokenizer.get_vocab()
    assert saved.chat_template == processor.chat_template
    assert saved.padding_side == "left"
    multimodal_ids = saved.convert_tokens_to_ids(list(MULTIMODAL_TOKENS))
    assert multimodal_ids == list(range(VOCAB_SIZE, VOCAB_SIZE + len(MULTIMODAL_TOKENS)))
    assert build_config(saved).image_patch_id == multimodal_ids[0]


def test_initial_weights_depend_on_the_seed_only(processor):
    first, second, other = (build_model(processor.tokenizer, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize("beats, fps", [(6, 10), (8, 12), (16, 10)])
def test_file_and_arrays_give_the_same_tokens(processor, tmp_path, beats, fps):
    scene = scenes.make_scene(scenes.FIRST_SEED["demo"], beats=beats)
    clip = scenes.render(scene, np.arange((beats - 1) * scene.beat * fps + 1) / fps)
    path = tmp_path / "clip.mp4"
    scenes.write_mp4(str(path), scenes.enlarge(clip, 6), fps)

    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Which shape stands still?"}]}],
        add_generation_prompt=True,
    )
    from_file = processor(text=[text], videos=[str(path)], num_frames=beats, return_tensors="pt")
    array = scenes.render(scene, beat_times(scene))
    metadata = {"total_num_frames": beats, "fps": 1 / scene.beat, "frames_indices": list(range(beats))}
    from_array = processor(
        text=[text], videos=[array], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt"
    )
    for name in ("input_ids", "mm_token_type_ids", "video_grids", "video_token_pooling"):
        assert torch.equal(from_file[name], from_array[name]), name
    difference = (from_file["pixel_values_videos"] - from_array["pixel_values_videos"]).abs()
    assert difference.mean() < 0.06


def test_bundled_clips_are_what_their_questions_say():
    rows = [json.loads(line) for line in (ROOT / "examples" / "finetune.jsonl").read_text().splitlines()]
    assert rows == [row for name, scene in CLIPS.items() for row in question_rows(f"clips/{name}", scene)]
    assert set(CLIPS) == {path.name for path in (ROOT / "examples" / "clips").iterdir()}
    for name in CLIPS:
        assert (ROOT / "examples" / "clips" / name).stat().st_size < 200_000


def test_published_dataset_loads(tmp_path):
    folder = tmp_path / "board-clips"
    sizes = ("--train", "2", "--validation", "1", "--test", "1")
    subprocess.run([sys.executable, "-m", "benchmarks.quality.publish_dataset", folder, *sizes], cwd=ROOT, check=True)
    dataset = load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert {name: len(split) for name, split in dataset.items()} == {
        name: clips * len(scenes.QUESTIONS) for name, clips in (("train", 2), ("validation", 1), ("test", 1))
    }
    for row in dataset["train"]:
        scene = scenes.make_scene(int(Path(row["video"]).stem), beats=8 if row["video"].endswith("0.mp4") else 16)
        assert {item.kind: item.answer for item in scenes.questions(scene)}[row["kind"]] == row["answer"]
        assert (folder / row["video"]).stat().st_size > 1000
