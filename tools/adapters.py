"""Fine-tuning in little memory: low-rank adapters (LoRA) beside frozen weights, and these in four bits (QLoRA).

The extra `lora` installs what this needs.
"""

import os

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig

from ..modeling_stts_molmo import STTSMolmoForConditionalGeneration

TARGETS = r".*language_model\.layers\..*_proj"  # a plain "q_proj" would take in the vision tower and the scorer
# What stays as it is, by its path from the top: "vision_tower" alone is the name of nothing.
KEPT_WHOLE = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]


def four_bit_language_model() -> BitsAndBytesConfig:
    """A `quantization_config` for `from_pretrained`: the language model in four bits, and nothing else."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=KEPT_WHOLE,
    )


def check_quantized(model: STTSMolmoForConditionalGeneration) -> None:
    """
    Raises:
        ValueError: something that sees pixels or scores was quantized, whose small differences choose the tokens, or
            nothing was.
    """
    parts = (
        ("model.vision_tower", model.model.vision_tower),
        ("model.multi_modal_projector", model.model.multi_modal_projector),
    )
    for path, part in parts:
        for name, module in part.named_modules():
            if is_quantized(module):
                raise ValueError(
                    f"{path}.{name} was quantized; skip what is not the language model: {KEPT_WHOLE}, by these names "
                    "(llm_int8_skip_modules of BitsAndBytesConfig, modules_to_not_convert of TorchAoConfig)."
                )
    if not any(map(is_quantized, model.model.language_model.modules())):
        raise ValueError("No layer of the language model was quantized; its layers must not be skipped.")


def is_quantized(module: nn.Module) -> bool:
    """Whether a layer's weights are no plain numbers, but packed bytes or a tensor of a class of its own."""
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or weight is None:
        return False
    return not weight.is_floating_point() or type(weight.data) is not torch.Tensor


def add_adapters(model: STTSMolmoForConditionalGeneration, rank: int = 16) -> PeftModel:
    """
    Freeze the model but for adapters in the language model and the token scorer, which is trained in full, in float32.

    Raises:
        ValueError: it was quantized where it must not be; see [`check_quantized`].
    """
    if getattr(model, "is_quantized", False):
        check_quantized(model)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, modules_to_save=["token_scorer"])
    adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # small steps are lost on bfloat16 weights
    return adapted


def merge_adapters(
    model: STTSMolmoForConditionalGeneration, adapter: str | os.PathLike
) -> STTSMolmoForConditionalGeneration:
    """
    The model with what `adapter`, a folder that `save_pretrained` wrote, has learned, as weights of its own.

    Args:
        model: what was trained, not quantized: four bits cannot hold what is added.
    """
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
