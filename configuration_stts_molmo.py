"""Configuration of STTS (Spatio-Temporal Token Scoring) on Molmo2."""

from fractions import Fraction
from numbers import Integral, Real
from typing import NamedTuple

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, Molmo2Config
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

METHODS = ("scorer", "cosine", "random", "tome", "none")
SCORE_BIASES = ("log", "rescaled_log")
AUX_TARGETS = ("patches", "pooled")
AUTO_MAP = {
    "AutoConfig": "configuration_stts_molmo.STTSMolmoConfig",
    "AutoModel": "modeling_stts_molmo.STTSMolmoModel",
    "AutoModelForImageTextToText": "modeling_stts_molmo.STTSMolmoForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_stts_molmo.STTSMolmoForConditionalGeneration",
}

# How the language model is split over devices with `tp_plan="auto"`; vision tower and scorer are on each of them whole.
TEXT_TP_PLAN = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
    "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}


def is_remote_code(module_name: str) -> bool:
    """
    Whether a module is a checkpoint's copy of our code. The installed package registers its classes with the Auto
    classes, which then need no `trust_remote_code`; a copy must not, or trusting one checkpoint would trust all.
    """
    return module_name.startswith("transformers_modules.")


def validate_prune_ratio(prune_ratio: float) -> float:
    """Return `prune_ratio`, of Python or NumPy, if it lies in `[0, 1)`; raise a `ValueError` otherwise."""
    if not isinstance(prune_ratio, Real) or not 0 <= prune_ratio < 1:
        raise ValueError(
            f"prune_ratio={prune_ratio!r} must be a number in [0, 1): the share of a video's tokens to drop. "
            "Use 0 to keep every token, 0.5 to drop half of them; for no video at all leave the video out."
        )
    return float(str(prune_ratio))  # by its digits: float32's 0.3 is 0.3, not 0.30000001


def exact_ratio(prune_ratio: float) -> Fraction:
    """
    A ratio as the decimal it is written as, for counts: 0.7 of 7290 tokens are 5103, and 5102 in binary floats.

    Raises:
        ValueError: it is not in `[0, 1)`.
    """
    return Fraction(str(validate_prune_ratio(prune_ratio)))


def validate_max_vision_tokens(max_vision_tokens: int | None) -> int | None:
    """Return `max_vision_tokens` if it is `None` or a whole number from 1 on; raise a `ValueError` otherwise."""
    if max_vision_tokens is None:
        return None
    if not isinstance(max_vision_tokens, Integral) or isinstance(max_vision_tokens, bool) or max_vision_tokens < 1:
        raise ValueError(
            f"max_vision_tokens={max_vision_tokens!r} must be a whole number from 1 on: the most tokens that a video "
            "keeps. Leave it out to drop a share of them, by prune_ratio."
        )
    return int(max_vision_tokens)


def validate_method(method: str) -> str:
    """Return `method` if it names a pruner; raise a `ValueError` otherwise."""
    return _one_of("method", method, METHODS)


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}.")
    return value


def _at_least(name: str, value: float | None, least: int, hint: str) -> None:
    if value is not None and not value >= least:
        raise ValueError(f"{name}={value} must be {least} or more{hint}")


CHECKS = {
    "prune_layer": lambda value: _at_least("prune_layer", value, 0, ": it is a 0-based ViT layer index."),
    "prune_ratio": validate_prune_ratio,
    "max_vision_tokens": validate_max_vision_tokens,
    "pooling_size": lambda value: _at_least("pooling_size", value, 1, "; Molmo2 pools 3 x 3 patches."),
    "method": validate_method,
    "score_bias": lambda value: _one_of("score_bias", value, SCORE_BIASES),
    "aux_target": lambda value: _one_of("aux_target", value, AUX_TARGETS),
    "aux_loss_weight": lambda value: _at_least("aux_loss_weight", value, 0, "; 0 turns the loss off."),
    "scorer_hidden_size": lambda value: _at_least(
        "scorer_hidden_size", value, 1, ", or None for the ViT's intermediate_size."
    ),
    "scorer_hidden_act": lambda value: _one_of("scorer_hidden_act", value, tuple(ACT2FN)),
}


