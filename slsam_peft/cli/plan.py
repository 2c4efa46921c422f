"""`slsam-peft plan` tells what training will cost and whether it fits, from a model's configuration alone."""

import argparse
import json
import math
import sys
from dataclasses import fields
from typing import Any

from slsam_peft.cli.parsing import DTYPES
from slsam_peft.cli.plan_facts import make_plan
from slsam_peft.cli.quiet import silence_libraries
from slsam_peft.config import SLSAMConfig
from slsam_peft.errors import UserError
from slsam_peft.presets import (
    ADAPTER_DTYPES,
    ASCENTS,
    BANDITS,
    DESCENTS,
    DESIGNS,
    GRANULARITIES,
    METHODS,
    RADII,
    RIDING,
)

NAME = "plan"
HELP = "Say what a step will cost and whether its memory fits, from a model's configuration alone"

_NAMES = {
    "method": METHODS,
    "ascent": ASCENTS,
    "radius": RADII,
    "descent": DESCENTS,
    "design": DESIGNS,
    "granularity": GRANULARITIES,
    "bandit": BANDITS,
}
_NUMBERS = (
    "rho",
    "loss_rise",
    "ascent_sequences",
    "active_fraction",
    "ascent_fraction",
    "cost_budget",
    "min_probability",
    "hidden_state_cache_limit_mib",
)
_WHOLE = ("ascent_sequences",)
# The bandit moves probability between the arms and keeps their sum.
_NO_MATTER = " The plan is the same for all of them: it is that of the start, where every arm is equally probable."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags; those of `SLSAMConfig` and LoRA have the names that `sft` has for them."""
    # What is asked.
    parser.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help="built-in shape (llama-3.1-8b, llama-3.1-70b, qwen2.5-7b, smollm2-135m, ...), folder, JSON file, Hub ID",
    )
    parser.add_argument(
        "--memory",
        type=float,
        metavar="GIB",
        help="memory that training must fit into (default: that of this machine's GPU)",
    )
    parser.add_argument("--arms", action="store_true", help="list the arms, with sizes and probabilities")
    parser.add_argument("--json", action="store_true", help="print one JSON object, every arm in it, and no tables")
    # What the training will be.
    _add_training(parser.add_argument_group("training"))
    settings = parser.add_argument_group("SL-SAM")
    known = {field.name: field for field in fields(SLSAMConfig)}
    for name, allowed in _NAMES.items():
        text = _help(known[name]) + (_NO_MATTER if name == "bandit" else "")
        settings.add_argument(f"--{name}", choices=allowed, default=known[name].default, help=text)
    for name in _NUMBERS:
        kind, shown = (int, "N") if name in _WHOLE else (float, "X")
        settings.add_argument(
            f"--{name}", type=kind, metavar=shown, default=known[name].default, help=_help(known[name])
        )


def _add_training(group: Any) -> None:
    add = group.add_argument
    # The model and its adapters.
    add("--load_in_4bit", action="store_true", help="frozen linear modules in NF4")
    add("--use_bnb_nested_quant", action="store_true", help="with their absmax quantised too")
    add("--dtype", choices=DTYPES, default="bfloat16", help="precision of the weights and of computation")
    add("--lora_r", type=int, default=16, metavar="N", help="rank of the adapters")
    add("--lora_target_modules", nargs="+", default=["all-linear"], metavar="NAME", help="modules with an adapter")
    add(
        "--adapter_dtype",
        choices=ADAPTER_DTYPES,
        default="float32",
        help="precision of adapters on NF4; 'keep': TRL's choice, bfloat16",
    )
    # The steps.
    add("--batch_size", type=int, default=8, metavar="N", help="sequences per micro-batch")
    add("--max_length", type=int, default=1024, metavar="N", help="tokens per sequence; all are taken to be so long")
    add("--gradient_accumulation_steps", type=int, default=1, metavar="N", help="micro-batches per step")
    add(
        "--gradient_checkpointing",
        type=_boolean,
        default=True,
        metavar="true|false",
        help="recompute what the backward pass needs (default: true)",
    )
    add("--optim", default="adamw_torch_fused", metavar="NAME", help="optimizer, by transformers' name")
    # The data.
    add("--rows", type=int, metavar="N", help="rows of your data: the plan says what an epoch of them takes")
    add("--epochs", type=float, default=1.0, metavar="X", help="epochs (default: 1)")
    add(
        "--seconds_per_step",
        type=float,
        metavar="X",
        help="of plain LoRA on your machine, as slsam-peft bench measures it: the plan says hours",
    )


def _help(field: Any) -> str:
    default = " (default: unset)" if field.default is None else ""
    return f"{field.metadata['help']}{default}".replace("%", "%%")


def _boolean(word: str) -> bool:
    if word.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{word!r} is neither true nor false")
    return word.lower() == "true"


def run(args: argparse.Namespace) -> int:
    """Print the plan.

    Raises:
        UserError: an unknown model or optimizer, a setting outside its range, or a budget out of reach.
    """
    _check(args)
    if not args.debug:
        silence_libraries()
    try:
        plan = make_plan(args, SLSAMConfig(**{name: getattr(args, name) for name in (*_NAMES, *_NUMBERS)}))
    except ValueError as error:
        raise UserError(str(error)) from error
    if args.json:
        sys.stdout.write(json.dumps(plan, indent=2) + "\n")
    else:
        from slsam_peft.cli.plan_tables import show

        show(plan, arms=args.arms)
    return 0


def _check(args: argparse.Namespace) -> None:
    least = {"lora_r": 1, "batch_size": 1, "max_length": 2, "gradient_accumulation_steps": 1, "rows": 1}
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and value < bound:
            raise UserError(f"--{name}={value} is not allowed; it must be {bound} or more.")
    for name in ("memory", "epochs", "seconds_per_step"):
        value = getattr(args, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"--{name}={value} is not allowed; it must be a finite number above 0.")
    if args.seconds_per_step is not None and args.rows is None:
        raise UserError(f"--seconds_per_step={args.seconds_per_step} needs --rows, the rows of your data.")
    sequences = args.batch_size * args.gradient_accumulation_steps
    if args.ascent_sequences is not None and args.ascent_sequences > sequences:
        raise UserError(
            f"--ascent_sequences={args.ascent_sequences} is more than the {sequences} sequences of a step, which is "
            "dense SAM's ascent; use --method sam, or fewer."
        )
    if args.use_bnb_nested_quant and not args.load_in_4bit:
        raise UserError("--use_bnb_nested_quant needs --load_in_4bit.")
    if args.ascent == "partial" and args.batch_size * args.gradient_accumulation_steps < 2:
        raise UserError(
            "--ascent partial takes a part of the step's sequences, and there is one; use a larger --batch_size or "
            "--gradient_accumulation_steps, or --ascent two_pass."
        )
    if args.ascent in RIDING and args.gradient_accumulation_steps > 1:
        raise UserError(
            f"--ascent {args.ascent} needs steps of one micro-batch, and --gradient_accumulation_steps is "
            f"{args.gradient_accumulation_steps}; use --ascent partial, where a micro-batch makes the ascent."
        )
