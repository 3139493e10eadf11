"""The converter: every layout of Molmo2 in, an STTS checkpoint out, and nothing half-written when it fails."""

import json
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from helpers import TINY, VOCAB_SIZE, HubHandler, config_dict, make_inputs, make_native, put_scratch_elsewhere
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stts_molmo.configuration_stts_molmo import STTSConfig
from stts_molmo.modeling_stts_molmo import STTSMolmoForConditionalGeneration
from stts_molmo.tools.conversion import convert_checkpoint
from transformers import (
    AutoTokenizer,
    Molmo2Config,
    Molmo2ForConditionalGeneration,
    Molmo2ImageProcessor,
    Molmo2Processor,
    Molmo2VideoProcessor,
)

WIDTH, MLP = 16, 24  # of the tiny ViT
KNOBS = {"prune_layer": 1}  # the tiny ViT has five layers
FEATURE_LAYERS = [4, 3]
AUTHORS_PREFIX = "model.vision_backbone.image_vit.transformer.temporal_token_scorer."
AUTHORS_SHAPES = {
    **{f"patch_token_pooler.{name}": (WIDTH, WIDTH) for name in ("wq", "wk", "wv", "wo")},
    "mlp.w1": (MLP, 2 * WIDTH),
    "mlp.w2": (MLP, MLP),
    "mlp.w3": (1, MLP),
}


def original_config(declared_layers: int) -> dict:
    """The tiny geometry as the released checkpoints write theirs: more ViT layers declared than there are weights."""
    config = Molmo2Config(**config_dict()).to_dict()
    vision, adapter, text = (config.pop(f"{name}_config") for name in ("vision", "adapter", "text"))
    vision["image_default_input_size"] = vision.pop("image_size")
    vision["image_patch_size"] = vision.pop("patch_size")
    vision["image_num_pos"] = vision.pop("num_position_embeddings")
    adapter["vit_layers"] = [layer - declared_layers for layer in FEATURE_LAYERS]
    del adapter["vision_feature_layer"]
    text |= {"rope_theta": text.pop("rope_parameters")["rope_theta"], "rope_scaling": None, "use_qk_norm": True}
    text |= {"layer_norm_eps": text.pop("rms_norm_eps"), "qkv_bias": text.pop("attention_bias")}
    return {
        **config,
        "auto_map": {"AutoConfig": "configuration_molmo2.Molmo2Config"},
        "vit_config": {**vision, "model_type": "molmo2", "num_hidden_layers": declared_layers},
        "adapter_config": {**adapter, "model_type": "molmo2"},
        "text_config": text,
    }


@pytest.fixture(scope="module")
def molmo2() -> Molmo2ForConditionalGeneration:
    return make_native()


@pytest.fixture
def source(molmo2, tmp_path) -> Path:
    """A native save: original tensor names, native config."""
    molmo2.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def original_source(source) -> Path:
    write_json(source / "config.json", original_config(declared_layers=7))
    return source


@pytest.fixture
def authors_source(original_source) -> Path:
    rewrite_weights(original_source, authors_scorer())
    return original_source


def authors_scorer() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    weights = {f"{AUTHORS_PREFIX}{name}.weight": shape for name, shape in AUTHORS_SHAPES.items()}
    biases = {f"{AUTHORS_PREFIX}{name}.bias": shape[:1] for name, shape in AUTHORS_SHAPES.items()}
    return {name: torch.randn(shape, generator=generator) / 6 for name, shape in (weights | biases).items()}


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content))


def edit_json(path: Path, **changes) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


