"""Fine-tune an STTS checkpoint, or a plain Molmo2 one, on questions about videos.

On the bundled clips, and on eight GPUs:

    python examples/finetune.py --model checkpoints/stts-molmo-tiny --dataset examples/finetune.jsonl \\
        --output_dir runs/tiny --max_steps 50 --warmup_steps 5 --learning_rate 1e-3

    torchrun --nproc_per_node 8 examples/finetune.py --model allenai/Molmo2-4B --dataset my_videos.jsonl \\
        --output_dir runs/molmo2 --bf16 --gradient_checkpointing --per_device_train_batch_size 1 \\
        --gradient_accumulation_steps 8 --dataloader_num_workers 4 --save_steps 500

On one card of 24 GB, adapters only, and with the language model in four bits (`pip install 'stts-molmo[lora]'`):

    python examples/finetune.py --model molmo2-4b-stts --dataset my_videos.jsonl --output_dir runs/lora \\
        --lora --load_in_4bit --bf16 --gradient_checkpointing --learning_rate 1e-4

Besides the flags below it takes all of the Trainer's. Defaults are those of the paper (section 4.1), but for the
scorer, which is warmed up first and then learns at the rate of the language model: docs/study.md says why. With
`--resume_from_checkpoint newest` the same command goes on where a run was cut off, and starts one where there is none.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset, Video, load_dataset
from stts_molmo.modeling_stts_molmo import STTSMolmoForConditionalGeneration
from stts_molmo.processing_stts_molmo import STTSMolmoProcessor
from stts_molmo.tools.files import newest_checkpoint
from stts_molmo.tools.publishing import inherited, write_card
from stts_molmo.tools.sampling import StepSampler
from stts_molmo.tools.training import VideoQACollator, log_aux_loss, parameter_groups
from stts_molmo.tools.warm_up import warm_up
from torch.utils.data import DataLoader, RandomSampler
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed


@dataclass
class ScriptArguments:
    model: str = field(
        metadata={"help": "Directory or Hub id of an STTS checkpoint, or of a Molmo2 one, which gets a fresh scorer."}
    )
    dataset: str = field(
        metadata={
            "help": "JSON Lines file, folder or Hub id. Rows have `video`, `question` and `answer`, or `messages`: a "
            "chat that ends with the assistant's answer. Relative paths start at the file's folder."
        }
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on, such as 'train[:95%%]'."})
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on, such as 'train[95%%:]'."})
    num_frames: int | None = field(default=None, metadata={"help": "Most frames of a video; else the checkpoint's."})
    prune_ratio: float | None = field(default=None, metadata={"help": "Share of tokens to drop; else the checkpoint's"})
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Pack the samples of a batch into rows of at most so many tokens, counted after pruning; the paper "
            "has 9686. Else each sample is a row, padded to the longest."
        },
    )
    lora: bool = field(
        default=False,
        metadata={
            "help": "Train adapters of the language model and the token scorer alone. `output_dir`/adapter gets "
            "these, `output_dir` a checkpoint with them merged in."
        },
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "With --lora, the language model in four bits while it is trained."}
    )
    vision_learning_rate: float = field(default=5e-6, metadata={"help": "Learning rate of the ViT and the connector."})
    scorer_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the token scorer; else the LLM's. The paper has 1e-4."}
    )
    scorer_warmup_steps: int = field(
        default=200,
        metadata={
            "help": "Steps, of four clips each, in which a scorer that was never trained learns the auxiliary target "
            "alone before the training begins; 0 for none."
        },
    )


@dataclass
class FinetuneArguments(TrainingArguments):
    learning_rate: float = field(default=1e-5, metadata={"help": "Learning rate of the LLM."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of all learning rates."})
    warmup_steps: float = field(default=200, metadata={"help": "Steps of linear warm-up; below 1, a share of all."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off: the collator reads chats."})
    ddp_find_unused_parameters: bool = field(
        default=True, metadata={"help": "Needed where one process has a batch without a video."}
    )


def load_chats(name: str, split: str) -> Dataset:
    """Rows `{"messages": chat}` of a JSON Lines file, a folder or a dataset on the Hub."""
    path = Path(name)
    folder = path.parent if path.is_file() else path
    return load_rows(name, split).with_transform(partial(to_chats, folder=folder))


def load_rows(name: str, split: str) -> Dataset:
    """Rows as they are stored."""
    path = Path(name)
    if path.suffix in (".json", ".jsonl") and not path.is_file():
        raise FileNotFoundError(f"There is no dataset file {name!r}; check the path.")
    dataset = load_dataset("json", data_files=name, split=split) if path.is_file() else load_dataset(name, split=split)
    columns = set(dataset.column_names)
    if "messages" not in columns and not {"question", "answer"} <= columns:
        raise ValueError(
            f"The dataset {name!r} has the columns {sorted(columns)}; expected `question`, `answer` and, for rows with "
            "a video, `video`, or `messages` instead. Rename its columns."
        )
    for column, feature in dataset.features.items():
        if isinstance(feature, Video):  # the processor decodes, and only the frames it samples
            dataset = dataset.cast_column(column, Video(decode=False))
    return dataset


def to_chats(columns: dict[str, list], folder: Path) -> dict[str, list]:
    """A batch of rows, by column, as chats; relative paths of videos start at `folder`."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return {"messages": [to_chat(row, folder) for row in rows]}


