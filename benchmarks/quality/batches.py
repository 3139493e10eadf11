"""Scenes to model inputs with labels, and model outputs to answers that are right or wrong."""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import torch
from scenes import FIRST_SEED, Question, make_scene, questions, render
from transformers.video_utils import VideoMetadata

IGNORE = -100
VIDEO_INPUTS = ("pixel_values_videos", "video_token_pooling", "video_grids")
TICKS_PER_SECOND = 100  # the grid on which frames are timed


def conversation(item: Question) -> list[dict]:
    """A chat of one question about a video and its answer."""
    content = [{"type": "video"}, {"type": "text", "text": item.question}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": item.answer}]


def answer_labels(input_ids: torch.Tensor, tokenizer) -> torch.Tensor:
    """Labels (B, L): the ids of the assistant's turn up to and with its end token, `IGNORE` elsewhere."""
    header = tokenizer("<|im_start|>assistant\n", return_tensors="pt").input_ids[0]
    opens = (input_ids.unfold(1, len(header), 1) == header).all(-1).int().argmax(1, keepdim=True) + len(header)
    position = torch.arange(input_ids.shape[1])
    ends = ((input_ids == tokenizer.eos_token_id) & (position >= opens)).int().argmax(1, keepdim=True)
    return input_ids.masked_fill((position < opens) | (position > ends), IGNORE)


def make_batch(processor, clips: list[np.ndarray], asked: list[list[Question]], times: np.ndarray) -> dict:
    """
    Model inputs with labels for clips whose frames were taken at the same `times` (T,).

    Every question is a row of its own, so that no answer can lean on another; `asked` tells which rows share a clip,
    whose pixels are in the batch once.
    """
    ticks = np.round(times * TICKS_PER_SECOND).astype(int).tolist()
    metadata = VideoMetadata(total_num_frames=ticks[-1] + 1, fps=TICKS_PER_SECOND, frames_indices=ticks)
    video_inputs = processor.video_processor(
        list(clips), video_metadata=[metadata] * len(clips), do_sample_frames=False, return_tensors="pt"
    )
    frames = processor.get_video_string(video_inputs["video_grids"][0], times.tolist())
    text = processor.apply_chat_template([conversation(item) for items in asked for item in items])
    text = [row.replace(processor.video_token, frames) for row in text]
    text_inputs = processor(text=text, padding=True, padding_side="right", return_tensors="pt")
    labels = answer_labels(text_inputs["input_ids"], processor.tokenizer)
    return {**text_inputs, **video_inputs, "labels": labels, "asked": asked}


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
    return make_batch(processor, [render(scene, times) for scene in scenes], asked, times)


def held_out_batches(processor) -> list[dict]:
    """64 hard validation clips of 8, 12 and 16 frames, every question of each."""
    beats = (8, 8, 12, 12, 16, 16, 16, 16)
    return [sample_batch(processor, FIRST_SEED["validation"] + 8 * n, 8, 2, b) for n, b in enumerate(beats)]


def encode_clips(model, batch: dict, **pruning) -> dict:
    """
    The batch with each clip's features, computed once, in the place of pixels: what `model` takes as keywords.

    `pruning` may hold `prune_ratio` and `method`.
    """
    inputs = {name: value for name, value in batch.items() if name not in (*VIDEO_INPUTS, "asked")}
    video = model.model.get_video_features(*(batch[name] for name in VIDEO_INPUTS), **pruning)
    copies = [len(items) for items in batch["asked"]]
    rows = [clip for clip, count in enumerate(copies) for _ in range(count)]
    shared = {"pooler_output": tuple(video.pooler_output[clip] for clip in rows)}
    if getattr(video, "keep_mask", None) is not None:
        masks = video.keep_mask.split(batch["video_grids"][:, 0].tolist())
        shared |= {"keep_mask": torch.cat([masks[clip] for clip in rows]), "aux_loss": video.aux_loss}
    return {**inputs, "mm_encoder_outputs": {"video": type(video)(**shared)}}


def answer_logits(model, batch: dict, **pruning) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (n, vocabulary) and targets (n,) at the labelled positions only."""
    inputs = encode_clips(model, batch, **pruning)
    labels = inputs.pop("labels")[:, 1:]
    hidden = model.model(**inputs).last_hidden_state[:, :-1]
    return model.lm_head(hidden[labels != IGNORE]), labels[labels != IGNORE]


def answer_hits(logits: torch.Tensor, targets: torch.Tensor, end_id: int) -> list[bool]:
    """Of each answer, whether every token is the most likely one: what greedy decoding would get right."""
    ends = (targets == end_id).nonzero().flatten() + 1
    lengths = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    return [bool(hit.all()) for hit in (logits.argmax(-1) == targets).split(lengths)]


@torch.no_grad()
def hits_by_kind(model, batches: Iterable[dict], end_id: int, **pruning) -> dict[str, list[bool]]:
    """Right or wrong for every question of `batches`, by kind."""
    hits = defaultdict(list)
    for batch in batches:
        asked = [item for items in batch["asked"] for item in items]
        for item, hit in zip(asked, answer_hits(*answer_logits(model, batch, **pruning), end_id), strict=True):
            hits[item.kind].append(hit)
    return hits


def accuracy(hits: dict[str, list[bool]]) -> dict[str, float]:
    """Share of right answers by kind, and of all questions as `all`."""
    scores = {kind: float(np.mean(right)) for kind, right in hits.items()}
    return {**scores, "all": float(np.mean([hit for right in hits.values() for hit in right]))}
