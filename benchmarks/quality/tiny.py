"""The tiny Molmo2 of the quality study: tokenizer, chat template, processor, geometry and initial weights.

python -m benchmarks.quality.tiny checkpoints/stts-molmo-tiny      # writes tokenizer and processor files
"""

import argparse
import math

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    Molmo2Config,
    Molmo2ForConditionalGeneration,
    Molmo2ImageProcessor,
    Molmo2Processor,
    Molmo2VideoProcessor,
    PreTrainedTokenizerFast,
)

from ..common import init_by_fan_in
from .scenes import COLORS, COUNTS, LANES, PLACES, QUESTIONS, SHAPES

VOCAB_SIZE = 512
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MULTIMODAL_TOKENS = (
    "<im_patch>",
    "<im_col>",
    "<im_start>",
    "<low_res_im_start>",
    "<frame_start>",
    "<im_end>",
    "<frame_end>",
    "<im_low>",
    "<|image|>",
    "<|video|>",
)
FRAME_SIZE, PATCH_SIZE, POOLING_SIZE = 36, 4, 3
TOKENS_PER_FRAME = (FRAME_SIZE // PATCH_SIZE // POOLING_SIZE) ** 2
NUM_FRAMES, MAX_FPS = 8, 2

# One turn: content parts may be a plain string; `{% generation %}` marks what the loss may see.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>' }}"
    "{% endgeneration %}"
    "{% else %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|image|>' }}"
    "{% elif part['type'] == 'video' %}{{ '<|video|>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>' }}"
    "{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

ENGLISH = (
    "The quick brown fox jumps over the lazy dog.",
    "She sells sea shells by the sea shore, and he looks at the clouds in the sky.",
    "Describe what happens in this video, and tell me what you see.",
    "A person walks into the room, picks up a book and sits down on a chair.",
    "There are many things that move, but some of them stay where they are.",
    "Is there anything else in the image? Yes, there is. No, there is not.",
    "When did this happen, before or after that one? It was during the other.",
    "They have been here for some time; nobody knows who made it or why.",
)


def corpus() -> list[str]:
    """Sentences the tokenizer is trained on: the study's questions and answers, some English, frame times."""
    names = (*SHAPES, "lamp", "ball", "star")
    things = [f"{name} {color} {name} top" for color in (*COLORS, "grey", "nothing") for name in names]
    answers = (*COLORS, *SHAPES, *LANES, *PLACES, *COUNTS)
    roles = ["user\n", "assistant\n", "system\n"]
    times = [f" {tick / 2:.1f} " for tick in range(40)]
    return (
        (
            [
                *QUESTIONS.values(),
                "What is where at",
                "What is seen at",
                *things,
                *(f"a {place}" for place in PLACES),
                *answers,
                *(f"a {answer}" for answer in answers),
            ]
            + roles
        )
        * 20
        + times
        + list(ENGLISH)
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of `VOCAB_SIZE` ids, followed by the ten multimodal ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"the corpus yields {tokenizer.get_vocab_size()} tokens instead of {VOCAB_SIZE}; add text")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in MULTIMODAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="left",
        model_max_length=4096,
        extra_special_tokens={"image_token": "<|image|>", "video_token": "<|video|>"},
    )


def build_processor() -> Molmo2Processor:
    """36 px frames of 9x9 patches, 3x3 pooled tokens a frame, at most 8 frames of 2 a second."""
    size = {"height": FRAME_SIZE, "width": FRAME_SIZE}
    image_processor = Molmo2ImageProcessor(
        size=size, patch_size=PATCH_SIZE, pooling_size=[2, 2], overlap_margins=[1, 1], max_crops=4
    )
    video_processor = Molmo2VideoProcessor(
        size=size,
        patch_size=PATCH_SIZE,
        pooling_size=[POOLING_SIZE, POOLING_SIZE],
        do_rescale=True,
        do_normalize=True,
        num_frames=NUM_FRAMES,
        max_fps=MAX_FPS,
    )
    return Molmo2Processor(image_processor, video_processor, build_tokenizer(), chat_template=CHAT_TEMPLATE)


def build_config(tokenizer: PreTrainedTokenizerFast) -> Molmo2Config:
    """Geometry: ViT 7 layers of 48, adapter on layers 6 and 5, language model 3 layers of 96."""
    ids = dict(zip(MULTIMODAL_TOKENS, tokenizer.convert_tokens_to_ids(list(MULTIMODAL_TOKENS)), strict=True))
    return Molmo2Config(
        vision_config={
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 7,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "head_dim": 16,
            "image_size": [FRAME_SIZE, FRAME_SIZE],
            "patch_size": PATCH_SIZE,
        },
        adapter_config={
            "vision_feature_layer": [6, 5],
            "hidden_size": 48,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "head_dim": 16,
            "intermediate_size": 128,
            "text_hidden_size": 96,
        },
        text_config={
            "hidden_size": 96,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 24,
            "vocab_size": VOCAB_SIZE,
            "additional_vocab_size": len(MULTIMODAL_TOKENS),
            "num_hidden_layers": 3,
            "intermediate_size": 288,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
        },
        image_start_token_id=ids["<im_start>"],
        low_res_image_start_token_id=ids["<low_res_im_start>"],
        image_end_token_id=ids["<im_end>"],
        image_patch_id=ids["<im_patch>"],
        frame_start_token_id=ids["<frame_start>"],
        frame_end_token_id=ids["<frame_end>"],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def grid_positions(side: int, width: int) -> torch.Tensor:
    """
    Sines and cosines of row and column, (side * side, width), with periods from a half to four times the grid.

    The slow ones survive averaging over a block: white noise in their place left a block's whereabouts hardly readable
    behind the adapter.
    """
    periods = torch.logspace(math.log2(side / 2), math.log2(4 * side), width // 4, base=2)
    angles = torch.arange(side)[:, None] * 2 * math.pi / periods
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


@torch.no_grad()
def init_weights_by_fan_in(model: nn.Module) -> None:
    """
    Linear weights ~ N(0, 1 / fan_in), biases 0, embeddings ~ N(0, 0.25), patch positions of `grid_positions`.

    The adapter's output starts as small as an embedding: nothing normalises it, and beside a vision token of many times
    that size what the language model's layers add to it is lost.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            init_by_fan_in(module)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
    model.model.multi_modal_projector.image_projector.down_proj.weight.mul_(0.1)
    positions = model.model.vision_tower.positional_embedding
    positions.copy_(grid_positions(FRAME_SIZE // PATCH_SIZE, positions.shape[1]))


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Molmo2ForConditionalGeneration:
    """A freshly initialised native Molmo2 in the tiny geometry."""
    torch.manual_seed(seed)
    model = Molmo2ForConditionalGeneration(build_config(tokenizer))
    init_weights_by_fan_in(model)
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    build_processor().save_pretrained(parser.parse_args().folder)
