"""Fine-tuning with the Transformers `Trainer`: batches of chats about videos, the paper's learning rates, logs."""

import itertools
import weakref
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import BatchFeature, PreTrainedConfig, ProcessorMixin, Trainer, TrainerCallback

from ..attention_stts_molmo import first_fit_descending
from ..pruning_stts_molmo import num_kept_tokens
from .prompts import render_prompt, texts_of

# Writes a chat that `split_at_answers` took apart, and tells the processor where its answers are.
ANSWERS_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}"
    "{% else %}{{ message.content[-1].text }}{% endif %}"
    "{% endfor %}"
)


def split_at_answers(messages: list[dict], processor: ProcessorMixin) -> list[dict]:
    """
    Render a chat's prompts, so that what is left for `ANSWERS_TEMPLATE` is to join them with the answers.

    Works with any chat template, also one without `{% generation %}` markers, and puts before the last answer exactly
    the prompt that `generate` would start from.

    Args:
        messages: chat whose last message is the assistant's; content parts whose value is `None` count as absent.
        processor: gives the chat template and the tokenizer.

    Returns:
        Messages of the user (images and videos of the whole chat in the first one, rendered text) and the assistant
        (answer and end-of-turn token) in turn.

    Raises:
        ValueError: the last message is not the assistant's, an answer contains a special token, or the chat template
            leaves an answer out.
    """
    role = messages[-1]["role"] if messages else None
    if role != "assistant":
        raise ValueError(
            f"A chat to train on must end with a message of role 'assistant', the answer; found {role!r} in {messages}."
        )
    messages = [{**message, "content": _content_parts(message["content"])} for message in messages]
    answers = ["".join(part["text"] for part in m["content"]) for m in messages if m["role"] == "assistant"]
    tokenizer = processor.tokenizer
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    for token in sorted(special | {processor.image_token, processor.video_token}):
        for answer in answers:
            if token in answer:
                raise ValueError(
                    f"The answer {answer!r} contains {token}, which is no text: it stands for a picture, or ends the "
                    "turn, and what follows would be learnt as if the model had to say it. Remove it."
                )

    hidden = unused_text(messages)
    turns = [
        {**m, "content": [{"type": "text", "text": hidden}]} if m["role"] == "assistant" else m for m in messages[:-1]
    ]
    prompts = render_prompt(processor, turns).split(hidden)
    if len(prompts) != len(answers):
        raise ValueError(
            f"The chat template writes {len(prompts) - 1} of {len(answers) - 1} earlier answers; to train on all of "
            "them use a template that keeps them, or make each answer the last of a chat of its own."
        )
    # Molmo2Processor adds the token where a template does not, which would shift the answers.
    start = tokenizer.bos_token or tokenizer.eos_token
    prompts[0] = start + prompts[0].removeprefix(start)

    visuals = [part for message in messages for part in message["content"] if part["type"] != "text"]
    chat = []
    for prompt, answer in zip(prompts, answers, strict=True):
        prompt = prompt.removeprefix(tokenizer.eos_token) if chat else prompt
        chat.append({"role": "user", "content": [*visuals, {"type": "text", "text": prompt}]})
        chat.append({"role": "assistant", "content": answer + tokenizer.eos_token})
        visuals = []
    return chat


def unused_text(messages: list[dict]) -> str:
    """A text that occurs nowhere in `messages`, to stand for an answer while a chat template is rendered."""
    written = "".join(texts_of(messages))
    return next(text for text in map("<answer {}>".format, itertools.count()) if text not in written)


def chat_of(example: dict) -> list[dict]:
    """The chat of a row; a `ValueError` that says what a row looks like where there is none."""
    if example.get("messages") is None:
        raise ValueError(
            f"A row has the columns {sorted(example)}, but no `messages`: a chat, which is what VideoQACollator reads. "
            'Make it {"messages": [{"role": "user", "content": [{"type": "video", "path": ...}, {"type": "text", '
            '"text": ...}]}, {"role": "assistant", "content": [{"type": "text", "text": ...}]}]}.'
        )
    return example["messages"]