def rewrite_weights(folder: Path, added: dict[str, torch.Tensor], removed: str = "") -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop(removed, None)
    save_file(weights | added, folder / "model.safetensors", metadata={"format": "pt"})


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors on disk, each found in the file that the index names."""
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        shard = load_file(file)
        assert {name for name, place in weight_map.items() if place == file.name} == set(shard)
        tensors |= shard
    assert set(weight_map) == set(tensors)
    return tensors


@torch.no_grad()
def assert_same_logits(converted: Path, molmo2: Molmo2ForConditionalGeneration) -> None:
    model, report = STTSMolmoForConditionalGeneration.from_pretrained(converted, output_loading_info=True)
    assert not any(report.values())
    inputs = make_inputs([3])
    logits = model.eval()(**inputs, prune_ratio=0.0).logits
    torch.testing.assert_close(logits, molmo2(**inputs).logits, rtol=0, atol=0)


@pytest.mark.parametrize("save_kwargs", [{}, {"save_original_format": False}, {"max_shard_size": "5KB"}], ids=str)
def test_native_checkpoint_keeps_its_logits(molmo2, tmp_path, save_kwargs):
    molmo2.save_pretrained(tmp_path / "source", **save_kwargs)
    destination = convert_checkpoint(tmp_path / "source", tmp_path / "new" / "stts", KNOBS)
    assert destination == tmp_path / "new" / "stts"
    assert os.listdir(destination.parent) == ["stts"]
    assert_same_logits(destination, molmo2)


def test_original_layout_is_trimmed_to_its_weights(original_source, tmp_path):
    native = Molmo2ForConditionalGeneration.from_pretrained(original_source).eval()
    destination = convert_checkpoint(original_source, tmp_path / "stts", KNOBS)
    config = json.loads((destination / "config.json").read_text())
    assert config["model_type"] == "stts_molmo"
    assert config["vision_config"]["num_hidden_layers"] == 5
    assert config["adapter_config"]["vision_feature_layer"] == FEATURE_LAYERS
    assert_same_logits(destination, native)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tensors_and_dtype_are_kept(molmo2, tmp_path, dtype):
    half = Molmo2ForConditionalGeneration(Molmo2Config(**config_dict())).to(dtype)
    half.save_pretrained(tmp_path / "source", max_shard_size="5KB")
    tensors = load_tensors(convert_checkpoint(tmp_path / "source", tmp_path / "stts", KNOBS))
    before = load_tensors(tmp_path / "source")
    assert {name for name in tensors if "token_scorer" in name} == tensors.keys() - before.keys()
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    for name, tensor in before.items():
        assert torch.equal(tensors[name], tensor), name


def test_scorer_is_drawn_from_the_seed(source, tmp_path):
    weights = [
        load_tensors(convert_checkpoint(source, tmp_path / f"stts{run}", KNOBS, seed=seed))[
            "model.vision_backbone.image_vit.token_scorer.fc1.weight"
        ]
        for run, seed in enumerate((0, 0, 1))
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_authors_scorer_is_kept_bit_for_bit(authors_source, tmp_path):
    destination = convert_checkpoint(authors_source, tmp_path / "stts", KNOBS | {"prune_ratio": 0.3})
    model, report = STTSMolmoForConditionalGeneration.from_pretrained(destination, output_loading_info=True)
    assert not any(report.values())
    assert model.config.stts_config.to_diff_dict() == STTSConfig.authors(**KNOBS, prune_ratio=0.3).to_diff_dict()
    scorer = model.model.vision_tower.token_scorer
    theirs = {name.removeprefix(AUTHORS_PREFIX): tensor for name, tensor in authors_scorer().items()}
    for kind in ("weight", "bias"):
        for name in "qkvo":
            ours = getattr(getattr(scorer.token_pooler, f"{name}_proj"), kind)
            assert torch.equal(ours, theirs[f"patch_token_pooler.w{name}.{kind}"])
        for layer in "123":
            assert torch.equal(getattr(getattr(scorer, f"fc{layer}"), kind), theirs[f"mlp.w{layer}.{kind}"])
    assert_same_logits(destination, Molmo2ForConditionalGeneration.from_pretrained(authors_source).eval())


def test_config_of_the_caller_wins(authors_source, source, tmp_path):
    destination = convert_checkpoint(authors_source, tmp_path / "stts", STTSConfig.paper(**KNOBS))
    stts_config = json.loads((destination / "config.json").read_text())["stts_config"]
    assert (stts_config["score_bias"], stts_config["aux_target"]) == ("log", "pooled")


def test_generation_config_is_carried_over(source, tmp_path):
    edit_json(source / "generation_config.json", max_new_tokens=77)
    destination = convert_checkpoint(source, tmp_path / "stts", KNOBS)
    assert json.loads((destination / "generation_config.json").read_text())["max_new_tokens"] == 77


def test_progress_ends_at_the_total(molmo2, tmp_path):
    molmo2.save_pretrained(tmp_path / "source", max_shard_size="5KB")
    steps = []
    convert_checkpoint(tmp_path / "source", tmp_path / "stts", KNOBS, progress=lambda *step: steps.append(step))
    done, totals = zip(*steps, strict=True)
    size = sum(file.stat().st_size for file in (tmp_path / "source").glob("*.safetensors"))
    assert list(done) == sorted(done) and done[-1] == size and set(totals) == {size}


# ----------------------------------------------------------------------------------------------------------------------
# Processor and code
# ----------------------------------------------------------------------------------------------------------------------


def native_processor() -> Molmo2Processor:
    size = {"height": 12, "width": 12}
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    return Molmo2Processor(
        Molmo2ImageProcessor(size=size, patch_size=2),
        Molmo2VideoProcessor(size=size, patch_size=2, num_frames=20),
        tokenizer,
        chat_template="hi",
    )


def split_processor_files(folder: Path) -> None:
    """Write the processor's settings as the released checkpoints have them: three files that name remote code."""
    settings = json.loads((folder / "processor_config.json").read_text())
    code = {
        "AutoImageProcessor": "image_processing_molmo2.Molmo2ImageProcessor",
        "AutoVideoProcessor": "video_processing_molmo2.Molmo2VideoProcessor",
        "AutoProcessor": "processing_molmo2.Molmo2Processor",
    }
    write_json(folder / "preprocessor_config.json", settings.pop("image_processor") | {"auto_map": code})
    write_json(folder / "video_preprocessor_config.json", settings.pop("video_processor") | {"auto_map": code})
    write_json(folder / "processor_config.json", settings | {"auto_map": code})


