"""TRL's trainer with the model's own loss: the collator's labels, the auxiliary loss, the plain Trainer's steps."""

import pytest
import torch
from datasets import Dataset
from helpers import CLIP, load_processor, make_tokenized_model
from stts_molmo.modeling_stts_molmo import STTSMolmoModel
from stts_molmo.tools.training import VideoQACollator, parameter_groups
from transformers import Trainer, TrainingArguments

MISSING = "the extra `trl` is not installed; make test-extras runs this"
trl = pytest.importorskip("trl", reason=MISSING)
VideoSFTTrainer = pytest.importorskip("stts_molmo.tools.trl", reason=MISSING).VideoSFTTrainer

QUESTION = [{"type": "video", "path": CLIP, "text": None}, {"type": "text", "path": None, "text": "Which shape?"}]
ANSWER = [{"type": "text", "path": None, "text": "ring"}]
ROWS = [{"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]}] * 2
SETTINGS = {
    "max_steps": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
    "remove_unused_columns": False,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1.0,
    "weight_decay": 0.0,
    "seed": 1,
}


def train(trainer_class, arguments_class, folder, **settings):
    model, processor = make_tokenized_model(), load_processor()
    processor.video_processor.num_frames = 4
    collator = {"data_collator": VideoQACollator(processor)} if trainer_class is Trainer else {}
    trainer = trainer_class(
        model,
        arguments_class(str(folder), **SETTINGS, **settings),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=processor,
        optimizers=(torch.optim.AdamW(parameter_groups(model)), None),
        **collator,
    )
    trainer.train()
    return trainer


def test_it_trains_as_the_plain_trainer_does(tmp_path):
    plain = train(Trainer, TrainingArguments, tmp_path)
    ours = train(VideoSFTTrainer, trl.SFTConfig, tmp_path, bf16=False, gradient_checkpointing=False)
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (plain, ours)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[1]) == 2
    assert all("aux_loss" in entry for entry in ours.state.log_history if "loss" in entry)
    for (name, expected), parameter in zip(plain.model.named_parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6, msg=name)


def test_a_loss_of_trls_own_is_refused(tmp_path):
    with pytest.raises(ValueError, match="loss_type='dft' is TRL's own"):
        train(VideoSFTTrainer, trl.SFTConfig, tmp_path, loss_type="dft", bf16=False)


def train_on_preferences(folder, model, processor):
    chosen, rejected = ([{"role": "assistant", "content": word}] for word in ("ring", "cross"))
    row = {"prompt": ROWS[0]["messages"][:1], "chosen": chosen, "rejected": rejected}
    settings = {"bf16": False, "gradient_checkpointing": False}
    trl.DPOTrainer(
        model,
        make_tokenized_model(),
        args=trl.DPOConfig(str(folder), **SETTINGS, **settings),
        train_dataset=Dataset.from_list([row] * 2),
        processing_class=processor,
    ).train()


def train_on_rewards(folder, model, processor):
    settings = {"bf16": False, "gradient_checkpointing": False, "num_generations": 2, "max_completion_length": 2}
    trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(index) for index in range(len(completions))],
        args=trl.GRPOConfig(str(folder), **SETTINGS, **settings),
        train_dataset=Dataset.from_list([{"prompt": ROWS[0]["messages"][:1]}] * 2),
        processing_class=processor,
    ).train()


@pytest.mark.parametrize("train", [train_on_preferences, train_on_rewards], ids=["DPO", "GRPO"])
def test_what_leaves_the_video_out_stops(train, tmp_path, monkeypatch):
    """Why docs/training.md calls these unsupported: TRL gives the model placeholders, and no video to put there."""
    model, processor = make_tokenized_model(), load_processor()
    processor.video_processor.num_frames = 4
    given, forward, generate = [], STTSMolmoModel.forward, type(model).generate

    def record(core, *args, **kwargs):
        given.append(kwargs)
        return forward(core, *args, **kwargs)

    def generate_in_evaluation(model, *args, **kwargs):
        """GRPO does it in training, which Molmo2 refuses: this is for what comes after."""
        model.eval()
        try:
            return generate(model, *args, **kwargs)
        finally:
            model.train()

    monkeypatch.setattr(STTSMolmoModel, "forward", record)
    monkeypatch.setattr(type(model), "generate", generate_in_evaluation)
    with pytest.raises(ValueError, match="`mm_token_type_ids` is required as a model input when training"):
        train(tmp_path, model, processor)
    assert (given[-1]["input_ids"] == model.config.image_token_id).any()
    assert given[-1].get("pixel_values_videos") is given[-1].get("mm_encoder_outputs") is None
