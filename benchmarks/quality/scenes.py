"""Synthetic clips with questions: little scenes on a 3x3 board, one pooled block (12 px) per cell.

A scene is a description in continuous time, so it can be drawn at any instants, as frames for training or as a video
file. What matters stands still (a shape), changes once (a lamp), changes little (a grey sign that appears) or is brief
(stars that flash, a ball that hops across the board); what does not matter moves all the time (noise and drifting
stripes in grey) or never (the background). Answers are drawn independently and no question gives one away, so all of
a clip's questions can be asked in one conversation.
"""

import math
from dataclasses import dataclass, field
from fractions import Fraction

import av
import numpy as np

CELL, BOARD = 12, 3
FRAME = CELL * BOARD
COLORS = {
    "red": (225, 45, 40),
    "green": (50, 190, 60),
    "blue": (55, 85, 235),
    "yellow": (240, 220, 50),
    "purple": (170, 55, 200),
    "cyan": (60, 215, 225),
}
SHAPES = ("square", "triangle", "cross", "ring")
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
COUNTS = ("one", "two", "three")
LANES = {
    "right": ((0, 1, 2), (3, 4, 5), (6, 7, 8)),
    "left": ((2, 1, 0), (5, 4, 3), (8, 7, 6)),
    "down": ((0, 3, 6), (1, 4, 7), (2, 5, 8)),
    "up": ((6, 3, 0), (7, 4, 1), (8, 5, 2)),
}
MIN_BEATS = 4  # so that a ball has time for its way
SIGN_CONTRAST = 45  # grey levels above the background
FIRST_SEED = {"validation": 0, "test": 100_000, "demo": 500_000, "train": 1_000_000}
QUESTIONS = {
    "still shape": "Which shape stands still?",
    "still color": "What color is the still shape?",
    "still place": "Where is the still shape?",
    "lamp start": "What color is the lamp at the start?",
    "lamp end": "What color is the lamp at the end?",
    "sign shape": "Which shape appears?",
    "sign place": "Where does a shape appear?",
    "ball color": "What color is the ball?",
    "ball start": "Where is the ball at the start?",
    "ball end": "Where is the ball at the end?",
    "ball direction": "Which way does the ball move?",
    "star count": "How many stars flash?",
    "star first color": "What color is the first star?",
    "star first place": "Where is the first star?",
    "star last color": "What color is the last star?",
}


@dataclass(frozen=True)
class Level:
    """How hard a scene is: least and most stars and flickering cells, codec-like noise in grey levels."""

    stars: tuple[int, int]
    flicker: tuple[int, int]
    noise: float


LEVELS = (Level((1, 2), (0, 0), 0.0), Level((1, 3), (0, 3), 2.0), Level((1, 3), (2, 5), 4.0))


@dataclass(frozen=True)
class Thing:
    """A coloured thing in one cell (0..8, row by row)."""

    color: str
    cell: int


@dataclass(frozen=True)
class Star(Thing):
    """A star seen from `start` seconds for one beat."""

    start: float


@dataclass(frozen=True)
class Scene:
    """What happens in a clip. Times in seconds; a `beat` is how long a flash or a hop lasts."""

    seed: int
    duration: float
    beat: float
    noise: float
    shape: str
    still: Thing
    lamp_start: Thing
    lamp_end: Thing
    lamp_switch: float
    sign: str
    sign_cell: int
    sign_start: float
    ball_color: str
    ball_direction: str
    ball_cells: tuple[int, int, int]
    ball_start: float
    stars: tuple[Star, ...]
    flicker: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    kind: str
    question: str
    answer: str


