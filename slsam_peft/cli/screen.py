"""Prints what the quickstart shows in a terminal."""

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from datasets import DatasetDict

    from slsam_peft.runs.quickstart import QuickstartSettings


class TrainingProgress:
    """A progress bar with the loss and the share of active blocks, fed with the trainer's logs."""

    def __init__(self, console: Console, total: int) -> None:
        self._bar = Progress(
            TextColumn("Training"),
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
        if "slsam/active_fraction" in logs:
            note += f"  {logs['slsam/active_fraction']:.0%} of blocks active"
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

    def progress(self, total: int) -> TrainingProgress:
        """Return the progress bar of `total` steps."""
        return TrainingProgress(self.console, total)

    def settings(self, model: str, dtype: str, data: "DatasetDict", settings: "QuickstartSettings") -> None:
        """Show what is going to be trained, on what, and how."""
        config = settings.slsam
        self._rows(
            ("Model", f"{Path(model).name}, linear layers in 4-bit NF4, computing in {dtype}"),
            ("Data", f"{len(data['train'])} questions on Python's standard library; {len(data['test'])} held out"),
            ("LoRA", f"r={settings.lora_r} on all linear layers"),
            ("SL-SAM", f"rho={config.rho}, active_fraction={config.fraction}, bandit={config.bandit}"),
            (
                "Steps",
                f"{settings.max_steps} of {settings.batch_size} sequences, learning rate {settings.learning_rate}",
            ),
        )

    def losses(self, before: float, after: float) -> None:
        """Show the held-out loss before and after."""
        self.console.print()
        self._rows(("Held-out loss", f"{before:.3f} before, {after:.3f} after"))

    def answers(self, question: str, before: str, after: str, documentation: str) -> None:
        """Show one held-out question, the answers to it, and what the documentation says."""
        self.console.print()
        self._rows(("Question", question), ("Before", before), ("After", after), ("Documentation", documentation))

    def adapter(self, folder: Path) -> None:
        """Show where the adapter lies and how plain PEFT loads it."""
        self.console.print()
        self._rows(("Adapter", str(folder.absolute())))
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
            table.add_row(name, Text(value))
        self.console.print(table)
