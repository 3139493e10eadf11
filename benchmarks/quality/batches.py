"""Scenes to model inputs with labels, and model outputs to answers that are right or wrong."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from stts_molmo.tools.video import Clip, read_clip
from transformers.video_utils import VideoMetadata

from ..common import split_video
from .scenes import FIRST_SEED, MIN_BEATS, Question
from .worlds import film_captions, film_questions, lessons, make_film, shoot

IGNORE = -100
BEATS = (0.5, 0.6, 0.8, 1.0)  # seconds
TICKS_PER_SECOND = 100  # the grid on which frames are timed


def conversation(asked: list[Question]) -> list[dict]:
    """A chat about a video: questions and answers in turn."""
    messages = []
    for item in asked:
        messages.append({"role": "user", "content": [{"type": "text", "text": item.question}]})
        messages.append({"role": "assistant", "content": item.answer})
    messages[0]["content"].insert(0, {"type": "video"})
    return messages


def answer_labels(input_ids: torch.Tensor, tokenizer) -> torch.Tensor:
    """Labels (B, L): the ids of each assistant's turn up to and with its end token, `IGNORE` elsewhere."""
    header = tokenizer("<|im_start|>assistant\n", return_tensors="pt").input_ids[0]
    opens, closed = torch.zeros_like(input_ids, dtype=torch.bool), torch.zeros_like(input_ids, dtype=torch.bool)
    opens[:, len(header) :] = (input_ids.unfold(1, len(header), 1) == header).all(-1)[:, :-1]
    closed[:, 1:] = input_ids[:, :-1] == tokenizer.eos_token_id
    position = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    last_open, last_closed = (torch.where(mark, position, -1).cummax(1).values for mark in (opens, closed))
    return input_ids.masked_fill(last_open <= last_closed, IGNORE)


def make_batch(processor, clips: list[np.ndarray], chats: list[list[Question]], times: np.ndarray) -> dict:
    """
    Model inputs with labels, one row a chat, for clips whose frames were taken at the same `times` (T,).

    The number of chats is that of the clips or a multiple: the first ones are about the first clip. Without `clips`
    the chats are asked blindly.
    """
    if not clips:
        return tokenize(processor, chats, "")
    ticks = np.round(times * TICKS_PER_SECOND).astype(int).tolist()
    metadata = VideoMetadata(total_num_frames=ticks[-1] + 1, fps=TICKS_PER_SECOND, frames_indices=ticks)
    return _video_batch(processor, [Clip(frames, metadata) for frames in clips], chats)


def make_file_batch(processor, path: str, chats: list[list[Question]], num_frames: int) -> dict:
    """As `make_batch`, about a video file of which the processor samples at most `num_frames` frames."""
    return _video_batch(processor, [read_clip(processor, path, num_frames=num_frames)], chats)


def _video_batch(processor, clips: list[Clip], chats: list[list[Question]]) -> dict:
    video_inputs = processor.video_processor(
        [clip.frames for clip in clips],
        video_metadata=[clip.metadata for clip in clips],
        do_sample_frames=False,
        return_tensors="pt",
    )
    frames = processor.get_video_string(video_inputs["video_grids"][0], clips[0].metadata.timestamps)
    return {**tokenize(processor, chats, frames), **video_inputs}


def tokenize(processor, chats: list[list[Question]], frames: str) -> dict:
    """Chats with `frames` in the place of the video, and labels."""
    text = processor.apply_chat_template([conversation(asked) for asked in chats])
    text = [row.replace(processor.video_token, frames) for row in text]
    text_inputs = processor(text=text, padding=True, padding_side="right", return_tensors="pt")
    return {**text_inputs, "labels": answer_labels(text_inputs["input_ids"], processor.tokenizer)}