def make_scene(seed: int, level: int = 2, beats: int = 16, beat: float = 0.5) -> Scene:
    """The scene of a seed: `beats` beats long, each event falls on one beat after the first.

    A frame every `beat` seconds sees every flash and every hop exactly once.
    """
    rng = np.random.default_rng([seed, level, beats])
    limits = LEVELS[level]

    def start_of(beat_index: int) -> float:
        return (beat_index - rng.uniform(0.3, 0.7)) * beat

    def any_color() -> str:
        return str(rng.choice(list(COLORS)))

    direction = str(rng.choice(list(LANES)))
    lane = LANES[direction][rng.integers(BOARD)]
    free = [int(cell) for cell in rng.permutation(BOARD * BOARD) if cell not in lane]
    still_cell, lamp_cell, sign_cell, *star_cells = free
    num_stars = int(rng.integers(limits.stars[0], limits.stars[1] + 1))
    star_beats = sorted(rng.choice(np.arange(1, beats), size=num_stars, replace=False).tolist())
    num_flicker = int(rng.integers(limits.flicker[0], limits.flicker[1] + 1))
    return Scene(
        seed=seed,
        duration=beats * beat,
        beat=beat,
        noise=limits.noise,
        shape=str(rng.choice(SHAPES)),
        still=Thing(any_color(), still_cell),
        lamp_start=Thing(any_color(), lamp_cell),
        lamp_end=Thing(any_color(), lamp_cell),
        lamp_switch=start_of(int(rng.integers(1, beats))),
        sign=str(rng.choice(SHAPES)),
        sign_cell=sign_cell,
        sign_start=start_of(int(rng.integers(1, beats))),
        ball_color=any_color(),
        ball_direction=direction,
        ball_cells=lane,
        ball_start=start_of(int(rng.integers(1, beats - 2))),
        stars=tuple(
            Star(any_color(), cell, start_of(index)) for cell, index in zip(star_cells, star_beats, strict=False)
        ),
        flicker={
            int(cell): str(rng.choice(["noise", "stripes"]))
            for cell in rng.permutation([*lane, *star_cells])[:num_flicker]
        },
    )


def questions(scene: Scene) -> list[Question]:
    """Every question of a scene, in the order of `QUESTIONS`."""
    answers = {
        "still shape": scene.shape,
        "still color": scene.still.color,
        "still place": PLACES[scene.still.cell],
        "lamp start": scene.lamp_start.color,
        "lamp end": scene.lamp_end.color,
        "sign shape": scene.sign,
        "sign place": PLACES[scene.sign_cell],
        "ball color": scene.ball_color,
        "ball start": PLACES[scene.ball_cells[0]],
        "ball end": PLACES[scene.ball_cells[-1]],
        "ball direction": scene.ball_direction,
        "star count": COUNTS[len(scene.stars) - 1],
        "star first color": scene.stars[0].color,
        "star first place": PLACES[scene.stars[0].cell],
        "star last color": scene.stars[-1].color,
    }
    return [Question(kind, question, answers[kind]) for kind, question in QUESTIONS.items()]


def things_at(scene: Scene, time: float) -> list[tuple[Thing, str]]:
    """What is seen at a time in seconds, each with its name; the sign is grey."""
    things = [(scene.still, scene.shape)]
    things += [(scene.lamp_start if time < scene.lamp_switch else scene.lamp_end, "lamp")]
    if time >= scene.sign_start:
        things += [(Thing("grey", scene.sign_cell), scene.sign)]
    hop = math.floor((time - scene.ball_start) / scene.beat)
    if 0 <= hop < len(scene.ball_cells):
        things += [(Thing(scene.ball_color, scene.ball_cells[hop]), "ball")]
    return things + [(star, "star") for star in scene.stars if star.start <= time < star.start + scene.beat]


def captions(things: list[tuple[Thing, str]], time: float) -> list[Question]:
    """What the frame at a `time` in seconds shows, by place and by thing: what a model is shown to learn the words."""
    cells = {thing.cell: f"{thing.color} {name}" for thing, name in things}
    by_place = " ".join(f"{place} {cells.get(cell, 'nothing')}" for cell, place in enumerate(PLACES))
    by_thing = " ".join(f"{name} {thing.color} {PLACES[thing.cell]}" for thing, name in things)
    return [
        Question("caption", f"What is where at {time:.1f} ?", by_place),
        Question("caption", f"What is seen at {time:.1f} ?", by_thing),
    ]


def _masks() -> dict[str, np.ndarray]:
    """Silhouettes, bool (CELL, CELL), 10 px wide."""
    y, x = np.mgrid[:CELL, :CELL] - (CELL - 1) / 2
    near_x, near_y, radius = np.abs(x), np.abs(y), np.hypot(x, y)
    inside = (near_x < 5) & (near_y < 5)
    return {
        "square": inside,
        "triangle": inside & (near_x < (y + 5.5) / 2),
        "cross": inside & ((near_x < 1.6) | (near_y < 1.6)),
        "ring": (radius < 5.2) & (radius > 3),
        "ball": radius < 5.2,
        "lamp": near_x + near_y < 5.6,
        "lamp core": near_x + near_y < 2.1,
        "star": inside & ((np.abs(near_x - near_y) < 1.1) | (near_x < 1) | (near_y < 1)),
    }


MASKS = _masks()


