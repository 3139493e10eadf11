"""The command line: answers, figures, JSON, and for every mistake one message, exit code 2 and no traceback."""

import importlib.metadata
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import stts_molmo.tools.checkpoint
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stts_molmo.modeling_stts_molmo import STTSMolmoModel
from stts_molmo.processing_stts_molmo import STTSMolmoVideoProcessor
from stts_molmo.tools import console
from stts_molmo.tools.answer import answer_question
from stts_molmo.tools.checkpoint import Checkpoint, describe_scorer, load_model
from stts_molmo.tools.cli import BUNDLED_CHECKPOINT, app
from transformers import Molmo2Config, Molmo2ForConditionalGeneration
from typer.testing import CliRunner

QUESTION = "What color is the ball?"
NUM_FRAMES = 30  # at 10 a second; at 2 a second up to the last frame, 2.9 s in, that makes 7 samples
NUM_SAMPLES, TOKENS_PER_FRAME = 7, 9


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ask_json(*arguments) -> dict:
    result = run("ask", *arguments, "--json", "--max-new-tokens", 3, "--device", "cpu")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def write_video(path: Path, num_frames: int) -> Path:
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        for index in range(num_frames):
            image = np.zeros((64, 64, 3), np.uint8)
            image[20:40, index : index + 14] = (255, 0, 0)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("clips") / "clip.mp4", NUM_FRAMES)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A copy of the bundled checkpoint, to be damaged."""
    return Path(shutil.copytree(BUNDLED_CHECKPOINT, tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def molmo2(tmp_path_factory) -> Path:
    """The bundled checkpoint's Molmo2."""
    folder = tmp_path_factory.mktemp("models") / "molmo2"
    config = json.loads((BUNDLED_CHECKPOINT / "config.json").read_text())
    del config["stts_config"], config["auto_map"], config["model_type"]
    shutil.copytree(BUNDLED_CHECKPOINT, folder, ignore=shutil.ignore_patterns("*.py", "*.safetensors*", "config.json"))
    model = Molmo2ForConditionalGeneration.from_pretrained(BUNDLED_CHECKPOINT, config=Molmo2Config.from_dict(config))
    model.save_pretrained(folder)
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# ask
# ----------------------------------------------------------------------------------------------------------------------


def test_ask_prints_answer_and_one_line_of_figures(clip):
    result = run("ask", clip, QUESTION, "--device", "cpu")
    assert result.exit_code == 0, result.output
    *answer, figures = result.stdout.splitlines()
    assert answer
    assert figures.startswith(
        f"{NUM_SAMPLES} frames, vision tokens 63 -> 32 (method scorer, prune ratio 0.5), seconds: load "
    )


def test_one_frame_is_no_frames(clip):
    assert "\n1 frame, vision" in run("ask", clip, QUESTION, "--num-frames", 1).stdout


def test_ask_json_is_one_object_in_a_fresh_process(clip):
    command = [sys.executable, "-c", "from stts_molmo.tools.cli import app; app()", "ask", clip, QUESTION, "--json"]
    output = subprocess.run(command, capture_output=True, text=True, check=False, cwd=clip.parent)
    assert output.returncode == 0, output.stderr
    result = json.loads(output.stdout)
    assert list(result) == [
        "answer",
        "frames",
        "method",
        "prune_ratio",
        "max_vision_tokens",
        "vision_tokens",
        "seconds",
    ]
    assert isinstance(result["answer"], str)
    assert (result["frames"], result["method"], result["prune_ratio"]) == (NUM_SAMPLES, "scorer", 0.5)
    assert result["vision_tokens"] == {"before": 63, "after": 32}  # 63 - floor(31.5)
    assert list(result["seconds"]) == ["load", "decode", "preprocess", "encode", "generate"]
    assert all(value > 0 for value in result["seconds"].values())


def test_answers_of_the_bundled_model_come_with_a_warning(clip, checkpoint):
    assert "toy model" in run("ask", clip, QUESTION, "--max-new-tokens", 3).stderr
    assert "toy model" not in run("ask", clip, QUESTION, "--max-new-tokens", 3, "--model", checkpoint).stderr


def test_ask_resizes_frames_on_the_device_of_the_model(clip, monkeypatch):
    devices, preprocess = [], STTSMolmoVideoProcessor.preprocess

    def note_device(self, videos, **kwargs):
        devices.append(kwargs["device"])
        return preprocess(self, videos, **kwargs)

    monkeypatch.setattr(STTSMolmoVideoProcessor, "preprocess", note_device)
    ask_json(clip, QUESTION, "--device", "cpu")
    assert devices == [torch.device("cpu")]


