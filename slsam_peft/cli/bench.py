"""`slsam-peft bench` measures what a step costs by the clock; with `--check` whether it computes what it should."""

import argparse
import json
import math
from pathlib import Path

from slsam_peft.cli.outputs import check_outputs, write_figure, write_output
from slsam_peft.cli.quiet import loading
from slsam_peft.runs.bench_modes import MODES, REFERENCE, select_modes

NAME = "bench"
HELP = "Time a step by the clock, plain LoRA and SL-SAM's modes in alternation; or check them (--check)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("--model", metavar="NAME", help="Hub name or folder (default: SmolLM2-135M-Instruct, as in the quickstart)")
    add("--load_in_4bit", action="store_true", help="base weights in NF4")
    add("--lora_r", type=_positive, default=16, metavar="N", help="rank of the adapters")
    add("--batch_size", type=_positive, default=2, metavar="N", help="sequences per micro-batch")
    add("--max_length", type=_positive, default=128, metavar="N", help="tokens per sequence; all are so long")
    add("--gradient_accumulation_steps", type=_positive, default=1, metavar="N", help="micro-batches per step")
    add("--steps", type=_positive, default=16, metavar="N", help="timed steps of each mode per round")
    add("--rounds", type=_positive, default=3, metavar="N", help="rounds, of which the median is reported")
    names = ", ".join(f'"{name}"' for name in MODES if name != REFERENCE)
    add(
        "--modes",
        nargs="+",
        metavar="MODE",
        help=f"modes to time beside {REFERENCE}, on the same sequences: {names} (default: all of ours)",
    )
    add("--rows", type=_positive, metavar="N", help="rows of your data: the table says hours of an epoch on them")
    add(
        "--check",
        action="store_true",
        help="time nothing: compare each way to perturb with a slow reference, on this machine and this model; exit "
        "code 1 where one is wrong",
    )
    add("--output", type=Path, default=Path("slsam-bench.json"), metavar="FILE", help="JSON file with every number")
    add("--plot", type=Path, metavar="FILE", help="PNG or SVG file with the picture")
    add("--force", action="store_true", help="overwrite the files if they exist")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not allowed; it must be at least 1")
    return value


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the files.

    Returns:
        `int`: 0; with `--check` 1 where a mode is wrong.
    """
    if args.check:
        return _check(args)
    check_outputs([args.output], args.force, args.plot)
    modes = select_modes(args.modes, args.batch_size, args.gradient_accumulation_steps)
    with loading(args.debug) as (console, status):
        from slsam_peft.models.load import compute_dtype, find_model, load_with_tokenizer
        from slsam_peft.models.smollm2 import SMOLLM2
        from slsam_peft.runs.bench import run_bench

        status.update("Loading the model")
        source = find_model(args.model or SMOLLM2, status.update)
        model, tokenizer = load_with_tokenizer(source, compute_dtype("auto"), nf4=args.load_in_4bit)
        measured = run_bench(
            model,
            tokenizer,
            lora_r=args.lora_r,
            batch=args.batch_size,
            length=args.max_length,
            accumulation=args.gradient_accumulation_steps,
            steps=args.steps,
            rounds=args.rounds,
            modes=modes,
            tell=status.update,
        )
    console.print(_table(measured, args.batch_size * args.gradient_accumulation_steps, args.rows))
    # The table is on the screen; the files hold every round.
    settings = {k: v for k, v in vars(args).items() if isinstance(v, int | str | bool | list | type(None))}
    text = json.dumps({"settings": settings, "modes": [m.summary() for m in measured]}, indent=1)
    write_output(args.output, text + "\n")
    if args.plot is not None:
        from slsam_peft.cli.bench_plot import draw

        write_figure(args.plot, draw(measured))
    console.print(f"Written: {', '.join(str(path) for path in (args.output, args.plot) if path is not None)}")
    return 0


def _check(args: argparse.Namespace) -> int:
    """Compare each way to perturb with the reference; print what that holds for, and the table."""
    with loading(args.debug) as (console, status):
        from slsam_peft.models.load import compute_dtype, find_model, load_with_tokenizer
        from slsam_peft.models.smollm2 import SMOLLM2
        from slsam_peft.runs.bench_check import BOUND, run_check, surroundings

        status.update("Loading the model")
        source = find_model(args.model or SMOLLM2, status.update)
        model, tokenizer = load_with_tokenizer(source, compute_dtype("auto"), nf4=args.load_in_4bit)
        known = {"model": source, **surroundings(model)}
        checked = run_check(
            model, tokenizer, lora_r=args.lora_r, batch=args.batch_size, length=args.max_length, tell=status.update
        )
    console.print(_facts(known))
    console.print(_findings(checked, BOUND))
    wrong = [found.mode for found in checked if found.good is False]
    console.print(
        f"Wrong here: {', '.join(wrong)}. Its steps are not those of sharpness-aware minimisation; please report this."
        if wrong
        else "Every mode that runs here is right."
    )
    return int(bool(wrong))


def _facts(known: dict[str, str]):
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in known.items():
        table.add_row(name, Text(value, overflow="fold"))
    return table


def _findings(checked: list, bound: float):
    from rich.table import Table

    table = Table("", "mode", title="The gradient at w + e against a slow reference", title_justify="left")
    for column in ("off by", "allowed", "e changes g by", "length of e"):
        table.add_column(column, justify="right")
    table.add_column("")
    marks = {True: "[green]ok[/]", False: "[bold red]wrong[/]", None: "[yellow]not used[/]"}
    for found in checked:
        off = "" if found.deviation is None else f"{found.deviation:.3f}"
        table.add_row(
            marks[found.good], found.mode, off, f"{bound:g}", f"{found.change:.0%}", f"{found.radius:g}", found.note
        )
    table.caption = "off by: |g' - reference| as a share of what e changes; 1 where there is no e"
    table.caption_justify = "left"
    return table


def _table(measured: list, sequences: int, rows: int | None):
    from rich.table import Table

    title = f"Cost of a step on {sequences} sequence{'' if sequences == 1 else 's'} (plain LoRA on them = 1)"
    table = Table("mode", title=title)
    for column in ("s/step", "ratio", "predicted", "ratios by round", "peak MiB"):
        table.add_column(column, justify="right")
    if rows:
        table.add_column(f"h/epoch of {rows:,} rows", justify="right")
    for m in measured:
        s = m.summary()
        table.add_row(
            m.mode,
            f"{s['seconds_per_step']:.3f}",
            f"{s['ratio']:.2f}",
            f"{s['predicted']:.2f}",
            " ".join(f"{r:.2f}" for r in m.ratios),
            f"{s['peak_bytes'] / 2**20:.0f}",
            *([f"{s['seconds_per_step'] * math.ceil(rows / sequences) / 3600:.2f}"] if rows else []),
        )
    return table
