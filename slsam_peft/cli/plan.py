"""`slsam-peft plan`: what training will cost and whether it fits, from a model's configuration alone."""

import argparse
import json
import logging
import sys
import warnings
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from slsam_peft.config import ASCENTS, DESCENTS, DESIGNS, GRANULARITIES, SLSAMConfig
from slsam_peft.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from slsam_peft.algorithm.arms import Arm
    from slsam_peft.cost.expected import ExpectedCost

NAME = "plan"
HELP = "Cost of an update and memory, by part, from a model's configuration alone"

GIB = 2**30
_NAMES = {"ascent": ASCENTS, "descent": DESCENTS, "design": DESIGNS, "granularity": GRANULARITIES}
_NUMBERS = (
    "rho",
    "active_fraction",
    "ascent_fraction",
    "cost_budget",
    "min_probability",
    "hidden_state_cache_limit_mib",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags; those of `SLSAMConfig` and TRL keep their names."""
    parser.add_argument(
        "--model",
        "--model_name_or_path",
        required=True,
        help="built-in shape (llama-3.1-8b, llama-3.1-70b, qwen2.5-7b, smollm2-135m, ...), folder, JSON file, Hub ID",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, every arm in it, and no tables")
    parser.add_argument("--gpu_gib", type=float, default=24.0, help="memory of the GPU in GiB (default: 24)")
    _add_training(parser.add_argument_group("training"))
    settings = parser.add_argument_group("SL-SAM")
    known = {field.name: field for field in fields(SLSAMConfig)}
    for name, allowed in _NAMES.items():
        settings.add_argument(f"--{name}", choices=allowed, default=known[name].default, help=_help(known[name]))
    for name in _NUMBERS:
        settings.add_argument(f"--{name}", type=float, default=known[name].default, help=_help(known[name]))


def _add_training(group: Any) -> None:
    add = group.add_argument
    add("--load_in_4bit", action="store_true", help="frozen linear modules in NF4")
    add("--use_bnb_nested_quant", action="store_true", help="with their absmax quantised too")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of weights and computation")
    add("--lora_r", type=int, default=16, help="rank (default: 16)")
    add("--lora_target_modules", nargs="+", default=["all-linear"], help="default: all-linear")
    add(
        "--adapter_dtype", choices=("float32", "keep"), default="float32", help="'keep': TRL's choice, bfloat16 on NF4"
    )
    add("--batch_size", "--per_device_train_batch_size", type=int, default=8, help="default: 8, as in TRL")
    add("--seq_len", "--max_length", type=int, default=1024, help="length of every sequence (default: 1024)")
    add("--gradient_accumulation", "--gradient_accumulation_steps", type=int, default=1, help="default: 1")
    add("--gradient_checkpointing", type=_boolean, default=True, metavar="true|false", help="default: true")
    add("--optim", default="adamw_torch_fused", help="transformers' name (default: adamw_torch_fused)")


def _help(field: Any) -> str:
    return f"{field.metadata['help']} (default: {field.default})".replace("%", "%%")


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
    # What other libraries say on import, about kernels that a plan never runs, would only bury the answer.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plan = make_plan(args)
    except ValueError as error:
        raise UserError(str(error)) from error
    if args.json:
        sys.stdout.write(json.dumps(plan, indent=2) + "\n")
    else:
        from slsam_peft.cli.plan_tables import show

        show(plan)
    return 0


def _check(args: argparse.Namespace) -> None:
    least = {"lora_r": 1, "batch_size": 1, "seq_len": 2, "gradient_accumulation": 1}
    for name, bound in least.items():
        if getattr(args, name) < bound:
            raise UserError(f"--{name}={getattr(args, name)} is not allowed; it must be {bound} or more.")
    if not args.gpu_gib > 0:
        raise UserError(f"--gpu_gib={args.gpu_gib} is not allowed; it must be more than 0.")
    if args.use_bnb_nested_quant and not args.load_in_4bit:
        raise UserError("--use_bnb_nested_quant needs --load_in_4bit.")
    if args.ascent == "partial" and args.batch_size * args.gradient_accumulation < 2:
        raise UserError(
            "--ascent partial takes a part of the update's sequences, and there is one; use a larger --batch_size or "
            "--gradient_accumulation, or --ascent two_pass."
        )
    if args.ascent == "ahead" and args.gradient_accumulation > 1:
        raise UserError(
            f"--ascent ahead needs updates of one micro-batch, and --gradient_accumulation is "
            f"{args.gradient_accumulation}; use --ascent partial, where a micro-batch makes the ascent."
        )


def make_plan(args: argparse.Namespace) -> dict[str, Any]:
    """Return the plan as plain values: `"model"`, `"arms"`, `"cost"`, `"memory"` (bytes) and `"fits"`.

    Raises:
        ValueError: a setting outside its range, or a budget out of reach.
        UserError: an unknown model or optimizer.
    """
    config = SLSAMConfig(**{name: getattr(args, name) for name in (*_NAMES, *_NUMBERS)})
    import torch

    from slsam_peft.algorithm.arms import arms_of
    from slsam_peft.cost.expected import ExpectedCost, rule_of
    from slsam_peft.cost.memory import OPTIMIZERS, MemorySettings, memory_of
    from slsam_peft.cost.model import CostModel
    from slsam_peft.models.shapes import find_config, meta_model

    if args.optim not in OPTIMIZERS:
        raise UserError(f"--optim={args.optim!r} is not known to the plan; known: {', '.join(sorted(OPTIMIZERS))}.")
    dtype = getattr(torch, args.dtype)
    float32 = args.adapter_dtype == "float32" or not args.load_in_4bit
    targets = args.lora_target_modules[0] if args.lora_target_modules == ["all-linear"] else args.lora_target_modules
    model = meta_model(find_config(args.model), dtype, args.lora_r, targets, float32)
    arms = arms_of(model, config.granularity)
    cost = CostModel.from_model(model, args.gradient_checkpointing, blocks=arms.blocks)
    shapes = [(args.batch_size, args.seq_len)] * args.gradient_accumulation
    expected = ExpectedCost(cost, arms, config, shapes)
    fraction = _fraction(config, expected)
    settings = MemorySettings(
        optimizer=args.optim,
        four_bit=args.load_in_4bit,
        nested=args.use_bnb_nested_quant,
        compute_dtype=dtype,
        hidden_state_cache_limit_bytes=config.hidden_state_cache_limit_mib * 2**20,
    )
    memory = memory_of(model, cost, shapes, rule_of(config), settings)
    return {
        "model": _model_facts(args, model),
        "arms": _arm_rows(arms, expected, fraction),
        "cost": _cost_facts(config, expected, fraction),
        "memory": memory,
        "gpu_gib": args.gpu_gib,
        "fits": memory["total"] <= args.gpu_gib * GIB,
    }


def _fraction(config: SLSAMConfig, expected: "ExpectedCost") -> float:
    if config.cost_budget is not None:
        return expected.solve(config.cost_budget)
    if config.active_fraction is not None and config.active_fraction < expected.least_fraction:
        raise ValueError(
            f"active_fraction={config.active_fraction} of {len(expected.arms)} arms is less than one arm; use at "
            f"least {expected.least_fraction:.3g}, or a finer granularity."
        )
    return max(config.fraction, expected.least_fraction)


def _model_facts(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return {
        "name": args.model,
        "parameters": total - trained,
        "trainable_parameters": trained,
        "micro_batches": args.gradient_accumulation,
        "batch_size": args.batch_size,
        "seq_len": args.seq_len,
        "gradient_checkpointing": args.gradient_checkpointing,
        "four_bit": args.load_in_4bit,
    }


def _arm_rows(arms: "Sequence[Arm]", expected: "ExpectedCost", fraction: float) -> list[dict[str, Any]]:
    inclusion = expected.inclusion(fraction).tolist()
    return [
        {
            "name": arm.name,
            "parameters": arm.size,
            "forward_flops": expected.model.forward_flops(arm.parameter_names, expected.shapes),
            "inclusion": p,
        }
        for arm, p in zip(arms, inclusion, strict=True)
    ]


def _cost_facts(config: SLSAMConfig, expected: "ExpectedCost", fraction: float) -> dict[str, Any]:
    plain = expected.model.plain(expected.shapes)
    relative = expected(fraction)
    return {
        "plain_flops": plain,
        "lora_sam": expected.model.lora_sam(expected.shapes) / plain,
        "expected": relative,
        "expected_flops": relative * plain,
        "least": expected(expected.least_fraction),
        "most": expected(1.0),
        "active_fraction": fraction,
        "budget": config.cost_budget,
        "design": config.design,
        "ascent": config.ascent,
        "descent": config.descent,
    }