@pytest.mark.parametrize(
    ("options", "num_frames", "ratio", "kept"),
    [
        (["--prune-ratio", 0], 7, 0, 63),
        (["--prune-ratio", 0.8], 7, 0.8, 13),  # floor(50.4) of 63 go
        (["--method", "cosine"], 7, 0.5, 32),
        (["--method", "none"], 7, 0, 63),
        (["--method", "none", "--num-frames", 3, "--test-time-scaling"], 3, 0, 27),  # nothing saved, nothing to spend
        (["--num-frames", 4], 4, 0.5, 18),
        (["--num-frames", 3, "--test-time-scaling"], 6, 0.5, 27),
        (["--num-frames", 4, "--test-time-scaling", "--prune-ratio", 0.2], 5, 0.2, 36),
        (["--num-frames", 1], 1, 0.5, 9),
        (["--dtype", "bfloat16"], 7, 0.5, 32),
        (["--max-vision-tokens", 27], 7, 0.571429, 27),  # 36 of 63
        (["--max-vision-tokens", 64], 7, 0, 63),
        (["--max-vision-tokens", 20, "--test-time-scaling"], 5, 0.555556, 20),  # ceil(20 / 9 / 0.5)
        (["--max-vision-tokens", 27, "--method", "none"], 7, 0, 63),
    ],
    ids=str,
)
def test_options_reach_processor_and_model(clip, options, num_frames, ratio, kept):
    result = ask_json(clip, QUESTION, *options)
    assert (result["frames"], result["prune_ratio"]) == (num_frames, ratio)
    assert result["vision_tokens"] == {"before": num_frames * TOKENS_PER_FRAME, "after": kept}


def test_a_budget_of_the_checkpoint(clip, checkpoint, tmp_path):
    edit_config(checkpoint, stts_config={"max_vision_tokens": 27})
    options = ["--model", checkpoint]
    figures = "63 -> 27 (method scorer, at most 27 tokens, prune ratio 0.571429), seconds"
    assert figures in run("ask", clip, QUESTION, *options).stdout
    assert "prune ratio    to 27 tokens a video" in run("inspect", checkpoint).stdout
    result = ask_json(clip, QUESTION, *options, "--test-time-scaling")
    assert (result["frames"], result["vision_tokens"]["after"]) == (6, 27)  # 27 / 9 / 0.5
    for option, kept in (["--prune-ratio", 0.8], 13), (["--max-vision-tokens", 18], 18):
        assert ask_json(clip, QUESTION, *options, *option)["vision_tokens"]["after"] == kept
    edit_config(checkpoint, stts_config={"max_vision_tokens": None})
    budget, ratio = tmp_path / "budget.png", tmp_path / "ratio.png"
    for picture, option in (budget, ["--max-vision-tokens", 27]), (ratio, ["--prune-ratio", 0.571429]):
        assert run("visualize", clip, "-o", picture, *option).exit_code == 0
    assert budget.read_bytes() == ratio.read_bytes()


def test_a_ratio_and_a_budget_exclude_each_other(clip, tmp_path):
    both = ["--max-vision-tokens", 27, "--prune-ratio", 0.5]
    for command in ["ask", clip, QUESTION], ["visualize", clip, "-o", tmp_path / "kept.png"]:
        assert_readable_error(run(*command, *both), "prune_ratio=0.5 and max_vision_tokens=27 exclude each other")
    assert_readable_error(run("ask", clip, QUESTION, "--max-vision-tokens", 8), "less than the 9 tokens of a frame")


def test_one_frame_video_keeps_everything(tmp_path):
    result = ask_json(write_video(tmp_path / "still.mp4", 1), QUESTION)
    assert (result["frames"], result["vision_tokens"]) == (1, {"before": 9, "after": 9})


def test_method_none_keeps_everything(clip, checkpoint):
    edit_config(checkpoint, stts_config={"method": "none"})
    assert ask_json(clip, QUESTION, "--model", checkpoint)["vision_tokens"] == {"before": 63, "after": 63}


def test_a_checkpoint_is_loaded_once_for_many_questions(clip, monkeypatch):
    loads = []
    monkeypatch.setattr(
        stts_molmo.tools.checkpoint, "load_model", lambda *arguments: loads.append(0) or load_model(*arguments)
    )
    checkpoint = Checkpoint(str(BUNDLED_CHECKPOINT), device="cpu")
    with pytest.raises(FileNotFoundError):
        answer_question(checkpoint, "missing.mp4", QUESTION)
    assert not loads  # what is wrong with a video is said before minutes of loading
    answers = [answer_question(checkpoint, clip, QUESTION, max_new_tokens=2) for _ in range(2)]
    assert len(loads) == 1 and answers[0].answer == answers[1].answer


