"""NaN and infinity: no answer is made of them, and the error says where they come from."""

import math

import pytest
import torch
from helpers import CLIP, TINY
from safetensors.torch import load_file, save_file
from stts_molmo.configuration_stts_molmo import METHODS
from stts_molmo.tools.answer import answer_question
from stts_molmo.tools.checkpoint import Checkpoint
from stts_molmo.tools.cli import app
from stts_molmo.tools.finite import NotFiniteError, RequireFinite
from stts_molmo.tools.video import make_video_inputs
from typer.testing import CliRunner


def ask(checkpoint: Checkpoint, **options) -> str:
    return answer_question(checkpoint, CLIP, "Which shape?", num_frames=4, max_new_tokens=2, **options).answer


@pytest.fixture
def checkpoint() -> Checkpoint:
    return Checkpoint(str(TINY), device="cpu")


def spoil(checkpoint: Checkpoint, name: str, value: float = math.nan) -> None:
    with torch.no_grad():
        checkpoint.model.get_parameter(name).view(-1)[5] = value


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_that_is_not_finite_is_named(checkpoint, method):
    assert ask(checkpoint, method=method)
    spoil(checkpoint, "model.vision_tower.patch_embedding.weight")
    with pytest.raises(ValueError, match=r"no answer: the weight \S+patch_embedding.weight .*1 of 2,304 .* are NaN"):
        ask(checkpoint, method=method)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "name",
    [
        "model.vision_tower.positional_embedding",
        "model.vision_tower.token_scorer.fc3.bias",
        "model.multi_modal_projector.image_projector.down_proj.weight",
        "model.language_model.layers.2.self_attn.q_norm.weight",
        "lm_head.weight",
    ],
)
def test_wherever_the_weight_is(checkpoint, name, value):
    if name.endswith("fc3.bias"):
        with torch.no_grad():
            checkpoint.model.get_parameter(name).fill_(value if math.isnan(value) else -value)
    else:
        spoil(checkpoint, name, value)
    with pytest.raises(ValueError, match=rf"the weight {name} is not finite"):
        ask(checkpoint)


@pytest.mark.parametrize("method", METHODS)
def test_pixels_that_are_not_finite_are_named(checkpoint, method, monkeypatch):
    def spoilt(*arguments):
        inputs = make_video_inputs(*arguments)
        inputs["pixel_values_videos"][0, 7, 7] = math.inf
        return inputs

    monkeypatch.setattr("stts_molmo.tools.answer.make_video_inputs", spoilt)
    with pytest.raises(ValueError, match=r"the input pixel_values_videos is not finite \(1 of 15,552 .* image_mean"):
        ask(checkpoint, method=method)


def test_a_layer_that_overflows_is_named():
    """Weights that float32 bears and float16 does not."""
    for dtype in ("float32", "float16"):
        checkpoint = Checkpoint(str(TINY), device="cpu", dtype=dtype)
        mlp = checkpoint.model.model.language_model.layers[1].mlp
        with torch.no_grad():
            mlp.down_proj.weight.mul_(2.0**11)
            mlp.up_proj.weight.mul_(2.0**11)
        if dtype == "float32":
            assert isinstance(ask(checkpoint), str)
            continue
        with pytest.raises(ValueError, match=r"the output of \S+layers.1\S* .*infinite.* what float16 holds.*bfloat16"):
            ask(checkpoint)
        assert not any(module._forward_hooks for module in checkpoint.model.modules())


def test_tokens_that_are_forbidden_are_no_error():
    scores = torch.tensor([[0.0, -math.inf, 3.0], [1.0, 2.0, -math.inf]])
    assert RequireFinite()(None, scores) is scores
    for bad in (math.nan, math.inf):
        with pytest.raises(NotFiniteError):
            RequireFinite()(None, scores.index_fill(1, torch.tensor(1), bad))
    with pytest.raises(NotFiniteError):
        RequireFinite()(None, torch.full((1, 3), -math.inf))


def test_the_command_line_does_not_print_an_empty_answer(tmp_path):
    for file in TINY.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"][3, 3] = math.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    result = CliRunner().invoke(app, ["ask", CLIP, "Which shape?", "--model", str(tmp_path), "--device", "cpu"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: ") and "lm_head.weight" in result.stderr