class Pruning(NamedTuple):
    """
    What is done to the videos of one call.

    method: who scores; `"none"` when nothing can be dropped.
    prune_ratio: share of a video's tokens to drop; 0 for `"none"`.
    max_vision_tokens: the most tokens that a video keeps, in place of the ratio; `None` where the ratio decides.
    """

    method: str
    prune_ratio: float
    max_vision_tokens: int | None = None


def validate_layers(config: "STTSMolmoConfig") -> None:
    """Raise a `ValueError` if `prune_layer` does not go with the ViT's layers or with those that the adapter reads."""
    num_layers = config.vision_config.num_hidden_layers
    prune_layer = config.stts_config.prune_layer
    if prune_layer + 2 >= num_layers:
        raise ValueError(
            f"prune_layer={prune_layer} needs at least two ViT layers after it (one that takes the scores as "
            f"bias, one that runs on the survivors), but the ViT has {num_layers} layers; "
            f"use prune_layer <= {num_layers - 3}."
        )
    for layer in config.adapter_config.vision_feature_layer:
        if layer % num_layers <= prune_layer + 1:
            raise ValueError(
                f"adapter_config.vision_feature_layer={config.adapter_config.vision_feature_layer} reads layer "
                f"{layer}, which is not after prune_layer + 1 = {prune_layer + 1}: its output still holds the "
                "tokens to be pruned. Lower prune_layer or read later layers."
            )


@strict
class STTSConfig(PreTrainedConfig):
    r"""
    The knobs of the token scorer and of pruning.

    Args:
        prune_layer (`int`, defaults to 3): 0-based ViT layer `l` after which tokens are scored. Scores bias the
            attention of layer `l + 1`, and layers from `l + 2` on see the survivors only (section 3, Figure 6).
        prune_ratio (`float`, defaults to 0.5): share `k` of a video's `T * P` pooled tokens to drop, in `[0, 1)`.
        max_vision_tokens (`int`, *optional*): the most tokens that a video keeps, at least those of one frame, in place
            of `prune_ratio`: each video loses what it has above that, a short one nothing.
        pooling_size (`int`, defaults to 3): side `w` of the `w x w` patches that share a score and become one
            LLM token.
        method (`str`, defaults to `"scorer"`): who scores. `"scorer"` is STTS; `"cosine"` the training-free
            neighbouring-frame similarity of section 5.1; `"random"` a seeded draw; `"tome"` merges tokens within each
            frame instead of dropping them (appendix C); `"none"` prunes nothing.
        score_bias (`str`, defaults to `"log"`): `"log"` is `log(score)` (section 3.2); `"rescaled_log"` first
            rescales the scores of each row of patches to `[exp(-2), 1]`, as the authors' public code does.
        refill_lone_frames (`bool`, defaults to `False`): give a frame that shares no first-fit-descending bin with
            another one of its video all its patches back as attention context, as the authors' code does. The tokens
            the LLM sees are the same.
        aux_target (`str`, defaults to `"pooled"`): what the auxiliary loss compares between neighbouring frames, a
            block's pooled feature (section 3.4) or its concatenated `"patches"` (authors' code). Pooled lost less
            in our study (docs/measurements.md).
        aux_loss_weight (`float`, defaults to 1.0): weight of the auxiliary loss; 0 is the paper's "no aux" row.
        scorer_hidden_size (`int`, *optional*): width of the scorer's two hidden layers; the ViT's
            `intermediate_size` when not given.
        scorer_hidden_act (`str`, defaults to `"silu"`): activation between the scorer's layers.
        seed (`int`, defaults to 0): seed of `method="random"`.
        use_kernels (`bool`, defaults to `False`): on a CUDA device pool blocks with the Triton op of `stts_kernels`,
            which needs that package and a C compiler. Off because its speed has not been measured yet.

    Raises:
        ValueError: a value is out of its range; the message names value, range and fix.
    """

    model_type = "stts"
    base_config_key = "stts_config"

    prune_layer: int = 3
    prune_ratio: float | int = 0.5
    max_vision_tokens: int | None = None
    pooling_size: int = 3
    method: str = "scorer"
    score_bias: str = "log"
    refill_lone_frames: bool = False
    aux_target: str = "pooled"
    aux_loss_weight: float | int = 1.0
    scorer_hidden_size: int | None = None
    scorer_hidden_act: str = "silu"
    seed: int = 0
    use_kernels: bool = False

    def __setattr__(self, name, value):
        # At each assignment, so that no config, of a loaded model either, holds what cannot be run or loaded again. Not
        # by the strict dataclass's own validators: these wrap a `ValueError` in an error of their own.
        if name in CHECKS:
            CHECKS[name](value)
        super().__setattr__(name, value)

    def to_dict(self) -> dict:
        own = {"model_type", "transformers_version", *type(self).__annotations__}  # no labels, no lengths of answers
        return {name: value for name, value in super().to_dict().items() if name in own}

    def pruning(
        self, prune_ratio: float | None = None, method: str | None = None, max_vision_tokens: int | None = None
    ) -> Pruning:
        """
        What a call prunes with: its own arguments, else what is configured. A ratio and a budget of tokens exclude each
        other, so that either of them as an argument replaces both of the configuration.

        Raises:
            ValueError: a value is out of range, or both a ratio and a budget are given.
        """
        if prune_ratio is not None and max_vision_tokens is not None:
            raise ValueError(
                f"prune_ratio={prune_ratio} and max_vision_tokens={max_vision_tokens} exclude each other; pass one."
            )
        method = validate_method(self.method if method is None else method)
        if prune_ratio is None and max_vision_tokens is None:
            prune_ratio, max_vision_tokens = self.prune_ratio, self.max_vision_tokens
        max_vision_tokens = validate_max_vision_tokens(max_vision_tokens)
        prune_ratio = validate_prune_ratio(0 if prune_ratio is None else prune_ratio)
        if method == "none" or (max_vision_tokens is None and prune_ratio == 0):
            return Pruning("none", 0.0)
        return Pruning(method, prune_ratio, max_vision_tokens)

    @classmethod
    def paper(cls, **overrides) -> "STTSConfig":
        """The method as the paper's text has it: log bias, similarity of pooled features."""
        return cls(**{"score_bias": "log", "aux_target": "pooled", **overrides})

    @classmethod
    def authors(cls, **overrides) -> "STTSConfig":
        """The method as the authors' public code has it; use it with weights that they trained."""
        preset = {
            "score_bias": "rescaled_log",
            "refill_lone_frames": True,
            "aux_target": "patches",
            "aux_loss_weight": 0.5,
        }
        return cls(**{**preset, **overrides})