# ----------------------------------------------------------------------------------------------------------------------
# convert and inspect
# ----------------------------------------------------------------------------------------------------------------------


def test_convert_makes_a_checkpoint_that_answers(clip, molmo2, tmp_path):
    destination = tmp_path / "stts"
    options = ["--prune-ratio", 0.3, "--max-vision-tokens", 90, "--prune-layer", 1, "--preset", "paper"]
    result = run("convert", molmo2, destination, *options)
    assert result.exit_code == 0, result.output
    assert str(destination) in result.stdout
    stts_config = json.loads((destination / "config.json").read_text())["stts_config"]
    assert (stts_config["prune_ratio"], stts_config["prune_layer"], stts_config["aux_target"]) == (0.3, 1, "pooled")
    assert stts_config["max_vision_tokens"] == 90
    result = ask_json(clip, QUESTION, "--model", destination, "--method", "cosine", "--prune-ratio", 0.3)
    assert result["vision_tokens"] == {"before": 63, "after": 45}  # 63 - floor(18.9)


def test_an_untrained_scorer_is_said_to_be_one(clip, molmo2, tmp_path):
    destination = tmp_path / "stts"
    advice = "examples/finetune.py, or use --method cosine"
    result = run("convert", molmo2, destination, "--prune-layer", 1)
    assert "scorer is new and not trained" in result.stdout and advice in result.stdout
    assert f"parameters, not trained. Train it with {advice}" in run("inspect", destination).stdout
    assert "parameters, trained\n" in run("inspect", BUNDLED_CHECKPOINT).stdout
    options = ["--model", destination]
    assert_readable_error(run("ask", clip, QUESTION, *options), "not trained", advice, "--allow-untrained")
    for mended in (["--allow-untrained"], ["--method", "cosine"], ["--prune-ratio", 0]):
        assert ask_json(clip, QUESTION, *options, *mended)["frames"] == NUM_SAMPLES
    result = run("visualize", clip, "-o", tmp_path / "kept.png", *options)
    assert result.exit_code == 0 and "not trained" in result.stderr and advice in result.stderr


def test_of_a_checkpoint_on_the_hub_it_is_not_told_whether_it_is_trained():
    expected = "1,234 parameters; trained or not, that is seen in local files alone"
    assert describe_scorer("somebody/molmo", 1234) == expected


def test_inspect_describes_an_stts_checkpoint():
    result = run("inspect", BUNDLED_CHECKPOINT)
    assert result.exit_code == 0, result.output
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert lines["kind"] == "STTS on Molmo2"
    assert "parameters" in lines["scorer"]
    assert lines["method"].startswith("scorer, after ViT layer")
    assert lines["frames"].split() == ["16", "32", "64", "128", "256"]
    assert lines["vision"].split() == ["tokens", "144", "288", "576", "1152", "2304"]
    assert lines["after"].split() == ["pruning", "72", "144", "288", "576", "1152"]


def test_inspect_describes_a_plain_molmo2(molmo2):
    result = run("inspect", molmo2)
    assert result.exit_code == 0, result.output
    assert "plain Molmo2; for STTS: stts-molmo convert" in result.stdout
    assert "scorer         none" in result.stdout


def test_inspect_of_a_config_without_a_dtype(checkpoint):
    edit_config(checkpoint, dtype=None)
    result = run("inspect", checkpoint)
    assert result.exit_code == 0 and "(" not in result.stdout


def test_inspect_reads_the_biases_of_the_scorer_alone(molmo2, tmp_path, monkeypatch):
    names = []

    class Weights:
        def __init__(self, *args, **kwargs):
            self.file = safe_open(*args, **kwargs)

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

        def get_tensor(self, name):
            names.append(name)
            return self.file.get_tensor(name)

    run("convert", molmo2, tmp_path / "stts", "--prune-layer", 1)
    monkeypatch.setattr(stts_molmo.tools.checkpoint, "safe_open", Weights)
    assert "not trained" in run("inspect", tmp_path / "stts").stdout
    assert len(names) == 7 and all("token_scorer." in name and name.endswith(".bias") for name in names)


