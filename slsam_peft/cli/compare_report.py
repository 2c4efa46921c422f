"""The result of a comparison is shown as tables."""

import math
from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.table import Table
from rich.text import Text

from slsam_peft.runs.compare.metrics import METRICS
from slsam_peft.runs.compare.report import Line
from slsam_peft.runs.compare.settings import CompareSettings

MATCHED = {"steps": "equal steps", "cost": "equal cost", "epochs": "equal epochs"}
COLUMNS = (
    "method",
    "learning rate",
    "cost per step",
    "steps",
    "total cost",
    "seeds",
    "mean",
    "difference",
    "95 % t interval",
    "bootstrap interval",
    "p",
    "p (Holm)",
)
NARROW = ("method", "steps\nx cost", "mean", "difference\n95 % interval", "p (Holm)")  # of tables for terminals
BOOTSTRAP = (
    "Bootstrap intervals are bias-corrected, assume no distribution and are too narrow for few seeds: about 83 % "
    "instead of 95 % with five, 70 % with three."
)
WIDTH = 80  # characters that those tables need


def tables(lines: Sequence[Line], metric: str, settings: CompareSettings) -> list[Table]:
    """Return one table for each task and match; each fits into `WIDTH` characters."""
    result = []
    for title, group in groups(lines, settings):
        name = Text(f"{title}: {METRICS[metric].heading}{_before(group, metric)}", "table.title")
        table = Table(title=name, title_justify="left", caption_justify="left")
        for column in NARROW:
            left = column == "method"
            table.add_column(column, justify="left" if left else "right", no_wrap=not left, overflow="fold")
        for line in group:
            table.add_row(*_narrow_cells(line, metric, len(settings.seeds)))
        result.append(table)
    if result:
        result[-1].caption = Text(_notes(settings), "table.caption")
    return result


def _narrow_cells(line: Line, metric: str, seeds: int) -> list[Text]:
    done, below = len(line.scores[metric]), [f"lr {_chosen(line)}"]
    if line.edge is not None:
        below[0] += f", the {line.edge}"
    if done < seeds:
        below.append(f"{done} of {seeds} seeds")
    if line.failed:
        below.append(f"{line.failed} failed")
    if metric in line.differences and len(line.differences[metric].values) < done:
        below.append(f"difference of {len(line.differences[metric].values)}")
    steps = _count(line.steps) + (f"\nx {line.cost:.2f}" if line.cost is not None else "")
    difference, interval, _, _, corrected = _differences(line, metric)
    cells = [steps, _number(line.mean(metric), ".4f"), f"{difference}\n{interval}".removesuffix("\n-"), corrected]
    return [Text(line.method).append("".join(f"\n{text}" for text in below), "dim"), *map(Text, cells)]


def markdown(lines: Sequence[Line], metric: str, settings: CompareSettings) -> str:
    """Return the tables as Markdown."""
    text = []
    for title, group in groups(lines, settings):
        text += [
            f"### {' '.join(title.split())}: {METRICS[metric].heading}{_before(group, metric)}",
            "",
            _row(COLUMNS),
            _row(["---"] * len(COLUMNS)),
        ]
        text += [_row(_cells(line, metric)) for line in group] + [""]
    text.append(f"{_notes(settings)} {BOOTSTRAP}")
    return "\n".join(text) + "\n"


def groups(lines: Sequence[Line], settings: CompareSettings) -> Iterator[tuple[str, list[Line]]]:
    """Yield the lines of each task and match with a title."""
    for (task, match), group in groupby(lines, key=lambda line: (line.task, line.match)):
        yield f"{task}, {MATCHED[match]}", list(group)


def _before(lines: Sequence[Line], metric: str) -> str:
    """Return the mean score of the adapters that training began with, over the seeds done; nothing without any."""
    by_seed = {seed: score for line in lines for seed, score in line.before.get(metric, {}).items()}
    return f" ({sum(by_seed.values()) / len(by_seed):.4f} before)" if by_seed else ""


def _notes(settings: CompareSettings) -> str:
    tried = max(len(method.candidates) for method in settings.methods.values())
    seeds = ", ".join(map(str, settings.seeds))
    where = f" of {settings.tuning_task}" if settings.tuning_task else ""
    tuned = "Learning rates and radii were given; none was tuned."
    if tried > 1:
        given = [name for name, method in settings.methods.items() if len(method.candidates) == 1]
        tuned = f"Each method tried {tried} learning rates (or pairs of one and a radius), chosen by the "
        tuned += f"validation loss of seed {settings.tuning_seed}{where}"
        tuned += f"; nothing was chosen for {', '.join(map(repr, given))}." if given else "."
    return (
        f"Differences are to '{settings.reference}', paired by seed ({seeds}); intervals and p-values are those of "
        f"the paired t-test{_corrected(settings)}. Cost is in plain LoRA steps. {tuned}"
    )


def _corrected(settings: CompareSettings) -> str:
    if settings.primary is None:
        return ""
    return f", uncorrected that of '{settings.primary}', which the comparison was made for"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", r"\|").split()) for cell in cells) + " |"


def _cells(line: Line, metric: str) -> list[str]:
    seeds = str(len(line.scores[metric])) + (f" ({line.failed} failed)" if line.failed else "")
    return [
        line.method,
        _chosen(line),
        _number(line.cost, ".3f"),
        _count(line.steps),
        _number(line.total_cost, ".1f"),
        seeds,
        _number(line.mean(metric), ".4f"),
        *_differences(line, metric),
    ]


def _differences(line: Line, metric: str) -> list[str]:
    """Return difference, t interval, bootstrap interval, p and p after Holm's correction."""
    difference = line.differences.get(metric)
    if difference is None:
        return ["-"] * 5
    intervals = [
        "-" if math.isnan(low) else f"[{low:+.4f}, {high:+.4f}]"
        for low, high in ((difference.low, difference.high), difference.bootstrap)
    ]
    p_values = [_number(p, ".2g") for p in (difference.p, line.corrected[metric])]
    return [f"{difference.mean:+.4f}", *intervals, *p_values]


def _chosen(line: Line) -> str:
    return "open" if line.chosen is None else line.chosen.shown


def _count(steps: int | None) -> str:
    return "-" if steps is None else str(steps)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)
