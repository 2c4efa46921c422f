"""The result of a comparison is drawn as a forest plot: differences to the reference with their intervals."""

import io
import math
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slsam_peft.cli.compare_report import groups
from slsam_peft.cli.outputs import DPI
from slsam_peft.runs.compare.metrics import METRICS
from slsam_peft.runs.compare.report import Line
from slsam_peft.runs.compare.settings import CompareSettings
from slsam_peft.runs.compare.statistics import Difference

# Sizes are in inches. The picture is as wide as the text of a README, at the size in which its own text is set.
WIDTH, NAMES, NUMBERS = 8.4, 3.5, 1.75
ROW, TEXT_ROW, TITLE, FOOT, GAP = 0.25, 0.15, 0.3, 0.86, 0.12
LABEL_WIDTH = 37  # characters of a method's name on one line

BETTER, WORSE, OPEN = "#1c6fb8", "#c2560c", "0.35"
_RC: Any = {
    "font.family": "sans-serif",
    "svg.fonttype": "none",  # text stays text: a third of the size, and it can be searched and read aloud
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": "0.4",
    "xtick.color": "0.25",
    "svg.hashsalt": "slsam",
}


def draw(lines: Sequence[Line], metric: str, settings: CompareSettings, suffix: str) -> bytes:
    """Draw the paired differences: a panel for each task and match, a row for each method, the best one on top.

    Args:
        lines (`Sequence[Line]`): From `build_report`.
        metric (`str`): What is compared.
        settings (`CompareSettings`): The comparison.
        suffix (`str`): `".png"` or `".svg"`.

    Returns:
        `bytes`: The content of the file.
    """
    with matplotlib.rc_context(_RC):
        figure = build(lines, metric, settings)
        content = io.BytesIO()
        metadata: Any = {"Date": None} if suffix == ".svg" else None
        figure.savefig(content, format=suffix[1:], dpi=DPI, metadata=metadata)
    return content.getvalue()


def build(lines: Sequence[Line], metric: str, settings: CompareSettings) -> Figure:
    """Return the figure that `draw` saves."""
    panels = _panels(lines, metric, settings)
    # Heights come first: a panel is as high as its rows, and a name of several lines makes its row higher.
    heights = [[_height(line) for line in group] for _, group in panels]
    height = sum(TITLE + sum(of) + GAP for of in heights) + FOOT
    figure = Figure(figsize=(WIDTH, height))
    low, high = _limits([line for _, group in panels for line in group], metric)
    # Panels follow one another from the top, each under its title.
    top = height
    for (title, group), of in zip(panels, heights, strict=True):
        bottom = top - TITLE - sum(of)
        box = (NAMES / WIDTH, bottom / height, (WIDTH - NAMES - NUMBERS) / WIDTH, sum(of) / height)
        axes = figure.add_axes(box)
        axes.set_xlim(low, high)
        _panel(axes, group, of, metric)
        left = 0.08 / WIDTH
        figure.text(left, (top - 0.62 * TITLE) / height, _plain(title), weight="bold", va="center")
        axes.tick_params(labelbottom=title == panels[-1][0], length=2)
        top = bottom - GAP
    # What the numbers and marks mean stands once, below the last panel.
    center = (NAMES + (WIDTH - NAMES - NUMBERS) / 2) / WIDTH
    better = "left" if METRICS[metric].less_is_better else "right"
    name = _plain(settings.reference)
    text = f"{METRICS[metric].heading} minus that of '{name}'{METRICS[metric].unit}: {better} is better"
    figure.text(center, 0.5 / height, text, ha="center", va="center")
    marks = (
        "small dots: one seed each; large mark and bar: mean and 95 % t interval, filled if the interval leaves out 0"
    )
    figure.text(0.5, 0.28 / height, marks, ha="center", va="center", color="0.35", size=8)
    grey = "grey numbers: steps x cost of a step, in steps of plain LoRA"
    figure.text(0.5, 0.1 / height, grey, ha="center", va="center", color="0.35", size=8)
    return figure


