"""What a person at a terminal sees while the command line works."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

stderr = Console(stderr=True)


@contextmanager
def timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Add the wall-clock time that it took to `seconds[name]`."""
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


@contextmanager
def spinner(description: str) -> Iterator[None]:
    """Show on stderr what is going on."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        progress.add_task(description)
        yield


@contextmanager
def stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """A spinner whose time counts. Not for loading: a checkpoint's files come with progress bars of their own."""
    with spinner(name), timed(name, seconds):
        yield


def hide_progress_off_terminal() -> None:
    """Keep the libraries' progress bars out of a stderr that nobody watches."""
    from transformers.utils import logging

    if not stderr.is_terminal:
        logging.disable_progress_bar()
