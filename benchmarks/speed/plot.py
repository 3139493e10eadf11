"""The plot of a result, from its JSON alone."""

from pathlib import Path

import matplotlib.pyplot as plt

SECTIONS = ("vit forward", "vit training", "prefill", "training")
ROWS = ("k=0", "k=0.3", "k=0.4", "k=0.5", "cosine k=0.5", "ToMe k=0.5", "post-ViT k=0.5")


def plot(result: dict, path: Path):
    """
    Speedups over the native model at each section's last shape, and prefill time against frames and against k, as far
    as they were measured; no picture when none was.
    """
    panels = []
    for draw, sections in (
        (plot_speedups, SECTIONS),
        (plot_growth, ("growth with frames",)),
        (plot_ratio, ("growth with k",)),
    ):
        records = [record for record in result["records"] if record["section"] in sections]
        if records:
            panels.append((draw, records))
    if not panels:
        return
    fig, every_axes = plt.subplots(
        1, len(panels), figsize=(2 + 5 * len(panels), 4.5), squeeze=False, layout="constrained"
    )
    for axes, (draw, records) in zip(every_axes[0], panels, strict=True):
        draw(axes, records)
    fig.suptitle(f"{result['preset']} preset, {result['hardware']}, torch {result['versions']['torch']}")
    fig.savefig(path, dpi=90)
    plt.close(fig)


def plot_speedups(axes, records: list[dict]):
    last_shape = {record["section"]: (record["videos"], record["frames"]) for record in records}
    for number, name in enumerate(ROWS):
        values = {
            record["section"]: record["speedup_over_native"]["median"]
            for record in records
            if record["name"] == name
            and (record["videos"], record["frames"]) == last_shape[record["section"]]
            and record.get("speedup_over_native")
        }
        places = [SECTIONS.index(section) + number / (len(ROWS) + 1) for section in values]
        axes.bar(places, list(values.values()), 1 / (len(ROWS) + 1), label=name)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks([index + 0.35 for index in range(len(SECTIONS))], SECTIONS)
    axes.set_ylabel("speed, native Molmo2 = 1")
    axes.margins(y=0.35)  # room for the legend
    axes.legend(fontsize="small", loc="upper left", ncols=3)


def plot_growth(axes, records: list[dict]):
    for name in ("native", "k=0", "k=0.5"):
        points = [(r["frames"], r["seconds"]["median"]) for r in records if r["name"] == name and "seconds" in r]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    whole = {r["frames"]: r["seconds"]["median"] for r in records if r["name"] == "k=0" and "seconds" in r}
    limits = {r["frames"]: r["limit"] for r in records if r["name"] == "k=0.5" and "limit" in r}
    limit = [(count, seconds / limits[count]) for count, seconds in whole.items() if count in limits]
    axes.plot(*zip(*limit, strict=True), "k--", label="k=0.5 by operation count")
    axes.set(xscale="log", yscale="log", xlabel="frames", ylabel="seconds of a prefill")
    axes.minorticks_off()
    axes.set_xticks(list(whole), list(whole))
    axes.legend(fontsize="small")


def plot_ratio(axes, records: list[dict]):
    points = [(r["prune_ratio"], r["seconds"]["median"], r["limit"]) for r in records if "seconds" in r]
    ratios = [k for k, *_ in points]
    axes.plot(ratios, [seconds for _, seconds, _ in points], marker="o", label="measured")
    axes.plot(ratios, [points[0][1] / limit for *_, limit in points], "k--", label="by operation count")
    axes.set(xlabel="k", ylabel="seconds of a prefill", ylim=(0, None))
    axes.legend(fontsize="small")
