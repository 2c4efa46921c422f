"""Runs `slsam-peft compare` in this process."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from slsam_peft.cli.compare import add_arguments, run
from slsam_peft.cli.parsing import Parser


def compare_words(words: Sequence[str]) -> int:
    """Run the subcommand with the words that follow its name."""
    parser = Parser("compare", "")
    add_arguments(parser)
    parser.add_argument("--debug", action="store_true")
    return run(parser.read(list(words)))


def compare(folder: Path, values: dict[str, Any], *flags: str) -> int:
    """Write the YAML file and run the subcommand."""
    config = folder / "small.yaml"
    config.write_text(yaml.safe_dump(values))
    return compare_words(["--config", str(config), *flags])
