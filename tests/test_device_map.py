"""Parts of a model on devices of their own, and weights that do not fit left on the disk: the same answers."""

import pytest
import torch
from helpers import make_inputs, make_model
from stts_molmo.modeling_stts_molmo import STTSMolmoForConditionalGeneration

PARTS = ["model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint, and what its model answers."""
    folder, model = tmp_path_factory.mktemp("checkpoint"), make_model()
    model.save_pretrained(folder)
    return folder, *answer(model), sum(p.nbytes for p in model.parameters())


@torch.no_grad()
def answer(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of videos of two lengths, and what is generated after them."""
    inputs = make_inputs([4, 2])
    return model(**inputs).logits, model.generate(**inputs, max_new_tokens=4, do_sample=False)


def check(saved, tmp_path, **kwargs):
    folder, logits, sequences, _ = saved
    model = STTSMolmoForConditionalGeneration.from_pretrained(folder, offload_folder=tmp_path, **kwargs)
    ours, our_sequences = answer(model)
    assert torch.equal(ours, logits) and torch.equal(our_sequences, sequences)
    return model


@pytest.mark.parametrize("on_disk", PARTS)
def test_a_part_on_the_disk(on_disk, saved, tmp_path):
    model = check(saved, tmp_path, device_map={**dict.fromkeys(PARTS, "cpu"), on_disk: "disk"})
    assert all(parameter.is_meta for parameter in model.get_submodule(on_disk).parameters())


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_auto_with_too_little_memory(share, saved, tmp_path):
    model = check(saved, tmp_path, device_map="auto", max_memory={"cpu": int(share * saved[-1])})
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}


def test_auto_with_enough(saved, tmp_path):
    model = check(saved, tmp_path, device_map="auto")
    assert not any(parameter.is_meta for parameter in model.parameters())
