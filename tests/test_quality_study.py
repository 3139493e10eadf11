"""The quality study: its tables follow from its results, and the bundled checkpoint still answers as it did."""

import json

import numpy as np
import pytest

from benchmarks.common import RESULTS, TINY
from benchmarks.quality.batches import hits_by_kind
from benchmarks.quality.evaluate import clip_batches, load
from benchmarks.quality.study import COMPARED, NUM_FRAMES, ONCE
from benchmarks.quality.tables import Study, table_by_kind

SHIPPED = ("stts 50", 1)  # row and seed of the bundled checkpoint
CLIPS = 16


@pytest.fixture(scope="module")
def results():
    return json.loads((RESULTS / "quality_study.json").read_text())


def run_of(results, row, seed):
    return next(run["hits"] for run in results["runs"] if (run["row"], run["seed"]) == (row, seed))


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


def test_the_card_shows_the_table_of_the_results(results):
    assert table_by_kind(Study(results)) in (TINY / "README.md").read_text(encoding="utf-8")


def test_bundled_checkpoint_answers_as_in_the_study(results):
    model, processor = load(TINY)
    batches = clip_batches(processor, CLIPS, beats=NUM_FRAMES, num_frames=NUM_FRAMES)
    hits = hits_by_kind(model, batches, processor.tokenizer.eos_token_id)
    accuracy = np.mean([hit for right in hits.values() for hit in right])
    in_study = np.mean([int(hit) for right in run_of(results, *SHIPPED)["short"].values() for hit in right[:CLIPS]])
    assert accuracy > in_study - 0.02
