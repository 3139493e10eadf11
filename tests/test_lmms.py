"""The plugin of lmms-eval, against lmms-eval itself: a local task, one in the shape of LongVideoBench, the 13 names."""

import json
import os
import socket
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval", reason="the extra `eval` is not installed; make test-extras runs this")

import lmms_eval.__main__
import torch
from datasets import Dataset
from helpers import CLIP, ROOT, TINY, write_video
from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from lmms_eval.tasks.mvbench import utils as mvbench
from lmms_eval.utils import load_yaml_config
from PIL import Image
from stts_molmo.tools.checkpoint import Checkpoint
from stts_molmo.tools.cli import app
from stts_molmo.tools.evaluation import evaluate, plan_settings
from stts_molmo.tools.lmms import benchmarks
from stts_molmo.tools.lmms.benchmarks import BENCHMARKS, TASKS, Benchmark, run_benchmarks
from stts_molmo.tools.lmms.model import STTSMolmo, generation_options, read_folder
from typer.testing import CliRunner

processes = torch.multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["lmms_eval.evaluator", "stts_molmo.tools.lmms.benchmarks"])

BUSY = str(Path(CLIP).with_name("busy.mp4"))
QUESTIONS = [
    {"video": CLIP, "question": "Which shape stands still?", "options": [], "answer": "triangle"},
    {"video": CLIP, "question": "What color is the still shape?", "options": ["red", "green"], "answer": "B"},
    {"video": BUSY, "question": "What color is the still shape?", "options": [], "answer": "green"},
    {"video": CLIP, "question": "Where is the still shape?", "options": [], "answer": "left"},
    {"video": BUSY, "question": "Where is the still shape?", "options": ["left", "right"], "answer": "A"},
]
TASK = {
    "task": "clips",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_target": "answer",
    "generation_kwargs": {"max_new_tokens": 16, "temperature": 0, "do_sample": False, "until": ["\n\n"]},
    "metric_list": [{"metric": "right", "aggregation": "mean", "higher_is_better": True}],
}
FUNCTIONS = """
from stts_molmo.tools.evaluation import Row

def row(doc):
    return Row(doc["video"], doc["question"], tuple(doc["options"]), doc["answer"])

def doc_to_visual(doc):
    return [doc["video"]]

def doc_to_text(doc):
    return row(doc).prompt()

def process_results(doc, results):
    return {"right": float(row(doc).is_right(results[0]))}
"""
LOCAL = Benchmark("clips", "right")
ASKED = {"task": "asked", "doc_id": 0, "repeats": 1}


def to_yaml(config: dict) -> str:
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in config.items())


def write_task(folder: Path, questions: list[dict] = QUESTIONS) -> Path:
    """A task of lmms-eval, with its questions, and the folder that has it."""
    folder.mkdir(exist_ok=True)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(question) + "\n" for question in questions))
    names = ("doc_to_visual", "doc_to_text", "process_results")
    functions = "".join(f"{name}: !function clips.{name}\n" for name in names)
    config = to_yaml({**TASK, "dataset_kwargs": {"data_files": {"test": str(rows)}}})
    (folder / "clips.yaml").write_text(config + functions)
    (folder / "clips.py").write_text(FUNCTIONS)
    return folder


