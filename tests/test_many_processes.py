"""Two processes: sharded weights, a process without a video, tensor parallelism; all as one process has it."""

import os
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers import (
    image_inputs,
    load_processor,
    load_script,
    make_inputs,
    make_model,
    make_tokenized_model,
    with_labels,
    write_joint_rows,
)
from stts_molmo.modeling_stts_molmo import STTSMolmoForConditionalGeneration
from stts_molmo.tools.distributed import blank_media, encode_in_step, save_sharded, shard
from torch.distributed.device_mesh import init_device_mesh

# One process imports everything and is forked for all tests.
processes = torch.multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["torch", "stts_molmo.tools.distributed", "stts_molmo.tools.training", "datasets"])


def run_on_two(work, folder: Path, *arguments):
    """`work(rank, folder, ...)` on two processes; what each of them returned. One that hangs is an error."""
    context = torch.multiprocessing.start_processes(
        enter, (work, folder, *arguments), nprocs=2, join=False, start_method="forkserver"
    )
    for _ in range(60):
        if context.join(timeout=5):
            return [torch.load(folder / f"{work.__name__}-{rank}.pt", weights_only=False) for rank in range(2)]
    for process in context.processes:
        process.kill()
    raise TimeoutError(f"{work.__name__} hangs on two processes")


