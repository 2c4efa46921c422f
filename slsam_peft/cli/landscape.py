"""Draws pictures of a loss around an adapter: along a line, and on a plane."""

import math
from itertools import pairwise
from typing import Any

_STYLES = {"training": ("black", "-", "o"), "held-out": ("0.55", "--", "s")}
_NAMES = {"adapter": "adapter's parameters", "full weight": "full weights W + BA"}
_STEP = "step along a random filter-normalised direction\n(1: each row of a weight has moved by its own length)"
_UNIT = "nats per answer token"
_LABEL = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}


def draw(result: dict[str, Any], adapter: str) -> Any:
    """Draw the slices: a row for each space, a line to the left and a plane to the right of it.

    Args:
        result (`dict`): From `measure_flatness`.
        adapter (`str`): The adapter's name.

    Returns:
        `matplotlib.figure.Figure`: The picture.
    """
    from matplotlib.figure import Figure

    spaces = result["spaces"]
    slices = [s for s in ("line", "plane") if any(s in space for space in spaces.values())]
    figure = Figure(figsize=(5.4 * len(slices), 1.0 + 3.9 * len(spaces)), layout="constrained")
    axes = figure.subplots(len(spaces), len(slices), squeeze=False)
    for row, (kind, space) in zip(axes, spaces.items(), strict=True):
        title = f"{_NAMES[kind]} ({_count(space['parameters'])})"
        for axis, slice_ in zip(row, slices, strict=True):
            if slice_ == "line":
                _line(axis, space["line"], title)
            else:
                _plane(figure, axis, space["plane"], title)
    figure.suptitle(f"Loss around {adapter}", fontsize="x-large")
    return figure


def _line(axis: Any, line: dict[str, Any], title: str) -> None:
    for name, losses in line["loss"].items():
        colour, style, marker = _STYLES[name]
        axis.plot(line["places"], losses, style, color=colour, marker=marker, markersize=4, label=f"{name} data")
    axis.axvline(0, color="0.8", linewidth=1, zorder=0)
    axis.set(title=f"Along a line: {title}", xlabel=_STEP, ylabel=f"loss ({_UNIT})")
    axis.grid(color="0.92")
    axis.set_axisbelow(True)
    axis.legend(frameon=False)


def _plane(figure: Any, axis: Any, plane: dict[str, Any], title: str) -> None:
    places = plane["places"]
    losses = [list(column) for column in zip(*plane["loss"], strict=True)]  # rows of the picture: second direction
    filled = axis.contourf(places, places, losses, levels=14, cmap="Greys")
    lines = axis.contour(places, places, losses, levels=filled.levels[::2], colors="black", linewidths=0.7)
    for label in axis.clabel(lines, fontsize="small", fmt=f"%.{_decimals(lines.levels)}f"):
        label.set_bbox(_LABEL)
    axis.plot(0, 0, "P", color="white", markeredgecolor="black", markersize=9)
    axis.annotate("adapter", (0, 0), (7, 5), textcoords="offset points", bbox=_LABEL)
    axis.set(title=f"On a plane: {title}", xlabel=_STEP, ylabel="step along a second one")
    axis.locator_params(nbins=5)
    axis.set_aspect("equal")
    figure.colorbar(filled, ax=axis, label=f"loss on {plane['data']} data ({_UNIT})")


def _decimals(levels: Any) -> int:
    """Return how many decimals tell neighbouring levels apart."""
    step = float(min((b - a for a, b in pairwise(levels)), default=1.0))
    return max(0, math.ceil(-math.log10(step))) if step > 0 else 3


def _count(number: int) -> str:
    for size, unit in ((10**9, " billion"), (10**6, " million")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:,}"
