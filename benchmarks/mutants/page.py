"""docs/mutants.md, from the JSON that the run wrote."""

import shlex
from collections import Counter
from pathlib import Path

from .mutations import MUTATIONS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "mutants.md"

HEAD = """<!-- Written by `make mutants`. -->

# Which mistakes the tests notice

Each row is a small mistake, made in the code on purpose and alone, in a copy of the repository; then the tests run that
should notice it. *Killed* means that the named test fails, and passes without the mistake. The mistakes are written by
hand, in [benchmarks/mutants](../benchmarks/mutants/mutations.py), where old and new text and the tests stand. The
command refuses to run when a text is no longer in its file.

{counts}.
Tried on {date} with {versions},
on {hardware}; from [mutants.json](../benchmarks/results/mutants.json).
"""

TAIL = """
## What cannot be tried here

No GPU was at hand. The branches for CUDA (torch's varlen kernel, its flash operators of the LLM's mask, the Triton op,
and what decides between them) run in the tests on fake tensors, which have shapes, dtypes and devices but no values: a
mistake that changes a value there and nothing else is not seen. What the tables have of them is what a stand-in on a
CPU shows: which arguments torch's kernel is given, which device has one, and the pooling that takes no kernel.
"""


def render(result: dict) -> str:
    """The page."""
    records = result["mutations"]
    counts = Counter(record["verdict"] for record in records)
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("python", "torch", "transformers"))
    text = HEAD.format(
        counts=f"{len(records)} mistakes: " + ", ".join(f"{number} {verdict}" for verdict, number in counts.items()),
        versions=versions,
        **{name: result[name] for name in ("date", "hardware")},
    )
    for file in dict.fromkeys(mutation.file for mutation in MUTATIONS):
        rows = [record for record in records if record["file"] == file]
        text += f"\n## {file}\n\n| mistake | verdict | noticed by |\n| --- | --- | --- |\n"
        for record in rows:
            test = (record["killed_by"] or shlex.split(record["tests"])[0]).removeprefix("tests/").replace("|", r"\|")
            by = f"`{test}`" if record["killed_by"] else record["equivalent"] or f"nothing in `{test}`"
            text += f"| {record['what']} | {record['verdict']} | {by} |\n"
    return text + TAIL
