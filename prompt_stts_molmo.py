"""A prompt that lost tokens, and the caller's view of it: which positions survive and where they go, what a cache
remembers of that, and what stands between `generate` on the short prompt and a caller who knows the full one.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache
from transformers.generation import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

# ----------------------------------------------------------------------------------------------------------------------
# Which positions survive, and where they go
# ----------------------------------------------------------------------------------------------------------------------


class Compaction(NamedTuple):
    """
    Where the surviving positions of a batch of sequences go.

    input_keep_mask: bool `(batch, length)`, positions that the LLM runs on.
    positions: int64 `(batch, compact_length)`, the input position behind each compact one.
    mask: bool `(batch, compact_length)`, False for padding.
    is_padded: whether `mask` has any padding.
    """

    input_keep_mask: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    is_padded: bool

    @property
    def length(self) -> int:
        """Of the full sequences."""
        return self.input_keep_mask.shape[1]

    def compact(self, values: torch.Tensor, padding: int = 0) -> torch.Tensor:
        """`(batch, length, ...)` -> `(batch, compact_length, ...)`."""
        trailing = (None,) * (values.ndim - 2)
        index = self.positions[(..., *trailing)].expand(-1, -1, *values.shape[2:])
        return values.gather(1, index).masked_fill(~self.mask[(..., *trailing)], padding)

    def restore(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, compact_length, C)` -> `(batch, length, C)`, zeros where the LLM did not run."""
        # A model spread over devices may end on another one than it began on.
        positions, mask = (x.to(hidden_states.device)[..., None] for x in (self.positions, self.mask))
        restored = hidden_states.new_zeros(len(hidden_states), self.length, hidden_states.shape[-1])
        return restored.scatter(1, positions.expand_as(hidden_states), hidden_states.masked_fill(~mask, 0))

    def compact_prefix(self, values: torch.Tensor, padding: int = 0) -> torch.Tensor:
        """`(batch, length + n)` -> `(batch, compact_length + n)`: what came after the prompt stays as it is."""
        compact = self.compact(values[:, : self.length], padding)
        return torch.cat([compact, values[:, self.length :]], dim=1)

    def after(self, prefix_length: int) -> "Compaction":
        """The same behind `prefix_length` positions that a cache holds already."""
        rows = len(self.positions)
        prefix = torch.arange(prefix_length, device=self.positions.device).expand(rows, -1)
        ones = torch.ones_like(prefix, dtype=torch.bool)
        return Compaction(
            torch.cat([ones, self.input_keep_mask], dim=1),
            torch.cat([prefix, self.positions + prefix_length], dim=1),
            torch.cat([ones, self.mask], dim=1),
            self.is_padded,
        )

    def repeat(self, num_rows: int) -> "Compaction":
        """For a cache whose rows were repeated, each in place, for beams or several sequences a prompt."""
        repeats = num_rows // len(self.positions)
        tensors = (self.input_keep_mask, self.positions, self.mask)
        keep_mask, positions, mask = (x.repeat_interleave(repeats, dim=0) for x in tensors)
        return Compaction(keep_mask, positions, mask, self.is_padded)


def align_rows(input_keep_mask: torch.Tensor, lengths: Sequence[int], padding_side: str) -> Compaction:
    """
    Move the set positions of each row together, keeping their order, and pad on `padding_side`.

    Args:
        input_keep_mask: bool `(batch, length)`.
        lengths: set positions of each row, so that no size has to come from the device.

    >>> align_rows(torch.tensor([[True, False, True], [True, True, True]]), [2, 3], "left").positions
    tensor([[1, 0, 2],
            [0, 1, 2]])
    """
    compact_length = max(lengths)
    order = input_keep_mask.to(torch.int8).argsort(dim=1, descending=padding_side == "right", stable=True)
    positions = order[:, :compact_length] if padding_side == "right" else order[:, -compact_length:]
    mask = input_keep_mask.gather(1, positions)
    return Compaction(input_keep_mask, positions, mask, is_padded=min(lengths) < compact_length)