def _panels(lines: Sequence[Line], metric: str, settings: CompareSettings) -> list[tuple[str, list[Line]]]:
    """Return title and lines of each panel; lines without a result are counted in the title, if there are others."""
    every, known = [], []
    for title, group in groups(lines, settings):
        others = by_effect([line for line in group if line.method != settings.reference], metric)
        every.append((title, others))
        done = [line for line in others if metric in line.differences]
        missing = len(others) - len(done)
        if done:
            known.append((f"{title} ({missing} more without a result yet)" if missing else title, done))
    return known or every


def by_effect(lines: Sequence[Line], metric: str) -> list[Line]:
    """Return lines ordered by their difference, the best one first; those without one come last."""
    sign = 1.0 if METRICS[metric].less_is_better else -1.0

    def rank(line: Line) -> float:
        return sign * line.differences[metric].mean if metric in line.differences else math.inf

    return sorted(lines, key=rank)


def _height(line: Line) -> float:
    return ROW + TEXT_ROW * (len(_label(line).splitlines()) - 1)


def _label(line: Line) -> str:
    return "\n".join(textwrap.wrap(_plain(line.method), LABEL_WIDTH)) or " "


def _plain(name: str) -> str:
    """Return a name as matplotlib takes it for text, not for mathematics."""
    return name.replace("$", r"\$")


def _limits(lines: Sequence[Line], metric: str) -> tuple[float, float]:
    """Return the ends of the common axis: all intervals and seeds, the zero line, and a margin."""
    known = [line.differences[metric] for line in lines if metric in line.differences]
    ends = [0.0, *(value for difference in known for value in difference.values.values())]
    ends += [end for difference in known for end in (difference.low, difference.high) if not math.isnan(end)]
    margin = 0.04 * (max(ends) - min(ends)) or 1.0
    return min(ends) - margin, max(ends) + margin


def _panel(axes: Axes, lines: Sequence[Line], heights: Sequence[float], metric: str) -> None:
    axes.set_ylim(sum(heights) or ROW, 0.0)
    axes.axvline(0.0, color="0.4", linewidth=1)
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    axes.set_yticks([])
    axes.locator_params(axis="x", nbins=6)  # as many numbers as fit without touching
    # A row has four columns: name, steps and cost, marks, numbers.
    text: Any = {"va": "center", "transform": axes.get_yaxis_transform()}
    plot = WIDTH - NAMES - NUMBERS
    top = 0.0
    for line, height in zip(lines, heights, strict=True):
        y = top + height / 2
        top += height
        axes.text((0.16 - NAMES) / plot, y, _label(line), ha="left", size=8.2, linespacing=1.1, **text)
        if line.cost is not None and line.steps is not None:
            axes.text(-0.07 / plot, y, f"{line.steps} x {line.cost:.2f}", ha="right", color="0.45", size=7.5, **text)
        difference = line.differences.get(metric)
        if difference is None:
            axes.text(1 + 0.1 / plot, y, "no result yet", ha="left", color="0.45", **text)
            continue
        # Seeds lie below the mean and its interval. Color and filling both say whether the interval leaves out 0.
        decided = difference.low > 0 or difference.high < 0
        color = (BETTER if (difference.mean < 0) == METRICS[metric].less_is_better else WORSE) if decided else OPEN
        values = list(difference.values.values())
        axes.plot(values, [y] * len(values), "o", color="0.72", markersize=2.6, zorder=2, clip_on=False)
        if not math.isnan(difference.low):
            axes.plot([difference.low, difference.high], [y, y], color=color, linewidth=1.8, zorder=3)
        face = color if decided else "white"
        axes.plot(difference.mean, y, "D", color=color, markerfacecolor=face, markersize=4.6, zorder=4)
        axes.text(1 + 0.1 / plot, y, _numbers(difference), ha="left", color=color, size=8, **text)


def _numbers(difference: Difference) -> str:
    form = "+.3f" if abs(difference.mean) >= 0.0005 else "+.4f"  # so that small ones do not read as 0
    if math.isnan(difference.low):
        return format(difference.mean, form)
    return f"{difference.mean:{form}} [{difference.low:{form}}, {difference.high:{form}}]"
