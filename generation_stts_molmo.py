"""`generate` with videos pruned: encode once, shorten the prompt once, and let the caller see the full one."""

import copy
import difflib
from collections.abc import Callable, Iterable, Sequence

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from .outputs_stts_molmo import PruningOutput, STTSMolmoVideoFeatures
from .prompt_stts_molmo import (
    Compaction,
    FullPromptView,
    cached_prompt,
    compact_inputs,
    plan_compaction,
    remember_prompt,
    resume_prompt,
)

logger = logging.get_logger(__name__)

PRUNING_OPTIONS = ("prune_ratio", "method", "max_vision_tokens")
VIDEO_INPUTS = ("pixel_values_videos", "video_token_pooling", "video_grids")


def check_media(pixel_values: torch.Tensor | None, pixel_values_videos: torch.Tensor | None):
    if pixel_values is not None and pixel_values_videos is not None:
        raise ValueError(
            "pixel_values and pixel_values_videos are provided at the same time; Molmo2 takes batches of images or of "
            "videos, not of both."
        )


def check_option_names(kwargs: dict) -> None:
    """Transformers' models take any keyword, and with it any misspelt option of ours, without a word."""
    for name in kwargs:
        for option in difflib.get_close_matches(name, PRUNING_OPTIONS, n=1, cutoff=0.75):
            raise TypeError(f"There is no argument {name!r}; did you mean {option!r}?")


def first_pruning(sources: Iterable[Sequence]) -> dict:
    """
    The pruning options of the first that has any. A method goes with any ratio or budget, which exclude each other.

    Args:
        sources: values of `PRUNING_OPTIONS`, the most particular first; `None` where one is not given.

    >>> first_pruning([(None, "cosine", None), (None, None, 100), (0.5, "scorer", None)])
    {'prune_ratio': None, 'method': 'cosine', 'max_vision_tokens': 100}
    """
    sources = list(sources)
    method = next((method for _, method, _ in sources if method is not None), None)
    limits = ((ratio, budget) for ratio, _, budget in sources if (ratio, budget) != (None, None))
    prune_ratio, max_vision_tokens = next(limits, (None, None))
    return {"prune_ratio": prune_ratio, "method": method, "max_vision_tokens": max_vision_tokens}


