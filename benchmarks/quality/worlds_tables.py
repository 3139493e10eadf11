"""Tables of `worlds_study.py`. Intervals are 95 % bootstrap, paired over clips, with the seeds drawn anew."""

from collections.abc import Sequence

import numpy as np

from ..common import markdown_table
from .scenes import QUESTIONS
from .tables import Study, matrix_of, text_of

SHORT = ("still, short", "handheld, short", "screen, short")
LONG = ("still, long", "handheld, long")
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
    lines = [
        [shown(row), ", ".join(map(str, study.seeds(row))), *(cell(study, row, name) for name in evaluations)]
        for row in rows_of(study)
    ]
    return markdown_table(
        ["right answers in %", "seeds", *evaluations], [line for line in lines if any(c != "-" for c in line[2:])]
    )


def difference_table(study: Study) -> str:
    pairs = [("stts 50", other) for other in ("cosine 50", "random 50", "unpruned")] + [("cosine 50", "unpruned")]
    lines = [
        [f"{shown(row)} less {shown(other)}", *(difference(study, row, other, name) for name in SHORT)]
        for row, other in pairs
    ]
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
    """Pruned clips beside whole frames of as many tokens, in a hand."""
    lines = []
    for share, frames in (("25%", 6), ("50%", 4), ("75%", 2)):
        asked = "handheld, short" if share == "50%" else f"handheld, short, {share} pruned"
        whole = f"handheld, short, {frames} frames"
        lines.append(
            [
                f"8 beats, {9 * frames} tokens: {share.replace('%', ' %')} of 8 frames, or {frames} whole frames",
                *(cell(study, row, asked) for row in ("stts 50", "cosine 50", "random 50")),
                cell(study, "unpruned", whole),
                difference(study, "stts 50", "unpruned", asked, whole),
            ]
        )
    asked = "handheld, long, 16 frames"
    lines.append(
        [
            "16 beats, 72 tokens: 50 % of 16 frames, or 8 whole frames",
            *(cell(study, row, asked) for row in ("stts 50", "cosine 50", "random 50")),
            cell(study, "unpruned", "handheld, long"),
            difference(study, "stts 50", "unpruned", asked, "handheld, long"),
        ]
    )
    return markdown_table(["", "STTS", "cosine", "random", "whole frames", "STTS less whole frames"], lines)


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
    columns = {
        "no pruning": ("unpruned", ""),
        "STTS 50 %": ("stts 50", ""),
        "cosine 50 %": ("cosine 50", ""),
        "random 50 %": ("random 50", ""),
    }
    return {
        "short": accuracy_table(study, SHORT),
        "long": accuracy_table(study, LONG),
        "differences": difference_table(study),
        "kinds": kind_table(
            study, "handheld, short", columns | {"4 whole frames": ("unpruned", "handheld, short, 4 frames")}
        ),
        "screen_kinds": kind_table(study, "screen, short", columns),
        "equal_tokens": equal_tokens_table(study),
        "kept": kept_table(study, "handheld"),
        "kept_still": kept_table(study, "still"),
        "seeds": seed_table(study),
    }
