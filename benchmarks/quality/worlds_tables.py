"""Tables of `worlds_study.py`. Intervals are 95 % bootstrap, paired over clips, with the seeds drawn anew."""

from collections.abc import Sequence

import numpy as np

from ..common import markdown_table
from .scenes import QUESTIONS
from .tables import Study, matrix_of, text_of

SHORT = ("still, short", "handheld, short", "screen, short")
LONG = ("handheld, long", "still, long, 16 frames", "handheld, long, 16 frames")
STTS = ("stts 50 warm", "stts 50")
NEW_THINGS = ("sign, new", "dot, new", "lamp, new", "star, new", "ball, new", "flicker", "background")
SHOWN = {
    "unpruned": "no pruning",
    "stts 50": "STTS 50 %",
    "stts 50 warm": "STTS 50 %, scorer warmed up first",
    "stts 50 falling aux": "STTS 50 %, auxiliary weight falling to 0",
    "stts 50 without aux": "STTS 50 % without auxiliary loss",
    "cosine 50": "cosine 50 %",
    "random 50": "random 50 %",
    "tome 50": "token merging 50 %",
    "warm-up alone": "STTS 50 %, scorer warmed up, nothing else trained",
    "cosine, no training": "cosine 50 %, nothing trained",
    "no pruning, no training": "no pruning, the baseline itself",
}


def shown(row: str) -> str:
    return SHOWN.get(row, row.replace("stts", "STTS") + " %" * row[-1].isdigit())


def rows_of(study: Study) -> list[str]:
    """The rows that were run, in the order of `SHOWN`, then the rest."""
    done = dict.fromkeys(run["row"] for run in study.results["runs"])
    return [row for row in SHOWN if row in done] + sorted(row for row in done if row not in SHOWN)


def hits_in(study: Study, row: str, evaluation: str, kinds: Sequence[str] = tuple(QUESTIONS)) -> np.ndarray:
    """As `Study.hits`, of the questions that every world has, and of the seeds that were asked them; or empty."""
    runs = [run for run in study.results["runs"] if run["row"] == row and evaluation in run["hits"]]
    picked = [
        {kind: run["hits"][evaluation][kind] for kind in kinds if kind in run["hits"][evaluation]} for run in runs
    ]
    return np.stack([matrix_of(hits) for hits in picked]) if runs else np.empty((0, 0, 0))


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


def accuracy_table(study: Study, evaluations: tuple[str, ...]) -> str:
    lines = []
    for row in rows_of(study):
        asked = {run["seed"] for run in study.results["runs"] if run["row"] == row and {*evaluations} & {*run["hits"]}}
        if asked:
            seeds = ", ".join(map(str, sorted(asked)))
            lines.append([shown(row), seeds, *(cell(study, row, name) for name in evaluations)])
    return markdown_table(["right answers in %", "seeds", *evaluations], lines)


def whole(study: Study) -> str:
    """The row without pruning: fine-tuned like the others, or the baseline itself while no such row was run."""
    return "unpruned" if study.seeds("unpruned") else "no pruning, no training"


def difference_table(study: Study) -> str:
    others = ("cosine 50", "random 50", whole(study))
    pairs = [(row, other) for row in (*STTS, "cosine 50") for other in others if row != other]
    lines = [
        [f"{shown(row)} less {shown(other)}", *(difference(study, row, other, name) for name in SHORT)]
        for row, other in pairs
    ]
    lines = [line for line in lines if set(line[1:]) != {"-"}]
    return markdown_table(["difference in points", *SHORT], lines)


def kind_table(study: Study, evaluation: str, columns: dict[str, tuple[str, str]]) -> str:
    """Right answers by kind of question; `columns` are rows and evaluations by their heading."""
    kinds = next(tuple(run["hits"][evaluation]) for run in study.results["runs"] if evaluation in run["hits"])
    hits = {name: hits_in(study, row, asked or evaluation, kinds) for name, (row, asked) in columns.items()}
    lines = [
        [kind, *(f"{100 * found[:, index].mean():.0f}" if found.size else "-" for found in hits.values())]
        for index, kind in enumerate(kinds)
    ]
    return markdown_table(["", *columns], lines)


def equal_tokens_table(study: Study) -> str:
    """Half of the tokens of many frames, beside as many tokens of half of the frames, whole."""
    cases = [
        (f"{world}, {beats} beats, {9 * frames} tokens", f"{world}, {half}", f"{world}, {full}")
        for beats, frames, half, full in ((8, 4, "short", "short, 4 frames"), (16, 8, "long, 16 frames", "long"))
        for world in ("still", "handheld")
    ]
    rows = [row for row in (*STTS, "cosine 50", "random 50") if study.seeds(row)]
    lines = [
        [
            name,
            *(cell(study, row, half) for row in rows),
            cell(study, whole(study), full),
            *(difference(study, row, whole(study), half, full) for row in rows[:1]),
        ]
        for name, half, full in cases
    ]
    less = [f"{shown(row)} less that" for row in rows[:1]]
    return markdown_table(["", *map(shown, rows), "half of the frames, whole", *less], lines)


def kept_table(study: Study, world: str) -> str:
    """Of 100 blocks how many are kept at 50 %, by seed."""
    runs = [
        run for run in study.results["runs"] if run["row"] in ("stts 50", "cosine 50", "warm-up alone", "random 50")
    ]
    runs = sorted((run for run in runs if run["kept"]), key=lambda run: (list(SHOWN).index(run["row"]), run["seed"]))
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
    runs = sorted((run for run in study.results["runs"] if run["row"] == row), key=lambda run: run["seed"])
    return ", ".join(f"{100 * run['kept'][world][name]['kept']:.0f}" for run in runs)


def seed_table(study: Study) -> str:
    """Right answers of each seed."""
    lines = []
    for row in rows_of(study):
        for run in sorted((run for run in study.results["runs"] if run["row"] == row), key=lambda run: run["seed"]):
            alone = Study({"runs": [run]})
            lines.append(
                [
                    f"{shown(row)}, seed {run['seed']}",
                    *(f"{100 * hits_in(alone, row, name).mean():.1f}" for name in SHORT),
                ]
            )
    return markdown_table(["right answers in %", *SHORT], lines)


def all_tables(study: Study) -> dict[str, str]:
    """Every table by name."""
    columns = {shown(row): (row, "") for row in (whole(study), *STTS, "cosine 50", "random 50") if study.seeds(row)}
    frames = {"half of the frames, whole": (whole(study), "handheld, short, 4 frames")}
    return {
        "short": accuracy_table(study, SHORT),
        "long": accuracy_table(study, LONG),
        "differences": difference_table(study),
        "kinds": kind_table(study, "handheld, short", columns | frames),
        "screen_kinds": kind_table(study, "screen, short", columns),
        "equal_tokens": equal_tokens_table(study),
        "kept": kept_table(study, "handheld"),
        "kept_still": kept_table(study, "still"),
        "seeds": seed_table(study),
    }
