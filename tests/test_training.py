"""Fine-tuning: what the loss sees, who learns how fast, what is logged, and that the plain `Trainer` is enough."""

import copy
import gc
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from helpers import CLIP, ROOT, load_processor, make_inputs, make_model, make_tokenized_model
from stts_molmo.modeling_stts_molmo import STTSMolmoForConditionalGeneration, STTSMolmoPoolingAttention
from stts_molmo.processing_stts_molmo import STTSMolmoProcessor
from stts_molmo.tools.training import VideoQACollator, log_aux_loss, parameter_groups
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainerCallback, TrainingArguments, pipeline

END = "<|im_end|>"

# As the released Molmo2 checkpoints write chats: no `{% generation %}`, no start token, visuals in front, nothing after
# the last answer, and before answers that are part of the chat a blank which the generation prompt does not have.
MOLMO2_STYLE = (
    "{% for message in messages if message.content is not string %}{% for part in message.content %}"
    "{% if part.type == 'video' %}<|video|>{% endif %}{% endfor %}{% endfor %}"
    "{% for message in messages %}"
    "{% set text = message.content if message.content is string else message.content | selectattr('text', 'defined')"
    " | map(attribute='text') | join(' ') %}"
    "{% if message.role == 'user' %}"
    "{% if not loop.first %}{{ '<|im_end|>\n' }}{% endif %}{{ '<|im_start|>user\n' + text + '<|im_end|>\n' }}"
    "{% else %}{{ ' <|im_start|>assistant\n' + text }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def ask(question: str, answer: str | None = None, video: str | None = None) -> list[dict]:
    content = [{"type": "text", "text": question}]
    if video is not None:
        content.insert(0, {"type": "video", "path": video})
    answers = [] if answer is None else [{"role": "assistant", "content": answer}]
    return [{"role": "user", "content": content}, *answers]


def example(question: str, answer: str, video: str | None = CLIP) -> dict:
    return {"messages": ask(question, answer, video)}


def answers_in(batch, processor, row: int) -> list[str]:
    """The labelled stretches of a row."""
    is_label = (batch["labels"][row] != -100).tolist()
    stretches, previous = [], False
    for token, labelled in zip(batch["input_ids"][row].tolist(), is_label, strict=True):
        if labelled:
            stretches = [*stretches[:-1], [*stretches[-1], token]] if previous else [*stretches, [token]]
        previous = labelled
    return [processor.decode(stretch) for stretch in stretches]


# ----------------------------------------------------------------------------------------------------------------------
# Collator
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat_template", [None, MOLMO2_STYLE], ids=["with markers", "molmo2 style"])
def test_labels_are_the_answers(chat_template):
    processor = load_processor(chat_template)
    two_turns = [*ask("Which shape stands still?", "a ring", CLIP), *ask("Where is the ring?", "top left")]
    rows = [
        {"messages": two_turns},
        example("Which way does the ball move?", "the ball moves up\nand then left "),
        example("What color is the lamp?", "red", video=None),
    ]
    batch = VideoQACollator(processor, {"num_frames": 4})(rows)

    assert answers_in(batch, processor, 0) == [f"a ring{END}", f"top left{END}"]
    assert f"a ring{END}\n<|im_start|>user\nWhere is the ring?{END}" in processor.decode(batch["input_ids"][0])
    assert answers_in(batch, processor, 1) == [f"the ball moves up\nand then left {END}"]
    assert answers_in(batch, processor, 2) == [f"red{END}"]

    labelled = batch["labels"] != -100
    assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])
    assert batch["labels"].max() < min(processor.image_token_ids)
    assert (batch["attention_mask"].diff(dim=1) <= 0).all() and batch["attention_mask"][2, -1] == 0  # right padding
    assert not labelled[batch["attention_mask"] == 0].any()
    assert not labelled[batch["mm_token_type_ids"] != 0].any() and batch["mm_token_type_ids"][:2].any(1).all()
    assert batch["video_grids"].tolist() == [[4, 3, 3]] * 2
    assert processor.tokenizer.padding_side == "left"