@pytest.mark.parametrize("layout", ["native", "original"])
def test_processor_is_carried_over_under_our_names(source, tmp_path, layout):
    native_processor().save_pretrained(source)
    if layout == "original":
        split_processor_files(source)
    destination = convert_checkpoint(source, tmp_path / "stts", KNOBS)
    settings = json.loads((destination / "processor_config.json").read_text())
    assert settings["processor_class"] == "STTSMolmoProcessor"
    assert settings["auto_map"]["AutoProcessor"] == "processing_stts_molmo.STTSMolmoProcessor"
    video = settings["video_processor"]
    assert video["num_frames"] == 20
    assert video["video_processor_type"] == "STTSMolmoVideoProcessor"
    assert video["auto_map"]["AutoVideoProcessor"] == "processing_stts_molmo.STTSMolmoVideoProcessor"
    assert (destination / "chat_template.jinja").read_text() == "hi"
    assert (destination / "tokenizer.json").is_file()
    for file in destination.glob("*.json"):
        assert "_molmo2." not in file.read_text(), f"{file.name} names the source's remote code"


LOAD_WITHOUT_PACKAGE = """
import sys
sys.modules.update(stts_molmo=None, stts_kernels=None)
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers import AutoProcessor, AutoVideoProcessor
for auto in (AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor,
             AutoVideoProcessor):
    print(auto.__name__, type(auto.from_pretrained(sys.argv[1], trust_remote_code=True)).__name__)
"""


