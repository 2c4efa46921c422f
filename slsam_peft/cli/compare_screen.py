"""What is compared on one's own data is shown before it begins: rows, model, methods and how many runs there are."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slsam_peft.runs.compare.wishes import Wishes

if TYPE_CHECKING:
    from slsam_peft.runs.compare.own_data import OwnComparison
    from slsam_peft.runs.compare.settings import CompareSettings

LABEL = 14  # characters of a label: "plain, a third" and "of the steps" are two lines of one


def show(made: "OwnComparison", wishes: Wishes, console: Any) -> None:
    """Show a comparison before it begins.

    Args:
        made (`OwnComparison`): It.
        wishes (`Wishes`): What was asked for.
        console (`rich.console.Console`): Where to show it.
    """
    settings, split = made.settings, made.split
    training, rows = settings.training, len(split.train)
    [task] = settings.tasks.values()
    held = wishes.eval_data or task.test_file
    where = f"of {held}" if held else "chosen by a hash of the question"
    bits = ", linear layers in 4-bit NF4" if training.quantize == "nf4" else ""
    epochs = training.steps * training.batch_size / rows
    lines = [
        ("Data", f"{rows} rows of {wishes.data} to train on"),
        (
            "Held out",
            f"{len(split.validation)} rows to choose learning rates by and {len(split.test)} to test on, {where}",
        ),
        (
            "Model",
            f"{settings.model}{bits}, computing in {training.dtype}; LoRA r={training.lora_r} on all linear layers",
        ),
        (
            "Training",
            f"{training.steps} steps of {training.batch_size} sequences of at most {training.max_length} tokens: "
            f"{'one epoch' if epochs == 1 else f'{epochs:.3g} epochs'}, counting "
            f"{'every token of a row' if split.whole else 'the tokens of answers'}",
        ),
        *((name, _method(settings, name)) for name in settings.methods),
        ("Runs", _runs(settings)),
    ]
    grid(lines, console)
    for sentence in made.said:
        console.print(sentence, markup=False, highlight=False)


def _method(settings: "CompareSettings", name: str) -> str:
    """Return what a method tries, and its steps where they are fewer."""
    from slsam_peft.runs.compare.jobs import Plan

    [task], [match], how = settings.tasks, settings.match, settings.methods[name]
    fewer = "" if how.steps_share == 1 else f", {Plan(settings, {}).steps(task, name, match)} steps"
    return f"learning rate {_listed(how.learning_rates)}{fewer}"


def _runs(settings: "CompareSettings") -> str:
    methods = len(settings.methods)
    tuning = sum(len(how.candidates) for how in settings.methods.values() if len(how.candidates) > 1)
    first = f"{tuning} to choose learning rates, then " if tuning else ""
    of = "both methods" if methods == 2 else f"all {methods} methods"
    return f"{tuning + methods * len(settings.seeds)}: {first}{len(settings.seeds)} seeds of {of}"


def _listed(rates: Sequence[float]) -> str:
    *others, last = [f"{rate:g}" for rate in rates]
    return f"{', '.join(others)} or {last}" if others else last


def grid(lines: Sequence[tuple[str, str]], console: Any) -> None:
    """Show lines, each with a label.

    Args:
        lines (`Sequence[tuple[str, str]]`): Label and text of each.
        console (`rich.console.Console`): Where to show them.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    # Several such tables follow one another, and some methods have long names.
    table.add_column(style="bold", min_width=LABEL, max_width=LABEL)
    table.add_column(overflow="fold")
    for name, value in lines:
        table.add_row(Text(name), Text(value))
    console.print(table)
