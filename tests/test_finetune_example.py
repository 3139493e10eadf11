"""The fine-tuning script on the bundled clips: it trains, saves, resumes, and runs on two processes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    CLIP,
    ROOT,
    load_processor,
    load_script,
    make_tokenized_model,
    save_plain_molmo2,
    write_joint_rows,
)
from safetensors.torch import load_file
from stts_molmo.modeling_stts_molmo import STTSMolmoForConditionalGeneration
from stts_molmo.tools.files import newest_checkpoint
from transformers import Trainer

SCRIPT = ROOT / "examples" / "finetune.py"
DATASET = ROOT / "examples" / "finetune.jsonl"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

# Loads a saved model as someone does who has nothing of ours installed.
CLEAN_LOAD = """
import sys
sys.modules["stts_molmo"] = sys.modules["stts_kernels"] = None
from transformers import AutoModelForImageTextToText, AutoProcessor
for folder in sys.argv[1:]:
    model, report = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    num_frames = processor.video_processor.num_frames
    print(type(model).__name__, model.config.stts_config.prune_ratio, type(processor).__name__, num_frames)
"""

# Two runs on two processes: equal rows, for comparison with one process; then rows of all kinds, of which one process
# has a video, and the other images, or text and no gradients for the vision tower.
ON_TWO_PROCESSES = """
import sys, torch, torch.distributed, finetune
for name in ("equal", "joint"):
    run = ["--dataset", f"{name}.jsonl", "--output_dir", name]
    trainer = finetune.main([*run, *sys.argv[1:], *(["--gradient_checkpointing"] if name == "joint" else [])])
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    both = [torch.empty_like(weights) for _ in range(2)]
    torch.distributed.all_gather(both, weights)
    assert torch.equal(*both) and weights.isfinite().all(), name
