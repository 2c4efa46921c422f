"""`slsam-peft sft` fine-tunes a model on a data set, from a YAML file and flags."""

import argparse
import dataclasses
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from slsam_peft.cli.arguments import PROG, USAGE, Settings, build_parser, parse, slsam_arguments

NAME = "sft"
HELP = "Fine-tune LoRA or QLoRA adapters on a data set with SL-SAM"
RAW_ARGV = True

_DESCRIPTION = (
    "Fine-tune adapters on a data set with TRL's SFTTrainer and SL-SAM. Every setting is a line of the YAML file, "
    "`name: value`, or a flag, `--name value`; flags win. A model and a data set must be named."
)
_COMMON = {
    "config": ("FILE", "YAML file of settings; see recipes/ for some that run"),
    "model_name_or_path": (
        "NAME",
        "base model: a folder, a name on the Hub, smollm2 (135M, a chat model) or gemma3 (270M, without a template)",
    ),
    "dataset_name": (
        "NAME",
        "a .json, .jsonl or .parquet file, a folder of such files, a name on the Hub, or stdlib_docs",
    ),
    "dataset_test_split": ("SPLIT", "what to evaluate on: a split, a part of one ('train[90%%:]') or a held-out file"),
    "output_dir": ("FOLDER", "where checkpoints and the adapter are written"),
    "use_peft": ("BOOL", "train LoRA adapters; false trains every weight of the model instead (default: True)"),
    "load_in_4bit": ("", "quantise the base to 4 bits (QLoRA)"),
    "resume_from_checkpoint": (
        "FOLDER",
        "go on from this checkpoint; true: from output_dir's newest intact one; auto: the same, or afresh without one",
    ),
}


def run_raw(argv: list[str]) -> int:
    """Run the subcommand on its unparsed arguments and return the exit code.

    Raises:
        UserError: see `slsam_peft.cli.arguments.parse` and `slsam_peft.runs.finetune.finetune`.
    """
    if "--help" in argv or "-h" in argv:
        print_help()
        return 0
    if "--help-all" in argv:
        print_help_all()
        return 0
    with warnings.catch_warnings():
        # TRL sets these fields by their old names, so there is nothing the user could change.
        warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing\w*` is deprecated", FutureWarning)
        _train(parse(_without_debug(argv)))
    return 0


def _train(settings: Settings) -> None:
    from slsam_peft.runs.finetune import finetune

    with _advice_shown():
        trainer = finetune(settings.script, settings.training, settings.model, settings.slsam)
    if trainer.is_world_process_zero():
        _report(settings, trainer.model.get_input_embeddings().weight.shape[0])
    trainer.accelerator.end_training()


@contextmanager
def _advice_shown() -> Iterator[None]:
    """Show what this package logs as information, which Python hides; of several processes the first one does."""
    logger, shown = logging.getLogger("slsam_peft"), logging.StreamHandler()
    before = logger.level
    if os.environ.get("RANK", "0") == "0":
        logger.addHandler(shown)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(shown)
        logger.setLevel(before)


def print_help() -> None:
    """Print the settings of SL-SAM and the most used of the others, from metadata alone: no torch is imported."""
    # The most used settings of TRL, in this command's words.
    parser = argparse.ArgumentParser(
        prog=PROG, usage=USAGE, description=_DESCRIPTION, add_help=False, formatter_class=_Formatter
    )
    parser.epilog = (
        f"All other settings are TRL's: {PROG} --help-all lists them. Exit code: 0 trained, 1 training has diverged, "
        "2 what was asked for cannot be done, 130 Ctrl-C, 143 SIGTERM."
    )
    common = parser.add_argument_group("common settings")
    common.add_argument("-h", "--help", action="store_true", help="show this and leave")
    common.add_argument("--help-all", action="store_true", help="add TRL's own settings (takes some seconds)")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for name, (metavar, text) in _COMMON.items():
        if metavar:
            common.add_argument(f"--{name}", metavar=metavar, help=text)
        else:
            common.add_argument(f"--{name}", action="store_true", help=text)
    # All settings of SL-SAM, in their own.
    slsam = parser.add_argument_group("SL-SAM")
    for field in dataclasses.fields(slsam_arguments()):
        default = "unset" if field.default is None else field.default
        slsam.add_argument(
            f"--{field.name}",
            metavar=_metavar(field.type),
            help=f"{field.metadata['help']} (default: {default})".replace("%", "%%"),
        )
    _say(parser.format_help())


def print_help_all() -> None:
    """Print every setting that `slsam-peft sft` takes. Imports torch."""
    parser = build_parser()
    parser.description = f"{_DESCRIPTION} {PROG} --help explains the most used ones."
    _say(parser.format_help())


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=110)


def _metavar(kind: object) -> str:
    for part, name in ((bool, "BOOL"), (int, "INT"), (float, "FLOAT")):
        if kind is part or kind == part | None:
            return name
    return "NAME"


def _without_debug(argv: list[str]) -> list[str]:
    """Drop a bare `--debug`, which `main` reads; with a value it is a field of `SFTConfig`."""
    last = len(argv) - 1
    return [word for i, word in enumerate(argv) if word != "--debug" or (i < last and not argv[i + 1].startswith("-"))]


def _report(settings: Settings, embeddings: int) -> None:
    """Say where the result is, and print lines of Python that load it.

    Args:
        settings (`Settings`): What was asked for.
        embeddings (`int`): How many the model has now; a template of another model may have brought tokens along.
    """
    from transformers import AutoConfig

    folder, base = settings.training.output_dir, str(settings.model.model_name_or_path)
    if not settings.model.use_peft:
        _say(f'The model is in {folder}. Load it: AutoModelForCausalLM.from_pretrained("{folder}")')
        return
    args = settings.training
    config = AutoConfig.from_pretrained(
        base, revision=settings.model.model_revision, trust_remote_code=args.trust_remote_code
    )
    loaded = f'AutoModelForCausalLM.from_pretrained("{base}")'
    if embeddings == config.get_text_config().vocab_size:
        _say(f'The adapter is in {folder}. Load it: PeftModel.from_pretrained({loaded}, "{folder}")')
        return
    _say(f"The adapter is in {folder}, with the tokens that were added to the base. Load it:")
    _say(f"base = {loaded}")
    _say(f"base.resize_token_embeddings({embeddings}, mean_resizing=False)  # the adapter has their values")
    _say(f'PeftModel.from_pretrained(base, "{folder}")')


def _say(text: str) -> None:
    from rich.console import Console

    Console(markup=False, highlight=False, soft_wrap=True).print(text)
