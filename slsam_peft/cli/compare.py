"""`slsam-peft compare` trains methods on tasks and seeds, and shows paired differences with intervals."""

import argparse
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slsam_peft.cli import compare_own
from slsam_peft.cli.outputs import PLOT_SUFFIXES, check_appendable, check_outputs, write_output
from slsam_peft.cli.quiet import silence_libraries, silence_progress_bars
from slsam_peft.errors import UserError
from slsam_peft.runs.compare.metrics import METRICS

if TYPE_CHECKING:
    from slsam_peft.runs.compare.jobs import Plan
    from slsam_peft.runs.compare.settings import CompareSettings
    from slsam_peft.runs.compare.store import RowStore

NAME = "compare"
HELP = "Compare ways to train: plain LoRA and SL-SAM on your own data, or methods, tasks and seeds of a YAML file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("--config", type=Path, metavar="FILE", help="YAML file of a comparison, see recipes/compare/")
    add(
        "--results",
        type=Path,
        metavar="FILE",
        help="where rows are appended as runs finish; runs that have one are not repeated (default: rows/NAME.jsonl "
        "beside the YAML file NAME.yaml)",
    )
    add("--report", action="store_true", help="show what the rows say, train nothing; needs no model")
    add("--list", action="store_true", help="show the runs that are still to be done, train nothing")
    add("--limit", type=int, metavar="N", help="stop after N runs")
    add(
        "--metric",
        choices=tuple(METRICS),
        default="loss",
        metavar="SCORE",
        help=f"what methods are compared by (default: loss): {', '.join(METRICS)}; the last two need all_scores: "
        "true, attack_success a task with a backdoor",
    )
    add("--reference", metavar="METHOD", help="show differences to this method instead of the YAML file's")
    add("--table", type=Path, metavar="FILE", help="write the table, as Markdown")
    plot = f"write a forest plot, the best methods on top ({' or '.join(PLOT_SUFFIXES)})"
    add("--plot", type=Path, metavar="FILE", help=plot)
    add("--force", action="store_true", help="overwrite --table and --plot if they exist")
    compare_own.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run what is missing, then show the table; on one's own data also what to use.

    Any number of processes may run the same comparison at the same time, each takes the next free run.

    Raises:
        UserError: a setting or a file that is not allowed, before anything is trained.
        Interrupted: a signal has come; what there is has been shown.
    """
    from slsam_peft.extras import require

    # Mistakes in what was typed come before anything is loaded.
    if args.limit is not None and args.limit < 0:
        raise UserError(f"--limit={args.limit} is not allowed; it must be an integer >= 0.")
    if args.reference is not None and args.config is None:
        raise UserError(f"--reference={args.reference} belongs to --config; --data compares with plain LoRA.")
    wishes, trains = compare_own.wishes_of(args), not (args.list or args.report)
    if wishes is not None:
        args.config = compare_own.folder_of(args) / compare_own.CONFIG
    settings = None if wishes is not None and trains else _read(args, wishes is not None)
    check_outputs([args.table], args.force, args.plot)
    if wishes is not None and trains:
        compare_own.check_files(wishes, args.config.parent)
    results = _results_file(args, trains)
    if not args.list:
        require("the statistics of compare", "compare", "scipy")
    if not args.debug:
        silence_libraries()
    from rich.console import Console

    from slsam_peft.runs.compare.store import RowStore

    console, store = Console(), RowStore(results)
    if settings is not None and args.report and not args.list:  # none of the libraries that train: an answer at once
        from slsam_peft.runs.compare.recorded import RecordedPlan

        _report(RecordedPlan(settings, store.read()), store, console, args)
        return 0
    with console.status("Loading libraries"):
        import_module("slsam_peft.runs.compare.run")
        if not args.debug:
            silence_progress_bars()
    if wishes is not None and settings is None:
        settings = compare_own.begin(wishes, args.config.parent, console)
    assert settings is not None  # read above, or begun here
    plan = _plan(settings, store, console, trains)
    if args.list:
        return _list(plan, store, console)
    _train(plan, store, console, args)
    return 0


def _read(args: argparse.Namespace, own: bool) -> "CompareSettings":
    from slsam_peft.runs.compare.reading import read_settings

    if own and not args.config.exists():
        raise UserError(
            f"{args.config} does not exist: no comparison on {args.data} has been begun there. Leave out --report and "
            "--list to begin it, or name its folder: --output FOLDER."
        )
    settings = read_settings(args.config)
    if args.reference is None:
        return settings
    primary = settings.primary if settings.primary != args.reference else None
    try:
        return replace(settings, reference=args.reference, primary=primary)
    except ValueError as error:
        raise UserError(f"--reference: {error}") from error


def _plan(settings: "CompareSettings", store: "RowStore", console: Any, trains: bool) -> "Plan":
    """Return the plan of a comparison; what a run would trip over is tried before the first one."""
    from slsam_peft.runs.compare.recorded import RecordedPlan
    from slsam_peft.runs.compare.run import expected_costs

    with console.status("Looking at the model and the data"):  # expected costs need the model's config
        plan = RecordedPlan(settings, store.read(), expected_costs(settings))
        if trains and (tasks := plan.tasks_to_do(store.read())):
            from slsam_peft.runs.compare.checks import check_plan

            check_plan(plan, tasks)
    return plan


def _train(plan: "Plan", store: "RowStore", console: Any, args: argparse.Namespace) -> None:
    """Do the runs and report, also where a signal ends them."""
    from slsam_peft.cli.compare_work import stopped, work
    from slsam_peft.runs.compare.timing import Pace

    try:
        probes = compare_own.time_it(plan, store, console) if args.data is not None else []
        work(plan, store, console, args.limit, Pace(plan, store.read(), probes))
    except KeyboardInterrupt as stop:
        _report(plan, store, console, args)
        raise stopped(stop, plan, store.read()) from None
    _report(plan, store, console, args)


def _results_file(args: argparse.Namespace, trains: bool) -> Path:
    """Return where the rows are; what will be trained for hours must be writable there."""
    folder = args.config.parent / "rows"  # made with the first row
    file = args.results or folder / f"{args.config.stem}.jsonl"
    if trains and (args.results or folder.parent.exists()):  # a folder that is still to be made has been checked
        check_appendable(file if args.results or folder.exists() else folder)
    return file


def _list(plan: "Plan", store: "RowStore", console: Any) -> int:
    from slsam_peft.cli.compare_work import run_name

    rows = store.read()
    for job in plan.pending(rows):
        name = run_name(plan, job.task, job.method, job.settings)
        console.print(f"{name}, {job.settings['steps']} steps", markup=False, highlight=False)
    done, total = plan.counts(rows)
    console.print(f"{done} of {total} runs are done; seeds whose learning rate is still to be chosen are not listed.")
    return 0


def _report(plan: "Plan", store: "RowStore", console: Any, args: argparse.Namespace) -> None:
    from slsam_peft.cli import compare_report
    from slsam_peft.runs.compare.advice import is_own
    from slsam_peft.runs.compare.report import build_report

    rows = store.read()
    lines = build_report(plan, rows)
    for table in compare_report.tables(lines, args.metric, plan.settings):
        console.print(table, width=max(compare_report.WIDTH, console.width), crop=False)
    console.print(f"Rows: {store.path}", markup=False, highlight=False)
    if args.table is not None:
        write_output(args.table, compare_report.markdown(lines, args.metric, plan.settings))
        console.print(f"Table: {args.table}", markup=False, highlight=False)
    if args.plot is not None:
        from slsam_peft.cli.forest_plot import draw

        write_output(args.plot, draw(lines, args.metric, plan.settings, args.plot.suffix))
        console.print(f"Plot: {args.plot}", markup=False, highlight=False)
    if is_own(plan.settings):
        compare_own.finish(plan, rows, lines, args.config.parent, console, trained=not args.report)