@pytest.mark.parametrize("chat_template", [None, MOLMO2_STYLE], ids=["with markers", "molmo2 style"])
@pytest.mark.parametrize("video", [CLIP, None], ids=["video", "text"])
def test_prompt_is_the_one_that_generate_starts_from(chat_template, video):
    processor = load_processor(chat_template)
    batch = VideoQACollator(processor, {"num_frames": 4})([example("Where is it?", "top", video)])
    prompt = processor.apply_chat_template(
        ask("Where is it?", video=video),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_frames": 4},
    )
    length = prompt["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][:, :length], prompt["input_ids"])
    assert torch.equal(batch["labels"][:, :length], torch.full_like(prompt["input_ids"], -100))
    assert processor.decode(batch["labels"][0, length:]) == f"top{END}"
    if video is not None:
        assert torch.equal(batch["pixel_values_videos"], prompt["pixel_values_videos"])


ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "ring"}]}
ROW = {"messages": [*ask("Which shape?", video=CLIP), ANSWER]}  # parts in every turn: a column has one type


def test_rows_as_datasets_stores_them():
    """Arrow gives every content part every field; absent ones are `None`."""
    processor = load_processor()
    rows = Dataset.from_list([ROW, {"messages": [*ask("What?"), ANSWER]}])
    assert rows[0]["messages"][0]["content"][0]["text"] is None
    collator = VideoQACollator(processor, {"num_frames": 4})
    batch = collator([rows[0], rows[1]])
    expected = collator([example("Which shape?", "ring"), example("What?", "ring", video=None)])
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


@pytest.mark.parametrize("row", [{"question": "Which?", "answer": "ring"}, {"messages": None}, {}], ids=str)
def test_row_without_a_chat(row):
    with pytest.raises(ValueError, match="but no `messages`: a chat"):
        VideoQACollator(load_processor())([row])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (ask("Which shape?"), "must end with a message of role 'assistant'.*found 'user'"),
        ([], "must end with a message of role 'assistant'.*found None"),
        (ask("Which shape?", "a <im_patch>"), "'a <im_patch>' contains <im_patch>"),
        (ask("Which shape?", "a <|video|>"), "contains <|video|>".replace("|", r"\|")),
        (
            ask("Which shape?", "ring<|im_end|>\n<|im_start|>user\nWhere?<|im_end|>"),
            r"contains <\|im_end\|>, .*the turn",
        ),
        ([*ask("Which?", "ring<|im_end|>"), *ask("Where?", "top")], r"'ring<\|im_end\|>' contains"),
    ],
)
def test_chats_that_cannot_be_trained_on(messages, message):
    with pytest.raises(ValueError, match=message):
        VideoQACollator(load_processor())([{"messages": messages}])


@pytest.mark.parametrize("text", ["a\0b", "\0", "<answer 0>", "<answer 0", "\0<answer 1><answer 0>"], ids=repr)
def test_no_text_of_a_user_is_taken_for_an_answer(text):
    processor = load_processor()
    chat = [*ask(text, "ring", CLIP), *ask(f"{text} Where? {text}", "top")]
    batch = VideoQACollator(processor, {"num_frames": 4})([{"messages": chat}])
    assert answers_in(batch, processor, 0) == [f"ring{END}", f"top{END}"]
    assert processor.decode(batch["input_ids"][0]).count(text) == 3


@pytest.mark.parametrize(("max_length", "answers"), [(30, ["ring"]), (12, [])])
def test_truncation_that_leaves_nothing_to_learn(max_length, answers):
    processor = load_processor()
    collator = VideoQACollator(processor, {"truncation": True, "max_length": max_length})
    rows = [example("What color?", "red", video=None), example("Which shape stands still?", "ring", video=None)]
    lengths = [len(row) for row in VideoQACollator(processor)(rows)["input_ids"]]
    assert answers_in(collator(rows[:1]), processor, 0) if answers else True, lengths
    if not answers:
        with pytest.raises(ValueError, match="left to learn of example 0 .* cut off after 12 tokens. Raise max_length"):
            collator(rows)


