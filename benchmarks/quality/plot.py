"""The curves of the quality study."""

from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from .tables import Study
from .worlds_tables import curve, kinds_asked, shown

CURVES = {  # row, colour and line of each
    "stts 50": ("tab:purple", "-"),
    "cosine 50": ("tab:orange", "-"),
    "random 50": ("tab:gray", "-"),
    "tome 50": ("tab:green", "-"),
    "unpruned": ("black", "--"),
}


def draw_ratios(study: Study, path: Path) -> None:
    """Accuracy from 50 to 90 %, STTS and random, over the text-only floor: the right half of the paper's Figure 1."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained", sharey=True)
    for axis, length in zip(axes, ("short", "long"), strict=True):
        for name, color in (("stts", "tab:purple"), ("random", "tab:gray")):
            points = [(k, study.hits(f"{name} {k}", length)) for k in (50, 60, 70, 80, 90)]
            points = [(k, *study.interval(hits)) for k, hits in points]
            ratios, mean, low, high = (np.array(column) for column in zip(*points, strict=True))
            axis.errorbar(ratios, mean, (mean - low, high - mean), label=name, color=color, capsize=3)
        for label, row, evaluation, style in (
            ("no pruning", "unpruned", length, "--"),
            ("no video", "unpruned", f"{length}, text only", ":"),
        ):
            axis.axhline(study.interval(study.hits(row, evaluation))[0], label=label, color="black", linestyle=style)
        axis.set(title=f"{length} clips", xlabel="pruned, %")
    axes[0].set_ylabel("right answers, %")
    axes[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_worlds(study: Study, path: Path, world: str) -> None:
    """Accuracy against vision tokens of a short clip: of all questions, and of each kind."""
    kinds = kinds_asked(study, f"{world}, short")
    figure, axes = plt.subplots(-(-(len(kinds) + 1) // 5), 5, figsize=(12, 9), layout="constrained", sharex=True)
    for axis, kind in zip(axes.flat, ("all questions", *kinds), strict=False):
        asked = kinds if kind == "all questions" else (kind,)
        for row, (color, line) in CURVES.items():
            points = [(tokens, 100 * hits.mean()) for tokens, hits in curve(study, row, world, asked)]
            name = "no pruning, fewer frames" if row == "unpruned" else f"{shown(row)}, at other ratios"
            axis.plot(*zip(*points, strict=True), color=color, linestyle=line, marker=".", label=name)
        axis.set(title=kind, ylim=(0, 104))
        axis.set_xticks([18, 36, 54, 72])
    for axis in axes.flat[len(kinds) + 1 :]:
        axis.set_axis_off()
    handles, names = axes.flat[0].get_legend_handles_labels()
    axes.flat[-1].legend(handles, names, loc="center right", frameon=False)
    figure.supxlabel("vision tokens of 72")
    figure.supylabel("right answers, %")
    figure.savefig(path, dpi=80)
    plt.close(figure)