def tasks_in(folder: Path) -> TaskManager:
    return TaskManager("WARNING", include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint(str(TINY), "cpu")


@pytest.fixture
def model(checkpoint) -> STTSMolmo:
    return STTSMolmo(checkpoint)


def request(model: STTSMolmo, messages: list[dict], options: dict | None = None, **metadata) -> Instance:
    model.task_dict["asked"] = {"test": [messages]}
    arguments = ("", lambda doc: doc, {"max_new_tokens": 16, **(options or {})}, 0, "asked", "test")
    return Instance("generate_until", arguments=arguments, idx=0, metadata={**ASKED, **metadata})


def user(*content: dict) -> list[dict]:
    return [{"role": "user", "content": list(content)}]


# ----------------------------------------------------------------------------------------------------------------------
# lmms-eval and `stts-molmo eval` agree
# ----------------------------------------------------------------------------------------------------------------------


def test_by_its_name_lmms_eval_gets_the_answers_of_eval(checkpoint, tmp_path):
    folder = write_task(tmp_path / "task")
    settings = plan_settings(checkpoint, num_frames=[6], prune_ratios=[0.7], methods=["cosine"])
    ours = evaluate(checkpoint, folder / "rows.jsonl", settings, tmp_path / "ours.json")
    theirs = simple_evaluate(
        model="stts_molmo",
        model_args=f"pretrained={TINY},prune_ratio=0.7,method=cosine,num_frames=6",
        tasks=["clips"],
        task_manager=tasks_in(folder),
        device="cpu",
        batch_size=1,
    )
    assert theirs["results"]["clips"]["right,none"] == ours["rows"][0]["accuracy"]
    assert [sample["filtered_resps"][0] for sample in theirs["samples"]["clips"]] == [
        answer["settings"][0]["answer"] for answer in ours["answers"]
    ]


def on_two(rank: int, folder: Path, port: int):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    BENCHMARKS["MLVU"] = LOCAL
    checkpoint = Checkpoint(str(TINY), "cpu")
    settings = plan_settings(checkpoint, prune_ratios=[0, 0.5])
    result = run_benchmarks(checkpoint, settings, folder / "two.json", ["MLVU"], tasks=tasks_in(folder / "task"))
    assert torch.distributed.get_world_size() == 2 and (result is None) == (rank == 1)
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_table_of_one_and_of_eval(checkpoint, tmp_path, monkeypatch):
    questions = [*QUESTIONS[:3], {**QUESTIONS[0], "video": "missing.mp4"}]
    folder = write_task(tmp_path / "task", questions)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pair = torch.multiprocessing.start_processes(
        on_two, (tmp_path, port), nprocs=2, join=False, start_method="forkserver"
    )
    monkeypatch.setitem(BENCHMARKS, "MLVU", LOCAL)
    settings = plan_settings(checkpoint, prune_ratios=[0, 0.5])
    one = run_benchmarks(checkpoint, settings, tmp_path / "one.json", ["MLVU"], tasks=tasks_in(folder))
    ours = evaluate(checkpoint, folder / "rows.jsonl", settings, tmp_path / "ours.json")
    for row, (name, scores) in zip(ours["rows"], one["scores"].items(), strict=True):
        assert name.startswith(f"{row['frames']} frames")
        assert scores["MLVU"]["failed"] == row["failed"] == 1  # which lmms-eval counts as wrong
        assert scores["MLVU"]["score"] / 100 * 4 == pytest.approx(row["accuracy"] * 3) and row["accuracy"] > 0
    deadline = time.monotonic() + 240
    while not pair.join(timeout=5):
        assert time.monotonic() < deadline, "hangs on two processes"
    assert json.loads((tmp_path / "two.json").read_text()) == one


def test_a_benchmark_that_is_done_is_not_asked_again(checkpoint, tmp_path, monkeypatch):
    folder = write_task(tmp_path / "task")
    monkeypatch.setitem(BENCHMARKS, "MLVU", LOCAL)
    monkeypatch.setitem(BENCHMARKS, "LVBench", LOCAL)
    settings = plan_settings(checkpoint, prune_ratios=[0.5])
    arguments = {"limit": 2, "tasks": tasks_in(folder)}
    output = tmp_path / "result.json"
    first = run_benchmarks(checkpoint, settings, output, ["MLVU"], **arguments)
    asked = []
    run = benchmarks.run_benchmark
    monkeypatch.setattr(benchmarks, "run_benchmark", lambda *args: asked.append(args[1]) or run(*args))
    both = run_benchmarks(checkpoint, settings, output, ["MLVU", "LVBench"], **arguments)
    assert len(asked) == 1
    assert both["scores"]["8 frames, scorer 50%"]["MLVU"] == first["scores"]["8 frames, scorer 50%"]["MLVU"]
    assert run_benchmarks(checkpoint, settings, output, ["MLVU"], **arguments) == both
    run_benchmarks(checkpoint, settings, output, ["MLVU"], **{**arguments, "limit": 1})
    assert len(asked) == 2


def test_the_command_prints_the_papers_table(tmp_path, monkeypatch):
    folder = write_task(tmp_path / "task")
    monkeypatch.setitem(BENCHMARKS, "NextQA", LOCAL)
    monkeypatch.setattr(benchmarks, "TaskManager", lambda *args, **kwargs: tasks_in(folder))
    arguments = ["benchmark", str(TINY), "-o", str(tmp_path / "r.json"), "--only", "NextQA", "--limit", "2"]
    result = CliRunner().invoke(app, [*arguments, "--prune-ratio", "0.5", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    lines = {line.split("  ")[0].strip(): line.split() for line in map(str.strip, result.stdout.splitlines())}
    assert (
        lines["paper: Baseline"][-16:-3] == "83.9 78.7 72.6 36.5 61.0 69.9 62.8 67.6 61.5 60.9 70.3 42.0 47.6".split()
    )
    assert lines["paper: Baseline"][-3:] == ["83.9", "-", "-"]
    assert lines["8 frames, scorer 50%"][-16] in ("0.0", "50.0", "100.0")
    refused = CliRunner().invoke(app, ["benchmark", str(TINY), "--only", "MLUV", "-o", str(tmp_path / "s.json")])
    assert refused.exit_code == 2 and "no benchmark 'MLUV'" in refused.stderr


# ----------------------------------------------------------------------------------------------------------------------
# What is asked
# ----------------------------------------------------------------------------------------------------------------------


def test_text_pictures_and_a_part_of_a_video(model):
    text = {"type": "text", "text": "What color is the still shape?"}
    video = {"type": "video", "url": CLIP}
    image = {"type": "image", "url": Image.new("RGB", (36, 36), "red")}
    part = {**video, "start_time": 1.0, "end_time": 2.0}
    chats = [user(video, text), user(part, text), user(image, image, text), user(text)]
    answers = [model.generate_until([request(model, chat)])[0] for chat in chats]
    assert answers[0] == "green" and all(isinstance(answer, str) for answer in answers) and not model.failures


def test_a_part_of_a_video_has_its_frames_alone(model):
    assert len(model.read_clip({"type": "video", "video": CLIP}).frames) == 8
    clip = model.read_clip({"type": "video", "video": CLIP, "video_start": 1.0, "video_end": 2.0})
    times = clip.metadata.timestamps
    assert 1.0 <= times[0] and times[-1] <= 2.1 and len(times) < 8


def test_what_cannot_be_read_is_a_failure_and_padding_is_not_asked(model):
    text = {"type": "text", "text": "Which?"}
    missing = request(model, user({"type": "video", "url": "missing.mp4"}, text))
    assert model.generate_until([missing]) == [""]
    assert "asked, question 0" in model.failures[0] and "missing.mp4" in model.failures[0]
    padding = request(model, user({"type": "video", "url": "missing.mp4"}, text), __padding_only__=True)
    assert model.generate_until([padding]) == [""] and len(model.failures) == 1


def test_an_answer_ends_before_until(model, monkeypatch):
    asked = request(model, user({"type": "text", "text": "Which?"}), {"until": ["\n\n", "Q:"]})
    monkeypatch.setattr(type(model.checkpoint.processor), "decode", lambda *args, **kwargs: " B Q: next\n\nC")
    assert model.generate_until([asked]) == ["B"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_new_tokens": 5, "temperature": 0, "top_p": 1.0}, {"max_new_tokens": 5, "do_sample": False}),
        ({"until": ["stop"]}, {"max_new_tokens": 1024, "do_sample": False}),
        ({"temperature": 0.7, "top_p": None}, {"max_new_tokens": 1024, "do_sample": True, "temperature": 0.7}),
    ],
)
def test_generation_options(options, expected):
    given = generation_options(options)
    assert {name: value for name, value in given.items() if value is not None} == {"num_beams": 1, **expected}


def test_mvbenchs_folder_of_pictures_is_a_video_in_the_order_of_its_frames(model, tmp_path, monkeypatch):
    folder = tmp_path / "mvbench_video" / "tvqa" / "video_fps3_hq_segment" / "a_clip"
    folder.mkdir(parents=True)
    for number in (10, 9, 1, 11, 2, 3, 4, 5, 6, 7, 8):
        Image.new("RGB", (36, 36), (20 * number, 0, 0)).save(folder / f"{number}.png")
    (folder / "notes.txt").touch()
    monkeypatch.setattr(mvbench, "base_cache_dir", str(tmp_path))
    (path,) = mvbench.mvbench_doc_to_visual({"video": "a_clip"}, {"sub_task": "episodic_reasoning"})
    clip = model.read_clip({"type": "video", "video": path})
    assert [round(frame[0, 0, 0] / 20) for frame in clip.frames] == [1, 2, 4, 5, 7, 8, 10, 11]
    assert clip.metadata.timestamps == pytest.approx([0, 1 / 3, 1, 4 / 3, 2, 7 / 3, 3, 10 / 3])
    text = {"type": "text", "text": "Which?"}
    assert isinstance(model.generate_until([request(model, user({"type": "video", "url": path}, text))])[0], str)
    for file in Path(path).iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match="no pictures"):
        read_folder(model.checkpoint.processor, Path(path))


def test_what_it_does_not_do(checkpoint, model):
    with pytest.raises(ValueError, match="batch_size=4"):
        STTSMolmo(checkpoint, batch_size="4")
    with pytest.raises(ValueError, match="prune_ratio=2"):
        STTSMolmo(checkpoint, prune_ratio=2)
    with pytest.raises(NotImplementedError, match="generate_until"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="one turn"):
        model.generate_until_multi_round([])
    assert get_model("stts_molmo") is STTSMolmo


# ----------------------------------------------------------------------------------------------------------------------
# LongVideoBench with subtitles
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def longvideobench():
    return load_yaml_config(str(TASKS / "longvideobench_val_v_subtitles.yaml"))


def test_longvideobench_with_subtitles(longvideobench, tmp_path, monkeypatch):
    """On a data set in its shape; the real one could not be downloaded."""
    home = tmp_path / "datasets" / "longvideobench"
    for name in ("videos", "subtitles"):
        (home / name).mkdir(parents=True)
    write_video(home / "videos" / "a.mp4", 60)
    subtitles = [{"timestamp": [10.0, 10.6], "text": "a word"}, {"timestamp": [30.0, None], "text": "too late"}]
    (home / "subtitles" / "a.json").write_text(json.dumps(subtitles))
    options = {f"option{number}": text for number, text in enumerate(["a ring", "a star", "N/A", "N/A", "N/A"])}
    doc = {"id": "a_0", "video_path": "a.mp4", "subtitle_path": "a.json", "duration": 2.0, "question": "Which?"}
    doc |= {**options, "correct_choice": 1, "starting_timestamp_for_subtitles": 9.5, "duration_group": 15}
    Dataset.from_list([doc] * 2).to_parquet(tmp_path / "validation.parquet")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    task = {**longvideobench["dataset_kwargs"], "data_files": {"validation": str(tmp_path / "validation.parquet")}}
    del task["token"]
    (tmp_path / "tasks").mkdir()
    local = {"include": str(TASKS / "longvideobench_val_v_subtitles.yaml"), "task": "local_longvideobench"}
    local |= {"dataset_path": "parquet", "dataset_kwargs": task}
    (tmp_path / "tasks" / "a.yaml").write_text(to_yaml(local))
    chats = []

    def answer(self, chat, clips, images, options):
        chats.append((chat, clips))
        return "B. a star" if len(chats) == 1 else "a shape"

    monkeypatch.setattr(STTSMolmo, "answer", answer)
    results = simple_evaluate(
        model=STTSMolmo(Checkpoint(str(TINY), "cpu")),
        tasks=["local_longvideobench"],
        task_manager=tasks_in(tmp_path / "tasks"),
        batch_size=1,
    )
    assert results["results"]["local_longvideobench"]["lvb_acc,none"] == 0.5
    ((message,), (clip,)), _ = chats
    assert len(clip.frames) == 5
    text = message["content"][-1]["text"].splitlines()
    assert text[1:5] == ["0.5 - 1.1: a word", "Which?", "A. a ring", "B. a star"] and "subtitles" in text[0]


def test_subtitles_of_what_is_shown(longvideobench):
    lines = (
        sys.modules[longvideobench["doc_to_text"].__module__] if False else longvideobench["doc_to_text"].__globals__
    )
    lines = lines["subtitle_lines"]
    clock = {"start": "01:00:01.500", "end": "01:00:03.000", "line": " two\nlines "}
    assert lines([clock], 3600, 10) == ["1.5 - 3.0: two lines"]
    early, late = {"timestamp": [0, 5], "text": "early"}, {"timestamp": [14, None], "text": "late"}
    gone = [{"timestamp": [0, 4], "text": "before"}, {"timestamp": [15, 16], "text": "after"}]
    assert lines([early, late, *gone], 4, 10.5) == ["0.0 - 1.0: early", "10.0 - 10.5: late"]
    assert lines([], 0, 10) == []


# ----------------------------------------------------------------------------------------------------------------------
# The thirteen
# ----------------------------------------------------------------------------------------------------------------------


def test_lmms_eval_has_the_tasks_and_their_metrics():
    tasks = TaskManager("WARNING", include_path=str(TASKS))
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.task in tasks.all_tasks, name
        parts = [benchmark.task]
        if benchmark.task in tasks.all_groups:
            parts = load_yaml_config(tasks.task_index[benchmark.task]["yaml_path"], mode="simple")["task"]
        for part in parts:
            config = load_yaml_config(tasks.task_index[part]["yaml_path"], mode="simple")
            assert benchmark.metric in [metric["metric"] for metric in config["metric_list"]], part
            assert config.get("output_type", "generate_until") == "generate_until", part
    mvbench = load_yaml_config(tasks.task_index["mvbench"]["yaml_path"], mode="simple")["task"]
    assert len(mvbench) == 20


def test_a_score_among_results():
    def read(values: dict, benchmark: Benchmark, **groups):
        named = {name: {f"{benchmark.metric},none": value} for name, value in values.items()}
        return benchmarks.read_score({"results": named, "group_subtasks": groups}, benchmark)

    assert read({"tomato": 0.25}, BENCHMARKS["Tomato"], tomato=[]) == 25
    assert read({"a": 10.0, "b": 20.0}, BENCHMARKS["MVBench"], mvbench=["a", "b"]) == 15
    scores = {"Holistic Reasoning": 0.1, "overall": 0.5}
    assert read({"videoevalpro_mcq": scores}, BENCHMARKS["VideoEvalPro"]) == 50
    assert read({"perceptiontest_test_mc": None}, BENCHMARKS["PerceptionTest"]) is None


def test_averages_are_those_that_the_paper_prints():
    """But for rounding, and for its 50 % row: its seven long columns come to 57.9, and it prints 58.4."""
    printed = {
        "Qwen3-VL-4B": (63.7, 61.8, 62.7),
        "PLM-8B": (68.5, 54.2, 61.3),
        "InternVL3.5-8B": (63.0, 56.9, 60.0),
        "Baseline": (67.0, 59.0, 63.0),
        "+ STTS 30%": (66.7, 58.9, 62.8),
        "+ STTS 40%": (66.0, 58.2, 62.1),
        "+ STTS 50%": (66.1, 57.9, 62.0),
    }
    rows = benchmarks.table({"ours": {name: {"score": 50.0, "failed": 0} for name in BENCHMARKS}})
    for row in rows[:-1]:
        averages = [row[name] for name in ("Short avg.", "Long avg.", "Average")]
        assert averages == pytest.approx(printed[row["model"].removeprefix("paper: ")], abs=0.11)
    assert rows[-1]["Average"] == 50 and len({tuple(row) for row in rows}) == 1


def test_an_average_is_over_what_was_measured():
    scores = {name: {"score": 50.0, "failed": 0} for name in BENCHMARKS}
    *_, paper, ours = benchmarks.table({"ours": {**scores, "PerceptionTest": {"score": None, "failed": 0}}})
    assert ours["PerceptionTest"] is None and ours["Short avg."] == 50
    assert paper["Short avg."] == pytest.approx((83.7 + 72.4 + 35.1 + 58.2 + 69.2) / 5)


# ----------------------------------------------------------------------------------------------------------------------
# docs/evaluation.md
# ----------------------------------------------------------------------------------------------------------------------


def test_the_pages_command_for_lmms_eval(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (block,) = [block for block in page.split("```bash run eval\n")[1:]]
    words = block.split("```")[0].replace("\\\n", " ").split()
    write_task(tmp_path / "my_tasks")
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", words)
    assert words[0] == "lmms-eval"
    lmms_eval.__main__.cli_evaluate()
    assert "|clips|" in capsys.readouterr().out.replace(" ", "")
