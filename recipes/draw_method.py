# python recipes/draw_method.py .assets/method.svg
"""Draw SL-SAM: active sets over steps, as the package's own bandit draws them, and the two passes of one step."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from slsam_peft import SLSAMConfig
from slsam_peft.algorithm.bandit import Bandit
from slsam_peft.algorithm.sampling import Bernoulli

BLOCKS, STEPS, BEFORE = 10, 12, 150  # drawn: the steps after the first 150
SHOWN = 8  # the step whose passes are drawn
CONFIG = SLSAMConfig(active_fraction=0.3, bandit_rate=0.2)
NORMS = torch.linspace(1.0, 4.0, BLOCKS, dtype=torch.float64)  # upper blocks have the larger gradients
SEED = 8
DARKEST = 0.6  # probability of the darkest shade

INK, SOFT, PAPER = "#1f2328", "#8c959f", "#ffffff"
ACTIVE, FORWARD, BACKWARD = "#f59f00", "#1c7ed6", "#e03131"
PROBABILITY = matplotlib.colormaps["Blues"]
FIRST, SECOND, WIDTH = 8.1, 12.9, 2.3  # the passes' left edges, and a block's width


def draws() -> tuple[torch.Tensor, torch.Tensor]:
    """Return probabilities and active sets of the drawn steps, both of shape (steps, blocks)."""
    bandit, scheme = Bandit(BLOCKS, CONFIG.fraction * BLOCKS, CONFIG), Bernoulli()
    generator = torch.Generator().manual_seed(SEED)
    probabilities, masks = [], []
    for _ in range(BEFORE + STEPS):
        probabilities.append(bandit.probabilities)
        masks.append(scheme(bandit.probabilities, generator))
        bandit.update(masks[-1], NORMS, scheme.inclusion(bandit.probabilities))
    return torch.stack(probabilities[BEFORE:]), torch.stack(masks[BEFORE:])


def text(axes: Axes, x: float, y: float, label: str, size: float = 8.5, **options) -> None:
    """Write something, centred unless told otherwise."""
    axes.text(x, y, label, fontsize=size, **{"ha": "center", "va": "center", "color": INK, **options})


def arrow(axes: Axes, start: Sequence[float], end: Sequence[float], colour: str = INK, bend: float = 0.0) -> None:
    """Draw an arrow."""
    shape = FancyArrowPatch(
        tuple(start),
        tuple(end),
        arrowstyle="-|>",
        mutation_scale=12,
        lw=1.6,
        color=colour,
        connectionstyle=f"arc3,rad={bend}",
        shrinkA=0,
        shrinkB=0,
    )
    axes.add_patch(shape)


def draw_steps(axes: Axes, probabilities: torch.Tensor, masks: torch.Tensor) -> None:
    """Draw blocks against steps: shade = probability, marked = active, line = lowest active block."""
    for step in range(STEPS):
        x = step * 0.55
        lowest_active = int(masks[step].nonzero().min())
        for block in range(BLOCKS):
            shade = PROBABILITY(0.05 + 0.7 * float(probabilities[step, block]) / DARKEST)
            axes.add_patch(Rectangle((x, block), 0.55, 1, fc=shade, ec=PAPER, lw=1))
            if masks[step, block]:
                box = "round,pad=0,rounding_size=0.1"
                axes.add_patch(
                    FancyBboxPatch((x + 0.09, block + 0.17), 0.37, 0.66, boxstyle=box, fc=ACTIVE, ec=INK, lw=0.8)
                )
        axes.plot(
            [x + 0.02, x + 0.53],
            [lowest_active, lowest_active],
            color=BACKWARD,
            lw=2.2,
            solid_capstyle="butt",
        )
    axes.add_patch(Rectangle((SHOWN * 0.55, -0.06), 0.55, BLOCKS + 0.12, fc="none", ec=INK, lw=1.8))
    for block in range(BLOCKS):
        text(axes, -0.15, block + 0.5, f"block {block}", 7.5, ha="right")
    text(axes, STEPS * 0.275, BLOCKS + 1.25, "which blocks are active", 11, weight="bold")
    text(axes, STEPS * 0.275, BLOCKS + 0.6, "drawn anew in every step from the bandit's p", 8)
    arrow(axes, (2.0, -0.45), (4.6, -0.45), SOFT)
    text(axes, 1.85, -0.45, "steps", 8, ha="right")


def draw_pass(axes: Axes, x: float, mask: torch.Tensor, second: bool) -> None:
    """Draw the stack of blocks in one pass, with the reach of its forward and its backward."""
    lowest_active = int(mask.nonzero().min())
    for block in range(BLOCKS):
        below, active = block < lowest_active, bool(mask[block])
        label = "w + e" if active and second else "g" if active else "no graph" if below else "passed through"
        dashed = below and second
        shape = FancyBboxPatch(
            (x, block + 0.13),
            WIDTH,
            0.74,
            boxstyle="round,pad=0,rounding_size=0.16",
            fc=ACTIVE if active else PAPER if dashed or not below else "#e9ecef",
            ec=SOFT if dashed else INK,
            lw=1,
            ls="--" if dashed else "-",
        )
        axes.add_patch(shape)
        weight = "bold" if active else "normal"
        colour = SOFT if dashed else INK
        text(axes, x + WIDTH / 2, block + 0.48, "not run" if dashed else label, 8.5, color=colour, weight=weight)
    arrow(axes, (x - 0.2, lowest_active + 0.1 if second else 0.1), (x - 0.2, BLOCKS), FORWARD)
    arrow(axes, (x + WIDTH + 0.2, BLOCKS), (x + WIDTH + 0.2, lowest_active + 0.05), BACKWARD)


def draw_between(axes: Axes, lowest_active: int) -> None:
    """Draw what goes from pass to pass, to the optimizer and back to the bandit."""
    for x, title, note in (
        (FIRST, "1  ascent pass, at w", "backward stops at the lowest active block"),
        (SECOND, "2  descent pass, at w + e", "starts at the lowest active block"),
    ):
        text(axes, x + WIDTH / 2, BLOCKS + 1.25, title, 11, weight="bold")
        text(axes, x + WIDTH / 2, BLOCKS + 0.6, note, 8)
    end = SECOND + WIDTH + 0.45
    axes.plot(
        [SHOWN * 0.55 + 0.55, end],
        [lowest_active, lowest_active],
        color=BACKWARD,
        lw=1.2,
        ls=(0, (5, 3)),
        zorder=0,
    )
    text(axes, (STEPS * 0.55 + FIRST - 0.2) / 2, lowest_active + 0.7, "lowest\nactive\nblock", 8, color=BACKWARD)
    left, right = FIRST + WIDTH + 0.2, SECOND - 0.2
    text(axes, (left + right) / 2, BLOCKS - 1.1, "e = ρ g / ‖g‖", 9.5)
    arrow(axes, (left + 0.15, BLOCKS - 1.6), (right - 0.15, BLOCKS - 1.6))
    arrow(axes, (left - 0.15, lowest_active - 0.05), (right, lowest_active + 0.12), FORWARD, bend=0.35)
    text(axes, (left + right) / 2, lowest_active - 1.0, "kept\nhidden\nstate", 8, color=FORWARD, va="top")
    arrow(axes, (end + 0.05, BLOCKS - 1.6), (end + 0.75, BLOCKS - 1.6))
    text(
        axes, end + 0.85, BLOCKS - 1.6, "g′ to the base\noptimizer, which\nsteps on the\nactive blocks", 8.5, ha="left"
    )
    bottom = -1.15
    axes.plot([FIRST + WIDTH / 2] * 2, [-0.1, bottom], color=INK, lw=1.6)
    axes.plot([FIRST + WIDTH / 2, (SHOWN + 1.5) * 0.55], [bottom, bottom], color=INK, lw=1.6)
    arrow(axes, ((SHOWN + 1.5) * 0.55, bottom), ((SHOWN + 1.5) * 0.55, -0.1))
    text(
        axes,
        (FIRST + WIDTH / 2 + (SHOWN + 1.5) * 0.55) / 2,
        bottom - 0.35,
        "norms of g, by block: the bandit learns p",
        8.5,
    )


def draw_legend(axes: Axes) -> None:
    """Explain the marks."""
    y = -2.35
    for i in range(24):
        axes.add_patch(Rectangle((0.05 * i, y - 0.2), 0.06, 0.4, fc=PROBABILITY(0.05 + 0.7 * i / 23), lw=0))
    text(axes, 1.35, y, f"probability p, 0 to {DARKEST}", 8, ha="left")
    axes.add_patch(Rectangle((4.35, y - 0.2), 0.3, 0.4, fc=ACTIVE, ec=INK, lw=0.8))
    text(axes, 4.8, y, "active: perturbed and trained", 8, ha="left")
    for x, colour, label in ((9.0, FORWARD, "forward"), (10.9, BACKWARD, "backward")):
        axes.plot([x, x + 0.5], [y, y], color=colour, lw=2)
        text(axes, x + 0.65, y, label, 8, ha="left")


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the picture into the file named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="SVG or PNG file")
    output = parser.parse_args(argv).output
    probabilities, masks = draws()
    with matplotlib.rc_context({"svg.hashsalt": "slsam", "font.family": "DejaVu Sans", "svg.fonttype": "path"}):
        figure = Figure(figsize=(12, 6.2), facecolor=PAPER)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(-1.5, 18.9), ylim=(-2.8, BLOCKS + 1.8))
        axes.axis("off")
        draw_steps(axes, probabilities, masks)
        draw_pass(axes, FIRST, masks[SHOWN], second=False)
        draw_pass(axes, SECOND, masks[SHOWN], second=True)
        draw_between(axes, int(masks[SHOWN].nonzero().min()))
        draw_legend(axes)
        figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None, dpi=150)


if __name__ == "__main__":
    main()
