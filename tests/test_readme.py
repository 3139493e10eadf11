"""What README.md says is so: its code runs as it stands; picture, numbers, names and bounds are those of the code."""

import json
import re
import shlex
import shutil
import sys
from importlib.metadata import metadata
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import stts_molmo
import torch
from helpers import CLIP, ROOT, TINY, run_clean
from PIL import Image
from stts_molmo.tools.checkpoint import CODE_FILES
from stts_molmo.tools.cli import app
from stts_molmo.tools.visualization import GAP, LABEL_HEIGHT, TILE
from transformers import Molmo2Config, Molmo2ForConditionalGeneration, pipeline
from typer.testing import CliRunner

MAX_LINES = 240
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
CARD = (TINY / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = TEXT) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The commands of all bash blocks, split into words."""
    lines = "".join(blocks("bash", text)).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def section(title: str) -> str:
    return TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """Where a reader stands: a checkout, and the files that the README calls theirs. Molmo2-4B is a tiny one."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("checkpoints", "examples"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(CLIP, folder / "clip.mp4")
    row = {"video": "clip.mp4", "question": "What happens?", "answer": "It moves."}
    (folder / "questions.jsonl").write_text(11 * (json.dumps(row) + "\n"))
    molmo2 = folder / "allenai" / "Molmo2-4B"
    shutil.copytree(TINY, molmo2, ignore=shutil.ignore_patterns("*.py", "*.safetensors", "config.json"))
    config = json.loads((TINY / "config.json").read_text())
    del config["stts_config"], config["auto_map"], config["model_type"]
    Molmo2ForConditionalGeneration(Molmo2Config.from_dict(config)).save_pretrained(molmo2)
    return folder


@pytest.fixture
def run(checkout, capsys, monkeypatch):
    """Runs a command in the checkout and gives its output; in this process, as libraries take seconds to import."""
    monkeypatch.chdir(checkout)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more wait for each other where a machine has more to do

    def run(command: list[str]) -> str:
        if command[0] == "stts-molmo":
            result = CliRunner().invoke(app, command[1:])
            assert result.exit_code == 0, result.output
            return result.stdout
        _, script, *arguments = command
        spec = spec_from_file_location("readme_script", script)
        module = module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # saved with a run are its arguments, by their module
        spec.loader.exec_module(module)
        module.main(arguments)
        return capsys.readouterr().out

    yield run
    torch.set_num_threads(threads)


# ----------------------------------------------------------------------------------------------------------------------
# Code
# ----------------------------------------------------------------------------------------------------------------------


def test_python_where_nothing_of_ours_is_installed(checkout):
    remote = [block for block in blocks("python") if "stts_molmo import" not in block]
    answer, of_the_pipeline = run_clean("".join([*blocks("python", CARD), *remote]), checkout).splitlines()
    assert answer == "green" and "'green'" in of_the_pipeline


def test_python_with_the_package(run, capsys):
    exec("\n".join(blocks("python")), {})
    output = capsys.readouterr().out
    assert output.startswith("green\n")
    assert isinstance(pipeline("image-text-to-text", model="out").model, stts_molmo.STTSMolmoForConditionalGeneration)
    assert output.count("'aux_loss'") == 3  # as often as it logs
    shutil.move("out", "of_the_trainer")
    assert "parameters, trained" in run(["stts-molmo", "inspect", "of_the_trainer"])
    run(["stts-molmo", "ask", "clip.mp4", "What happens?", "--model", "of_the_trainer"])


def test_command_line(run):
    ask, visualize, inspect = commands(section("Command line"))
    assert json.loads(run(ask))["answer"] == "green"
    run(visualize)
    assert Path("kept.mp4").stat().st_size
    assert "parameters, trained" in run(inspect)


def test_from_molmo2_to_a_trained_stts(run):
    convert, ask, finetune, ask_again = commands(section("From Molmo2 to a trained STTS"))
    assert "not trained" in run(convert)
    assert "method cosine, prune ratio 0.5" in run(ask)
    assert "'eval_loss'" in run(finetune)
    assert "method scorer, prune ratio 0.5" in run(ask_again)


