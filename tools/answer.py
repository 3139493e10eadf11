"""The one road from a video and a question to an answer; a video that was watched answers any number of them."""

from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from math import ceil, prod

import torch
from transformers import BatchFeature, DynamicCache
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from ..configuration_stts_molmo import Pruning
from ..prompt_stts_molmo import align_rows, cached_prompt, remember_prompt
from ..pruning_stts_molmo import num_kept_tokens
from .checkpoint import TRAIN_OR_COSINE, Checkpoint
from .console import stage, timed
from .finite import RequireFinite, explained_not_finite
from .video import Clip, encode_video, explained_out_of_memory, make_prompt, make_video_inputs, read_clip

MAX_NEW_TOKENS = 128


@dataclass(frozen=True)
class Answer:
    """
    An answer and what it cost: tokens of the video `{"before": ..., "after": ...}` pruning, seconds of each step.

    `prune_ratio` is what pruned; where a budget of `max_vision_tokens` did, the ratio that drops as many tokens.
    """

    answer: str
    frames: int
    method: str
    prune_ratio: float
    max_vision_tokens: int | None
    vision_tokens: dict[str, int]
    seconds: dict[str, float]

    def figures(self) -> str:
        """One line of them."""
        before, after = self.vision_tokens["before"], self.vision_tokens["after"]
        budget = "" if self.max_vision_tokens is None else f", at most {self.max_vision_tokens} tokens"
        seconds = ", ".join(f"{name} {value:.2f}" for name, value in self.seconds.items())
        return (
            f"{self.frames} frame{'' if self.frames == 1 else 's'}, vision tokens {before} -> {after} "
            f"(method {self.method}{budget}, prune ratio {self.prune_ratio:g}), seconds: {seconds}"
        )


