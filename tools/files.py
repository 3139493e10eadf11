"""The files of a checkpoint, which may come from anybody: found, checked, and never one that lies elsewhere."""

import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

CHECKPOINT_FILES = ["README.md", "*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"]


def fetch(checkpoint: str | os.PathLike, revision: str | None = None) -> Path:
    """
    The directory of a checkpoint; one on the Hub is downloaded to the cache first.

    Raises:
        FileNotFoundError: it is neither a directory nor a reachable Hub repository.
        ValueError: see [`require_own_files`].
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(checkpoint), revision=revision, allow_patterns=CHECKPOINT_FILES))
        except (OSError, HFValidationError) as error:
            raise FileNotFoundError(
                f"{checkpoint} is neither a directory here nor a Hub repository that can be downloaded ({error})"
            ) from error
    require_own_files(folder)
    return folder


def require_own_files(folder: Path) -> None:
    """
    Check that whoever reads the checkpoint in `folder` reads nothing that lies elsewhere.

    Raises:
        ValueError: the index names weights outside of the folder, or a file is a link out of it. Links into the Hub's
            cache, of which a snapshot there consists, are none.
    """
    home = Path(os.path.realpath(folder))
    root = home.parents[1] if home.parent.name == "snapshots" else home
    for file in sorted(folder.iterdir()):
        target = os.path.realpath(file)
        if any(fnmatch(file.name, pattern) for pattern in CHECKPOINT_FILES) and not Path(target).is_relative_to(root):
            raise ValueError(f"{file} is a link out of its checkpoint, to {target}; put the file itself there.")
    weight_files(folder)


def weight_files(folder: Path) -> set[str]:
    """The names of a checkpoint's weight files; a `ValueError` where its index names another folder's."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return {SAFE_WEIGHTS_NAME}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no `weight_map` from tensors to files; fetch it again.")
    for name in weight_map.values():
        if not isinstance(name, str) or not name.endswith(".safetensors") or set(name) & set("/\\:\0"):
            raise ValueError(f"{index} names {name!r}; expected a safetensors file beside it, without a path.")
    return set(weight_map.values())


def read_json(file: Path) -> dict:
    """
    The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no JSON, or no object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} is missing, so {file.parent} is not a Transformers checkpoint.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}); fetch it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, expected a JSON object; fetch it again.")
    return content


class StoredTensor(NamedTuple):
    """Where a tensor is on disk, and how many numbers it has."""

    file: Path
    size: int


def locate_tensors(folder: Path) -> dict[str, StoredTensor]:
    """
    The tensors of a checkpoint by name, having checked that each weight file is whole.

    Raises:
        FileNotFoundError: a weight file is missing, or the weights are no safetensors.
        ValueError: one is damaged, or its numbers are integers and nothing says what they stand for.
    """
    is_quantized = "quantization_config" in read_json(folder / CONFIG_NAME)
    tensors = {}
    for file in sorted(folder / name for name in weight_files(folder)):
        try:
            with safe_open(file, framework="pt") as shard:
                found = {name: shard.get_slice(name) for name in shard.keys()}
                dtypes = {name: tensor.get_dtype() for name, tensor in found.items()}
                sizes = {name: math.prod(tensor.get_shape()) for name, tensor in found.items()}
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{file} is missing; the weights must be safetensors (save a PyTorch .bin checkpoint anew with "
                "Transformers to get them)."
            ) from error
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}); fetch it again.") from error
        integers = [name for name, dtype in dtypes.items() if not dtype.startswith(("F", "BF"))]
        if integers and not is_quantized:
            raise ValueError(
                f"{min(integers)} in {file} holds {dtypes[min(integers)]} numbers, and {CONFIG_NAME} has no "
                "`quantization_config` that says which weights these stand for; take the checkpoint as it was before "
                "it was quantized, or add what is missing."
            )
        tensors |= {name: StoredTensor(file, size) for name, size in sizes.items()}
    return tensors


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Gives a path to write to, which becomes `path` at the end; if writing fails, `path` is as it was."""
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        draft = Path(scratch) / path.name
        yield draft
        os.replace(draft, path)