@pytest.mark.parametrize("text", [TEXT, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_other_commands_name_what_there_is(text):
    """What would install, take hours or start the tests in the tests."""
    names = re.findall(r"^([\w-]+)(?=:| \?=)", (ROOT / "Makefile").read_text(), re.MULTILINE)  # targets and variables
    extras = metadata("stts-molmo").get_all("Provides-Extra")
    for name, *arguments in commands(text):
        if name == "make":
            assert {argument.partition("=")[0] for argument in arguments} <= set(names)
        elif name == "pip":
            assert arguments[0] == "install" and set(re.findall(r"\[(.*)\]", arguments[1])) <= set(extras)
        elif name == "python" and arguments[0] == "-m":
            assert find_spec(arguments[1]), arguments
        else:
            assert name in ("stts-molmo", "python"), name


@pytest.fixture(scope="module")
def loaded() -> dict:
    """What the calls in the table of options start from."""
    model = stts_molmo.STTSMolmoForConditionalGeneration.from_pretrained(TINY)
    processor = stts_molmo.STTSMolmoProcessor.from_pretrained(TINY)
    video = {"text": "<|video|> What?", "videos": [CLIP]}
    return {"model": model, "processor": processor, "video": video, "STTSConfig": stts_molmo.STTSConfig}


CELLS = re.findall(r"^\| (`.*?) \|", section("Options"), re.MULTILINE)
CALLS = [call for cell in CELLS for call in cell.strip("`").split("`, `")]


@pytest.mark.parametrize("call", [call for call in CALLS if ".compile(" not in call])  # see test_fake_cuda.py
def test_options(call, loaded):
    inputs = loaded["processor"](**loaded["video"], return_tensors="pt")
    names = loaded | {"inputs": inputs, "pixels": {name: inputs[name] for name in inputs if "video" in name}}
    if "features}" in call:
        names["features"] = loaded["model"].get_video_features(**names["pixels"])
    dots = {"generate": "**inputs, max_new_tokens=1", "get_video_features": "**pixels", "processor": "**video"}
    call = re.sub(r"(\w+)\(\.\.\.", lambda match: f"{match[1]}({dots[match[1]]}", call)
    exec(call.replace('"cuda"', '"cpu"'), names)


# ----------------------------------------------------------------------------------------------------------------------
# What is said
# ----------------------------------------------------------------------------------------------------------------------


def test_it_is_short():
    assert len(TEXT.splitlines()) <= MAX_LINES


def without_labels(path: Path) -> np.ndarray:
    """A picture of `visualize` without the lines of text, which are drawn differently by other releases of Pillow."""
    picture = np.asarray(Image.open(path)).astype(int)
    row_height = LABEL_HEIGHT + TILE + TILE // 2 + 2 * GAP
    return picture[(np.arange(len(picture)) - GAP) % row_height >= LABEL_HEIGHT]


def test_the_picture_is_drawn_by_the_command_below_it(run, checkout):
    (command,) = re.findall(r"Drawn by\n`(.*?)`", TEXT)
    (checkout / "examples" / "kept.png").unlink()
    run(shlex.split(command))
    drawn, shown = (without_labels(folder / "examples" / "kept.png") for folder in (checkout, ROOT))
    assert drawn.shape == shown.shape and abs(drawn - shown).max() <= 2


def test_bounds_are_those_of_setup():
    (bounds,) = re.findall(r"brings torch (\S+), Transformers (\S+) and PyAV (\S+),", TEXT)
    setup = (ROOT / "setup.py").read_text()
    for name, bound in zip(("torch", "vision]", "av"), bounds, strict=True):
        assert f"{name}>={bound}" in setup, name
    (python,) = re.findall(r"Python (\S+) or later", TEXT)
    assert f'python_requires=">={python}"' in setup


def test_numbers_of_the_results_are_measured():
    prose = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->|!\[[^]]*\]", "", section("Results"), flags=re.DOTALL)
    pages = "".join((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("measurements", "study"))
    numbers = re.findall(r"\d+(?:\.\d+)?", prose)
    assert len(numbers) > 10
    missing = [number for number in numbers if not re.search(rf"(?<![\d.]){re.escape(number)}(?!\.?\d)", pages)]
    assert not missing


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_an_index_shows_no_dead_links(name):
    """Links lead out of the repository, and only pictures do not; files are named instead."""
    for mark, target in re.findall(r"(!?)\[[^\]]*\]\(([^)]*)\)", (ROOT / name).read_text(encoding="utf-8")):
        assert target.startswith("https://") or (mark and (ROOT / target).is_file()), target


def test_links_of_the_docs_lead_somewhere():
    for page in (ROOT / "docs").glob("*.md"):
        for target in re.findall(r"\]\(([^)]*)\)", page.read_text(encoding="utf-8")):
            file, _, anchor = target.partition("#")
            linked = page.parent / file if file else page
            assert target.startswith("https://") or linked.exists(), (page.name, target)
            if anchor:
                titles = re.findall(r"^#+ (.*)", linked.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, target


def test_every_file_of_a_hub_repository_is_named():
    assert not [path.name for path in CODE_FILES if f"`{path.name}`" not in section("How it works")]


@pytest.mark.parametrize("text", [TEXT, CONTRIBUTING, CARD], ids=["README", "CONTRIBUTING", "card"])
def test_files_that_are_named_exist(text):
    names = set(re.findall(r"`([\w./-]+\.(?:py|md|cff|jinja|yaml|jsonl|toml|png)|[\w./-]+/)`", text))
    assert names and not [name for name in names - {"questions.jsonl"} if not (ROOT / name).exists()]


def test_what_contributing_says_where_to_find_is_there():
    rows = re.findall(r"^\| (?:where|how|what) .* \| (.*) in `(\S+)` \|$", CONTRIBUTING, re.MULTILINE)
    assert len(rows) == 6
    for names, file in rows:
        for name in re.findall(r"`(?:\w+\.)?(\w+)`", names):
            assert re.search(rf"(def|class) {name}\b", (ROOT / file).read_text()), (name, file)


def test_cited_as_the_readme_cites():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    (bibtex,) = blocks("bibtex")
    (title,) = re.findall(r"title +=.*?\{(.*)\}", bibtex)
    (authors,) = re.findall(r"author += \{(.*?)\}", bibtex, re.DOTALL)
    assert title in citation
    families = [author.split(",")[0] for author in re.sub(r"\s+", " ", authors).split(" and ")]
    cited = citation.split("preferred-citation:")[1].split("references:")[0]
    assert re.findall(r"family-names: (.*)", cited) == families
