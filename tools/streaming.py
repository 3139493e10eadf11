"""Answers piece by piece to those who wait together: videos are read side by side, the model answers one at a time."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import StoppingCriteria, TextStreamer

from ..video_stts_molmo import EncodedVideo
from .answer import Answer, WatchedVideo
from .checkpoint import TRAIN_OR_COSINE, Checkpoint
from .video import Clip, read_clip

logger = logging.getLogger(__name__)

NUM_READERS = 4  # threads that download and decode: what one sender holds up does not hold up the next


@dataclass(frozen=True)
class Limits:
    """What those who ask may take. Whoever runs the model decides."""

    max_bytes: int = 64 * 2**20  # of a video, encoded, wherever it comes from
    max_video_seconds: float = 3600
    max_frame_size: int = 4096  # pixels that a frame may be wide or high, before it is resized
    max_frames: int = 128  # sampled of a video
    max_characters: int = 20_000  # of text in a chat
    max_new_tokens: int = 1024
    max_seconds: float = 300  # from a question to the end of its answer
    max_requests: int = 16  # at a time, that which is answered among them


@dataclass(frozen=True)
class Finished:
    """The end of an answer, with what the LLM read (dropped tokens left out) and wrote, in tokens."""

    answer: Answer
    num_read: int
    num_written: int
    is_complete: bool


class Pieces(TextStreamer):
    """Hands on the answer's text as it grows, and counts tokens."""

    def __init__(self, tokenizer, emit: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.emit = emit
        self.num_prompt, self.num_written, self.last = None, 0, None

    def put(self, value: torch.Tensor) -> None:
        if self.num_prompt is None:
            self.num_prompt = value.shape[-1]
        else:
            self.num_written += len(value)
            self.last = int(value[-1])
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.emit(text)


class Unwanted(StoppingCriteria):
    """Ends an answer that nobody waits for any more."""

    def __init__(self, is_unwanted: threading.Event):
        self.is_unwanted = is_unwanted

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self.is_unwanted.is_set(), device=input_ids.device)


class Answerer:
    """
    A checkpoint that answers one question at a time, within `limits`.

    Args:
        checkpoint: loaded here, so that no one waits for it. Its processor reads no file by name any more.
        allow_private_hosts: whether links may lead to machines that the public internet does not reach.
        allow_untrained: let a scorer choose that was never trained.

    Raises:
        OSError, ValueError: the checkpoint cannot be loaded.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        limits: Limits,
        allow_private_hosts: bool = False,
        allow_untrained: bool = False,
    ):
        self.checkpoint, self.limits, self.allow_untrained = checkpoint, limits, allow_untrained
        self.is_untrained = checkpoint.model.has_untrained_scorer()
        video_processor = checkpoint.processor.video_processor
        video_processor.allow_local_files = False
        video_processor.allow_private_hosts = allow_private_hosts
        video_processor.max_download_bytes = limits.max_bytes
        video_processor.download_seconds = limits.max_seconds
        video_processor.max_video_seconds = limits.max_video_seconds
        video_processor.max_frame_size = limits.max_frame_size
        self.readers = ThreadPoolExecutor(NUM_READERS, "reader")
        self.model_thread = ThreadPoolExecutor(1, "model")

    def check_pruning(self, prune_ratio=None, method: str | None = None, max_vision_tokens: int | None = None) -> dict:
        """
        What to prune with: these, else what the generation config says, else the checkpoint's own.

        Raises:
            ValueError: a value is out of range, a ratio and a budget are both given, or the scorer is not trained.
        """
        pruning = self.checkpoint.model.find_pruning(None, prune_ratio, method, max_vision_tokens)
        if (
            self.checkpoint.config.stts_config.pruning(**pruning).method == "scorer"
            and self.is_untrained
            and not self.allow_untrained
        ):
            raise ValueError(f"The token scorer is not trained: it would drop tokens at random. {TRAIN_OR_COSINE}")
        return pruning

    def read(self, video, num_frames: int | None) -> Clip:
        """The frames of a video, within the limits."""
        processor = self.checkpoint.processor
        num_frames = min(num_frames or processor.video_processor.num_frames, self.limits.max_frames)
        if not isinstance(video, Path):
            return read_clip(processor, video, num_frames=num_frames)
        with video.open("rb") as file:  # here, where it is read to the end, whoever leaves
            return read_clip(processor, EncodedVideo(file, video.name), num_frames=num_frames)

    async def answer(
        self, video, messages: list[dict], pruning: dict, num_frames: int | None = None, **generation
    ) -> AsyncIterator[WatchedVideo | str | Finished]:
        """
        Answer the last question of a chat. To stop early, close the iterator.

        Args:
            video: a link, bytes or the `Path` of a file that may be read; or the `clip` of a [`WatchedVideo`].
            messages: one of them has the part `{"type": "video"}`.
            pruning: what [`check_pruning`] gave.
            num_frames: most frames to sample, within the limits; the checkpoint's own when not given.
            generation: `max_new_tokens`, `do_sample`, `temperature`, `top_p`; and `seed`.

        Yields:
            The video, encoded and pruned; the answer's text in pieces; and its end.

        Raises:
            ValueError: the video cannot be read, within the limits.
            TimeoutError: it took too long.
            RuntimeError: the model failed.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.limits.max_seconds
        clip = video
        if not isinstance(video, Clip):
            async with asyncio.timeout_at(deadline):
                clip = await loop.run_in_executor(self.readers, partial(self.read, video, num_frames))
            del video  # what is read is smaller
        events, is_unwanted = asyncio.Queue(), threading.Event()

        def emit(event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        def work() -> None:
            try:
                if not is_unwanted.is_set():
                    self.answer_now(clip, messages, pruning, generation, emit, is_unwanted)
            except Exception as error:  # what the model stumbles over; what is asked of it was checked before
                logger.exception("No answer")
                emit(RuntimeError(f"The model failed: {error}"))

        self.model_thread.submit(work)
        event = None
        try:
            while not isinstance(event, Finished):
                async with asyncio.timeout_at(deadline):
                    event = await events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            is_unwanted.set()

    def answer_now(
        self, clip: Clip, messages: list[dict], pruning: dict, generation: dict, emit: Callable, is_unwanted
    ) -> None:
        """What [`answer`] does in the model's thread."""
        checkpoint = self.checkpoint
        seed = generation.pop("seed", None)
        if seed is not None:
            torch.manual_seed(seed)
        watched = WatchedVideo(checkpoint, clip, **pruning, allow_untrained=self.allow_untrained)
        emit(watched)
        pieces = Pieces(checkpoint.processor.tokenizer, emit)
        answer = watched.answer(messages, streamer=pieces, stopping_criteria=[Unwanted(is_unwanted)], **generation)
        num_dropped = watched.vision_tokens["before"] - watched.vision_tokens["after"]
        eos = checkpoint.model.generation_config.eos_token_id
        is_complete = pieces.last in (eos if isinstance(eos, list) else [eos])
        emit(Finished(answer, pieces.num_prompt - num_dropped, pieces.num_written, is_complete))
