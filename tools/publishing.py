"""A checkpoint for others: its model card, and the one commit that puts it on the Hub."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from string import Template

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCardData
from huggingface_hub.errors import HTTPError, RevisionNotFoundError
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import filter_repo_objects

from .checkpoint import TRAIN_OR_COSINE, has_untrained_scorer, read_metadata, require_stts

CARD = "README.md"
# What a model repository holds; a training run's folder holds more (optimizer states, arguments, logs).
PUBLISHED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*_stts_molmo.py", CARD]
NOT_PUBLISHED = ["trainer_state.json", "all_results.json", "train_results.json", "eval_results.json"]

# A card that has this line is written anew by whoever knows more; without it, it is a person's and stays.
GENERATED = "<!-- Written by stts-molmo. Remove this line, and `stts-molmo publish` leaves your text as it is. -->"
TEMPLATE = Template(
    """
$generated

# $title

$origin with STTS (Spatio-Temporal Token Scoring): a scorer inside the vision transformer drops the share of a video's
tokens that matter least, for the rest of the vision transformer and for the language model.

| | |
| --- | --- |
| share of a video's tokens dropped | $dropped |
| chosen by | $method |
| scored after vision layer | $prune_layer |
| token scorer | $scorer |

## Ask about a video

With `pip install "transformers>=5.20.2,<6" torch torchvision av`:

```python
from transformers import pipeline

ask = pipeline("image-text-to-text", model="$model", trust_remote_code=True)
question = [{"type": "video", "path": "clip.mp4"}, {"type": "text", "text": "What happens?"}]
answer = ask(text=[{"role": "user", "content": question}], max_new_tokens=64, return_full_text=False)
print(answer[0]["generated_text"])
```

For one call `generate` takes another `prune_ratio`, or a `method`: `"scorer"`, `"cosine"`, `"random"`, `"tome"`, or
`"none"`.
$results"""
)
RESULTS = Template("""
## What was measured

$table
""")

# In a process of its own, where nothing of ours can be imported but what the folder carries. On "meta" the weights'
# names and shapes are checked, and none is read.
LOAD_AS_OTHERS_DO = """
import sys
sys.modules["stts_molmo"] = sys.modules["stts_kernels"] = None
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging
logging.set_verbosity_error()
logging.disable_progress_bar()
AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
_, report = AutoModelForImageTextToText.from_pretrained(
    sys.argv[1], trust_remote_code=True, device_map="meta", output_loading_info=True
)
missing = sorted(report["missing_keys"])
if missing:
    sys.exit(f"{len(missing)} weights are missing, {missing[0]} among them")
"""


def write_card(
    folder: str | os.PathLike,
    *,
    model: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    trained_on: str | None = None,
    results: str | os.PathLike | None = None,
) -> Path:
    """
    Write the model card of a checkpoint from what it is; what is not given comes from the card that it has.

    Args:
        folder: of the checkpoint.
        model: how others will name it; the folder's name when not given.
        base_model: Hub id of the Molmo2 that it was made of.
        license: as the Hub names it, such as `"apache-2.0"`.
        trained_on: what its scorer was trained on, in a few words.
        results: JSON file of [`results_table`].

    Returns:
        The card's path. A card that a person wrote is left as it is.

    Raises:
        ValueError: the folder is no STTS checkpoint, or `results` is another kind of file.
    """
    folder = Path(folder)
    path, config = folder / CARD, require_stts(str(folder))
    if path.exists() and GENERATED not in path.read_text(encoding="utf-8"):
        return path
    known = read_front_matter(path)
    base_model, license = base_model or known.get("base_model"), license or known.get("license")
    trained_on = trained_on or known.get("trained_on")
    data = ModelCardData(
        pipeline_tag="image-text-to-text",  # the pipeline that takes it; "video-text-to-text" is none
        library_name="transformers",
        license=license,
        base_model=base_model,
        tags=["video-text-to-text", "molmo2", "stts", "token-pruning", "custom_code"],
        trained_on=trained_on,
    )
    stts, pruning = config.stts_config, config.stts_config.pruning()
    trained = f"trained on {trained_on}" if trained_on else "trained"
    model = model or folder.resolve().name
    budget = pruning.max_vision_tokens
    text = TEMPLATE.substitute(
        generated=GENERATED,
        title=model.rpartition("/")[2],
        model=model,
        origin=f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "Molmo2",
        dropped=f"{pruning.prune_ratio:.0%}" if budget is None else f"what it has above {budget} tokens",
        method=f"`{stts.method}`",
        prune_layer=f"{stts.prune_layer} (counted from 0) of {config.vision_config.num_hidden_layers}",
        scorer=f"**not trained**. {TRAIN_OR_COSINE}" if has_untrained_scorer(folder) else trained,
        results="" if results is None else RESULTS.substitute(table=results_table(results)),
    )
    path.write_text(f"---\n{data.to_yaml()}\n---\n{text}", encoding="utf-8")
    return path


def inherited(source: str | os.PathLike, name: str | None = None) -> dict[str, str | None]:
    """
    What the card of a checkpoint made of `source` takes from it: `base_model` and `license`, for [`write_card`].

    Args:
        source: local folder.
        name: its Hub id, if it has one.
    """
    known = read_front_matter(Path(source) / CARD)
    return {"base_model": name or known.get("base_model"), "license": known.get("license")}


def read_front_matter(card: Path) -> dict:
    """What stands between the dashes at a card's beginning; nothing where there is no card."""
    return (metadata_load(card) if card.is_file() else None) or {}