def _cell_view(frames: np.ndarray, cell: int) -> np.ndarray:
    """The pixels of one cell: a view (..., CELL, CELL, 3) of frames (..., FRAME, FRAME, 3)."""
    row, column = divmod(cell, BOARD)
    return frames[..., row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL, :]


def _draw(frames: np.ndarray, name: str, thing: Thing, tint: np.ndarray) -> None:
    view = _cell_view(frames, thing.cell)
    view[..., MASKS[name], :] = np.clip(COLORS[thing.color] + tint, 0, 255)
    if name == "lamp":
        view[..., MASKS["lamp core"], :] = 250


def _background(rng: np.random.Generator) -> np.ndarray:
    """A muted gradient with a fixed grain, (FRAME, FRAME, 3)."""
    y, x = np.mgrid[:FRAME, :FRAME] / FRAME
    angle = rng.uniform(0, 2 * math.pi)
    ramp = (math.cos(angle) * x + math.sin(angle) * y) * rng.uniform(0, 40)
    grain = rng.normal(0, rng.uniform(0, 6), (FRAME, FRAME))
    return rng.uniform(40, 110) + rng.uniform(-12, 12, 3) + (ramp + grain)[..., None]


def _flicker(kind: str, times: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Grey noise, new every 0.1 s, or stripes drifting over a cell: (T, CELL, CELL, 1)."""
    low, high = np.sort(rng.uniform(20, 230, 2))
    ticks = np.floor(times * 10 + 1e-6).astype(int)
    if kind == "noise":
        return rng.uniform(low, high, (13, CELL, CELL, 1))[ticks * 4 % 13]
    y, x = np.mgrid[:CELL, :CELL]
    angle, speed = rng.uniform(0, 2 * math.pi), rng.uniform(0.3, 0.9)
    phase = (math.cos(angle) * x + math.sin(angle) * y) * rng.uniform(0.7, 1.4)
    return (low + high + (high - low) * np.sin(phase - speed * ticks[:, None, None]))[..., None] / 2


def render(scene: Scene, times: np.ndarray, backdrops: np.ndarray | None = None) -> np.ndarray:
    """
    Draws a scene at `times` (T,) in seconds: uint8 (T, FRAME, FRAME, 3).

    `backdrops` (T, FRAME, FRAME, 3) take the place of the scene's own background.
    """
    rng = np.random.default_rng(scene.seed)
    tints = iter(rng.uniform(-18, 18, (16, 3)))
    times = np.asarray(times, dtype=float)
    background = np.repeat(_background(rng)[None], len(times), axis=0)
    frames = background if backdrops is None else backdrops.copy()
    for cell, kind in scene.flicker.items():
        _cell_view(frames, cell)[:] = _flicker(kind, times, rng)
    _draw(frames, scene.shape, scene.still, next(tints))
    before = times < scene.lamp_switch
    for seen, lamp in ((before, scene.lamp_start), (~before, scene.lamp_end)):
        _draw_when(frames, seen, "lamp", lamp, next(tints))
    _cell_view(frames, scene.sign_cell)[(times >= scene.sign_start)[:, None, None] & MASKS[scene.sign]] += SIGN_CONTRAST
    hop = np.floor((times - scene.ball_start) / scene.beat)
    ball_tint = next(tints)
    for step, cell in enumerate(scene.ball_cells):
        _draw_when(frames, hop == step, "ball", Thing(scene.ball_color, cell), ball_tint)
    for star in scene.stars:
        seen = (times >= star.start) & (times < star.start + scene.beat)
        _draw_when(frames, seen, "star", star, next(tints))
    if scene.noise:
        frames += rng.normal(0, scene.noise, frames.shape)
    return np.clip(frames, 0, 255).astype(np.uint8)


def _draw_when(frames: np.ndarray, seen: np.ndarray, name: str, thing: Thing, tint: np.ndarray) -> None:
    if seen.any():
        chosen = frames[seen]
        _draw(chosen, name, thing, tint)
        frames[seen] = chosen


def enlarge(frames: np.ndarray, factor: int) -> np.ndarray:
    """Every pixel becomes a square of `factor` pixels."""
    return frames.repeat(factor, axis=-3).repeat(factor, axis=-2)


def write_mp4(path: str, frames: np.ndarray, fps: int, crf: int = 23, preset: str = "slow") -> None:
    """Writes uint8 (T, H, W, 3) as H.264 of that `crf`, or MPEG-4 part 2 where libx264 is absent."""
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        if codec == "libx264":
            stream.options = {"crf": str(crf), "preset": preset}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