def to_chat(row: dict, folder: Path) -> list[dict]:
    if "messages" in row:
        return [
            {**message, "content": [locate(part, folder) for part in message["content"]]}
            if isinstance(message["content"], list)
            else message
            for message in row["messages"]
        ]
    for name in ("question", "answer"):
        if row[name] is None:
            pair = {key: row[key] for key in ("question", "answer")}
            raise ValueError(f"A row has no {name}: {pair}; fill it in or remove the row.")
    question = [{"type": "text", "text": str(row["question"])}]
    if row.get("video") is not None:
        question.insert(0, locate({"type": "video", "path": row["video"]}, folder))
    return [{"role": "user", "content": question}, {"role": "assistant", "content": str(row["answer"])}]


def media_of_rows(name: str, split: str) -> list[str | None]:
    """`"video"`, `"image"` or `None` of each row that [`load_chats`] gives, without reading a video."""
    rows = load_rows(name, split)
    if "messages" in rows.column_names:
        return [media_of_chat(chat) for chat in rows["messages"]]
    if "video" not in rows.column_names:
        return [None] * len(rows)
    tables = rows.select_columns("video").with_format("arrow").iter(1000)
    return ["video" if there else None for table in tables for there in table["video"].is_valid().to_pylist()]


def media_of_chat(messages: list[dict]) -> str | None:
    parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
    return next((part["type"] for part in parts if part["type"] in ("video", "image")), None)


def locate(part: dict, folder: Path) -> dict:
    return {**part, **{key: locate_file(part[key], folder) for key in ("path", "video", "image", "url") if key in part}}


def locate_file(file, folder: Path):
    if isinstance(file, dict):  # a column of videos: embedded bytes, or the path of a file
        return file["path"] if file["bytes"] is None else file["bytes"]
    return str(folder / file) if isinstance(file, str) and "://" not in file else file


class JointTrainer(Trainer):
    """Each micro-batch has videos or images, and each step a video: see [`stts_molmo.tools.sampling.plan_epoch`]."""

    def __init__(self, *args, media: list[str | None], **kwargs):
        self.media = media
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, train_dataset=None) -> StepSampler:
        per_step = self.args.gradient_accumulation_steps * self.args.world_size
        return StepSampler(self.media, self._train_batch_size, per_step)


def load_model(script: ScriptArguments, **kwargs) -> STTSMolmoForConditionalGeneration:
    model = STTSMolmoForConditionalGeneration.from_pretrained(script.model, **kwargs)
    if script.prune_ratio is not None:
        model.config.stts_config.prune_ratio = script.prune_ratio
        model.config.stts_config.max_vision_tokens = None  # would count in its place
    return model


