"""The mistakes that `make mutants` makes can still be made: the code has what they change."""

import json

import pytest

from benchmarks.mutants.mutations import MUTATIONS
from benchmarks.mutants.page import PAGE, render
from benchmarks.mutants.run import RESULT, check_text, is_settled


def test_every_mutation_finds_its_text_once():
    check_text(MUTATIONS)
    assert len({mutation.what for mutation in MUTATIONS}) == len(MUTATIONS)


def test_a_text_that_is_gone_is_named():
    with pytest.raises(ValueError, match="pruning_stts_molmo.py has 0 times instead of once.*'no such text'"):
        check_text([MUTATIONS[0]._replace(old="no such text")])


def test_no_mistake_of_the_result_went_unnoticed_and_the_page_is_made_from_it():
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    tried = {record["what"]: record for record in result["mutations"]}
    assert not [record["what"] for record in tried.values() if record["verdict"] == "alive"]
    assert tried.keys() == {mutation.what for mutation in MUTATIONS}
    assert PAGE.read_text(encoding="utf-8") == render(result)


def test_what_another_run_settled():
    """Of a change that was edited since, and of one that nothing noticed, the record says nothing."""
    mutation = MUTATIONS[0]
    record = mutation._asdict() | {"verdict": "killed", "killed_by": "test"}
    assert is_settled(mutation, record)
    assert not is_settled(mutation, None)
    assert not is_settled(mutation._replace(new="another"), record)
    assert not is_settled(mutation, record | {"verdict": "alive"})
