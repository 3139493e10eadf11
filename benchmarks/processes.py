"""Work in a process of its own, and what memory it takes."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch


def apart(function: Callable, *arguments):
    """
    What `function` gives, or raises, in a process that is forked for it: what it imports and keeps goes with it. It has
    one torch thread: those of the process before did not come along, and waiting for them ends in a crash.
    """
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(1, fork, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return pool.submit(function, *arguments).result()


def peak_resident_bytes() -> int:
    """High-water mark of this program. Not `ru_maxrss`: that begins with what the parent process had."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].split()[0])
