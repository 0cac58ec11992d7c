"""Edits of the kind that agents make: what the data say comes of each. `make mutations` runs them all."""
import mutations
import pytest
from copies import PROJECT


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return mutations.Lab(tmp_path_factory.mktemp("mutations")).outcomes(mutations.FAST)


def test_there_are_enough():
    """And each has an error to show, or must succeed."""
    assert len(mutations.MUTATIONS) >= 40 and set(mutations.FAST) <= set(mutations.MUTATIONS)
    searched = [mutation.edits for mutation in mutations.MUTATIONS.values()]
    assert len(set(searched)) == len(searched)


@pytest.mark.parametrize("anchor", mutations.ANCHORS)
def test_what_is_edited_stands_once(anchor):
    assert (PROJECT / "experiment.py").read_text().count(anchor) == 1


@pytest.mark.parametrize("name", mutations.FAST)
def test_what_comes_of_a_mistake(outcomes, name):
    finished, unedited = outcomes
    mutations.verdict(finished[name][0], mutations.MUTATIONS[name], finished[name][1], unedited)
