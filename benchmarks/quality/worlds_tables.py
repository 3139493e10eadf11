"""Tables of `worlds_study.py`. Intervals are 95 % bootstrap, paired over clips, with the seeds drawn anew."""

from collections.abc import Sequence

import numpy as np
from stts_molmo.pruning_stts_molmo import num_kept_tokens

from ..common import markdown_table
from .study import LONG_BEATS, NUM_FRAMES
from .tables import Study, matrix_of, text_of
from .tiny import TOKENS_PER_FRAME
from .worlds_study import CLIPS, CURVES, FEWER_FRAMES, OTHER_RATIOS

SHORT = ("still, short", "handheld, short", "screen, short")
LONG = tuple(f"{world}, long{frames}" for world in CURVES for frames in ("", f", {LONG_BEATS} frames"))
HALF_FRAMES = "short, 4 frames"
NEW_THINGS = ("sign, new", "dot, new", "lamp, new", "star, new", "ball, new", "flicker", "background")
SHOWN = {
    "unpruned": "no pruning",
    "stts 50": "STTS 50 %",
    "cosine 50": "cosine 50 %",
    "random 50": "random 50 %",
    "tome 50": "token merging 50 %",
    "stts 50 fast scorer": "STTS 50 %, scorer's rate as in the paper",
    "stts 50 falling aux": "the same, auxiliary weight falling to 0",
    "stts 50 fresh": "STTS 50 %, as in the paper: no warm-up either",
    "stts 50 without aux": "the same, no auxiliary loss",
    "stts 50 third of the steps": "STTS 50 %, a third of the steps",
    "stts 50 fresh third of the steps": "STTS 50 %, as in the paper, a third of the steps",
    "cosine 50 third of the steps": "cosine 50 %, a third of the steps",
    "no pruning, no training": "no pruning, nothing trained",
    "warm-up alone": "STTS 50 %, nothing trained but the warm-up",
    "cosine, no training": "cosine 50 %, nothing trained",
    "half of the frames": "no pruning, half of the frames, trained on these",
    "stts 50 log patches": "log, patches",
    "stts 50 rescaled pooled": "rescaled log, pooled",
    "stts 50 rescaled patches": "rescaled log, patches (the authors' code)",
}
MAIN = ("unpruned", *(f"stts {k}" for k in (30, 40, 50, 60, 70, 80)), "cosine 50", "random 50", "tome 50")
TRAINING = (
    "stts 50",
    "stts 50 fast scorer",
    "stts 50 falling aux",
    "stts 50 fresh",
    "stts 50 without aux",
    "stts 50 third of the steps",
    "stts 50 fresh third of the steps",
    "cosine 50",
    "cosine 50 third of the steps",
)
UNTRAINED = ("no pruning, no training", "warm-up alone", "cosine, no training")
PRESETS = ("stts 50", "stts 50 log patches", "stts 50 rescaled pooled", "stts 50 rescaled patches")
SEEDED = ("unpruned", "stts 50", "stts 50 fresh", "cosine 50", "random 50", "warm-up alone")


def shown(row: str) -> str:
    return SHOWN.get(row, row.replace("stts", "STTS") + " %")


def runs_of(study: Study, *rows: str) -> list[dict]:
    """The runs of these rows, by seed."""
    return [
        run for row in rows for run in sorted(study.results["runs"], key=lambda run: run["seed"]) if run["row"] == row
    ]


def hits_in(study: Study, row: str, evaluation: str, kinds: Sequence[str] | None = None) -> np.ndarray:
    """As `Study.hits`, of the seeds that were asked this, and of some `kinds` of questions; or empty."""
    asked = [run["hits"][evaluation] for run in runs_of(study, row) if evaluation in run["hits"]]
    picked = [{kind: hits[kind] for kind in kinds or hits} for hits in asked]
    return np.stack([matrix_of(hits) for hits in picked]) if asked else np.empty((0, 0, 0))


def kinds_asked(study: Study, evaluation: str) -> tuple[str, ...]:
    return next(tuple(run["hits"][evaluation]) for run in study.results["runs"] if evaluation in run["hits"])


def cell(study: Study, row: str, evaluation: str) -> str:
    hits = hits_in(study, row, evaluation)
    return text_of(study.interval(hits)) if hits.size else "-"