def results_table(file: str | os.PathLike) -> str:
    """
    A Markdown table of a JSON file of results: `{"rows": [{name: value, ...}, ...]}`, each row with the same names.

    Raises:
        ValueError: it is no such file.
    """
    try:
        rows = json.loads(Path(file).read_text(encoding="utf-8"))["rows"]
        names = list(rows[0])
        lines = [names, ["---"] * len(names), *([format_cell(row[name]) for name in names] for row in rows)]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f'--results {file} is no results file ({error!r}); expected JSON, {{"rows": [{{"method": "scorer", '
            '"accuracy": 0.62}}, ...]}}, every row with the same names.'
        ) from error
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_cell(value) -> str:
    if isinstance(value, list):
        return " to ".join(map(format_cell, value))
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def published_files(folder: Path) -> list[Path]:
    """Files of a checkpoint that others need; what else a training run left there is not among them."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    return [
        folder / name for name in filter_repo_objects(names, allow_patterns=PUBLISHED, ignore_patterns=NOT_PUBLISHED)
    ]


def check_loads(folder: Path) -> None:
    """
    Load a checkpoint as somebody does who has nothing of ours, in a process and a module cache of its own.

    Raises:
        ValueError: it does not load; the message has the reason.
    """
    read_metadata(str(folder))  # a damaged file is an error here
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "HF_MODULES_CACHE": cache, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-c", LOAD_AS_OTHERS_DO, str(folder.resolve())]
        # Elsewhere, so that a repository's own files are not found as modules.
        process = subprocess.run(command, env=environment, cwd=cache, capture_output=True, text=True)
    if process.returncode:
        reason = (process.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(
            f"{folder} does not load with trust_remote_code=True where stts-molmo is not installed: {reason}. "
            "Save model and processor into it with `save_pretrained`, or make it with `stts-molmo convert`."
        )


def publish_checkpoint(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    results: str | os.PathLike | None = None,
    allow_untrained: bool = False,
    dry_run: bool = False,
) -> tuple[list[Path], str | None]:
    """
    Put a checkpoint on the Hub in a single commit: code, weights, processor, tokenizer and model card.

    All weights are uploaded before the commit is made, so a branch holds the whole of it or nothing. After a broken
    connection the same call goes on with what is missing.

    Args:
        folder: of the checkpoint.
        repo_id: such as `"me/molmo2-4b-stts"`; made when it is not there.
        private: make it for yourself and your organization only; one that is there stays what it is.
        revision: branch, made when it is not there; `main` when not given.
        results: JSON file of what was measured, for the card; see [`results_table`].
        allow_untrained: publish a scorer that was never trained, which the card then says.
        dry_run: check everything, write the card, and upload nothing.

    Returns:
        The files, and the address of the commit, `None` of a dry run.

    Raises:
        ValueError: `folder` is no STTS checkpoint, does not load in a clean process, has an untrained scorer or a card
            without the pipeline that it is for.
        ConnectionError: the Hub cannot be reached, or refuses.
    """
    folder = Path(folder)
    config = require_stts(str(folder))
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no directory {folder}; a checkpoint to publish is one of this machine.")
    if config.stts_config.method == "scorer" and has_untrained_scorer(folder) and not allow_untrained:
        raise ValueError(
            f"The token scorer of {folder} was never trained: what it keeps is random. {TRAIN_OR_COSINE} "
            "To publish it as it is, pass --allow-untrained."
        )
    card = write_card(folder, model=repo_id, results=results)
    if read_front_matter(card).get("pipeline_tag") != "image-text-to-text":
        raise ValueError(
            f"{card} does not say `pipeline_tag: image-text-to-text` between the dashes at its beginning, without "
            "which `pipeline(model=...)` finds no task; add it, or remove the file to have one written."
        )
    check_loads(folder)
    files = published_files(folder)
    if dry_run:
        return files, None
    try:
        return files, commit_files(HfApi(), files, repo_id, private, revision)
    except (HTTPError, RuntimeError) as error:  # RuntimeError: of an upload, around what happened
        raise ConnectionError(
            f"{repo_id} is as it was before: {error.__cause__ or error}. Run the same command again; what has been "
            "uploaded is not sent twice."
        ) from error


def commit_files(api: HfApi, files: Iterable[Path], repo_id: str, private: bool, revision: str | None) -> str:
    """The address of one commit that adds `files` and removes weights and code that are not among them."""
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    try:
        there = api.list_repo_files(repo_id, revision=revision)
    except RevisionNotFoundError:  # a repository without a commit
        there = []
    additions = [CommitOperationAdd(file.name, file.resolve()) for file in files]
    replaced = set(filter_repo_objects(there, allow_patterns=["*.safetensors", "*.safetensors.index.json", "*.py"]))
    stale = sorted(replaced - {addition.path_in_repo for addition in additions})
    # Not `upload_folder`, which may make several commits of one folder.
    commit = api.create_commit(
        repo_id,
        [*additions, *map(CommitOperationDelete, stale)],
        commit_message="Publish an STTS checkpoint",
        revision=revision,
    )
    return str(commit.commit_url)
