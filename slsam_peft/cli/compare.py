"""`slsam-peft compare` trains methods on tasks and seeds, and shows paired differences with intervals."""

import argparse
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slsam_peft.cli import compare_own
from slsam_peft.cli.compare_begun import begun_in
from slsam_peft.cli.compare_work import run_name, stopped, work
from slsam_peft.cli.outputs import PLOT_SUFFIXES, check_appendable, check_outputs, write_output
from slsam_peft.cli.quiet import silence_libraries, silence_progress_bars
from slsam_peft.errors import UserError
from slsam_peft.runs.compare.metrics import METRICS

if TYPE_CHECKING:
    from slsam_peft.runs.compare.jobs import Plan
    from slsam_peft.runs.compare.settings import CompareSettings
    from slsam_peft.runs.compare.store import RowStore
    from slsam_peft.runs.compare.wishes import Wishes

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
    # Mistakes in what was typed come before anything is loaded.
    if args.limit is not None and args.limit < 0:
        raise UserError(f"--limit={args.limit} is not allowed; it must be an integer >= 0.")
    if args.reference is not None and args.config is None:
        raise UserError(f"--reference={args.reference} belongs to --config; --data compares with plain LoRA.")
    wishes = compare_own.wishes_of(args)
    if wishes is not None:
        args.config = compare_own.folder_of(args) / compare_own.CONFIG
    if args.list:
        _list(args)
    elif args.report:
        _show_rows(args)
    else:
        _train(args, wishes)
    return 0


def _list(args: argparse.Namespace) -> None:
    """Show the runs that are still to be done."""
    settings, store, console = _read(args), _store(args), _console(args)
    _load_libraries(args, console)
    plan, rows = _plan(settings, store, console), store.read()
    for job in plan.pending(rows):
        name = run_name(plan, job.task, job.method, job.settings)
        console.print(f"{name}, {job.settings['steps']} steps", markup=False, highlight=False)
    done, total = plan.counts(rows)
    console.print(f"{done} of {total} runs are done; seeds whose learning rate is still to be chosen are not listed.")


def _show_rows(args: argparse.Namespace) -> None:
    """Show what the rows say, at once: none of the libraries that train is loaded."""
    from slsam_peft.runs.compare.recorded import RecordedPlan

    settings, store = _read(args), _store(args)
    _check_report(args)
    _report(RecordedPlan(settings, store.read()), store, _console(args), args)


def _train(args: argparse.Namespace, wishes: "Wishes | None") -> None:
    """Do the runs that are missing and report, also where a signal ends them."""
    from slsam_peft.runs.compare.timing import Pace

    # Files are checked before libraries are loaded, and nothing is written before data and model are known.
    settings = _read(args) if wishes is None else None
    _check_report(args)
    if wishes is not None:
        compare_own.check_files(wishes, args.config.parent)
    store, console = _store(args), _console(args)
    _check_rows_file(args, store)
    if wishes is not None:
        settings = begun_in(args.config, wishes, compare_own.given_in(args), store)
    _load_libraries(args, console)
    if wishes is not None:
        settings = compare_own.begin(wishes, settings, args.config.parent, console)
    assert settings is not None  # read above, or begun here
    plan = _plan(settings, store, console)
    _check_runs(plan, store, console)
    try:
        probes = compare_own.time_it(plan, store, console) if wishes is not None else []
        work(plan, store, console, args.limit, Pace(plan, store.read(), probes))
    except KeyboardInterrupt as stop:
        _report(plan, store, console, args)
        raise stopped(stop, plan, store.read()) from None
    _report(plan, store, console, args)


def _read(args: argparse.Namespace) -> "CompareSettings":
    """Return the comparison of the YAML file."""
    from slsam_peft.runs.compare.reading import read_settings

    if args.data is not None and not args.config.exists():
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


def _store(args: argparse.Namespace) -> "RowStore":
    """Return where the rows are; the folder is made with the first one."""
    from slsam_peft.runs.compare.store import RowStore

    return RowStore(args.results or args.config.parent / "rows" / f"{args.config.stem}.jsonl")


def _check_rows_file(args: argparse.Namespace, store: "RowStore") -> None:
    """Check that rows can be written where they go, before anything trains for hours."""
    folder = store.path.parent
    if args.results or folder.exists():
        check_appendable(store.path)
    elif folder.parent.exists():  # one that is still to be made has been checked
        check_appendable(folder)


def _check_report(args: argparse.Namespace) -> None:
    """Check that the table can be made and that what it is written to can be written."""
    from slsam_peft.extras import require

    check_outputs([args.table], args.force, args.plot)
    require("the statistics of compare", "compare", "scipy")


def _console(args: argparse.Namespace) -> Any:
    from rich.console import Console

    if not args.debug:
        silence_libraries()
    return Console()


def _load_libraries(args: argparse.Namespace, console: Any) -> None:
    with console.status("Loading libraries"):
        import_module("slsam_peft.runs.compare.run")
        if not args.debug:
            silence_progress_bars()


def _plan(settings: "CompareSettings", store: "RowStore", console: Any) -> "Plan":
    """Return the plan of a comparison that goes on."""
    from slsam_peft.runs.compare.recorded import RecordedPlan
    from slsam_peft.runs.compare.run import expected_costs

    with console.status("Looking at the model"):  # expected costs need the model's config
        return RecordedPlan(settings, store.read(), expected_costs(settings))


def _check_runs(plan: "Plan", store: "RowStore", console: Any) -> None:
    """Try what a run would trip over, before the first one."""
    from slsam_peft.runs.compare.checks import check_plan

    rows = store.read()
    if tasks := plan.tasks_to_do(rows):
        with console.status("Looking at the data"):
            check_plan(plan, tasks, rows)


def _report(plan: "Plan", store: "RowStore", console: Any, args: argparse.Namespace) -> None:
    from slsam_peft.cli import compare_report
    from slsam_peft.runs.compare.advice import is_own
    from slsam_peft.runs.compare.report import build_report

    rows, own = store.read(), is_own(plan.settings)
    lines = build_report(plan, rows)
    # On one's own data a sentence says that there is nothing yet to show; a table without a number says less.
    shown = compare_report.tables(lines, args.metric, plan.settings) if not own or any(of.done for of in lines) else []
    for table in shown:
        console.print(table, width=max(compare_report.WIDTH, console.width), crop=False)
    if rows:
        console.print(f"Rows: {store.path}", markup=False, highlight=False)
    if args.table is not None:
        write_output(args.table, compare_report.markdown(lines, args.metric, plan.settings))
        console.print(f"Table: {args.table}", markup=False, highlight=False)
    if args.plot is not None:
        from slsam_peft.cli.forest_plot import draw

        write_output(args.plot, draw(lines, args.metric, plan.settings, args.plot.suffix))
        console.print(f"Plot: {args.plot}", markup=False, highlight=False)
    if own:
        compare_own.finish(plan, rows, lines, args.config.parent, console, trained=not args.report)
