"""The curves of the quality study."""

from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from .tables import Study


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
