"""Every family in every way of training it, against one slow reference."""

import pytest

from tests.families import FAMILIES
from tests.sweep import sweep

QUICK = "bloom"

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def table():
    """Collect what was found, and show it at the end (`pytest -s`)."""
    rows = {}
    yield rows
    for family, outcome in rows.items():
        said = f" ({'; '.join(outcome.said)})" if outcome.said else ""
        found = "; ".join(outcome.faults) or "exact"
        print(f"\n{family} | {found} | {', '.join(outcome.ways)}{said}", end="")  # noqa: T201


@pytest.mark.parametrize("family", [f if f == QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_every_ascent_and_descent_is_exact(family, table):
    table[family] = sweep(family)
    assert table[family].faults == []
