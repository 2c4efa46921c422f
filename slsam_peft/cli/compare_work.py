"""The runs of a comparison are done, and the screen tells how many are and how long the others will take."""

import signal
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from slsam_peft.errors import Interrupted

if TYPE_CHECKING:
    from slsam_peft.runs.compare.jobs import Job, Plan
    from slsam_peft.runs.compare.store import RowStore
    from slsam_peft.runs.compare.timing import Pace

SHOWN_SECONDS = 0.3  # at least, from one state that is shown to the next: steps may be short


def work(plan: "Plan", store: "RowStore", console: Any, limit: int | None = None, pace: "Pace | None" = None) -> None:
    """Do the jobs that nobody else does, until none is left, showing progress.

    Args:
        plan (`Plan`): The comparison.
        store (`RowStore`): Where its rows are.
        console (`rich.console.Console`): Where progress is shown.
        limit (`int`, *optional*): Most runs to do.
        pace (`Pace`, *optional*): What is known of how long runs take.
    """
    from rich.text import Text

    from slsam_peft.runs.compare.timing import Pace
    from slsam_peft.runs.compare.worker import next_row

    pace, count, shown = pace or Pace(plan, store.read()), 0, 0.0
    with console.status(Text(state(pace))) as status:

        def progress(job: "Job", step: int, steps: int) -> None:
            nonlocal shown
            pace.step(job, step)
            if step <= 1 or time.monotonic() - shown > SHOWN_SECONDS:
                shown = time.monotonic()
                name = run_name(plan, job.task, job.method, job.settings)
                status.update(Text(f"{state(pace)}\n{name}: step {step} of {steps}"))

        while limit is None or count < limit:
            pace.begin(store.read())
            status.update(Text(state(pace)))
            row = next_row(plan, store, progress)
            if row is None:
                return
            count += 1
            pace.end(row, store.read())
            _say(plan, row, console, pace)


def state(pace: "Pace") -> str:
    """Return how many runs are done, and how long the others will take this process alone, where that is known."""
    left = pace.left() if pace.done < pace.total else None
    return f"{pace.done} of {pace.total} runs done" + ("" if left is None else f", about {duration(left)} left")


def duration(seconds: float) -> str:
    """Return a time as a person says it: seconds below two minutes, then minutes, then hours and minutes."""
    if seconds < 119.5:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, rest = divmod(round(minutes / 5) * 5, 60)
    return f"{hours} h {rest} min" if rest else f"{hours} h"


def span(low: float, high: float) -> str:
    """Return a range of times; a single one where both ends are said alike."""
    first, last = duration(low), duration(high)
    return f"about {first}" if first == last else f"{first} to {last}"


def stopped(stop: KeyboardInterrupt, plan: "Plan", rows: Mapping[str, Any]) -> Interrupted:
    """Return what to raise for a signal once what there is has been shown."""
    number = stop.signal if isinstance(stop, Interrupted) else signal.SIGINT
    done, total = plan.counts(rows)
    return Interrupted(
        number,
        f"{signal.Signals(number).name}: stopped after {done} of {total} runs. The same command goes on from there.",
    )


def run_name(plan: "Plan", task: str, method: str, settings: Mapping[str, Any]) -> str:
    """Return what a run is called where it is shown.

    Args:
        plan (`Plan`): The comparison.
        task (`str`): Its name in the comparison.
        method (`str`): Its name in the comparison.
        settings (`dict`): `Job.settings`.
    """
    tried = plan.settings.methods[method].candidate_of(settings)
    return f"{task}, {method}, learning rate {tried.shown}, seed {settings['seed']}"


def _say(plan: "Plan", row: dict[str, Any], console: Any, pace: "Pace") -> None:
    result = row.get("error") or f"loss {row['loss']:.4f}, exact {row['exact']:.1%}, {row['seconds']:.0f} s"
    if "before" in row:
        was = row["before"]
        result += f", attack success {row['attack_success']:.1%}; before: loss {was['loss']:.4f}, exact "
        result += f"{was['exact']:.1%}, attack success {was['attack_success']:.1%}"
    name = run_name(plan, row["task"], row["method"], row["settings"])
    # A terminal has the line below; a log has none.
    more = "" if console.is_terminal else f" ({state(pace)})"
    console.print(f"{name}: {result}{more}", markup=False, highlight=False, soft_wrap=not console.is_terminal)
