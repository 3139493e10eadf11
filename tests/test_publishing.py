"""Publishing: a card that is true, a folder that loads anywhere, and one commit, whatever the connection does."""

import json
import shutil
import time
from pathlib import Path

import huggingface_hub
import pytest
from helpers import (
    CLIP,
    ROOT,
    TINY,
    load_processor,
    load_script,
    make_tokenized_model,
    run_clean,
    save_plain_molmo2,
)
from hub import REPO, writable_hub
from stts_molmo.tools import publishing
from stts_molmo.tools.cli import app
from stts_molmo.tools.conversion import initial_scorer
from stts_molmo.tools.publishing import (
    GENERATED,
    inherited,
    publish_checkpoint,
    read_front_matter,
    write_card,
)
from typer.testing import CliRunner

ASK = f"""
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
ask = pipeline(model={REPO!r}, trust_remote_code=True)
question = [{{"type": "video", "path": {CLIP!r}}}, {{"type": "text", "text": "What color is the still shape?"}}]
answer = ask(text=[{{"role": "user", "content": question}}], max_new_tokens=6, return_full_text=False)
print(type(ask.model).__name__, repr(answer[0]["generated_text"]))

model = AutoModelForImageTextToText.from_pretrained({REPO!r}, trust_remote_code=True)
processor = AutoProcessor.from_pretrained({REPO!r}, trust_remote_code=True)
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": question}}],
    tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt",
)
sequence = model.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
print(type(model).__name__, repr(processor.decode(sequence, skip_special_tokens=True)))
"""


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A trained checkpoint in two weight files, in the folder of a training run, without a card."""
    folder = tmp_path / "run"
    model = make_tokenized_model()
    model.save_pretrained(folder, max_shard_size="100KB")
    load_processor().save_pretrained(folder)
    for left_over in ("trainer_state.json", "training_args.bin", "optimizer.pt"):
        (folder / left_over).write_text("{}")
    (folder / "checkpoint-2").mkdir()
    return folder


@pytest.fixture
def untrained(tmp_path) -> Path:
    folder = tmp_path / "untrained"
    model = make_tokenized_model()
    model.load_state_dict(initial_scorer(model.config, model.dtype, seed=0), strict=False)
    model.save_pretrained(folder)
    load_processor().save_pretrained(folder)
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server that this process takes for the Hub, whose client waits for nothing between attempts."""
    with writable_hub(tmp_path / "hub") as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield hub


@pytest.fixture
def loads(monkeypatch):
    """Spares a process of its own where loading is not what is tested."""
    monkeypatch.setattr(publishing, "check_loads", lambda folder: None)


