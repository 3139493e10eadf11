"""Checkpoints as others meet them: with `trust_remote_code`, in a process where nothing of ours can be imported."""

import json
import threading
from functools import partial
from http.server import ThreadingHTTPServer

import pytest
import torch
from helpers import TINY, HubHandler, make_inputs, make_model, make_native, run_clean
from stts_molmo.modeling_stts_molmo import STTSMolmoForConditionalGeneration, STTSMolmoModel
from stts_molmo.processing_stts_molmo import STTSMolmoProcessor


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random model with the tiny checkpoint's processor, and its logits for fixed inputs."""
    path = tmp_path_factory.mktemp("checkpoint")
    model = make_model()
    model.save_pretrained(path)
    STTSMolmoProcessor.from_pretrained(TINY).save_pretrained(path)
    inputs = make_inputs([4, 2])
    with torch.no_grad():
        logits = model(**inputs).logits
    torch.save({"inputs": inputs, "logits": logits}, path / "expected.pt")
    return path


CHECK_LOGITS = """
expected = torch.load(directory + "/expected.pt")
with torch.no_grad():
    torch.testing.assert_close(model(**expected["inputs"]).logits, expected["logits"], atol=1e-5, rtol=1e-5)
"""


def test_auto_classes_are_named_in_the_config(checkpoint):
    auto_map = json.loads((checkpoint / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"}


def test_auto_classes_second_generation_and_trainer_checkpoint(checkpoint, tmp_path):
    run_clean(
        f"""
directory = {str(checkpoint)!r}
trust = dict(trust_remote_code=True)
config = AutoConfig.from_pretrained(directory, **trust)
assert config.stts_config.prune_ratio == 0.5 and config.model_type == "stts_molmo"
base = AutoModel.from_pretrained(directory, **trust)
assert type(base).__name__ == "STTSMolmoModel"
assert type(AutoModelForMultimodalLM.from_pretrained(directory, **trust)).__name__.endswith("ConditionalGeneration")
assert type(AutoVideoProcessor.from_pretrained(directory, **trust)).__name__ == "STTSMolmoVideoProcessor"
processor = AutoProcessor.from_pretrained(directory, **trust)
assert type(processor).__name__ == "STTSMolmoProcessor"
model = AutoModelForImageTextToText.from_pretrained(directory, **trust)
{CHECK_LOGITS}
sequences = model.generate(**expected["inputs"], max_new_tokens=3)
base_state = base.state_dict()
assert all(torch.equal(value, base_state[name]) for name, value in model.model.state_dict().items())

for generation in ("second", "third"):
    model.save_pretrained(generation)
    processor.save_pretrained(generation)
    model = AutoModelForImageTextToText.from_pretrained(generation, **trust)
    processor = AutoProcessor.from_pretrained(generation, **trust)
    {CHECK_LOGITS.strip().replace(chr(10), chr(10) + "    ")}

from transformers import Trainer, TrainingArguments

class Data(torch.utils.data.Dataset):
    def __len__(self): return 2
    def __getitem__(self, index): return index

def collate(rows):
    ids = expected["inputs"]["input_ids"]
    return dict(expected["inputs"], labels=torch.where(ids < 60, ids, -100))

arguments = TrainingArguments("trainer", max_steps=2, save_steps=2, report_to=[], use_cpu=True,
                              remove_unused_columns=False, per_device_train_batch_size=2)
Trainer(model, arguments, data_collator=collate, train_dataset=Data(), processing_class=processor).train()
reloaded = AutoModelForImageTextToText.from_pretrained("trainer/checkpoint-2", **trust)
assert all(torch.equal(value, reloaded.state_dict()[name]) for name, value in model.state_dict().items())
AutoProcessor.from_pretrained("trainer/checkpoint-2", **trust)
""",
        tmp_path,
    )


def test_trust_in_one_checkpoint_is_not_trust_in_all(checkpoint, tmp_path):
    """Without trust it is an error, no plain Molmo2; and the code of a trusted checkpoint registers nothing."""
    run_clean(
        f"""
def refuse(directory):
    for auto in (AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor,
                 AutoVideoProcessor):
        try:
            auto.from_pretrained(directory, trust_remote_code=False)
        except ValueError as error:
            assert "trust_remote_code" in str(error), error
        else:
            raise AssertionError(auto.__name__)

refuse({str(checkpoint)!r})
model = AutoModelForImageTextToText.from_pretrained({str(TINY)!r}, trust_remote_code=True)
processor = AutoProcessor.from_pretrained({str(TINY)!r}, trust_remote_code=True)
assert type(model).__name__ == "STTSMolmoForConditionalGeneration"
assert type(processor).__name__ == "STTSMolmoProcessor"
refuse({str(checkpoint)!r})
""",
        tmp_path,
    )


def test_a_repository_on_a_hub(checkpoint, tmp_path):
    requests: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(HubHandler, root=checkpoint, requests=requests))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        run_clean(
            f"""
directory = {str(checkpoint)!r}
trust = dict(trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained("team/clips-qa", **trust)
{CHECK_LOGITS}
processor = AutoProcessor.from_pretrained("team/clips-qa", **trust)
assert type(processor).__name__ == "STTSMolmoProcessor"
assert type(AutoVideoProcessor.from_pretrained("team/clips-qa", **trust)).__name__ == "STTSMolmoVideoProcessor"
model.save_pretrained("copy")
processor.save_pretrained("copy")
import json
assert "--" not in json.dumps(json.load(open("copy/config.json"))["auto_map"])
model = AutoModelForImageTextToText.from_pretrained("copy", **trust)
{CHECK_LOGITS}
""",
            tmp_path,
            HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}",
            HF_HUB_OFFLINE="0",
            HF_HUB_DISABLE_XET="1",
            NO_PROXY="127.0.0.1",
        )
    finally:
        server.shutdown()
        server.server_close()
    assert any("/resolve/" in path and path.endswith("modeling_stts_molmo.py") for path in requests)


@torch.no_grad()
def test_native_save_loads_with_equal_weights_and_a_fresh_scorer(tmp_path):
    """A plain Molmo2 checkpoint, in the original key layout that native saves have, is no noise to our class."""
    native = make_native()
    native.save_pretrained(tmp_path)
    model, info = STTSMolmoForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True, config=make_model().config
    )
    assert info["missing_keys"] and all("token_scorer" in name for name in info["missing_keys"])
    inputs = make_inputs([4])
    assert torch.equal(model.eval()(**inputs, prune_ratio=0).logits, native(**inputs).logits)
    scorer = model.model.vision_tower.token_scorer
    assert scorer.fc1.weight.std() > 0.5 * scorer.fc1.in_features**-0.5
    assert model(**inputs).keep_mask.sum() == 8


def test_base_model_round_trip(tmp_path):
    model = make_model()
    model.model.save_pretrained(tmp_path)
    loaded = STTSMolmoModel.from_pretrained(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.model.state_dict().items())
