"""Holds what all subcommands share, and a parser whose errors are `UserError`s that name the nearest match."""

import argparse
from collections.abc import Iterable, Sequence
from typing import NoReturn

from slsam_peft.errors import UserError
from slsam_peft.names import hint_at

DTYPES = ("float32", "bfloat16", "float16")  # the names of every --dtype

# What other programs, and other subcommands, call a setting, by what is meant, the likeliest first. This is looked up
# before the nearest spelling, which would answer --lr with --rho and --lora_rank with --local_rank.
_MEANT = {
    ("learning_rate",): "lr learnrate peak_lr max_lr",
    ("lora_r",): "r rank lora_rank lora_dim",
    ("lora_alpha",): "alpha",
    ("lora_dropout",): "dropout",
    ("lora_target_modules",): "target_modules lora_target lora_modules",
    ("dtype",): "torch_dtype precision compute_dtype",
    ("num_train_epochs", "epochs"): "num_train_epochs epochs num_epochs n_epochs",
    ("max_steps", "steps"): "max_steps steps updates num_steps n_steps iters iterations",
    ("per_device_train_batch_size", "batch_size"): "per_device_train_batch_size batch_size train_batch_size bs",
    ("gradient_accumulation_steps",): "gradient_accumulation grad_accum grad_accumulation accumulation",
    ("max_length",): "seq_len seq_length sequence_length max_seq_len max_seq_length context_length cutoff_len length",
    ("model_name_or_path", "model"): "model_name_or_path model model_name base_model model_id",
    ("dataset_name", "data"): "dataset_name data dataset train_data train_file data_path",
    ("dataset_test_split", "eval_data"): "dataset_test_split eval_data held_out eval_dataset test_data",
    ("output_dir", "output", "table"): "output_dir output out out_dir output_path save_dir",
    ("load_in_4bit",): "qlora use_4bit 4bit in_4bit",
    ("optim",): "optimizer",
    ("lr_scheduler_type",): "scheduler lr_scheduler",
    ("resume_from_checkpoint",): "resume",
    ("memory",): "gpu_gib vram gpu_memory",
    ("results", "rows"): "rows results_file",
    ("use_cpu",): "device",
    (): "adapter",  # what has one takes it without a flag
}
OTHER_NAMES = {name: meant for meant, names in _MEANT.items() for name in names.split()}


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the known name that is meant, or an empty string where none is close.

    Args:
        name (`str`): What was typed: a flag with its dashes, a key of a YAML file, a value.
        known (`Iterable[str]`): What is allowed, spelled in the same way.
    """
    by_word = {word.lstrip("-"): word for word in known}
    meant = OTHER_NAMES.get(name.lstrip("-").replace("-", "_").lower())
    if meant is None:
        return hint_at(name, by_word.values())
    return next((f" Did you mean '{by_word[other]}'?" for other in meant if other in by_word), "")


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` that raises `UserError`, takes no abbreviations and accepts `--max-steps` too.

    Its help ends with the default, "(default: 64)", wherever a flag has one.
    """

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, formatter_class=_WithDefaults)

    def error(self, message: str) -> NoReturn:
        """Raise `UserError` instead of leaving the process."""
        raise UserError(f"{message}\nSee `{self.prog} --help`.")

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse all of `argv`.

        Raises:
            UserError: an unknown flag (with the nearest match), a missing or a malformed value.
        """
        typed = [_underscored(word) for word in argv]
        # A flag that is unknown is named before one that is missing: it may be what was meant.
        known = {flag for action in self._actions for flag in action.option_strings}
        for word in typed[: typed.index("--") if "--" in typed else None]:
            if word.startswith("--") and (name := word.partition("=")[0]) not in known:
                self.error(f"{self.prog} does not know {word!r}.{self._hint(name)}")
        values, unknown = self.parse_known_args(typed)
        if unknown:
            self.error(f"{self.prog} does not know {unknown[0]!r}.{self._hint(unknown[0])}")
        return values

    def _hint(self, name: str) -> str:
        for action in self._actions:
            if not action.option_strings and name in (f"--{action.dest}", "--adapter"):
                return f" It is given without a flag: {self.prog} {action.metavar or action.dest}."
        return nearest(name, [flag for action in self._actions for flag in action.option_strings])


class _WithDefaults(argparse.HelpFormatter):
    """Adds the default to a flag's help, unless the help states what stands for a missing one itself."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if not action.option_strings or action.nargs == 0 or action.default in (None, argparse.SUPPRESS):
            return text
        if "(default:" in text:
            return text
        several = isinstance(action.default, list | tuple)
        default = " ".join(map(str, action.default)) if several else str(action.default)
        return f"{text} (default: {default.replace('%', '%%')})"


def _underscored(word: str) -> str:
    """Spell a flag's name as it was declared: `--max-steps=3` becomes `--max_steps=3`."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value
