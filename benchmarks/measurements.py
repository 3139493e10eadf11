"""
Writes docs/measurements.md, docs/study.md, two tables of README.md and every figure from benchmarks/results/.

    python -m benchmarks.measurements

The prose is in measurements.md.jinja beside this file. What README.md gets stands between `<!-- accuracy -->` and
`<!-- /accuracy -->`, and between the same with `speed`.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from stts_molmo.configuration_stts_molmo import STTSMolmoConfig
from stts_molmo.tools.files import written_whole
from stts_molmo.tools.operations import grid_sizes

from .common import ROOT, markdown_table
from .load.tables import all_tables as load_tables
from .quality.plot import draw_ratios, draw_worlds
from .quality.scenes import FIRST_SEED
from .quality.tables import PAPER, Study, accuracy_summary
from .quality.tables import all_tables as quality_tables
from .quality.worlds_study import CURVES
from .quality.worlds_tables import all_tables as worlds_tables
from .quality.worlds_tables import difference, hits_in, kept_by_seed
from .speed.packing import packing_limit
from .speed.plot import plot
from .speed.presets import PAPER_SHAPES, PRESETS
from .speed.tables import all_tables as speed_tables
from .speed.tables import speed_summary

TEMPLATE = Path(__file__).with_name("measurements.md.jinja")
STUDY_TEMPLATE = Path(__file__).with_name("study.md.jinja")
JINJA = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)


def is_speed(result: dict) -> bool:
    return "records" in result


def is_load(result: dict) -> bool:
    return "cells" in result


def source(results: dict[str, dict], name: str, seeds: Sequence[int] | None = None) -> str:
    """The line below a table: its file, and when, where and with what that was made; its one seed, unless told."""
    result = results[name]
    seeds = [result["seed"]] if seeds is None else seeds
    versions = [f"{package} {number}" for package, number in result["versions"].items() if number]
    seed = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    made = "; ".join([result["date"], result["hardware"], ", ".join(versions), seed])
    return f"*[{name}.json](../benchmarks/results/{name}.json): {made}.*"


def token_table() -> str:
    """Tokens of an instance in the paper's settings."""
    per_frame, ratios = grid_sizes(STTSMolmoConfig())[1], (0.0, 0.3, 0.4, 0.5)
    rows = [
        [f"{shape.videos} x {shape.frames} frames", *(str(shape.tokens(per_frame, ratio)) for ratio in ratios)]
        for shape in PAPER_SHAPES
    ]
    return markdown_table(["tokens", *(f"{100 * ratio:.0f} %" for ratio in ratios)], rows)


def page(results: dict[str, dict], study: Study) -> str:
    """docs/measurements.md."""

    def records(name: str, /, **wanted) -> list[dict]:
        """Records of a speed result in which everything `wanted` is so."""
        return [record for record in results[name]["records"] if wanted.items() <= record.items()]

    return JINJA.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        results=results,
        records=records,
        source=lambda *args: source(results, *args),
        speed={name: speed_tables(result["records"]) for name, result in results.items() if is_speed(result)},
        load={name: load_tables(result["cells"]) for name, result in results.items() if is_load(result)},
        study=study,
        quality=quality_tables(study, results["quality_kept"]["shares"]),
        paper=PAPER,
        tokens=token_table(),
        packing_limit=packing_limit(STTSMolmoConfig(**PRESETS["gpu"].config), PRESETS["gpu"].packing, prune_ratio=0.5),
        first_test_clip=FIRST_SEED["test"],
    )


def study_page(results: dict[str, dict]) -> str:
    """docs/study.md."""
    study = Study(results["quality_worlds"])
    return JINJA.from_string(STUDY_TEMPLATE.read_text(encoding="utf-8")).render(
        results=results,
        file=results["quality_worlds"],
        study=study,
        tables=worlds_tables(study),
        difference=lambda *args: difference(study, *args),
        kept=lambda *args: kept_by_seed(study, *args),
        source=source(results, "quality_worlds", sorted({run["seed"] for run in study.results["runs"]})),
        mean=lambda *args: 100 * hits_in(study, *args).mean(),
        loops=results["quality_loops"]["cpu_seconds_a_step"],
        loops_source=source(results, "quality_loops"),
        first_test_clip=FIRST_SEED["test"],
    )


def summaries(results: dict[str, dict], study: Study) -> dict[str, str]:
    """The tables of README.md by the name of their marker."""
    return {
        "accuracy": accuracy_summary(study),
        "speed": speed_summary(results["throughput_cpu"]["records"]),
    }


def fill(text: str, name: str, table: str) -> str:
    """
    `text` with the table between the markers of that name.

    Raises:
        ValueError: there are no such markers, or several.
    """
    opens, closes = f"<!-- {name} -->", f"<!-- /{name} -->"
    filled, count = re.subn(f"{opens}.*?{closes}", lambda _: f"{opens}\n\n{table}\n{closes}", text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(
            f"{count} places between `{opens}` and `{closes}` instead of one; put these where the table goes."
        )
    return filled


def write(root: Path = ROOT):
    """
    Page, figures and README.md below `root`, from the results there.

    Raises:
        ValueError: README.md has no place for a table; all else is written by then.
    """
    folder = root / "benchmarks" / "results"
    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    study = Study(results["quality_study"])
    (root / "docs").mkdir(exist_ok=True)
    for name, text in (("measurements", page(results, study)), ("study", study_page(results))):
        with written_whole(root / "docs" / f"{name}.md") as draft:
            draft.write_text(text, encoding="utf-8")
    for name, result in results.items():
        if is_speed(result):
            plot(result, folder / f"{name}.png")
    draw_ratios(study, folder / "quality_ratios.png")
    for world in CURVES:
        draw_worlds(Study(results["quality_worlds"]), folder / f"quality_worlds_{world}.png", world)
    text = (root / "README.md").read_text(encoding="utf-8")
    for name, table in summaries(results, study).items():
        text = fill(text, name, table)
    with written_whole(root / "README.md") as draft:
        draft.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    try:
        write()
    except ValueError as error:
        raise SystemExit(f"README.md is left as it was: {error}") from error