def sample_batch(
    processor,
    first_seed: int,
    size: int,
    level: int,
    num_frames: int,
    num_questions: int | None = None,
    num_captions: int = 0,
    num_lessons: int = 0,
    worlds: Sequence[str] = ("still",),
    beats: int | None = None,
) -> tuple[dict, list[list[Question]]]:
    """
    A batch of the scenes `first_seed..`, a frame a beat, and what was asked of each in its row. Scenes of so many
    `beats` are seen in evenly spaced frames instead, as the processor samples a file.

    Asked are `num_questions` of a scene (all when not given), `num_captions` captions of its frames and `num_lessons`
    `lessons`, in an order drawn from the scene's seed, which also picks its world in turn. A scene is at least
    `MIN_BEATS` long; fewer frames are some of its beats.
    """
    beat = BEATS[first_seed // size % len(BEATS)]
    length = beats or max(num_frames, MIN_BEATS)
    films = [
        make_film(seed, worlds[seed % len(worlds)], level, length, beat)
        for seed in range(first_seed, first_seed + size)
    ]
    if beats is None:
        times = np.sort(np.random.default_rng(first_seed).permutation(length)[:num_frames]) * beat
    else:
        times = np.linspace(0, (beats - 1) * beat, num_frames)
    asked = []
    for film in films:
        rng = np.random.default_rng(film.scene.seed)
        items = [*rng.permutation(np.array(film_questions(film), dtype=object))[:num_questions]]
        described = [item for time in times for item in film_captions(film, time)]
        items += [*rng.permutation(np.array(described, dtype=object))[:num_captions]]
        items += [item for item in lessons(film, times, num_lessons, rng) if item not in items]
        asked.append([items[index] for index in rng.permutation(len(items))])
    return make_batch(processor, [shoot(film, times) for film in films], asked, times), asked


def held_out_batches(processor, worlds: Sequence[str] = ("still",)) -> list[tuple[dict, list[list[Question]]]]:
    """64 hard validation clips of 8 frames, every question of each."""
    first = FIRST_SEED["validation"]
    return [sample_batch(processor, first + 8 * n, 8, level=2, num_frames=8, worlds=worlds) for n in range(8)]


def encode_clips(model, batch: dict, **pruning) -> dict:
    """
    The batch with each clip's features, computed once for all of its rows, in the place of pixels: what `model` takes
    as keywords. `pruning` may hold `prune_ratio` and `method`.
    """
    videos, inputs = split_video(batch)
    if not videos:
        return inputs
    video = model.model.get_video_features(**videos, **pruning)
    copies = len(batch["input_ids"]) // len(batch["video_grids"])
    shared = {"pooler_output": tuple(features for features in video.pooler_output for _ in range(copies))}
    if getattr(video, "keep_mask", None) is not None:
        masks = video.keep_mask.split(batch["video_grids"][:, 0].tolist())
        shared["keep_mask"] = torch.cat([mask for mask in masks for _ in range(copies)])
    return {**inputs, "mm_encoder_outputs": {"video": type(video)(**shared)}}


@torch.no_grad()
def answer_hits(model, batch: dict, end_id: int, **pruning) -> list[bool]:
    """Of each answer, whether every token is the most likely one: what greedy decoding would get right."""
    inputs = encode_clips(model, batch, **pruning)
    labels = inputs.pop("labels")[:, 1:]
    hidden = model.model(**inputs).last_hidden_state[:, :-1]
    targets = labels[labels != IGNORE]
    right = model.lm_head(hidden[labels != IGNORE]).argmax(-1) == targets
    ends = (targets == end_id).nonzero().flatten() + 1
    lengths = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    return [bool(tokens.all()) for tokens in right.split(lengths)]


def hits_by_kind(model, batches: Iterable[tuple[dict, list]], end_id: int, **pruning) -> dict[str, list[bool]]:
    """Right or wrong for every question of `batches`, by kind."""
    hits = defaultdict(list)
    for batch, chats in batches:
        asked = [item for chat in chats for item in chat]
        for item, hit in zip(asked, answer_hits(model, batch, end_id, **pruning), strict=True):
            hits[item.kind].append(hit)
    return hits


def accuracy(hits: dict[str, list[bool]]) -> dict[str, float]:
    """Share of right answers by kind, and of all questions as `all`."""
    scores = {kind: float(np.mean(right)) for kind, right in hits.items()}
    return {**scores, "all": float(np.mean([hit for right in hits.values() for hit in right]))}