def load_trainable(script: ScriptArguments, bf16: bool) -> STTSMolmoForConditionalGeneration:
    if not script.lora:
        if script.load_in_4bit:
            raise ValueError(
                "--load_in_4bit freezes the language model's weights; pass --lora with it to train adapters."
            )
        # In float32 also with --bf16: steps as small as these learning rates make are lost on bfloat16 weights.
        return load_model(script, dtype=torch.float32)
    from stts_molmo.tools.adapters import four_bit_language_model

    quantization = {"quantization_config": four_bit_language_model()} if script.load_in_4bit else {}
    return load_model(script, dtype=torch.bfloat16 if bf16 else torch.float32, **quantization)


def warm_up_scorer(
    model: STTSMolmoForConditionalGeneration,
    chats: Dataset,
    media: list[str | None],
    collator: VideoQACollator,
    steps: int,
    args: TrainingArguments,
) -> None:
    """A first lesson for a scorer that was never trained, on clips of the training; the same in every process."""
    videos = chats.select([row for row, kind in enumerate(media) if kind == "video"])
    if not steps or not len(videos) or not model.has_untrained_scorer():
        return
    if not getattr(model, "is_quantized", False):  # which is where it belongs, and cannot be moved
        model.to(args.device)
    clips = RandomSampler(videos, num_samples=4 * steps, generator=torch.Generator().manual_seed(args.seed))
    losses = list(warm_up(model, DataLoader(videos, batch_size=4, sampler=clips, collate_fn=collator)))
    if args.process_index == 0:
        print(f"Warmed up the scorer for {steps} steps: auxiliary loss {losses[0]:.4f}, then {losses[-1]:.4f}.")


def save(trainer: Trainer, script: ScriptArguments) -> None:
    """A checkpoint with its card; of adapters two, alone and merged."""
    output = Path(trainer.args.output_dir)
    trainer.save_model(str(output / "adapter") if script.lora else None)
    if not trainer.is_world_process_zero():
        return
    if script.lora:
        from stts_molmo.tools.adapters import merge_adapters

        merge_adapters(load_model(script, dtype="auto"), output / "adapter").save_pretrained(output)
        trainer.processing_class.save_pretrained(output)
    dataset = Path(script.dataset).name if Path(script.dataset).exists() else script.dataset
    trained_on = f"{dataset}, split {script.train_split}, {trainer.state.global_step} steps"
    name = None if Path(script.model).is_dir() else script.model
    write_card(output, **inherited(script.model, name), trained_on=trained_on)


def main(argv: list[str] | None = None) -> Trainer:
    script, args = HfArgumentParser((ScriptArguments, FinetuneArguments)).parse_args_into_dataclasses(argv)
    processor = STTSMolmoProcessor.from_pretrained(script.model)
    if script.num_frames is not None:
        processor.video_processor.num_frames = script.num_frames  # saved with the processor
    media, chats = media_of_rows(script.dataset, script.train_split), load_chats(script.dataset, script.train_split)
    set_seed(args.seed)  # of a new scorer's weights
    model = load_trainable(script, args.bf16)
    collator = VideoQACollator(processor, max_length=script.max_length, stts_config=model.config.stts_config)
    resume_from = args.resume_from_checkpoint
    if resume_from == "newest":
        resume_from = newest_checkpoint(args.output_dir)
    if not resume_from:
        warm_up_scorer(model, chats, media, collator, script.scorer_warmup_steps, args)
    if script.lora:
        from stts_molmo.tools.adapters import add_adapters

        model = add_adapters(model)
    scorer_rate = args.learning_rate if script.scorer_learning_rate is None else script.scorer_learning_rate
    groups = parameter_groups(model, args.learning_rate, script.vision_learning_rate, scorer_rate, args.weight_decay)
    trainer = JointTrainer(
        model,
        args,
        media=media,
        train_dataset=chats,
        eval_dataset=load_chats(script.dataset, script.eval_split) if script.eval_split else None,
        data_collator=collator,
        processing_class=processor,
        optimizers=(torch.optim.AdamW(groups), None),
    )
    log_aux_loss(trainer)
    trainer.train(resume_from_checkpoint=resume_from)
    save(trainer, script)
    return trainer


if __name__ == "__main__":
    main()