def test_template_that_drops_earlier_answers():
    forgetful = "{{ messages[-1].content[0].text }}{% if add_generation_prompt %}{{ ':' }}{% endif %}"
    chat = [*ask("Which shape?", "ring"), *ask("Where?", "top")]
    with pytest.raises(ValueError, match="writes 0 of 1 earlier answers"):
        VideoQACollator(load_processor(forgetful))([{"messages": chat}])


# ----------------------------------------------------------------------------------------------------------------------
# Parameter groups
# ----------------------------------------------------------------------------------------------------------------------


def test_parameter_groups_are_those_of_the_paper():
    model = make_model()
    model.model.language_model.layers[0].requires_grad_(False)
    groups = parameter_groups(model, weight_decay=0.1)
    settings = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}

    assert sum(len(group["params"]) for group in groups) == len(settings)  # none twice
    assert groups[0]["lr"] == 1e-5  # the one that is logged
    rates = {  # the first prefix that fits counts
        "model.vision_tower.token_scorer.": 1e-4,
        "model.vision_tower.": 5e-6,
        "model.multi_modal_projector.": 5e-6,
        "model.language_model.": 1e-5,
        "lm_head.": 1e-5,
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in settings
            continue
        expected = next(rate for prefix, rate in rates.items() if name.startswith(prefix))
        assert settings[id(parameter)] == (expected, 0 if name.endswith("bias") or "norm" in name else 0.1), name


def test_parameter_groups_of_the_model_without_head():
    rates = {group["lr"] for group in parameter_groups(make_model().model)}
    assert rates == {1e-5, 5e-6, 1e-4}


# ----------------------------------------------------------------------------------------------------------------------
# Trainer
# ----------------------------------------------------------------------------------------------------------------------


def make_trainer(model, rows: list[dict], folder: Path, **kwargs) -> Trainer:
    arguments = {
        "learning_rate": 1e-5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "per_device_train_batch_size": 1,
        "remove_unused_columns": False,
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    arguments |= {name: kwargs.pop(name) for name in list(kwargs) if hasattr(TrainingArguments, name)}
    return Trainer(
        model,
        TrainingArguments(str(folder), **arguments),
        train_dataset=rows,
        data_collator=VideoQACollator(load_processor(), {"num_frames": 4}),
        optimizers=(torch.optim.AdamW(parameter_groups(model)), None),
        **kwargs,
    )


class AuxLosses:
    """Every auxiliary loss that a model in training returned."""

    def __init__(self, model):
        self.values = []
        self.remove = model.register_forward_hook(self.record).remove

    def record(self, model, inputs, outputs):
        if model.training and outputs.aux_loss is not None:
            self.values.append(outputs.aux_loss.item())


class Reporter(TrainerCallback):
    """Stands for TensorBoard, wandb and the like, which are in place before `log_aux_loss` is called."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(dict(logs))


@pytest.mark.parametrize("own_loss", [{"label_smoothing_factor": 0.1}, {"compute_loss_func": len}], ids=str)
def test_a_trainer_with_a_loss_of_its_own_is_refused(own_loss, tmp_path):
    trainer = make_trainer(make_tokenized_model(), [example("Which shape?", "ring")], tmp_path, **own_loss)
    with pytest.raises(ValueError, match="without the auxiliary one"):
        log_aux_loss(trainer)


def test_aux_loss_is_logged(tmp_path):
    model, reporter = make_tokenized_model(), Reporter()
    rows = [example("Which shape?", "ring"), example("What color?", "red", video=None)]
    trainer = make_trainer(
        model,
        rows,
        tmp_path,
        max_steps=4,
        gradient_accumulation_steps=2,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        eval_dataset=rows[:1],
        callbacks=[reporter],
    )
    log_aux_loss(trainer)
    recorded = AuxLosses(model)
    trainer.train()

    assert len(recorded.values) == 4  # one of two micro-batches of each step has a video
    expected = [sum(recorded.values[i : i + 2]) / 2 for i in (0, 2)]
    for history in (trainer.state.log_history, reporter.logs):
        assert [logs["aux_loss"] for logs in history if "loss" in logs] == pytest.approx(expected, rel=1e-6)
        assert all("aux_loss" not in logs for logs in history if "loss" not in logs)
        assert len([logs["eval_aux_loss"] for logs in history if "eval_loss" in logs]) == 2

    recorded.values.clear()
    trainer.train()  # a second run neither counts twice nor remembers the first
    logged = [logs["aux_loss"] for logs in trainer.state.log_history if "loss" in logs]
    assert logged == pytest.approx([sum(recorded.values[i : i + 2]) / 2 for i in (0, 2)], rel=1e-6)


def test_aux_loss_of_evaluation_is_logged_beside_its_loss(tmp_path):
    rows = [example("Which shape?", "ring"), example("Where is it?", "top"), example("What color?", "red", video=None)]
    model = make_tokenized_model(aux_loss_weight=5.0)
    trainer = make_trainer(model, rows, tmp_path, per_device_eval_batch_size=1)
    log_aux_loss(trainer)
    expected = []
    with torch.no_grad():
        expected = [model.eval()(**trainer.data_collator([row])) for row in rows]
    for metrics in (trainer.evaluate(rows), trainer.evaluate(rows)):  # the second counts none of the first
        assert metrics["eval_aux_loss"] == pytest.approx(sum(o.aux_loss.item() for o in expected[:2]) / 2, rel=1e-6)
        assert metrics["eval_loss"] == pytest.approx(sum(o.loss.item() for o in expected) / 3, rel=1e-6)
    assert trainer.state.log_history[-1]["eval_aux_loss"] == metrics["eval_aux_loss"]
    assert trainer.predict(rows[:1]).metrics["test_aux_loss"] == pytest.approx(expected[0].aux_loss.item(), rel=1e-6)
    assert "eval_aux_loss" not in trainer.evaluate(rows[2:])


def test_a_training_that_fails_leaves_nothing_on_the_model(tmp_path):
    model = make_tokenized_model()
    trainer = make_trainer(model, [{"question": "Which?"}], tmp_path, max_steps=1)
    log_aux_loss(trainer)
    with pytest.raises(ValueError, match="no `messages`"):
        trainer.train()
    (hook,) = copy.deepcopy(model)._forward_hooks.values()
    assert hook.callback() is None  # a copy takes no trainer along
    trainer.train_dataset = [example("Which shape?", "ring")]
    recorded = AuxLosses(model)
    trainer.train()
    assert len(model._forward_hooks) == 2 and len(recorded.values) == 1  # as many as there are: not one for each start
    recorded.remove()
    del trainer
    gc.collect()
    assert not model._forward_hooks


def test_aux_loss_is_averaged_over_processes(tmp_path, monkeypatch):
    model = make_tokenized_model()
    trainer = make_trainer(model, [example("Which shape?", "ring")], tmp_path, max_steps=1, logging_steps=1)
    log_aux_loss(trainer)
    recorded, elsewhere = AuxLosses(model), torch.tensor([3.0, 2.0])  # sum and number of another process

    def reduce(tensor, reduction):
        assert reduction == "sum"
        return tensor + elsewhere

    monkeypatch.setattr(trainer.accelerator, "reduce", reduce)
    trainer.train()
    assert trainer.state.log_history[0]["aux_loss"] == pytest.approx((recorded.values[0] + 3) / 3, rel=1e-6)


def test_aux_loss_is_not_logged_without_video(tmp_path):
    rows = [example("What color?", "red", video=None)]
    trainer = make_trainer(make_tokenized_model(), rows, tmp_path, max_steps=1, logging_steps=1)
    log_aux_loss(trainer)
    trainer.train()
    assert "loss" in trainer.state.log_history[0] and "aux_loss" not in trainer.state.log_history[0]


def test_learning_rates_follow_one_schedule(tmp_path):
    trainer = make_trainer(make_tokenized_model(), [example("Which?", "ring")], tmp_path, max_steps=4, logging_steps=1)
    trainer.train()
    logged = [logs["learning_rate"] for logs in trainer.state.log_history if "loss" in logs]
    assert logged == pytest.approx([0, 0.5e-5, 1e-5, 0.5e-5])  # two warm-up steps, then half a cosine over two


class Gradients(TrainerCallback):
    """The gradients that the optimizer gets."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.values = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("aux_loss_weight", "answer"), [(0.0, "a ring that stands still"), (10.0, "ring")])
def test_gradient_accumulation_equals_a_large_batch(tmp_path, aux_loss_weight, answer):
    """
    Answers of different lengths, for the task loss; and an auxiliary loss that is most of the loss: it must not grow
    with the number of micro-batches.
    """
    rows = [example("Which shape?", "ring"), example("What is it?", answer)]
    gradients, losses = [], []
    for batch_size in (1, 2):
        recorder = Gradients()
        trainer = make_trainer(
            make_tokenized_model(aux_loss_weight=aux_loss_weight),
            rows,
            tmp_path,
            max_steps=1,
            max_grad_norm=0,
            logging_steps=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=len(rows) // batch_size,
            callbacks=[recorder],
        )
        trainer.train()
        gradients.append(recorder.values)
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert gradients[0].keys() == gradients[1].keys() >= {"model.vision_tower.token_scorer.fc3.weight"}
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    inputs = make_inputs([4, None, 3], side="right")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= 64, -100)
    results = []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (loss, gradients), (same_loss, same_gradients) = results
    torch.testing.assert_close(same_loss, loss)
    assert same_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(same_gradients[name], gradient, msg=name)


def test_predictions_align_with_labels(tmp_path):
    """Rows of different lengths in two batches; the loss of what `predict` returns is the loss it reports."""
    rows = [
        example("Which shape stands still?", "a ring"),
        example("Which?", "the square at the top left"),
        example("What color?", "red", video=None),
    ]

    def metrics(prediction):
        logits, labels = torch.tensor(prediction.predictions), torch.tensor(prediction.label_ids)
        assert logits.shape[:2] == labels.shape
        return {"loss_of_logits": F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).item()}

    model = make_tokenized_model(aux_loss_weight=0.0)
    trainer = make_trainer(model, rows, tmp_path, compute_metrics=metrics, per_device_eval_batch_size=3)
    one_batch = trainer.evaluate(rows)
    assert one_batch["eval_loss"] == pytest.approx(one_batch["eval_loss_of_logits"], rel=1e-5)

    trainer.args.per_device_eval_batch_size = 2
    two_batches = trainer.predict(rows)
    assert two_batches.label_ids.shape[0] == 3
    assert two_batches.metrics["test_loss_of_logits"] == pytest.approx(one_batch["eval_loss_of_logits"], rel=1e-5)


