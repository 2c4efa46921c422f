"""The rows of a comparison are of the same data, or nothing is said of them. This module imports no torch.

Methods are paired by seed: all runs of a seed are trained on the same rows, and all runs of a task are scored, and
their learning rates chosen, on the same ones. A file may change while a comparison goes on, and what is built on the
spot may differ from one Python version to the next.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from slsam_peft.errors import UserError
from slsam_peft.runs.compare.jobs import Job, Plan, Rows
from slsam_peft.runs.compare.settings import TaskSettings
from slsam_peft.runs.compare.store import Row

if TYPE_CHECKING:
    from slsam_peft.runs.compare.tasks import TaskData


def check_rows(plan: Plan, rows: Rows) -> None:
    """Refuse rows of different data, and of different adapters to begin with.

    Args:
        plan (`Plan`): The comparison.
        rows (`dict[str, Row]`): Its rows. Those from before rows told of held-out data have no `"held_out"`, and are
            taken as they are.

    Raises:
        UserError: two rows do not belong together. The message names both and says what to do.
    """
    seen: dict[tuple[str, str], Row] = {}  # the first row of each task, or of a task and a seed

    def hold(name: str, row: Row, where: str, what: str) -> None:
        first = seen.setdefault((name, where), row)
        if row.get(name) != first.get(name):
            raise UserError(f"rows {first['key']} and {row['key']} ({where}) {what}; take out those of one of them.")

    for job, row in _done(plan, rows):
        of_task, why = f"task {job.task}", _why(plan.settings.tasks[job.task])
        of_seed = f"{of_task}, seed {job.settings['seed']}"
        hold("data", row, of_seed, f"were trained on different data, {why}")
        hold("start", row, of_seed, "began with different poisoned adapters, from another machine or an emptied cache")
        if "held_out" in row:
            hold("held_out", row, of_task, f"were scored on different held-out rows, {why}")


def check_going_on(plan: Plan, rows: Rows, name: str, data: "TaskData") -> None:
    """Refuse to go on with rows of other data than those that runs would have now.

    Args:
        plan (`Plan`): The comparison.
        rows (`dict[str, Row]`): Its rows.
        name (`str`): A task.
        data (`TaskData`): What `load_task` gives for it and the tuning seed.

    Raises:
        UserError: a row is of other data. The message says what to do.
    """
    trained_on, held_out = data.fingerprint(), data.held_out_fingerprint()
    for job, row in _done(plan, rows):
        tuned = job.settings["seed"] == plan.settings.tuning_seed
        if job.task == name and ((tuned and row["data"] != trained_on) or row.get("held_out", held_out) != held_out):
            raise UserError(
                f"the data are not those of row {row['key']} ({_why(plan.settings.tasks[name])}), and rows of "
                "different data are not compared; bring the data back, or begin with other rows: --results FILE."
            )


def _done(plan: Plan, rows: Rows) -> Iterator[tuple[Job, Row]]:
    """Yield the runs that have a row with scores."""
    for cell in plan.cells():
        for job in (*plan.tuning(*cell), *plan.reported(rows, *cell)):
            row = rows.get(job.key)
            if row is not None and "error" not in row:
                yield job, row


def _why(task: TaskSettings) -> str:
    """Return what data of a task differ by."""
    if task.file is not None:
        return f"from before and after {task.file if task.test_file is None else 'one of the files'} was changed"
    return "from another Python or package version"
