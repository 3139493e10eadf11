"""Tables of the quality study, beside the paper's numbers. Intervals are 95 % bootstrap over clips and seeds."""

import numpy as np

from ..common import markdown_table

RESAMPLES = 2000
# Of the paper, in percent: short, long, average.
PAPER = {
    "unpruned": (67.0, 59.0, 63.0),
    "stts 30": (66.7, 58.9, 62.8),
    "stts 40": (66.0, 58.2, 62.1),
    "stts 50": (66.1, 58.4, 62.3),
    "cosine 50": (66.0, 57.9, 62.0),
    "random 50": (65.3, 57.5, 61.4),
    "stts 50 without aux": (64.4, 55.5, 60.0),
    "tome 50": (65.6, 56.6, 61.1),
    "stts 60": (65.3, 57.9, 61.6),
    "random 60": (63.9, 56.3, 60.1),
    "stts 70": (65.0, 56.4, 60.7),
    "random 70": (63.2, 55.0, 59.1),
    "stts 80": (63.7, 55.8, 59.8),
    "random 80": (61.3, 53.6, 57.5),
    "stts 90": (60.2, 52.1, 56.2),
    "random 90": (58.5, 51.0, 54.8),
    "text only": (46.6, 42.5, 44.6),
    "cosine untrained": (63.1, 55.1, 59.1),
    "tome untrained": (62.4, 55.9, 59.2),
}
SHOWN = {"unpruned": "no pruning", "stts 50": "STTS 50 %"}
PAPER_HEADER = "the paper's: short / long / average"
PAPER_LONG = {"stts 30 scaled": 60.1, "stts 40 scaled": 59.0, "stts 50 scaled": 59.4}


def matrix_of(hits: dict[str, str]) -> np.ndarray:
    """Right answers (kinds, clips) of one evaluation."""
    return np.array([[int(hit) for hit in right] for right in hits.values()])


def resampled_mean(shares: np.ndarray, clips: np.ndarray, rng: np.random.Generator) -> float:
    """Mean of the shares of right answers (seeds, clips) over the chosen clips and seeds drawn anew."""
    seeds = rng.integers(len(shares), size=len(shares))
    return shares.take(seeds, axis=0).take(clips, axis=1).mean()


class Study:
    """The runs of the study, and accuracies with intervals over them."""

    def __init__(self, results: dict):
        self.results = results

    def hits(self, row: str, evaluation: str) -> np.ndarray:
        """Right answers (seeds, kinds, clips); no seeds when the row was not run."""
        runs = [run["hits"][evaluation] for run in self.results["runs"] if run["row"] == row]
        return np.stack([matrix_of(hits) for hits in runs]) if runs else np.empty((0, 0, 0))

    def mean(self, row: str, *evaluations: str) -> float:
        """Right answers in percent."""
        return 100 * float(np.mean([self.hits(row, evaluation).mean() for evaluation in evaluations]))

    def seeds(self, row: str) -> list[int]:
        return [run["seed"] for run in self.results["runs"] if run["row"] == row]

    def interval(self, hits: np.ndarray, minus: np.ndarray | None = None) -> tuple[float, float, float]:
        """Mean and 95 % bootstrap interval in percent, of the difference to `minus` on the same clips when given."""
        rng, clips, draws = np.random.default_rng(0), hits.shape[-1], []
        shares, minus_shares = hits.mean(1), None if minus is None else minus.mean(1)
        for _ in range(RESAMPLES):
            chosen = rng.integers(clips, size=clips)
            draws.append(resampled_mean(shares, chosen, rng))
            if minus is not None:
                draws[-1] -= resampled_mean(minus_shares, chosen, rng)
        mean = hits.mean() - (0 if minus is None else minus.mean())
        return tuple(100 * value for value in (mean, *np.quantile(draws, (0.025, 0.975))))

    def cells(self, row: str, short: str = "short", long: str = "long") -> list[str]:
        """Short, long and average of a row, as table cells; dashes when it was not run."""
        parts = [self.hits(row, short), self.hits(row, long)]
        if not parts[0].size:
            return ["-"] * 3
        return [text_of(self.interval(hits)) for hits in (*parts, np.concatenate(parts, axis=1))]

    def gap(self, row: str, other: str) -> str:
        """Average of a row less that of another, on the same clips."""
        first, second = (
            np.concatenate([self.hits(name, "short"), self.hits(name, "long")], axis=1) for name in (row, other)
        )
        return text_of(self.interval(first, minus=second), "{:+.1f}") if first.size and second.size else "-"


def text_of(interval: tuple[float, float, float], number: str = "{:.1f}") -> str:
    mean, low, high = (number.format(value) for value in interval)
    return f"{mean} ({low} to {high})"


def paper_of(row: str) -> str:
    return " / ".join(str(value) for value in PAPER[row]) if row in PAPER else "-"


