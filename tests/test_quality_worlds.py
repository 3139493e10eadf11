"""Films of the quality study: the same for a seed, what their questions say they are, and the same from a file."""

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from helpers import load_processor

from benchmarks.quality import scenes
from benchmarks.quality.batches import make_batch, make_file_batch, sample_batch
from benchmarks.quality.kept import blocks_shown
from benchmarks.quality.worlds import (
    MIXTURE,
    WORLDS,
    film_captions,
    film_file,
    film_questions,
    lessons,
    make_film,
    shoot,
    what_happens,
)

NEW = ("handheld", "screen")


def beat_times(film):
    return np.arange(round(film.scene.duration / film.scene.beat)) * film.scene.beat


@pytest.mark.parametrize("world", WORLDS)
def test_same_seed_same_film_and_pixels(world):
    first, second = (make_film(7, world) for _ in range(2))
    assert first == second and film_questions(first) == film_questions(second)
    assert np.array_equal(shoot(first, beat_times(first)), shoot(second, beat_times(second)))
    assert make_film(8, world) != first


def test_the_still_world_is_the_scene():
    film, scene = make_film(3, "still", beats=8), scenes.make_scene(3, beats=8)
    times = beat_times(film)
    assert film_questions(film) == scenes.questions(scene)
    assert np.array_equal(shoot(film, times), scenes.render(scene, times))


@pytest.mark.parametrize("world", NEW)
def test_a_moment_looks_the_same_whenever_else_is_filmed(world):
    """But for grain, which is new in each frame: what a file shows at 2 s is what training shows then."""
    film = make_film(5, world, beats=8)
    sparse, dense = shoot(film, np.array([0.5, 2.0])), shoot(film, np.arange(0, 36) / 10)
    difference = np.abs(sparse.astype(int) - dense[[5, 20]].astype(int))
    assert difference.mean() < 6 and (world != "screen" or not difference.any())


@pytest.mark.parametrize("world", NEW)
def test_answers_of_the_new_questions_follow_from_what_is_seen(world):
    for seed in range(30):
        film = make_film(seed, world, beats=8)
        times = beat_times(film)
        answers = {item.kind: item for item in film_questions(film)}
        column, row, moment = answers["dot point"].answer.split()
        assert f"at {moment} ?" in answers["dot point"].question
        seen = [dot for time in times for dot in film.dots if dot.start <= time < dot.start + film.scene.beat]
        assert seen == list(film.dots) and answers["dot count"].answer == scenes.COUNTS[len(seen) - 1]
        assert len({dot.moment for dot in seen}) == len(seen)
        first, second = film.moments
        assert answers["what happens"].question == f"What happens from {first:.1f} to {second:.1f} ?"
        names = [{(thing.color, name) for thing, name in scenes.things_at(film.scene, t)} for t in film.moments]
        lamps, signs = ([{n for n in at if match(n)} for at in names] for match in (is_lamp, is_sign))
        changed = ["lamp"] * (lamps[0] != lamps[1]) + ["shape"] * (signs[0] != signs[1])
        assert answers["what happens"].answer == (" and ".join(changed) or "nothing")
        if world == "screen":  # nothing moves: the dot's pixels are the only ones that differ from the frame without it
            at = float(moment)
            without = shoot(make_film_without_dots(film), np.array([at]))[0].astype(int)
            rows, columns = np.nonzero(np.abs(shoot(film, np.array([at]))[0] - without).max(-1))
            assert rows.max() - rows.min() == columns.max() - columns.min() == 3
            assert set(rows // scenes.CELL) == {int(row)} and set(columns // scenes.CELL) == {int(column)}


def is_lamp(name):
    return name[1] == "lamp"


def is_sign(name):
    return name[0] == "grey"


def make_film_without_dots(film):
    return type(film)(film.scene, film.world, (), film.cut, film.moments)


def test_dots_hide_nothing():
    for seed in range(200):
        film = make_film(seed, "handheld", beats=8)
        for dot in film.dots:
            taken = {thing.cell for thing, _ in scenes.things_at(film.scene, dot.moment)} | {film.scene.sign_cell}
            assert dot.cell not in taken


def test_new_answers_are_balanced():
    answers = defaultdict(Counter)
    for seed in range(2000):
        for item in film_questions(make_film(seed, "handheld", beats=8))[-3:]:
            parts = item.answer.split()[:2] if item.kind == "dot point" else [item.answer]
            for index, part in enumerate(parts):
                answers[item.kind, index][part] += 1
    for kind, counts in answers.items():
        assert max(counts.values()) < 1.35 * sum(counts.values()) / len(counts), (kind, counts)
    assert set(answers["what happens", 0]) == {"nothing", "lamp", "shape", "lamp and shape"}


def test_a_hand_moves_the_picture_by_less_than_a_block_and_a_screen_stands_still():
    film = make_film(2, "screen", beats=8)
    frames = shoot(film, beat_times(film)).astype(int)
    shown = blocks_shown(film, beat_times(film))
    for index in range(1, len(frames)):
        for cell in range(9):
            row, column = (12 * part for part in divmod(cell, 3))
            same = np.array_equal(*(f[row : row + 12, column : column + 12] for f in frames[index - 1 : index + 1]))
            assert same == (shown[index][cell] == shown[index - 1][cell] or "as before" in shown[index][cell])
    moved = [shoot(make_film(seed, "handheld", beats=8), np.array([0.0, 0.5])).astype(int) for seed in range(20)]
    assert min(np.abs(before - after).mean() for before, after in moved) > 1


def test_a_cut_changes_the_backdrop_once():
    film = next(f for f in (make_film(seed, "handheld", beats=8) for seed in range(20)) if f.cut < 4)
    times = beat_times(film)
    frames = shoot(film, times).astype(int)
    steps = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))
    assert steps.argmax() == np.argmax(times >= film.cut) - 1


