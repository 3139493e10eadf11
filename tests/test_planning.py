"""The plan of a training: counted where it can be counted, and what is assumed says so."""

import json
import re
import shutil

import pytest
import torch
from helpers import ROOT, TINY
from stts_molmo.configuration_stts_molmo import STTSMolmoConfig
from stts_molmo.modeling_stts_molmo import STTSMolmoForConditionalGeneration
from stts_molmo.tools.cli import app
from stts_molmo.tools.planning import (
    MACHINES,
    Parameters,
    lora_parameters,
    plan,
    plan_checkpoint,
    read_parameters,
    video_shape,
    weight_bytes,
)
from typer.testing import CliRunner

# Molmo2-4B: SigLIP2 So400m/14 at 378 px, and Qwen3-4B.
MOLMO2_4B = {
    "adapter_config": {"intermediate_size": 9728, "text_hidden_size": 2560},
    "text_config": {"hidden_size": 2560, "intermediate_size": 9728},
}


@pytest.fixture(scope="module")
def molmo2_4b():
    config = STTSMolmoConfig(**MOLMO2_4B)
    with torch.device("meta"):
        model = STTSMolmoForConditionalGeneration(config)
    sizes = {"language": 0, "vision": 0, "scorer": 0}
    for name, parameter in model.named_parameters():
        part = (
            "scorer"
            if "token_scorer" in name
            else "vision"
            if "vision_tower" in name or "proj" in name.split(".")[1]
            else "language"
        )
        sizes[part] += parameter.numel()
    return config, Parameters(**sizes)


def test_parameters_of_a_checkpoint_are_its_own():
    model = STTSMolmoForConditionalGeneration.from_pretrained(TINY)
    parameters = read_parameters(str(TINY))
    assert sum(parameters) == sum(p.numel() for p in model.parameters())
    assert parameters.scorer == sum(p.numel() for p in model.model.vision_tower.token_scorer.parameters())
    assert (
        parameters.language
        == sum(p.numel() for p in model.model.language_model.parameters()) + model.lm_head.weight.numel()
    )


def test_adapters_are_counted_as_peft_makes_them():
    peft = pytest.importorskip("peft", reason="the extra `lora` is not installed; make test-extras runs this")
    from stts_molmo.tools.adapters import add_adapters

    assert peft
    model = add_adapters(STTSMolmoForConditionalGeneration.from_pretrained(TINY), rank=4)
    adapters = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert lora_parameters(model.config, rank=4) == adapters


def test_delimiters_are_those_of_the_papers_settings():
    assert [video_shape(frames).delimiters for frames in (64, 256)] == [603, 2523]


def test_plan_of_molmo2_4b(molmo2_4b):
    config, parameters = molmo2_4b
    assert 4.8e9 < sum(parameters) < 5.0e9 and parameters.vision < 0.6e9
    plans = {name: plan(config, parameters, machine) for name, machine in MACHINES.items()}
    assert weight_bytes(parameters, MACHINES["8xh100"], config) == 2 * sum(parameters)
    for lines in plans.values():
        assert lines["train"].startswith("6250 steps of 64 rows of 9686 tokens (known")
        for name in ("train, time", "evaluate"):
            assert lines[name].endswith("(estimated)")
        assert lines["train, memory"].endswith(": fits")
    hours = {name: float(lines["train, time"].split()[0]) for name, lines in plans.items()}
    assert hours["h100"] == pytest.approx(hours["8xh100"] * 8 * 3 / 4, rel=0.01)  # no gradient of frozen weights
    more = plan(config, parameters, MACHINES["h100"], prune_ratio=0)
    assert "5184 of 5184 tokens kept" in more["a video"] and "2592 of 5184" in plans["h100"]["a video"]


def test_docs_have_this_plan(molmo2_4b):
    """docs/training.md says for Molmo2-4B what the command prints."""
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for name, machine in MACHINES.items():
        block = re.search(rf"--plan {name}\n```\n\n```text\n(.*?)```", text, re.DOTALL)[1]
        lines = plan(*molmo2_4b, machine)
        width = max(map(len, lines))
        assert block == "".join(f"{heading:<{width}}  {line}\n" for heading, line in lines.items()), name


def test_command_line():
    result = CliRunner().invoke(
        app, ["inspect", str(TINY), "--plan", "24gb", "--frames", "32", "--prune-ratio", "0.25"]
    )
    assert result.exit_code == 0, result.output
    assert "32 frames, 216 of 288 tokens kept" in result.output
    assert CliRunner().invoke(app, ["inspect", str(TINY), "--plan", "abacus"]).exit_code == 2
    with pytest.raises(ValueError, match="choose one of 8xh100, h100, 24gb"):
        plan_checkpoint(str(TINY), "abacus")


def test_a_budget_of_the_checkpoint_is_planned_with(tmp_path):
    shutil.copytree(TINY, tmp_path / "budget")
    file = tmp_path / "budget" / "config.json"
    config = json.loads(file.read_text())
    config["stts_config"]["max_vision_tokens"] = 100
    file.write_text(json.dumps(config))
    for frames, kept in (8, 72), (64, 100):
        line = plan_checkpoint(str(tmp_path / "budget"), "h100", frames)["a video"]
        assert line.startswith(f"{frames} frames, {kept} of {9 * frames} tokens kept")
    assert ", 288 of 576" in plan_checkpoint(str(tmp_path / "budget"), "h100", 64, prune_ratio=0.5)["a video"]