@pytest.mark.parametrize("collates", ["we", "trl"])
def test_trl_trains_the_model_as_it_is(collates, tmp_path):
    """
    TRL computes a loss of its own from hidden states, without the auxiliary loss; it must reach ViT and scorer. Its own
    collator wants a column `images`, or it takes no visuals from the messages, and to be told that answers alone count:
    else it trains on the placeholders of the video as well.
    """
    trl = pytest.importorskip("trl")
    processor, model = load_processor(), make_tokenized_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ours = collates == "we"
    if ours:
        options = {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    else:
        options = {"assistant_only_loss": True}
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(
            str(tmp_path), max_steps=1, max_length=None, use_cpu=True, bf16=False, save_strategy="no", **options
        ),
        train_dataset=Dataset.from_list([ROW if ours else ROW | {"images": []}]),
        data_collator=VideoQACollator(processor) if ours else None,
        processing_class=processor,
        optimizers=(torch.optim.AdamW(parameter_groups(model)), None),
    )
    (batch,) = trainer.get_train_dataloader()
    assert answers_in(batch, processor, 0) == [f"ring{END}"]
    assert batch["labels"].max() < model.vocab_size and "pixel_values_videos" in batch
    with pytest.raises(ValueError, match="in TRL's own trainers, .*without the auxiliary one"):
        log_aux_loss(trainer)
    trainer.train()
    for name in ("patch_embedding.weight", "token_scorer.fc3.weight"):
        name = f"model.vision_tower.{name}"
        assert not torch.equal(model.get_parameter(name), before[name]), name


