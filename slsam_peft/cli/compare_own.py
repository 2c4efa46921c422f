"""`slsam-peft compare --data` compares plain LoRA, SL-SAM and fewer steps on one's own data, without a YAML file."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slsam_peft.cli.compare_screen import grid, show
from slsam_peft.cli.outputs import check_appendable, write_output
from slsam_peft.data.files import check_file
from slsam_peft.data.held_out import is_path
from slsam_peft.data.load import is_file_name
from slsam_peft.errors import UserError
from slsam_peft.runs.compare.wishes import Wishes, name_of

if TYPE_CHECKING:
    from slsam_peft.runs.compare.jobs import Plan, Rows
    from slsam_peft.runs.compare.report import Line
    from slsam_peft.runs.compare.settings import CompareSettings
    from slsam_peft.runs.compare.store import RowStore
    from slsam_peft.runs.compare.timing import Probe

CONFIG, RECIPE, ADAPTER = "compare.yaml", "sft.yaml", "adapter"  # in the output folder

# Name, type or `None` for a switch, what a value is, help; those of `Wishes`.
FLAGS = (
    ("eval_data", str, "FILE", "held-out data: a file, or a split of --data (default: a part of --data, by a hash)"),
    ("model", str, "NAME", "base model: folder, Hub name, smollm2 or gemma3 (default: smollm2)"),
    (
        *("runs", int, "N"),
        "most trainings: learning rates, as many for each method, then seeds (default: 12; 18 with fewer steps of "
        "plain LoRA, which are tried from 15 on where rows are repeated)",
    ),
    ("epochs", float, "X", "how often each row is seen (default: 3; up to 8 where rows are few, 1 from 2,000 on)"),
    ("steps", int, "N", "steps of a training, in place of --epochs"),
    ("batch_size", int, "N", "sequences per step (default: 4)"),
    ("max_length", int, "N", "tokens per sequence (default: those of the longest row, at most 1,024)"),
    ("lora_r", int, "N", "rank of the adapters (default: 8; 16 from 1,000 rows on)"),
    ("learning_rate", float, "X", "middle one of plain LoRA's (default: 3e-4); with fewer steps it is 4 times that"),
    ("slsam_learning_rate", float, "X", "middle one of SL-SAM's (default: twice plain LoRA's)"),
    ("dtype", str, "NAME", "what to compute in: float32 or bfloat16 (default: bfloat16 on a GPU that has it)"),
    ("load_in_4bit", None, "", "base weights in NF4"),
    ("gradient_checkpointing", None, "", "compute activations again: less memory, more time"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags that say what is compared on one's own data."""
    group = parser.add_argument_group("your own data, without a YAML file")
    group.add_argument("--data", metavar="FILE", help="training data: file, folder, Hub name or stdlib_docs")
    for name, kind, metavar, text in FLAGS:
        if kind is None:
            group.add_argument(f"--{name}", action="store_true", default=None, help=text)
        else:
            group.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)
    group.add_argument(
        "--output", type=Path, metavar="FOLDER", help=f"where rows, {CONFIG} and {RECIPE} go (default: compare-NAME)"
    )


def given_in(args: argparse.Namespace) -> dict[str, Any]:
    """Return the wishes for one's own data that were typed."""
    return {name: value for name, *_ in FLAGS if (value := getattr(args, name)) is not None}


def wishes_of(args: argparse.Namespace) -> Wishes | None:
    """Return what was asked for on one's own data, `None` where a YAML file says it all.

    Raises:
        UserError: both or neither were named, flags that belong to the other one, or a value is not allowed.
    """
    given = given_in(args)
    if args.config is not None and args.data is not None:
        raise UserError("--config and --data are both given: a YAML file names its own data. Leave one of them out.")
    if args.config is None and args.data is None:
        raise UserError(
            "there is nothing to compare; name your data, --data FILE, or a comparison's YAML file, --config FILE."
        )
    if args.data is None:
        if given or args.output is not None:
            raise UserError(f"--{next(iter(given), 'output')} belongs to --data; with --config the YAML file says it.")
        return None
    if (args.report or args.list) and given:
        raise UserError(
            f"--{next(iter(given))} does not go with --{'report' if args.report else 'list'}: what was begun is shown "
            "as it was asked for then."
        )
    try:
        return Wishes(data=args.data, **given)
    except ValueError as error:
        raise UserError(f"--{error}") from error


def folder_of(args: argparse.Namespace) -> Path:
    """Return where a comparison on one's own data is."""
    return args.output if args.output is not None else Path(f"compare-{name_of(args.data)}")


