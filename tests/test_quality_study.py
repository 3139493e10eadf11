"""The quality study: its tables follow from its results, and the bundled checkpoint still answers as it did."""

import json
import re

import numpy as np
import pytest

from benchmarks.common import RESULTS, ROOT, TINY
from benchmarks.quality import worlds_study, worlds_tables
from benchmarks.quality.shipped import answers_of_the_shipped
from benchmarks.quality.study import COMPARED, ONCE
from benchmarks.quality.tables import Study

BASELINE = ROOT / "benchmarks" / "quality" / "baseline"


@pytest.fixture(scope="module")
def results():
    return json.loads((RESULTS / "quality_study.json").read_text())


def test_every_row_was_run(results):
    done = {(run["row"], run["seed"]) for run in results["runs"]}
    assert done >= {(row, seed) for row in COMPARED for seed in (0, 1, 2)} | {(row, 0) for row in ONCE}


def test_intervals():
    def run(row, seed, hits):
        return {"row": row, "seed": seed, "hits": {"short": {"a": hits, "b": hits}, "long": {"a": hits, "b": hits}}}

    study = Study({"runs": [run("x", 0, "1100" * 25), run("x", 1, "1100" * 25), run("y", 0, "0100" * 25)]})
    mean, low, high = study.interval(study.hits("x", "short"))
    deviation = 100 * np.sqrt(0.25 / 100)
    assert (
        mean == 50
        and low == pytest.approx(50 - 1.96 * deviation, abs=1.5)
        and high - 50 == pytest.approx(50 - low, abs=2)
    )
    mean, low, high = study.interval(study.hits("x", "short"), minus=study.hits("y", "short"))
    assert mean == 25 and 14 < low < 19 and 31 < high < 36
    assert study.cells("z") == ["-"] * 3 and study.gap("x", "z") == "-"


def test_the_readme_says_what_the_rows_of_the_worlds_say():
    study = Study(json.loads((RESULTS / "quality_worlds.json").read_text()))
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    rule = worlds_tables.difference(study, "stts 50", "cosine 50", "handheld, short")
    mean, low, high = re.findall(r"[+-]([\d.]+)", rule)
    assert f"STTS is {mean} points ({low} to {high}) ahead of cosine" in readme
    half = "handheld, short, 4 frames"
    frames = worlds_tables.difference(study, "stts 50", "half of the frames", "handheld, short", half)
    assert f"and {float(frames.split()[0]):.0f} of half of the frames" in readme


def test_the_card_shows_what_its_row_of_the_study_gave():
    card = (TINY / "README.md").read_text(encoding="utf-8")
    study = Study(json.loads((RESULTS / "quality_worlds.json").read_text()))
    by_world = worlds_tables.checkpoint_table(study, "stts 50", 0)
    assert by_world in card and worlds_tables.all_tables(study)["kinds"] in card
    value = float(re.findall(r"value: (\S+)", card)[0])
    assert f"| handheld | {100 * value:.1f} |" in by_world


@pytest.mark.parametrize("world", ["still", "handheld"])
def test_bundled_checkpoint_answers_as_it_did(world):
    """Written by `python -m benchmarks.quality.shipped`."""
    before = json.loads((RESULTS / "quality_shipped.json").read_text())
    assert answers_of_the_shipped(world) > before["accuracy"][world] - 0.02


