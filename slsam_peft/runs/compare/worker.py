"""A worker of a comparison takes the next free job, runs it and writes its row."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from slsam_peft.runs.compare.jobs import Job, Plan, row_settings
from slsam_peft.runs.compare.store import Row, RowStore

WAIT = 10.0  # seconds, while other workers hold all jobs that can run

Run = Callable[[Mapping[str, Any], Callable[[int, int], None]], dict[str, Any]]
Progress = Callable[[Job, int, int], None]


def next_row(
    plan: Plan, store: RowStore, progress: Progress, run: Run | None = None, wait: float = WAIT
) -> Row | None:
    """Do the next job that no other process works on, and append its row.

    Waits while all jobs that can run are taken and others depend on their results.

    Args:
        plan (`Plan`): The comparison.
        store (`RowStore`): Where its rows are.
        progress (`Progress`): Told the job, steps done and steps in all; with 0 steps done when the job is claimed.
        run (callable, *optional*): Runs a job's settings. Defaults to `slsam_peft.runs.compare.run.run`.
        wait (`float`, *optional*): Seconds between looks at what others hold.

    Returns:
        `Row`: The row; `None` when every job has one.
    """
    if run is None:
        from slsam_peft.runs.compare.run import run
    while True:
        pending = list(plan.pending(store.read()))
        if not pending:
            return None
        for job in pending:
            with store.claim(job.key) as ours:
                if ours:
                    progress(job, 0, job.settings["steps"])
                    return _do(job, store, progress, run)
        time.sleep(wait)


def _do(job: Job, store: RowStore, progress: Progress, run: Run) -> Row:
    result = run(job.settings, lambda step, steps: progress(job, step, steps))
    row = {"key": job.key, "task": job.task, "method": job.method, "settings": row_settings(job.settings), **result}
    store.append(row)
    return row