torch.distributed.destroy_process_group()
"""


finetune = load_script("finetune")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_tokenized_model().save_pretrained(folder)
    load_processor().save_pretrained(folder)
    return folder


def arguments(checkpoint: Path, output: Path, *more: str, dataset: Path = DATASET, steps: int = 6) -> list[str]:
    settings = {
        "model": checkpoint,
        "dataset": dataset,
        "output_dir": output,
        "max_steps": steps,
        "warmup_steps": 1,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "num_frames": 4,
        "logging_steps": 1,
        "save_steps": 2,
        "scorer_warmup_steps": 2,
    }
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return [*flags, "--use_cpu", "--disable_tqdm", "True", *more]


def logged(trainer_or_state, name: str) -> list[float]:
    return [logs[name] for logs in trainer_or_state.log_history if name in logs]


def write_rows(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def uninterrupted(checkpoint, tmp_path_factory):
    output = tmp_path_factory.mktemp("uninterrupted")
    trainer = finetune.main(
        arguments(checkpoint, output, "--prune_ratio", "0.3", "--eval_split", "train[:2]", "--eval_strategy", "steps")
    )
    return trainer, output


def test_trains_and_evaluates(uninterrupted, checkpoint):
    trainer, output = uninterrupted
    assert len(logged(trainer.state, "loss")) == len(logged(trainer.state, "aux_loss")) == 6
    assert len(logged(trainer.state, "eval_loss")) == len(logged(trainer.state, "eval_aux_loss")) == 6
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {1e-3, 5e-6}
    before, after = load_file(checkpoint / "model.safetensors"), load_file(output / "model.safetensors")
    assert before.keys() == after.keys()
    for part in ("token_scorer.fc1.weight", "patch_embedding.weight", "lm_head.weight"):
        name = next(name for name in before if name.endswith(part))
        assert not torch.equal(before[name], after[name]), name


def test_help(capsys):
    with pytest.raises(SystemExit) as exit:
        finetune.main(["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert "'train[95%:]'" in text and "--per_device_train_batch_size" in text


def test_what_it_saves_loads_without_us(uninterrupted, tmp_path):
    _, output = uninterrupted
    environment = {**ENVIRONMENT, "HF_MODULES_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", CLEAN_LOAD, str(output / "checkpoint-2"), str(output)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["STTSMolmoForConditionalGeneration 0.3 STTSMolmoProcessor 4"] * 2


def test_killed_and_resumed_ends_at_the_same_loss(uninterrupted, checkpoint, tmp_path, monkeypatch):
    flags = arguments(checkpoint, tmp_path, "--prune_ratio", "0.3")
    process = subprocess.Popen([sys.executable, SCRIPT, *flags], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    saved, half = tmp_path / "checkpoint-2", tmp_path / "checkpoint-3"
    while newest_checkpoint(tmp_path) != saved and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "model.safetensors").exists()
    shutil.copytree(saved, half)
    (half / "optimizer.pt").write_bytes((saved / "optimizer.pt").read_bytes()[:1000])

    loaded, load = [], Trainer._load_from_checkpoint

    def note_and_load(self, checkpoint, *args):
        loaded.append(checkpoint)
        load(self, checkpoint, *args)

    monkeypatch.setattr(Trainer, "_load_from_checkpoint", note_and_load)
    resumed = finetune.main([*flags, "--resume_from_checkpoint", "newest"])
    assert loaded == [saved]
    expected, _ = uninterrupted
    for name in ("loss", "aux_loss"):
        assert logged(resumed.state, name) == pytest.approx(logged(expected.state, name), rel=1e-5), name


def test_starts_from_a_plain_molmo2_checkpoint_and_warms_its_scorer_up(tmp_path, capsys):
    native = save_plain_molmo2(tmp_path / "molmo2")
    trainer = finetune.main(arguments(tmp_path / "molmo2", tmp_path / "tuned", steps=1))
    assert "Warmed up the scorer for 2 steps: auxiliary loss 0." in capsys.readouterr().out

    tuned = STTSMolmoForConditionalGeneration.from_pretrained(tmp_path / "tuned")
    assert not tuned.has_untrained_scorer()
    assert tuned.config.model_type == "stts_molmo" and len(logged(trainer.state, "aux_loss")) == 1
    first_step_has_rate_zero = {name: p for name, p in tuned.named_parameters() if "token_scorer" not in name}
    for name, parameter in native.named_parameters():
        assert torch.equal(first_step_has_rate_zero[name], parameter), name


def test_two_processes_equal_one(checkpoint, tmp_path):
    question = {"video": CLIP, "question": "Which shape?", "answer": "ring"}
    equal = write_rows(tmp_path / "equal.jsonl", question, {**question, "question": "What is it?"})
    write_joint_rows(tmp_path / "joint.jsonl")
    driver = tmp_path / "driver.py"
    driver.write_text(ON_TWO_PROCESSES)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    flags = ["--model", str(checkpoint), "--max_steps", "2", "--warmup_steps", "1", "--learning_rate", "1e-3"]
    flags += ["--num_frames", "4", "--logging_steps", "1", "--use_cpu", "--disable_tqdm", "True"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port, driver]
    batch = "--per_device_train_batch_size"
    environment = {**ENVIRONMENT, "PYTHONPATH": str(SCRIPT.parent)}
    result = subprocess.run(
        [*torchrun, *flags, batch, "1"], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr

    alone = finetune.main(["--dataset", str(equal), "--output_dir", str(tmp_path / "alone"), *flags, batch, "2"])
    state = json.loads((tmp_path / "equal" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    for name in ("loss", "aux_loss", "grad_norm"):
        assert [logs[name] for logs in state] == pytest.approx(logged(alone.state, name), rel=1e-4), name
    state = json.loads((tmp_path / "joint" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert sum("aux_loss" in logs for logs in state) == 2  # a video in each step


def test_joint_training_has_a_video_in_each_step(checkpoint, tmp_path):
    dataset = write_joint_rows(tmp_path / "joint.jsonl")
    flags = arguments(checkpoint, tmp_path / "out", "--per_device_train_batch_size", "1", dataset=dataset, steps=4)
    with pytest.raises(ValueError, match="2 rows have a video, 2 have images and 1 neither.* Raise gradient_accumul"):
        finetune.main(flags)
    trainer = finetune.main([*flags, "--gradient_accumulation_steps", "2"])
    assert len(logged(trainer.state, "loss")) == len(logged(trainer.state, "aux_loss")) == 4


# ----------------------------------------------------------------------------------------------------------------------
# Datasets
# ----------------------------------------------------------------------------------------------------------------------


def test_rows_of_questions(tmp_path):
    rows = [{"video": "a.mp4", "question": "Which?", "answer": "ring"}, {"question": "Why?", "answer": "so"}]
    rows += [{"video": name, "question": "Where?", "answer": "top"} for name in ("https://host/b.mp4", "/videos/b.mp4")]
    chats = finetune.load_chats(str(write_rows(tmp_path / "rows.jsonl", *rows)), "train")
    user, assistant = chats[0]["messages"]
    assert user["content"] == [{"type": "video", "path": str(tmp_path / "a.mp4")}, {"type": "text", "text": "Which?"}]
    assert assistant == {"role": "assistant", "content": "ring"}
    assert [part["type"] for part in chats[1]["messages"][0]["content"]] == ["text"]
    assert chats[2]["messages"][0]["content"][0]["path"] == "https://host/b.mp4"
    assert chats[3]["messages"][0]["content"][0]["path"] == "/videos/b.mp4"


def test_media_of_rows(tmp_path):
    joint = write_joint_rows(tmp_path / "joint.jsonl")
    assert finetune.media_of_rows(str(joint), "train") == ["video", "image", "image", None, "video"]
    assert finetune.media_of_rows(str(joint), "train[1:4]") == ["image", "image", None]
    rows = [{"video": None, "question": "Why?", "answer": "so"}, {"video": "no.mp4", "question": "?", "answer": "ring"}]
    assert finetune.media_of_rows(str(write_rows(tmp_path / "rows.jsonl", *rows)), "train") == [None, "video"]
    rows = write_rows(tmp_path / "text.jsonl", {"question": "Why?", "answer": "so"})
    assert finetune.media_of_rows(str(rows), "train") == [None]


def test_numbers_are_answers_too(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", {"question": 1, "answer": 3})
    user, assistant = finetune.load_chats(str(rows), "train")[0]["messages"]
    assert user["content"] == [{"type": "text", "text": "1"}] and assistant["content"] == "3"


@pytest.mark.parametrize("name", ["question", "answer"])
def test_row_without_a_question_or_an_answer(tmp_path, name):
    rows = write_rows(tmp_path / "rows.jsonl", {"question": "Which?", "answer": "ring"} | {name: None})
    with pytest.raises(ValueError, match=f"A row has no {name}: .*'{name}': None"):
        finetune.load_chats(str(rows), "train")[0]


def test_other_columns(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", {"clip": "a.mp4", "question": "Which?", "label": "ring"})
    with pytest.raises(ValueError, match=r"columns \['clip', 'label', 'question'\]; expected `question`, `answer`"):
        finetune.load_chats(str(rows), "train")


def test_missing_dataset_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no dataset file .*nofile.jsonl"):
        finetune.load_chats(str(tmp_path / "nofile.jsonl"), "train")


@pytest.mark.parametrize("key", ["path", "video", "url"])
def test_rows_of_chats(tmp_path, key):
    parts = [{"type": "video", key: "a.mp4"}, {"type": "video", key: "https://host/b.mp4"}]
    parts.append({"type": "text", "text": "Which?"})
    answer = {"role": "assistant", "content": [{"type": "text", "text": "ring"}]}
    rows = write_rows(tmp_path / "rows.jsonl", {"messages": [{"role": "user", "content": parts}, answer]})
    (row,) = finetune.load_chats(str(rows), "train")
    paths = [part.get(key) for part in row["messages"][0]["content"]]
    assert paths == [str(tmp_path / "a.mp4"), "https://host/b.mp4", None]
    assert row["messages"][1]["content"][0]["text"] == "ring"


def test_folder_of_videos(tmp_path):
    """What `datasets` calls a video folder: its videos reach the processor undecoded."""
    shutil.copy(CLIP, tmp_path / "quiet.mp4")
    write_rows(tmp_path / "metadata.jsonl", {"file_name": "quiet.mp4", "question": "Which?", "answer": "ring"})
    (row,) = finetune.load_chats(str(tmp_path), "train")
    assert row["messages"][0]["content"][0]["path"] == str(tmp_path / "quiet.mp4")
    assert finetune.media_of_rows(str(tmp_path), "train") == ["video"]
