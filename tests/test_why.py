"""What is kept at several ratios, and whether the answer changes: as a command, as a function, in the notebook."""

import json
import os

import numpy as np
import pytest
from helpers import CLIP, ROOT, TINY
from PIL import Image
from stts_molmo.tools.answer import answer_question
from stts_molmo.tools.checkpoint import Checkpoint
from stts_molmo.tools.cli import app
from stts_molmo.tools.visualization import GAP, LABEL_HEIGHT, TILE
from stts_molmo.tools.why import RATIOS, see_why
from typer.testing import CliRunner

QUESTION = "What color is the ball?"
ROW = LABEL_HEIGHT + TILE + TILE // 2 + 2 * GAP


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint(str(TINY), device="cpu")


def row_of(image: Image.Image, number: int) -> np.ndarray:
    """A row of frames and scores, without the label above."""
    return np.asarray(image)[GAP + number * ROW + LABEL_HEIGHT :][: TILE + TILE // 2 + GAP // 2]


def test_answers_are_those_of_each_pruning_alone(checkpoint):
    prunings = [*RATIOS, {"max_vision_tokens": 30, "method": "cosine"}]
    seen = see_why(checkpoint, CLIP, QUESTION, prunings, num_frames=6)
    for answer, pruning in zip(seen.answers, [{"prune_ratio": 0}, *prunings], strict=True):
        alone = answer_question(checkpoint, CLIP, QUESTION, num_frames=6, **pruning)
        assert (answer.answer, answer.vision_tokens) == (alone.answer, alone.vision_tokens)
    assert seen.changed == [answer.answer != seen.answers[0].answer for answer in seen.answers]
    assert len(set(seen.changed)) == 2  # of this question some change
    lines = str(seen).splitlines()
    assert lines[0] == f"none, prune ratio 0, 54 of 54 tokens: {seen.answers[0].answer}"
    assert [line.endswith(" (changed)") for line in lines] == seen.changed


def test_a_row_is_drawn_for_each_answer(checkpoint):
    (image,) = see_why(checkpoint, CLIP, QUESTION, num_frames=3).images
    assert image.height == (1 + len(RATIOS)) * ROW + GAP
    brightness = [row_of(image, number)[:TILE].mean() for number in range(1 + len(RATIOS))]
    assert brightness == sorted(brightness, reverse=True) and len(set(brightness)) > 3  # ever more is dimmed


def test_rows_are_those_of_visualize(checkpoint, tmp_path):
    results = [
        CliRunner().invoke(app, ["visualize", CLIP, "-o", str(tmp_path / name), "--prune-ratio", "0.7", *more])
        for name, more in (("kept.png", []), ("why.png", ["--question", QUESTION]))
    ]
    assert [result.exit_code for result in results] == [0, 0]
    kept, why = (Image.open(tmp_path / name) for name in ("kept.png", "why.png"))
    assert np.array_equal(row_of(kept, 0), row_of(why, 1))
    expected = str(see_why(checkpoint, CLIP, QUESTION, [{"prune_ratio": 0.7}]))
    assert results[1].stdout == f"{expected}\nWrote {tmp_path / 'why.png'}.\n"


def test_several_ratios_and_methods_on_the_command_line(tmp_path):
    options = ["--question", QUESTION, "--compare", "cosine", "--num-frames", "3"]
    result = CliRunner().invoke(app, ["visualize", CLIP, "-o", str(tmp_path / "why.mp4"), *options])
    assert result.exit_code == 0, result.output
    methods = [line.partition(",")[0] for line in result.stdout.splitlines()[:-1]]
    assert methods == ["none"] + len(RATIOS) * ["scorer"] + len(RATIOS) * ["cosine"]
    assert os.listdir(tmp_path) == ["why.mp4"]


def test_an_empty_question(tmp_path):
    result = CliRunner().invoke(app, ["visualize", CLIP, "-o", str(tmp_path / "why.png"), "--question", ""])
    assert result.exit_code == 2 and "The question '' is empty" in result.stderr and not os.listdir(tmp_path)


def test_the_notebook_runs(monkeypatch, capsys):
    """Its cells in order, as a kernel runs them in a checkout; saved without outputs."""
    notebook = json.loads((ROOT / "examples" / "see_why.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    monkeypatch.chdir(ROOT)
    names = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            exec("".join(cell["source"]), names)
    output = capsys.readouterr().out
    assert "none, prune ratio 0, 72 of 72 tokens: " in output and "random, prune ratio 0.75, 18 of 72" in output
    assert output.endswith("What color is the still shape? green\nWhich way does the ball move? left\n")
    assert isinstance(names["seen"].images[0], Image.Image)