@strict
class STTSMolmoConfig(Molmo2Config):
    r"""
    A [`Molmo2Config`] that carries an [`STTSConfig`].

    Args:
        stts_config (`STTSConfig` or `dict`, *optional*): knobs of scoring and pruning; defaults when not given. On
            a loaded model change its fields; another object in its place would reach only parts of the model.
            All other arguments are those of [`Molmo2Config`].

    Raises:
        ValueError: `prune_layer` leaves fewer than two ViT layers after it, or the adapter reads a layer whose
            output still holds the pruned tokens.

    Example:

    ```python
    >>> config = STTSMolmoConfig(stts_config={"prune_ratio": 0.3})
    >>> config.stts_config.prune_layer
    3
    ```
    """

    model_type = "stts_molmo"
    # `Trainer.predict` collects every other output and aligns it with the labels.
    keys_to_ignore_at_inference = [
        "past_key_values",
        "hidden_states",
        "attentions",
        "image_hidden_states",
        "aux_loss",
        "token_scores",
        "keep_mask",
        "input_keep_mask",
    ]

    sub_configs = {**Molmo2Config.sub_configs, "stts_config": STTSConfig}
    stts_config: dict | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs):
        # A `model_type: molmo2` config.json would otherwise override ours on the instance.
        kwargs.pop("model_type", None)
        if not isinstance(self.stts_config, PreTrainedConfig):
            self.stts_config = STTSConfig(**(self.stts_config or {}))
        super().__post_init__(**kwargs)
        self.text_config.base_model_tp_plan = TEXT_TP_PLAN
        # Saving adds one entry per class at most; a model class that several Auto classes load needs them all.
        self.auto_map = dict(AUTO_MAP)
        validate_layers(self)


STTSMolmoConfig.register_for_auto_class()

if not is_remote_code(__name__):
    AutoConfig.register(STTSMolmoConfig.model_type, STTSMolmoConfig)

__all__ = ["STTSConfig", "STTSMolmoConfig"]
