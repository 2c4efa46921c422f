"""Prints what the quickstart shows in a terminal."""

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from slsam_peft.runs.quickstart import Contender, Outcome, QuickstartSettings


class TrainingProgress:
    """A progress bar with the loss and the share of perturbed blocks, fed with the trainer's logs.

    Args:
        console (`rich.console.Console`): Where to.
        name (`str`): What is being trained.
        total (`int`): Its steps.
    """

    def __init__(self, console: Console, name: str, total: int) -> None:
        self._bar = Progress(
            TextColumn(name, markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task("", start=False, total=total, note="")
        self._loss: float | None = None

    def __enter__(self) -> Self:
        self._bar.start()
        self._bar.start_task(self._task)  # time counts from here
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def update(self, step: int, logs: dict[str, float]) -> None:
        """Show `step` (from 1); the loss is a moving average over about ten steps."""
        self._loss = logs["loss"] if self._loss is None else 0.9 * self._loss + 0.1 * logs["loss"]
        note = f"loss {self._loss:.3f}"
        if "slsam/rho" in logs:  # not in a step without a perturbation
            note += f"  {logs['slsam/active_fraction']:.0%} of blocks perturbed"
        self._bar.update(self._task, completed=step, note=note)


class Screen:
    """Prints the quickstart's parts to a console.

    Args:
        console (`rich.console.Console`, *optional*): Where to; standard output where it is missing.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)

    @contextmanager
    def working(self, what: str) -> Iterator[Callable[[str], None]]:
        """Show a spinner with `what` while the body runs; yields a function that changes the text."""
        with self.console.status(Text(what + " ...")) as status:

            def say(text: str) -> None:
                if not self.console.is_terminal:  # no spinner there, but a log should tell of long waits
                    self.console.print(text, markup=False)
                status.update(Text(text + " ..."))

            yield say

    def progress(self, name: str, total: int) -> TrainingProgress:
        """Return the progress bar of a training of `total` steps."""
        return TrainingProgress(self.console, name, total)

    def settings(
        self, model: str, dtype: str, settings: "QuickstartSettings", contenders: "Sequence[Contender]"
    ) -> None:
        """Show what is going to be trained, on what, and how."""
        s = settings
        rows = [
            ("Model", f"{Path(model).name}, linear layers in 4-bit NF4, computing in {dtype}"),
            (
                "Data",
                f"{s.n_train} questions on Python's standard library, {s.wrong_answers} of the answers swapped; "
                f"{s.n_test} held out",
            ),
            ("LoRA", f"r={s.lora_r} on all linear layers"),
            ("Training", f"{s.epochs} epochs, {s.steps} steps of {s.batch_size} sequences, the same for both"),
        ]
        self._rows(*rows, *((c.name, _method(c)) for c in contenders))

    def outcomes(
        self, settings: "QuickstartSettings", contenders: "Sequence[Contender]", outcomes: "Sequence[Outcome]"
    ) -> None:
        """Show the trainings side by side.

        Args:
            settings (`QuickstartSettings`): What they share.
            contenders (`Sequence[Contender]`): Plain LoRA first.
            outcomes (`Sequence[Outcome]`): What was there before training, then what came of each contender.
        """
        # A column each; times are compared with plain LoRA's.
        before, plain, *_ = outcomes
        sequences = min(settings.batch_size, settings.n_train)
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
        table.add_column("", style="bold", no_wrap=True)
        for name in ("Before", *(c.name for c in contenders)):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_row("Held-out loss (nats)", *(f"{o.loss:.3f}" for o in outcomes))
        table.add_row("Learning rate", "", *(f"{c.learning_rate:g}" for c in contenders))
        table.add_row(
            "Cost of a step, by count", "", *(_cost(c.ascent_sequences(sequences), sequences) for c in contenders)
        )
        table.add_row("Cost of a step, by the clock", "", *(f"{o.seconds / plain.seconds:.2f}" for o in outcomes[1:]))
        table.add_row("Time of the training", "", *(f"{o.seconds:.0f} s" for o in outcomes[1:]))
        self.console.print()
        self.console.print(table)
        # Whatever came out is said, and what it is worth.
        ahead = plain.loss - outcomes[-1].loss
        how = "lower than" if ahead > 0 else "higher than" if ahead < 0 else "as high as"
        by = f"{abs(ahead):.3f} nats " if ahead else ""
        self.console.print(
            f"\n{contenders[-1].name}'s held-out loss is {by}{how} plain LoRA's. This is one run of each: "
            "slsam-peft compare trains on several seeds."
        )

    def answers(self, question: str, documentation: str, answers: dict[str, str]) -> None:
        """Show one held-out question, what the documentation says, and the answers to it by who gave them."""
        self.console.print()
        self._rows(("Question", question), ("Documentation", documentation), *answers.items())

    def adapter(self, folder: Path, name: str) -> None:
        """Show where the adapter lies, which training it is of, and how plain PEFT loads it."""
        self.console.print()
        self._rows((f"{name}'s adapter", str(folder.absolute())))
        self.console.print("Load it in plain PEFT:")
        for line in (
            "from peft import AutoPeftModelForCausalLM",
            f"model = AutoPeftModelForCausalLM.from_pretrained({str(folder)!r})",
        ):
            self.console.print(f"    {line}", style="cyan", markup=False, soft_wrap=True)
        self.console.print("Look at what the sampler did:")
        self.console.print(
            f"    slsam-peft plot {shlex.quote(str(folder))}", style="cyan", markup=False, soft_wrap=True
        )

    def cost(self, seconds: float, peak_bytes: int | None) -> None:
        """Show the wall-clock time and the largest resident set."""
        minutes, rest = divmod(round(seconds), 60)
        memory = "" if peak_bytes is None else f", peak memory {peak_bytes / 2**30:.2f} GiB"
        self.console.print(f"\nDone in {minutes} min {rest} s{memory}.")

    def _rows(self, *rows: tuple[str, str]) -> None:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(Text(name), Text(value))
        self.console.print(table)


def _method(contender: "Contender") -> str:
    """Return how a contender trains, in a line."""
    rate = f"learning rate {contender.learning_rate:g}"
    config = contender.slsam.resolved
    if not config.is_perturbed:
        return rate
    return (
        f"{rate}, method={config.method}: {config.fraction:.0%} of the blocks perturbed in each step, all trained, "
        f"loss_rise={config.loss_rise:g}"
    )


def _cost(ascent_sequences: int, sequences: int) -> str:
    """Return the predicted cost of a step in plain LoRA steps, and how it comes about."""
    if not ascent_sequences:
        return "1"
    return f"1 + {ascent_sequences}/{sequences} = {1 + ascent_sequences / sequences:.4g}"
