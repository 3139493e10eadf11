"""
Changes the code in one place at a time, and sees whether the tests that should notice do.

    python -m benchmarks.mutants [--resume] [words ...]

Each change of mutations.py is made in a temporary copy of the repository, where its tests run in a process of their
own. What comes of it goes to benchmarks/results/mutants.json at once, and in the end to docs/mutants.md. With words
only the changes are tried whose description or file has one of them; other results stay, if they are of the same
machine and versions. With --resume those that stand in the file as they are now, and were noticed or cannot be, are not
tried again. Exits with 1 when a change that should be noticed is not.
"""

import argparse
import json
import multiprocessing
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..processes import apart
from .mutation import Mutation
from .mutations import MUTATIONS
from .page import PAGE, ROOT, render

RESULT = ROOT / "benchmarks" / "results" / "mutants.json"
TIMEOUT = 600  # seconds; a change may never come to an end
# What the tests import beside the code under test: once here, and not in each of their processes.
HEAVY = ("transformers.models.molmo2.modeling_molmo2", "transformers.trainer", "datasets", "hypothesis", "av")


class Outcome:
    """A pytest plugin: how many tests passed, and which failed."""

    def __init__(self):
        self.passed, self.failed = 0, []

    def pytest_runtest_logreport(self, report):
        self.passed += report.when == "call" and report.passed
        if report.failed:
            self.failed.append(report.nodeid)


def run_tests(root: Path, arguments: Sequence[str], log: Path, sender) -> None:
    """In a process of its own: sends pytest's exit status, the number of tests that passed, and those that failed."""
    import pytest

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(root)
    sys.dont_write_bytecode = True  # two changes within a second may look the same to Python's cache
    paths = [str(root.parent), str(root)]  # the folder of the copy is named as the package
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    outcome = Outcome()
    status = pytest.main(["-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", *arguments], plugins=[outcome])
    import stts_molmo

    if not Path(stts_molmo.__file__).is_relative_to(root):
        raise ImportError(f"The tests ran on {stts_molmo.__file__}, which is not the copy in {root}.")
    sender.send((int(status), outcome.passed, outcome.failed))


class Ran(NamedTuple):
    """What came of some tests: how many passed, and those that failed; neither when all were skipped."""

    passed: int
    failed: list[str]


def run_apart(root: Path, arguments: Sequence[str]) -> Ran:
    """
    [`run_tests`] in a process of its own.

    Raises:
        RuntimeError: pytest could not run them; what it said is in the message.
    """
    log = root.parent / "pytest.log"
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=run_tests, args=(root, arguments, log, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(TIMEOUT):
            return Ran(0, [f"no end after {TIMEOUT} s"])
        status, passed, failed = receiver.recv()
    except EOFError:
        status, passed, failed = None, 0, []
    finally:
        process.kill()
        process.join()
    if status not in (0, 1):
        raise RuntimeError(f"pytest {shlex.join(arguments)} ended with {status}:\n{log.read_text()[-4000:]}")
    return Ran(passed, failed)


def check_text(mutations: Sequence[Mutation], root: Path = ROOT) -> None:
    """
    Raises:
        ValueError: the text to be changed is not, or not only once, in its file.
    """
    for mutation in mutations:
        count = (root / mutation.file).read_text(encoding="utf-8").count(mutation.old)
        if count != 1:
            raise ValueError(
                f"{mutation.file} has {count} times instead of once what the mutation {mutation.what!r} changes: "
                f"{mutation.old!r}. Follow the code in benchmarks/mutants/mutations.py."
            )


def try_mutation(mutation: Mutation, root: Path) -> dict:
    """Its record: verdict, and the test that noticed."""
    file = root / mutation.file
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        passed, failed = run_apart(root, ["-x", *shlex.split(mutation.tests)])
    finally:
        file.write_text(text, encoding="utf-8")
    unnoticed = "not applicable" if not passed else "equivalent" if mutation.equivalent else "alive"
    verdict, killed_by = ("killed", failed[0]) if failed else (unnoticed, None)
    return mutation._asdict() | {"verdict": verdict, "killed_by": killed_by}


def copy_tree(folder: Path) -> Path:
    """A copy of the repository in a folder with the package's name, so that it is what `import stts_molmo` finds."""
    root = folder / "stts_molmo"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "out", "runs")
    shutil.copytree(ROOT, root, symlinks=True, ignore=ignored)
    return root


