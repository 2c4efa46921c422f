"""Behind as many micro-batches as an ascent reaches it takes nothing, whatever each of them holds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slsam_peft.algorithm.ascents import Ahead, Ascent, Part, TwoPass
from slsam_peft.algorithm.sampa import Sampa
from slsam_peft.algorithm.zeroth_order import ZerothOrder

held = st.lists(st.none() | st.integers(1, 6), min_size=1, max_size=8)  # sequences of each micro-batch of a step


def taken(ascent, held):
    """Return how many sequences an ascent takes of each micro-batch."""
    found = []
    for i, sequences in enumerate(held):
        found.append(ascent.take(i, len(held), sequences, sum(found)))
    return found


@pytest.mark.parametrize("kind", [Part, Ahead, Sampa, ZerothOrder])
@given(held=held, sequences=st.integers(1, 6))
def test_of_so_many_sequences(kind, held, sequences):
    ascent = kind(sequences)
    found, reach = taken(ascent, held), ascent.reach(len(held))
    assert not any(found[reach:])
    assert reach <= len(held)
    assert sum(taken(ascent, [1] * len(held))[:reach]) == min(sequences, len(held)), "and no farther than needed"


@given(held=held, fraction=st.floats(0.01, 1.0))
def test_of_a_fraction(held, fraction):
    """Every rank takes whole micro-batches then, as many: none waits for another one."""
    ascent = Part(fraction=fraction)
    found, reach = taken(ascent, held), ascent.reach(len(held))
    assert all(found[:reach])
    assert not any(found[reach:])


@given(held=held)
def test_of_all_and_of_none(held):
    assert all(taken(TwoPass(), held)[: TwoPass().reach(len(held))])
    assert not any(taken(Ascent(), held))
