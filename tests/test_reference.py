"""The product against the reference that is written down from the paper's equations: values and gradients."""

import pytest
import reference
import torch
from helpers import layout_of, make_model, video_tensors

NUM_FRAMES = [4, 1, 3]
SETTINGS = {
    "paper": {},
    "patches compared": {"aux_target": "patches"},
    "rescaled bias": {"score_bias": "rescaled_log"},
    "cosine": {"method": "cosine"},
    "most dropped": {"prune_ratio": 0.9},
    "nothing dropped": {"prune_ratio": 0.01},
}


@torch.no_grad()
def make_encoder(settings: dict, grid: int, attn: str, videos: dict):
    """In float64 and in training, with scores of these videos on either side of a half."""
    model = make_model(grid, attn, **settings).model.double().train()
    last = model.vision_tower.token_scorer.fc3
    last.weight.mul_(0.3)
    last.bias.sub_(model.get_video_features(**videos, method="scorer").token_scores.logit().mean())
    return model


def encode(model, pixels, videos):
    """Tokens, scores, indices of the blocks left and auxiliary loss, as [`reference.encode`] gives them."""
    features = model.get_video_features(**videos | {"pixel_values_videos": pixels})
    kept = [frame.nonzero().flatten().tolist() for frame in features.keep_mask]
    return torch.cat(features.pooler_output), features.token_scores, kept, features.aux_loss


def gradients_of(model, pixels, tokens, aux_loss) -> dict[str, torch.Tensor]:
    """Of both losses together; every token counts, and each differently."""
    weight = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(5), dtype=tokens.dtype)
    loss = (tokens * weight).mean() + (0 if aux_loss is None else aux_loss)
    inputs = {"pixels": pixels} | dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(inputs, gradients, strict=True) if gradient is not None}


def assert_close(found: torch.Tensor, expected: torch.Tensor, name: str = ""):
    """Within a float32's digits of the largest: scores, bias and loss are float32, and Molmo2's eager softmax is."""
    scale = max(expected.abs().max().item(), 1e-2)  # of biases of keys, which change nothing, it is 0
    assert (found - expected).abs().max().item() < 1e-4 * scale, name


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("grid", [6, 5], ids=["dense blocks", "padded blocks"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_tokens_scores_losses_and_gradients_are_those_of_the_equations(settings, grid, attn):
    videos, layout = video_tensors(NUM_FRAMES, grid), layout_of(NUM_FRAMES, grid)
    model = make_encoder(SETTINGS[settings], grid, attn, videos)
    pixels = videos["pixel_values_videos"].double().requires_grad_()
    tokens, scores, kept, aux_loss = encode(model, pixels, videos)
    expected = reference.encode(model, pixels, NUM_FRAMES, layout.blocks.tolist(), layout.grid[1])
    assert kept == expected.kept
    assert_close(scores, expected.scores)
    assert scores.std() > 0.1
    assert_close(tokens, expected.tokens)
    assert (aux_loss is None) == (expected.aux_loss is None) == (settings == "cosine")
    if aux_loss is not None:
        assert_close(aux_loss, expected.aux_loss)
    found = gradients_of(model, pixels, tokens, aux_loss)
    wanted = gradients_of(model, pixels, expected.tokens, expected.aux_loss)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert_close(found[name], gradient, name)


def test_pooling_as_on_cuda_is_that_of_the_equations(monkeypatch):
    """Torch's own operations in place of a kernel for sequences."""
    pooler = make_model().model.vision_tower.token_scorer.token_pooler.double()
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    blocks, results = torch.randn(5, 9, 16, dtype=torch.float64, requires_grad=True), []
    for pool in (
        lambda: pooler(blocks.mean(1, keepdim=True), blocks, full_blocks=True)[0][:, 0],
        lambda: torch.stack([reference.pool(block, pooler) for block in blocks]),
    ):
        pooled = pool()
        gradients = torch.autograd.grad((pooled * torch.arange(16)).sum(), [blocks, *pooler.parameters()])
        results.append([pooled, *gradients])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