def enter(rank: int, work, folder: Path, *arguments):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "HF_HUB_OFFLINE": "1"}
    store = dist.FileStore(str(folder / f"{work.__name__}.store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    result = work(rank, folder, *arguments)
    assert dist.get_world_size() == 2
    torch.save(result, folder / f"{work.__name__}-{rank}.pt")
    dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------------------
# A step in which a process has no video
# ----------------------------------------------------------------------------------------------------------------------

BATCHES = {
    "videos of other lengths": (lambda: make_inputs([4, 6], side="right"), lambda: make_inputs([2], side="right")),
    "video and text": (lambda: make_inputs([4], side="right"), lambda: make_inputs([None, None], side="right")),
    "video and images": (lambda: make_inputs([4], side="right"), lambda: image_inputs(3)),
    "image and text": (lambda: image_inputs(1), lambda: make_inputs([None], side="right")),
}


def gradients_of(model, batches) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    num_labels = 40
    losses = [model(**with_labels(batch), num_items_in_batch=num_labels).loss for batch in batches]
    for loss in losses:
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [loss.detach() for loss in losses], gradients


def step_on_shards(rank: int, folder: Path):
    results = {}
    for case, makers in BATCHES.items():
        torch.manual_seed(rank)
        model = make_model().train()
        shard(model, init_device_mesh("cpu", (2,)))
        encode_in_step(model, images=True)
        torch.manual_seed(0)
        batch = makers[rank]()
        losses, gradients = gradients_of(model, [batch])
        results[case] = (losses, {name: grad.full_tensor() * 2 for name, grad in gradients.items()})
    return results


def test_no_process_waits_for_one_without_a_video(tmp_path):
    both = run_on_two(step_on_shards, tmp_path)
    for case, makers in BATCHES.items():
        batches = []
        for make in makers:
            torch.manual_seed(0)
            batches.append(make())
        losses, gradients = gradients_of(make_model().train(), batches)
        assert [result[case][0][0] for result in both] == pytest.approx([loss.item() for loss in losses], rel=1e-6)
        for result in both:
            sharded = result[case][1]
            assert "model.vision_tower.token_scorer.fc3.weight" in sharded
            for name, gradient in gradients.items():
                torch.testing.assert_close(sharded[name], gradient, rtol=1e-4, atol=1e-6, msg=f"{case}: {name}")
            assert all(not sharded[name].any() for name in sharded.keys() - gradients.keys())


@pytest.mark.parametrize("batch", ["video", "text", "images"])
def test_what_is_encoded_blank_changes_nothing(batch):
    """To the last bit, in loss and in gradients."""
    make = {"video": lambda: make_inputs([4]), "text": lambda: make_inputs([None]), "images": lambda: image_inputs(2)}
    results = []
    for in_step in (False, True):
        torch.manual_seed(0)
        inputs, model = make[batch](), make_model().train()
        if in_step:
            encode_in_step(model, images=True)
        results.append(gradients_of(model, [inputs]))
    ((loss,), gradients), ((same_loss,), same_gradients) = results
    assert torch.equal(loss, same_loss)
    for name, gradient in same_gradients.items():
        assert torch.equal(gradient, gradients.get(name, torch.zeros_like(gradient))), name
    assert "model.vision_tower.token_scorer.fc1.weight" in same_gradients


def test_evaluation_encodes_nothing_blank():
    model = make_model().eval()
    encode_in_step(model)
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(**make_inputs([None]))
    assert not calls


def test_blank_media_are_as_the_processor_returns_them():
    config = make_tokenized_model().config
    picture = torch.zeros(2, 36, 36, 3, dtype=torch.uint8).numpy()
    video = load_processor().video_processor([picture], return_tensors="pt", do_sample_frames=False)
    blank = blank_media(config, "video")
    assert {name: value.shape for name, value in blank.items()} == {name: video[name].shape for name in blank}
    assert torch.equal(blank["video_token_pooling"], video["video_token_pooling"])
    assert torch.equal(blank["video_grids"], video["video_grids"])


# ----------------------------------------------------------------------------------------------------------------------
# A whole run, sharded
# ----------------------------------------------------------------------------------------------------------------------


def fine_tune(rank: int, folder: Path, checkpoint: Path, output: str, *flags: str) -> tuple[list[float], list[float]]:
    """The loss and the norm of the scorer's gradient in each step."""
    load_script("finetune")  # which the other imports, beside which it lies
    script = load_script("finetune_fsdp")
    arguments = ["--model", str(checkpoint), "--dataset", str(folder / "joint.jsonl")]
    arguments += ["--output_dir", str(folder / output), "--learning_rate", "1e-3", "--warmup_steps", "1"]
    # The group is there already, and stays.
    nothing = {name: lambda *_, **__: None for name in ("init_process_group", "destroy_process_group")}
    norms, clip_gradients = [], script.clip_gradients

    def clip(model, max_norm):
        norms.append(model.model.vision_tower.token_scorer.fc1.weight.grad.full_tensor().norm().item())
        return clip_gradients(model, max_norm)

    with mock.patch.multiple(script.dist, **nothing), mock.patch.object(script, "clip_gradients", clip):
        losses = script.main([*arguments, "--num_frames", "4", "--save_steps", "2", *flags])
    return losses, norms


def run_twice(rank: int, folder: Path, checkpoint: Path):
    whole = fine_tune(rank, folder, checkpoint, "whole", "--max_steps", "4")
    fine_tune(rank, folder, checkpoint, "resumed", "--max_steps", "4")
    for file in (folder / "resumed").glob("checkpoint-4/.metadata") if rank == 0 else ():
        file.unlink()  # as if it had been killed while it wrote this one
    dist.barrier()
    resumed = fine_tune(rank, folder, checkpoint, "resumed", "--max_steps", "4")
    return whole, resumed


def test_two_processes_train_jointly_as_one_does_and_resume(tmp_path):
    """Losses and weights are equal to the last bit, and the scorer learns in every step, whatever else is in it."""
    write_joint_rows(tmp_path / "joint.jsonl")
    checkpoint = tmp_path / "checkpoint"
    make_tokenized_model().save_pretrained(checkpoint)
    load_processor().save_pretrained(checkpoint)
    both = run_on_two(run_twice, tmp_path, checkpoint)
    assert both[0] == both[1]
    (whole, norms), (resumed, _) = both[0]
    assert len(whole) == len(norms) == 4 and resumed == whole[2:]
    assert min(norms) > 0

    store = dist.FileStore(str(tmp_path / "alone.store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        alone, _ = fine_tune(0, tmp_path, checkpoint, "alone", "--max_steps", "4", "--gradient_accumulation_steps", "2")
    finally:
        dist.destroy_process_group()
    assert alone == whole
    ours, expected = (STTSMolmoForConditionalGeneration.from_pretrained(tmp_path / name) for name in ("whole", "alone"))
    for (name, parameter), other in zip(expected.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(other, parameter), name
    assert (tmp_path / "whole" / "modeling_stts_molmo.py").exists()
    assert "joint.jsonl, 4 steps" in (tmp_path / "whole" / "README.md").read_text()


# ----------------------------------------------------------------------------------------------------------------------
# Generating, saving, tensor parallelism
# ----------------------------------------------------------------------------------------------------------------------


def generate_and_save(rank: int, folder: Path):
    model = make_model()
    expected = model.generate(**make_inputs([4]), max_new_tokens=4, do_sample=False)
    shard(model, init_device_mesh("cpu", (2,)))
    sequences = model.generate(**make_inputs([4]), max_new_tokens=4, do_sample=False)
    save_sharded(model, folder / "saved")
    return torch.equal(sequences, expected)


def test_a_sharded_model_generates_and_is_saved(tmp_path):
    assert run_on_two(generate_and_save, tmp_path) == [True, True]
    loaded = STTSMolmoForConditionalGeneration.from_pretrained(tmp_path / "saved")
    expected = make_model().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    assert (tmp_path / "saved" / "modeling_stts_molmo.py").exists()


def split_language_model(rank: int, folder: Path, checkpoint: Path):
    model = STTSMolmoForConditionalGeneration.from_pretrained(checkpoint, tp_plan="auto")
    weight = model.model.language_model.layers[0].self_attn.q_proj.weight
    local = weight.to_local() if hasattr(weight, "to_local") else weight
    inputs = with_labels(make_inputs([4, 2], side="right"))
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    model.train()(**inputs).loss.backward()
    scorer = {name: p.grad for name, p in model.named_parameters() if "token_scorer" in name}
    return logits, scorer, tuple(local.shape)


def test_tensor_parallel_is_as_one_process(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    model = make_model()
    model.save_pretrained(checkpoint)
    inputs = with_labels(make_inputs([4, 2], side="right"))
    with torch.no_grad():
        expected = model(**inputs).logits
    model.train()(**inputs).loss.backward()
    for logits, scorer, shape in run_on_two(split_language_model, tmp_path, checkpoint):
        assert shape == (16, 32)  # half of the queries
        torch.testing.assert_close(logits, expected, rtol=0, atol=5e-5)
        for name, gradient in scorer.items():
            torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=0, atol=1e-6, msg=name)
