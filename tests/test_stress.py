"""A short, fixed part of `make stress`, and that its page is made from its result and names tests that exist."""

import ast
import itertools
import json
import os
import subprocess
import sys
import time
from functools import partial

import pytest
from helpers import CLIP, ROOT

from benchmarks.stress import bombs, fuzz, kills, links, threads, trial
from benchmarks.stress.page import PAGE, PROMISES, render
from benchmarks.stress.run import RESULT
from benchmarks.stress.trial import Case, Result, attempt, run_cases

DEAR = ("64 large frames", "pictures of large", "training", "SIGTERM")


def few(cases, of_each: int):
    """The first cases of each kind."""
    for _, group in itertools.groupby(cases, key=lambda case: case.kind):
        yield from itertools.islice(group, of_each)


def cheap(cases):
    return (case for case in cases if not any(word in case.kind for word in DEAR))


SHORT = {
    "files": partial(fuzz.cases, 110),
    "links": lambda: few(links.cases(), 4),
    "bombs": lambda: few(cheap(bombs.cases()), 2),
    "kills": lambda: few(cheap(kills.cases(1)), 1),
    "threads": partial(threads.cases, 24),
}


@pytest.mark.parametrize("section", SHORT)
def test_a_short_part_of_each_section_loses_nothing(section):
    results = list(run_cases(SHORT[section]))
    assert not [result for result in results if result[2].verdict == "lost"]
    assert len({kind for kind, _, _ in results}) >= (1 if section == "threads" else 2)


def ends_well():
    return "well"


def fails():
    raise KeyError("stray")


def raises_of_another_library():
    raise UnicodeDecodeError("utf-8", b"a long enough text", 0, 1, "not one of our refusals")


def refuses():
    raise ValueError("This is refused with a sentence.")


def crashes():
    os._exit(7)


CASES = [Case("kind", action.__name__, action) for action in (ends_well, crashes, fails, refuses, crashes, ends_well)]


def test_a_crash_loses_its_case_alone():
    for num_processes in (1, 3):
        found = sorted((name, result.verdict) for _, name, result in run_cases(lambda: CASES, num_processes))
        lost = [("crashes", "lost"), ("crashes", "lost"), ("ends_well", "held"), ("ends_well", "held")]
        assert found == [*lost, ("fails", "lost"), ("refuses", "refused")]
    assert attempt(Case("kind", "name", raises_of_another_library)).verdict == "lost"
    assert attempt(CASES[0]) == Result("held", "well")


def test_a_hang_loses_its_case_alone(monkeypatch):
    monkeypatch.setattr(trial, "SECONDS", 0.5)
    cases = [Case("kind", "hangs", partial(time.sleep, 60)), CASES[0]]
    found = [result.verdict for _, _, result in run_cases(lambda: cases)]
    assert found == ["lost", "held"]


ASKING_NOBODY = """
import socket

def refuse(*arguments):
    raise AssertionError(f"asked for {arguments}")

socket.socket.connect = socket.getaddrinfo = refuse
import stts_molmo.tools.cli, stts_molmo.tools.conversion, stts_molmo.tools.training, stts_molmo.tools.visualization
from stts_molmo.tools.answer import answer_question
from stts_molmo.tools.checkpoint import Checkpoint
import sys
print(answer_question(Checkpoint(sys.argv[1], device="cpu"), sys.argv[2], "Which shape?").frames)
"""


def test_importing_and_answering_ask_nobody():
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    command = [sys.executable, "-c", ASKING_NOBODY, ROOT / "checkpoints" / "stts-molmo-tiny", CLIP]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 1


def test_nothing_was_lost_and_the_page_is_made_from_the_result():
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    rows = [row for section in result["sections"].values() for row in section["rows"]]
    assert not [row for row in rows if row["lost"]]
    assert {row["kind"]: row["tried"] for row in rows}["damaged video files"] == 20_000
    assert PAGE.read_text(encoding="utf-8") == render(result)


def test_each_promise_has_tests():
    for tests in PROMISES.values():
        for file, test in (test.split("::") for test in tests):
            body = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8")).body
            assert test in {node.name for node in body if isinstance(node, ast.FunctionDef)}, f"{file}::{test}"
