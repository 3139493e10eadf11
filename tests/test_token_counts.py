"""Tokens per instance of Table 6 (appendix B), counted by the real processor and model on the real 27 x 27 grid."""

import numpy as np
import pytest
import torch
from helpers import config_dict
from stts_molmo.configuration_stts_molmo import STTSMolmoConfig
from stts_molmo.modeling_stts_molmo import STTSMolmoForConditionalGeneration
from stts_molmo.processing_stts_molmo import STTSMolmoProcessor, STTSMolmoVideoProcessor
from stts_molmo.prompt_stts_molmo import plan_compaction
from stts_molmo.pruning_stts_molmo import num_kept_tokens
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import Molmo2ImageProcessor, PreTrainedTokenizerFast

SPECIAL_TOKENS = ["<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<frame_start>", "<im_end>"]
SPECIAL_TOKENS += ["<frame_end>", "<im_low>", "<|image|>", "<|video|>", "<|endoftext|>"]
TEXT_TOKENS = 2048  # "a maximum of 2048 text tokens" (section 4.3)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A token per character; on digits, points and spaces, as in timestamps, Qwen's tokenizer does the same."""
    vocabulary = {character: index for index, character in enumerate("0123456789. q")}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="q"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<|image|>", "video_token": "<|video|>"},
    )


@pytest.fixture(scope="module")
def processor():
    videos = STTSMolmoVideoProcessor(num_frames=256, do_rescale=True, do_normalize=True, return_metadata=True)
    return STTSMolmoProcessor(Molmo2ImageProcessor(), videos, character_tokenizer())


@pytest.fixture(scope="module")
def model(processor):
    config = config_dict(27, prune_ratio=0.5)
    one_head = {"num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 4}
    config["vision_config"] |= {"patch_size": 14, "image_size": [378, 378], **one_head}
    config["adapter_config"]["vision_feature_layer"] = [3]
    config["text_config"]["vocab_size"] = 13
    patch_id = processor.tokenizer.convert_tokens_to_ids("<im_patch>")
    return STTSMolmoForConditionalGeneration(STTSMolmoConfig(**config | {"image_patch_id": patch_id})).eval()


def process(processor, num_frames: int, num_videos: int, seconds_apart: float):
    """Long videos of which `num_frames` frames are taken, each with a question of `TEXT_TOKENS` tokens."""
    frames = np.random.default_rng(0).integers(0, 255, (num_frames, 28, 28, 3), dtype=np.uint8)
    metadata = {"fps": 1 / seconds_apart, "total_num_frames": num_frames}
    return processor(
        text=["<|video|>" + "q" * (TEXT_TOKENS - 1)] * num_videos,  # one of them is the token that begins the text
        videos=[frames] * num_videos,
        video_metadata=[metadata] * num_videos,
        do_sample_frames=False,
        return_tensors="pt",
    )


# How far apart frames lie decides how many digits their timestamps have: 35 and 139 minutes of video.
SETTINGS = {"128 frames (2 x 64)": (64, 2, 32.5), "256 frames (1 x 256)": (256, 1, 32.5)}
TABLE_6 = {
    "128 frames (2 x 64)": {0.0: 15670, 0.3: 12560, 0.4: 11524, 0.5: 10486},
    "256 frames (1 x 256)": {0.0: 25307, 0.3: 19087, 0.4: 17013, 0.5: 14939},
}


@torch.no_grad()
@pytest.mark.parametrize("setting", SETTINGS)
def test_tokens_per_instance_equal_table_6(setting, processor, model):
    num_frames, num_videos, seconds_apart = SETTINGS[setting]
    inputs = process(processor, num_frames, num_videos, seconds_apart)
    delimiters = {64: 603, 256: 2523}[num_frames]
    assert inputs["input_ids"].shape[1] == num_frames * 81 + delimiters + TEXT_TOKENS
    assert inputs["attention_mask"].sum() == TABLE_6[setting][0.0]
    videos = {n: inputs[n] for n in ("pixel_values_videos", "video_token_pooling", "video_grids")}
    for prune_ratio in (0.3, 0.4, 0.5) if num_frames == 64 else (0.5,):
        features = model.get_video_features(**videos, prune_ratio=prune_ratio)
        plan = plan_compaction(
            model.model.find_placeholders(inputs["input_ids"], None), features.keep_mask, inputs["attention_mask"]
        )
        assert plan.mask.sum() == TABLE_6[setting][prune_ratio]
        assert sum(len(video) for video in features.pooler_output) == features.keep_mask.sum()


@pytest.mark.parametrize("setting", SETTINGS)
def test_table_6_by_arithmetic(setting):
    num_frames, num_videos, _ = SETTINGS[setting]
    rest = TABLE_6[setting][0.0] - num_videos * num_frames * 81
    for prune_ratio, tokens in TABLE_6[setting].items():
        assert num_videos * num_kept_tokens(num_frames, 81, prune_ratio) + rest == tokens
