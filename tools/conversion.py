"""Turn a Molmo2 checkpoint into an STTS checkpoint, streaming: the source's weights are copied, never loaded."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..configuration_stts_molmo import STTSConfig, STTSMolmoConfig
from ..modeling_stts_molmo import STTSMolmoForConditionalGeneration, TokenScorer
from ..processing_stts_molmo import STTSMolmoProcessor, STTSMolmoVideoProcessor
from .checkpoint import make_config
from .files import fetch, locate_tensors, read_json, require_new_folder, written_whole
from .publishing import inherited, write_card

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
COPY_BYTES = 16 * 2**20

SCORER = "model.vision_tower.token_scorer."
# Names of a scorer trained by the authors' public code, and ours, both on disk.
AUTHORS_SCORER = {
    rf"transformer\.temporal_token_scorer\.{theirs}\.": f"token_scorer.{ours}."
    for theirs, ours in {
        r"patch_token_pooler\.wq": "token_pooler.q_proj",
        r"patch_token_pooler\.wk": "token_pooler.k_proj",
        r"patch_token_pooler\.wv": "token_pooler.v_proj",
        r"patch_token_pooler\.wo": "token_pooler.o_proj",
        r"mlp\.w1": "fc1",
        r"mlp\.w2": "fc2",
        r"mlp\.w3": "fc3",
    }.items()
}


def convert_checkpoint(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    stts_config: STTSConfig | dict | None = None,
    *,
    revision: str | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """
    Write an STTS checkpoint with the weights of a Molmo2 checkpoint, in their dtype, its tokenizer and chat template.

    The scorer is initialised afresh, unless the source holds one trained by the authors' public code; that one is kept.
    Memory use does not grow with the source: its weights go from file to file.

    Args:
        source: directory or Hub id of a Molmo2 checkpoint in safetensors, in Transformers' layout or the original one.
        destination: directory to write; must not exist, or be empty.
        stts_config: knobs of the new checkpoint. A dict changes single values of the default, which is
            `STTSConfig.authors()` for a source with the authors' scorer and `STTSConfig()` for any other.
        revision: branch, tag or commit of a Hub source.
        seed: seed of the scorer's initial weights.
        progress: called with (bytes copied, bytes in all) while weights are written.

    Returns:
        `destination` as a `Path`.

    Raises:
        FileExistsError: `destination` holds files already.
        FileNotFoundError: `source` is neither a directory nor a reachable Hub repository, or lacks files.
        ValueError: `source` is no Molmo2 checkpoint, is damaged or incomplete, or does not go with `stts_config`.
    """
    destination = require_new_folder(destination)
    name, source = (None if Path(source).is_dir() else str(source)), fetch(source, revision)
    config = _read_config(source)
    tensor_files = {name: tensor.file for name, tensor in locate_tensors(source).items()}
    renames = {name: ours for name in tensor_files if (ours := rename_authors_tensor(name)) != name}
    unknown = set() if isinstance(stts_config, STTSConfig) else set(stts_config or {}) - set(STTSConfig.__annotations__)
    if unknown:
        raise ValueError(f"stts_config={stts_config} has no such knob as {min(unknown)!r}; see STTSConfig.")
    if not isinstance(stts_config, STTSConfig):
        stts_config = (STTSConfig.authors if renames else STTSConfig)(**(stts_config or {}))
    model = _load_on_meta(source, config, stts_config, bool(renames))
    scorer = {} if renames else initial_scorer(model.config, model.dtype, seed)

    destination.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(destination) as folder:
        model.save_pretrained(folder, state_dict=scorer, save_original_format=True)  # as the rest is named
        _write_processor(source, folder)
        _write_weights(tensor_files, renames, folder, progress)
        write_card(folder, **inherited(source, name))
    return destination


def rename_authors_tensor(name: str) -> str:
    """`name` with the authors' scorer's part replaced by ours; other names come back as they are."""
    for theirs, ours in AUTHORS_SCORER.items():
        name = re.sub(theirs, ours, name)
    return name


def initial_scorer(config: STTSMolmoConfig, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """A fresh scorer's weights under their names in the model, the same for the same `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scorer = TokenScorer(config.vision_config, config.stts_config)
    return {SCORER + name: tensor for name, tensor in scorer.to(dtype).state_dict().items()}


