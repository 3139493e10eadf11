"""Processes that are killed at any moment: what they write is whole or not there, and the next run goes on."""

import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from stts_molmo.tools.conversion import convert_checkpoint
from stts_molmo.tools.files import written_whole
from stts_molmo.tools.visualization import save_mp4, save_png
from transformers import Molmo2Config, Molmo2ForConditionalGeneration

from ..common import ROOT, TINY
from .fuzz import SEED
from .links import load
from .trial import Case

SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM}


def as_command(action: Callable[[], object]) -> None:
    """In a process of its own, as `stts-molmo` runs: SIGTERM is Ctrl-C, and nobody reads what it says."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    action()


def start(action: Callable[[], object]) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=as_command, args=(action,))
    process.start()
    return process


def kill_after(seconds: float, number: int, action: Callable[[], object]) -> bool:
    """Whether `action` came to an end before that."""
    process = start(action)
    process.join(seconds)
    is_over = process.exitcode is not None
    if not is_over:
        os.kill(process.pid, number)
        process.join()
    return is_over


def seconds_of(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    process = start(action)
    process.join()
    assert process.exitcode == 0, f"ended with {process.exitcode}"
    return time.perf_counter() - begin


# ----------------------------------------------------------------------------------------------------------------------
# convert
# ----------------------------------------------------------------------------------------------------------------------


@cache
def scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


@cache
def molmo2() -> Path:
    """A plain Molmo2 of the tiny checkpoint's weights, until all cases are tried."""
    folder = Path(scratch().name) / "molmo2"
    config = json.loads((TINY / "config.json").read_text())
    del config["stts_config"], config["auto_map"], config["model_type"]
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.py", "*.safetensors*", "config.json", "README.md"))
    model = Molmo2ForConditionalGeneration.from_pretrained(TINY, config=Molmo2Config.from_dict(config))
    model.save_pretrained(folder)
    return folder


@cache
def seconds_to_convert() -> float:
    with tempfile.TemporaryDirectory() as folder:
        return seconds_of(partial(convert_checkpoint, molmo2(), Path(folder) / "stts"))


def kill_conversion(share: float, number: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        destination = Path(folder) / "stts"
        is_over = kill_after(share * seconds_to_convert(), number, partial(convert_checkpoint, molmo2(), destination))
        left = [name for name in os.listdir(folder) if name != "stts"]
        assert number == signal.SIGKILL or not left, f"{left} is left behind"
        if not destination.exists():
            assert not is_over
            convert_checkpoint(molmo2(), destination)
            assert os.listdir(folder) == ["stts"], "what was left behind is not removed"
        load(destination)
        return "scratch left behind, and removed by the next" if left else ""


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


@cache
def finetune():
    spec = importlib.util.spec_from_file_location("finetune", ROOT / "examples" / "finetune.py")
    module = sys.modules["finetune"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(output: Path) -> None:
    settings = {
        "model": TINY,
        "dataset": ROOT / "examples" / "finetune.jsonl",
        "output_dir": output,
        "max_steps": 4,
        "save_steps": 1,
        "num_frames": 2,
        "per_device_train_batch_size": 1,
        "disable_tqdm": True,
        "report_to": "none",
        "logging_steps": 1,
        "resume_from_checkpoint": "newest",
    }
    finetune().main(["--use_cpu", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))])


def losses(output: Path) -> list[float]:
    state = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@cache
def uninterrupted() -> tuple[float, list[float]]:
    """Seconds and losses of a training that nobody kills."""
    finetune()
    with tempfile.TemporaryDirectory() as folder:
        seconds = seconds_of(partial(train, Path(folder)))
        return seconds, losses(Path(folder))


def kill_training(seed: list[int]) -> str:
    """Kill it twice, then let it end."""
    seconds, expected = uninterrupted()
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            kill_after(float(rng.uniform(0.3, 0.9)) * seconds, signal.SIGKILL, partial(train, Path(folder)))
        saved = len(list(Path(folder).glob("checkpoint-*")))
        process = start(partial(train, Path(folder)))
        process.join()
        assert process.exitcode == 0, f"the run after two kills ended with {process.exitcode}"
        np.testing.assert_allclose(losses(Path(folder)), expected, rtol=1e-4)
        load(Path(folder))
    return f"{saved} of 4 checkpoints begun before the last run"


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------


def write_text(text: str, path: Path) -> None:
    with written_whole(path) as draft:
        draft.write_text(text)


def pictures(shade: int) -> list[Image.Image]:
    return [Image.new("RGB", (640, 480), (shade, number, 0)) for number in range(20)]


WRITERS = {
    "json": (partial(write_text, "old"), partial(write_text, "n" * 10**7)),
    "png": (partial(save_png, pictures(1)), partial(save_png, pictures(2))),
    "mp4": (partial(save_mp4, pictures(1)), partial(save_mp4, pictures(200))),
}


@cache
def both(suffix: str) -> tuple[bytes, bytes, float]:
    """The old file, the new one, and the seconds to write it."""
    write_old, write_new = WRITERS[suffix]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"result.{suffix}"
        write_old(path)
        old = path.read_bytes()
        seconds = seconds_of(partial(write_new, path))
        return old, path.read_bytes(), seconds


def kill_writer(suffix: str, share: float) -> str:
    old, new, seconds = both(suffix)
    write_old, write_new = WRITERS[suffix]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"result.{suffix}"
        write_old(path)
        kill_after(share * seconds, signal.SIGKILL, partial(write_new, path))
        found = path.read_bytes()
        assert found in (old, new), f"{len(found)} bytes that are neither the old nor the new file"
        write_new(path)
        assert os.listdir(folder) == [path.name], "what was left behind is not removed"
        return "the new file" if found == new else "the old file"


def cases(number: int) -> Iterator[Case]:
    """
    `number` kills of each writer and as many conversions with either signal, at moments spread over the time that they
    take, and a tenth as many trainings of two kills each.
    """
    torch.set_num_threads(1)
    moments = np.random.default_rng(SEED).uniform(0, 1.1, number)
    for suffix in WRITERS:
        for share in moments:
            yield Case(
                f"killed while a {suffix} file is written", f"at {share:.3f}", partial(kill_writer, suffix, share)
            )
    for name, value in SIGNALS.items():
        for share in moments[: max(1, number // 2)]:
            yield Case(f"convert, {name}", f"at {share:.3f}", partial(kill_conversion, share, value))
    for i in range(number // 10):
        yield Case("training, SIGKILL twice", f"seed [{SEED}, {i}]", partial(kill_training, [SEED, i]))
    scratch().cleanup()
