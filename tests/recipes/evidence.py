"""The numbers on recipes/compare/README.md, held against the rows beside it."""

import math
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from slsam_peft.runs.compare.methods import slsam_config
from slsam_peft.runs.compare.metrics import METRICS
from slsam_peft.runs.compare.reading import read_settings
from slsam_peft.runs.compare.recorded import RecordedPlan
from slsam_peft.runs.compare.report import Line, build_report
from slsam_peft.runs.compare.settings import CompareSettings
from slsam_peft.runs.compare.statistics import Difference, paired_difference
from slsam_peft.runs.compare.store import Row, RowStore
from tests.recipes.sets import FRESH, GROUPS

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "compare"

# Numbers that are no results of runs: the level of the intervals and how often they cover the mean, which a test in
# tests/unit/test_compare.py simulates, and what others have published.
ELSEWHERE = {"83 %", "70 %", "95 %", "+0.1", "2508.19564", "2602.09395"}

DEFAULTS = ("auto", "auto, default rise of the loss", "auto at 5e-4")  # what the default is called in comparisons

SHARES = ("exact", "attack_success")  # metrics that the text may state in percent

# Whose seeds are counted where the text says "... N of M seeds": comparison, task, the method with the lower loss, the
# other one.
FEWER = "partial ascent, one sequence fewer"
SEED_CLAIMS = {
    "is ahead in": [
        ("docs", "docs-small-label-noise", FEWER, "plain"),
        ("epochs", "sums-64-label-noise", FEWER, "plain"),
    ],
    "The default has the lower loss in": [
        ("auto_batch16", "sums-64-label-noise", "auto", "plain, half of the steps"),
    ],
    "lowers the loss in": [("sequences", "sequences-small-clean", "partial ascent, all blocks", "plain")],
    "Fewer steps beat it in": [("epochs", "sums-64-label-noise", "plain, fewer steps (control)", FEWER)],
}

SLOW = 1.25e-4  # a learning rate

POOLED = [(method, fewer) for method in ("auto", "auto at plain LoRA's rate") for fewer in (False, True)]
POOLED_SEED_CLAIMS = {
    "the loss is lower than plain LoRA's in": ("auto at plain LoRA's rate", False),
}

TABLE = re.compile(r"^\| method \|.*\n\|[-|]+\n((?:\|.*\n)+)", re.MULTILINE)
NO_PROSE = re.compile(r"```.*?^```|<details>.*?</details>|`[^`]*`|\]\([^)]*\)|!\[[^\]]*\]", re.DOTALL | re.MULTILINE)
TRIPLE = re.compile(r"([+-]\d\.\d+)\s+\[([+-]\d\.\d+),\s+([+-]\d\.\d+)\]")
SEEDS = re.compile(r"(\d+)\s+of\s+(\d+)\s+(?:seeds|draws)")
SIZE = r"(?:\s+with\s+a\s+(rise|radius)\s+of\s+(\d\.\d+))?"
TRIED = re.compile(rf"(\d\.\d+)(?:\s+\((\d+) %\))?{SIZE}\s+at\s+(\d(?:\.\d+)?e-\d)")
NUMBER = re.compile(r"(?<![\w.])[+-]?\d+\.\d+(?![\w])|(?<![\w./])\d{2,}(?:\s+%)?(?![\w./]\d|\w)")
CELL = re.compile(r"(\d\.\d+)(?: \((\d+) %\))?(?:, p ([\d.e-]+))?")


@dataclass(frozen=True)
class Comparison:
    """A YAML file, the rows beside it, and what they say; also of the default against each of the others."""

    settings: CompareSettings
    rows: dict[str, Row]
    lines: list[Line]
    beside_default: dict[str, list[Line]]  # by what the default is called


@cache
def comparison(name: str) -> Comparison:
    """Read a comparison by the name of its YAML file, without the suffix."""
    settings = read_settings(FOLDER / f"{name}.yaml")
    rows = RowStore(FOLDER / "rows" / f"{name}.jsonl").read()
    by_reference = {
        name: build_report(RecordedPlan(replace(settings, reference=name, primary=None), rows), rows)
        for name in DEFAULTS
        if name in settings.methods
    }
    return Comparison(settings, rows, build_report(RecordedPlan(settings, rows), rows), by_reference)


def mismatches(page: str) -> list[str]:
    """Return the numbers that a page has and the rows do not, each with its line."""
    return [problem for _, problem in sorted((*_tables(page), *_prose(page)))]


def numbers(page: str) -> list[tuple[int, int]]:
    """Return where the numbers are that belong to a difference or to a table: start and end of each."""
    text = NO_PROSE.sub(lambda match: " " * len(match[0]), page)
    spans = [match.span(group) for match in TRIPLE.finditer(text) for group in (1, 2, 3)]
    for table in TABLE.finditer(page):
        for cell in CELL.finditer(page, table.start(1), table.end(1)):
            if page[: cell.start()].endswith("| ") and page[cell.end() :].startswith(" |") and cell[2]:
                spans += [cell.span(group) for group in (1, 2, 3) if cell[group]]
    return spans