def test_converted_checkpoint_brings_its_code(source, tmp_path):
    native_processor().save_pretrained(source)
    destination = convert_checkpoint(source, tmp_path / "stts", KNOBS)
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    output = subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_PACKAGE, destination],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert output.returncode == 0, output.stderr
    assert output.stdout.split("\n")[:-1] == [
        "AutoConfig STTSMolmoConfig",
        "AutoModel STTSMolmoModel",
        "AutoModelForImageTextToText STTSMolmoForConditionalGeneration",
        "AutoModelForMultimodalLM STTSMolmoForConditionalGeneration",
        "AutoProcessor STTSMolmoProcessor",
        "AutoVideoProcessor STTSMolmoVideoProcessor",
    ]


CONVERT_FROM_HUB = """
from stts_molmo.tools.conversion import convert_checkpoint
convert_checkpoint("team/clips-qa", "stts", dict(prune_layer=1))
"""


def test_source_on_a_hub(molmo2, source, tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(HubHandler, root=source, requests=[])) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "hub"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }
        command = [sys.executable, "-c", CONVERT_FROM_HUB]
        output = subprocess.run(
            command, cwd=tmp_path, env=os.environ | hub, capture_output=True, text=True, check=False
        )
        server.shutdown()
    assert output.returncode == 0, output.stderr
    assert_same_logits(tmp_path / "stts", molmo2)


# ----------------------------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------------------------

