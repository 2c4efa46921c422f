# python recipes/draw_method.py .assets/method.svg
"""Draw one SL-SAM update: which blocks run in which pass, where the floor cuts, what is kept."""

import argparse

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch  # noqa: E402

BLOCKS, FLOOR = 8, 5
ACTIVE = {5, 6, 7}
INK, SOFT, COLD, WARM, HOT = "#24292f", "#8b949e", "#dfe5ec", "#9ecae1", "#f4a261"
PASSES = (
    (2.0, "ascent pass at w", "runs every block once,\nbackpropagates to the floor"),
    (5.6, "descent pass at w + e", "starts at the floor from the\nkept hidden state"),
)


def box(axes, x, y, width, colour, text="", edge=INK, style="solid", size=8.5):
    """Draw one block."""
    shape = FancyBboxPatch(
        (x, y), width, 0.62, boxstyle="round,pad=0.02,rounding_size=0.1", fc=colour, ec=edge, lw=1, ls=style
    )
    axes.add_patch(shape)
    axes.text(x + width / 2, y + 0.31, text, ha="center", va="center", fontsize=size, color=INK)


def arrow(axes, start, end, colour=INK, style="-|>", bend=0.0, width=1.4):
    """Draw one arrow."""
    line = FancyArrowPatch(
        start, end, arrowstyle=style, mutation_scale=11, lw=width, color=colour, connectionstyle=f"arc3,rad={bend}"
    )
    axes.add_patch(line)


def draw_pass(axes, number, x, title, note):
    """Draw the stack of blocks in one pass."""
    axes.text(x + 0.8, 9.95, title, ha="center", fontsize=10.5, weight="bold", color=INK)
    axes.text(x + 0.8, 9.4, note, ha="center", va="center", fontsize=8, color=INK)
    for block in range(BLOCKS):
        y = 0.9 + block * 0.92
        if block in ACTIVE:
            text = f"block {block}  + e" if number else f"block {block}"
            box(axes, x, y, 1.6, HOT, text)
        elif number:
            box(axes, x, y, 1.6, "white", f"block {block}: not run", edge=SOFT, style="dashed", size=7.5)
        else:
            box(axes, x, y, 1.6, COLD, f"block {block}: no graph", size=7.5)
    low, high = 0.9 + FLOOR * 0.92, 0.9 + BLOCKS * 0.92 - 0.3
    bottom = low if number else 0.9
    arrow(axes, (x - 0.18, bottom), (x - 0.18, high), colour="#2a6f97")
    arrow(axes, (x + 1.78, high), (x + 1.78, low), colour="#bc4749")


def main() -> None:
    """Draw the picture into the file named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", help="SVG or PNG file")
    output = parser.parse_args().output
    plt.rcParams.update({"svg.hashsalt": "slsam", "font.family": "DejaVu Sans", "svg.fonttype": "path"})
    figure, axes = plt.subplots(figsize=(9.4, 5.6))
    figure.patch.set_facecolor("white")
    for number, (x, title, note) in enumerate(PASSES):
        draw_pass(axes, number, x, title, note)
    floor = 0.9 + FLOOR * 0.92 - 0.15
    axes.plot([1.55, 7.65], [floor, floor], color="#bc4749", lw=1.1, ls=(0, (4, 3)))
    axes.text(1.45, floor, "floor", ha="right", va="center", fontsize=9, color="#bc4749")
    arrow(axes, (3.62, floor + 0.06), (5.5, floor + 0.45), colour="#2a6f97", bend=-0.15)
    axes.text(4.55, floor + 0.62, "hidden state", ha="center", fontsize=8, color="#2a6f97")
    box(axes, -0.75, 7.3, 1.75, WARM, "bandit: probabilities p", size=7.8)
    box(axes, -0.75, 5.9, 1.75, WARM, "design: active set", size=7.8)
    arrow(axes, (0.12, 7.28), (0.12, 6.56))
    arrow(axes, (1.03, 6.2), (1.6, 6.2))
    box(axes, 8.1, 5.9, 1.75, WARM, "base optimizer: w", size=7.8)
    arrow(axes, (7.5, 6.2), (8.06, 6.2))
    axes.text(7.78, 6.42, "g'", ha="center", fontsize=9, color=INK)
    arrow(axes, (3.3, 8.5), (5.9, 8.5), bend=-0.12)
    axes.text(4.6, 8.92, "e = ρ g / |g|", ha="center", fontsize=9, color=INK)
    arrow(axes, (2.3, 8.55), (0.6, 7.98), bend=0.25)
    axes.text(0.55, 8.5, "norms per arm", ha="center", fontsize=8, color=INK)
    axes.plot([], [], color="#2a6f97", label="forward")
    axes.plot([], [], color="#bc4749", label="backward")
    axes.legend(loc="lower left", fontsize=8, frameon=False, bbox_to_anchor=(0.0, 0.02))
    axes.set_xlim(-0.9, 10)
    axes.set_ylim(0.5, 10.4)
    axes.axis("off")
    figure.savefig(output, bbox_inches="tight", metadata={"Date": None} if output.endswith(".svg") else None, dpi=150)


if __name__ == "__main__":
    main()
