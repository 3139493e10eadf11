"""The wheel: flat modules under their package, the checkpoint as real files, and nothing else."""

import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT

CHECKPOINT = "checkpoints/stts-molmo-tiny"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: an in-place build packs whatever an earlier one left in `build/`."""
    source, output = tmp_path_factory.mktemp("copies") / "source", tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation"]
    command = [*pip, "--wheel-dir", output, source]
    build = subprocess.run(command, capture_output=True, text=True, check=False)
    assert build.returncode == 0, build.stderr
    (wheel,) = output.glob("*.whl")
    return wheel


def test_wheel_holds_modules_and_checkpoint_only(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = [*ROOT.glob("*.py"), *ROOT.glob("tools/**/*.py"), *ROOT.glob("tools/**/*.yaml"), ROOT / "py.typed"]
    modules = {f"stts_molmo/{path.relative_to(ROOT).as_posix()}" for path in files} - {"stts_molmo/setup.py"}
    kernels = {path.relative_to(ROOT).as_posix() for path in (ROOT / "stts_kernels").glob("*.py")}
    checkpoint = {f"stts_molmo/{CHECKPOINT}/{path.name}" for path in (ROOT / CHECKPOINT).iterdir()}
    assert packed == modules | kernels | checkpoint
    assert f"stts_molmo/{CHECKPOINT}/config.json" in packed


def test_checkpoint_is_packed_as_real_files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        for path in (ROOT / CHECKPOINT).iterdir():
            info = archive.getinfo(f"stts_molmo/{CHECKPOINT}/{path.name}")
            assert not stat.S_ISLNK(info.external_attr >> 16), path.name
            assert archive.read(info) == path.read_bytes(), path.name


def test_unpacked_wheel_answers_without_the_repository(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
        entry_points = archive.read(next(name for name in archive.namelist() if name.endswith("entry_points.txt")))
    assert b"stts-molmo = stts_molmo.tools.cli:run" in entry_points
    clip = shutil.copy(min((ROOT / "examples" / "clips").glob("*.mp4")), tmp_path / "clip.mp4")
    code = "import stts_molmo.tools.cli as cli; print(cli.__file__); cli.app()"
    output = subprocess.run(
        [sys.executable, "-c", code, "ask", clip, "What color is the ball?", "--json", "--device", "cpu"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert output.returncode == 0, output.stderr
    module, answer = output.stdout.splitlines()
    assert Path(module) == tmp_path / "stts_molmo" / "tools" / "cli.py"
    assert json.loads(answer)["answer"]


def test_licence_is_packed(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/LICENSE"))
        assert archive.read(name) == (ROOT / "LICENSE").read_bytes()
