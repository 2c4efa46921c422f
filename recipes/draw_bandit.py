# python recipes/draw_bandit.py .assets/bandit.svg
"""Draw what the bandits learn: arms with norms 1 to L at three scales, 2,000 steps of each rule."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure

from slsam_peft import SLSAMConfig
from slsam_peft.algorithm.bandit import Bandit
from slsam_peft.algorithm.sampling import Bernoulli

ARMS, FRACTION, STEPS = 20, 0.2, 2_000
SCALES = (0.05, 1.0, 20.0)
LAST = 500  # steps that the probabilities are a mean over
SEED = 0

# Line and marker tell the rules apart without colour.
RULES = {
    "scale_free": {"color": "#1c7ed6", "marker": "o", "ls": "-", "label": 'bandit="scale_free"'},
    "paper": {"color": "#e8590c", "marker": "s", "ls": "--", "mfc": "white", "label": 'bandit="paper"'},
}


def learned(rule: str, scale: float) -> torch.Tensor:
    """Return the probabilities after training on norms scale * (1, ..., L) / L, a mean over the last 500 steps."""
    bandit = Bandit(ARMS, FRACTION * ARMS, SLSAMConfig(bandit=rule, active_fraction=FRACTION))
    scheme, generator = Bernoulli(), torch.Generator().manual_seed(SEED)
    norms = scale * torch.arange(1, ARMS + 1, dtype=torch.float64) / ARMS
    total = torch.zeros(ARMS, dtype=torch.float64)
    for step in range(STEPS):
        mask = scheme(bandit.probabilities, generator)
        bandit.update(mask, norms, scheme.inclusion(bandit.probabilities))
        if step >= STEPS - LAST:
            total += bandit.probabilities
    return total / LAST


def draw() -> Figure:
    """Return the figure: one panel per scale."""
    figure = Figure(figsize=(9, 3.1), layout="constrained")
    arms = torch.arange(1, ARMS + 1)
    ideal = FRACTION * ARMS * arms / arms.sum()
    all_axes = figure.subplots(1, len(SCALES), sharey=True)
    for axes, scale in zip(all_axes, SCALES, strict=True):
        axes.plot(arms, ideal, color="#868e96", lw=4, alpha=0.45, label="in proportion to the norms")
        for rule, style in RULES.items():
            axes.plot(arms, learned(rule, scale), ms=4, lw=1.3, **style)
        axes.set_title(f"norms {scale / ARMS:g} to {scale:g}", fontsize=10)
        axes.set_xlabel("arm, in order of its norm")
        axes.set_xticks([1, 5, 10, 15, 20])
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].set_ylabel("inclusion probability")
    all_axes[0].legend(fontsize=8, frameon=False, loc="upper left")
    figure.suptitle(f"What {STEPS:,} steps teach the bandit ({ARMS} arms, active_fraction={FRACTION})", fontsize=11)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="SVG or PNG file")
    output: Path = parser.parse_args(argv).output
    with matplotlib.rc_context({"svg.hashsalt": "slsam", "font.family": "DejaVu Sans", "svg.fonttype": "path"}):
        draw().savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None, dpi=150)


if __name__ == "__main__":
    main()
