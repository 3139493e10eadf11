"""Ways to film a scene: still as it is drawn, from a hand, or as a fixed camera sees a screen.

Where nothing moves but what matters, likeness to the frame before says nearly all about a block. In a hand every edge
moves a little all the time, and the light and the grain of the sensor with it, while a small dot that lights up for a
moment changes less than they do; on a screen almost nothing ever changes. A film has the scene's things in the scene's
places, so that its questions keep their answers, and three questions more that a pruner can fail in ways of their own:
where a dot was at a moment, how many there were, and what changed between two moments.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from stts_molmo.tools.files import written_whole

from .scenes import (
    BOARD,
    CELL,
    COUNTS,
    FRAME,
    Question,
    Scene,
    Thing,
    captions,
    enlarge,
    make_scene,
    questions,
    render,
    things_at,
    write_mp4,
)

HALF = CELL // 2  # a dot is somewhere on a grid of half cells, 6 x 6
DOT = slice(1, 5)  # of the 6 px of a half cell
DOT_CONTRAST = 80  # grey levels
MARGIN = 3  # px that a camera may be off, rounded up; well below one block
QUESTIONS = {
    "dot point": "Where is the dot at {} ?",
    "dot count": "How many dots appear?",
    "what happens": "What happens from {} to {} ?",
}


@dataclass(frozen=True)
class World:
    """
    How a film differs from its scene, each the most that a clip may have of it.

    Distances in pixels of a frame, of which a patch has 4 and a block 12; light, grain and texture in grey levels.
    """

    shake: float = 0.0
    pan: float = 0.0
    light: float = 0.0
    grain: float = 0.0
    texture: float = 0.0
    panels: int = 0
    cut_share: float = 0.0
    keeps_flicker: bool = False


WORLDS = {
    "still": None,  # the scene as it is drawn
    "handheld": World(shake=1.25, pan=0.75, light=10.0, grain=5.0, texture=12.0, cut_share=0.5, keeps_flicker=True),
    "screen": World(panels=6),
}
MIXTURE = ("still", "handheld", "handheld", "screen")  # of training, by seed


@dataclass(frozen=True)
class Dot:
    """A small bright dot on half cell `x`, `y` (0..5), from `start` seconds for one beat; seen at the `moment`."""

    x: int
    y: int
    start: float
    moment: float

    @property
    def cell(self) -> int:
        return self.y // 2 * BOARD + self.x // 2


@dataclass(frozen=True)
class Film:
    """A scene in a world; in none it has no dots, no cut and no moments to compare."""

    scene: Scene
    world: World | None
    dots: tuple[Dot, ...] = ()
    cut: float = math.inf  # seconds
    moments: tuple[float, float] = (0.0, 0.0)


def make_film(seed: int, world: str, level: int = 2, beats: int = 16, beat: float = 0.5) -> Film:
    """The scene of a seed in one of `WORLDS`; everything in it follows from these arguments."""
    scene, world = make_scene(seed, level, beats, beat), WORLDS[world]
    if world is None:
        return Film(scene, None)
    rng = np.random.default_rng([scene.seed, 1])
    scene = replace(scene, noise=0.0, flicker=scene.flicker if world.keeps_flicker else {})
    dots = []
    for beat in np.sort(rng.choice(np.arange(1, beats), size=rng.integers(1, len(COUNTS) + 1), replace=False)):
        moment = float(beat * scene.beat)
        taken = {thing.cell for thing, _ in things_at(scene, moment)} | {scene.sign_cell}
        free = sorted(set(range(9)) - taken - set(scene.flicker)) or sorted(set(range(9)) - taken)
        row, column = divmod(int(rng.choice(free)), 3)
        x, y = 2 * column + rng.integers(2), 2 * row + rng.integers(2)
        dots.append(Dot(int(x), int(y), moment - rng.uniform(0.3, 0.7) * scene.beat, moment))
    cut = rng.uniform(1, beats - 1) * scene.beat if rng.random() < world.cut_share else math.inf
    return Film(scene, world, tuple(dots), cut, _moments(scene, beats, rng))


def _moments(scene: Scene, beats: int, rng: np.random.Generator) -> tuple[float, float]:
    """Two moments on the beat: what happened between them is drawn first, so that no answer is the likely one."""
    pairs = [(first * scene.beat, second * scene.beat) for second in range(beats) for first in range(second)]
    by_answer: dict[str, list[tuple[float, float]]] = {}
    for pair in pairs:
        by_answer.setdefault(what_happens(scene, *pair), []).append(pair)
    chosen = by_answer[str(rng.choice(sorted(by_answer)))]
    return chosen[rng.integers(len(chosen))]


def what_happens(scene: Scene, first: float, second: float) -> str:
    """What is different at the `second` of two times in seconds, and stays so."""
    lamp = first < scene.lamp_switch <= second and scene.lamp_start.color != scene.lamp_end.color
    happened = ["lamp"] * lamp + ["shape"] * (first < scene.sign_start <= second)
    return " and ".join(happened) or "nothing"


def film_questions(film: Film) -> list[Question]:
    """Every question of the scene, and in a world those of `QUESTIONS`."""
    if film.world is None:
        return questions(film.scene)
    return [
        *questions(film.scene),
        _where(_asked_dot(film)),
        Question("dot count", QUESTIONS["dot count"], COUNTS[len(film.dots) - 1]),
        _between(film, *film.moments),
    ]


def _asked_dot(film: Film) -> Dot:
    return film.dots[np.random.default_rng([film.scene.seed, 2]).integers(len(film.dots))]


def _where(dot: Dot) -> Question:
    moment = f"{dot.moment:.1f}"
    row, column = divmod(dot.cell, BOARD)
    return Question("dot point", QUESTIONS["dot point"].format(moment), f"{column} {row} {moment}")


def _between(film: Film, first: float, second: float) -> Question:
    question = QUESTIONS["what happens"].format(f"{first:.1f}", f"{second:.1f}")
    return Question("what happens", question, what_happens(film.scene, first, second))


def film_captions(film: Film, time: float) -> list[Question]:
    """The captions of the frame at a `time` in seconds, with its dots."""
    dots = [dot for dot in film.dots if dot.start <= time < dot.start + film.scene.beat]
    return captions(things_at(film.scene, time) + [(Thing("grey", dot.cell), "dot") for dot in dots], time)


def lessons(film: Film, times: np.ndarray, number: int, rng: np.random.Generator) -> list[Question]:
    """
    What else a model is asked about frames at `times` of a film in a world, to learn the words: where each dot in them
    is, and what happens between `number` pairs of them.
    """
    if film.world is None or not number:
        return []
    dots = [dot for dot in film.dots if dot.moment in times]
    pairs = [(first, second) for second in times.tolist() for first in times.tolist() if first < second]
    return [*map(_where, dots), *(_between(film, *pair) for pair in rng.permutation(pairs).tolist()[:number])]


def shoot(film: Film, times: np.ndarray) -> np.ndarray:
    """Frames of a film at `times` (T,) in seconds: uint8 (T, FRAME, FRAME, 3)."""
    world, times = film.world, np.asarray(times, dtype=float)
    if world is None:
        return render(film.scene, times)
    rng = np.random.default_rng([film.scene.seed, 3])
    after_cut = times >= film.cut
    backdrops = np.stack([_backdrop(world, rng) for _ in range(2)])
    frames = render(film.scene, times, backdrops[after_cut.astype(int)]).astype(float)
    for dot in film.dots:
        seen = (times >= dot.start) & (times < dot.start + film.scene.beat)
        half_cell = frames[:, dot.y * HALF : (dot.y + 1) * HALF, dot.x * HALF : (dot.x + 1) * HALF]
        half_cell[seen, DOT, DOT] += DOT_CONTRAST

    strength = rng.uniform(0.4, 1)
    pan = rng.uniform(-world.pan, world.pan, 2) * (2 * times / film.scene.duration - 1)[:, None]
    shake = np.stack([_wander(times, 0.7, rng) for _ in range(2)], axis=1)
    frames = _move(frames, pan + strength * world.shake * shake)
    frames += (strength * world.light * (_wander(times, 0.1, rng) + 0.5 * after_cut))[:, None, None, None]
    frames += rng.normal(0, 1, frames.shape) * (strength * world.grain)
    return np.clip(frames, 0, 255).astype(np.uint8)


def write_clip(path: str, film: Film, fps: int = 10, enlargement: int = 6, **compression) -> None:
    """The whole film as a video file whose last frame starts on the last beat."""
    num_beats = round(film.scene.duration / film.scene.beat)
    times = np.arange((num_beats - 1) * film.scene.beat * fps + 1) / fps
    write_mp4(path, enlarge(shoot(film, times), enlargement), fps, **compression)


def film_file(folder: Path, seed: int, world: str, beats: int) -> Path:
    """The mp4 file of a film in half-second beats, hard on its compression; written unless it is in `folder`."""
    path = folder / f"{world}-{seed}-{beats}.mp4"
    if not path.exists():
        with written_whole(path) as draft:
            write_clip(str(draft), make_film(seed, world, beats=beats), crf=30, preset="veryfast")
    return path


def _wander(times: np.ndarray, slowest: float, rng: np.random.Generator) -> np.ndarray:
    """Three sines of `slowest` Hz and up to six times that, (T,), seldom beyond -1 and 1."""
    rates, phases = rng.uniform(slowest, 6 * slowest, 3), rng.uniform(0, 2 * math.pi, 3)
    return np.sin(2 * math.pi * rates * times[:, None] + phases).mean(1) * 1.5


def _backdrop(world: World, rng: np.random.Generator) -> np.ndarray:
    """What stands behind the things, (FRAME, FRAME, 3): a gradient with woven texture, or panels with hard edges."""
    y, x = np.mgrid[:FRAME, :FRAME]
    grey = np.full((FRAME, FRAME), rng.uniform(45, 110))
    for wave in range(3):
        angle, period = rng.uniform(0, 2 * math.pi), rng.uniform(4, 30)
        phase = (math.cos(angle) * x + math.sin(angle) * y) * 2 * math.pi / period
        grey += world.texture / (wave + 1) * np.sin(phase + rng.uniform(0, 2 * math.pi)) * rng.uniform(0.3, 1)
    for _ in range(world.panels):
        (top, bottom), (left, right) = np.sort(rng.integers(0, FRAME + 1, (2, 2)))
        grey[top:bottom, left:right] = rng.uniform(40, 125)
    return grey[..., None] + rng.uniform(-12, 12, 3)


def _move(frames: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Frames (T, FRAME, FRAME, 3) seen from `offsets` (T, 2) px down and to the right, between pixels as well."""
    if not offsets.any():
        return frames
    edges = ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0))
    padded = np.pad(frames, edges, mode="edge")
    whole = np.floor(offsets).astype(int)
    parts = offsets - whole
    moved = np.empty_like(frames)
    for index, ((down, right), (part_down, part_right)) in enumerate(zip(whole, parts, strict=True)):
        top, left = MARGIN + down, MARGIN + right
        window = padded[index, top : top + FRAME + 1, left : left + FRAME + 1]
        rows = window[:-1] * (1 - part_down) + window[1:] * part_down
        moved[index] = rows[:, :-1] * (1 - part_right) + rows[:, 1:] * part_right
    return moved
