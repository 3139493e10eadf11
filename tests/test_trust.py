"""Checkpoints from strangers: they get nothing of this machine, do not keep it busy, and are refused by name."""

import json
import math
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from helpers import CLIP, TINY, config_dict, load_processor, make_native
from safetensors.torch import load_file, save_file
from stts_molmo.tools import prompts
from stts_molmo.tools.answer import answer_question
from stts_molmo.tools.checkpoint import Checkpoint, describe_checkpoint, load_model, read_config
from stts_molmo.tools.conversion import convert_checkpoint
from stts_molmo.tools.files import locate_tensors
from stts_molmo.tools.prompts import render_prompt

from benchmarks.stress.bombs import SIZES, TEMPLATES

INDEX = "model.safetensors.index.json"
CHAT = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Which shape?"}]}]


@pytest.fixture
def source(tmp_path) -> Path:
    """A plain Molmo2."""
    make_native().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """The bundled one."""
    return Path(shutil.copytree(TINY, tmp_path / "checkpoint"))


def convert(folder: Path) -> None:
    convert_checkpoint(folder, folder.parent / "stts", {"prune_layer": 1})


def inspect(folder: Path) -> None:
    describe_checkpoint(str(folder))


def load(folder: Path) -> None:
    load_model(str(folder), torch.device("cpu"), "auto")


def edit(file: Path, section: str | None = None, **changes) -> None:
    values = json.loads(file.read_text())
    (values if section is None else values[section]).update(changes)
    file.write_text(json.dumps(values))


def rewrite(folder: Path, **tensors: torch.Tensor) -> None:
    file = folder / "model.safetensors"
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})


# ----------------------------------------------------------------------------------------------------------------------
# Files that lie elsewhere
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [convert, inspect, load])
@pytest.mark.parametrize(
    "name",
    ["../private/x.safetensors", "{root}/private/x.safetensors", "sub/x.safetensors", "..", "x.bin", "", 3],
)
def test_an_index_names_files_beside_it_alone(source, tmp_path, command, name):
    (tmp_path / "private").mkdir()
    shutil.move(source / "model.safetensors", tmp_path / "private" / "x.safetensors")
    name = name.format(root=tmp_path) if isinstance(name, str) else name
    weight_map = dict.fromkeys(load_file(tmp_path / "private" / "x.safetensors"), name)
    (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(ValueError, match=f"{INDEX} names .* beside it, without a path"):
        command(source)
    assert set(os.listdir(tmp_path)) == {"source", "private"}


@pytest.mark.parametrize("content", ["{}", '{"weight_map": ["model.safetensors"]}', "[" * 100_000], ids=len)
def test_an_index_that_is_none(source, tmp_path, content):
    (source / INDEX).write_text(content)
    for command in (convert, inspect, load):
        with pytest.raises(ValueError, match=INDEX):
            command(source)
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_links_out_of_a_checkpoint_are_not_followed(source, tmp_path, name):
    (tmp_path / "private").write_bytes((source / name).read_bytes() if (source / name).is_file() else b"{}")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to("../private")
    for command in (convert, load):
        with pytest.raises(ValueError, match=f"{name} is a link out of its checkpoint"):
            command(source)
    assert set(os.listdir(tmp_path)) == {"source", "private"}


def test_a_link_to_itself(source, tmp_path):
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").symlink_to("model.safetensors")
    for command in (convert, load):
        with pytest.raises((OSError, ValueError)):
            command(source)
    assert os.listdir(tmp_path) == ["source"]


def test_links_within_the_cache_of_the_hub_are_followed(source, tmp_path):
    blobs, snapshot = tmp_path / "models--team--clips" / "blobs", tmp_path / "models--team--clips" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    shutil.move(source, blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    destination = convert_checkpoint(snapshot, tmp_path / "stts", {"prune_layer": 1})
    assert load_model(str(destination), torch.device("cpu"), "auto")


# ----------------------------------------------------------------------------------------------------------------------
# Weights
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64], ids=str)
def test_weights_that_are_no_floats_are_refused(source, tmp_path, dtype):
    rewrite(source, **{"lm_head.weight": load_file(source / "model.safetensors")["lm_head.weight"].to(dtype)})
    for command in (convert, load):
        with pytest.raises(ValueError, match=r"lm_head.weight in .* holds \S+ numbers, and config.json has no"):
            command(source)
    assert os.listdir(tmp_path) == ["source"]
    edit(source / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    assert "lm_head.weight" in locate_tensors(source)


# ----------------------------------------------------------------------------------------------------------------------
# Configurations
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("section", "name", "value"), SIZES)
def test_sizes_that_no_model_has(source, checkpoint, tmp_path, section, name, value):
    start = time.process_time()
    for folder, commands in ((source, [convert, inspect]), (checkpoint, [inspect, load])):
        edit(folder / "config.json", section, **{name: value})
        for command in commands:
            with pytest.raises(
                ValueError, match=rf"config.json of .* is invalid: {section}.{name}=.* must be from 1 to"
            ):
                command(folder)
    assert time.process_time() - start < 5
    assert set(os.listdir(tmp_path)) == {"source", "checkpoint"}


