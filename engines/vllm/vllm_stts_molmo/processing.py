"""From a request's video to what the model is given: frames, options, and the tokens of the short prompt."""

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache

import numpy as np
import torch
from stts_molmo.configuration_stts_molmo import METHODS
from stts_molmo.processing_stts_molmo import STTSMolmoProcessor
from stts_molmo.pruning_stts_molmo import num_kept_tokens
from stts_molmo.video_stts_molmo import scaled_num_frames
from transformers import BatchFeature
from transformers.video_utils import VideoMetadata
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
)

from .options import RequestOptions, find_options
from .video import METADATA, VideoParser

LAST_SECOND = 99999.9  # of a video whose timestamps are as long as any


@lru_cache(maxsize=4)
def load_processor(model: str, revision: str | None) -> STTSMolmoProcessor:
    processor = STTSMolmoProcessor.from_pretrained(model, revision=revision)
    # vLLM reads files and links, within limits of its own; here a string is no name of a file.
    processor.video_processor.allow_local_files = False
    return processor


def pruned_ids(video_ids: Sequence[int], patch_id: int, num_dropped: int) -> list[int]:
    """
    The ids of a video that stand in the prompt. How many placeholders go is known before the video is encoded, which
    ones is not: these are the last. The model gives each position the embedding that belongs there.

    >>> pruned_ids([5, 9, 9, 6, 9, 9, 7], patch_id=9, num_dropped=2)
    [5, 9, 9, 6, 7]
    """
    num_left = sum(token == patch_id for token in video_ids) - num_dropped
    kept, seen = [], 0
    for token in video_ids:
        seen += token == patch_id
        if token != patch_id or seen <= num_left:
            kept.append(token)
    return kept


class VideoProcessingInfo(BaseProcessingInfo):
    def get_hf_processor(self, **kwargs: object) -> STTSMolmoProcessor:
        return load_processor(self.ctx.model_config.model, self.ctx.model_config.revision)

    def get_data_parser(self) -> VideoParser:
        return VideoParser(video_needs_metadata=True, expected_hidden_size=self._get_expected_hidden_size())

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"video": 1}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"video": min(self.max_video_tokens, seq_len)}

    @cached_property
    def max_video_tokens(self) -> int:
        """Of a video with as many frames as the engine's options allow, and none dropped."""
        sampling = self.options({}).sampling
        processor = self.get_hf_processor()
        num_frames = sampling.get("num_frames") or processor.video_processor.num_frames
        if "prune_ratio" in sampling:
            num_frames = scaled_num_frames(num_frames, sampling["prune_ratio"])
        grid = torch.tensor([num_frames, *processor.video_processor.grid])
        text = processor.get_video_string(grid, [LAST_SECOND] * num_frames)
        return len(processor.tokenizer(text, add_special_tokens=False).input_ids)

    @cached_property
    def generation_options(self) -> dict:
        return self.ctx.model_config.try_get_generation_config()

    def options(self, request: Mapping[str, object]) -> RequestOptions:
        engine = self.ctx.get_mm_config().mm_processor_kwargs or {}
        scales = self.get_hf_processor().video_processor.test_time_scaling
        return find_options(request, engine, self.generation_options, self.get_hf_config().stts_config, scales)


class DummyVideoBuilder(BaseDummyInputsBuilder[VideoProcessingInfo]):
    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return self.info.get_hf_processor().video_token * mm_counts.get("video", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options) -> dict:
        processor = self.info.get_hf_processor().video_processor
        rows, columns = processor.grid
        num_frames = min(processor.num_frames, max(seq_len // (rows * columns + 8), 1))
        frames = np.zeros((num_frames, processor.size["height"], processor.size["width"], 3), np.uint8)
        return {"video": [frames] * mm_counts.get("video", 0)}


class VideoProcessor(BaseMultiModalProcessor[VideoProcessingInfo]):
    """
    One video for each prompt, in place of its `<|video|>`.

    What the model gets of it, for `F` frames of `P` pooled tokens: `pixel_values_videos` `(F, N, C)`,
    `video_token_pooling` `(F * P, w * w)`, `video_grid` `(3,)`, `video_ids` `(length,)`, the tokens of the whole video,
    `is_vision` `(length,)`, and the numbers `num_kept` and `method`, an index of `METHODS`.
    """

    def _postprocess_prompt(self, prompt: list[int]) -> list[int]:
        tokenizer = self.info.get_hf_processor().tokenizer
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        return prompt if prompt and prompt[0] == first else [first, *prompt]

    def _apply_hf_processor_main(self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]) -> BatchFeature:
        options = self.info.options(hf_kwargs)
        processor = self.info.get_hf_processor()
        if "video" not in mm_items:
            return BatchFeature()
        ((frames, metadata),) = mm_items["video"]
        video, metadata = self._read(frames, metadata, options.sampling)
        inputs = processor(
            text=processor.video_token,
            videos=[video],
            video_metadata=[metadata],
            do_sample_frames=False,
            add_special_tokens=False,
            return_tensors="pt",
        )
        num_frames, rows, columns = inputs["video_grids"][0].tolist()
        method, *budget = options.pruning
        fields = {
            "pixel_values_videos": inputs["pixel_values_videos"],
            "video_token_pooling": inputs["video_token_pooling"],
            "video_grid": inputs["video_grids"][0],
            "video_ids": inputs["input_ids"][0, 1:],  # behind what begins every prompt
            "is_vision": inputs["mm_token_type_ids"][0, 1:] == 1,
            "num_kept": torch.tensor(num_kept_tokens(num_frames, rows * columns, *budget)),
            "method": torch.tensor(METHODS.index(method)),
        }
        return BatchFeature({name: value[None] for name, value in fields.items()})

    def _read(self, frames, metadata: Mapping, sampling: Mapping) -> tuple:
        """The frames that are asked for, of a file `(length,)` or of frames `(F, height, width, 3)`."""
        processor = self.info.get_hf_processor().video_processor
        if getattr(frames, "ndim", None) == 1:
            videos, metadata = processor.sample_videos([frames.tobytes()], **sampling)
        else:
            told = {name: metadata[name] for name in METADATA if name in metadata}
            given = VideoMetadata(**{"total_num_frames": len(frames), **told})
            do_sample_frames = metadata.get("do_sample_frames")
            videos, metadata = processor.sample_videos(
                [np.asarray(frames)], [given], do_sample_frames=do_sample_frames, **sampling
            )
        return videos[0], metadata[0]

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        on_cpu = ("video_grid", "num_kept", "method")
        return {name: MultiModalFieldConfig.batched("video", keep_on_cpu=name in on_cpu) for name in hf_inputs}

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        processor = self.info.get_hf_processor()
        patch_id = self.info.get_hf_config().image_patch_id

        def replacement(index: int) -> list[int]:
            video = {name: item.data for name, item in out_mm_kwargs["video"][index].items()}
            num_dropped = int(video["video_grid"].prod() - video["num_kept"])
            return pruned_ids(video["video_ids"].tolist(), patch_id, num_dropped)

        return [PromptReplacement("video", target=[processor.video_token_id], replacement=replacement)]
