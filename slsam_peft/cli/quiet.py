"""Keeps what other libraries say off the screen."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def silence_kernels() -> None:
    """Keep off the screen which kernels bitsandbytes misses on this machine, in every subcommand.

    It says so when it is imported, which PEFT does for any adapter: on processors with AVX512-BF16 even where nothing
    is quantized. Nothing that runs here needs those kernels.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@contextmanager
def loading(debug: bool) -> Iterator[tuple[Any, Any]]:
    """Show that libraries are being imported, which the context does, and keep what they say off the screen.

    Args:
        debug (`bool`): Let them speak.

    Yields:
        `tuple[rich.console.Console, rich.status.Status]`: The screen, and the line that tells what is going on.
    """
    if not debug:
        silence_libraries()
    from rich.console import Console

    console = Console(highlight=False)
    with console.status("Loading libraries") as status:
        silence_progress_bars()
        yield console, status


def silence_libraries() -> None:
    """Silence other libraries, before they are imported; errors and this package's own warnings still come through."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["HF_HUB_VERBOSITY"] = "error"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    warnings.simplefilter("ignore")
    for name in ("trl", "peft", "accelerate", "datasets", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)


def silence_progress_bars() -> None:
    """Switch off transformers' progress bars, which no environment variable does."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