class WatchedVideo:
    """
    A video that was decoded, encoded and pruned, for any number of questions, each of which costs the LLM's time alone.
    What one prompt and the next begin with, the video above all, the LLM reads once.

    Args:
        checkpoint: loaded when it is first used.
        video: anything that the processor takes: a path, a URL, bytes, an array; or a clip that was read before.
        prune_ratio, method, max_vision_tokens, num_frames: the checkpoint's own when not given.
        test_time_scaling: spend what pruning saves on more frames (section 5.3).
        allow_untrained: let a scorer choose that was never trained.

    Raises:
        OSError: there is no such video or checkpoint.
        ValueError: video, checkpoint or an option is not usable; the message says what to do.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        video,
        *,
        prune_ratio: float | None = None,
        method: str | None = None,
        max_vision_tokens: int | None = None,
        num_frames: int | None = None,
        test_time_scaling: bool = False,
        allow_untrained: bool = False,
    ):
        self.checkpoint = checkpoint
        self._options = checkpoint.find_pruning(prune_ratio, method, max_vision_tokens)
        self.pruning = checkpoint.config.stts_config.pruning(**self._options)
        saving = {name: self._options[name] for name in ("prune_ratio", "max_vision_tokens")}
        if self.pruning.method == "none":
            saving = {"prune_ratio": 0.0}
        self._seconds: dict[str, float] = {}  # which the next answer counts
        with timed("load", self._seconds):
            processor = checkpoint.processor
        if isinstance(video, Clip):
            self.clip = video
        else:
            with stage("decode", self._seconds):
                self.clip = read_clip(
                    processor, video, num_frames=num_frames, test_time_scaling=test_time_scaling, **saving
                )
        with stage("preprocess", self._seconds):
            inputs = make_video_inputs(processor, self.clip, checkpoint.device)
        with timed("load", self._seconds):
            model = checkpoint.model
        if not allow_untrained:
            require_trained(checkpoint, self.pruning)
        with explained_out_of_memory(self.clip, checkpoint.device), stage("encode", self._seconds):
            self.features = encode_video(model, inputs, **self._options)
            num_kept = int(self.features.keep_mask.sum())
        self.vision_tokens = {"before": self.features.keep_mask.numel(), "after": num_kept}
        self._read: torch.Tensor | None = None  # (length,), what the LLM has read, and
        self._cache: Cache | None = None  # what it remembers of that

    def answer(
        self,
        chat: str | list[dict],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        streamer: BaseStreamer | None = None,
        **generation,
    ) -> Answer:
        """
        Answer a question, or the last one of a chat.

        Args:
            chat: a question, or messages of which one has the part `{"type": "video"}`, as [`ask_about`] makes one.
            max_new_tokens: longest answer, in tokens.
            streamer: is given the prompt's tokens and then each of the answer's.
            generation: other arguments of `generate`.

        Raises:
            ValueError: the question is empty, or the model computes NaN or infinity; the message says what to do.
        """
        if isinstance(chat, str):
            chat = [ask_about(chat)]
        checkpoint, model, processor = self.checkpoint, self.checkpoint.model, self.checkpoint.processor
        seconds, self._seconds = self._seconds, {}
        with stage("preprocess", seconds):
            prompt = make_prompt(processor, self.clip, chat).to(checkpoint.device)
        length = prompt["input_ids"].shape[1]
        all_inputs = partial(self._all_inputs, prompt)
        show = stage if streamer is None else timed  # a spinner and what streams would be in each other's way
        with (
            explained_out_of_memory(self.clip, checkpoint.device),
            explained_not_finite(model, all_inputs, **self._options),
            show("generate", seconds),
        ):
            output = model.generate(
                **prompt,
                **self._what_is_known(prompt["input_ids"][0]),
                max_new_tokens=max_new_tokens,
                logits_processor=[RequireFinite()],
                streamer=streamer,
                **generation,
                return_dict_in_generate=True,
            )
            answer = processor.decode(output.sequences[0, length:], skip_special_tokens=True)
        self._read, self._cache = output.sequences[0], output.past_key_values
        return Answer(
            answer=answer.strip(),
            frames=len(self.clip.frames),
            method=self.pruning.method,
            prune_ratio=self.prune_ratio,
            max_vision_tokens=self.pruning.max_vision_tokens,
            vision_tokens=self.vision_tokens,
            seconds={name: round(value, 3) for name, value in seconds.items()},
        )

    def forget(self) -> None:
        """Let the next answer depend on none before it, not even by rounding: the LLM reads the video anew."""
        self._read = self._cache = None

    @property
    def prune_ratio(self) -> float:
        """The ratio that pruned, or that drops as many tokens as the budget did."""
        if self.pruning.max_vision_tokens is None:
            return self.pruning.prune_ratio
        return ratio_of(**self.vision_tokens)

    def _all_inputs(self, prompt: BatchFeature) -> BatchFeature:
        """`prompt` with the pixels, which are not held."""
        inputs = make_video_inputs(self.checkpoint.processor, self.clip, self.checkpoint.device)
        return BatchFeature({**prompt, **inputs})

    def _what_is_known(self, input_ids: torch.Tensor) -> dict:
        """
        What `generate` need not compute of `input_ids`, `(length,)`: the part that it has in common with what the LLM
        has read, where that holds the whole video; else the video's tokens.
        """
        video = {"mm_encoder_outputs": {"video": self.features}}
        if self._read is None or not can_crop(self._cache):
            return video
        num_common = common_prefix(self._read, input_ids[:-1])
        is_vision = self.checkpoint.processor.tokenizer.convert_tokens_to_ids("<im_patch>") == input_ids
        if is_vision[num_common:].any():
            return video
        crop_cache(self._cache, num_common)
        return {"past_key_values": self._cache}


def answer_question(
    checkpoint: Checkpoint,
    video,
    question: str,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    **options,
) -> Answer:
    """
    Answer a question about a video. For many videos pass the same `checkpoint`, which is loaded once; for many
    questions about one use [`WatchedVideo`], whose `options` and errors are those of this function.
    """
    message = ask_about(question)
    return WatchedVideo(checkpoint, video, **options).answer([message], max_new_tokens=max_new_tokens)


def require_usable(
    checkpoint: Checkpoint,
    *,
    num_frames: int | None = None,
    test_time_scaling: bool = False,
    allow_untrained: bool = False,
    max_new_tokens: int = MAX_NEW_TOKENS,
    **pruning,
) -> None:
    """
    Load a checkpoint and raise what [`WatchedVideo`] would raise of any video: to be called before many are watched.
    """
    pruning = checkpoint.find_pruning(**pruning)
    found = checkpoint.config.stts_config.pruning(**pruning)
    video_processor = checkpoint.processor.video_processor
    num_kept_tokens(1, prod(video_processor.grid), found.prune_ratio, found.max_vision_tokens)
    if test_time_scaling:
        video_processor.scaled_cap(num_frames, pruning["prune_ratio"], pruning["max_vision_tokens"])
    if not allow_untrained:
        require_trained(checkpoint, found)


def require_trained(checkpoint: Checkpoint, pruning: Pruning) -> None:
    """Raise a `ValueError` where a scorer that was never trained would choose."""
    if pruning.method == "scorer" and checkpoint.model.has_untrained_scorer():
        raise ValueError(
            f"The token scorer of {checkpoint.path} is not trained: it would drop tokens at random. {TRAIN_OR_COSINE} "
            "To use it as it is, pass --allow-untrained."
        )


def ask_about(question: str) -> dict:
    """The message that asks `question` about a video; a `ValueError` if it asks nothing."""
    if not question.strip():
        raise ValueError(f"The question {question!r} is empty; ask something.")
    return {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}


def ratio_of(before: int, after: int) -> float:
    """
    The prune ratio that leaves `after` of `before` tokens: of six digits, and of more where a video is that long.

    >>> ratio_of(before=63, after=32)
    0.492064
    """
    scale = 10 ** max(6, len(str(before)))
    return float(Fraction(ceil(Fraction(scale * (before - after), before)), scale))


def common_prefix(first: torch.Tensor, second: torch.Tensor) -> int:
    """How many tokens two sequences `(length,)` begin with alike."""
    length = min(len(first), len(second))
    differs = (first[:length] != second[:length]).nonzero()
    return int(differs[0]) if len(differs) else length


def can_crop(cache: Cache | None) -> bool:
    """Whether a cache holds one sequence, and can forget its end: not so after a beam search."""
    return isinstance(cache, DynamicCache) and cache.layers[0].keys.shape[0] == 1


def crop_cache(cache: Cache, length: int) -> None:
    """Let a cache of one sequence forget all but the first `length` tokens of it, dropped ones included."""
    prompt = cached_prompt(cache)
    num_dropped = 0 if prompt is None else prompt.length - prompt.mask.shape[1]
    cache.crop(min(length - num_dropped - cache.get_seq_length(), 0))
    if prompt is not None and length < prompt.length:
        keep_mask = prompt.input_keep_mask[:, :length]
        remember_prompt(cache, align_rows(keep_mask, [length - num_dropped], "left"))
