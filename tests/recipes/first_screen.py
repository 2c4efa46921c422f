"""The tables at the top of recipes/compare/README.md, as the rows make them."""

import math
from dataclasses import replace
from typing import Any

from slsam_peft.runs.compare.report import Line
from slsam_peft.runs.compare.statistics import Difference
from tests.recipes import evidence
from tests.recipes.sets import DROP_IN, FRESH, GROUPS, HALF, SEEN, THIRD, Task

HEADING = (
    "| rows | seeds | plain LoRA | default | default at plain LoRA's rate | plain LoRA, fewer steps | shown ahead |",
    "|---|---|---|---|---|---|---|",
)


MUCH = 0.1  # nats of other text
QUICK = f"where plain LoRA's rate is above {evidence.SLOW * 1e4:g}e-4"


def task_table(tasks: list[Task]) -> str:
    """Return the lines of tasks, those on which no form of the default is ahead first."""
    lines = [_task_line(task) for task in tasks]
    return "\n".join([*HEADING, *(text for _, text in sorted(lines, key=lambda line: line[0]))])


def _task_line(task: Task) -> tuple[bool, str]:
    """Return whether a form of the default is ahead, and the line."""
    lines = {line.method: line for line in evidence.comparison(task.comparison).lines if line.task == task.task}
    columns = {"default": task.default, "default at plain LoRA's rate": task.drop_in, "fewer steps": task.fewer}
    run = {words: lines[name] for words, name in columns.items() if name and lines[name].scores.get("loss")}
    cells = [_cell(lines["plain"]), *(_cell(run[words]) if words in run else "" for words in columns)]
    ahead = {words: _forgets(line) for words, line in run.items() if _is_ahead(line)}
    seeds = len(lines["plain"].scores["loss"])
    shown = "; ".join(words + forgets for words, forgets in ahead.items()) or "none"
    return "default" in shown, f"| {task.words} | {seeds} | {' | '.join(cells)} | {shown} |"


def _cell(line: Line) -> str:
    """Return the loss and the share of exact answers: bold where ahead of plain LoRA, in italics where behind."""
    loss, exact = line.mean("loss"), line.mean("exact")
    assert loss is not None
    text = _marked(f"{loss:.2f}", line.differences.get("loss"), better=-1)
    if exact is None:
        return text
    return f"{text} ({_marked(f'{100 * exact:.0f} %', line.differences.get('exact'), better=1)})"


def _marked(text: str, difference: Difference | None, better: int) -> str:
    sign = 0 if difference is None else side(difference) * better
    return {1: f"**{text}**", 0: text, -1: f"*{text}*"}[sign]


def side(difference: Difference) -> int:
    """Return on which side of 0 an interval lies: 1, -1, or 0 where it holds it."""
    return (difference.low > 0) - (difference.high < 0)


def _is_ahead(line: Line) -> bool:
    """Whether the loss or the exact answers are ahead of plain LoRA's, and neither is behind."""
    sides = [-side(line.differences["loss"])]
    sides += [side(line.differences["exact"])] if "exact" in line.differences else []
    return max(sides) > 0 and min(sides) >= 0


def _forgets(line: Line) -> str:
    """Return by how much more than plain LoRA it forgets, where that is sure or much."""
    difference = line.differences.get("forgetting")
    if difference is None or difference.mean <= 0 or (side(difference) <= 0 and difference.mean < MUCH):
        return ""
    return f" (forgets {difference.mean:+.2f}{'' if side(difference) > 0 else ', unsure'})"


def pooled_table() -> str:
    """Return what the fresh seeds say together, and each kind of rows."""
    text = [
        "| the default | minus | on | draws of rows | held-out loss | exact answers | forgets |",
        "|---|---|---|---|---|---|---|",
    ]
    names = {"auto": "at a rate of its own", DROP_IN: "at plain LoRA's rate"}
    for method, fewer in evidence.POOLED:
        first = f"| {names[method]} | {'plain LoRA, fewer steps' if fewer else 'plain LoRA'} | "
        text.append(_pooled_line(f"{first}all", method, fewer))
        for group in GROUPS:
            text.append(_pooled_line(f"| | | {group}", method, fewer, group=group))
            if group == "tweets and reviews" and not fewer:
                text.append(_pooled_line(f"| | | of these, {QUICK}", method, fewer, group=group, quick=True))
        text.append(_pooled_line(f"| | | all, {QUICK}", method, fewer, quick=True))
    return "\n".join(filter(None, text))


