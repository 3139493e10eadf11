"""Adapters and quantization: twenty steps, saved, loaded, merged, with the same answers; and what is refused.

Runs where the extra `lora` is installed (`make test-extras`).
"""

import pytest
import torch
from helpers import CLIP, ROOT, TINY, load_processor, load_script
from stts_molmo.modeling_stts_molmo import STTSMolmoForConditionalGeneration
from stts_molmo.processing_stts_molmo import STTSMolmoProcessor
from stts_molmo.tools.training import VideoQACollator
from transformers import TorchAoConfig

MISSING = "the extra `lora` is not installed; make test-extras runs this"
PeftModel = pytest.importorskip("peft", reason=MISSING).PeftModel
adapters = pytest.importorskip("stts_molmo.tools.adapters", reason=MISSING)


def load_tiny(**kwargs):
    return STTSMolmoForConditionalGeneration.from_pretrained(TINY, **kwargs).eval()


@pytest.fixture(scope="module")
def batch():
    content = [{"type": "video", "path": CLIP}, {"type": "text", "text": "What color is the still shape?"}]
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    return VideoQACollator(load_processor(), {"num_frames": 4})([{"messages": chat}] * 2)


@torch.no_grad()
def logits(model, batch):
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return model(**inputs, logits_to_keep=0).logits


FLAGS = ["--model", str(TINY), "--dataset", str(ROOT / "examples" / "finetune.jsonl"), "--use_cpu", "--lora"]
FLAGS += [
    "--num_frames",
    "4",
    "--per_device_train_batch_size",
    "1",
    "--learning_rate",
    "1e-3",
    "--warmup_steps",
    "1",
    "--disable_tqdm",
    "True",
]


def test_twenty_steps_saved_loaded_and_merged_give_the_same_answers(tmp_path, batch):
    before = load_tiny().state_dict()
    arguments = [*FLAGS, "--output_dir", str(tmp_path), "--max_steps", "20", "--logging_steps", "1"]
    trainer = load_script("finetune").main([*arguments, "--prune_ratio", "0.4"])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 20 and sum("aux_loss" in entry for entry in trainer.state.log_history) == 20
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "token_scorer.modules_to_save" in name for name in trained)
    assert not any("vision_tower" in name and "lora_" in name for name in trained)
    assert any("token_scorer" in name for name in trained) and any("lora_" in name for name in trained)

    expected = logits(trainer.model.eval(), batch)
    base = load_tiny()
    base.config.stts_config.prune_ratio = 0.4
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=1e-5, atol=1e-5)

    merged = STTSMolmoForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert merged.config.stts_config.prune_ratio == 0.4
    torch.testing.assert_close(logits(merged, batch), expected, rtol=1e-4, atol=1e-4)
    after = merged.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert all("language_model.layers" in name or "token_scorer" in name for name in changed)
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed} >= {"q_proj", "down_proj", "fc1"}
    assert "20 steps" in (tmp_path / "README.md").read_text()


def test_four_bits_train(tmp_path):
    pytest.importorskip("bitsandbytes", reason=MISSING)
    arguments = [*FLAGS, "--output_dir", str(tmp_path), "--max_steps", "3", "--logging_steps", "1", "--load_in_4bit"]
    trainer = load_script("finetune").main(arguments)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and all(0 < loss < 10 for loss in losses)
    adapters.check_quantized(trainer.model.get_base_model())
    moved = [p for name, p in trainer.model.named_parameters() if "lora_B" in name and p.any()]
    assert moved  # they begin as zeros
    merged = STTSMolmoForConditionalGeneration.from_pretrained(tmp_path)
    assert all(p.is_floating_point() for p in merged.parameters())


def test_four_bits_without_adapters_are_refused(tmp_path):
    flags = [flag for flag in FLAGS if flag != "--lora"]
    with pytest.raises(ValueError, match="pass --lora with it"):
        load_script("finetune").main([*flags, "--output_dir", str(tmp_path), "--load_in_4bit"])


def test_a_skip_list_that_names_nothing_is_refused():
    pytest.importorskip("bitsandbytes", reason=MISSING)
    config = adapters.four_bit_language_model()
    config.llm_int8_skip_modules = ["vision_tower", "multi_modal_projector", "lm_head"]
    with pytest.raises(ValueError, match=r"model\.vision_tower\.\S+ was quantized; skip what is not"):
        adapters.add_adapters(load_tiny(quantization_config=config))


def test_a_skip_list_that_names_all_is_refused():
    with pytest.raises(ValueError, match="No layer of the language model was quantized"):
        adapters.check_quantized(load_tiny())


@pytest.fixture(scope="module")
def questions():
    """All of examples/finetune.jsonl, and how a model answers them."""
    rows = load_script("finetune").load_chats(str(ROOT / "examples" / "finetune.jsonl"), "train")
    processor = STTSMolmoProcessor.from_pretrained(TINY)
    inputs = processor.apply_chat_template(
        [row["messages"][:-1] for row in rows],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )

    def answer(model) -> list[str]:
        sequences = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        return processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    expected = answer(load_tiny())
    assert len(set(expected)) > 10
    return answer, expected


@pytest.mark.parametrize(
    ("config", "distance"),
    [
        ("Int8WeightOnlyConfig", 0.005),
        ("Int8DynamicActivationInt8WeightConfig", 0.01),
        ("Float8WeightOnlyConfig", 0.03),
    ],
)
def test_torchao_gives_the_same_answers(config, distance, questions, batch):
    missing = "the extra `quantize` is not installed; make test-extras runs this"
    torchao = pytest.importorskip("torchao.quantization", reason=missing)
    quantization = TorchAoConfig(getattr(torchao, config)(), modules_to_not_convert=adapters.KEPT_WHOLE)
    model = load_tiny(quantization_config=quantization)
    adapters.check_quantized(model)
    answer, expected = questions
    assert answer(model) == expected
    whole, ours = logits(load_tiny(), batch), logits(model, batch)
    assert 0 < (ours - whole).norm() / whole.norm() < distance


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_float8_products_are_refused_without_a_gpu():
    missing = "the extra `quantize` is not installed; make test-extras runs this"
    torchao = pytest.importorskip("torchao.quantization", reason=missing)
    float8 = torchao.Float8DynamicActivationFloat8WeightConfig()
    with pytest.raises((RuntimeError, AssertionError)):
        load_tiny(quantization_config=TorchAoConfig(float8, modules_to_not_convert=adapters.KEPT_WHOLE))