def test_what_the_readme_trains_answers_in_a_pipeline(tmp_path, monkeypatch):
    """Line by line what README.md shows, in a run of two steps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    (tmp_path / "examples").symlink_to(ROOT / "examples")

    path = "checkpoints/stts-molmo-tiny"
    model = STTSMolmoForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    processor = STTSMolmoProcessor.from_pretrained(path)
    question = [
        {"type": "video", "path": "examples/clips/quiet.mp4"},
        {"type": "text", "text": "Which shape stands still?"},
    ]
    answer = [{"type": "text", "text": "triangle"}]
    chats = [{"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}]
    args = TrainingArguments(
        "out",
        max_steps=2,
        lr_scheduler_type="cosine",
        warmup_steps=200,
        logging_steps=1,
        remove_unused_columns=False,
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=chats,
        data_collator=VideoQACollator(processor),
        processing_class=processor,
        optimizers=(torch.optim.AdamW(parameter_groups(model)), None),
    )
    log_aux_loss(trainer)
    trainer.train()
    trainer.save_model()

    assert all({"loss", "aux_loss"} <= set(logs) for logs in trainer.state.log_history[:2])
    answers = pipeline("image-text-to-text", model="out", trust_remote_code=True)
    result = answers(text=[{"role": "user", "content": question}], max_new_tokens=8, return_full_text=False)
    assert result[0]["generated_text"] == "triangle"


@pytest.fixture
def one_process(tmp_path):
    """A group of processes with one member."""
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("is_cuda", [False, True], ids=["on a CPU", "on CUDA"])
def test_fsdp_gives_the_same_gradients(is_cuda, one_process, monkeypatch):
    """Sharded as accelerate does it: every module that is not to be split is a unit with hooks of its own."""
    forward = STTSMolmoPoolingAttention.forward

    def forward_as_on_cuda(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", is_cuda)
            return forward(*args, **kwargs)

    monkeypatch.setattr(STTSMolmoPoolingAttention, "forward", forward_as_on_cuda)
    inputs = make_inputs([4, 6], side="right")
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] >= 60, -100)
    mesh = init_device_mesh("cpu", (1,))
    whole, sharded = (make_model().train() for _ in range(2))
    for module in sharded.modules():
        if type(module).__name__ in sharded._no_split_modules:
            fully_shard(module, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    losses = [model(**inputs).loss for model in (whole, sharded)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    expected = dict(whole.named_parameters())
    for name, parameter in sharded.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad.full_tensor(), expected.pop(name).grad)
    assert all(parameter.grad is None for parameter in expected.values())


@pytest.mark.parametrize("part", ["whole", "base"])
def test_a_sharded_model_is_saved_with_our_code_and_whole_weights(part, one_process, tmp_path):
    whole, model = (make_model() if part == "whole" else make_model().model for _ in range(2))
    mesh = init_device_mesh("cpu", (1,))
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    sharded_class = type(model)
    assert sharded_class is not type(whole)
    model.save_pretrained(tmp_path / "saved")
    assert type(model) is sharded_class
    whole.save_pretrained(tmp_path / "as a whole")
    for file in (tmp_path / "as a whole").iterdir():
        if file.suffix in (".json", ".py"):
            assert (tmp_path / "saved" / file.name).read_bytes() == file.read_bytes(), file
    assert len(list((tmp_path / "saved").iterdir())) == len(list((tmp_path / "as a whole").iterdir()))
    loaded, expected = type(whole).from_pretrained(tmp_path / "saved").state_dict(), whole.state_dict()
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)
