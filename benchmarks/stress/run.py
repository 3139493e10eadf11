"""
Attacks the program, and counts what held, what was refused with a sentence, and what was lost.

    python -m benchmarks.stress

Writes benchmarks/results/stress.json and docs/robustness.md. Each section has a bound of its own, meant for ten
minutes in all on two quiet cores. Exits with 1 when something is lost.
"""

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from stts_molmo.tools.files import written_whole
from transformers.utils import logging

from ..common import RESULTS, provenance
from . import bombs, fuzz, kills, links, threads
from .page import PAGE, render
from .trial import Case, run_cases

RESULT = RESULTS / "stress.json"
NUM_VARIANTS = 20_000
FUZZ_SECONDS = 480  # of the processor, all cores together

SECTIONS: dict[str, Callable[[], Iterator[Case]]] = {
    "files": partial(fuzz.cases, NUM_VARIANTS),
    "links": links.cases,
    "bombs": bombs.cases,
    "kills": partial(kills.cases, 40),
    "threads": partial(threads.cases, 400),
}


def run_section(name: str) -> list[dict]:
    """A row for each kind of case."""
    num_processes = (os.cpu_count() or 1) if name == "files" else 1
    bound = FUZZ_SECONDS / num_processes if name == "files" else float("inf")
    verdicts: dict[str, Counter] = {}
    notes: dict[str, Counter] = {}
    lost: dict[str, list[str]] = {}
    for kind, case, result in run_cases(SECTIONS[name], num_processes, bound):
        verdicts.setdefault(kind, Counter())[result.verdict] += 1
        if result.verdict == "lost":
            lost.setdefault(kind, []).append(f"{case}: {result.note}")
            print(f"lost: {kind}, {case}: {result.note}", flush=True)
        elif result.note:
            notes.setdefault(kind, Counter())[result.note] += 1
    return [
        {
            "kind": kind,
            "tried": counts.total(),
            "held": counts["held"],
            "refused": counts["refused"],
            "lost": sorted(lost.get(kind, [])),
            "notes": dict(sorted(notes.get(kind, {}).items())),
        }
        for kind, counts in verdicts.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stress", description="See benchmarks/stress/run.py.")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    sections = parser.parse_args(arguments).sections
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    result = provenance() | {"seed": fuzz.SEED, "sections": {}}
    if RESULT.exists():  # sections that are not run stay as they are
        result["sections"] = json.loads(RESULT.read_text(encoding="utf-8"))["sections"]
    for name in sections:
        start = time.perf_counter()
        rows = run_section(name)
        result["sections"][name] = {"seconds": round(time.perf_counter() - start, 1), "rows": rows}
        for row in rows:
            print(f"{row['tried']:6} tried {row['held']:6} held {row['refused']:6} refused", end=" ")
            print(f"{len(row['lost'])} lost: {row['kind']}", flush=True)
    result["sections"] = {name: result["sections"][name] for name in SECTIONS if name in result["sections"]}
    with written_whole(RESULT) as draft:
        draft.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    with written_whole(PAGE) as draft:
        draft.write_text(render(result), encoding="utf-8")
    if any(row["lost"] for section in result["sections"].values() for row in section["rows"]):
        raise SystemExit("Something is lost: see above.")
