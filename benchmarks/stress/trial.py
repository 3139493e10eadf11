"""One attempt at the program and what came of it; many of them, each section in processes that may crash or hang."""

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

# What is a refusal: these types alone, as PyAV's errors and those of decoding text are ValueErrors and OSErrors too.
REFUSALS = (ValueError, FileNotFoundError, FileExistsError)
SENTENCE = range(20, 2000)  # characters of one
SECONDS = 180  # that a case may take on a busy machine; beyond, it hangs


class Case(NamedTuple):
    """
    kind: a row of the table.
    name: what tells it from the others of its kind, with its seed if it has one.
    action: does it. Returns where the program coped, having looked at what came out; raises what the program raises.
    """

    kind: str
    name: str
    action: Callable[[], object]


class Result(NamedTuple):
    """
    verdict: `"held"`, `"refused"` with a sentence, or `"lost"`: anything else.
    note: what is lost, or what the action returned.
    """

    verdict: str
    note: str


def attempt(case: Case) -> Result:
    try:
        note = case.action()
    except Exception as error:
        if type(error) in REFUSALS and len(str(error)) in SENTENCE:
            return Result("refused", "")
        return Result("lost", f"{type(error).__name__}: {error}"[:300])
    return Result("held", str(note or ""))


def work(make_cases: Callable[[], Iterable[Case]], first: int, step: int, cpu_seconds: float, sender: Connection):
    """In a process of its own: cases `first`, `first + step`, ... until time is up. Sends each before and after."""
    for number, case in enumerate(make_cases()):
        if number < first or (number - first) % step:
            continue
        if time.process_time() > cpu_seconds:
            break
        sender.send((number, case.kind, case.name))
        sender.send(attempt(case))
    sender.send(None)


def run_cases(
    make_cases: Callable[[], Iterable[Case]], num_processes: int = 1, cpu_seconds: float = float("inf")
) -> Iterator[tuple[str, str, Result]]:
    """
    Kind, name and result of each case. A process that dies or hangs in one loses it, and another goes on behind it.

    Args:
        make_cases: gives the same cases in the same order, whenever it is called.
        cpu_seconds: of each process; what is not begun by then is not tried.
    """
    context, running = multiprocessing.get_context("fork"), {}

    def start(first: int):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(make_cases, first, num_processes, cpu_seconds, sender))
        process.start()
        sender.close()
        running[receiver] = [process, None, time.monotonic() + SECONDS]

    for number in range(num_processes):
        start(number)
    while running:
        for receiver in wait(list(running), timeout=1) or []:
            process, case, _ = running[receiver]
            running[receiver] = [process, None, time.monotonic() + SECONDS]
            try:
                message = receiver.recv()
            except EOFError:
                process.join()
                del running[receiver]
                if case is None:
                    raise RuntimeError(f"A process ended with {process.exitcode} before its first case.") from None
                yield *case[1:], Result("lost", f"the process ended with {process.exitcode}")
                start(case[0] + num_processes)
                continue
            if message is None:
                process.join()
                del running[receiver]
            elif isinstance(message, Result):
                yield *case[1:], message
            else:
                running[receiver][1] = message
        for receiver, (process, case, deadline) in list(running.items()):
            if time.monotonic() > deadline and not receiver.poll():
                process.kill()
                process.join()
                del running[receiver]
                if case is None:
                    raise RuntimeError(f"A process made no case in {SECONDS} seconds.")
                yield *case[1:], Result("lost", f"no end after {SECONDS} seconds")
                start(case[0] + num_processes)