def difference(study: Study, row: str, other: str, evaluation: str, of_other: str | None = None) -> str:
    """Right answers of a row less those of another, on the clips that both were asked about, which come first."""
    first, second = hits_in(study, row, evaluation), hits_in(study, other, of_other or evaluation)
    if not first.size or not second.size:
        return "-"
    clips = min(first.shape[-1], second.shape[-1])
    return text_of(study.interval(first[..., :clips], minus=second[..., :clips]), "{:+.1f}")


def seeds_text(study: Study, row: str, evaluations: Sequence[str]) -> str:
    """The seeds of a row that were asked any of these."""
    return ", ".join(str(run["seed"]) for run in runs_of(study, row) if {*evaluations} & {*run["hits"]})


def accuracy_table(study: Study, rows: Sequence[str], evaluations: Sequence[str], against: str | None = None) -> str:
    """Right answers in each evaluation; and less those of the row `against`, if one is given."""
    header = ["right answers in %", "seeds", *evaluations]
    if against:
        header += [f"{name}, less {shown(against)}" for name in evaluations]
    lines = []
    for row in rows:
        cells = [cell(study, row, name) for name in evaluations]
        if set(cells) != {"-"}:
            gaps = ["" if row == against else difference(study, row, against, name) for name in evaluations if against]
            lines.append([shown(row), seeds_text(study, row, evaluations), *cells, *gaps])
    return markdown_table(header, lines)


def difference_table(study: Study) -> str:
    others = ("cosine 50", "random 50", "unpruned")
    pairs = [(row, other) for row in ("stts 50", "stts 50 fresh", "cosine 50") for other in others if row != other]
    lines = [
        [f"{shown(row)} less {shown(other)}", *(difference(study, row, other, name) for name in SHORT)]
        for row, other in pairs
    ]
    return markdown_table(["difference in points", *SHORT], lines)


def kind_table(study: Study, columns: dict[str, tuple[str, str]], evaluation: str) -> str:
    """Right answers by kind of question; `columns` are rows and what they were asked, by their heading."""
    kinds = kinds_asked(study, evaluation)
    hits = {name: hits_in(study, row, asked, kinds) for name, (row, asked) in columns.items()}
    lines = [
        [kind, *(f"{100 * found[:, index].mean():.0f}" if found.size else "-" for found in hits.values())]
        for index, kind in enumerate(kinds)
    ]
    return markdown_table(["", *columns], lines)


def kept_tokens(ratio: int) -> int:
    """Of a short clip, at a ratio in percent."""
    return num_kept_tokens(NUM_FRAMES, TOKENS_PER_FRAME, ratio / 100)


def curve(study: Study, row: str, world: str, kinds: Sequence[str] | None = None) -> list[tuple[int, np.ndarray]]:
    """Vision tokens of a short clip, and right answers with so many: at other ratios, or with fewer frames."""
    asked = {kept_tokens(k): f"{world}, short, {k} %" for k in OTHER_RATIOS}
    asked[kept_tokens(50)] = f"{world}, short"
    if row == "unpruned":
        asked = {n * TOKENS_PER_FRAME: f"{world}, short, {n} frames" for n in FEWER_FRAMES}
        asked[NUM_FRAMES * TOKENS_PER_FRAME] = f"{world}, short"
    points = [(tokens, hits_in(study, row, name, kinds)) for tokens, name in sorted(asked.items())]
    return [(tokens, hits) for tokens, hits in points if hits.size]