def plan_compaction(
    placeholders: torch.Tensor,
    keep_mask: torch.Tensor,
    attention_mask: torch.Tensor | None,
    padding_side: str | None = None,
) -> Compaction:
    """
    Which positions of a prompt survive: all that are attended to but the placeholders of dropped tokens.

    Args:
        placeholders: bool `(batch, length)`, as many as there are pooled tokens.
        keep_mask: bool `(frames, P)` of all videos, in the order of their placeholders.
        attention_mask: `(batch, length)`, zero for padding.
        padding_side: where rows are padded; found out from `attention_mask` when not given.

    Raises:
        ValueError: the mask is not 2D, or hides placeholders, or their number is not that of the tokens.
    """
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask has {attention_mask.ndim} dimensions; pruning a video needs a 2D mask "
            "(batch, sequence), from which the mask of the shorter sequence is made."
        )
    attended = torch.ones_like(placeholders) if attention_mask is None else attention_mask.bool()
    # Each placeholder's token. Not `masked_scatter`: with too few tokens a GPU would fail before the check below.
    token = placeholders.flatten().cumsum(0).view_as(placeholders) - 1
    keep = keep_mask.to(placeholders.device).flatten()
    dropped = placeholders & ~keep[token.clamp(0, len(keep) - 1)]
    # One wait for the device: what the host must know to give every later tensor its size.
    hidden = placeholders & ~attended
    counts = [placeholders.sum(1), hidden.sum(1), attended.sum(1), dropped.sum(1), attended[:, 0], attended[:, -1]]
    num_placeholders, num_hidden, num_attended, num_dropped, first, last = torch.stack(counts).tolist()
    if sum(num_placeholders) != keep_mask.numel():
        raise ValueError(
            f"The prompt has {sum(num_placeholders)} <im_patch> placeholders, but the videos have "
            f"{keep_mask.numel()} pooled tokens; pass text and video through one call of the processor, "
            "without truncation."
        )
    if sum(num_hidden):
        raise ValueError(
            f"attention_mask hides {sum(num_hidden)} <im_patch> placeholders of videos; it may hide padding and text "
            "only. To see less of a video, pass fewer frames or a higher prune_ratio."
        )
    lengths = [a - d for a, d in zip(num_attended, num_dropped, strict=True)]
    if padding_side is None:
        padding_side = "left" if not all(first) and all(last) else "right"
    return align_rows(attended & ~dropped, lengths, padding_side)


def compact_inputs(
    inputs: dict[str, torch.Tensor | None], compaction: Compaction, pad_token_id: int
) -> dict[str, torch.Tensor | None]:
    """
    Drop the same positions from every aligned tensor `(batch, length)`; positions stay consecutive.

    Rows that came without a mask, but with positions, may hold several packed samples, which Transformers tells apart
    only where there is no mask. They get none: what pads them is at position 0 again, a sample of its own that no other
    sees.

    Args:
        inputs: `input_ids` or `inputs_embeds`, and any of `attention_mask`, `position_ids` and `mm_token_type_ids`; the
            others are `None`.
    """
    attention_mask, position_ids = inputs["attention_mask"], inputs["position_ids"]
    padding = {"input_ids": pad_token_id, "inputs_embeds": 0, "mm_token_type_ids": 0}
    compacted = dict.fromkeys(inputs)
    for name, fill in padding.items():
        value = inputs.get(name)
        if value is not None:
            compacted[name] = compaction.compact(value, fill)
    if attention_mask is not None or (compaction.is_padded and position_ids is None):
        dtype = torch.long if attention_mask is None else attention_mask.dtype
        compacted["attention_mask"] = compaction.mask.to(dtype)
    if position_ids is not None:
        dropped = ~compaction.input_keep_mask
        if attention_mask is not None:
            dropped &= attention_mask.bool()
        compacted["position_ids"] = compaction.compact(consecutive_positions(position_ids.expand_as(dropped), dropped))
    return compacted


def sample_starts(position_ids: torch.Tensor) -> torch.Tensor:
    """
    Where a packed sample begins, by Transformers' convention: wherever positions do not go on by one.

    >>> sample_starts(torch.tensor([[0, 1, 2, 0, 1]]))
    tensor([[ True, False, False,  True, False]])
    """
    return F.pad(position_ids.diff(dim=1) != 1, (1, 0), value=True)


