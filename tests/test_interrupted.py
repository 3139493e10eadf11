"""Runs that are killed: nothing half-written is taken for whole, and what they leave behind is named and removed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import make_native
from safetensors.torch import save_file
from stts_molmo.tools.files import newest_checkpoint, scratch_beside, written_whole

# ----------------------------------------------------------------------------------------------------------------------
# Writing
# ----------------------------------------------------------------------------------------------------------------------

SLOW_WRITER = """
import sys, time
from pathlib import Path
from stts_molmo.tools.files import written_whole
with written_whole(sys.argv[1]) as draft:
    draft.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def slow_writer(tmp_path):
    """A process that is in the middle of writing `tmp_path`/result.json, and its scratch folder."""
    command = [sys.executable, "-c", SLOW_WRITER, str(tmp_path / "result.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        (scratch,) = tmp_path.glob(".result.json.*.partial")
        yield process, scratch
        process.kill()


def test_a_killed_writer_s_scratch_folder_goes_with_the_next_run(slow_writer, tmp_path, caplog):
    process, scratch = slow_writer
    target = tmp_path / "result.json"
    target.write_text("old")
    other = tmp_path / ".other.json.abc.partial"
    other.mkdir()
    with written_whole(target) as draft:  # while the other process still writes
        draft.write_text("new")
    assert target.read_text() == "new" and scratch.exists() and not caplog.records
    process.kill()
    process.wait()
    assert (scratch / "result.json").read_text() == "half"
    with scratch_beside(target):
        assert not scratch.exists()
    assert f"{scratch} is gone: a run that was killed had left it behind." in caplog.text
    assert target.read_text() == "new" and sorted(os.listdir(tmp_path)) == [other.name, "result.json"]


def test_a_conversion_that_is_ended_leaves_nothing(tmp_path):
    """In each folder that a file appears in, the process is ended the moment it does."""
    make_native().save_pretrained(tmp_path / "source")
    command = [sys.executable, "-m", "stts_molmo.tools.entry", "convert", tmp_path / "source", tmp_path / "stts"]
    with subprocess.Popen(
        [*command, "--prune-layer", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        while not list(tmp_path.glob(".stts.*.partial/stts/*")) and process.poll() is None:
            time.sleep(0.001)
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert process.returncode not in (0, -signal.SIGTERM) and b"Traceback" not in errors
    assert os.listdir(tmp_path) == ["source"]


# ----------------------------------------------------------------------------------------------------------------------
# Resuming
# ----------------------------------------------------------------------------------------------------------------------


def write_checkpoint(folder: Path) -> Path:
    """What a Trainer saves, in the order in which it does."""
    folder.mkdir(parents=True)
    save_file({"weight": torch.ones(100)}, folder / "model.safetensors")
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.ones(100)}, folder / name)
    (folder / "trainer_state.json").write_text('{"global_step": 2}')
    return folder


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def index_a_shard_that_is_not_there(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"weight": "model-00002.safetensors"}}')


def shard_the_optimizer(folder: Path) -> None:
    (folder / "optimizer_0").mkdir()
    (folder / "optimizer_0" / "__0_0.distcp").write_bytes(b"half")


HALF = {
    "no state": lambda folder: (folder / "trainer_state.json").unlink(),
    "half a state": lambda folder: cut(folder / "trainer_state.json"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "half the weights": lambda folder: cut(folder / "model.safetensors"),
    "half an optimizer": lambda folder: cut(folder / "optimizer.pt"),
    "half a random state": lambda folder: cut(folder / "rng_state.pth"),
    "a shard too few": index_a_shard_that_is_not_there,
    "sharded and not finished": shard_the_optimizer,
    "nothing": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


@pytest.mark.parametrize("breakage", HALF.values(), ids=HALF)
def test_the_newest_checkpoint_that_is_whole(breakage, tmp_path, caplog):
    for step in (2, 9):
        write_checkpoint(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-best").mkdir()
    whole, half = tmp_path / "checkpoint-9", write_checkpoint(tmp_path / "checkpoint-10")
    assert newest_checkpoint(tmp_path) == half and not caplog.records  # 10 is newer than 9
    breakage(half)
    assert newest_checkpoint(tmp_path) == whole
    assert f"{half} is not whole and is passed over" in caplog.text


def test_sharded_weights_may_be_whole(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint-2")
    (checkpoint / "model.safetensors").unlink()
    shard_the_optimizer(checkpoint)
    (checkpoint / "optimizer_0" / ".metadata").write_bytes(b"")
    assert newest_checkpoint(tmp_path) == checkpoint


def test_no_checkpoint_yet(tmp_path):
    assert newest_checkpoint(tmp_path) is None and newest_checkpoint(tmp_path / "absent") is None