# ----------------------------------------------------------------------------------------------------------------------
# visualize
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "other"), [("kept.PNG", "tome"), ("kept.mp4", "none")])
def test_visualize_writes_a_picture_or_a_video(clip, tmp_path, name, other):
    result = run("visualize", clip, "-o", tmp_path / name, "--compare", other, "--num-frames", 3, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).stat().st_size > 1000


def test_visualize_refuses_an_output_that_would_lose_something(clip, tmp_path):
    before = clip.read_bytes()
    assert_readable_error(run("visualize", clip, "-o", clip), "the video itself")
    assert clip.read_bytes() == before
    (tmp_path / "folder.png").mkdir()
    assert_readable_error(run("visualize", clip, "-o", tmp_path / "folder.png"), "directory")
    assert_readable_error(run("visualize", clip, "-o", tmp_path / "no/kept.png"), "There is no directory")
    assert_readable_error(run("visualize", clip, "-o", tmp_path / "kept.gif"), ".png or .mp4")


# ----------------------------------------------------------------------------------------------------------------------
# Help and version
# ----------------------------------------------------------------------------------------------------------------------


def test_version():
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, importlib.metadata.version("stts-molmo") + "\n")


@pytest.mark.parametrize("command", ["ask", "visualize", "convert", "inspect"])
def test_help_shows_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"stts-molmo {command} " in result.stdout.split("Usage:")[1].split("\n", 1)[1]


def test_help_imports_nothing_heavy():
    code = "import sys, stts_molmo.tools.cli; print({'torch', 'transformers', 'av', 'numpy'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout == "set()\n"


# ----------------------------------------------------------------------------------------------------------------------
# Errors
# ----------------------------------------------------------------------------------------------------------------------


def edit_config(checkpoint: Path, **changes) -> None:
    file = checkpoint / "config.json"
    config = json.loads(file.read_text())
    for name, value in changes.items():
        config[name] = config.get(name, {}) | value if isinstance(value, dict) else value
    file.write_text(json.dumps(config))


def rewrite_weights(checkpoint: Path, keep) -> None:
    (file,) = checkpoint.glob("*.safetensors")
    weights = {name: tensor for name, tensor in load_file(file).items() if keep(name)}
    save_file(weights, file, metadata={"format": "pt"})


def assert_readable_error(result, *words) -> None:
    assert result.exit_code == 2
    assert not result.stdout
    assert result.stderr.startswith("Error: ")
    assert "Traceback" not in result.stderr
    for word in words:
        assert str(word) in result.stderr


@pytest.fixture
def bad_videos(tmp_path) -> Path:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("Not a video.\n" * 100)
    (tmp_path / "folder.mp4").mkdir()
    with av.open(tmp_path / "audio.mp4", "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return tmp_path


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("missing.mp4", "no video file"),
        ("empty.mp4", "0 bytes"),
        ("text.mp4", "a video"),
        ("folder.mp4", "directory"),
        ("audio.mp4", "audio only"),
    ],
)
def test_unusable_video(bad_videos, name, word):
    assert_readable_error(run("ask", bad_videos / name, QUESTION), name, word)


def test_error_in_a_fresh_process(tmp_path):
    command = [sys.executable, "-c", "from stts_molmo.tools.cli import app; app()", "ask", "missing.mp4", QUESTION]
    output = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert output.returncode == 2
    assert not output.stdout
    assert output.stderr == "Error: There is no video file 'missing.mp4'; check the path.\n"


@pytest.mark.parametrize("ratio", ["1", "-0.1", "1.5", "nan"])
def test_ratio_out_of_range(clip, ratio):
    assert_readable_error(run("ask", clip, QUESTION, "--prune-ratio", ratio), f"prune_ratio={float(ratio)}", "[0, 1)")


def test_unknown_method(clip):
    assert_readable_error(run("ask", clip, QUESTION, "--method", "magic"), "method='magic'", "'cosine'")


def test_the_method_reaches_the_model(clip, monkeypatch):
    methods, get_video_features = [], STTSMolmoModel.get_video_features

    def note_method(self, *args, **kwargs):
        methods.append(kwargs["method"])
        return get_video_features(self, *args, **kwargs)

    monkeypatch.setattr(STTSMolmoModel, "get_video_features", note_method)
    ask_json(clip, QUESTION, "--method", "tome")
    assert methods == ["tome"]


@pytest.mark.parametrize("option", [["--device", "warp"], ["--device", "cuda:99"]], ids=str)
def test_unusable_device(clip, option, tmp_path):
    assert_readable_error(run("ask", clip, QUESTION, *option), option[1], "cpu")
    assert_readable_error(run("visualize", clip, "-o", tmp_path / "kept.png", *option), option[1], "cpu")


