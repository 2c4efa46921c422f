"""`slsam-peft chat` shows answers with and without an adapter, side by side."""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slsam_peft.cli.quiet import loading
from slsam_peft.errors import UserError

if TYPE_CHECKING:
    from slsam_peft.adapters.chat import Answer

NAME = "chat"
HELP = "Talk to a model with and without its adapter, side by side"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("adapter", type=Path, metavar="ADAPTER", help="folder of the adapter, or a checkpoint")
    add("--model", metavar="NAME", help="base model: folder, Hub name, smollm2 or gemma3 (default: the adapter's own)")
    add("--prompt", metavar="TEXT", help="answer this and leave; without it, prompts are asked for")
    add("--max_new_tokens", type=int, default=128, metavar="N", help="most tokens of an answer")
    add("--temperature", type=float, default=0.0, metavar="X", help="0: the most likely token each time")
    add("--seed", type=int, default=0, metavar="N", help="seed of the draws, at a temperature above 0")


def run(args: argparse.Namespace) -> int:
    """Answer one prompt, or one after the other until the input ends.

    Raises:
        UserError: a value that is not allowed, or an adapter or base that cannot be read.
    """
    # Everything is loaded before the first question.
    _check(args)
    with loading(args.debug) as (console, status):
        from slsam_peft.adapters.load import load_adapted, open_adapter

        adapter = open_adapter(args.adapter, args.model)
        status.update("Loading the model")
        model, tokenizer = load_adapted(adapter)
    talk = _Talk(model, tokenizer, console, args)
    if args.prompt is not None:
        talk.answer(args.prompt)
        return 0
    # One question after the other; Ctrl-C ends an answer and not the conversation.
    console.print(
        "Each side remembers its own answers. /new forgets them; Ctrl-C stops an answer, Ctrl-D ends.", style="dim"
    )
    while True:
        try:
            prompt = console.input("[bold]> [/]").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return 0
        if prompt == "/new":
            talk.forget()
        elif prompt:
            try:
                talk.answer(prompt)
            except KeyboardInterrupt:
                console.print("Stopped.", style="dim")


def _check(args: argparse.Namespace) -> None:
    if args.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens={args.max_new_tokens} is not allowed; it must be an integer >= 1.")
    if not (math.isfinite(args.temperature) and args.temperature >= 0):
        raise UserError(f"--temperature={args.temperature} is not allowed; it must be a finite number >= 0.")
    if args.seed < 0:
        raise UserError(f"--seed={args.seed} is not allowed; it must be an integer >= 0.")
    if args.prompt is not None and not args.prompt.strip():
        raise UserError("--prompt is empty; give a text, or leave it out to be asked.")


class _Talk:
    """Two conversations that get the same prompts."""

    def __init__(self, model: Any, tokenizer: Any, console: Any, args: argparse.Namespace) -> None:
        self._model, self._tokenizer, self._console = model, tokenizer, console
        self._settings = {"limit": args.max_new_tokens, "temperature": args.temperature, "seed": args.seed}
        self.forget()

    def forget(self) -> None:
        """Begin both conversations anew."""
        self._conversations: tuple[list[dict[str, str]], ...] = ([], [])

    def answer(self, prompt: str) -> None:
        """Show both answers as they grow; both conversations go on with them once they are complete."""
        from rich.live import Live

        from slsam_peft.adapters.chat import Answer, stream

        asked = [[*talk, {"role": "user", "content": prompt}] for talk in self._conversations]
        answers = [
            Answer(self._model, self._tokenizer, messages, adapted=adapted, **self._settings)
            for messages, adapted in zip(asked, (True, False), strict=True)
        ]
        with Live(_columns(answers), console=self._console, refresh_per_second=8) as live:
            for _ in stream(*answers):
                live.update(_columns(answers))
        self._conversations = tuple(
            [*messages, {"role": "assistant", "content": answer.text}]
            for messages, answer in zip(asked, answers, strict=True)
        )


def _columns(answers: "list[Answer]") -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, expand=True, padding=(0, 2, 0, 0))
    for heading in ("with the adapter", "without"):
        table.add_column(heading, ratio=1, header_style="bold underline")
    table.add_row(*(Text(answer.text) for answer in answers))
    return table
