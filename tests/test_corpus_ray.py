"""examples/corpus_ray.py: what workers of Ray Data write is what `stts-molmo ask` writes."""

import os
import shutil
import subprocess
import sys
import tempfile

import pytest
from helpers import CLIP, ROOT, TINY
from stts_molmo.tools.cli import app
from stts_molmo.tools.tables import read_rows
from typer.testing import CliRunner

pytest.importorskip("ray.data", reason="the extra `ray` is not installed; make test-extras runs this")
QUESTION = "Which way does the ball move?"
# Ray makes its workers nice, so that on a busy machine they would wait for ever.
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1", "RAY_worker_niceness": "0"}


@pytest.fixture
def scratch():
    """Where Ray keeps its sockets: their paths must be short."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    yield folder
    shutil.rmtree(folder)


def test_two_workers_write_the_same_table(tmp_path, scratch):
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(5):
        shutil.copy(CLIP, folder / f"{number}.mp4")
    (folder / "2.mp4").write_bytes(b"Not a video.")
    options = ["--model", str(TINY), "--max-vision-tokens", "30", "--max-new-tokens", "5"]
    tables = {name: tmp_path / f"{name}.parquet" for name in ("ask", "ray")}

    result = CliRunner().invoke(app, ["ask", str(folder), QUESTION, "-o", str(tables["ask"]), *options])
    assert result.exit_code == 0, result.output
    command = [sys.executable, str(ROOT / "examples" / "corpus_ray.py"), str(folder), QUESTION, *options]
    command += ["-o", str(tables["ray"]), "--workers", "2"]
    environment = os.environ | SETTINGS | {"RAY_TMPDIR": scratch}
    for _ in range(2):  # the second time nothing is left to do, and Ray is not started
        process = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr[-3000:]
        assert "Wrote" in process.stdout
    assert read_rows(tables["ray"]) == read_rows(tables["ask"])
    assert tables["ray"].read_bytes() == tables["ask"].read_bytes()
