"""Changes rows of a data set whose columns have types, and keeps every value as it is given."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from slsam_peft.data.columns import Columns, features, stored, widened
from slsam_peft.data.places import place_of
from slsam_peft.data.rows import RowError
from slsam_peft.data.spellings import Row
from slsam_peft.errors import UserError

Change = Callable[[Row], Row]


def is_table(data: Any) -> bool:
    """Return whether a data set has all its rows at hand: a `Dataset`, and no stream."""
    return hasattr(data, "num_rows")


def changed(data: Any, change: Change, names: Sequence[str]) -> Any:
    """Return a data set with changed rows.

    Args:
        data (`Dataset` or `IterableDataset`): The rows.
        change (`Callable[[dict], dict]`): Makes a row out of a row. It must be one that can be hashed: a function of
            a module, or a partial of one.
        names (`Sequence[str]`): The columns that it reads and changes; the others stay as they are.

    Raises:
        UserError: a row cannot be changed; the message says where it is. Of a stream, a `RowError` comes while it is
            read.
    """
    if not is_table(data):
        return data.map(change, remove_columns=data.column_names)
    # The columns are stored by the types that all of their rows have.
    given = [name for name in data.column_names if name in names]
    columns: Columns = {}
    for number, row in enumerate(data.select_columns(given), 1):
        try:
            columns = widened(columns, change(dict(row)))
        except RowError as error:
            raise UserError(f"{place_of(data, number)}: {error.sentence}") from None
    return data.map(
        _stored,
        fn_kwargs={"columns": columns, "change": change, "names": given},
        features=_with_others(data, given, columns),
        remove_columns=given,
    )


def _stored(row: Mapping[str, Any], columns: Columns, change: Change, names: Sequence[str]) -> Row:
    return stored(change({name: row[name] for name in names}), columns)


def _with_others(data: Any, names: Sequence[str], columns: Columns) -> Any:
    from datasets import Features

    kept = {name: kind for name, kind in data.features.items() if name not in names}
    return Features(kept | dict(features(columns)))