def test_rows_are_trained_once_and_added_to_what_is_there(tmp_path, monkeypatch):
    """Two rows, a step each, about one clip of each world."""
    monkeypatch.setattr(worlds_study, "CLIPS", dict.fromkeys(worlds_study.CLIPS, 1))
    output, runs = tmp_path / "out.json", tmp_path / "runs"
    command = [str(BASELINE), "--output", str(output), "--steps", "1", "--batch-size", "2", "--seeds", "1"]
    worlds_study.main([*command, "--runs", str(runs), "--rows", "cosine 50"])
    first = json.loads(output.read_text())
    ((row, seed, hits),) = [(run["row"], run["seed"], run["hits"]) for run in first["runs"]]
    assert (row, seed) == ("cosine 50", 1) and (runs / "cosine_50-1" / "best" / "config.json").exists()
    assert len(hits["handheld, short"]) == len(hits["handheld, short, 80 %"]) == 18 and len(hits["still, short"]) == 15
    assert first["steps"] == 1 and first["baseline"] == json.loads((BASELINE / "training.json").read_text())

    monkeypatch.setattr(worlds_study, "fine_tune", lambda *args: pytest.fail("rows that are there are not trained"))
    elsewhere = ["--runs", str(tmp_path / "elsewhere"), "--rows", "cosine 50", "no pruning, no training"]
    worlds_study.main([*command, *elsewhere])
    second = json.loads(output.read_text())
    assert second["runs"][0] == first["runs"][0] and second["runs"][1]["row"] == "no pruning, no training"
    assert {*second["runs"][1]["hits"]} >= {f"still, short, {n} frames" for n in (2, 3, 4, 5, 6)}
    with pytest.raises(ValueError, match="has rows of other settings"):
        worlds_study.main([*command, *elsewhere, "--rate-scale", "1"])


def test_tables_of_worlds_say_what_the_runs_say():
    def run(row, seed, hits, **more):
        return {
            "row": row,
            "seed": seed,
            "hits": {"handheld, short": {"still shape": hits, "x": hits}, **more},
            "kept": {},
        }

    quarter = {"handheld, short, 4 frames": {"still shape": "1000" * 20, "x": "1000" * 20}}
    at_30 = {"handheld, short, 30 %": {"still shape": "1111" * 20, "x": "0000" * 20}}
    runs = [run("stts 50", seed, "1110" * 25, **at_30) for seed in (1, 0)] + [run("cosine 50", 0, "1100" * 25)]
    study = Study({"runs": [*runs, run("unpruned", 0, "1111" * 25, **quarter)]})
    assert worlds_tables.cell(study, "stts 50", "handheld, short").startswith("75.0 (")
    assert worlds_tables.cell(study, "stts 50", "handheld, long") == "-"
    gap = worlds_tables.difference(study, "stts 50", "cosine 50", "handheld, short")
    mean, low, high = (float(number) for number in re.findall(r"[+-][\d.]+", gap))
    assert mean == 25 and 14 < low < 19 and 31 < high < 36
    short = worlds_tables.accuracy_table(study, worlds_tables.MAIN, ["handheld, short"], against="cosine 50")
    names, seeds = ([line.split(" | ")[column] for line in short.splitlines()[2:]] for column in (0, 1))
    assert names == ["| no pruning", "| STTS 50 %", "| cosine 50 %"] and seeds == ["0", "0, 1", "0"]
    assert "+25.0 (" in short.splitlines()[3]
    rows = worlds_tables.equal_tokens_table(study).splitlines()
    assert "| 25.0 (" in rows[3] and "| +50.0 (" in rows[3] and rows[4].endswith("| - |")
    kinds = worlds_tables.kind_table(
        study, {"x": ("stts 50", "handheld, short"), "y": ("random 50", "handheld, short")}, "handheld, short"
    )
    assert kinds.splitlines()[2:] == ["| still shape | 75 | - |", "| x | 75 | - |"]
    points = {
        kind: [(tokens, hits.mean()) for tokens, hits in worlds_tables.curve(study, "stts 50", "handheld", [kind])]
        for kind in ("still shape", "x")
    }
    assert points == {"still shape": [(36, 0.75), (51, 1.0)], "x": [(36, 0.75), (51, 0.0)]}
    assert [tokens for tokens, _ in worlds_tables.curve(study, "unpruned", "handheld")] == [36, 72]
    by_ratio = worlds_tables.ratio_table(study, "handheld").splitlines()
    assert by_ratio[2].startswith("| 30 %, 51 tokens | 50.0 (") and by_ratio[4].endswith("+50.0 (+40.0 to +61.2) |")