def test_more_weights_than_there_are(checkpoint):
    """Sizes that some model may have, but this one has not: Transformers would fill them with random numbers."""
    edit(checkpoint / "config.json", "text_config", vocab_size=2**24)
    with pytest.raises(ValueError, match="is incomplete: its config.json calls for 3,22.* weights, and its files hold"):
        load(checkpoint)


def test_frames_that_the_model_does_not_take(checkpoint):
    edit(checkpoint / "processor_config.json", "video_processor", size={"height": 10**6, "width": 10**6})
    with pytest.raises(ValueError, match=r"height and width \[1000000, 1000000\] with patches of 4.* \[36, 36\]"):
        answer_question(Checkpoint(str(checkpoint), device="cpu"), CLIP, "Which shape?")


def test_a_config_nested_too_deeply(source, checkpoint, tmp_path):
    for folder in (source, checkpoint):
        (folder / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
        for command in (convert, inspect, load):
            with pytest.raises(ValueError, match="config.json"):
                command(folder)
    assert set(os.listdir(tmp_path)) == {"source", "checkpoint"}


STRANGE = [None, "x", -1, 10**30, math.inf, [], {}, True]


@pytest.mark.parametrize("value", STRANGE, ids=repr)
def test_any_value_in_a_config_is_read_or_refused(tmp_path, value):
    for values in (json.loads((TINY / "config.json").read_text()), {"model_type": "molmo2", **config_dict()}):
        places = [(None, name) for name in values]
        places += [(part, name) for part, inner in values.items() if isinstance(inner, dict) for name in inner]
        for section, name in places:
            (tmp_path / "config.json").write_text(json.dumps(values))
            edit(tmp_path / "config.json", section, **{name: value})
            try:
                read_config(str(tmp_path))
            except (OSError, ValueError) as error:
                assert 20 < len(str(error)) < 2000, (section, name)


# ----------------------------------------------------------------------------------------------------------------------
# Chat templates
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("template", "reason"), TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_ends(template, reason, monkeypatch):
    monkeypatch.setattr(prompts, "MAX_SECONDS", 1)
    monkeypatch.setattr(prompts, "MAX_MEMORY", 2**28)
    processor = load_processor()
    processor.chat_template = template
    start = time.process_time()
    with pytest.raises(ValueError, match=f"chat template cannot be used: .*({reason}).*; mend or replace"):
        render_prompt(processor, CHAT)
    assert time.process_time() - start < 10


def test_a_good_template_is_rendered_as_it_is():
    processor = load_processor(
        "**{{ messages[0].content[1].text }}** {# ** #}{% if add_generation_prompt %}:{% endif %}"
    )
    assert render_prompt(processor, CHAT) == "**Which shape?** :"
    processor = load_processor()
    assert render_prompt(processor, CHAT) == processor.apply_chat_template(CHAT, add_generation_prompt=True)