def _line_number(page: str, at: int) -> str:
    return f"line {page.count(chr(10), 0, at) + 1}"


def _comparisons(page: str, at: int) -> list[Comparison]:
    """Return the comparisons that the section around a place is about: those it links to; at the top, all of them."""
    start = page.rfind("\n## ", 0, at)
    if start < 0:
        return [comparison(path.stem) for path in sorted(FOLDER.glob("*.yaml"))]
    end = page.find("\n## ", at)
    names = re.findall(r"\]\((\w+)\.yaml\)", page[start : end if end >= 0 else len(page)])
    return [comparison(name) for name in dict.fromkeys(names)]


def _same(shown: str, value: float) -> bool:
    """Whether a number is shown as it is, to the digits it has."""
    number = shown.removesuffix("%").strip()
    digits = len(number.partition("e")[0].partition(".")[2])
    exponent = int(number.partition("e")[2] or 0)
    return math.isfinite(value) and abs(float(number) - value) <= 0.5 * 10 ** (exponent - digits) + 1e-9 * abs(value)


def _tables(page: str) -> Iterator[tuple[int, str]]:
    """Yield the cells of the folded tables that differ from the rows."""
    for table in TABLE.finditer(page):
        heading = [cell.strip() for cell in table[0].splitlines()[0].strip("|").split("|")]
        name = re.findall(r"\]\((\w+)\.yaml\)", page[: table.start()])[-1]
        source, at = comparison(name), table.start(1)
        shown_methods = []
        for text in table[1].splitlines(keepends=True):
            where = _line_number(page, at)
            at += len(text)
            method, chosen, *cells = (cell.strip() for cell in text.strip().strip("|").split("|"))
            shown_methods.append(method)
            for task, cell in zip(heading[2:], cells, strict=True):
                line = next((x for x in source.lines if (x.task, x.method) == (task, method)), None)
                match = CELL.fullmatch(cell)
                if line is None or line.chosen is None or match is None:
                    yield at, f"{where}: {cell!r} of {method} on {task} cannot be checked"
                    continue
                right = _same(match[1], line.mean("loss") or math.nan)
                right &= match[2] is None or _same(match[2], 100 * (line.mean("exact") or 0.0))
                right &= (match[3] is not None) == ("loss" in line.corrected)
                right &= match[3] is None or match[3] == format(line.corrected["loss"], ".2g")
                right &= chosen in (line.chosen.shown, line.chosen.shown.replace("rho ", ""))
                if not right:
                    yield at, f"{where}: {cell!r} of {method} on {task} is not what the rows say: {line}"
        if sorted(shown_methods) != sorted(source.settings.methods):
            yield table.start(), f"{_line_number(page, table.start())}: the table of {name} has other methods"


def _prose(page: str) -> Iterator[tuple[int, str]]:
    """Yield the numbers of the running text that no row gives."""
    text = NO_PROSE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), page)

    def taken(pattern: re.Pattern[str]) -> Iterator[tuple[re.Match[str], list[Comparison], str]]:
        nonlocal text
        for match in list(pattern.finditer(text)):
            text = text[: match.start()] + re.sub(r"[^\n]", " ", match[0]) + text[match.end() :]
            yield match, _comparisons(page, match.start()), _line_number(page, match.start())

    for match, sources, where in taken(TRIPLE):
        beside = (line for source in sources for lines in source.beside_default.values() for line in lines)
        known = [] if "\n## " in page[: match.start()] else [(d.mean, d.low, d.high) for d in _pooled_differences()]
        known += [(d.mean, d.low, d.high) for d in _differences(line for source in sources for line in source.lines)]
        known += [(-d.mean, -d.high, -d.low) for d in _differences(beside)]  # the default minus others
        if not any(all(_same(shown, value) for shown, value in zip(match.groups(), of, strict=True)) for of in known):
            yield match.start(), f"{where}: no method differs by {' '.join(match[0].split())}"
    for match, _, where in taken(SEEDS):
        before = " ".join(page[: match.start()].split())
        counts = [_seeds_ahead(*one) for phrase, of in SEED_CLAIMS.items() if before.endswith(phrase) for one in of]
        counts += [_pooled_ahead(*of) for phrase, of in POOLED_SEED_CLAIMS.items() if before.endswith(phrase)]
        if not counts or any((int(match[1]), int(match[2])) != count for count in counts):
            yield match.start(), f"{where}: {match[0]} is not what the rows say"
    for match, sources, where in taken(TRIED):
        loss, exact, kind, size, rate = match.groups()
        tried = [row for source in sources for row in _tried(source, float(rate), kind, float(size or 0.0))]
        if not any(_same(loss, row["loss"]) and (not exact or _same(exact, 100 * row["exact"])) for row in tried):
            yield match.start(), f"{where}: nothing was tried with {' '.join(match[0].split())}"
    for match, sources, where in taken(NUMBER):
        shown = " ".join(match[0].split())
        counts = [] if "\n## " in page[: match.start()] else [str(len(d.values)) for d in _pooled_differences()]
        if shown not in (*ELSEWHERE, *counts) and not any(_same(shown, value) for value in _values(sources, shown)):
            yield match.start(), f"{where}: {shown} is in no row"


