"""A comparison on one's own data that lies in a folder goes on as it was begun, or the command is refused by name."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from slsam_peft.errors import UserError
from slsam_peft.runs.compare.wishes import Wishes, place_of

if TYPE_CHECKING:
    from slsam_peft.runs.compare.settings import CompareSettings
    from slsam_peft.runs.compare.store import RowStore


def begun_in(config: Path, wishes: Wishes, given: Collection[str], store: "RowStore") -> "CompareSettings | None":
    """Return the comparison that goes on; `None` where one is to be begun. Nothing is written.

    While no run of it is done or in progress, whatever is asked for begins it anew.

    Args:
        config (`Path`): Its YAML file, which need not exist.
        wishes (`Wishes`): What is asked for.
        given (`Collection[str]`): The names of the wishes that somebody gave, without that for the data.
        store (`RowStore`): Where its rows are.

    Raises:
        UserError: the file cannot be read, is of other data or has been changed, or something is asked for that is
            otherwise than it was begun. The message names it and says what to do.
    """
    if not config.exists():
        return None
    from slsam_peft.runs.compare.advice import is_own
    from slsam_peft.runs.compare.begun import SHARING, otherwise
    from slsam_peft.runs.compare.jobs import Plan
    from slsam_peft.runs.compare.reading import read_settings

    begun = read_settings(config)
    if not is_own(begun):
        raise UserError(
            f"{config} is not as compare --data writes it. Go on with it by --config {config}, or name another folder "
            "for a comparison of your data: --output FOLDER."
        )
    [task] = begun.tasks.values()
    if task.file != place_of(wishes.data):
        raise UserError(
            f"{config.parent} holds a comparison on {task.file}. Name another folder for this one: --output FOLDER."
        )
    done, total = Plan(begun, {}).counts(store.read())
    if given and not done and not store.is_claimed:
        return None
    if differing := otherwise(begun, wishes, given):
        listed = "".join(f"\n  --{name}{_shown(wishes, name)}, begun: {then}" for name, then in differing.items())
        share = "" if set(differing) - set(SHARING) else f" (with --results {store.path} it takes over runs that fit)"
        raise UserError(
            f"{config} was begun otherwise, and {done} of its {total} runs are done. Nothing has been changed."
            f"{listed}\nLeave out {', '.join(f'--{name}' for name in differing)} to go on with it, or name another "
            f"folder to begin another one: --output FOLDER{share}."
        )
    return begun


def _shown(wishes: Wishes, name: str) -> str:
    """Return the value of a wish as it is typed behind its flag; nothing of a switch."""
    value = getattr(wishes, name)
    return "" if value is True else f" {value:g}" if isinstance(value, float) else f" {value}"
