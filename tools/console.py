"""What a person at a terminal sees while the command line works."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

stderr = Console(stderr=True)


@contextmanager
def stage(description: str, seconds: dict[str, float]) -> Iterator[None]:
    """Show what is going on on stderr, and note the wall-clock time it took in `seconds[description]`."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        progress.add_task(description)
        start = time.perf_counter()
        yield
        seconds[description] = time.perf_counter() - start


def hide_progress_off_terminal() -> None:
    """Keep the libraries' progress bars out of a stderr that nobody watches."""
    from transformers.utils import logging

    if not stderr.is_terminal:
        logging.disable_progress_bar()