def accuracy_table(study: Study, rows: dict[str, str], against: str, paper: bool = True) -> str:
    """
    A table of rows `{name shown: row}`, each with its distance to the row `against`, and beside the paper's when that
    has such rows.
    """
    header = ["", "short", "long", "average", f"difference from {SHOWN[against]}", *[PAPER_HEADER] * paper]
    lines = [
        [shown, *study.cells(row), "" if row == against else study.gap(row, against), *[paper_of(row)] * paper]
        for shown, row in rows.items()
    ]
    return markdown_table(header, lines)


def accuracy_summary(study: Study) -> str:
    """Six rows, beside the average in the paper."""
    rows = {"no pruning": "unpruned", **{f"STTS {k} %": f"stts {k}" for k in (30, 40, 50)}}
    rows |= {f"{name} 50 %": f"{name} 50" for name in ("cosine", "random")}
    header = ["right answers in %", "short clips", "long clips", "average", "the paper's average, Molmo2-4B"]
    return markdown_table(header, [[shown, *study.cells(row), str(PAPER[row][2])] for shown, row in rows.items()])


def table_by_kind(study: Study) -> str:
    """Short / long, means over seeds."""
    rows = {"no pruning": "unpruned", "STTS 50 %": "stts 50", "cosine 50 %": "cosine 50", "random 50 %": "random 50"}
    kinds = next(run["hits"]["short"] for run in study.results["runs"] if run["row"] == "stts 50")
    lines = [
        [
            kind,
            *(
                " / ".join(f"{100 * study.hits(row, length)[:, index].mean():.0f}" for length in ("short", "long"))
                for row in rows.values()
            ),
        ]
        for index, kind in enumerate(kinds)
    ]
    return markdown_table(["", *rows], lines)


def table_of_kept(shares: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = [
        [name, str(share["blocks"]), *(f"{100 * shares[method][name]['kept']:.0f}" for method in shares)]
        for name, share in shares["scorer"].items()
    ]
    return markdown_table(["kept of 100", "blocks", *shares], lines)


def all_tables(study: Study, shares: dict) -> dict[str, str]:
    """Every table by name."""
    text_only = study.cells("unpruned", "short, text only", "long, text only")
    untrained = {
        name: study.cells("unpruned", f"short, {name} 50 untrained", f"long, {name} 50 untrained")
        for name in ("cosine", "tome")
    }
    stts = {f"STTS {k} %": f"stts {k}" for k in (30, 40, 50)}
    by_ratio = {
        f"{name} {k} %": f"{row} {k}"
        for k in (50, 60, 70, 80, 90)
        for name, row in (("random", "random"), ("STTS", "stts"))
    }
    presets = {
        "log, pooled (the paper's text, our default)": "stts 50",
        "log, patches": "stts 50 log patches",
        "rescaled log, patches (the authors' code)": "stts 50 rescaled patches",
        "rescaled log, pooled": "stts 50 rescaled pooled",
    }
    scaled = []
    for k in (30, 40, 50):
        row = f"stts {k}"
        hits, more = study.hits(row, "long"), study.hits(row, "long, more frames")
        cells = [text_of(study.interval(hits)), text_of(study.interval(more))] if more.size else ["-", "-"]
        gain = text_of(study.interval(more, minus=hits), "{:+.1f}") if more.size else "-"
        scaled.append([f"STTS {k} %", *cells, gain, f"{PAPER[row][1]} to {PAPER_LONG[f'{row} scaled']}"])
    layers = {f"layer {layer}": f"stts 50 layer {layer}" if layer != 1 else "stts 50" for layer in range(4)}
    return {
        "unpruned": accuracy_table(study, {"no pruning": "unpruned", **stts}, "unpruned"),
        "pruners": accuracy_table(
            study,
            {
                "random": "random 50",
                "cosine": "cosine 50",
                "STTS without auxiliary loss": "stts 50 without aux",
                "STTS": "stts 50",
            },
            "stts 50",
        ),
        "more_frames": markdown_table(
            ["", "8 frames", "12, 14, 16 frames", "gain", "the paper's, 64 to 92, 107, 128 frames"], scaled
        ),
        "merging": markdown_table(
            ["", "short", "long", "average", PAPER_HEADER],
            [
                *(
                    [f"{name}, inference only", *cells, paper_of(f"{name} untrained")]
                    for name, cells in untrained.items()
                ),
                ["tome, trained", *study.cells("tome 50"), paper_of("tome 50")],
                ["STTS", *study.cells("stts 50"), paper_of("stts 50")],
            ],
        ),
        "ratios": accuracy_table(study, by_ratio, "unpruned"),
        "text_only": markdown_table(
            ["", "short", "long", "average", PAPER_HEADER], [["no video", *text_only, paper_of("text only")]]
        ),
        "layers": accuracy_table(study, layers, "stts 50", paper=False),
        "presets": accuracy_table(study, presets, "stts 50", paper=False),
        "kinds": table_by_kind(study),
        "kept": table_of_kept(shares),
    }
