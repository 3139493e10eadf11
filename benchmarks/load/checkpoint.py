"""A checkpoint of a preset's size, with random weights and the bundled tokenizer."""

from pathlib import Path

import torch
from stts_molmo import STTSMolmoConfig, STTSMolmoForConditionalGeneration, STTSMolmoProcessor

from ..common import TINY, init_by_fan_in
from ..speed.models import SEED

TOKENS = {
    "image_patch_id": "<im_patch>",
    "image_start_token_id": "<im_start>",
    "image_end_token_id": "<im_end>",
    "low_res_image_start_token_id": "<low_res_im_start>",
    "frame_start_token_id": "<frame_start>",
    "frame_end_token_id": "<frame_end>",
}


def write_checkpoint(config: dict, dtype: str, max_frames: int, folder: Path) -> None:
    """What `vllm serve` loads. Answers of such a model mean nothing; how long they take does not depend on that."""
    processor = STTSMolmoProcessor.from_pretrained(TINY)
    ids = {name: processor.tokenizer.convert_tokens_to_ids(token) for name, token in TOKENS.items()}
    model_config = STTSMolmoConfig(**{**config, **ids})
    vision = model_config.vision_config
    videos = processor.video_processor
    videos.size = {"height": vision.image_size[0], "width": vision.image_size[1]}
    videos.patch_size, videos.num_frames = vision.patch_size, max_frames
    torch.manual_seed(SEED)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = STTSMolmoForConditionalGeneration._from_config(model_config, dtype=getattr(torch, dtype))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            init_by_fan_in(module)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
