"""`stts-molmo warm-up`: the scorer learns the auxiliary target from clips alone, and nothing else changes or runs."""

import shutil

import pytest
import torch
from helpers import CLIP, ROOT, TINY, load_processor, make_tokenized_model, write_video
from safetensors.torch import load_file
from stts_molmo.modeling_stts_molmo import STTSMolmoForConditionalGeneration
from stts_molmo.tools.cli import app
from stts_molmo.tools.corpus import find_videos
from stts_molmo.tools.warm_up import overwrite_scorer, read_batches, warm_up, warm_up_checkpoint
from typer.testing import CliRunner

CLIPS = ROOT / "examples" / "clips"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An STTS checkpoint in bfloat16, in several files."""
    folder = tmp_path_factory.mktemp("checkpoint") / "stts"
    make_tokenized_model(prune_layer=1).bfloat16().save_pretrained(folder, max_shard_size="40KB")
    load_processor().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def tensors(folder):
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def batches(number: int) -> list[dict]:
    videos = read_batches(load_processor(), list(find_videos(CLIPS).values()), 2, num_frames=4, seed=0)
    return [next(videos) for _ in range(number)]


def test_the_copy_differs_in_its_scorer_alone(checkpoint, tmp_path):
    before, losses = tensors(checkpoint), []
    copy = warm_up_checkpoint(
        str(checkpoint),
        CLIPS,
        tmp_path / "warm",
        steps=30,
        clips_a_step=2,
        num_frames=4,
        device="cpu",
        progress=lambda _, loss: losses.append(loss),
    )
    after = tensors(copy)
    assert before.keys() == after.keys() and all(before[name].dtype == after[name].dtype for name in before)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("token_scorer." in name for name in changed)
    assert len(losses) == 30 and sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert "steps of warm-up" in (copy / "README.md").read_text()
    assert {file.name for file in copy.iterdir()} >= {file.name for file in checkpoint.iterdir()}
    model = STTSMolmoForConditionalGeneration.from_pretrained(copy)
    assert all(
        torch.equal(value, after[next(n for n in after if n.endswith(f"token_scorer.{name}"))])
        for name, value in model.model.vision_tower.token_scorer.state_dict().items()
    )


def test_the_loss_is_the_auxiliary_one_of_training():
    model, (batch,) = make_tokenized_model(prune_layer=1), batches(1)
    expected = model.model.get_video_features(**batch, prune_ratio=0.5).aux_loss
    assert list(warm_up(model, [batch])) == pytest.approx([expected.item()], rel=1e-5)


def test_only_the_first_layers_and_the_scorer_run():
    model = make_tokenized_model(prune_layer=1)
    tower, ran = model.model.vision_tower, []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    list(warm_up(model, batches(2)))
    parts = {name.split("layers.")[1].split(".")[0] for name in ran if "vision_tower.layers." in name}
    assert parts == {"0", "1"} and not any("language_model" in name or "projector" in name for name in ran)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("token_scorer." in name for name in changed)
    assert all(p.grad is None for p in model.parameters()) and not tower.token_scorer.is_untrained()


def test_what_fails_on_the_way_leaves_everything_as_it_was(checkpoint, tmp_path):
    model = make_tokenized_model(prune_layer=1)
    scorer = model.model.vision_tower.token_scorer
    before = {name: value.clone() for name, value in scorer.state_dict().items()}

    def broken():
        yield from batches(1)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="disk is gone"):
        list(warm_up(model, broken()))
    assert model.model.vision_tower.token_scorer is scorer
    assert all(torch.equal(value, before[name]) for name, value in scorer.state_dict().items())
    folder = tmp_path / "clips"
    folder.mkdir()
    write_video(folder / "one.mp4", num_frames=1)
    with pytest.raises(ValueError, match=r"one\.mp4 has one frame only"):
        warm_up_checkpoint(str(checkpoint), folder, tmp_path / "warm", steps=1, device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["clips"]


def test_folders_are_searched_for_videos(tmp_path):
    (tmp_path / "below").mkdir()
    for name in ("b.MP4", "below/a.webm", "notes.txt"):
        (tmp_path / name).touch()
    assert list(find_videos(tmp_path)) == ["b.MP4", "below/a.webm"]
    with pytest.raises(ValueError, match="There is no video in .*empty"):
        warm_up_checkpoint(str(TINY), tmp_path / "empty", tmp_path / "warm", steps=1, device="cpu")


def test_a_file_that_is_named_may_have_any_name(checkpoint, tmp_path):
    clip = shutil.copy(CLIP, tmp_path / "clip.film")
    written = warm_up_checkpoint(str(checkpoint), clip, tmp_path / "warm", steps=1, clips_a_step=1, device="cpu")
    before, after = tensors(checkpoint), tensors(written)
    assert {name for name in before if not torch.equal(before[name], after[name])}


def test_every_clip_comes_once_before_any_comes_again(tmp_path, monkeypatch):
    for name in "abc":
        shutil.copy(CLIP, tmp_path / f"{name}.mp4")
    read = []
    from stts_molmo.tools import warm_up as module

    original = module.read_clip
    monkeypatch.setattr(module, "read_clip", lambda p, video, **kw: read.append(video) or original(p, video, **kw))
    stream = read_batches(load_processor(), list(find_videos(tmp_path).values()), 2, num_frames=2, seed=1)
    for _ in range(3):
        assert next(stream)["video_grids"].tolist() == [[2, 3, 3]] * 2
    assert sorted(read[:3]) == sorted(read[3:6]) == [str(tmp_path / f"{name}.mp4") for name in "abc"]


def test_the_scorer_is_found_in_any_layout(tmp_path):
    model = make_tokenized_model()
    for original in (True, False):
        folder = tmp_path / str(original)
        model.save_pretrained(folder, save_original_format=original)
        weights = {name: value + 1 for name, value in model.model.vision_tower.token_scorer.state_dict().items()}
        overwrite_scorer(folder, weights)
        loaded = STTSMolmoForConditionalGeneration.from_pretrained(folder)
        for name, value in loaded.model.vision_tower.token_scorer.state_dict().items():
            assert torch.equal(value, weights[name]), name


def test_the_command(checkpoint, tmp_path):
    arguments = ["warm-up", str(checkpoint), str(CLIPS), "--output", str(tmp_path / "warm"), "--steps", "2"]
    arguments += ["--num-frames", "2", "--clips-a-step", "1", "--device", "cpu"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and result.output.startswith("Auxiliary loss "), result.output
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2 and "exists and is not an empty directory" in again.output
