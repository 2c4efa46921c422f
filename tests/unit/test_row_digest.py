"""Rows are told from others by their number and a digest of some, in whatever way a dataset hands them over."""

from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset

from slsam_peft.saving.row_digest import SAMPLED_ROWS, describe_rows

ROWS = [{"input_ids": [i, i + 1], "text": f"row {i}"} for i in range(100)]


def test_the_same_rows_have_the_same_digest() -> None:
    lists, tensors = Dataset.from_list(ROWS), Dataset.from_list(ROWS).with_format("torch")
    assert describe_rows(lists) == describe_rows(tensors) == describe_rows(ROWS)
    assert describe_rows(lists)["rows"] == len(ROWS) > SAMPLED_ROWS


@pytest.mark.parametrize(
    "others",
    [ROWS[:-1], [*ROWS[1:], ROWS[0]], [{**row, "text": row["text"].upper()} for row in ROWS]],
    ids=["fewer", "another order", "other texts"],
)
def test_other_rows_have_another_digest(others: list[dict[str, Any]]) -> None:
    assert describe_rows(Dataset.from_list(others)) != describe_rows(Dataset.from_list(ROWS))


def test_rows_that_cannot_be_told_apart_are_not_described() -> None:
    made = Dataset.from_list(ROWS).with_transform(lambda batch: batch)
    stream = IterableDataset.from_generator(lambda: iter(ROWS))
    assert describe_rows(made) == describe_rows(stream) == describe_rows(None) == {}


def test_no_rows_and_rows_with_pictures() -> None:
    assert describe_rows([])["rows"] == 0
    pictured = [{"pixel_values": torch.rand(2, 2), "label": i} for i in range(3)]
    again = [{"pixel_values": torch.rand(2, 2), "label": i} for i in range(3)]
    assert describe_rows(pictured) == describe_rows(again)
