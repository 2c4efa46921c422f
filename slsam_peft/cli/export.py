"""`slsam-peft export` writes an adapter as a plain PEFT folder, or merged into its base."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slsam_peft.cli.parsing import DTYPES
from slsam_peft.cli.quiet import loading
from slsam_peft.errors import UserError

if TYPE_CHECKING:
    from slsam_peft.adapters.load import Adapter
    from slsam_peft.adapters.merge_error import Outcome

NAME = "export"
HELP = "Write an adapter as a plain PEFT folder, or merged into its base"

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("adapter", type=Path, metavar="ADAPTER", help="folder of the adapter, or a checkpoint")
    # What is written, and how.
    add("--output", type=Path, required=True, metavar="FOLDER", help="where the result goes")
    add("--merge", action="store_true", help="merge the adapter into the base's weights")
    add(
        "--dtype",
        choices=DTYPES,
        help="precision of what is written (default: as it is stored)",
    )
    add(
        "--base",
        choices=("original", "dequantized"),
        help="what to merge into where the base was quantised in training: its original weights, or those weights "
        "quantised and back, as training saw them",
    )
    add("--model", metavar="NAME", help="base model: folder, Hub name, smollm2 or gemma3 (default: the adapter's own)")
    # How a merge is measured.
    add("--eval_data", metavar="FILE", help="held-out data to take the loss on, for the comparison of merges")
    add("--rows", type=int, default=32, metavar="N", help="rows of --eval_data")
    add("--max_length", type=int, default=256, metavar="N", help="tokens per sequence; what is longer is cut")
    add("--max_shard_size", type=_bytes, default="5GB", metavar="SIZE", help="most bytes of a file with weights")
    add(
        "--no_measure",
        action="store_true",
        help="write the merge without loading it: peak memory stays below two shards and the adapter",
    )
    add("--force", action="store_true", help="replace an earlier export in --output")


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)\s*([KMG]B)?", text.upper())
    if match is None or int(match[1]) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; a size looks like 500MB or 5GB")
    return int(match[1]) * _UNITS.get(match[2], 1)


def run(args: argparse.Namespace) -> int:
    """Check, write to a scratch folder, measure, rename.

    Raises:
        UserError: the adapter, its base or the output cannot be used; nothing has been written then.
    """
    # Adapter, base and output are checked before anything is written.
    _check(args)
    with loading(args.debug) as (console, status):
        import torch

        from slsam_peft.adapters.export import check_out, copy_adapter, new_folder, way_of
        from slsam_peft.adapters.load import check_fit, open_adapter

        dtype = None if args.dtype is None else getattr(torch, args.dtype)
        check_out(args.output, args.force)
        adapter = open_adapter(args.adapter, args.model)
        _check_apart(args.output, adapter)
        # Both ways write to a scratch folder that is renamed at the end.
        if args.merge:
            config = check_fit(adapter)
            way = way_of(adapter, config, args.base)
            _merge(args, adapter, config, way, dtype, console, status.update)
        else:
            with new_folder(args.output, args.force) as folder:
                copy_adapter(adapter, folder, dtype)
    what = "merged model" if args.merge else "adapter"
    loader = "AutoModelForCausalLM.from_pretrained" if args.merge else "AutoPeftModelForCausalLM.from_pretrained"
    console.print(f"The {what} is in {args.output}; {loader} loads it.", soft_wrap=True, markup=False)
    return 0


def _check(args: argparse.Namespace) -> None:
    for name in ("rows", "max_length"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)} is not allowed; it must be an integer >= 1.")
    if not args.merge:
        for name in ("base", "eval_data", "no_measure"):
            if getattr(args, name):
                raise UserError(f"--{name} belongs to a merge; add --merge or leave it out.")
    if args.eval_data and args.no_measure:
        raise UserError("--eval_data is for the comparison that --no_measure leaves out; give one of them.")


def _check_apart(out: Path, adapter: "Adapter") -> None:
    for folder in (adapter.folder, Path(adapter.base)):
        if folder.exists() and (out.resolve() == folder.resolve() or folder.resolve() in out.resolve().parents):
            raise UserError(f"--output={out} lies in {folder}, which is read; name another folder.")


def _merge(
    args: argparse.Namespace,
    adapter: "Adapter",
    config: Any,
    way: str,
    dtype: Any,
    console: Any,
    tell: Callable[[str], None],
) -> None:
    """Merge the chosen way and, where there are two, the other one for comparison; print, then keep the chosen one."""
    import tempfile

    from slsam_peft.adapters.export import WAYS, Merging, build_merge, new_folder, write_card, write_merged
    from slsam_peft.adapters.merge_error import HeldOut, measure

    # Only who has chosen between two ways is shown the other one.
    both = args.base is not None and not args.no_measure
    merging = Merging(dtype, args.max_shard_size)
    if adapter.record is None and args.base is None:
        console.print(
            "No record tells whether this adapter's base was quantised in training; taken as not. If it was, choose "
            "--base original or --base dequantized.",
            style="yellow",
        )
    # The folder appears once everything in it is written and measured.
    with new_folder(args.output, args.force) as folder, tempfile.TemporaryDirectory(dir=folder.parent) as spare:
        folders = {}
        for name in WAYS if both else (way,):
            folders[name] = folder if name == way else Path(spare)
            write_merged(build_merge(adapter, config, name), adapter, config, folders[name], merging, tell)
        write_card(folder, adapter, way, _name_of(dtype))
        if not args.no_measure:
            held_out = HeldOut(args.eval_data, args.rows, args.max_length) if args.eval_data else None
            trained, outcomes = measure(adapter, folders, held_out, tell)
            _show(console, trained, outcomes, way)


def _name_of(dtype: Any) -> str:
    return "the base's precision" if dtype is None else str(dtype).removeprefix("torch.")


def _show(console: Any, trained: float | None, outcomes: "dict[str, Outcome]", way: str) -> None:
    from rich.table import Table

    from slsam_peft.adapters.export import WAYS

    # The loss is a column only where there are data to take it on.
    table = Table(title="Against the adapter on the base it was trained on", title_justify="left")
    table.add_column("merged into")
    table.add_column("largest difference of a logit\n(of their standard deviation)", justify="right")
    table.add_column("KL divergence\n(nats per token)", justify="right")
    table.add_column("same most\nlikely token", justify="right")
    if trained is not None:
        table.add_column(f"held-out loss\n(trained: {trained:.4f} nats)", justify="right")
    # A row for each way to merge; the one that was written is marked where there are two.
    for name, found in outcomes.items():
        label = WAYS[name] if len(outcomes) > 1 else "the base's weights"
        row = [f"{label}{' (written)' if name == way and len(outcomes) > 1 else ''}"]
        row += [
            f"{found.largest:.2g} ({found.largest / found.spread:.1%})",
            f"{found.divergence:.2g}",
            f"{found.agreement:.0%}",
        ]
        if trained is not None and found.loss is not None:
            row.append(f"{found.loss:.4f} ({found.loss - trained:+.4f})")
        table.add_row(*row)
    console.print(table)
