"""`slsam-peft quickstart` trains a small 4-bit LLM twice, as plain LoRA and with SL-SAM, on data built on the spot."""

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slsam_peft.cli.parsing import DTYPES
from slsam_peft.cli.quiet import silence_libraries
from slsam_peft.config import SLSAMConfig
from slsam_peft.errors import UserError
from slsam_peft.saving.atomic import nearest_folder, try_to_write

if TYPE_CHECKING:
    from slsam_peft.cli.screen import Screen
    from slsam_peft.runs.quickstart import Contender, Outcome, QuickstartSettings

NAME = "quickstart"
HELP = "Train a 4-bit SmolLM2-135M as plain LoRA and with SL-SAM: minutes on two cores, 93 MB fetched once"

RATE_FACTOR = 2.0  # of SL-SAM's learning rate to plain LoRA's: about two did best, see recipes/compare

# Name, type, default, help.
NUMBERS = (
    ("epochs", int, 5, "how often each training pair is seen"),
    ("batch_size", int, 4, "sequences per step"),
    ("learning_rate", float, 5e-4, "plain LoRA's peak learning rate; it falls linearly to 0"),
    ("slsam_learning_rate", float, None, f"SL-SAM's (default: {RATE_FACTOR:g} times plain LoRA's)"),
    ("lora_r", int, 8, "rank of the adapters, on all linear layers"),
    ("n_train", int, 32, "training pairs"),
    ("label_noise", float, 0.25, "share of the training pairs whose answers are swapped, in [0, 1]"),
    ("n_test", int, 48, "held-out pairs, from other modules"),
    ("seed", int, 0, "seed of data, adapters, batches and active sets"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's flags."""
    parser.add_argument(
        "--model", metavar="NAME", help="Hub name or folder of a chat model (default: SmolLM2-135M-Instruct from PyPI)"
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        default="slsam-quickstart-adapter",
        help="where the adapter that SL-SAM trains is written",
    )
    parser.add_argument("--force", action="store_true", help="write to --output although it is not empty")
    for name, kind, default, text in NUMBERS:
        metavar = "N" if kind is int else "X"
        parser.add_argument(f"--{name}", metavar=metavar, type=kind, default=default, help=text)
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="what to compute in (default: bfloat16 where the processor multiplies in it, else float32)",
    )


def run(args: argparse.Namespace) -> int:
    """Train twice, and show what came of it.

    Raises:
        UserError: a value that is not allowed (before anything is downloaded), or a part that failed.
    """
    # What is not allowed is refused before anything is imported or downloaded.
    start = time.monotonic()
    slsam = _check(args)
    if not args.debug:
        silence_libraries()
    from slsam_peft.cli.screen import Screen

    screen = Screen()
    with screen.working("Loading libraries"):
        # torch, transformers and trl take seconds, so they are not imported at the top.
        import torch

        from slsam_peft.models.load import compute_dtype, find_model
        from slsam_peft.models.smollm2 import SMOLLM2
        from slsam_peft.runs import quickstart as parts

        shared = {name: getattr(args, name) for name, *_ in NUMBERS if not name.endswith("learning_rate")}
        settings = parts.QuickstartSettings(**shared)
        data = parts.load_data(settings)
    # The model, and what is about to be done with it.
    with screen.working("Looking for the model") as say:
        name = find_model(args.model or SMOLLM2, say)
    dtype = compute_dtype("auto") if args.dtype is None else getattr(torch, args.dtype)
    with screen.working(f"Loading {Path(name).name} in NF4"):
        loaded = parts.load_chat_model(name, dtype)
    rate = args.slsam_learning_rate or RATE_FACTOR * args.learning_rate
    contenders = (
        parts.Contender(name="Plain LoRA", learning_rate=args.learning_rate, slsam=SLSAMConfig(rho=0.0, trace=False)),
        parts.Contender(name="SL-SAM", learning_rate=rate, slsam=slsam),
    )
    screen.settings(name, str(dtype).removeprefix("torch."), settings, contenders)
    _train(loaded, data, settings, contenders, Path(args.output), screen)
    screen.cost(time.monotonic() - start, _peak_bytes())
    return 0


def _train(
    loaded: tuple[Any, Any],
    data: Any,
    settings: "QuickstartSettings",
    contenders: "Sequence[Contender]",
    folder: Path,
    screen: "Screen",
) -> None:
    """Train one contender after the other, save the last one's adapter and show all of them side by side."""
    from slsam_peft.runs import quickstart as parts

    model, tokenizer = loaded
    sample = data["test"][0]
    outcomes: list[Outcome] = []  # before training, then of each contender
    with tempfile.TemporaryDirectory(prefix="slsam-quickstart-") as scratch:
        for contender in contenders:
            progress = screen.progress(contender.name, settings.steps)
            own = str(Path(scratch, contender.name))
            with screen.working("Preparing the data"):
                trainer = parts.build_trainer(model, tokenizer, data, settings, contender, own, progress.update)
            # An untrained adapter changes nothing, so the first one's loss and answer are those of all.
            if not outcomes:
                with screen.working("Measuring the held-out loss before training"):
                    outcomes.append(parts.measure(trainer, sample["prompt"]))
            start = time.monotonic()
            with progress:
                trainer.train()
            seconds = time.monotonic() - start
            with screen.working(f"{contender.name}: measuring the held-out loss after training"):
                outcomes.append(parts.measure(trainer, sample["prompt"], seconds))
            if contender is contenders[-1]:
                parts.save_adapter(trainer, folder, _card(settings, contenders, outcomes))
            model = parts.without_adapter(trainer)
    screen.outcomes(settings, contenders, outcomes)
    screen.answers(
        sample["prompt"][0]["content"],
        sample["completion"][0]["content"],
        dict(zip(("Before", *(c.name for c in contenders)), (o.answer for o in outcomes), strict=True)),
    )
    screen.adapter(folder, contenders[-1].name)


def _card(settings: "QuickstartSettings", contenders: "Sequence[Contender]", outcomes: "Sequence[Outcome]") -> str:
    from slsam_peft.saving.card import settings_of

    (plain, ours), (before, of_plain, of_ours) = contenders, outcomes
    m = ours.ascent_sequences(settings.batch_size)
    return (
        "# Adapter of the slsam-peft quickstart\n\n"
        f"LoRA (r={settings.lora_r}, all linear layers) on an NF4 base, trained with SL-SAM (sparse-layer sharpness-"
        f"aware minimisation, arXiv 2602.09395): {settings_of(ours.slsam)}; {settings.epochs} epochs, "
        f"{settings.steps} steps of {settings.batch_size} sequences, learning rate {ours.learning_rate:g}, seed "
        f"{settings.seed}. By count a step costs {1 + m / settings.batch_size:.4g} steps of plain LoRA: {m} of its "
        f"{settings.batch_size} sequences make{'s' * (m == 1)} the ascent.\n\n"
        f"Data: {settings.n_train} questions and answers made from the docstrings of Python's standard library, "
        f"{settings.wrong_answers} of the answers swapped. Held-out loss: {before.loss:.3f} before, "
        f"{of_ours.loss:.3f} after; plain LoRA on the same batches at learning rate {plain.learning_rate:g}: "
        f"{of_plain.loss:.3f}.\n"
    )


def _check(args: argparse.Namespace) -> SLSAMConfig:
    """Refuse values that are not allowed, and return SL-SAM's settings; costs nothing, so it comes first."""
    for name in ("epochs", "batch_size", "lora_r", "n_train", "n_test"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)} is not allowed; it must be an integer >= 1.")
    for name in ("learning_rate", "slsam_learning_rate"):
        rate = getattr(args, name)
        if rate is not None and not (math.isfinite(rate) and rate > 0):
            raise UserError(f"--{name}={rate} is not allowed; it must be a finite number > 0.")
    if not 0 <= args.label_noise <= 1:
        raise UserError(f"--label_noise={args.label_noise} is not allowed; it is a share in [0, 1].")
    if args.label_noise > 0 and (count := round(args.label_noise * args.n_train)) < 2:
        raise UserError(
            f"--label_noise={args.label_noise} of --n_train={args.n_train} pairs is {count}; at least 2 answers are "
            "needed to swap. Raise either, or set --label_noise=0."
        )
    _check_output(Path(args.output), args.force)
    if args.model and args.model.startswith((".", "/", "~")) and not Path(args.model).expanduser().is_dir():
        raise UserError(f"--model={args.model} is not a folder; name one with a model in it, or a Hub name.")
    try:
        return SLSAMConfig(seed=args.seed)
    except ValueError as error:
        raise UserError(f"--{error}") from error


def _check_output(folder: Path, force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output={folder} is a file; name a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise UserError(
            f"--output={folder} is not empty. Name another folder, or add --force to replace an adapter in it."
        )
    existing = nearest_folder(folder)
    try:
        try_to_write(existing)
    except OSError as error:
        raise UserError(
            f"--output={folder} cannot be made: {existing} is not a folder one may write to ({error.strerror})."
        ) from error


def _peak_bytes() -> int | None:
    """Return this process's largest resident set so far, or None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
