"""docs/asking.md as a new user reads it: its commands and its code one after the other, and what they print."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from stts_molmo.tools.answer import ratio_of
from stts_molmo.tools.checkpoint import Checkpoint
from stts_molmo.tools.cli import app
from stts_molmo.tools.corpus import COLUMNS
from stts_molmo.tools.tables import read_rows
from typer.testing import CliRunner

PAGE = (ROOT / "docs" / "asking.md").read_text(encoding="utf-8")
# Blocks of commands, those that an extra has to be installed for, and what they print where the page shows it.
BLOCKS = re.findall(r"```bash run( ray)?\n(.*?)```(?:\n\n```text\n(.*?)```)?", PAGE, re.DOTALL)
QUESTIONS = "What color is the still shape?\nWhich way does the ball move?\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkout, and the file of questions that the page calls the reader's."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("checkpoints", "examples"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "questions.txt").write_text(QUESTIONS)
    return folder


@pytest.fixture(autouse=True)
def in_the_checkout(folder, monkeypatch):
    monkeypatch.chdir(folder)


def run(words: list[str]) -> str:
    if words[0] == "python":
        process = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True)
        assert process.returncode == 0, process.stderr[-3000:]
        return process.stdout
    typed = None
    if "<" in words:
        words, typed = words[: words.index("<")], Path(words[-1]).read_text()
    result = CliRunner().invoke(app, words[1:], input=typed)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize(("extra", "block", "shown"), BLOCKS, ids=[block.split("\n")[0] for _, block, _ in BLOCKS])
def test_commands(extra, block, shown):
    if extra:
        pytest.importorskip("ray.data", reason="the extra `ray` is not installed; make test-extras runs this")
    output = "".join(run(shlex.split(line)) for line in block.splitlines())
    assert output and (not shown or output == shown)


def test_tables_of_the_page():
    """Made by the commands before."""
    assert len(read_rows(Path("answers.jsonl"))) == 3 and len(read_rows(Path("answers.parquet"))) == 6
    named = re.findall(r"`(\w+)`", PAGE.split("| column | holds |")[1].split("\n\n")[0])
    assert sorted(named) == sorted(COLUMNS)


def test_code(capsys):
    names = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)), names)
    assert capsys.readouterr().out == "green\nleft\n"
    assert names["inputs"]["video_grids"].tolist() == [[4, 3, 3]]


def test_the_ratio_that_is_printed_keeps_the_same_tokens():
    ask = ["stts-molmo", "ask", "examples/clips/quiet.mp4", "What color is the ball?"]
    output = run([*ask, "--max-vision-tokens", "30"])
    assert f"72 -> 30 (method scorer, at most 30 tokens, prune ratio {ratio_of(72, 30):g})" in output
    assert "72 -> 30 (" in run([*ask, "--prune-ratio", re.findall(r"prune ratio ([\d.]+)", output)[0]])


def test_frames_that_fill_a_budget():
    """The formulas of the page, with the 81 tokens of a frame that Molmo2 has, against the processor's."""
    video_processor = Checkpoint("checkpoints/stts-molmo-tiny").processor.video_processor
    video_processor.size, video_processor.patch_size = {"height": 378, "width": 378}, 14
    assert video_processor.grid == (9, 9) and video_processor.num_frames == 8
    assert video_processor.scaled_cap(num_frames=64, prune_ratio=0.4) == 107
    assert video_processor.scaled_cap(max_vision_tokens=5184, prune_ratio=0.4) == 107
    assert video_processor.scaled_cap(max_vision_tokens=4096) == 102  # ceil(4096 / 81 / 0.5)
