"""Scenes to model inputs with labels, and model outputs to answers that are right or wrong."""

from collections import defaultdict

import numpy as np
import torch
from scenes import FIRST_SEED, Question, make_scene, questions, render
from transformers.video_utils import VideoMetadata

IGNORE = -100
TICKS_PER_SECOND = 100  # the grid on which frames are timed


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


def make_batch(processor, clips: list[np.ndarray], asked: list[list[Question]], times: np.ndarray) -> dict:
    """Model inputs with labels for clips whose frames were taken at the same `times` (T,), one conversation each."""
    ticks = np.round(times * TICKS_PER_SECOND).astype(int).tolist()
    metadata = VideoMetadata(total_num_frames=ticks[-1] + 1, fps=TICKS_PER_SECOND, frames_indices=ticks)
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
    scenes = [make_scene(seed, level, beats) for seed in range(first_seed, first_seed + size)]
    times = np.arange(beats) * scenes[0].beat
    asked = []
    for scene in scenes:
        every = questions(scene)
        if num_questions is not None:
            order = np.random.default_rng(scene.seed).permutation(len(every))
            every = [every[index] for index in order[:num_questions]]
        asked.append(every)
    return {**make_batch(processor, [render(scene, times) for scene in scenes], asked, times), "asked": asked}


def held_out_batches(processor) -> list[dict]:
    """128 hard validation clips of 8, 12 and 16 frames, every question of each."""
    beats = (8, 12, 16, 16)
    return [sample_batch(processor, FIRST_SEED["validation"] + 32 * n, 32, 2, b) for n, b in enumerate(beats)]


def answer_logits(model, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (n, vocabulary) and targets (n,) at the labelled positions only."""
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "asked")}
    labelled = batch["labels"][:, 1:] != IGNORE
    hidden = model.model(**inputs).last_hidden_state[:, :-1][labelled]
    return model.lm_head(hidden), batch["labels"][:, 1:][labelled]


def answer_hits(logits: torch.Tensor, targets: torch.Tensor, end_id: int) -> list[bool]:
    """Of each answer, whether every token is the most likely one: what greedy decoding would get right."""
    ends = (targets == end_id).nonzero().flatten() + 1
    lengths = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    return [bool(hit.all()) for hit in (logits.argmax(-1) == targets).split(lengths)]


@torch.no_grad()
def accuracy_by_kind(model, batches: list[dict], end_id: int) -> dict[str, float]:
    """Share of right answers, each given the true earlier turns of its conversation."""
    right = defaultdict(list)
    for batch in batches:
        asked = [item for items in batch["asked"] for item in items]
        for item, hit in zip(asked, answer_hits(*answer_logits(model, batch), end_id), strict=True):
            right[item.kind].append(hit)
    scores = {kind: float(np.mean(hits)) for kind, hits in right.items()}
    return {**scores, "all": float(np.mean([hit for hits in right.values() for hit in hits]))}
