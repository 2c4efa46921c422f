"""Shows a screen that follows a training by its trace file."""

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    pass
from slsam_peft.saving.trace_data import TraceData

LOOK_SECONDS = 0.5
HEADER_LINES = 7  # all but the arms
STALE_SECONDS = 60
LABEL_WIDTH = 26
_BARS = "▁▂▃▄▅▆▇█"
_COLOURS = ("#35456c", "#4e576c", "#666970", "#7d7c78", "#958f78", "#aea371", "#c8b866", "#fee838")  # cividis


def follow(run: Path, console: Console) -> None:
    """Show a run until it is done, then leave its last state on the screen.

    Args:
        run (`Path`): Its output folder, which must exist, or its trace file.
        console (`rich.console.Console`): Where to.

    Raises:
        UserError: there is no such folder, or the file in it cannot be read.
        KeyboardInterrupt: the user has seen enough; the screen is then as it was before.
    """
    from slsam_peft.saving.trace_data import FILE_NAME, read_trace, trace_path

    # The file is read again whenever it has changed; the clock runs on in between.
    path = run / FILE_NAME if run.is_dir() else trace_path(run)
    trace: TraceData | None = None
    seen = None
    with Live(console=console, screen=console.is_terminal, auto_refresh=False, transient=True) as live:
        while trace is None or not trace.plain["done"]:
            written = path.stat().st_mtime_ns if path.is_file() else None
            if written is not None and written != seen:
                trace, seen = read_trace(path), written
            if trace is None:
                live.update(Text(f"Waiting for the first step of {run} (Ctrl-C ends)"), refresh=True)
            else:
                age = max(0.0, time.time() - (seen or 0) / 1e9)
                live.update(view(trace, console.width, console.height, age), refresh=True)
            if trace is None or not trace.plain["done"]:
                time.sleep(LOOK_SECONDS)
    # The alternate screen is gone by now; the last state stays on the normal one.
    console.print(view(trace, console.width, console.height))


def view(trace: "TraceData", width: int, height: int, age: float | None = None) -> RenderableType:
    """Return the screen's content.

    Args:
        trace (`TraceData`): The run so far.
        width (`int`): Characters in a line.
        height (`int`): Lines; neighbouring arms share one where they do not fit.
        age (`float`, *optional*): Seconds since the trace was written.
    """
    curves = Table.grid(padding=(0, 2))
    curves.add_column(style="bold", no_wrap=True)
    curves.add_column(justify="right", no_wrap=True)
    curves.add_column(no_wrap=True)
    room = max(10, width - 48)
    for name, values, note in _curves(trace):
        curves.add_row(name, note, Text(_sparkline(values, room)))
    return Group(_heading(trace, age), curves, Text(), _arms(trace, width, max(3, height - HEADER_LINES - 1)))


def _heading(trace: "TraceData", age: float | None) -> Text:
    last, total = trace.plain["last"], trace.plain["total"]
    config = trace.plain["config"]
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(trace.label, style="bold")
    text.append(f"  step {last:,} of {total:,} ({last / max(total, 1):.0%})")
    if trace.plain["done"]:
        text.append("  done", style="green")
    elif age is not None and age >= STALE_SECONDS:
        text.append(f"  written {age / 60:.0f} min ago", style="yellow")
    elif age is not None:
        text.append(f"  written {age:.0f} s ago", style="dim")
    text.append(f"  design {config['design']}, bandit {config['bandit']}, {trace.radius}", style="dim")
    return text


def _curves(trace: "TraceData") -> list[tuple[str, Any, str]]:
    rows = []
    for name in ("loss", "sharpness", "cost"):
        values = trace.values[name]
        finite = values[~(values != values)]
        note = f"{float(finite[-1]):.3f}" if len(finite) else "not known"
        if name == "cost" and len(finite):
            budget = trace.plain["budget"]
            note = f"mean {trace.mean_cost:.2f}" + (f" of {budget:g}" if budget is not None else "")
        rows.append((name, values, note))
    return rows


def _sparkline(values: Any, width: int) -> str:
    """Draw values as bars, averaged over equal parts where there are more than `width`."""
    import numpy as np

    parts = np.array_split(values.astype(float), min(width, len(values)))
    means = [float(np.mean(f)) if len(f := p[np.isfinite(p)]) else math.nan for p in parts]
    known = [m for m in means if not math.isnan(m)]
    if not known:
        return ""
    low, span = min(known), max(known) - min(known)
    levels = [-1 if math.isnan(m) else int((m - low) / span * (len(_BARS) - 1) + 0.5) if span else 0 for m in means]
    return "".join(" " if level < 0 else _BARS[level] for level in levels)


def _arms(trace: "TraceData", width: int, lines: int) -> Table:
    """Return a line for each arm or group of arms, highest first: p over time, p now, how often active."""
    import numpy as np

    # As many groups of neighbouring arms as there are lines, and as many spans of time as there is room.
    labels, share = trace.labels, trace.share
    label_width = min(LABEL_WIDTH, 1 + max(map(len, labels)))
    groups = np.array_split(np.arange(len(labels)), min(lines - 1, len(labels)))
    columns = max(10, width - label_width - 24)
    times = np.array_split(np.arange(len(trace)), min(columns, len(trace)))
    over_time = np.stack([trace.probabilities[rows].mean(axis=0) for rows in times], axis=1)
    top = float(over_time.max()) or 1.0
    # The highest block comes first, as it does in the picture.
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("arm", no_wrap=True, width=label_width, overflow="ellipsis")
    table.add_column("probability p over the steps", no_wrap=True, width=columns)
    table.add_column("p now", justify="right", no_wrap=True)
    table.add_column("active", justify="right", no_wrap=True)
    for group in reversed(groups):
        name = _group_label(trace, int(group[0]), int(group[-1]))
        now = float(trace.probabilities[-1][group].mean())
        strip = _strip(over_time[group].mean(axis=0) / top)
        table.add_row(name, strip, f"{now:.3f}", f"{float(share[group].mean()):.0%}")
    return table


def _group_label(trace: "TraceData", first: int, last: int) -> str:
    low, high = trace.depths[first], trace.depths[last]
    if first == last or low is None or high is None or low < 0:
        names = trace.labels[first], trace.labels[last]
        return names[0] if first == last else f"{names[0]} to {names[1]}"
    return f"in block {low}" if low == high else f"in blocks {low} to {high}"


def _strip(levels: Any) -> Text:
    text = Text()
    for level in levels:
        height = min(len(_BARS) - 1, int(level * len(_BARS)))
        text.append(_BARS[height], style=_COLOURS[height])
    return text
