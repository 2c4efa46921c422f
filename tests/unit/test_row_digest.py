"""Rows are told from others by their number and a digest of some, in whatever format a dataset hands them over."""

from typing import Any

import pytest
from datasets import Dataset, IterableDataset

from slsam_peft.saving.row_digest import describe_rows

ROWS = [{"input_ids": [i, i + 1], "text": f"row {i}", "weight": [0.5 * i]} for i in range(100)]


@pytest.mark.parametrize("kind", ["torch", "numpy", "arrow", "pandas"])
def test_the_same_rows_have_the_same_digest(kind: str) -> None:
    plain = Dataset.from_list(ROWS)
    assert describe_rows(plain.with_format(kind)) == describe_rows(plain)
    assert describe_rows(plain)["rows"] == len(ROWS)


@pytest.mark.parametrize("kind", [None, "numpy"])
@pytest.mark.parametrize(
    "others",
    [
        ROWS[:-1],
        [*ROWS[1:], ROWS[0]],
        [*ROWS[:-1], {**ROWS[-1], "text": "row 99."}],
        [{**ROWS[0], "input_ids": [1, 1]}, *ROWS[1:]],
    ],
    ids=["fewer", "another order", "another text", "another token"],
)
def test_other_rows_have_another_digest(others: list[dict[str, Any]], kind: str | None) -> None:
    here, there = (Dataset.from_list(rows).with_format(kind) for rows in (ROWS, others))
    assert describe_rows(here) != describe_rows(there)


def test_rows_that_cannot_be_told_apart_are_not_described() -> None:
    made = Dataset.from_list(ROWS).with_transform(lambda batch: batch)
    stream = IterableDataset.from_generator(lambda: iter(ROWS))
    for rows in (made, stream, None, ROWS, {"one": Dataset.from_list(ROWS)}):
        assert describe_rows(rows) == {}


def test_a_table_that_cannot_be_read_is_not_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dataset, "select", lambda *_: (_ for _ in ()).throw(RuntimeError("no decoder")))
    assert describe_rows(Dataset.from_list(ROWS)) == {}


def test_no_rows() -> None:
    assert describe_rows(Dataset.from_list([]))["rows"] == 0