@pytest.mark.parametrize("question", ["", " \n"])
def test_empty_question(clip, question):
    assert_readable_error(run("ask", clip, question), "empty")


@pytest.mark.parametrize("option", [["--dtype", "int3"], ["--num-frames", 0], ["--max-new-tokens", "x"]], ids=str)
def test_option_that_typer_refuses(clip, option):
    result = run("ask", clip, QUESTION, *option)
    assert (result.exit_code, result.stdout) == (2, "")
    assert option[0] in result.stderr


def test_unknown_model(clip):
    assert_readable_error(run("ask", clip, QUESTION, "--model", "nobody/nothing"))
    assert_readable_error(run("inspect", "nobody/nothing"), "no directory here", "Hub")
    assert_readable_error(run("inspect", "./nothing"), "There is no directory ./nothing")
    assert_readable_error(run("convert", "nobody/nothing", "never-written"), "nobody/nothing")
    assert not Path("never-written").exists()


def test_checkpoint_without_scorer(clip, molmo2, checkpoint):
    assert_readable_error(run("ask", clip, QUESTION, "--model", molmo2), "stts-molmo convert")
    rewrite_weights(checkpoint, keep=lambda name: "token_scorer" not in name)
    assert_readable_error(run("ask", clip, QUESTION, "--model", checkpoint), "has no token scorer")


def test_incomplete_or_damaged_checkpoint(clip, checkpoint):
    rewrite_weights(checkpoint, keep=lambda name: name != "lm_head.weight")
    assert_readable_error(run("ask", clip, QUESTION, "--model", checkpoint), "is incomplete", "lm_head.weight")
    (weights,) = checkpoint.glob("*.safetensors")
    os.truncate(weights, 1000)
    assert_readable_error(run("ask", clip, QUESTION, "--model", checkpoint), "damaged")
    weights.unlink()
    assert_readable_error(run("inspect", checkpoint), "safetensors")


def test_checkpoint_of_another_model(clip, checkpoint):
    edit_config(checkpoint, model_type="llava")
    for arguments in (["ask", clip, QUESTION, "--model", checkpoint], ["inspect", checkpoint]):
        assert_readable_error(run(*arguments), "model_type='llava'", "stts_molmo")


def test_invalid_config(checkpoint):
    edit_config(checkpoint, stts_config={"prune_ratio": 2})
    assert_readable_error(run("inspect", checkpoint), "prune_ratio=2")
    edit_config(checkpoint, stts_config={"prune_ratio": 0.5}, image_patch_id="many")
    assert_readable_error(run("inspect", checkpoint), "image_patch_id")
    (checkpoint / "config.json").write_text("[1]")
    for command in (["inspect", checkpoint], ["convert", checkpoint, "never-written"]):
        assert_readable_error(run(*command), "config.json", "JSON object")


def test_convert_refuses_what_it_cannot_do(molmo2, checkpoint, tmp_path):
    assert_readable_error(run("convert", checkpoint, tmp_path / "new"), "STTS checkpoint already")
    assert_readable_error(run("convert", molmo2, checkpoint), "not an empty directory")
    assert_readable_error(run("convert", molmo2, tmp_path / "new", "--prune-layer", 9), "prune_layer=9")
    assert_readable_error(run("convert", molmo2, tmp_path / "new", "--prune-ratio", 1), "prune_ratio=1.0")
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_a_person_at_a_terminal_sees_what_takes_time(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(console, "stderr", Console(file=screen, force_terminal=True))
    with console.spinner("loading libraries"):
        pass
    assert "loading libraries" in screen.getvalue()


def test_truncated_video_is_answered_with_a_warning(tmp_path, caplog):
    generator = np.random.default_rng(0)
    with av.open(tmp_path / "whole.mkv", "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        for _ in range(NUM_FRAMES):
            noise = generator.integers(0, 255, (64, 64, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, "rgb24")))
        container.mux(stream.encode())
    data = (tmp_path / "whole.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(data[: len(data) // 2])
    assert 1 < ask_json(tmp_path / "cut.mkv", QUESTION)["frames"] < NUM_SAMPLES
    assert "truncated" in caplog.text


def test_what_an_extra_installs_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "stts_molmo.tools.serving", raising=False)
    assert_readable_error(run("serve", BUNDLED_CHECKPOINT), "uvicorn is not installed; pip install 'stts-molmo[serve]'")