def _content_parts(content: str | list[dict]) -> list[dict]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [{name: value for name, value in part.items() if value is not None} for part in content]


@dataclass
class VideoQACollator:
    r"""
    Turns chats about videos into a batch for training; pass it to a `Trainer` as `data_collator` together with
    `remove_unused_columns=False`.

    Args:
        processor: an [`STTSMolmoProcessor`], left as it is.
        processor_kwargs: further arguments of its calls, such as `{"num_frames": 32}`.
        max_length: pack the samples of a batch into rows of at most so many tokens, as the paper does (9686 of them).
            Tokens count that the language model runs on, after pruning: they are what its memory and time go by, and
            how many there will be is known before any score is.
        stts_config: the model's, which says how much is pruned; for `max_length` alone, and `None` for nothing pruned.

    Calling it with a list of examples `{"messages": [...]}`, each a chat that ends with the assistant's answer, gives
    what the processor returns, padded on the right, and `labels`: int64 `(batch, sequence)`, the ids of each answer of
    the assistant and of the token that ends it, -100 everywhere else. Chats with a video and without may be mixed.

    A content is a text or a list of parts. In a `datasets.Dataset`, whose columns have one type each, it is a list of
    parts in every turn.

    Packed rows come without `attention_mask`, with `position_ids` that begin anew with each sample: the model then
    keeps samples apart. Which of them share a row changes no loss and no gradient.

    Raises:
        ValueError: an example has no `messages`, a sample is longer than `max_length`, or truncation leaves none of its
            answers; also see [`split_at_answers`].

    Example:

    ```python
    >>> question = [{"type": "video", "path": "clip.mp4"}, {"type": "text", "text": "Which shape stands still?"}]
    >>> answer = [{"type": "text", "text": "ring"}]
    >>> messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    >>> batch = VideoQACollator(processor)([{"messages": messages}])
    ```
    """

    processor: ProcessorMixin
    processor_kwargs: dict = field(default_factory=dict)
    max_length: int | None = None
    stts_config: PreTrainedConfig | None = None

    def __call__(self, examples: list[dict]) -> BatchFeature:
        chats = [split_at_answers(chat_of(example), self.processor) for example in examples]
        if self.max_length is None:
            return self.collate(chats)
        return pack_samples([self.collate([chat]) for chat in chats], self.max_length, self.stts_config)

    def collate(self, chats: list[list[dict]]) -> BatchFeature:
        """What the processor returns for chats that [`split_at_answers`] took apart, and `labels`."""
        batch = self.processor.apply_chat_template(
            chats,
            chat_template=ANSWERS_TEMPLATE,
            sanitize_control_tokens=False,  # the prompts are a template's text, with marks in what users typed
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            processor_kwargs={**self.processor_kwargs, "padding": True, "padding_side": "right"},
        ).convert_to_tensors("pt")
        is_answer = batch.pop("assistant_masks").bool()
        batch["labels"] = batch["input_ids"].masked_fill(~is_answer, -100)
        for row, num_labels in enumerate(is_answer.sum(1).tolist()):
            if not num_labels:
                raise ValueError(
                    f"Nothing is left to learn of example {row} of the batch: its answers are cut off after "
                    f"{batch['attention_mask'][row].sum()} tokens. Raise max_length, or leave the truncation out."
                )
        return batch


# What a batch holds for each position, and what stands where a row is shorter than the longest one.
ALIGNED = {"input_ids": 0, "mm_token_type_ids": 0, "position_ids": -1, "labels": -100}


def length_after_pruning(sample: BatchFeature, stts_config: PreTrainedConfig | None) -> int:
    """Tokens of a batch of one that the language model runs on in training."""
    length = sample["input_ids"].shape[1]
    if stts_config is None or "video_grids" not in sample:
        return length
    pruning = stts_config.pruning()
    for frames, rows, columns in sample["video_grids"].tolist():
        kept = num_kept_tokens(frames, rows * columns, pruning.prune_ratio, pruning.max_vision_tokens)
        length -= frames * rows * columns - kept
    return length


