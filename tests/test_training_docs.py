"""docs/training.md as a new user reads it: its commands, one after the other, on the tiny checkpoint."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from subprocess import DEVNULL, PIPE

import pytest
from helpers import ROOT, TINY, write_joint_rows
from transformers import Molmo2Config, Molmo2ForConditionalGeneration

PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
# Blocks marked `run`: the first converts what all others need. Behind it stands the extra that has to be installed.
BLOCKS = re.findall(r"```(bash|python) run(?: (\w+))?\n(.*?)```", PAGE, re.DOTALL)
CONVERT, *COMMANDS = [block for _, extra, block in BLOCKS if not extra]
OF_EXTRAS = [block for block in BLOCKS if block[1]]
PACKAGES = {"lora": "peft", "quantize": "torchao", "trl": "trl"}
PROGRAMS = {
    "stts-molmo": [sys.executable, "-m", "stts_molmo"],
    "python": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run"],
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
    finish(start(CONVERT, folder))
    return folder


def start(command: str, folder: Path) -> subprocess.Popen:
    program, *arguments = shlex.split(command.replace("\\\n", " "))
    if program == "torchrun" and "--nnodes" not in arguments:
        arguments.insert(0, "--standalone")  # a free port
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*PROGRAMS[program], *arguments], cwd=folder, env=environment, stdout=DEVNULL, stderr=PIPE, text=True
    )


def finish(process: subprocess.Popen):
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]


def title(block: str) -> str:
    return " ".join(block.split()[:4])


@pytest.mark.parametrize("block", COMMANDS, ids=title)
def test_command(block, folder):
    finish(start(block, folder))


def test_the_one_command_is_made_of_those_that_are_run():
    (chain,) = re.findall(r"## All of it in one command\n.*?```bash\n(.*?)```", PAGE, re.DOTALL)
    run = [block.replace(" --dry-run", "").split() for block in (CONVERT, *COMMANDS)]
    places = [run.index(command.split()) for command in chain.split("&&")]
    assert places == sorted(places) and len(places) == 4


@pytest.mark.parametrize(("language", "extra", "block"), OF_EXTRAS, ids=[extra for _, extra, _ in OF_EXTRAS])
def test_with_an_extra(language, extra, block, folder):
    pytest.importorskip(PACKAGES[extra], reason=f"the extra `{extra}` is not installed; make test-extras runs this")
    if language == "bash":
        finish(start(block, folder))
    else:
        exec(block, {"path": folder / "runs" / "stts"})


def test_the_command_for_two_machines(folder):
    """As it stands but for names, numbers and what a CPU needs: both machines are this one."""
    (command,) = re.findall(r"^torchrun --nnodes 2 (?:.*\\\n)*.*$", PAGE, re.MULTILINE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    names = {"molmo2-4b-stts": "runs/stts", "my_videos.jsonl": "examples/finetune.jsonl", "/shared/": ""}
    for old, new in {"--nproc_per_node 8": "--nproc_per_node 1", "first-machine:29500": address, **names}.items():
        assert old in command
        command = command.replace(old, new)
    command += " --use_cpu --max_steps 1 --warmup_steps 0 --num_frames 4 --scorer_warmup_steps 1"
    command = command.replace("runs/trained", "runs/machines")
    for machine in [start(command, folder) for _ in range(2)]:
        finish(machine)
    state = json.loads((folder / "runs" / "machines" / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["epoch"] == pytest.approx(1 / 3)  # two batches of eight, of forty-eight rows


def test_commands_that_are_not_run_have_flags_that_exist():
    """Those for machines that a test does not have."""
    sources = "".join((ROOT / name).read_text() for name in ("examples/finetune.py", "examples/finetune_fsdp.py"))
    trainer = {"bf16", "gradient_checkpointing", "per_device_train_batch_size", "output_dir"}
    launcher = {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint"}
    for command in re.findall(r"```bash\n(torchrun.*?)```", PAGE, re.DOTALL):
        for flag in re.findall(r"--(\w+)", command):
            assert flag in trainer | launcher or re.search(rf"\b{flag}\b", sources), flag
