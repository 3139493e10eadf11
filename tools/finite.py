"""What to do about numbers that are none: notice them in an answer, and find where they come from."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers import BatchFeature, LogitsProcessor


class NotFiniteError(ArithmeticError):
    """The model's logits are NaN or infinite: whatever it writes means nothing."""


class RequireFinite(LogitsProcessor):
    """
    Raises a [`NotFiniteError`] at the first token that NaN or infinity would choose. Other processors may forbid tokens
    by `-inf` before it, so it is the highest logit that counts.
    """

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if not scores.amax(-1).isfinite().all():
            raise NotFiniteError
        return scores


@contextlib.contextmanager
def explained_not_finite(model: nn.Module, make_inputs: Callable[[], BatchFeature], **pruning) -> Iterator[None]:
    """Say, as a `ValueError`, where the numbers come from that [`RequireFinite`] found; see [`find_not_finite`]."""
    try:
        yield
    except NotFiniteError as error:
        raise ValueError(f"The model has no answer: {find_not_finite(model, make_inputs(), **pruning)}") from error


@torch.no_grad()
def find_not_finite(model: nn.Module, inputs: BatchFeature, **pruning) -> str:
    """
    Where NaN or infinity comes in: the first of the model's weights, of its inputs, or of the outputs of its modules in
    one forward pass, and what to do about it.

    Args:
        inputs: of `model`, on its device.
        pruning: the options that the answer was wanted with.
    """
    for name, weight in model.state_dict().items():
        if not weight.isfinite().all():
            return f"the weight {name} is not finite ({describe(weight)}); fetch or train the checkpoint again."
    for name, value in inputs.items():
        if torch.is_tensor(value) and not value.isfinite().all():
            return (
                f"the input {name} is not finite ({describe(value)}); look at the frames, and at image_mean and "
                "image_std of the processor."
            )
    found: list[str] = []

    def look(name: str):
        def hook(module, args, output):
            bad = next((value for value in tensors_of(output) if not value.isfinite().all()), None)
            if bad is not None and not found:
                found.append(f"the output of {name} ({describe(bad)})")

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        model(**inputs, **pruning)
    finally:
        for handle in handles:
            handle.remove()
    where = found[0] if found else "the state of its text"
    return (
        f"{where} is the first that is not finite, of finite weights and inputs: numbers grow beyond what "
        f"{str(model.dtype).removeprefix('torch.')} holds. Use --dtype bfloat16 or --dtype float32."
    )


def tensors_of(output) -> Iterator[torch.Tensor]:
    """The tensors of numbers in what a module returns."""
    if torch.is_tensor(output):
        if output.is_floating_point():
            yield output
    elif isinstance(output, (list, tuple)):
        for part in output:
            yield from tensors_of(part)
    elif isinstance(output, dict):
        yield from tensors_of(list(output.values()))


def describe(tensor: torch.Tensor) -> str:
    """`3 of 96 numbers are NaN`, or infinite."""
    num_nan = int(tensor.isnan().sum())
    count, kind = (num_nan, "NaN") if num_nan else (int(tensor.isinf().sum()), "infinite")
    return f"{count:,} of {tensor.numel():,} numbers are {kind}"
