"""Files: of checkpoints, which may come from anybody, found and checked; and what is written whole or not at all."""

import json
import math
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

try:
    import fcntl
except ImportError:  # on Windows: what a killed run leaves behind stays there
    fcntl = None

logger = logging.get_logger(__name__)

SCRATCH = ".partial"  # how the names of folders end that are gone when a file or checkpoint is whole
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


def newest_checkpoint(folder: str | os.PathLike) -> Path | None:
    """
    The newest whole checkpoint in the folder of a Trainer's run; `None` where there is none. Warns of newer ones that
    are not, as a run that is killed while it saves leaves them.
    """
    numbered = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(folder).glob("checkpoint-*")]
    for _, checkpoint in sorted(((int(found[1]), path) for found, path in numbered if found), reverse=True):
        if is_whole(checkpoint):
            return checkpoint
        logger.warning(f"{checkpoint} is not whole and is passed over: a run was killed while it saved it.")
    return None


def is_whole(checkpoint: Path) -> bool:
    """Whether all is there that a Trainer writes: its state, which comes last, and no file that is cut short."""
    try:
        read_json(checkpoint / "trainer_state.json")
        files = [file for file in checkpoint.rglob("*") if file.is_file()]
        weights = [file for file in files if file.suffix == ".safetensors"]
        if (checkpoint / SAFE_WEIGHTS_INDEX_NAME).is_file():
            weights += [checkpoint / name for name in weight_files(checkpoint)]
        for file in weights:
            with safe_open(file, framework="pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    # What torch saves is a zip archive, whose directory stands at its end; of sharded states `.metadata` comes last.
    archives = [file for file in files if file.suffix in (".pt", ".pth", ".bin")]
    sharded = {file.parent for file in files if file.suffix == ".distcp"}
    return (
        bool(weights or sharded)
        and all(map(zipfile.is_zipfile, archives))
        and all((part / ".metadata").is_file() for part in sharded)
    )


def require_new_folder(folder: str | os.PathLike) -> Path:
    """The absolute path of a folder to be written; a `FileExistsError` where something is there already."""
    folder = Path(folder).resolve()
    if folder == Path.cwd():
        raise FileExistsError(f"{folder} is the current directory; name a new one below it.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty directory; choose another or remove it.")
    return folder


@contextmanager
def scratch_beside(path: Path) -> Iterator[Path]:
    """
    A folder on the file system of `path`, gone in the end. Removes what a process that was killed left of an earlier
    one for the same `path`, and says so.
    """
    prefix = f".{path.name}."
    for left in path.parent.iterdir():
        if left.name.startswith(prefix) and left.name.endswith(SCRATCH) and (lock := try_lock(left)) is not None:
            shutil.rmtree(left)
            os.close(lock)
            logger.warning(f"{left} is gone: a run that was killed had left it behind.")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=prefix, suffix=SCRATCH) as folder:
        lock = try_lock(folder)
        try:
            yield Path(folder)
        finally:
            if lock is not None:
                os.close(lock)


def try_lock(folder: str | os.PathLike) -> int | None:
    """A descriptor that locks `folder` until it is closed or its process ends; `None` where another has the lock."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # some file systems have no locks: nobody can tell then what was left behind
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Gives a path to write to, which becomes `path` at the end; if writing fails, `path` is as it was."""
    path = Path(path)
    with scratch_beside(path) as scratch:
        draft = scratch / path.name
        yield draft
        os.replace(draft, path)
