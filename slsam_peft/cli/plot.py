"""`slsam-peft plot` shows what the sampler did in a training, as a picture or on a screen that follows it."""

import argparse
from pathlib import Path

from slsam_peft.cli.outputs import PLOT_SUFFIXES, write_output
from slsam_peft.errors import UserError
from slsam_peft.extras import require

NAME = "plot"
HELP = "Draw a training: which arms were active, loss, sharpness, cost; or follow one live"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="output folder of a training (or a checkpoint in it)")
    add("--output", type=Path, metavar="FILE", help="PNG or SVG file (default: slsam-plot.png)")
    add("--force", action="store_true", help="overwrite the file if it exists")
    add("--live", action="store_true", help="follow one run in the terminal until it is done; writes no file")


def run(args: argparse.Namespace) -> int:
    """Draw the runs, or follow one.

    Raises:
        UserError: no trace, one that is empty or damaged, runs of different arms, a file that exists. Nothing is
            written then.
    """
    if args.live:
        return _follow(args)
    target = args.output or Path("slsam-plot.png")
    if target.suffix.lower() not in PLOT_SUFFIXES:
        raise UserError(f"--output={target}: the name must end in {' or '.join(PLOT_SUFFIXES)}.")
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise UserError(f"--output={target}: name a file in a folder that exists.")
    if target.exists() and not args.force:
        raise UserError(f"{target} exists already. Name another file with --output, or pass --force to overwrite it.")
    require("plot without --live", "plot", "matplotlib")
    from rich.console import Console

    from slsam_peft.saving.trace_data import read_runs

    traces = read_runs(args.runs)
    from slsam_peft.cli.trace_plot import draw

    write_output(target, draw(traces, target.suffix.lower()))
    Console(highlight=False, soft_wrap=True).print(f"Written: {target}", markup=False)
    return 0


def _follow(args: argparse.Namespace) -> int:
    if len(args.runs) > 1:
        raise UserError(f"--live follows one run, and {len(args.runs)} are named; name one.")
    if args.output or args.force:
        raise UserError("--live writes no file; leave out --output and --force, or leave out --live.")
    from rich.console import Console

    from slsam_peft.cli.live import follow

    follow(args.runs[0], Console(highlight=False))
    return 0
