"""docs/training.md as a new user reads it: its commands, one after the other, on the tiny checkpoint."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, TINY, write_joint_rows
from transformers import Molmo2Config, Molmo2ForConditionalGeneration

PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
# Blocks marked `run`, and those that an extra has to be installed for.
BLOCKS = re.findall(r"```bash run( lora)?\n(.*?)```", PAGE, re.DOTALL)
PROGRAMS = {
    "stts-molmo": [sys.executable, "-m", "stts_molmo"],
    "python": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the page takes for granted: the repository, a plain Molmo2, and rows with images and text among them."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "runs").mkdir()
    (folder / "examples").symlink_to(ROOT / "examples")
    config = json.loads((TINY / "config.json").read_text())
    del config["stts_config"], config["auto_map"], config["model_type"]
    molmo2 = folder / "runs" / "molmo2"
    shutil.copytree(TINY, molmo2, ignore=shutil.ignore_patterns("*.py", "*.safetensors*", "config.json", "README.md"))
    model = Molmo2ForConditionalGeneration.from_pretrained(TINY, config=Molmo2Config.from_dict(config))
    model.save_pretrained(molmo2)

    write_joint_rows(folder / "runs" / "joint.jsonl")
    return folder


@pytest.mark.parametrize(("extra", "block"), BLOCKS, ids=[" ".join(block.split()[:3]) for _, block in BLOCKS])
def test_command(extra, block, folder, monkeypatch):
    if extra:
        pytest.importorskip("peft", reason="the extra `lora` is not installed; make test-extras runs this")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    program, *arguments = shlex.split(block.replace("\\\n", " "))
    process = subprocess.run([*PROGRAMS[program], *arguments], cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]


def test_commands_that_are_not_run_have_flags_that_exist():
    """Those for machines that a test does not have."""
    sources = "".join((ROOT / name).read_text() for name in ("examples/finetune.py", "examples/finetune_fsdp.py"))
    trainer = {"bf16", "gradient_checkpointing", "per_device_train_batch_size", "output_dir"}
    launcher = {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint"}
    for command in re.findall(r"```bash\n(torchrun.*?)```", PAGE, re.DOTALL):
        for flag in re.findall(r"--(\w+)", command):
            assert flag in trainer | launcher or re.search(rf"\b{flag}\b", sources), flag
