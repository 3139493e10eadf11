"""Rows to a file and back, as JSON Lines or parquet, and rows that survive whatever ends the process."""

import json
import os
from pathlib import Path

from .files import written_whole

SUFFIXES = (".jsonl", ".parquet")


def require_table(path: Path) -> None:
    """Raise an error that says what to do where rows cannot be written to `path`."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--output {path} must end in {' or '.join(SUFFIXES)}.")
    if path.is_dir():
        raise ValueError(f"--output {path} is a directory; name a file.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no directory {path.parent} for --output {path}; make it first.")
    if is_parquet(path):
        import_pyarrow()


def is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def import_pyarrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "parquet needs pyarrow: pip install 'stts-molmo[parquet]', or write to a file that ends in .jsonl."
        ) from error
    return pyarrow


def write_rows(rows: list[dict], columns: dict[str, type], path: Path) -> None:
    """
    Write `rows`, whole or not at all.

    Args:
        columns: in order, with the type of their values, which may be `None` too.
        path: ends in one of `SUFFIXES`.
    """
    with written_whole(path) as draft:
        if is_parquet(path):
            pyarrow = import_pyarrow()
            types = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}
            schema = pyarrow.schema([(name, types[kind]) for name, kind in columns.items()])
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), draft)
        else:
            draft.write_text("".join(to_line({name: row[name] for name in columns}) for row in rows), encoding="utf-8")


def read_rows(path: Path) -> list[dict]:
    """The rows that [`write_rows`] wrote to a file, none if there is none; a `ValueError` if it holds others."""
    if not path.exists():
        return []
    if not is_parquet(path):
        return from_lines(path, path.read_bytes())
    try:
        return import_pyarrow().parquet.read_table(path).to_pylist()
    except ValueError as error:  # pyarrow's own is one
        raise unreadable(path, error) from error


def to_line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def from_lines(path: Path, data: bytes) -> list[dict]:
    """The rows in `data`, read from `path`."""
    try:
        rows = [json.loads(line) for line in data.splitlines()]
    except ValueError as error:
        raise unreadable(path, error) from error
    if not all(isinstance(row, dict) for row in rows):
        raise unreadable(path, "a line is no JSON object")
    return rows


def unreadable(path: Path, reason) -> ValueError:
    return ValueError(f"{path} holds no rows that can be read ({reason}); remove it or name another file.")


class Journal:
    """
    Rows in a file of JSON lines, each of which is on disk before the next is made. What is left of a line that was
    being written when the process ended is dropped.
    """

    def __init__(self, path: Path):
        self.path = path
        data = path.read_bytes() if path.exists() else b""
        whole = data.rfind(b"\n") + 1
        self.rows = from_lines(path, data[:whole])
        if whole < len(data):
            os.truncate(path, whole)

    def append(self, row: dict) -> None:
        self.rows.append(row)
        with open(self.path, "ab") as file:
            file.write(to_line(row).encode())
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