def test_a_broken_upload_leaves_the_branch_and_goes_on_later(checkpoint, hub, loads):
    weights = sorted(checkpoint.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    assert len(weights) > 1
    main = hub.branches / "main"
    main.mkdir(parents=True)
    (main / "model.safetensors").write_bytes(b"of last year")
    hub.broken[weights[-1].stat().st_size] = 1000
    with pytest.raises(ConnectionError, match=f"{REPO} is as it was before"):
        publish_checkpoint(checkpoint, REPO)
    assert not hub.commits and [path.name for path in main.iterdir()] == ["model.safetensors"]
    arrived = set(hub.uploads)
    assert arrived

    hub.broken.clear()
    hub.requests.clear()
    files, address = publish_checkpoint(checkpoint, REPO)
    assert address.startswith(f"{hub.endpoint}/{REPO}/commit/")
    sent = {path.rpartition("/")[2] for path in hub.requests if path.startswith("/upload/")}
    assert sent and not sent & arrived and len(sent | arrived) == len(weights)
    names = sorted(file.name for file in files)
    assert hub.commits == [("main", names, ["model.safetensors"])]
    assert {"README.md", "config.json", "modeling_stts_molmo.py", "processor_config.json"} <= set(names)
    assert not {"trainer_state.json", "training_args.bin", "optimizer.pt"} & set(names)

    publish_checkpoint(checkpoint, REPO, revision="next")
    assert hub.commits[1:] == [("next", names, [])]


def test_from_nothing_to_an_answer_by_name(hub, tmp_path, monkeypatch):
    """A plain Molmo2 is converted, trained a little and published; others, with nothing of ours, ask it by its name."""
    save_plain_molmo2(tmp_path / "molmo2")
    run = CliRunner().invoke
    assert run(app, ["convert", str(tmp_path / "molmo2"), str(tmp_path / "stts")]).exit_code == 0
    unfit = run(app, ["publish", str(tmp_path / "stts"), REPO])
    assert unfit.exit_code == 2 and "was never trained" in unfit.output and not hub.requests
    finetune = load_script("finetune")
    flags = ["--model", str(tmp_path / "stts"), "--dataset", str(ROOT / "examples" / "finetune.jsonl"), "--use_cpu"]
    flags += ["--output_dir", str(tmp_path / "trained"), "--max_steps", "2", "--warmup_steps", "1", "--num_frames", "4"]
    finetune.main([*flags, "--disable_tqdm", "True", "--scorer_warmup_steps", "2"])
    published = run(app, ["publish", str(tmp_path / "trained"), REPO])
    assert published.exit_code == 0, published.output
    ((branch, names, _),) = hub.commits
    assert branch == "main" and "finetune.jsonl" in (hub.branches / "main" / "README.md").read_text()
    clean = tmp_path / "clean"
    clean.mkdir()
    by_pipeline, by_hand = run_clean(ASK, clean, **hub.environment).splitlines()
    assert by_pipeline.startswith("STTSMolmoForConditionalGeneration ") and by_hand == by_pipeline


def test_one_break_is_no_matter(checkpoint, hub, loads):
    size = max(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    hub.broken[size] = 1
    publish_checkpoint(checkpoint, REPO)
    assert len(hub.commits) == 1


def test_dry_run_checks_and_uploads_nothing(tmp_path):
    folder = Path(shutil.copytree(TINY, tmp_path / "tiny"))
    result = CliRunner().invoke(app, ["publish", str(folder), REPO, "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "Not published: --dry-run." in result.output
    assert {line.split()[0] for line in result.output.splitlines()[:-1]} >= {path.name for path in TINY.iterdir()}
    assert (folder / "README.md").read_text() == (TINY / "README.md").read_text()  # it has one of its own


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "outputs_stts_molmo.py").unlink(), "does not load with trust_remote_code=True"),
        (
            lambda folder: next(folder.glob("*.safetensors")).write_bytes(b"no weights"),
            "no weights in readable",
        ),
        (lambda folder: (folder / "README.md").write_text("---\nlicense: mit\n---\nMine"), "pipeline_tag: image-text"),
    ],
    ids=["code", "weights", "card"],
)
def test_what_others_could_not_use_is_refused(checkpoint, damage, message):
    damage(checkpoint)
    with pytest.raises(ValueError, match=message):
        publish_checkpoint(checkpoint, REPO, dry_run=True)


def test_an_untrained_scorer_is_refused_unless_told(untrained, loads):
    result = CliRunner().invoke(app, ["publish", str(untrained), REPO, "--dry-run"])
    assert result.exit_code == 2 and "was never trained" in result.output
    publish_checkpoint(untrained, REPO, dry_run=True, allow_untrained=True)
    assert "| token scorer | **not trained**" in (untrained / "README.md").read_text()


def test_a_plain_molmo2_is_refused(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "model_type": "molmo2"}))
    with pytest.raises(ValueError, match="plain Molmo2 checkpoint without a token scorer"):
        publish_checkpoint(checkpoint, REPO, dry_run=True)


# ----------------------------------------------------------------------------------------------------------------------
# The card
# ----------------------------------------------------------------------------------------------------------------------


def test_card_says_what_the_checkpoint_is(checkpoint, tmp_path):
    results = tmp_path / "results.json"
    rows = [{"method": name, "accuracy": 0.62361, "interval": [0.6, 0.64]} for name in ("scorer", "none")]
    results.write_text(json.dumps({"rows": rows}))
    write_card(checkpoint, base_model="allenai/Molmo2-4B", license="apache-2.0", trained_on="clips, 6 steps")
    card = write_card(checkpoint, model=REPO, results=results)  # knows from the first one what it is not told

    data, text = read_front_matter(card), card.read_text()
    assert data["pipeline_tag"] == "image-text-to-text" and data["library_name"] == "transformers"
    assert (data["base_model"], data["license"]) == ("allenai/Molmo2-4B", "apache-2.0")
    assert inherited(checkpoint) == {"base_model": "allenai/Molmo2-4B", "license": "apache-2.0"}
    assert (
        "| token scorer | trained on clips, 6 steps |" in text and "| share of a video's tokens dropped | 50% |" in text
    )
    assert "| scored after vision layer | 1 (counted from 0) of 5 |" in text and "| chosen by | `scorer` |" in text
    assert "| method | accuracy | interval |\n| --- | --- | --- |\n| scorer | 0.6236 | 0.6 to 0.64 |" in text


def test_a_card_of_ones_own_stays(checkpoint):
    card = write_card(checkpoint)
    mine = card.read_text().replace(GENERATED, "My own words.")
    card.write_text(mine)
    assert write_card(checkpoint, trained_on="more").read_text() == mine


def test_results_that_are_none(checkpoint, tmp_path):
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(ValueError, match="results.json is no results file"):
        write_card(checkpoint, results=tmp_path / "results.json")
