"""What calls return: Molmo2's outputs, with what was scored and kept."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.molmo2.modeling_molmo2 import Molmo2CausalLMOutputWithPast, Molmo2ModelOutputWithPast


@dataclass
class PruningOutput:
    """
    What every output tells of the pruning.

    Args:
        token_scores (`torch.FloatTensor` of shape `(frames, P)`): higher is kept longer; `None` when nothing scored.
        keep_mask (`torch.BoolTensor` of shape `(frames, P)`): which pooled tokens survive.
        aux_loss (`torch.FloatTensor`, scalar): auxiliary loss, unweighted; `None` unless the scorer scored.
    """

    token_scores: torch.Tensor | None = None
    keep_mask: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


@dataclass
class STTSMolmoVisionOutput(PruningOutput, BaseModelOutputWithPooling):
    """
    Args:
        last_hidden_state (`torch.Tensor` of shape `(1, tokens, D * len(feature_layers))`):
            Features of the patches that late layers saw, packed block by block.
        pooled_patches_idx (`torch.LongTensor` of shape `(kept, w * w)`):
            Where the patches of each surviving block are in `last_hidden_state`; -1 for slots outside the frame.
            `None` when every `w * w` patches in a row are a block.

    The other fields are those of [`PruningOutput`].
    """

    pooled_patches_idx: torch.Tensor | None = None


@dataclass
class STTSMolmoVideoFeatures(PruningOutput, BaseModelOutputWithPooling):
    """
    Args:
        pooler_output (`tuple[torch.Tensor]`): the surviving tokens of each video, `(kept, text_hidden_size)`.
        prompt_is_compact (`bool`): the prompt that comes with them has lost the placeholders of dropped tokens already.

    The other fields are those of [`PruningOutput`].
    """

    prompt_is_compact: bool | None = None

    @property
    def is_pruned(self) -> bool:
        """Whether a token was dropped whose placeholder the prompt still has."""
        return self.keep_mask is not None and sum(map(len, self.pooler_output)) < self.keep_mask.numel()


@dataclass
class STTSMolmoModelOutputWithPast(PruningOutput, Molmo2ModelOutputWithPast):
    r"""
    Args:
        input_keep_mask (`torch.BoolTensor` of shape `(batch, sequence)`, *optional*): input positions that went
            through the LLM; hidden states and logits are zeros elsewhere. `None` when nothing was dropped.

    The other fields are those of [`Molmo2ModelOutputWithPast`] and [`PruningOutput`].
    """

    input_keep_mask: torch.Tensor | None = None


@dataclass
class STTSMolmoCausalLMOutputWithPast(PruningOutput, Molmo2CausalLMOutputWithPast):
    r"""
    Args:
        loss (`torch.FloatTensor`, scalar, returned with labels): task loss, and in training the auxiliary loss times
            `aux_loss_weight` with it.
        input_keep_mask (`torch.BoolTensor` of shape `(batch, sequence)`, *optional*): as in
            [`STTSMolmoModelOutputWithPast`].

    The other fields are those of [`Molmo2CausalLMOutputWithPast`] and [`PruningOutput`].
    """

    input_keep_mask: torch.Tensor | None = None
