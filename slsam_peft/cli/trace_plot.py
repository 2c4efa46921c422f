"""Draws pictures of traces: what the sampler did, and what came of it."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from slsam_peft.saving.trace_data import TraceData

WIDTH = 11.0  # inches
DPI = 150
NAMED_ARMS = 36  # with more, blocks are named instead of arms
MOST_TICKS = 20
MOST_COLUMNS = 800  # of a heat map; neighbouring steps are averaged
MARKED_STEPS = 60  # with more, a heat map does not mark which arms were active in which
MOST_DOTS = 400  # of the cost panel
SMOOTHED = 20  # curves of so many steps are smoothed
COLOURS = "cividis"  # perceptually uniform, the same in greyscale
# Curves differ in lightness and in dashes, so that they can be told apart without colour.
STYLES: tuple[tuple[str, Any], ...] = (
    ("#1b2a49", "-"),
    ("#d1701f", (0, (5, 1.5))),
    ("#3f8f6b", (0, (1.2, 1.2))),
    ("#8c6bb1", (0, (6, 1.5, 1.2, 1.5))),
    ("#7f7f7f", (0, (9, 3))),
    ("#c2a13a", (0, (3, 1, 1, 1, 1, 1))),
)
_BAR = "#9fb3c8"
_RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.4",
    "xtick.color": "0.25",
    "ytick.color": "0.25",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "slsam",
}


def draw(traces: Sequence[TraceData], suffix: str) -> bytes:
    """Draw runs of the same arms: a heat map and the activity of each, their curves in the same axes.

    Args:
        traces (`Sequence[TraceData]`): One or more, as `read_runs` returns them.
        suffix (`str`): `".png"` or `".svg"`.

    Returns:
        `bytes`: The content of the file.
    """
    with matplotlib.rc_context(_RC):
        figure = build(traces)
        content = io.BytesIO()
        metadata: Any = {"Date": None} if suffix == ".svg" else None
        figure.savefig(content, format=suffix[1:], dpi=DPI, metadata=metadata)
    return content.getvalue()


def build(traces: Sequence[TraceData]) -> Figure:
    """Return the figure that `draw` saves."""
    # Heat maps above, one per run; below them the curves of all runs in the same axes.
    arms, runs = len(traces[0].names), len(traces)
    map_height = (3.1 if runs > 1 else 3.8) + 0.7 * (arms > NAMED_ARMS // 2)
    curve_height = 2.7
    figure = Figure(figsize=(WIDTH, 0.5 + runs * map_height + curve_height), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.06)  # type: ignore[union-attr]
    figure.suptitle(_headline(traces), fontsize=12, fontweight="bold")
    parts: Any = figure.subfigures(2, 1, height_ratios=[runs * map_height, curve_height])
    upper, lower = parts
    _draw_maps(upper, traces)
    # What came of it: loss, sharpness, cost.
    axes = lower.subplots(1, 3)
    _draw_loss(axes[0], traces)
    _draw_sharpness(axes[1], traces)
    _draw_cost(axes[2], traces)
    for axis in axes:
        axis.set_xlabel(_step_label(traces))
        axis.set_xlim(*_span(traces))
        _count_steps(axis, 5)
        axis.grid(color="0.92", linewidth=0.7)
        axis.set_axisbelow(True)
    if runs > 1:
        handles, labels = axes[0].get_legend_handles_labels()
        lower.legend(handles, labels, loc="outside upper center", ncols=min(runs, 4), handlelength=3.2)
    return figure


def _headline(traces: Sequence[TraceData]) -> str:
    first = traces[0]
    if len(traces) > 1:
        return f"What the sampler did: {len(traces)} runs over {len(first.names)} arms"
    return f"What the sampler did: {first.label}"


def _subtitle(trace: TraceData) -> str:
    config, plain = trace.plain["config"], trace.plain
    parts = [
        f"{len(trace.names)} arms",
        f"{plain['steps']:,} steps",
        trace.radius,
        f"design {config['design']}",
        f"bandit {config['bandit']}",
        f"ascent {config['ascent']}",
    ]
    if config["descent"] != "active":
        parts.append(f"descent {config['descent']}")
    return ", ".join(parts)


def _step_label(traces: Sequence[TraceData]) -> str:
    strides = {trace.plain["stride"] for trace in traces}
    stride = max(strides)
    return "step" if stride == 1 else f"step (every {stride}{_ordinal(stride)} is shown)"


def _span(traces: Sequence[TraceData]) -> tuple[float, float]:
    first = min(int(trace.step[0]) for trace in traces)
    last = max(int(trace.plain["last"]) for trace in traces)
    margin = 0.02 * (last - first) + 0.5
    return first - margin, last + margin


def _count_steps(axis: Axes, ticks: int) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(ticks, integer=True))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _ordinal(number: int) -> str:
    if number % 100 in (11, 12, 13):
        return "th"
    return {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")


def _draw_maps(figure: Any, traces: Sequence[TraceData]) -> None:
    runs = len(traces)
    axes = figure.subplots(runs, 2, squeeze=False, width_ratios=[1, 0.26], sharey=True)
    norm = Normalize(0.0, max(float(trace.probabilities.max()) for trace in traces))
    most = max(float((trace.share).max()) for trace in traces)
    for (left, right), trace in zip(axes, traces, strict=True):
        image = _draw_map(left, trace, norm)
        name = f"{trace.label}: " if runs > 1 else ""
        left.set_title(name + _subtitle(trace) + (", dots: active" if _marked(trace) else ""), loc="left")
        left.set_xlabel(_step_label([trace]))
        _draw_activity(right, trace, most)
        bar = figure.colorbar(image, ax=(left, right), pad=0.01, fraction=0.03, aspect=28)
        bar.set_label("probability p, learned by the bandit")
        bar.outline.set_visible(False)
    axes[0][1].set_title("how often active", loc="left")
    figure.supylabel("arm, lowest block at the bottom", fontsize=8.5)


def _marked(trace: TraceData) -> bool:
    return len(trace) <= MARKED_STEPS and len(trace.names) <= NAMED_ARMS


def _draw_map(axis: Axes, trace: TraceData, norm: Normalize) -> AxesImage:
    # More rows than the picture has columns are averaged.
    stride, rows = trace.plain["stride"], len(trace)
    width = -(-rows // MOST_COLUMNS)  # rows of the trace per column
    starts = np.arange(0, rows, width)
    sums = np.add.reduceat(trace.probabilities.astype(np.float64), starts, axis=0)
    columns = sums / np.diff(np.append(starts, rows))[:, None]
    # A column is centred on its step.
    first = float(trace.step[0]) - 0.5
    image = axis.imshow(
        columns.T,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        cmap=COLOURS,
        norm=norm,
        extent=(first, first + len(starts) * width * stride, -0.5, len(trace.names) - 0.5),
    )
    axis.set_xlim(first, first + rows * stride)
    _count_steps(axis, 8)
    if _marked(trace):
        at, arm = np.nonzero(trace.active)
        axis.plot(
            trace.step[at], arm, "o", color="white", markeredgecolor="black", markersize=3.2, markeredgewidth=0.6
        )
    _name_arms(axis, trace)
    axis.spines[:].set_visible(False)
    return image


def _name_arms(axis: Axes, trace: TraceData) -> None:
    # Few arms have a label each, many without a depth every so many one.
    labels = trace.labels
    if len(labels) <= NAMED_ARMS:
        axis.set_yticks(range(len(labels)), labels, fontsize=6.5 if len(labels) > 24 else 7.5)
        return
    depths = trace.depths
    if None in depths:
        step = -(-len(labels) // MOST_TICKS)
        shown = list(range(0, len(labels), step))
        axis.set_yticks(shown, [labels[i] for i in shown], fontsize=6.5)
        return
    # Many arms with a depth: a label for each block, or for every so many blocks.
    starts = [i for i, d in enumerate(depths) if i == 0 or depths[i - 1] != d]
    ends = [*starts[1:], len(depths)]
    step = -(-len(starts) // MOST_TICKS)
    inside = [i for i, d in enumerate(depths[s] for s in starts) if d is not None and d >= 0]
    shown = inside[::step]
    if step == 1:  # what lies below and above the blocks
        shown = list(range(len(starts)))
    middles = [(starts[i] + ends[i] - 1) / 2 for i in shown]
    names = [_block_label(trace, starts[i], ends[i]) for i in shown]
    axis.set_yticks(middles, names, fontsize=7)
    axis.set_yticks([s - 0.5 for s in starts[1:]], minor=True)
    axis.tick_params(axis="y", which="minor", length=0)


def _block_label(trace: TraceData, start: int, end: int) -> str:
    depth = trace.depths[start]
    if end - start == 1:
        return trace.labels[start]
    return "below the blocks" if depth == -1 else f"block {depth}"


def _draw_activity(axis: Axes, trace: TraceData, most: float) -> None:
    # Bars: how often each was active; black: what the bandit has asked for.
    rows = np.arange(len(trace.names))
    share = trace.share
    mean = trace.probabilities.mean(axis=0)
    if len(rows) <= NAMED_ARMS:
        axis.barh(rows, share, height=0.72, color=_BAR)
        axis.plot(mean, rows, "|", color="black", markersize=min(14.0, 160 / len(rows)), markeredgewidth=1.3)
    else:
        axis.stairs(share, np.arange(len(rows) + 1) - 0.5, orientation="horizontal", fill=True, color=_BAR)
        axis.plot(mean, rows, color="black", linewidth=0.7)
    axis.set_xlim(0, min(1.0, most * 1.12))
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.xaxis.set_major_locator(MaxNLocator(4))
    # A nested set holds every arm above its lowest one, so upper arms come up more often than p says.
    nested = ", before nesting" if trace.plain["config"]["design"] == "depth" else ""
    axis.set_xlabel(f"share of steps (%)\nblack: mean p{nested}")
    axis.tick_params(axis="y", which="both", left=False)
    axis.grid(axis="x", color="0.92", linewidth=0.7)
    axis.set_axisbelow(True)


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Return the mean over the last `width` values; NaN counts as missing."""
    found = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(found, values, 0.0), dtype=np.float64)])
    counts = np.concatenate([[0], np.cumsum(found)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    with np.errstate(invalid="ignore"):
        return (sums[ends] - sums[starts]) / (counts[ends] - counts[starts])


def _draw_curves(axis: Axes, traces: Sequence[TraceData], name: str, title: str, unit: str) -> bool:
    """Draw each step's value lightly and their moving average above it; return whether there was any."""
    drawn, widths = False, set()
    for i, trace in enumerate(traces):
        values = trace.values[name].astype(np.float64)
        if not np.isfinite(values).any():
            continue
        colour, dashes = STYLES[i % len(STYLES)]
        drawn = True
        width = int(len(values) ** 0.5 / 1.5) if len(values) >= SMOOTHED else 1
        if width > 1:
            widths.add(width * trace.plain["stride"])
            axis.plot(trace.step, values, color=colour, alpha=0.22, linewidth=0.6, rasterized=len(values) > 2000)
        axis.plot(trace.step, _smooth(values, width), color=colour, linestyle=dashes, linewidth=1.6, label=trace.label)
    note = f", thick: mean over {max(widths):,} steps" if widths else ""
    axis.set_title(title + note, loc="left")
    axis.set_ylabel(unit)
    return drawn


def _say_instead(axis: Axes, text: str) -> None:
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", color="0.35")
    axis.set_yticks([])


def _draw_loss(axis: Axes, traces: Sequence[TraceData]) -> None:
    if not _draw_curves(axis, traces, "loss", "Training loss", "loss (nats)"):
        _say_instead(axis, "no finite loss")


def _draw_sharpness(axis: Axes, traces: Sequence[TraceData]) -> None:
    if not _draw_curves(axis, traces, "sharpness", "Sharpness", "L(w + e) \N{MINUS SIGN} L(w) (nats)"):
        _say_instead(axis, "not known: only ascent='two_pass'\ncomputes the loss at w and at w + e")
        return
    axis.axhline(0.0, color="0.6", linewidth=0.8)


def _draw_cost(axis: Axes, traces: Sequence[TraceData]) -> None:
    axis.set_title("Cost of a step", loc="left")
    axis.set_ylabel("cost (plain LoRA steps)")
    drawn = [trace for trace in traces if np.isfinite(trace.cost).any()]
    if not drawn:
        _say_instead(axis, "not known: there is no cost model\nfor this trainer or model")
        return
    # The mean so far is what a budget is about; single steps are shown for one run only.
    top = 1.0
    for i, trace in enumerate(traces):
        if trace not in drawn:
            continue
        colour, dashes = STYLES[i % len(STYLES)]
        cost = trace.cost.astype(np.float64)
        if len(traces) == 1:
            some = slice(None, None, -(-len(cost) // MOST_DOTS))
            axis.plot(trace.step[some], cost[some], ".", color=colour, alpha=0.25, markersize=2.4, label="one step")
            top = max(top, float(np.nanmax(cost)))
        so_far = np.cumsum(cost) / np.arange(1, len(cost) + 1)
        top = max(top, float(np.nanmax(so_far)))
        label = f"mean so far, {trace.mean_cost:.2f} at the end"
        axis.plot(trace.step, so_far, color=colour, linestyle=dashes, linewidth=1.6, label=label)
    # What it is to be compared with.
    for budget in sorted({t.plain["budget"] for t in drawn if t.plain["budget"] is not None}):
        axis.axhline(budget, color="#b03030", linestyle=(0, (2, 1.5)), linewidth=1.4, label=f"budget {budget:g}")
    if not any(t.plain["budget"] == 1.0 for t in drawn):
        axis.axhline(1.0, color="0.5", linestyle=":", linewidth=1.2, label="plain LoRA")
    entries = len(axis.get_legend_handles_labels()[0])
    axis.set_ylim(0, top * (1.1 + 0.14 * entries))  # room for the legend
    axis.legend(loc="upper right", handlelength=3.2)
