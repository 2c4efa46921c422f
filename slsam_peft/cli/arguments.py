"""Turns a command line and a YAML file into checked settings, through TRL's own parser."""

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from slsam_peft.cli.parsing import nearest
from slsam_peft.config import SLSAMConfig
from slsam_peft.errors import UserError

if TYPE_CHECKING:
    from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser

PROG = "slsam-peft sft"
USAGE = f"{PROG} [--config FILE] [--field value ...]"

_RENAMED = {"seed": "slsam_seed"}  # SFTConfig has a `seed` of its own
_ENVIRONMENT = "env"  # TrlParser's key for environment variables
_NEEDED = {"model_name_or_path": "model", "dataset_name": "data set"}
_TEXT_OR_TRUTH = ("resume_from_checkpoint",)  # said to be texts, and read as the truth values they look like
_NO_GPU = "support bf16/gpu"  # from transformers' message where bf16 is asked for and there is no GPU


@dataclass(frozen=True)
class Settings:
    """What one run of `slsam-peft sft` was asked for."""

    script: "ScriptArguments"
    training: "SFTConfig"
    model: "ModelConfig"
    slsam: SLSAMConfig


def slsam_arguments() -> type:
    """Return `SLSAMConfig`'s fields as a dataclass for parsers: same types, defaults and help, `seed` renamed."""
    specification = [
        (_RENAMED.get(f.name, f.name), f.type, dataclasses.field(default=f.default, metadata=dict(f.metadata)))
        for f in dataclasses.fields(SLSAMConfig)
    ]
    return dataclasses.make_dataclass("SLSAMArguments", specification, namespace={"_argument_group_name": "SL-SAM"})


