"""`slsam-peft inspect` lists the arms of an adapter or a model, with sizes and norms."""

import argparse
from typing import TYPE_CHECKING

from slsam_peft.presets import GRANULARITIES

if TYPE_CHECKING:
    from rich.table import Table

    from slsam_peft.adapters.inspect import Inspection

NAME = "inspect"
HELP = "List the arms of an adapter or a model: depth, parameters, size, norms"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add(
        "target",
        metavar="ADAPTER_OR_MODEL",
        help="folder of a PEFT adapter, a checkpoint, or a model's folder or name",
    )
    add("--granularity", choices=GRANULARITIES, default="block", help="what an arm is")


def run(args: argparse.Namespace) -> int:
    """Print the table.

    Raises:
        UserError: there is no such adapter or model, or it cannot be read.
    """
    from rich.console import Console

    console = Console(highlight=False)
    with console.status("Loading libraries"):
        from slsam_peft.adapters.inspect import inspect
    with console.status("Reading weights"):
        found = inspect(args.target, args.granularity)
    console.print(found.title, style="bold", markup=False, soft_wrap=True)
    facts = ", ".join(f"{name} {value}" for name, value in found.facts.items())
    console.print(facts, markup=False, soft_wrap=True)
    console.print(table(found))
    for note in found.notes:
        console.print(note, style="dim", markup=False, soft_wrap=True)
    return 0


def table(found: "Inspection") -> "Table":
    """Return the arms as a table, with their sums in the last row; columns of which nothing is known are left out."""
    from rich.table import Table

    from slsam_peft.saving.trace_data import arm_labels

    # What is known of every arm.
    rows = found.rows
    columns = {
        "depth": ["-" if row.depth is None else str(row.depth) for row in rows] + [""],
        "tensors": [f"{row.tensors:,}" for row in rows] + [f"{sum(row.tensors for row in rows):,}"],
        "parameters": [f"{row.parameters:,}" for row in rows] + [f"{sum(row.parameters for row in rows):,}"],
        "MiB": [f"{row.bytes / 2**20:,.2f}" for row in rows] + [f"{sum(row.bytes for row in rows) / 2**20:,.2f}"],
    }
    # What depends on the file: norms need weights, activity needs a trace.
    for title, values in (("|w|", [row.norm for row in rows]), ("|B A|", [row.change for row in rows])):
        known = [value for value in values if value is not None]
        if known:
            total = sum(value**2 for value in known) ** 0.5
            columns[title] = ["-" if value is None else f"{value:.4g}" for value in values] + [f"{total:.4g}"]
    if any(row.active is not None for row in rows):
        columns["active"] = ["-" if row.active is None else f"{row.active:.0%}" for row in rows] + [""]
    # Sums stand in the footer.
    made = Table("arm", show_footer=True)
    made.columns[0].footer = f"{len(rows)} arms"
    labels = arm_labels([row.name for row in rows], [row.depth for row in rows])
    for title, cells in columns.items():
        made.add_column(title, justify="right", footer=cells[-1])
    for i, label in enumerate(labels):
        made.add_row(label, *(cells[i] for cells in columns.values()))
    return made
