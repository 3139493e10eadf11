"""Rows that hold several samples: no mask, positions that begin anew. None sees another, whatever was dropped."""

import pytest
import torch
from helpers import make_inputs, make_model, make_native, with_labels
from stts_molmo import modeling_stts_molmo

ROWS = ([4, 2], [6], [3, None, 2], [2, 5])  # the frames of each sample of a row; rows lose 12, 12, 10 and 14 tokens


def sample(num_frames: int | None, seed: int = 0) -> dict[str, torch.Tensor]:
    return with_labels(make_inputs([num_frames], seed=seed))


def packed_row(row: list[int | None]) -> dict[str, torch.Tensor]:
    """Samples one after the other, without a mask."""
    samples = [sample(num_frames, seed) for seed, num_frames in enumerate(row)]
    for inputs in samples:
        inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None]
        inputs["labels"][:, 0] = -100  # nothing of its sample stands before it
        del inputs["attention_mask"]
    return join(samples, dim=1)


def join(parts: list[dict[str, torch.Tensor]], dim: int) -> dict[str, torch.Tensor]:
    """Sequences along `dim`, shorter rows padded by a sample of their own; videos one after the other."""
    joined, length = {}, max(part["input_ids"].shape[1] for part in parts)
    for name in ("input_ids", "mm_token_type_ids", "position_ids", "labels"):
        values = [part[name] for part in parts]
        if dim == 0:
            pads = [length - value.shape[1] for value in values]
            fill = -100 if name == "labels" else 0
            values = [
                torch.cat([v, torch.arange(n)[None] if name == "position_ids" else torch.full((1, n), fill)], dim=1)
                for v, n in zip(values, pads, strict=True)
            ]
        joined[name] = torch.cat(values, dim=dim)
    videos = [part for part in parts if "video_grids" in part]
    offsets = torch.tensor([0] + [len(part["pixel_values_videos"]) * 36 for part in videos]).cumsum(0)
    joined["pixel_values_videos"] = torch.cat([part["pixel_values_videos"] for part in videos])
    joined["video_grids"] = torch.cat([part["video_grids"] for part in videos])
    pooling = [p["video_token_pooling"] + offset for p, offset in zip(videos, offsets, strict=False)]
    joined["video_token_pooling"] = torch.cat(pooling)
    return joined


@pytest.fixture(params=["dense mask", "no mask"])
def mask(request, monkeypatch):
    if request.param == "no mask":
        monkeypatch.setattr(modeling_stts_molmo, "MIN_UNMASKED_LENGTH", 0)
    return request.param


@torch.no_grad()
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("prune_ratio", [0, 0.5])
def test_samples_of_a_row_are_as_they_are_alone(prune_ratio, attn, mask):
    model, row = make_model(attn=attn), ROWS[2]
    options = {"prune_ratio": prune_ratio}
    packed = model(**packed_row(row), **options, logits_to_keep=0)
    alone = [model(**sample(n, seed), **options, logits_to_keep=0).logits for seed, n in enumerate(row)]
    torch.testing.assert_close(packed.logits, torch.cat(alone, dim=1), atol=1e-5, rtol=1e-5)


def test_rows_of_a_batch_are_as_they_are_alone(mask):
    """Logits and gradients of four rows that lose different numbers of tokens."""
    model, alone = make_model(), []
    batch = join([packed_row(row) for row in ROWS], dim=0)
    outputs = model(**batch)
    assert len(set((~outputs.input_keep_mask).sum(1).tolist())) > 2
    num_labels = (batch["labels"][:, 1:] != -100).sum()
    outputs.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for index, row in enumerate(map(packed_row, ROWS)):
        alone = model(**row)
        length, keep = row["input_ids"].shape[1], alone.input_keep_mask[0]
        ours = outputs.logits[index, :length]
        torch.testing.assert_close(ours[keep], alone.logits[0][keep], atol=1e-5, rtol=1e-5)
        (alone.loss * (row["labels"][:, 1:] != -100).sum() / num_labels).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradients[name], p.grad, atol=1e-6, rtol=1e-3, msg=name)


def test_packed_text_beside_a_video_is_native_when_nothing_is_dropped():
    row = packed_row([4, None])
    del row["labels"]
    assert torch.equal(make_model()(**row, prune_ratio=0).logits, make_native()(**row).logits)