def consecutive_positions(position_ids: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    """
    Position ids `(batch, length)` that close the gaps of `dropped` positions, each packed sample on its own.

    >>> consecutive_positions(torch.tensor([[0, 1, 2, 0, 1]]), torch.tensor([[False, True, False, False, False]]))
    tensor([[0, 0, 1, 0, 1]])
    """
    shift = dropped.cumsum(1)
    shift_before_sample = torch.where(sample_starts(position_ids), shift, 0).cummax(1).values
    return position_ids - (shift - shift_before_sample)


# ----------------------------------------------------------------------------------------------------------------------
# What a cache remembers
# ----------------------------------------------------------------------------------------------------------------------


def remember_prompt(cache: Cache | None, compaction: Compaction | None) -> None:
    """Let a cache that was filled from a compacted prompt carry it along, as `cache.stts_prompt`, for later turns."""
    if cache is not None:
        cache.stts_prompt = compaction  # type: ignore


def cached_prompt(cache: Cache | None) -> Compaction | None:
    """The compacted prompt that `cache` was filled from; one that was reset has none, and forgets that it had."""
    prompt = getattr(cache, "stts_prompt", None)
    if cache is not None and prompt is not None and not cache.get_seq_length():
        remember_prompt(cache, None)
        return None
    return prompt


def compact_cached(
    inputs: dict[str, torch.Tensor | None], cache: Cache | None, num_new: int
) -> dict[str, torch.Tensor | None]:
    """
    Tensors that speak of the user's whole sequence, for `num_new` tokens after a compacted prompt in `cache`: an
    `attention_mask` gets the cache's length, `position_ids` go on from the cache's. What fits the cache is from
    `generate`, which has done so already, and a mask that is not 2D is from compiled decoding.
    """
    attention_mask, position_ids = inputs["attention_mask"], inputs["position_ids"]
    if attention_mask is not None and attention_mask.ndim != 2:  # first: it must not be asked for the cache's length
        return inputs
    prompt = cached_prompt(cache)
    if cache is None or prompt is None:
        return inputs
    num_cached = cache.get_seq_length()
    if attention_mask is not None and attention_mask.shape[1] == num_cached + num_new:
        return inputs
    compacted = inputs.copy()
    num_kept = prompt.mask.sum(1, keepdim=True)
    num_before = prompt.length
    if attention_mask is not None:
        num_before = attention_mask[:, :num_before].sum(1, keepdim=True)
        compacted["attention_mask"] = prompt.compact_prefix(attention_mask)
    elif prompt.is_padded:
        num_after = num_cached + num_new - prompt.mask.shape[1]
        compacted["attention_mask"] = F.pad(prompt.mask, (0, num_after), value=True).long()
    if position_ids is not None:
        goes_on = position_ids[:, :1] == num_cached - prompt.mask.shape[1] + num_kept
        compacted["position_ids"] = torch.where(goes_on, position_ids, position_ids - (num_before - num_kept))
    return compacted


def resume_prompt(prompt: Compaction, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """
    The compact form of a mask over the whole conversation, `(batch, length + n)`, for `generate` with a cache that
    holds the prompt.

    Raises:
        ValueError: `input_ids` is not the whole conversation, or of another batch.
    """
    if len(input_ids) != len(prompt.mask):
        raise ValueError(
            f"input_ids has {len(input_ids)} rows, but past_key_values was filled with {len(prompt.mask)}."
        )
    if input_ids.shape[1] <= prompt.length:
        raise ValueError(
            f"input_ids has {input_ids.shape[1]} tokens, but past_key_values holds a prompt of {prompt.length}; pass "
            "the whole conversation, the prompt and what came after it."
        )
    return prompt.compact_prefix(torch.ones_like(input_ids) if attention_mask is None else attention_mask)


# ----------------------------------------------------------------------------------------------------------------------
# The caller's view
# ----------------------------------------------------------------------------------------------------------------------


class FullPromptView:
    """
    Stands between `generate` on a compacted prompt and a caller who knows the full one.

    Args:
        input_ids: int64 `(batch, length)`, what the caller passed; in a later turn more than the prompt.
        prompt: how its beginning was compacted.
        pad_token_id: what pads the compact ids.
    """

    def __init__(self, input_ids: torch.Tensor, prompt: Compaction, pad_token_id: int):
        self.input_ids = input_ids
        self.compact_ids = prompt.compact_prefix(input_ids, pad_token_id)
        self.num_dropped = input_ids.shape[1] - self.compact_ids.shape[1]

    def restore(self, sequences: torch.Tensor) -> torch.Tensor:
        """Put the full prompt in front of what follows the compact one, in `(batch * n, compact_length + new)`."""
        full = self.input_ids.repeat_interleave(len(sequences) // len(self.input_ids), dim=0)
        return torch.cat([full, sequences[:, self.compact_ids.shape[1] :]], dim=1)

    def wrap(self, logits_processor, stopping_criteria, prefix_allowed_tokens_fn, streamer) -> dict:
        """Let the caller's own callbacks see full sequences."""

        def on_full_ids(callback: Callable) -> Callable:
            return lambda input_ids, scores, **kwargs: callback(self.restore(input_ids), scores, **kwargs)

        def allowed_tokens(batch_id: int, sequence: torch.Tensor) -> list[int]:
            full = torch.cat([self.input_ids[batch_id], sequence[self.compact_ids.shape[1] :]])
            return prefix_allowed_tokens_fn(batch_id, full)

        return {
            "logits_processor": logits_processor and LogitsProcessorList(map(on_full_ids, logits_processor)),
            "stopping_criteria": stopping_criteria and StoppingCriteriaList(map(on_full_ids, stopping_criteria)),
            "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn and allowed_tokens,
            "streamer": streamer and FullPromptStreamer(streamer, self.input_ids),
        }


class FullPromptStreamer(BaseStreamer):
    """Hands the full prompt to `streamer` where `generate` puts the compact one: in its first call."""

    def __init__(self, streamer: BaseStreamer, input_ids: torch.Tensor):
        self.streamer = streamer
        self.pending_prompt = input_ids

    def put(self, value):
        if self.pending_prompt is not None:
            value, self.pending_prompt = self.pending_prompt.cpu(), None
        self.streamer.put(value)

    def end(self):
        self.streamer.end()
