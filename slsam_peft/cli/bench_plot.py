"""Draws the picture of `slsam-peft bench`: measured beside predicted cost."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slsam_peft.runs.bench import Measured


def draw(measured: "Sequence[Measured]") -> Any:
    """Draw measured beside predicted ratios.

    Args:
        measured (`Sequence[Measured]`): What `run_bench` returned.

    Returns:
        `matplotlib.figure.Figure`: The picture.
    """
    from matplotlib.figure import Figure

    names = [m.mode for m in measured]
    figure = Figure(figsize=(8, 0.6 * len(names) + 1.7), layout="constrained")
    axes = figure.subplots()
    rows = range(len(names))
    summaries = [m.summary() for m in measured]
    axes.barh(rows, [s["ratio"] for s in summaries], color="#4c72b0", height=0.55, label="measured, median of rounds")
    axes.plot([s["predicted"] for s in summaries], rows, "D", color="black", ms=6, label="predicted from FLOPs")
    for row, m in zip(rows, measured, strict=True):
        axes.plot(m.ratios, [row] * len(m.ratios), "|", color="#c44e52", ms=12, mew=2, label=None if row else "rounds")
    axes.axvline(1.0, color="grey", lw=1, ls="--")
    axes.set_yticks(rows, names)
    axes.invert_yaxis()
    axes.set_xlabel("time of a step / plain LoRA's (same round)")
    axes.set_title("Cost of a step")
    figure.legend(loc="outside lower center", ncols=3)  # inside it would lie on the marks
    return figure
