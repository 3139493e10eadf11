"""One change of the code, and the files and tests that changes name."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """
    what: the change in words, one line.
    file: below the root.
    old, new: text of the file, which it holds once, and what stands there instead.
    tests: arguments of pytest, the tests that should fail.
    equivalent: why nothing can fail; empty where something must.
    """

    what: str
    file: str
    old: str
    new: str
    tests: str
    equivalent: str = ""


def reference(words: str) -> str:
    return f"tests/test_reference.py -k '{words}'"


PRUNING, ATTENTION, PROMPT = "pruning_stts_molmo.py", "attention_stts_molmo.py", "prompt_stts_molmo.py"
MODELING, GENERATION, CONFIGURATION = (
    "modeling_stts_molmo.py",
    "generation_stts_molmo.py",
    "configuration_stts_molmo.py",
)
TRAINING, FILES = "tools/training.py", "tools/files.py"

PAPER = reference("paper and dense and sdpa")
PAPER_PADDED = reference("paper and padded and sdpa")
PAPER_EAGER = reference("paper and dense and eager")
PATCHES = reference("compared and dense and sdpa")
RESCALED = reference("rescaled and dense and sdpa")
COSINE = reference("cosine and dense and sdpa")
SCORING, TOME, PACKING = "tests/test_scoring.py", "tests/test_tome.py", "tests/test_packing.py"
MODEL, OPTIONS, FAKE_CUDA = "tests/test_model.py", "tests/test_options.py", "tests/test_fake_cuda.py"
GENERATE, PACKED_ROWS = "tests/test_generation.py", "tests/test_packed_rows.py"
LLM_ATTENTION, TRAINER = "tests/test_llm_attention.py", "tests/test_training.py"
BY_HAND = f"{MODEL} -k 'by_hand and not generation'"
