"""`slsam-peft sharpness` measures how flat the loss lies around a trained adapter."""

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slsam_peft.cli.outputs import check_outputs, write_figure, write_output
from slsam_peft.cli.parsing import DTYPES
from slsam_peft.cli.quiet import loading
from slsam_peft.errors import UserError

if TYPE_CHECKING:
    from slsam_peft.adapters.sharpness import FlatnessSettings

NAME = "sharpness"
HELP = "Measure how flat the loss lies around an adapter: worst and average rise, curvature, slices"

# Name, type, default, smallest, help.
NUMBERS = (
    ("rho", float, 0.05, 0.0, "radius of the worst case"),
    ("adaptive_rho", float, 0.5, 0.0, "radius of the adaptive worst case, relative to |w| + 0.01"),
    ("sigma", float, 0.005, 0.0, "standard deviation of the noise on each weight"),
    ("adaptive_sigma", float, 0.2, 0.0, "standard deviation of the adaptive noise, relative to |w| + 0.01"),
    ("ascent_steps", int, 4, 1, "ascent steps of the worst case"),
    ("restarts", int, 1, 0, "its random starts, beside the one along the gradient"),
    ("draws", int, 4, 1, "draws of noise, each with both signs"),
    ("lanczos_steps", int, 10, 0, "Hessian-vector products for the curvature, 0: none"),
    ("line_points", int, 15, 0, "points of the slice along a line, 0: none"),
    ("plane_points", int, 9, 0, "points of each side of the slice along a plane, 0: none"),
    ("extent", float, 1.0, 0.0, "how far the slices reach; at 1 each row of a weight has moved by its own length"),
    ("seed", int, 0, 0, "seed of all draws"),
)
SIZES = (
    ("rows", 16, "rows of each data set"),
    ("batch_size", 4, "sequences at a time"),
    ("max_length", 256, "tokens per sequence; what is longer is cut"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("adapter", type=Path, metavar="ADAPTER", help="folder of the adapter, or a checkpoint")
    add("--data", required=True, metavar="FILE", help="training data: file, folder, Hub name or stdlib_docs")
    add("--eval_data", metavar="FILE", help="held-out data: a file, or a split of --data")
    add("--model", metavar="NAME", help="base model: folder, Hub name, smollm2 or gemma3 (default: the adapter's own)")
    add(
        "--space",
        choices=("both", "adapter", "full"),
        default="both",
        help="what is moved: the adapter's parameters, or the full weights W + BA (takes four times their memory)",
    )
    add("--dtype", choices=DTYPES, default="float32", help="what to compute in")
    for name, default, text in SIZES:
        add(f"--{name}", type=int, default=default, metavar="N", help=text)
    for name, kind, default, _, text in NUMBERS:
        add(f"--{name}", type=kind, default=default, metavar="N" if kind is int else "X", help=text)
    add("--output", type=Path, metavar="FILE", help="JSON file with every number")
    add("--plot", type=Path, metavar="FILE", help="PNG or SVG file with the slices")
    add("--force", action="store_true", help="overwrite the files if they exist")


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the files.

    Raises:
        UserError: a value that is not allowed, or an adapter, base or data set that cannot be read.
    """
    _check(args)
    with loading(args.debug) as (console, status):
        import torch

        from slsam_peft.adapters.load import load_adapted, open_adapter
        from slsam_peft.adapters.sharpness import ADAPTER_SPACE, FULL_SPACE, FlatnessSettings, finite, measure_flatness
        from slsam_peft.data.examples import load_examples

        # Model and data first, then everything that is measured on them.
        adapter = open_adapter(args.adapter, args.model)
        status.update("Loading the model")
        # Eager attention: the fused kernels have no second derivative.
        model, tokenizer = load_adapted(adapter, dtype=getattr(torch, args.dtype), trainable=True, attention="eager")
        limits = {"rows": args.rows, "max_length": args.max_length}
        data = {"training": load_examples(tokenizer, args.data, **limits)}
        if args.eval_data is not None:
            data["held-out"] = load_examples(tokenizer, args.data, held_out=args.eval_data, **limits)
        settings = FlatnessSettings(**{name: getattr(args, name) for name, *_ in NUMBERS})
        spaces = {"both": (ADAPTER_SPACE, FULL_SPACE), "adapter": (ADAPTER_SPACE,), "full": (FULL_SPACE,)}[args.space]
        result = measure_flatness(model, data, settings, batch_size=args.batch_size, spaces=spaces, tell=status.update)
    # The tables go to the screen; files are written where they were asked for.
    for table in _tables(result, settings):
        console.print(table)
    if args.output is not None:
        text = json.dumps(finite({"adapter": str(args.adapter), "base": adapter.base} | result), indent=1)
        write_output(args.output, text)
        console.print(f"Numbers: {args.output}", markup=False)
    if args.plot is not None:
        from slsam_peft.cli.landscape import draw

        write_figure(args.plot, draw(result, args.adapter.name))
        console.print(f"Plot: {args.plot}", markup=False)
    return 0


def _check(args: argparse.Namespace) -> None:
    for name, kind, _, smallest, _ in NUMBERS:
        value = getattr(args, name)
        if not (math.isfinite(value) and value >= smallest) or (kind is float and value == 0):
            allowed = f"an integer >= {smallest}" if kind is int else "a finite number > 0"
            raise UserError(f"--{name}={value} is not allowed; it must be {allowed}.")
    for name, *_ in SIZES:
        if getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)} is not allowed; it must be an integer >= 1.")
    check_outputs([args.output], args.force, args.plot)
    if args.plot is None:
        return
    if args.line_points < 2 and args.plane_points < 2:
        raise UserError("--plot has nothing to show without slices; give --line_points or --plane_points.")


def _tables(result: dict[str, Any], settings: "FlatnessSettings") -> list[Any]:
    from rich.table import Table

    # A column for each space and data set; the loss that everything is compared with comes first.
    names = list(result["loss"])
    table = Table(title="Rise of the loss around the adapter (nats per answer token)", title_justify="left")
    table.add_column("")
    for kind, space in result["spaces"].items():
        for name in names:
            table.add_column(f"{kind}\n({space['parameters']:,})\n{name}", justify="right")
    losses = [f"{result['loss'][name]:.4f}" for _ in result["spaces"] for name in names]
    table.add_row("loss at the adapter", *losses, end_section=True)
    # Worst case and average, plain and adaptive.
    cells = [found for space in result["spaces"].values() for found in space["data"].values()]
    for word, rho, sigma in (
        ("", settings.rho, settings.sigma),
        ("adaptive ", settings.adaptive_rho, settings.adaptive_sigma),
    ):
        worst, average = [c[f"{word}worst case"] for c in cells], [c[f"{word}average"] for c in cells]
        table.add_row(f"{word}worst case, rho {rho:g}", *(f"{c['rise']:+.4f}" for c in worst))
        table.add_row("  after one step, as in SAM", *(f"{c['one_step']:+.4f}" for c in worst))
        table.add_row(f"{word}average, sigma {sigma:g}", *(_with_error(c) for c in average))
        table.add_row("  length of that noise", *(f"{c['norm']:.3g}" for c in average), end_section=True)
    tables = [table] if result["spaces"] else []
    if result["curvature"]:
        tables.append(_curvature(result["curvature"]))
    return tables


def _with_error(average: dict[str, float]) -> str:
    error = average["standard_error"]
    return f"{average['mean']:+.2g}" + ("" if math.isnan(error) else f" ± {error:.1g}")


def _curvature(curvature: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title="Curvature in the adapter's parameters (Lanczos)", title_justify="left")
    for heading in ("", "largest eigenvalue", "smallest eigenvalue", "products", "Hessian-vector products by"):
        table.add_column(heading, justify="left" if heading in ("", "Hessian-vector products by") else "right")
    for name, c in curvature.items():
        method = c["method"]
        if c["agreement"] is not None:
            method += f" (cosine with the other way {c['agreement']:.4f})"
        top, bottom = (f"{c[end]:.4g} ± {c[f'{end}_residual']:.1g}" for end in ("top", "bottom"))
        table.add_row(name, top, bottom, str(c["steps"]), method)
    return table
