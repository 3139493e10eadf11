"""A prompt that lost tokens, and the caller's view of it: where survivors go, what a cache remembers, and what stands
between `generate` on the short prompt and a caller who knows the full one.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache
from transformers.generation import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer


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

    def compact(self, values: torch.Tensor, padding: int = 0) -> torch.Tensor:
        """`(batch, length)` -> `(batch, compact_length)`."""
        return values.gather(1, self.positions).masked_fill(~self.mask, padding)

    def restore(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, compact_length, C)` -> `(batch, length, C)`, zeros where the LLM did not run."""
        batch_size, length = self.input_keep_mask.shape
        # A model spread over devices may end on another one than it began on.
        positions, mask = (x.to(hidden_states.device)[..., None] for x in (self.positions, self.mask))
        restored = hidden_states.new_zeros(batch_size, length, hidden_states.shape[-1])
        return restored.scatter(1, positions.expand_as(hidden_states), hidden_states.masked_fill(~mask, 0))


def plan_compaction(input_keep_mask: torch.Tensor, lengths: Sequence[int], padding_side: str) -> Compaction:
    """
    Move the set positions of each row together, keeping their order, and pad on `padding_side`.

    Args:
        input_keep_mask: bool `(batch, length)`.
        lengths: set positions of each row, so that no size has to come from the device.

    >>> plan_compaction(torch.tensor([[True, False, True], [True, True, True]]), [2, 3], "left").positions
    tensor([[1, 0, 2],
            [0, 1, 2]])
    """
    compact_length = max(lengths)
    order = input_keep_mask.to(torch.int8).argsort(dim=1, descending=padding_side == "right", stable=True)
    positions = order[:, :compact_length] if padding_side == "right" else order[:, -compact_length:]
    mask = input_keep_mask.gather(1, positions)
    return Compaction(input_keep_mask, positions, mask, is_padded=min(lengths) < compact_length)


def consecutive_positions(position_ids: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    """
    Position ids `(batch, length)` that close the gaps of `dropped` positions, each packed sample on its own.

    >>> consecutive_positions(torch.tensor([[0, 1, 2, 0, 1]]), torch.tensor([[False, True, False, False, False]]))
    tensor([[0, 0, 1, 0, 1]])
    """
    shift = dropped.cumsum(1)
    is_start = F.pad(position_ids.diff(dim=1) != 1, (1, 0), value=True)
    shift_before_sample = torch.where(is_start, shift, 0).cummax(1).values
    return position_ids - (shift - shift_before_sample)


class CompactPrompt(NamedTuple):
    """
    What a cache filled from a compacted prompt carries along (as `cache.stts_prompt`), for later turns.

    length: of the prompt as the user knows it.
    input_ids, attention_mask: int64 `(batch, compact_length)`.
    """

    length: int
    input_ids: torch.Tensor
    attention_mask: torch.Tensor

    def replace_prefix(self, values: torch.Tensor, compact: torch.Tensor) -> torch.Tensor:
        """Swap the prompt's part of `(batch, length + n)` for its compact form."""
        return torch.cat([compact.to(values.dtype), values[:, self.length :]], dim=1)

    def attend(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """The compact form of a mask over `input_ids`, `(batch, length + n)`."""
        if len(input_ids) != len(self.input_ids):
            raise ValueError(
                f"input_ids has {len(input_ids)} rows, but past_key_values was filled with {len(self.input_ids)}."
            )
        if input_ids.shape[1] <= self.length:
            raise ValueError(
                f"input_ids has {input_ids.shape[1]} tokens, but past_key_values holds a prompt of {self.length}; pass "
                "the whole conversation, the prompt and what came after it."
            )
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.replace_prefix(attention_mask, self.attention_mask)

    def repeat(self, num_rows: int) -> "CompactPrompt":
        """For a cache whose rows were repeated, each in place, for beams or several sequences a prompt."""
        repeats = num_rows // len(self.input_ids)
        return self._replace(
            input_ids=self.input_ids.repeat_interleave(repeats, dim=0),
            attention_mask=self.attention_mask.repeat_interleave(repeats, dim=0),
        )


def _cached_prompt(cache: Cache | None) -> CompactPrompt | None:
    """The compacted prompt that `cache` was filled from; one that was reset has none, and forgets that it had."""
    prompt = getattr(cache, "stts_prompt", None)
    if prompt is not None and not cache.get_seq_length():
        cache.stts_prompt = prompt = None
    return prompt


def _compact_cached_prompt(
    attention_mask: torch.Tensor | None, past_key_values: Cache | None, num_new: int
) -> torch.Tensor | None:
    """Give a mask over the user's whole sequence the length of a cache that holds a compacted prompt."""
    if attention_mask is None or attention_mask.ndim != 2:  # first: compiled decoding must not ask for the length
        return attention_mask
    prompt = _cached_prompt(past_key_values)
    if prompt is None:
        return attention_mask
    if attention_mask.shape[1] == past_key_values.get_seq_length() + num_new:  # `generate` did it already
        return attention_mask
    return prompt.replace_prefix(attention_mask, prompt.attention_mask)


def _remember_prompt(cache: Cache | None, compact_ids: torch.Tensor | None, compaction: Compaction):
    if cache is not None:
        cache.stts_prompt = CompactPrompt(compaction.input_keep_mask.shape[1], compact_ids, compaction.mask.long())


class FullPromptView:
    """
    Stands between `generate` on a compacted prompt and a caller who knows the full one.

    Args:
        input_ids: int64 `(batch, length)`, what the caller passed; in a later turn more than the prompt.
        prompt: the compacted part of it.
    """

    def __init__(self, input_ids: torch.Tensor, prompt: CompactPrompt):
        self.input_ids = input_ids
        self.compact_ids = prompt.replace_prefix(input_ids, prompt.input_ids)
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
