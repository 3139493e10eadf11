"""The training loop shared by the baseline and the rows fine-tuned from it."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from stts_molmo.tools.files import written_whole

from .batches import accuracy, hits_by_kind


def learning_rate_scale(step: int, total: int, warmup: int) -> float:
    """Linear warm-up, then a cosine to a hundredth."""
    progress = (step - warmup) / max(1, total - warmup)
    return (step + 1) / warmup if step < warmup else 0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2


def average_gradients(model: torch.nn.Module) -> None:
    """Each gradient becomes its mean over processes, if there are several."""
    if dist.is_initialized():
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients]) / dist.get_world_size()
        dist.all_reduce(flat)
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def fit(
    model: torch.nn.Module,
    processor,
    optimizers: list[torch.optim.Optimizer],
    batch_at: Callable[[int], dict],
    held_out: list[tuple[dict, list]],
    output: Path,
    steps: int,
    warmup: int = 50,
    log_every: int = 50,
    eval_every: int = 250,
    save_every: int = 50,
) -> float:
    """
    Trains on `batch_at(step)`; learning rates of the optimizers are peaks. Returns the best held-out accuracy. In
    several processes `batch_at` gives each its part of a batch.

    OUTPUT/best holds the weights of that moment, OUTPUT/state.pt what a second call needs to go on, however the first
    one ended.
    """
    state_file = output / "state.pt"
    output.mkdir(parents=True, exist_ok=True)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    start, best, losses = 0, 0.0, []
    if state_file.exists():
        state = torch.load(state_file)
        start, best = state["step"], state["best"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    began = time.monotonic()
    for step in range(start, steps):
        model.train()
        loss = model(**batch_at(step)).loss
        loss.backward()
        average_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rates in zip(optimizers, peaks, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * learning_rate_scale(step, steps, warmup)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())

        done = step + 1
        if dist.is_initialized() and dist.get_rank():
            continue  # the first process logs, evaluates and saves
        if done % log_every == 0:
            seconds = (time.monotonic() - began) / (done - start)
            print(f"step {done} loss {np.mean(losses[-log_every:]):.4f} seconds a step {seconds:.2f}", flush=True)
        if done % eval_every == 0 or done == steps:
            model.eval()
            scores = accuracy(hits_by_kind(model, held_out, processor.tokenizer.eos_token_id))
            print(json.dumps({"step": done, **{kind: round(score, 3) for kind, score in scores.items()}}), flush=True)
            if scores["all"] > best:
                best = scores["all"]
                model.save_pretrained(output / "best")
                processor.save_pretrained(output / "best")
        if done % save_every == 0 or done == steps:
            saved = [optimizer.state_dict() for optimizer in optimizers]
            with written_whole(state_file) as draft:
                torch.save({"step": done, "best": best, "model": model.state_dict(), "optimizers": saved}, draft)
    return best
