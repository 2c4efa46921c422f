"""What somebody should know beside the advice of a comparison on their own data, as sentences. Imports no torch."""

from collections.abc import Sequence

from slsam_peft.runs.compare.grid import SPACING
from slsam_peft.runs.compare.own_methods import AUTO, FEWER, PLAIN, short, title
from slsam_peft.runs.compare.report import Line
from slsam_peft.runs.compare.settings import CompareSettings
from slsam_peft.runs.compare.statistics import CONFIDENCE
from slsam_peft.runs.compare.verdict import Verdict, how_sure


def notes_of(line: Line, lines: Sequence[Line], direct: Verdict | None, settings: CompareSettings) -> list[str]:
    """Return the sentences.

    Args:
        line (`Line`): Of the method that is advised.
        lines (`Sequence[Line]`): Of all methods.
        direct (`Verdict`, *optional*): Whether SL-SAM or fewer steps are to be preferred, where the advice does not
            say it.
        settings (`CompareSettings`): The comparison.
    """
    by_method = {of.method: of for of in lines}
    plain, auto = by_method[PLAIN], by_method[AUTO]
    notes = []
    if auto.cost is not None and plain.cost is not None:
        notes.append(f"A step of SL-SAM costs {auto.cost / plain.cost:.2f} plain ones, by count.")
    if direct is not None:
        notes += _beside(direct, next(name for name in by_method if name in FEWER), settings)
    notes += _corrected(line, len(lines) - 1)
    notes += _diverged(lines)
    notes += [_at_edge(of) for of in lines if of.edge is not None]
    if line is auto and len(lines) == 2:
        notes.append(
            "Fewer steps of plain LoRA at a larger rate were not tried; where rows are repeated they often lower the "
            "loss as much, and cost less."
        )
    if line.method in FEWER:
        notes.append(
            "A larger rate can cost the model what it knows beside your rows, as it did on the tweets of "
            "recipes/compare; held-out rows of these data do not show it."
        )
    notes.append(
        "The interval says how much trainings differ from seed to seed on the same held-out rows; it says nothing of "
        "other rows."
    )
    return notes


def _beside(direct: Verdict, fewer: str, settings: CompareSettings) -> list[str]:
    """Return what SL-SAM and fewer steps differ by."""
    if direct.difference is None:
        return []
    differ = (
        f"SL-SAM minus {short(fewer)}: {direct.difference.mean:+.4f} nats, {how_sure(direct.difference, settings)}."
    )
    return [f"{differ} These runs cannot tell the two apart, and fewer steps cost less." if direct.is_open else differ]


def _corrected(line: Line, others: int) -> list[str]:
    """Return the corrected p-value of what is advised, where several methods had a chance and it is no longer sure."""
    p = line.corrected.get("loss")
    if p is None or others == 1 or not p >= 1 - CONFIDENCE or line.differences["loss"].p >= 1 - CONFIDENCE:
        return []
    return [f"{others} methods had the chance to be ahead of plain LoRA: corrected for that (Holm), p is {p:.2g}."]


def _diverged(lines: Sequence[Line]) -> list[str]:
    if not any(line.failures for line in lines):
        return []
    runs = ", ".join(
        f"{len(of.failures)} of {len(of.done)} with {short(of.method)}"
        if of.method in FEWER
        else f"{len(of.failures)} of {short(of.method)}'s {len(of.done)}"
        for of in lines
    )
    return [f"Runs that diverged: {runs}; the losses are those of the others."]


def _at_edge(line: Line) -> str:
    assert line.chosen is not None
    begin = f"The learning rate of {title(line.method)} is the {line.edge} of those tried; a further one may be better"
    if line.method in FEWER:
        return f"{begin}. Its rates lie around four times --learning_rate."
    flag = "learning_rate" if line.method == PLAIN else "slsam_learning_rate"
    further = f"{line.chosen.rate * (SPACING if line.edge == 'largest' else 1 / SPACING):.2g}"
    return f"{begin}: --{flag} {further}."
