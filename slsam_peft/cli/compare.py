"""`slsam-peft compare` trains methods on tasks and seeds, and shows paired differences with intervals."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slsam_peft.cli.outputs import PLOT_SUFFIXES, check_appendable, check_outputs, write_output
from slsam_peft.cli.quiet import silence_libraries, silence_progress_bars
from slsam_peft.errors import UserError
from slsam_peft.runs.compare.metrics import METRICS

if TYPE_CHECKING:
    from slsam_peft.runs.compare.jobs import Job, Plan
    from slsam_peft.runs.compare.store import RowStore

NAME = "compare"
HELP = "Compare ways to train on tasks and seeds: plain LoRA, SL-SAM's modes, controls"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("--config", type=Path, required=True, metavar="FILE", help="YAML file, see recipes/compare/")
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
        help=f"what methods are compared by (default: loss): {', '.join(METRICS)}; the last two need all_scores: true",
    )
    add("--table", type=Path, metavar="FILE", help="write the table, as Markdown")
    plot = f"write a forest plot, the best methods on top ({' or '.join(PLOT_SUFFIXES)})"
    add("--plot", type=Path, metavar="FILE", help=plot)
    add("--force", action="store_true", help="overwrite --table and --plot if they exist")


def run(args: argparse.Namespace) -> int:
    """Run what is missing, then show the table.

    Any number of processes may run the same comparison at the same time, each takes the next free run.

    Raises:
        UserError: a setting or a file that is not allowed, before anything is trained.
    """
    from slsam_peft.extras import require
    from slsam_peft.runs.compare.reading import read_settings

    # Mistakes in what was typed come before anything is loaded.
    if args.limit is not None and args.limit < 0:
        raise UserError(f"--limit={args.limit} is not allowed; it must be an integer >= 0.")
    settings = read_settings(args.config)
    check_outputs([args.table], args.force, args.plot)
    trains = not (args.list or args.report)
    results = _results_file(args, trains)
    if not args.list:
        require("the statistics of compare", "compare", "scipy")
    if not args.debug:
        silence_libraries()
    from rich.console import Console

    from slsam_peft.runs.compare.store import RowStore

    console, store = Console(), RowStore(results)
    if args.report and not args.list:  # no model and none of the libraries that train: an answer at once
        from slsam_peft.runs.compare.recorded import RecordedPlan

        _report(RecordedPlan(settings, store.read()), store, console, args)
        return 0
    # Expected costs need the model's config, and what a run would trip over is tried before the first one.
    with console.status("Loading libraries"):
        from slsam_peft.runs.compare.recorded import RecordedPlan
        from slsam_peft.runs.compare.run import expected_costs

        if not args.debug:
            silence_progress_bars()
        plan = RecordedPlan(settings, store.read(), expected_costs(settings))
        if trains and (tasks := plan.tasks_to_do(store.read())):
            from slsam_peft.runs.compare.checks import check_plan

            check_plan(plan, tasks)
    if args.list:
        return _list(plan, store, console)
    work(plan, store, console, args.limit)
    _report(plan, store, console, args)
    return 0


def _results_file(args: argparse.Namespace, trains: bool) -> Path:
    """Return where the rows are; what will be trained for hours must be writable there."""
    folder = args.config.parent / "rows"  # made with the first row
    file = args.results or folder / f"{args.config.stem}.jsonl"
    if trains:
        check_appendable(file if args.results or folder.exists() else folder)
    return file


def work(plan: "Plan", store: "RowStore", console: Any, limit: int | None = None) -> None:
    """Do the jobs that nobody else does, until none is left, showing progress.

    Args:
        plan (`Plan`): The comparison.
        store (`RowStore`): Where its rows are.
        console (`rich.console.Console`): Where progress is shown.
        limit (`int`, *optional*): Most runs to do.
    """
    from rich.text import Text

    from slsam_peft.runs.compare.worker import next_row

    done = 0
    with console.status("") as status:

        def progress(job: "Job", step: int, steps: int) -> None:
            name = run_name(plan, job.task, job.method, job.settings)
            status.update(Text(f"{name}: step {step} of {steps}"))

        while limit is None or done < limit:
            finished, total = plan.counts(store.read())
            status.update(f"{finished} of {total} runs are done")
            row = next_row(plan, store, progress)
            if row is None:
                return
            done += 1
            _say(plan, row, console)


def run_name(plan: "Plan", task: str, method: str, settings: Mapping[str, Any]) -> str:
    """Return what a run is called where it is shown.

    Args:
        plan (`Plan`): The comparison.
        task (`str`): Its name in the comparison.
        method (`str`): Its name in the comparison.
        settings (`dict`): `Job.settings`.
    """
    from slsam_peft.runs.compare.methods import Candidate

    how, radii = plan.settings.methods[method], {"rho": settings["random_rho"], **(settings["slsam"] or {})}
    rho, rise = radii["rho"] if how.rhos else None, radii["loss_rise"] if how.loss_rises else None
    baseline = next((b for b in how.baselines or () if b.is_of(settings)), None)
    tried = Candidate(settings["learning_rate"], rho, rise, baseline).shown
    return f"{task}, {method}, learning rate {tried}, seed {settings['seed']}"


def _say(plan: "Plan", row: dict[str, Any], console: Any) -> None:
    result = row.get("error") or f"loss {row['loss']:.4f}, exact {row['exact']:.1%}, {row['seconds']:.0f} s"
    name = run_name(plan, row["task"], row["method"], row["settings"])
    console.print(f"{name}: {result}", markup=False, highlight=False)


def _list(plan: "Plan", store: "RowStore", console: Any) -> int:
    rows = store.read()
    for job in plan.pending(rows):
        name = run_name(plan, job.task, job.method, job.settings)
        console.print(f"{name}, {job.settings['steps']} steps", markup=False, highlight=False)
    done, total = plan.counts(rows)
    console.print(f"{done} of {total} runs are done; seeds whose learning rate is still to be chosen are not listed.")
    return 0


def _report(plan: "Plan", store: "RowStore", console: Any, args: argparse.Namespace) -> None:
    from slsam_peft.cli import compare_report
    from slsam_peft.runs.compare.report import build_report

    lines = build_report(plan, store.read())
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