def check_files(wishes: Wishes, folder: Path) -> None:
    """Check the data's files row by row, and that the output folder can be made; no library is needed.

    Raises:
        UserError: a file cannot be read or holds something else; the message names file and line. Or the folder cannot
            be written.
    """
    files = [wishes.data] if is_file_name(wishes.data) else []
    if wishes.eval_data is not None and is_path(wishes.eval_data):
        files.append(wishes.eval_data)
    for file in (Path(name).expanduser() for name in files):
        if not file.is_dir():
            check_file(file)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output={folder} is a file; name a folder.")
    check_appendable(folder / CONFIG if folder.exists() else folder)


def begin(wishes: Wishes, begun: "CompareSettings | None", folder: Path, console: Any) -> "CompareSettings":
    """Make the comparison and write it into its folder, or take it as it was begun, and show it.

    Args:
        wishes (`Wishes`): What was asked for.
        begun (`CompareSettings` or `None`): The comparison that goes on, see `slsam_peft.cli.compare_begun`.
        folder (`Path`): Its folder, which is made.
        console (`rich.console.Console`): Where to show it.

    Raises:
        UserError: the data, or the model, cannot be used, or the rows are not those that it was begun with.
    """
    config = folder / CONFIG
    with console.status("Reading the data"):
        from slsam_peft.runs.compare.own_data import own_begun, own_comparison

        made = own_comparison(wishes) if begun is None else own_begun(wishes, begun)
    if begun is None:
        if config.exists():
            console.print(f"No run had been done of {config}, and it is begun anew.", markup=False, highlight=False)
        folder.mkdir(exist_ok=True)
        write_output(config, _as_yaml(made.values, config))
    show(made, wishes, console)
    return made.settings


def _as_yaml(values: dict[str, Any], config: Path) -> str:
    import yaml

    head = f"# slsam-peft compare --config {config}\n#\n# Written by slsam-peft compare --data.\n\n"
    return head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def time_it(plan: "Plan", store: "RowStore", console: Any) -> "list[Probe]":
    """Time a few steps of each method where no run tells of them, say how long all will take, and return the times.

    Args:
        plan (`Plan`): The comparison.
        store (`RowStore`): Where its rows are.
        console (`rich.console.Console`): Where to say it.
    """
    from slsam_peft.cli.compare_work import span
    from slsam_peft.runs.compare.run import run
    from slsam_peft.runs.compare.timing import estimate, probe, same_steps, samples_of

    rows = store.read()
    left = plan.remaining(rows)
    if not left:
        return []
    known = {sample.method for sample in samples_of(plan, rows)}
    probes = []
    for task, method in sorted({(task, method) for task, method, _ in left}):
        if any(same_steps(plan, method, other) for other in known):
            continue
        known.add(method)
        with console.status(f"Timing a few steps of {method}"):
            probes.append(probe(plan, task, method, run))
    found = estimate(plan, rows, probes)
    said = f"{len(left)} runs left; how long they take is known after the first one"
    if found is not None:
        by = "the fastest and the slowest step timed" if probes else "the fastest and the slowest run so far"
        said = f"{span(*found)} for {len(left)} runs, by {by}; longer if this machine gets busier"
    grid([("Time", said), ("", "Ctrl-C stops at any time; the same command goes on from there")], console)
    return probes


def finish(plan: "Plan", rows: "Rows", lines: "Sequence[Line]", folder: Path, console: Any, trained: bool) -> None:
    """Say which method to use, and write the YAML file that trains it.

    Args:
        plan (`Plan`): The comparison.
        rows (`dict[str, Row]`): Its rows.
        lines (`Sequence[Line]`): Its report.
        folder (`Path`): Where the file goes.
        console (`rich.console.Console`): Where to say it.
        trained (`bool`): Whether the file is written; a report writes nothing.
    """
    from rich.text import Text

    from slsam_peft.runs.compare.advice import advise
    from slsam_peft.runs.compare.sft_recipe import is_ours, says, sft_recipe

    advice = advise(plan, rows, lines)
    console.print()
    console.print(Text(advice.sentence, "bold"))
    for note in advice.notes:
        console.print(Text(note))
    recipe = folder / RECIPE
    if trained and advice.method is not None:
        import torch

        adapter, gpu = str(folder / ADAPTER), torch.cuda.is_available()
        if recipe.exists() and not is_ours(recipe.read_text(encoding="utf-8")):
            console.print(f"{recipe} is not one that compare has written, and is left as it is.", soft_wrap=True)
            return
        write_output(recipe, sft_recipe(advice, plan.settings, str(recipe), adapter, gpu=gpu))
    elif advice.method is not None and recipe.exists() and not says(recipe.read_text(encoding="utf-8"), advice):
        console.print(f"{recipe} says something else; the same command without --report writes it anew.")
        return
    if advice.method is not None and recipe.exists():
        console.print("Train it, on the held-out part of the data as well:" if _is_part(plan) else "Train it:")
        console.print(Text(f"    slsam-peft sft --config {recipe}", "cyan"), soft_wrap=True)


def _is_part(plan: "Plan") -> bool:
    return all(task.test_file is None for task in plan.settings.tasks.values())