def build_parser() -> "TrlParser":
    """Return TRL's parser over the script's, trainer's, model's and SL-SAM's settings. Imports torch."""
    from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser

    class SFTParser(TrlParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(f"{message}\nSee `{PROG} --help-all`.")

    types: Any = (slsam_arguments(), ScriptArguments, ModelConfig, SFTConfig)
    parser = SFTParser(types, prog=PROG, usage=USAGE, allow_abbrev=False, add_help=False)
    parser.set_defaults(use_peft=True)  # TRL trains every weight unless told otherwise; here adapters are the purpose
    return parser


def parse(argv: list[str]) -> Settings:
    """Read a command line and the YAML file it names.

    Args:
        argv (`list[str]`): Arguments after the subcommand. Those given here win over the file's.

    Returns:
        `Settings`: All settings, each checked by its own class.

    Raises:
        UserError: the file is missing or malformed; an unknown key or flag (with the nearest match); a value that is
            not allowed; no model or no data set.
    """
    if not argv:  # answered at once, without TRL
        _check_needed(dict.fromkeys(_NEEDED), {})
    # What is misspelt or missing comes before what TRL and transformers say of the rest.
    arguments, config = _take_config(argv)
    values, lines = read_config(config) if config else ({}, {})
    parser = build_parser()
    _check_config(parser, config, values, lines)
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise UserError(_unknown(parser, unknown))
    _check_needed({name: getattr(given, name) for name in _NEEDED}, values)
    # TRL's parser reads the file once more, and each class checks its own settings.
    arguments += ["--config", config] if config else []
    try:
        slsam, script, model, training = parser.parse_args_and_config(arguments)
    except OSError as error:
        raise UserError(
            f"a file that the settings name, {error.filename}, cannot be read: {error.strerror}."
        ) from error
    except (ValueError, TypeError, ImportError, LookupError, ArithmeticError) as error:
        if _NO_GPU in str(error):
            raise UserError(_no_gpu()) from error
        raise UserError(str(error)) from error
    return Settings(script, training, model, _slsam_config(slsam))


def _check_needed(given: dict[str, str | None], values: dict[Any, Any]) -> None:
    """Refuse to go on without a model or a data set; an empty flag leaves out what the file names."""
    found = {name: values.get(name) if flag is None else flag for name, flag in given.items()}
    missing = [name for name, value in found.items() if not value]
    if not missing:
        return
    what = " and ".join(f"no {_NEEDED[name]}" for name in missing)
    flags = " ".join(f"--{name} NAME" for name in missing)
    raise UserError(
        f"there is {what}; add {flags}, or the same in the file that --config names. `{PROG} --help` says what a NAME "
        "can be."
    )


def _no_gpu() -> str:
    return (
        "these settings compute in bfloat16 on a GPU, and this machine has none that can do so. Add --use_cpu --bf16 "
        "false to run them on its CPU."
    )


def _take_config(argv: list[str]) -> tuple[list[str], str]:
    """Split off `--config FILE` and `--config=FILE`; TRL's parser knows the first form only."""
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    reader.add_argument("--config", action="append", default=[])
    try:
        found, arguments = reader.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; it needs the path of a YAML file.") from None
    if len(found.config) > 1:
        raise UserError(
            f"--config is given {len(found.config)} times; give it once, and single values as --field value."
        )
    return arguments, found.config[0] if found.config else ""


def read_config(path: str) -> tuple[dict[Any, Any], dict[Any, int]]:
    """Read a YAML file of settings.

    Args:
        path (`str`): The file.

    Returns:
        `tuple[dict, dict]`: Value and line of each key.

    Raises:
        UserError: the file is missing, cannot be read, is not YAML or not a mapping, or has a key twice.
    """
    import yaml

    # Every way in which reading can fail has its own message, with the line where there is one.
    try:
        text = Path(path).read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist (from {Path.cwd()}).") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"config file {path} is not UTF-8 (byte {error.start}); it must be a YAML text file."
        ) from None
    except OSError as error:
        raise UserError(f"config file {path} cannot be read: {error.strerror}.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        detail = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"config file {path}{place}: not valid YAML: {detail}.") from None
    except (ValueError, RecursionError) as error:  # such as a date that is none
        raise UserError(
            f"config file {path}: a value cannot be read: {error}. Write a text that looks like a date or a number in "
            "quotes."
        ) from None
    if not isinstance(root, yaml.MappingNode) or not isinstance(values, dict):
        what = "is empty" if values is None else f"holds a {type(values).__name__}"
        raise UserError(f"config file {path} {what}; it must be a mapping, one `name: value` per line.")
    # YAML takes a key twice and keeps the last; here that is a mistake.
    lines: dict[Any, int] = {}
    for node, _ in root.value:
        line = node.start_mark.line + 1
        if node.value in lines:
            raise UserError(
                f"config file {path}, line {line}: {node.value} is set in line {lines[node.value]} already."
            )
        lines[node.value] = line
    return values, lines


def _check_config(parser: "TrlParser", path: str, values: dict[Any, Any], lines: dict[Any, int]) -> None:
    """Check what TRL's parser takes as it comes: a file's values are its defaults, and defaults are not checked."""
    actions = {action.dest: action for action in parser._actions}
    hints = {name: hint for kind in parser.dataclass_types for name, hint in get_type_hints(kind).items()}
    problems = []
    for key, value in values.items():
        name = str(key)
        where = f"config file {path}, line {lines[name]}" if name in lines else f"config file {path}"
        if name not in actions:
            if name != _ENVIRONMENT:
                problems.append(f"{where}: there is no setting {name!r}.{nearest(name, actions)}")
            continue
        problem = _problem(actions[name], value, hints.get(name, Any))
        if problem:
            problems.append(f"{where}: {name}: {problem}.")
    if problems:
        raise UserError("\n".join([*problems, f"`{PROG} --help-all` lists all settings."]))


def _problem(action: argparse.Action, value: Any, hint: Any) -> str:
    """Return what is wrong with a YAML value, or an empty string. Texts are converted and checked by argparse.

    Args:
        action (`argparse.Action`): The flag of the same name.
        value (`Any`): From the file.
        hint (`type`): The setting's type.
    """
    if value is None:
        return "" if type(None) in get_args(hint) else "has no value; give one or leave the line out"
    if action.choices is not None and value not in action.choices:
        allowed = ", ".join(map(str, action.choices))
        quotes = " Write it in quotes: YAML reads a bare no as false." if value is False and "no" in allowed else ""
        return f"{value!r} is not allowed; allowed: {allowed}.{quotes or nearest(str(value), action.choices)}".rstrip(
            "."
        )
    if isinstance(value, str):
        return ""
    if getattr(action.type, "__name__", "") == "str":
        return _text_problem(action.dest, value, hint)
    types = {"int": (int,), "float": (int, float), "string_to_bool": (bool,)}
    kind = getattr(action.type, "__name__", "")
    if kind not in types or (type(value) in types[kind]):
        return ""
    phrase = {"int": "an integer", "float": "a number", "string_to_bool": "true or false"}[kind]
    return f"{value!r} is not allowed; it must be {phrase}"


def _text_problem(name: str, value: Any, hint: Any) -> str:
    """Return what is wrong with a YAML value that is no text, where a text can be given; or an empty string."""
    kinds = [get_origin(kind) or kind for kind in (get_args(hint) or (hint,))] if get_origin(hint) is not list else []
    takes_list = list in kinds or get_origin(hint) is list
    if takes_list and isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return ""
    if any(isinstance(value, kind) for kind in (dict, int) if kind in kinds) and not isinstance(value, bool):
        return ""
    if isinstance(value, bool) and (name in _TEXT_OR_TRUTH or any(get_origin(k) is Literal for k in get_args(hint))):
        return ""
    if takes_list:
        return f"{value!r} is not allowed; it must be a text, or a list of texts"
    if dict in kinds:
        return f"{value!r} is not allowed; it must be a mapping"
    quotes = "" if isinstance(value, list | dict) else f": write it in quotes, '{value}'"
    return f"{value!r} is not allowed; it must be a text{quotes}"


def _unknown(parser: "TrlParser", arguments: list[str]) -> str:
    known = [flag for action in parser._actions for flag in action.option_strings]
    flags = [argument.partition("=")[0] for argument in arguments if argument.startswith("-")]
    if flags:
        return "\n".join(f"there is no setting {flag}.{nearest(flag, known)}" for flag in flags) + (
            f"\n`{PROG} --help-all` lists all settings."
        )
    hint = f" A config file is given as --config {arguments[0]}." if arguments[0].endswith((".yaml", ".yml")) else ""
    return f"unexpected argument {arguments[0]!r}: values follow their --field.{hint}"


def _slsam_config(arguments: Any) -> SLSAMConfig:
    names = {f.name: _RENAMED.get(f.name, f.name) for f in dataclasses.fields(SLSAMConfig)}
    try:
        return SLSAMConfig(**{name: getattr(arguments, flag) for name, flag in names.items()})
    except ValueError as error:
        message = str(error)
        for name, flag in _RENAMED.items():
            message = f"{flag}{message.removeprefix(name)}" if message.startswith(f"{name}=") else message
        raise UserError(message) from error
