"""docs/mutants.md: the mistakes that `make mutants` makes can still be made, and the page is what it wrote."""

import json

import pytest

from benchmarks.mutants.mutations import MUTATIONS
from benchmarks.mutants.page import PAGE, render
from benchmarks.mutants.run import RESULT, check_text


def test_every_mutation_finds_its_text_once():
    check_text(MUTATIONS)
    assert len({mutation.what for mutation in MUTATIONS}) == len(MUTATIONS)


def test_a_text_that_is_gone_is_named():
    with pytest.raises(ValueError, match="pruning_stts_molmo.py has 0 times instead of once.*'no such text'"):
        check_text([MUTATIONS[0]._replace(old="no such text")])


def test_the_page_is_what_the_result_says_and_nothing_is_alive():
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    assert PAGE.read_text(encoding="utf-8") == render(result)
    assert {record["what"] for record in result["mutations"]} == {mutation.what for mutation in MUTATIONS}
    assert "alive" not in {record["verdict"] for record in result["mutations"]}