def pack_samples(
    samples: list[BatchFeature], max_length: int, stts_config: PreTrainedConfig | None = None
) -> BatchFeature:
    """
    Pack samples into rows, the longest first, each into the first row with room for it.

    Args:
        samples: batches of one, without padding.
        max_length: tokens of a row after pruning.
        stts_config: how much is pruned; nothing when not given.

    Returns:
        `input_ids`, `mm_token_type_ids`, `position_ids` and `labels`: int64 `(rows, sequence)`, and images and videos
        in the order of their placeholders. What pads a shorter row is at position -1, and goes with what is pruned.

    Raises:
        ValueError: a sample is longer than `max_length`.
    """
    lengths = [length_after_pruning(sample, stts_config) for sample in samples]
    if max(lengths) > max_length:
        raise ValueError(
            f"A sample has {max(lengths)} tokens after pruning, more than a row of max_length={max_length}; raise it, "
            "or take fewer frames or a higher prune_ratio."
        )
    bins = first_fit_descending(lengths, max_length)
    in_bin = [[i for i, b in enumerate(bins.assignment) if b == index] for index in range(bins.num_bins)]
    rows = [sorted(members, key=bins.offsets.__getitem__) for members in in_bin]
    for sample in samples:
        sample["position_ids"] = torch.arange(sample["input_ids"].shape[1])[None]
        sample["labels"][:, 0] = -100  # nothing of its own sample stands before it
    batch = {}
    width = max(sum(samples[i]["input_ids"].shape[1] for i in row) for row in rows)
    for name, fill in ALIGNED.items():
        joined = [torch.cat([samples[i][name][0] for i in row]) for row in rows]
        pads = [width - len(values) for values in joined]
        tails = [torch.full((n,), fill) for n in pads]
        batch[name] = torch.stack([torch.cat(pair) for pair in zip(joined, tails, strict=True)])
    return BatchFeature(batch | join_media([samples[i] for row in rows for i in row]))


def join_media(samples: list[BatchFeature]) -> dict[str, torch.Tensor]:
    """The images and videos of batches, one after the other, whose pooling indices point into all their patches."""
    media, num_patches = {}, 0
    for sample in samples:
        for name in sample.keys() - ALIGNED.keys() - {"attention_mask"}:
            value = sample[name]
            if name.endswith("_token_pooling"):
                value = torch.where(value >= 0, value + num_patches, value)
            media.setdefault(name, []).append(value)
        # Images and videos of one batch cannot be mixed, so one count serves both.
        num_patches += sum(sample[name].shape[:-1].numel() for name in sample if name.startswith("pixel_values"))
    return {name: torch.cat(values) for name, values in media.items()}


