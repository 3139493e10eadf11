"""The mistakes that `make mutants` makes can still be made: the code has what they change."""

import pytest

from benchmarks.mutants.mutations import MUTATIONS
from benchmarks.mutants.run import check_text


def test_every_mutation_finds_its_text_once():
    check_text(MUTATIONS)
    assert len({mutation.what for mutation in MUTATIONS}) == len(MUTATIONS)


def test_a_text_that_is_gone_is_named():
    with pytest.raises(ValueError, match="pruning_stts_molmo.py has 0 times instead of once.*'no such text'"):
        check_text([MUTATIONS[0]._replace(old="no such text")])