def ratio_table(study: Study, world: str) -> str:
    """
    By ratio: rows trained at 50 % and asked at it, STTS trained at it, and the unpruned row with as few whole frames as
    have no fewer tokens.
    """
    at_50 = ("stts 50", "cosine 50", "random 50")
    lines = []
    for k in sorted([*OTHER_RATIOS, 50]):
        asked = f"{world}, short" if k == 50 else f"{world}, short, {k} %"
        tokens = kept_tokens(k)
        frames = -(-tokens // TOKENS_PER_FRAME)
        whole = f"{world}, short, {frames} frames"
        lines.append(
            [
                f"{k} %, {tokens} tokens",
                *(cell(study, row, asked) for row in at_50),
                cell(study, f"stts {k}", f"{world}, short"),
                f"{frames}, {frames * TOKENS_PER_FRAME}",
                cell(study, "unpruned", whole),
                difference(study, "stts 50", "unpruned", asked, whole),
            ]
        )
    header = ["ratio", *map(shown, at_50), "STTS, trained at the ratio", "whole frames, tokens", "no pruning, these"]
    return markdown_table([*header, f"{shown('stts 50')} less that"], lines)


def equal_tokens_table(study: Study) -> str:
    """Half of the tokens of many frames, beside as many tokens of half of the frames, whole."""
    cases = [
        (f"{world}, {beats} beats, {TOKENS_PER_FRAME * frames} tokens", f"{world}, {half}", f"{world}, {full}")
        for beats, frames, half, full in (
            (NUM_FRAMES, NUM_FRAMES // 2, "short", HALF_FRAMES),
            (LONG_BEATS, NUM_FRAMES, f"long, {LONG_BEATS} frames", "long"),
        )
        for world in CURVES
    ]
    rows = ("stts 50", "cosine 50", "random 50")
    header = ["", *map(shown, rows), "half of the frames, whole", "the same, trained on these", "STTS less that"]
    lines = []
    for name, half, full in cases:
        trained = difference(study, "stts 50", "half of the frames", half, full)
        lines.append(
            [
                name,
                *(cell(study, row, half) for row in rows),
                cell(study, "unpruned", full),
                cell(study, "half of the frames", full),
                trained if trained != "-" else difference(study, "stts 50", "unpruned", half, full),
            ]
        )
    return markdown_table(header, lines)


def kept_table(study: Study, world: str) -> str:
    """Of 100 blocks how many are kept at 50 %, by seed."""
    runs = runs_of(study, "stts 50", "stts 50 fresh", "warm-up alone", "cosine 50", "random 50")
    present = [name for name in NEW_THINGS if name in runs[0]["kept"][world]] if runs else []
    lines = [
        [
            f"{shown(run['row'])}, seed {run['seed']}",
            *(f"{100 * run['kept'][world][name]['kept']:.0f}" for name in present),
        ]
        for run in runs
    ]
    return markdown_table(["kept of 100", *present], lines)


def kept_by_seed(study: Study, row: str, world: str, name: str) -> str:
    """Of 100 blocks that show `name` how many are kept: of each seed."""
    return ", ".join(f"{100 * run['kept'][world][name]['kept']:.0f}" for run in runs_of(study, row))


def seed_table(study: Study) -> str:
    """Right answers of each seed."""
    lines = [
        [
            f"{shown(run['row'])}, seed {run['seed']}",
            *(f"{100 * hits_in(Study({'runs': [run]}), run['row'], name).mean():.1f}" for name in SHORT),
        ]
        for run in runs_of(study, *SEEDED)
    ]
    return markdown_table(["right answers in %", *SHORT], lines)


def checkpoint_table(study: Study, row: str, seed: int) -> str:
    """What the checkpoint of one run answers."""
    (run,) = (run for run in runs_of(study, row) if run["seed"] == seed)
    alone, lines = Study({"runs": [run]}), []
    for world in CLIPS:
        asked = [f"{world}, {name}" for name in ("short", "long", f"long, {LONG_BEATS} frames")]
        hits = [hits_in(alone, row, name) for name in asked]
        lines.append([world, *(f"{100 * found.mean():.1f}" if found.size else "-" for found in hits)])
    header = [f"{NUM_FRAMES} beats", f"{LONG_BEATS} beats", f"{LONG_BEATS} beats, {LONG_BEATS} frames"]
    return markdown_table(["right answers in %", *header], lines)


def all_tables(study: Study) -> dict[str, str]:
    """Every table by name."""
    rows = ("unpruned", "stts 50", "cosine 50", "random 50")
    columns = {world: {shown(row): (row, f"{world}, short") for row in rows} for world in ("handheld", "screen")}
    columns["handheld"]["half of the frames, trained on these"] = ("half of the frames", f"handheld, {HALF_FRAMES}")
    return {
        "short": accuracy_table(study, MAIN, SHORT),
        "long": accuracy_table(study, MAIN, LONG),
        "training": accuracy_table(study, TRAINING, SHORT[:2], against="stts 50"),
        "untrained": accuracy_table(study, UNTRAINED, SHORT, against="cosine, no training"),
        "presets": accuracy_table(study, PRESETS, SHORT[:2], against="stts 50"),
        "differences": difference_table(study),
        "kinds": kind_table(study, columns["handheld"], "handheld, short"),
        "screen_kinds": kind_table(study, columns["screen"], "screen, short"),
        **{f"ratios_{world}": ratio_table(study, world) for world in CURVES},
        "equal_tokens": equal_tokens_table(study),
        "kept": kept_table(study, "handheld"),
        "kept_still": kept_table(study, "still"),
        "seeds": seed_table(study),
    }
