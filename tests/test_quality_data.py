"""The quality study's clips and questions: deterministic, balanced, answerable, the same from a file as from arrays."""

import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks" / "quality"))

import scenes  # noqa: E402
from stts_molmo.processing_stts_molmo import STTSMolmoProcessor, STTSMolmoVideoProcessor  # noqa: E402
from tiny import MULTIMODAL_TOKENS, VOCAB_SIZE, build_config, build_model, build_processor  # noqa: E402


@pytest.fixture(scope="module")
def processor():
    native = build_processor()
    settings = {name: getattr(native.video_processor, name) for name in ("size", "patch_size", "pooling_size")}
    sampling = {name: getattr(native.video_processor, name) for name in ("num_frames", "max_fps")}
    video_processor = STTSMolmoVideoProcessor(**settings, **sampling, do_rescale=True, do_normalize=True)
    return STTSMolmoProcessor(native.image_processor, video_processor, native.tokenizer, native.chat_template)


def beat_times(scene):
    return np.arange(round(scene.duration / scene.beat)) * scene.beat


def color_in(frame, cell):
    """The palette colour that most saturated pixels of a cell are nearest to."""
    row, column = divmod(cell, scenes.BOARD)
    side = scenes.CELL
    pixels = frame[row * side : (row + 1) * side, column * side : (column + 1) * side].reshape(-1, 3).astype(int)
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
    assert set(answers) == set(scenes.KINDS)
    for kind, counts in answers.items():
        uniform = sum(counts.values()) / len(counts)
        assert max(counts.values()) < 1.25 * uniform, (kind, counts)


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
        assert answers.get("star first", order[0].color) == order[0].color
        assert answers.get("star last", order[-1].color) == order[-1].color

        assert color_in(frames[0], scene.still.cell) == color_in(frames[-1], scene.still.cell) == answers["still color"]
        for when, frame in (("start", frames[0]), ("end", frames[-1])):
            cell = scenes.PLACES.index(answers[f"lamp {when} place"])
            assert color_in(frame, cell) == answers[f"lamp {when} color"]

        first_hop = np.argmax(times >= scene.ball_start)
        for cell, frame in zip(scene.ball_cells, frames[first_hop:], strict=False):
            assert color_in(frame, cell) == answers["ball color"]
        step = scene.ball_cells[1] - scene.ball_cells[0]
        assert answers["ball direction"] == {1: "right", -1: "left", 3: "down", -3: "up"}[step]


def test_every_question_word_is_one_token(processor):
    for item in scenes.questions(scenes.make_scene(0)):
        assert len(processor.tokenizer.tokenize(item.question)) == len(item.question.split()) + 1
        assert len(processor.tokenizer.tokenize(item.answer)) == len(item.answer.split())


def test_checkpoint_has_this_tokenizer_and_template(processor):
    from transformers import PreTrainedTokenizerFast

    saved = PreTrainedTokenizerFast.from_pretrained(ROOT / "checkpoints" / "stts-molmo-tiny")
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
    from_file = processor(text=[text], videos=[str(path)], return_tensors="pt")
    array = scenes.render(scene, beat_times(scene))
    metadata = {"total_num_frames": beats, "fps": 1 / scene.beat, "frames_indices": list(range(beats))}
    from_array = processor(
        text=[text], videos=[array], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt"
    )
    for name in ("input_ids", "mm_token_type_ids", "video_grids", "video_token_pooling"):
        assert torch.equal(from_file[name], from_array[name]), name
    difference = (from_file["pixel_values_videos"] - from_array["pixel_values_videos"]).abs()
    assert difference.mean() < 0.06


def test_bundled_clips_are_what_their_questions_say(processor):
    folder = ROOT / "examples" / "clips"
    clips = json.loads((folder / "questions.json").read_text())
    assert {clip["file"] for clip in clips} == {path.name for path in folder.glob("*.mp4")}
    for clip in clips:
        assert (folder / clip["file"]).stat().st_size < 200_000
        scene = scenes.make_scene(clip["seed"], level=clip["level"], beats=clip["beats"])
        assert [vars(item) for item in scenes.questions(scene)] == clip["questions"]