def _pooled_line(words: str, method: str, fewer: bool, **options: Any) -> str:
    loss, exact, forgetting = (
        evidence.pooled(method, fewer, metric, **options) for metric in ("loss", "exact", "forgetting")
    )
    if loss is None or exact is None:
        return ""
    forgets = "" if forgetting is None else _triple(forgetting, -1)
    return f"{words} | {len(loss.values)} | {_triple(loss, -1)} | {_triple(exact, 1)} | {forgets} |"


def _triple(difference: Difference, better: int) -> str:
    return _marked(f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]", difference, better)


# The columns of the tables of the default minus all else, and where each lies; then the lines, and what they are
# called there.
COLUMNS = {
    "32 tweets": (("raters", "tweets_rivals", "tweets_forms"), "tweets-repeated"),
    "32 reviews": (("amazon",), "reviews-repeated"),
    "32 tweets in steps of sixteen": (("tweets_batch16",), "tweets-repeated"),
    "32 reviews in steps of sixteen": (("amazon_batch16",), "reviews-repeated"),
    "128 tweets": (("larger",), "tweets-128"),
    "128 reviews": (("larger",), "reviews-128"),
    "32 tweets, 4-bit base": (("nf4",), "tweets-repeated"),
    "32 reviews, 4-bit base": (("nf4",), "reviews-repeated"),
    "32 sums, a quarter wrong": (("fresh",), "sums-32-label-noise"),
    "32 sums, none wrong": (("fresh",), "sums-32-clean"),
    "64 sums in steps of sixteen": (("fresh_batch16",), "sums-64-label-noise"),
    "64 sums in steps of sixteen, other seeds": (("confirm_batch16",), "sums-64-label-noise"),
}
OTHERS = {
    "plain LoRA": ("plain",),
    "plain LoRA, fewer steps": (THIRD, HALF),
    "the default at plain LoRA's rate": (DROP_IN,),
    "the default with a rise of 1.0": ("auto, a rise of 1.0",),
    "SAMPa": ("SAMPa",),
    "SAMPa at plain LoRA's rate": ("SAMPa at plain LoRA's rate",),
    "the default, uniform draws": ("auto, uniform draws",),
    "the default, every block perturbed": ("auto, every block",),
    "the paper's rule": ("paper's rule",),
    "`depth` at plain LoRA's cost": ("depth at plain LoRA's cost",),
    "dense SAM, two passes": ("dense SAM, two passes",),
    "dense SAM, radius in the weights": ("radius of B A",),
    "dense SAM, ASAM's radius": ("ASAM",),
    "dense SAM, FT-SAM's radius": ("FT-SAM, radius by neuron",),
    "Flat-LoRA": ("Flat-LoRA",),
    "Bi-LoRA": ("Bi-LoRA",),
    "ZO-SAM": ("ZO-SAM",),
    "BAR": ("BAR",),
}


def table_beside_default(metric: str) -> str:
    """Return the default at a rate of its own minus every other method on each set, in `"loss"` or `"exact"`."""
    title = {"loss": "held-out loss", "exact": "exact answers"}[metric]
    text = [f"| {title}, the default minus | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for words, names in OTHERS.items():
        cells = [_beside_default(comparisons, task, names, metric) for comparisons, task in COLUMNS.values()]
        text.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(text)


def _beside_default(comparisons: tuple[str, ...], task: str, names: tuple[str, ...], metric: str) -> str:
    for name in comparisons:
        for line in evidence.comparison(name).beside_default.get("auto", []):
            difference = line.differences.get(metric)
            has_interval = difference is not None and not math.isnan(difference.low)
            if line.task == task and line.method in names and has_interval:
                return _triple(_turned(difference), -1 if metric == "loss" else 1)
    return ""


def _turned(difference: Difference) -> Difference:
    return replace(difference, mean=-difference.mean, low=-difference.high, high=-difference.low)


def tables() -> list[str]:
    """Return all of them."""
    return [task_table(FRESH), task_table(SEEN), pooled_table(), *map(table_beside_default, ("loss", "exact"))]