def _read_config(source: Path) -> dict:
    config = read_json(source / CONFIG_NAME)
    model_type = config.get("model_type")
    if model_type == STTSMolmoConfig.model_type:
        raise ValueError(f"{source} is an STTS checkpoint already; load it as it is, there is nothing to convert.")
    if model_type != "molmo2":
        raise ValueError(f"{source} has model_type={model_type!r}, expected 'molmo2'; only Molmo2 can be converted.")
    return config


def _load_on_meta(
    source: Path, config: dict, stts_config: STTSConfig, has_scorer: bool
) -> STTSMolmoForConditionalGeneration:
    """The model without its weights, once it is certain that `source` holds them all, in the right shapes."""
    config = make_config(STTSMolmoConfig, {**config, "stts_config": stts_config}, source)
    model, report = STTSMolmoForConditionalGeneration.from_pretrained(
        source,
        config=config,
        key_mapping=AUTHORS_SCORER if has_scorer else None,
        device_map="meta",
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    if report["mismatched_keys"]:
        name, found, expected = min(report["mismatched_keys"])
        raise ValueError(f"{source}: {name} has shape {tuple(found)}, but the config calls for {tuple(expected)}.")
    missing = {name for name in report["missing_keys"] if has_scorer or not name.startswith(SCORER)}
    if missing:
        raise ValueError(f"{source} is incomplete: {len(missing)} tensors are missing, {min(missing)} among them.")
    return model


def _write_processor(source: Path, folder: Path) -> None:
    """Save the source's tokenizer, chat template and processor settings under our processor classes."""
    if not any((source / name).is_file() for name in PROCESSOR_FILES):
        return
    processor = STTSMolmoProcessor.from_pretrained(source)
    processor.video_processor = STTSMolmoVideoProcessor.from_pretrained(source)  # the source's settings name another
    for part in (processor, processor.image_processor, processor.video_processor):
        vars(part).pop("auto_map", None)  # would point to the source's code
    processor.save_pretrained(folder)


def _write_weights(
    tensor_files: dict[str, Path],
    renames: dict[str, str],
    folder: Path,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Copy the source's weight files into `folder`, beside the fresh scorer's if there is one, and index them all."""
    scorer_file = folder / SAFE_WEIGHTS_NAME
    files = sorted(set(tensor_files.values()))
    num_files = len(files) + scorer_file.exists()
    names = [f"model-{number:05d}-of-{num_files:05d}.safetensors" for number in range(1, num_files + 1)]

    copied, total = 0, sum(file.stat().st_size for file in files)
    for file, name in zip(files, names, strict=False):
        for num_bytes in _copy_renamed(file, folder / name, renames):
            copied += num_bytes
            if progress is not None:
                progress(copied, total)
    new_names = dict(zip(files, names, strict=False))
    weight_map = {renames.get(tensor, tensor): new_names[file] for tensor, file in tensor_files.items()}
    if scorer_file.exists():
        with safe_open(scorer_file, framework="pt") as scorer:
            weight_map |= dict.fromkeys(scorer.keys(), names[-1])
        shutil.copymode(folder / names[0], scorer_file)  # safetensors lets nobody but the owner read
        scorer_file.rename(folder / names[-1])
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _copy_renamed(source: Path, destination: Path, renames: dict[str, str]) -> Iterator[int]:
    """
    Copy a safetensors file with some of its tensors renamed; yield the number of bytes read, chunk by chunk.

    Only the header is rewritten (8 bytes of length, JSON, data), so the data is never parsed.
    """
    with source.open("rb") as reader, destination.open("wb") as writer:
        header = json.loads(reader.read(int.from_bytes(reader.read(8), "little")))
        metadata = {**header.pop("__metadata__", {}), "format": "pt"}
        header = {"__metadata__": metadata, **{renames.get(name, name): entry for name, entry in header.items()}}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # keeps the data aligned
        writer.write(len(encoded).to_bytes(8, "little") + encoded)
        yield reader.tell()
        while chunk := reader.read(COPY_BYTES):
            yield writer.write(chunk)
