"""What a person at a terminal sees while the command line works."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

stderr = Console(stderr=True)


@contextmanager
def timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Add the wall-clock time that it took to `seconds[name]`."""
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


@contextmanager
def spinner(description: str) -> Iterator[None]:
    """Show on stderr what is going on, unless a bar does."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    is_hidden = not stderr.is_terminal or bool(BARS)
    with Progress(*columns, console=stderr, transient=True, disable=is_hidden) as progress:
        progress.add_task(description)
        yield


BARS: list[Progress] = []  # a terminal has room for one thing that moves


@contextmanager
def progress_bar(description: str, total: int, left: int) -> Iterator[Callable[[], None]]:
    """Show on stderr how many of `total` are done, `left` of them not yet; gives what is called after each."""
    columns = *Progress.get_default_columns(), MofNCompleteColumn()
    with Progress(*columns, console=stderr, disable=not stderr.is_terminal) as progress:
        task = progress.add_task(description, total=total, completed=total - left)
        BARS.append(progress)
        try:
            yield lambda: progress.advance(task)
        finally:
            BARS.remove(progress)


@contextmanager
def stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """A spinner whose time counts. Not for loading: a checkpoint's files come with progress bars of their own."""
    with spinner(name), timed(name, seconds):
        yield


def format_table(rows: list[dict[str, str]]) -> str:
    """Rows with the same names as lines of text, the names above them, every column as wide as it must be."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines)


def hide_progress_off_terminal() -> None:
    """Keep the libraries' progress bars out of a stderr that nobody watches."""
    from transformers.utils import logging

    if not stderr.is_terminal:
        logging.disable_progress_bar()