class PrunedGenerationMixin:
    """Goes before a class with `GenerationMixin`, and expects an [`STTSMolmoModel`] as `self.model`."""

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor=None,
        stopping_criteria=None,
        prefix_allowed_tokens_fn: Callable | None = None,
        synced_gpus: bool | None = None,
        assistant_model=None,
        streamer: BaseStreamer | None = None,
        prune_ratio: float | None = None,
        method: str | None = None,
        max_vision_tokens: int | None = None,
        **kwargs,
    ):
        """
        As `GenerationMixin.generate`, with videos pruned: each video is encoded once, the prompt is shortened once,
        and whatever the caller sees (returned ids, streamer, logits processors, stopping criteria, lengths) speaks of
        the full prompt. What `return_dict_in_generate` adds (`hidden_states`, `attentions`, `scores` and the cache) is
        of the short one.

        Args:
            prune_ratio, method, max_vision_tokens: see [`~STTSMolmoModel.get_video_features`]. When not given: those of
                the `generation_config` passed, of the model's, or of the checkpoint's `stts_config`, in this order.
                Without effect on a video that was encoded before and comes as `mm_encoder_outputs={"video": features}`.

        A cache that comes back from a call can be passed to the next turn together with the whole conversation's
        `input_ids` and `attention_mask`, without the pixels.
        """
        arguments = {"synced_gpus": synced_gpus, "assistant_model": assistant_model}
        callbacks = {
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
            "streamer": streamer,
        }
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        pixels = {name: kwargs.pop(name, None) for name in VIDEO_INPUTS}
        encoded = (kwargs.get("mm_encoder_outputs") or {}).get("video")
        prompt = cached_prompt(kwargs.get("past_key_values"))

        if pixels["pixel_values_videos"] is not None or isinstance(encoded, PruningOutput):
            check_media(kwargs.get("pixel_values"), pixels["pixel_values_videos"])
            self._check_video_prompt(input_ids, prompt, kwargs)
            pruning = self.find_pruning(generation_config, prune_ratio, method, max_vision_tokens)
            prompt = self._encode_and_compact(input_ids, pixels, pruning, generation_config, kwargs)
        elif prompt is not None:
            kwargs["attention_mask"] = resume_prompt(prompt, input_ids, kwargs.get("attention_mask"))

        if prompt is None:
            return super().generate(input_ids, generation_config, **arguments, **callbacks, **kwargs)

        view = FullPromptView(input_ids, prompt, self.model.pad_token_id)
        generation_config = self._translate_lengths(generation_config, kwargs, view.num_dropped)
        outputs = super().generate(view.compact_ids, generation_config, **arguments, **view.wrap(**callbacks), **kwargs)
        cache = kwargs.get("past_key_values")
        if isinstance(outputs, torch.Tensor):
            sequences = outputs = view.restore(outputs)
        else:
            sequences = outputs.sequences = view.restore(outputs.sequences)
            cache = outputs.get("past_key_values", cache)
        remember_prompt(cache, prompt.repeat(len(sequences)))
        return outputs

    def init_continuous_batching(self, *args, **kwargs):
        """Refused, and with it `generate_batch`, which goes this way: it takes token ids and no pixels."""
        raise NotImplementedError(
            "Continuous batching (generate_batch, init_continuous_batching) passes token ids alone, and would answer "
            "about a video without having seen it. Use generate() on a batch."
        )

    def _check_video_prompt(self, input_ids: torch.Tensor | None, prompt: Compaction | None, kwargs: dict) -> None:
        if prompt is not None:
            raise ValueError(
                "past_key_values already holds a video: pass the conversation's input_ids and attention_mask without "
                "pixel_values_videos, or start over without past_key_values."
            )
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "generate() with pixel_values_videos needs input_ids, and takes no inputs_embeds: it finds in "
                "input_ids where a video's tokens go, and which are to be dropped."
            )

    def find_pruning(
        self,
        generation_config: GenerationConfig | None = None,
        prune_ratio: float | None = None,
        method: str | None = None,
        max_vision_tokens: int | None = None,
    ) -> dict:
        """The pruning options: the arguments, else those of the config passed, else the model's own."""
        saved = [
            [getattr(config, name, None) for name in PRUNING_OPTIONS]
            for config in (generation_config, self.generation_config)
        ]
        return first_pruning([(prune_ratio, method, max_vision_tokens), *saved])

    def _encode_and_compact(
        self,
        input_ids: torch.Tensor,
        pixels: dict,
        pruning: dict,
        generation_config: GenerationConfig | None,
        kwargs: dict,
    ) -> Compaction | None:
        """
        Put a video's tokens in place of its pixels in `kwargs`, and leave the placeholders of dropped tokens out of the
        tensors there; `None` when nothing was dropped.
        """
        video = (kwargs.get("mm_encoder_outputs") or {}).get("video")
        if video is None:
            settings = self.config.stts_config.pruning(**pruning)
            if settings.method == "scorer" and self.has_untrained_scorer():
                logger.warning_once(
                    "The token scorer was never trained: which tokens it drops is chance. Train it "
                    '(examples/finetune.py), or pass method="cosine", which needs no training.'
                )
            video = self.model.get_video_features(**pixels, **pruning)
        if kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = self._infer_attention_mask(input_ids, generation_config, kwargs)
        # Not `video` itself: `generate` repeats its `pooler_output` in place for beams, and the features of all patches
        # would stay alive until the last token.
        tokens = STTSMolmoVideoFeatures(pooler_output=tuple(video.pooler_output), prompt_is_compact=video.is_pruned)
        kwargs["mm_encoder_outputs"] = {"video": tokens}
        if not video.is_pruned:
            return None
        placeholders = self.model.find_placeholders(input_ids, None)
        compaction = plan_compaction(placeholders, video.keep_mask, kwargs["attention_mask"], padding_side="left")
        aligned = {name: kwargs.get(name) for name in ("attention_mask", "position_ids", "mm_token_type_ids")}
        compact = compact_inputs({"input_ids": input_ids, **aligned}, compaction, self.model.pad_token_id)
        kwargs.update(compact, attention_mask=compaction.mask.long())
        del kwargs["input_ids"]
        return compaction

    def _translate_lengths(
        self, generation_config: GenerationConfig | None, kwargs: dict, num_dropped: int
    ) -> GenerationConfig | None:
        """`max_length` and `min_length` count the full prompt; make them count the short one, where they are given."""
        generation_config = copy.deepcopy(generation_config)
        for name in ("max_length", "min_length"):
            length = self._generation_setting(name, generation_config, kwargs)
            if length and (generation_config is None or name in kwargs):
                kwargs[name] = max(length - num_dropped, 0)
            elif length:
                setattr(generation_config, name, max(length - num_dropped, 0))
        return generation_config

    def _generation_setting(self, name: str, generation_config, kwargs: dict):
        """What `generate` takes for `name`: from its arguments, the config passed, or the model's own."""
        sources = (kwargs.get(name), getattr(generation_config, name, None), getattr(self.generation_config, name))
        return next((value for value in sources if value is not None), None)

    def _infer_attention_mask(self, input_ids: torch.Tensor, generation_config, kwargs: dict) -> torch.Tensor | None:
        """As `generate` does natively: padding is what no sequence ends with; `None` without padding."""
        pad, eos = (
            self._generation_setting(name, generation_config, kwargs) for name in ("pad_token_id", "eos_token_id")
        )
        is_eos = pad in eos if isinstance(eos, (list, tuple)) else pad == eos
        if pad is None or is_eos or not (input_ids == pad).any():
            return None
        return (input_ids != pad).long()