def _differences(lines: Iterable[Line]) -> Iterator[Difference]:
    for line in lines:
        yield from line.differences.values()


@cache
def pooled(
    method: str, fewer: bool, metric: str, by_source: bool = False, group: str = "", quick: bool = False
) -> Difference | None:
    """Compare the default with plain LoRA, or plain LoRA with fewer steps, on all fresh sets of the first model.

    Sets of one source on one seed are made of the same rows, so that their mean is one observation.

    Args:
        method (`str`): What the default is called.
        fewer (`bool`): Whether the other one has fewer steps.
        metric (`str`): The score.
        by_source (`bool`, *optional*, defaults to `False`): Let each source's mean be one observation, which says
            more of other rows.
        group (`str`, *optional*): One of `GROUPS`, for its sources alone.
        quick (`bool`, *optional*, defaults to `False`): Leave out the sets on which the rate that is best for plain
            LoRA's loss is `SLOW` or less.

    Returns:
        `Difference`: Or `None` where nothing was run.
    """
    found: dict[Any, list[float]] = {}
    for task in FRESH:
        source = comparison(task.comparison)
        lines = {line.method: line for line in source.lines if line.task == task.task}
        slow = lines["plain"].chosen is None or lines["plain"].chosen.rate <= SLOW
        if quick and slow or group and source.settings.tasks[task.task].source not in GROUPS[group]:
            continue
        others = lines[task.fewer if fewer else "plain"].scores.get(metric, {})
        scores = lines[method].scores.get(metric, {}) if method in lines and source.settings.model == "smollm2" else {}
        for seed in scores.keys() & others.keys():
            found.setdefault((source.settings.tasks[task.task].source, seed), []).append(scores[seed] - others[seed])
    of_draws = {at: _mean(values) for at, values in found.items()}
    if by_source:
        sources = {source for source, _ in of_draws}
        of_draws = {s: _mean([value for at, value in of_draws.items() if at[0] == s]) for s in sources}
    return paired_difference(of_draws, dict.fromkeys(of_draws, 0.0))


def _pooled_differences() -> Iterator[Difference]:
    options: list[dict[str, Any]] = [{"by_source": True}]
    options += [{"group": group, "quick": quick} for group in ("", *GROUPS) for quick in (False, True)]
    for method, fewer in POOLED:
        for metric in ("loss", "exact", "forgetting"):
            found = (pooled(method, fewer, metric, **option) for option in options)
            yield from (difference for difference in found if difference is not None)


def _pooled_ahead(method: str, fewer: bool) -> tuple[int, int]:
    """Return on how many of the pooled draws of rows the loss is lower, and of how many."""
    difference = pooled(method, fewer, "loss")
    assert difference is not None
    values = difference.values
    return sum(value < 0 for value in values.values()), len(values)


def _mean(scores: Collection[float]) -> float:
    return sum(scores) / len(scores)


def _seeds_ahead(name: str, task: str, method: str, other: str) -> tuple[int, int]:
    """Return in how many seeds a method has a lower loss than another one, and of how many."""
    ours, theirs = (
        line.scores["loss"]
        for chosen in (method, other)
        for line in comparison(name).lines
        if (line.task, line.method) == (task, chosen)
    )
    shared = ours.keys() & theirs.keys()
    return sum(ours[seed] < theirs[seed] for seed in shared), len(shared)


def _tried(source: Comparison, rate: float, kind: str | None, size: float) -> list[Row]:
    """Return the validation runs at a learning rate: those with that rise or radius, or plain ones."""

    def is_meant(row: Row) -> bool:
        slsam = row["settings"]["slsam"]
        if kind is None or slsam is None:
            return kind is None and slsam is None
        resolved = slsam_config(slsam).resolved
        return (resolved.loss_rise if kind == "rise" else resolved.rho) == size

    runs = [row for row in source.rows.values() if row["settings"]["split"] == "validation"]
    return [row for row in runs if row["settings"]["learning_rate"] == rate and is_meant(row)]


def _values(sources: list[Comparison], shown: str) -> Iterator[float]:
    """Yield what a number in the text can be: of a line, or of the settings for whole ones."""
    for source in sources:
        if "." not in shown and not shown.endswith("%"):
            training = source.settings.training
            yield from (training.steps, training.batch_size, *(task.rows for task in source.settings.tasks.values()))
            yield from (line.steps for line in source.lines if line.steps is not None)
            continue
        for line in source.lines:
            if shown.endswith("%"):
                shares = [line.mean(metric) for metric in SHARES]
                shares += [_mean(of.values()) for metric in SHARES if (of := line.before.get(metric))]
                yield from (100 * value for value in shares if value is not None)
                continue
            yield from (value for value in (line.cost, line.total_cost) if value is not None)
            yield from (value for metric in METRICS for value in (line.mean(metric),) if value is not None)
            yield from (_mean(of.values()) for of in line.before.values() if of)
            yield from line.corrected.values()
            if shown[0] in "+-":
                yield from (difference.mean for difference in line.differences.values())
            yield max(line.scores["loss"].values(), default=math.nan)  # of the seed that went worst
