"""`slsam-peft quickstart` fine-tunes a small 4-bit LLM with SL-SAM, on data built on the spot."""

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slsam_peft.cli.parsing import DTYPES
from slsam_peft.cli.quiet import silence_libraries
from slsam_peft.config import SLSAMConfig
from slsam_peft.errors import UserError

if TYPE_CHECKING:
    from slsam_peft.runs.quickstart import QuickstartSettings

NAME = "quickstart"
HELP = "Fine-tune a 4-bit SmolLM2-135M on the Python documentation: minutes on two cores, 93 MB fetched once"

# Name, type, default, help.
NUMBERS = (
    ("max_steps", int, 64, "steps of training"),
    ("batch_size", int, 4, "sequences per step"),
    ("learning_rate", float, 2e-3, "peak learning rate; it falls linearly to 0"),
    ("lora_r", int, 8, "rank of the adapters, on all linear layers"),
    ("rho", float, SLSAMConfig.rho, "radius of the perturbation"),
    ("active_fraction", float, SLSAMConfig().fraction, "share of the blocks perturbed and trained per step"),
    ("n_train", int, 800, "training pairs"),
    ("n_test", int, 64, "held-out pairs, from other modules"),
    ("seed", int, 0, "seed of data, adapters, batches and active sets"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's flags."""
    parser.add_argument(
        "--model", metavar="NAME", help="Hub name or folder of a chat model (default: SmolLM2-135M-Instruct from PyPI)"
    )
    parser.add_argument(
        "--output", metavar="FOLDER", default="slsam-quickstart-adapter", help="where the adapter is written"
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
    """Train, and show what came of it.

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

        from slsam_peft.data.stdlib_docs import stdlib_docs
        from slsam_peft.models.load import compute_dtype, find_model
        from slsam_peft.models.smollm2 import SMOLLM2
        from slsam_peft.runs import quickstart as parts

        try:
            data = stdlib_docs(n_train=args.n_train, n_test=args.n_test, seed=args.seed)
        except (ValueError, RuntimeError) as error:
            raise UserError(str(error)) from error
    # The model, and what is about to be done with it.
    with screen.working("Looking for the model") as say:
        name = find_model(args.model or SMOLLM2, say)
    dtype = compute_dtype("auto") if args.dtype is None else getattr(torch, args.dtype)
    with screen.working(f"Loading {Path(name).name} in NF4"):
        model, tokenizer = parts.load_chat_model(name, dtype)
    settings = parts.QuickstartSettings(
        max_steps=args.max_steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lora_r=args.lora_r,
        seed=args.seed,
        slsam=slsam,
    )
    screen.settings(name, str(dtype).removeprefix("torch."), data, settings)
    _train(model, tokenizer, data, settings, Path(args.output), screen)
    screen.cost(time.monotonic() - start, _peak_bytes())
    return 0


def _train(model: Any, tokenizer: Any, data: Any, settings: "QuickstartSettings", folder: Path, screen: Any) -> None:
    from slsam_peft.runs import quickstart as parts

    progress = screen.progress(settings.max_steps)
    sample = data["test"][0]
    with tempfile.TemporaryDirectory(prefix="slsam-quickstart-") as scratch:
        # Loss and answer are taken before training and after it, in the same way.
        with screen.working("Preparing the data"):
            trainer = parts.build_trainer(model, tokenizer, data, settings, scratch, progress.update)
        with screen.working("Measuring the held-out loss before training"):
            before = trainer.evaluate()["eval_loss"]
            answer_before = parts.answer(trainer.model, tokenizer, sample["prompt"])
        with progress:
            trainer.train()
        with screen.working("Measuring the held-out loss after training"):
            after = trainer.evaluate()["eval_loss"]
            answer_after = parts.answer(trainer.model, tokenizer, sample["prompt"])
        parts.save_adapter(trainer, folder, _card(settings, before, after))
    screen.losses(before, after)
    screen.answers(sample["prompt"][0]["content"], answer_before, answer_after, sample["completion"][0]["content"])
    screen.adapter(folder)


def _card(settings: "QuickstartSettings", before: float, after: float) -> str:
    config = settings.slsam
    return (
        "# Adapter of the slsam-peft quickstart\n\n"
        f"LoRA (r={settings.lora_r}, all linear layers) on an NF4 base, trained with SL-SAM (sparse-layer sharpness-"
        f"aware minimisation, arXiv 2602.09395): rho {config.rho}, active_fraction {config.fraction}, "
        f"{settings.max_steps} steps of {settings.batch_size} sequences, learning rate {settings.learning_rate}, "
        f"seed {settings.seed}.\n\nData: questions and answers made from the docstrings of Python's standard library. "
        f"Held-out loss: {before:.3f} before, {after:.3f} after.\n"
    )


def _check(args: argparse.Namespace) -> SLSAMConfig:
    """Refuse values that are not allowed; costs nothing, so it comes first."""
    for name in ("max_steps", "batch_size", "lora_r", "n_train", "n_test"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)} is not allowed; it must be an integer >= 1.")
    if not (math.isfinite(args.learning_rate) and args.learning_rate > 0):
        raise UserError(f"--learning_rate={args.learning_rate} is not allowed; it must be a finite number > 0.")
    _check_output(Path(args.output), args.force)
    if args.model and args.model.startswith((".", "/", "~")) and not Path(args.model).expanduser().is_dir():
        raise UserError(f"--model={args.model} is not a folder; name one with a model in it, or a Hub name.")
    try:
        return SLSAMConfig(rho=args.rho, active_fraction=args.active_fraction, seed=args.seed)
    except ValueError as error:
        raise UserError(f"--{error}") from error


def _check_output(folder: Path, force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output={folder} is a file; name a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise UserError(
            f"--output={folder} is not empty. Name another folder, or add --force to replace an adapter in it."
        )
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:  # permissions alone do not tell: a file system may be read-only, or refuse folders to anyone
        with tempfile.TemporaryDirectory(dir=existing, prefix=".slsam-peft-"):
            pass
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
