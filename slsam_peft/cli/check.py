"""`slsam-peft check` tells whether an adapter is intact, fits its base and computes what it did when it was saved."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slsam_peft.cli.quiet import loading

if TYPE_CHECKING:
    from slsam_peft.adapters.load import Adapter

NAME = "check"
HELP = "Check an adapter: its values, its base, its logits; say what it was trained with"

_MARKS = {True: ("ok", "green"), False: ("problem", "bold red"), None: ("not known", "yellow")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="folder of the adapter, or a checkpoint")
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="base model: folder, Hub name, smollm2 or gemma3 (default: the adapter's own)",
    )
    parser.epilog = "Exit code: 0 no problem found, 1 a problem found, 2 it cannot be checked."


def run(args: argparse.Namespace) -> int:
    """Print what is found as it is found.

    Returns:
        `int`: 0 where nothing is wrong, else 1.

    Raises:
        UserError: there is no such adapter, or its base cannot be read.
    """
    from rich.table import Table

    with loading(args.debug) as (console, status):
        from slsam_peft.adapters.check import examine
        from slsam_peft.adapters.load import open_adapter

        adapter = open_adapter(args.adapter, args.model)
        console.print(_trained_with(adapter))
        status.update("Reading the adapter")
        findings = list(examine(adapter, status.update))
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for finding in findings:
        mark, style = _MARKS[finding.good]
        table.add_row(f"[{style}]{mark}[/]", finding.what, _plain(finding.result))
    console.print(table)
    problems = sum(finding.good is False for finding in findings)
    console.print(f"{problems or 'No'} problem{'' if problems == 1 else 's'} found in {adapter.folder}.", markup=False)
    return int(problems > 0)


def _trained_with(adapter: "Adapter") -> Any:
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in _facts(adapter).items():
        table.add_row(name, _plain(value))
    return table


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text, overflow="fold")  # long paths are shown in full


def _facts(adapter: "Adapter") -> dict[str, str]:
    config = adapter.config
    kind = config.peft_type.value
    if hasattr(config, "lora_alpha"):
        kind += f", r={config.r}, lora_alpha={config.lora_alpha}"
    facts = {"adapter": f"{kind}, {len(adapter.shapes)} tensors", "base": adapter.base}
    record = adapter.record
    if record is None:
        facts["trained with"] = "not known: no slsam.json beside it"
        return facts
    from slsam_peft.saving.card import tags_of

    base, training = record["base"], record["training"]
    if base["name"] and base["name"] != adapter.base:
        facts["trained on"] = base["name"]
    facts["base in training"] = f"{base['dtype']}, {_quantization(base['quantization'])}"
    facts["method"] = "SL-SAM, " + ", ".join(tag.removeprefix("sl-sam:") for tag in tags_of(record["method"])[1:])
    facts["training"] = ", ".join(f"{name}={value}" for name, value in training.items())
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return facts


def _quantization(settings: dict[str, Any] | None) -> str:
    if settings is None:
        return "not quantised"
    if settings.get("load_in_4bit"):
        double = ", double quantisation" if settings.get("bnb_4bit_use_double_quant") else ""
        return f"4 bits ({settings.get('bnb_4bit_quant_type')}{double})"
    return "8 bits" if settings.get("load_in_8bit") else str(settings.get("quant_method"))