# These two import the package, which in the process that starts the tests would take the place of the copy: `apart`.


def read_records() -> dict[str, dict]:
    """The records in the file by description; none where they are of another machine or other versions."""
    from ..common import provenance

    if not RESULT.exists():
        return {}
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    if any(result[name] != value for name, value in provenance().items() if name != "date"):
        return {}
    return {record["what"]: record for record in result["mutations"]}


def is_settled(mutation: Mutation, record: dict | None) -> bool:
    """Whether `record` is of this very mutation, which something noticed, or nothing can."""
    return record is not None and record["verdict"] != "alive" and mutation._asdict().items() <= record.items()


def write_records(by_what: dict[str, dict]) -> dict:
    """Write the file with them, without those of mutations that are no more. Returns its content."""
    from stts_molmo.tools.files import written_whole

    from ..common import provenance

    records = [by_what[mutation.what] for mutation in MUTATIONS if mutation.what in by_what]
    result = provenance() | {"mutations": records}
    with written_whole(RESULT) as draft:
        draft.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def try_all(mutations: Sequence[Mutation], by_what: dict[str, dict]) -> dict:
    """
    The content of the file with the record of each mutation, beside those of `by_what`.

    Raises:
        ValueError: a test that noticed one fails without any. The records that name it are not kept.
    """
    with tempfile.TemporaryDirectory() as scratch:
        root = copy_tree(Path(scratch))
        for mutation in mutations:
            start = time.perf_counter()
            record = by_what[mutation.what] = try_mutation(mutation, root)
            seconds = time.perf_counter() - start
            print(f"{record['verdict']:14} {seconds:5.0f} s  {mutation.file}: {mutation.what}", flush=True)
            apart(write_records, by_what)
        tests = {record["killed_by"] for record in by_what.values() if "::" in (record["killed_by"] or "")}
        failed = run_apart(root, sorted(tests)).failed if tests else []
    if failed:
        apart(write_records, {what: record for what, record in by_what.items() if record["killed_by"] not in failed})
        raise ValueError(f"Without any mutation these fail too: {', '.join(failed)}.")
    return apart(write_records, by_what)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutants", description="See benchmarks/mutants/run.py.")
    parser.add_argument("words", nargs="*")
    parser.add_argument("--resume", action="store_true", help="leave out what an earlier run has settled")
    args = parser.parse_args(arguments)
    check_text(MUTATIONS)
    chosen = [m for m in MUTATIONS if not args.words or any(word in f"{m.file} {m.what}" for word in args.words)]
    if not chosen:
        raise SystemExit(f"No mutation has {' or '.join(args.words)} in its description or file.")

    os.environ["HF_HUB_OFFLINE"] = "1"  # read when the Hub's client is imported
    import torch

    torch.set_num_threads(1)
    for name in HEAVY:
        __import__(name)
    by_what = apart(read_records)
    if args.resume:
        chosen = [mutation for mutation in chosen if not is_settled(mutation, by_what.get(mutation.what))]
    result = try_all(chosen, by_what)
    PAGE.write_text(render(result), encoding="utf-8")
    for record in result["mutations"]:
        if record["verdict"] == "alive":
            raise SystemExit(f"{record['file']}: nothing notices that {record['what']}.")
        if record["equivalent"] and record["killed_by"]:
            raise SystemExit(f"{record['killed_by']} notices what is called equivalent: {record['what']}.")