@pytest.mark.parametrize("world", NEW)
def test_file_and_arrays_give_the_same_tokens(world, tmp_path):
    processor, film = load_processor(), make_film(100_000, world, beats=8)
    path = film_file(tmp_path, 100_000, world, beats=8)
    chats = [[item] for item in film_questions(film)]
    from_file = make_file_batch(processor, str(path), chats, 8)
    from_arrays = make_batch(processor, [shoot(film, beat_times(film))], chats, beat_times(film))
    for name in ("input_ids", "labels", "video_grids", "video_token_pooling"):
        assert torch.equal(from_file[name], from_arrays[name]), name
    assert (from_file["pixel_values_videos"] - from_arrays["pixel_values_videos"]).abs().mean() < 0.06
    written = path.stat().st_mtime_ns
    assert film_file(tmp_path, 100_000, world, beats=8).stat().st_mtime_ns == written


def test_a_batch_takes_worlds_in_turn():
    batch, chats = sample_batch(load_processor(), 8, 4, 2, 8, worlds=MIXTURE)
    assert [len(chat) for chat in chats] == [18 if world in NEW else 15 for world in MIXTURE]
    assert batch["video_grids"].tolist() == [[8, 3, 3]] * 4


def test_lessons_are_about_frames_that_are_shown():
    film = next(f for f in (make_film(seed, "handheld", beats=8) for seed in range(20)) if len(f.dots) == 3)
    times = np.array([0.0, film.dots[0].moment, film.dots[2].moment])
    taught = lessons(film, times, 2, np.random.default_rng(0))
    assert [item.kind for item in taught] == ["dot point", "dot point", "what happens", "what happens"]
    assert [f"at {time:.1f} ?" in item.question for time, item in zip(times[1:], taught, strict=False)] == [True] * 2
    assert lessons(film, times, 0, np.random.default_rng(0)) == []
    assert lessons(make_film(1, "still"), times, 2, np.random.default_rng(0)) == []
    by_place = [film_captions(film, time)[0].answer for time in times]
    assert ["grey dot" in caption for caption in by_place] == [False, True, True]
    assert f"{scenes.PLACES[film.dots[0].cell]} grey dot" in by_place[1]


def test_scenes_of_more_beats_are_seen_in_even_steps():
    processor = load_processor()
    films = [make_film(seed, "screen", beats=8, beat=0.5) for seed in range(4)]
    batch, chats = sample_batch(processor, 0, 4, 2, 4, worlds=("screen",), beats=8)
    times = np.linspace(0, 3.5, 4)
    same = make_batch(processor, [shoot(film, times) for film in films], chats, times)
    assert torch.equal(batch["pixel_values_videos"], same["pixel_values_videos"])
    assert torch.equal(batch["input_ids"], same["input_ids"])


def test_nothing_happens_between_a_moment_and_itself():
    scene = scenes.make_scene(1)
    assert what_happens(scene, 2.0, 2.0) == "nothing"