def parameter_groups(
    model: nn.Module,
    learning_rate: float = 1e-5,
    vision_learning_rate: float = 5e-6,
    scorer_learning_rate: float = 1e-4,
    weight_decay: float = 0.0,
) -> list[dict]:
    """
    The trainable parameters of `model` in groups with the learning rates of section 4.1, for any optimizer.

    Args:
        model: an STTS model, wrapped in adapters or not.
        learning_rate: of the LLM.
        vision_learning_rate: of the ViT and the connector.
        scorer_learning_rate: of the token scorer.
        weight_decay: of weights; biases and norms have none.

    The paper's schedule is a cosine with 200 warm-up steps:

    ```python
    >>> optimizer = torch.optim.AdamW(parameter_groups(model))
    >>> args = TrainingArguments(lr_scheduler_type="cosine", warmup_steps=200, remove_unused_columns=False)
    >>> trainer = Trainer(model, args, optimizers=(optimizer, None), data_collator=VideoQACollator(processor), ...)
    ```
    """
    # The LLM's group comes first: its learning rate is the one that the Trainer logs.
    groups: dict[tuple[float, float], list[nn.Parameter]] = {(learning_rate, weight_decay): []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "token_scorer." in name:
            rate = scorer_learning_rate
        elif "vision_tower." in name or "multi_modal_projector." in name:
            rate = vision_learning_rate
        else:
            rate = learning_rate
        groups.setdefault((rate, weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items() if params]


def log_aux_loss(trainer: Trainer) -> None:
    """
    Add the unweighted auxiliary loss (section 3.4) to the logs of `trainer`: in training `aux_loss`, averaged like the
    loss over the steps and processes since the last log; in evaluation `eval_aux_loss` beside `eval_loss`, which has no
    part of it, averaged over batches. Batches without a pruned video do not count.

    Raises:
        ValueError: `trainer` computes a loss of its own, in which there is no auxiliary one.
    """
    is_trl = type(trainer).compute_loss.__module__.startswith("trl.")
    if trainer.label_smoother is not None or trainer.compute_loss_func is not None or is_trl:
        raise ValueError(
            "With label_smoothing_factor or compute_loss_func, and in TRL's own trainers, the trainer computes a loss "
            "of its own, without the auxiliary one, and the scorer learns from the bias alone; leave them out, and "
            "take stts_molmo.tools.trl.VideoSFTTrainer for SFTTrainer."
        )
    # In front of the reporters (TensorBoard, wandb, ...), so that they see the value too.
    trainer.callback_handler.callbacks.insert(0, _AuxLossCallback(trainer))


class _AuxLossCallback(TrainerCallback):
    """
    Sums on the device, and waits for it only when the Trainer logs, which waits anyway.

    Watches the model as long as the trainer lives, however its training ends: evaluation needs no training.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.watched = None
        self.reset()
        self.watch(trainer.model)

    def reset(self):
        self.sums, self.counts = {"train": 0.0, "eval": 0.0}, {"train": 0, "eval": 0}

    def watch(self, model: nn.Module):
        if model is not self.watched:
            self.watched, handle = model, model.register_forward_hook(_WeakHook(self))
            weakref.finalize(self, handle.remove)

    def add(self, model, outputs):
        if model is self.watched and outputs.aux_loss is not None:
            mode = "train" if model.training else "eval"
            self.sums[mode] = self.sums[mode] + outputs.aux_loss.detach().float()
            self.counts[mode] += 1

    def take(self, mode: str, device: torch.device) -> float | None:
        """The mean over all processes since it was taken last; `None` of nothing."""
        window = torch.tensor([0.0, self.counts[mode]], device=device)
        window[0] += self.sums[mode]
        self.sums[mode], self.counts[mode] = 0.0, 0
        total, count = self.trainer.accelerator.reduce(window, "sum").tolist()
        return total / count if count else None

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.reset()
        self.watch(model)  # another one after `model_init`

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            name, value = "aux_loss", self.take("train", args.device)
        elif (prefix := evaluation_prefix(logs)) is not None:
            name, value = f"{prefix}_aux_loss", self.take("eval", args.device)
        else:
            return
        if value is not None:
            logs[name] = state.log_history[-1][name] = value

    def on_predict(self, args, state, control, metrics, **kwargs):
        if (value := self.take("eval", args.device)) is not None:
            metrics[f"{evaluation_prefix(metrics)}_aux_loss"] = value


class _WeakHook:
    """A forward hook that keeps no trainer alive with the model, and takes none along where the model is copied."""

    def __init__(self, callback: _AuxLossCallback | None = None):
        self.callback = (lambda: None) if callback is None else weakref.ref(callback)

    def __reduce__(self):
        return type(self), ()

    def __call__(self, model, inputs, outputs):
        if (callback := self.callback()) is not None:
            callback.add(model, outputs)


def evaluation_prefix(metrics: dict[str, float]) -> str | None:
    """`"eval"` of `{"eval_loss": ..., "eval_runtime": ...}`; `None` of the logs and the summary of a training."""
    prefixes = [name.removesuffix("_runtime") for name in metrics if name.endswith("_runtime")]
    return prefixes[0] if prefixes and prefixes[0] != "train" else None
