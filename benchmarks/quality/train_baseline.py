"""Trains the tiny Molmo2 without pruning: the baseline that every row of the quality study starts from.

    python benchmarks/quality/train_baseline.py --output runs/baseline --steps 6000

Scenes grow along `CURRICULUM`. A clip is asked several questions in one conversation and the loss sees the answers
only. The best weights by held-out accuracy are in OUTPUT/best; a run that is started again goes on where it stopped.
"""

import argparse
import json
import math
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from scenes import FIRST_SEED, Question, make_scene, questions, render
from tiny import build_model, build_processor
from torch.nn import functional as F
from transformers.video_utils import VideoMetadata

# (share of the run done when the stage ends, level of the scenes, beats a clip may have)
CURRICULUM = ((0.1, 0, (4,)), (0.2, 1, (6,)), (0.6, 2, (8,)), (1.0, 2, (8, 12, 16)))
IGNORE = -100


def conversation(asked: list[Question]) -> list[dict]:
    """One user turn and one assistant turn a question; the first turn shows the video."""
    turns = []
    for index, item in enumerate(asked):
        video = [{"type": "video"}] if index == 0 else []
        turns.append({"role": "user", "content": [*video, {"type": "text", "text": item.question}]})
        turns.append({"role": "assistant", "content": [{"type": "text", "text": item.answer}]})
    return turns


def answer_labels(input_ids: torch.Tensor, tokenizer) -> torch.Tensor:
    """Labels (B, L): the ids of every assistant turn up to and with its end token, `IGNORE` elsewhere."""
    header = tokenizer("<|im_start|>assistant\n", return_tensors="pt").input_ids[0]
    labels = torch.full_like(input_ids, IGNORE)
    opens = (input_ids.unfold(1, len(header), 1) == header).all(-1)
    for row, start in opens.nonzero().tolist():
        start += len(header)
        length = int((input_ids[row, start:] == tokenizer.eos_token_id).nonzero()[0]) + 1
        labels[row, start : start + length] = input_ids[row, start : start + length]
    return labels


def make_batch(processor, clips: list[np.ndarray], asked: list[list[Question]], beat: float = 0.5) -> dict:
    """Model inputs with labels for clips of the same number of frames, one conversation each."""
    num_frames = len(clips[0])
    metadata = VideoMetadata(
        total_num_frames=num_frames, fps=1 / beat, duration=num_frames * beat, frames_indices=list(range(num_frames))
    )
    text = [processor.apply_chat_template(conversation(items)) for items in asked]
    batch = processor(
        text=text,
        videos=list(clips),
        video_metadata=[metadata] * len(clips),
        do_sample_frames=False,
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    return {**batch, "labels": answer_labels(batch["input_ids"], processor.tokenizer)}


def sample_batch(
    processor, first_seed: int, size: int, level: int, beats: int, num_questions: int | None = None
) -> dict:
    """The batch of scenes `first_seed..`; `num_questions` of each at random, or all in the order of `KINDS`."""
    clips, asked = [], []
    for seed in range(first_seed, first_seed + size):
        scene = make_scene(seed, level, beats)
        clips.append(render(scene, np.arange(beats) * scene.beat))
        every = questions(scene)
        chosen = range(len(every))
        if num_questions is not None:
            chosen = np.random.default_rng(seed).permutation(len(every))[:num_questions]
        asked.append([every[index] for index in chosen])
    return {**make_batch(processor, clips, asked), "asked": asked}


def answer_logits(model, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (n, vocabulary) and targets (n,) at the labelled positions only."""
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "asked")}
    labelled = batch["labels"][:, 1:] != IGNORE
    hidden = model.model(**inputs).last_hidden_state[:, :-1][labelled]
    return model.lm_head(hidden), batch["labels"][:, 1:][labelled]


@torch.no_grad()
def accuracy_by_kind(model, batches: list[dict], end_id: int) -> dict[str, float]:
    """Share of questions whose every answer token is the most likely one, given the true earlier turns."""
    right = defaultdict(list)
    for batch in batches:
        logits, targets = answer_logits(model, batch)
        ends = (targets == end_id).nonzero().flatten() + 1
        lengths = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
        hits = (logits.argmax(-1) == targets).split(lengths)
        for item, hit in zip((item for items in batch["asked"] for item in items), hits, strict=True):
            right[item.kind].append(bool(hit.all()))
    scores = {kind: float(np.mean(hits)) for kind, hits in right.items()}
    return {**scores, "all": float(np.mean([hit for hits in right.values() for hit in hits]))}


def optimizers(model, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the rest."""
    inner = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and not any(word in name for word in ("embed", "lm_head"))
    }
    outer = [parameter for name, parameter in model.named_parameters() if name not in inner]
    return [
        torch.optim.Muon(
            inner.values(), lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw", momentum=0.95
        ),
        torch.optim.AdamW(outer, lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98)),
    ]


def learning_rate_scale(step: int, total: int, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine to a hundredth."""
    progress = (step - warmup) / max(1, total - warmup)
    return (step + 1) / warmup if step < warmup else 0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2


def stage_of(step: int, total: int) -> tuple[int, tuple[int, ...]]:
    """Level and beats of the scenes at a step."""
    return next((level, beats) for share, level, beats in CURRICULUM if step < share * total)


def train(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    state_file = args.output / "state.pt"
    processor = build_processor()
    model = build_model(processor.tokenizer, args.seed).train()
    steppers = optimizers(model, args.learning_rate)
    held_out = [
        sample_batch(processor, FIRST_SEED["validation"] + 32 * index, 32, level=2, beats=beats)
        for index, beats in enumerate((8, 12, 16, 16))
    ]
    start, best = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file)
        start, best = state["step"], state["best"]
        model.load_state_dict(state["model"])
        for stepper, saved in zip(steppers, state["optimizers"], strict=True):
            stepper.load_state_dict(saved)

    losses, began = [], time.monotonic()
    for step in range(start, args.steps):
        level, choices = stage_of(step, args.steps)
        first_seed = FIRST_SEED["train"] * (args.seed + 1) + step * args.batch_size
        beats = choices[step % len(choices)]
        batch = sample_batch(processor, first_seed, args.batch_size, level, beats, args.questions)
        logits, targets = answer_logits(model, batch)
        loss = F.cross_entropy(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = args.learning_rate * learning_rate_scale(step, args.steps)
            stepper.step()
            stepper.zero_grad()
        losses.append(loss.item())

        done = step + 1
        if done % args.log_every == 0:
            speed = (done - start) * args.batch_size / (time.monotonic() - began)
            print(
                f"step {done} level {level} loss {np.mean(losses[-args.log_every :]):.4f} clips/s {speed:.1f}",
                flush=True,
            )
        if done % args.eval_every == 0 or done == args.steps:
            model.eval()
            scores = accuracy_by_kind(model, held_out, processor.tokenizer.eos_token_id)
            model.train()
            print(json.dumps({"step": done, **{kind: round(score, 3) for kind, score in scores.items()}}), flush=True)
            if scores["all"] > best:
                best = scores["all"]
                model.save_pretrained(args.output / "best")
                processor.save_pretrained(args.output / "best")
            state = {"step": done, "best": best, "model": model.state_dict()}
            torch.save({**state, "optimizers": [stepper.state_dict() for stepper in steppers]}, state_file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--questions", type=int, default=8, help="questions a clip")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--eval-every", type=int, default=250)
    torch.set_num_threads(1)
    train(parser.parse_args())