MEASURE = """
import resource, sys
from stts_molmo.tools.conversion import convert_checkpoint
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert_checkpoint(sys.argv[1], sys.argv[3], dict(prune_layer=1))
before = peak()
convert_checkpoint(sys.argv[2], sys.argv[4], dict(prune_layer=1))
print((peak() - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
def test_memory_does_not_grow_with_the_checkpoint(source, tmp_path):
    config = Molmo2Config(**config_dict())
    config.text_config.vocab_size = config.image_start_token_id = 1_000_000
    with torch.device("meta"):
        large = Molmo2ForConditionalGeneration(config)
    large.to_empty(device="cpu").save_pretrained(tmp_path / "large")
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert size > 250e6
    arguments = [source, tmp_path / "large", tmp_path / "stts", tmp_path / "large-stts"]
    output = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=False)
    assert output.returncode == 0, output.stderr
    assert int(output.stdout) < size / 4


# ----------------------------------------------------------------------------------------------------------------------
# Errors
# ----------------------------------------------------------------------------------------------------------------------


def cut_weights(source: Path) -> None:
    os.truncate(source / "model.safetensors", 30_000)


def to_pytorch_bin(source: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")


def lose_a_shard(source: Path) -> None:
    write_json(source / "model.safetensors.index.json", {"weight_map": {"lm_head.weight": "model-2.safetensors"}})


def widen_authors_mlp(source: Path) -> None:
    rewrite_weights(source, authors_scorer() | {f"{AUTHORS_PREFIX}mlp.w1.weight": torch.zeros(MLP + 1, 2 * WIDTH)})


def lose_authors_bias(source: Path) -> None:
    rewrite_weights(source, authors_scorer())
    rewrite_weights(source, {}, removed=f"{AUTHORS_PREFIX}mlp.w2.bias")


BREAKAGES = {
    "other model": (
        lambda source: edit_json(source / "config.json", model_type="llava"),
        ValueError,
        r"model_type='llava', expected 'molmo2'",
    ),
    "converted already": (
        lambda source: edit_json(source / "config.json", model_type="stts_molmo"),
        ValueError,
        "STTS checkpoint already",
    ),
    "no config": (lambda source: (source / "config.json").unlink(), FileNotFoundError, "config.json is missing"),
    "broken config": (
        lambda source: (source / "config.json").write_text("{"),
        ValueError,
        "config.json is not valid JSON",
    ),
    "invalid config": (
        lambda source: edit_json(source / "config.json", image_patch_id="many"),
        ValueError,
        "config.json .*is invalid.*image_patch_id",
    ),
    "no source": (shutil.rmtree, FileNotFoundError, "neither a directory"),
    "pytorch weights": (to_pytorch_bin, FileNotFoundError, "must be safetensors"),
    "shard missing": (lose_a_shard, FileNotFoundError, r"model-2.safetensors is missing"),
    "broken index": (
        lambda source: (source / "model.safetensors.index.json").write_text("{"),
        ValueError,
        "index.json is not valid JSON",
    ),
    "truncated": (cut_weights, ValueError, "model.safetensors is damaged"),
    "incomplete": (
        lambda source: rewrite_weights(source, {}, removed="lm_head.weight"),
        ValueError,
        "1 tensors are missing, lm_head.weight",
    ),
    "wrong shape": (
        lambda source: rewrite_weights(source, {"lm_head.weight": torch.zeros(VOCAB_SIZE, 33)}),
        ValueError,
        r"lm_head.weight has shape \(64, 33\), but the config calls for \(64, 32\)",
    ),
    "authors' shape": (widen_authors_mlp, ValueError, r"token_scorer.fc1.weight has shape \(25, 32\)"),
    "authors' scorer incomplete": (lose_authors_bias, ValueError, r"token_scorer.fc2.bias"),
}


@pytest.mark.parametrize(("breakage", "error", "message"), BREAKAGES.values(), ids=BREAKAGES)
def test_failure_is_explained_and_leaves_nothing(source, tmp_path, breakage, error, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    breakage(source)
    with pytest.raises(error, match=message):
        convert_checkpoint(source, tmp_path / "stts", KNOBS)
    assert set(os.listdir(tmp_path)) <= {"source"}


@pytest.mark.parametrize(
    "knobs", [{"prune_layer": 3}, {"prune_ratio": 1.0}, {"method": "magic"}, {"prune_ration": 0.3}], ids=str
)
def test_bad_knobs_are_refused(source, tmp_path, knobs):
    with pytest.raises(ValueError, match=next(iter(knobs))):
        convert_checkpoint(source, tmp_path / "stts", knobs)
    assert os.listdir(tmp_path) == ["source"]


def test_interrupted_copy_leaves_nothing(source, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "stts", KNOBS, progress=stop)
    assert os.listdir(tmp_path) == ["source"]


def test_the_checkpoint_is_written_beside_its_place(source, tmp_path, monkeypatch):
    put_scratch_elsewhere(tmp_path / "scratch", monkeypatch)
    convert_checkpoint(source, tmp_path / "stts", KNOBS)
    assert sorted(os.listdir(tmp_path)) == ["scratch", "source", "stts"]


def test_existing_files_are_not_overwritten(source, tmp_path):
    (tmp_path / "stts").mkdir()
    (tmp_path / "stts" / "notes.txt").write_text("mine")
    for destination in (tmp_path / "stts", tmp_path / "stts" / "notes.txt", source):
        with pytest.raises(FileExistsError, match="not an empty directory"):
            convert_checkpoint(source, destination, KNOBS)
    assert os.listdir(tmp_path / "stts") == ["notes.txt"]


def test_empty_destination_is_filled(source, tmp_path):
    (tmp_path / "stts").mkdir()
    convert_checkpoint(source, tmp_path / "stts", KNOBS)
    with safe_open(tmp_path / "stts" / "model-00002-of-00002.safetensors", framework="pt") as shard:
        assert all("token_scorer" in name for name in shard.keys())


def test_destination_may_be_a_link_but_not_the_current_directory(source, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(FileExistsError, match="is the current directory"):
        convert_checkpoint(source, ".", {"prune_layer": 1})
    monkeypatch.chdir(tmp_path)
    convert_checkpoint(source, "link", {"prune_layer": 1})
    assert (tmp_path / "link").is_symlink() and (tmp_path / "here" / "config.json").is_file()


def test_all_weight_files_can_be_read_by_the_same_people(source, tmp_path):
    folder = convert_checkpoint(source, tmp_path / "new", {"prune_layer": 1})
    assert len({file.stat().st_mode for file in folder.glob("*.safetensors")}) == 1
