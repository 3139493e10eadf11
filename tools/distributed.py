"""Training on many processes: what each of them must do in each step, sharding, and saving what was sharded."""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from transformers.models.molmo2.video_processing_molmo2 import arange_for_pooling

from ..configuration_stts_molmo import STTSMolmoConfig
from ..generation_stts_molmo import PRUNING_OPTIONS
from ..modeling_stts_molmo import STTSMolmoForConditionalGeneration, STTSMolmoModel

# What a forward takes of each kind, beginning with the pixels, and what encodes it.
MEDIA = {
    "image": (("pixel_values", "image_token_pooling", "image_grids"), STTSMolmoModel.get_image_features),
    "video": (("pixel_values_videos", "video_token_pooling", "video_grids"), STTSMolmoModel.get_video_features),
}
SHARDED = ("Molmo2DecoderLayer", "STTSMolmoVisionEncoderLayer")


def encode_in_step(model: nn.Module, images: bool = False) -> None:
    """
    Let every process run the vision tower and the scorer in every training step, whatever its batch holds.

    Without it a process whose batch has no video leaves them out: FSDP's other processes wait for it forever, and DDP
    needs `find_unused_parameters`. With it such a process encodes two blank frames, whose share in loss and gradients
    is exactly zero. Evaluation and generation stay as they are.

    Args:
        model: an STTS model, wrapped or not.
        images: whether there are batches of images too; then each process also encodes one image in each step.
    """
    core = next(module for module in model.modules() if isinstance(module, STTSMolmoModel))
    kinds = ("image", "video") if images else ("video",)
    blanks: list[torch.Tensor] = []

    def before(core, args, kwargs):
        blanks.clear()
        given = {kind for kind, ((pixels, *_), _) in MEDIA.items() if kwargs.get(pixels) is not None}
        if not core.training or len(given) == 2 or kwargs.get("mm_encoder_outputs") is not None:
            return None
        for kind in kinds:  # in the same order everywhere
            names, encode = MEDIA[kind]
            media = {name: kwargs.get(name) for name in names} if kind in given else blank_media(core.config, kind)
            options = {name: kwargs.get(name) for name in PRUNING_OPTIONS} if kind == "video" else {}
            features = encode(core, *(value.to(core.device) for value in media.values()), **options)
            if kind in given:
                kwargs = kwargs | dict.fromkeys(names) | {"mm_encoder_outputs": {kind: features}}
            else:
                scores = getattr(features, "token_scores", None)
                blanks.append(sum(tokens.sum() for tokens in features.pooler_output))
                blanks.extend([] if scores is None else [scores.sum()])
        return args, kwargs

    def after(core, args, outputs):
        if blanks:
            zero = 0.0 * sum(blank.to(outputs.last_hidden_state) for blank in blanks)
            outputs.last_hidden_state = outputs.last_hidden_state + zero
            blanks.clear()
        return outputs

    core.register_forward_pre_hook(before, with_kwargs=True)
    core.register_forward_hook(after)


def blank_media(config: STTSMolmoConfig, kind: str) -> dict[str, torch.Tensor]:
    """An image of one crop, or a video of two frames, all grey, as the processor would return it."""
    vision, window = config.vision_config, config.stts_config.pooling_size
    height, width = (side // vision.patch_size for side in vision.image_size)
    blocks, rows, columns = arange_for_pooling(torch.arange(height * width).view(height, width), window, window)
    blocks = torch.as_tensor(blocks).view(-1, window**2)
    frames = 2 if kind == "video" else 1
    pixels = torch.zeros(frames, height * width, vision.patch_size**2 * vision.num_channels)
    pooling = torch.cat([torch.where(blocks >= 0, blocks + t * height * width, blocks) for t in range(frames)])
    grids = torch.tensor([[frames, rows, columns] if kind == "video" else [rows, columns, 0, 0]])
    return dict(zip(MEDIA[kind][0], (pixels, pooling, grids), strict=True))


def shard(model: STTSMolmoForConditionalGeneration, mesh: DeviceMesh | None = None, **options) -> None:
    """
    Shard a model over processes with FSDP2, layer by layer, in place; before its optimizer is made.

    Args:
        mesh: of the processes; all of them when not given.
        options: further arguments of `fully_shard`, such as `mp_policy`.
    """
    for module in model.modules():
        if type(module).__name__ in SHARDED:
            fully_shard(module, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    register_fsdp_forward_method(model, "generate")  # which begins before `forward` does


def clip_gradients(model: nn.Module, max_norm: float) -> torch.Tensor:
    """
    Scale the gradients of a sharded model down to a norm of `max_norm`, as `torch.nn.utils.clip_grad_norm_` does, with
    the norm summed in float64: in float32 its last bits, and soon the losses, depend on who holds which shard.

    Returns:
        The norm before, float32 scalar, the same on all processes.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in parameters]
    norm = torch.linalg.vector_norm(torch.stack(norms)).full_tensor().float()
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def save_sharded(model: STTSMolmoForConditionalGeneration, folder: str | os.PathLike) -> None:
    """Write a sharded model as a checkpoint like any other; all processes must call it."""
    model.save_pretrained(folder, is_main_process=dist.get_rank() == 0)
    dist.barrier()
