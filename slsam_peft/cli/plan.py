"""`slsam-peft plan` tells what training will cost and whether it fits, from a model's configuration alone."""

import argparse
import json
import math
import sys
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from slsam_peft.cli.parsing import DTYPES
from slsam_peft.cli.quiet import silence_libraries
from slsam_peft.config import (
    ADAPTER_DTYPES,
    ASCENTS,
    BANDITS,
    DESCENTS,
    DESIGNS,
    GRANULARITIES,
    METHODS,
    RADII,
    RIDING,
    SLSAMConfig,
)
from slsam_peft.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from slsam_peft.algorithm.arms import Arm
    from slsam_peft.cost.expected import ExpectedCost
    from slsam_peft.cost.model import Rule

NAME = "plan"
HELP = "Say what a step will cost and whether its memory fits, from a model's configuration alone"

GIB = 2**30
CARDS_GIB = (4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 80, 96, 141, 192)  # memory of GPUs that are sold
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
        plan = make_plan(args)
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


def make_plan(args: argparse.Namespace) -> dict[str, Any]:
    """Return the plan as plain values.

    Returns:
        `dict`: `"model"`, `"arms"`, `"cost"`, `"fallbacks"` (what will run otherwise than meant, each with `"what"`,
            `"why"` and `"costs"`), `"epoch"` (`None` without `--rows`), `"memory"` (bytes),
            `"plain_memory"` (plain LoRA's total), `"no_more_memory"` (the total where the ascent runs in a small pass
            of its own; `None` where it does), `"memory_gib"` (what it must fit; `None` where that is not known),
            `"fits"` (the same) and `"smallest_card_gib"` (memory of the smallest GPU that holds it).

    Raises:
        ValueError: a setting outside its range, or a budget out of reach.
        UserError: an unknown model or optimizer.
    """
    config = SLSAMConfig(**{name: getattr(args, name) for name in (*_NAMES, *_NUMBERS)})
    import torch

    from slsam_peft.algorithm.arms import arms_of
    from slsam_peft.algorithm.ascents import Ascent
    from slsam_peft.cost.expected import ExpectedCost, rule_of
    from slsam_peft.cost.memory import OPTIMIZERS, MemorySettings, memory_of
    from slsam_peft.cost.model import CostModel, Rule
    from slsam_peft.models.foresight import counts_in_part, foreseen, has_router_losses, plans_in_part
    from slsam_peft.models.shapes import meta_model, whole_config

    if args.optim not in OPTIMIZERS:
        raise UserError(f"--optim={args.optim!r} is not known to the plan; known: {', '.join(sorted(OPTIMIZERS))}.")
    # The model, on the meta device, and its arms.
    dtype = getattr(torch, args.dtype)
    float32 = args.adapter_dtype == "float32" or not args.load_in_4bit
    targets = args.lora_target_modules[0] if args.lora_target_modules == ["all-linear"] else args.lora_target_modules
    config_of_all = whole_config(args.model)
    model = meta_model(config_of_all.get_text_config(), dtype, args.lora_r, targets, float32)
    arms = arms_of(model, config.granularity)
    cost = CostModel.from_model(model, args.gradient_checkpointing, blocks=arms.blocks)
    # What a step of it costs.
    shapes = [(args.batch_size, args.max_length)] * args.gradient_accumulation_steps
    routed = has_router_losses(model)
    rule = rule_of(config, rides=not routed)
    expected = ExpectedCost(cost, arms, config, shapes, replace(rule, reused=0) if routed else rule)
    fraction = _fraction(config, expected)
    # What it holds at the peak, and what that fits.
    settings = MemorySettings(
        optimizer=args.optim,
        four_bit=args.load_in_4bit,
        nested=args.use_bnb_nested_quant,
        compute_dtype=dtype,
        hidden_state_cache_limit_bytes=config.hidden_state_cache_limit_mib * 2**20,
    )
    rule = expected.rule
    parts = config.resolved
    looks_ahead = parts.is_perturbed and parts.ascent == "auto" and parts.descent == "all"

    def memory_under(other: "Rule") -> dict[str, float]:
        return memory_of(model, cost, shapes, other, settings, fraction)

    memory = memory_under(rule)
    apart = rule_of(config, rides=False) if rule.stacked(shapes) and config.resolved.ascent == "auto" else None
    room, total = args.memory or _own_memory(), memory["total"] / GIB
    return {
        "model": _model_facts(args, model),
        "arms": _arm_rows(arms, expected, fraction),
        "cost": _cost_facts(config.resolved, expected, fraction),
        "fallbacks": [
            fallback._asdict()
            for fallback in (
                plans_in_part(config_of_all) or counts_in_part(model, cost.decoder.block_names[0]),
                *foreseen(model, arms, looks_ahead=looks_ahead, micro_batches=args.gradient_accumulation_steps),
            )
            if fallback is not None
        ],
        "epoch": _epoch_facts(args, expected(fraction)),
        "memory": memory,
        "plain_memory": memory_under(Rule(ascent=Ascent()))["total"],
        "no_more_memory": None if apart is None else memory_under(apart)["total"],
        "memory_gib": room,
        "fits": None if room is None else total <= room,
        "smallest_card_gib": next((size for size in CARDS_GIB if total <= size), None),
    }


def _own_memory() -> float | None:
    """Return the memory of this machine's first GPU in GiB, or `None` where it has none."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else None


def _fraction(config: SLSAMConfig, expected: "ExpectedCost") -> float:
    config = config.resolved
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
        "micro_batches": args.gradient_accumulation_steps,
        "batch_size": args.batch_size,
        "max_length": args.max_length,
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


def _epoch_facts(args: argparse.Namespace, ratio: float) -> dict[str, Any] | None:
    """Return steps and hours of an epoch, `None` where nothing is known of the data."""
    if args.rows is None:
        return None
    steps = math.ceil(args.rows / (args.batch_size * args.gradient_accumulation_steps))
    hours = None if args.seconds_per_step is None else steps * args.seconds_per_step / 3600
    return {
        "rows": args.rows,
        "epochs": args.epochs,
        "steps": steps,
        "plain_hours": hours,
        "hours": None if hours is None else hours * ratio,
    }


def _cost_facts(config: SLSAMConfig, expected: "ExpectedCost", fraction: float) -> dict[str, Any]:
    plain = expected.model.plain(expected.shapes)
    relative = expected(fraction)
    shapes, rule = expected.shapes, expected.rule
    rides = rule.stacked(shapes)
    ascent = rule.ascent.riding(shapes[0][0]) if rides else sum(n for n, _ in rule.ascent_shapes(shapes))
    return {
        "sequences": sum(n for n, _ in shapes),
        "ascent_sequences": ascent,
        "rides": rides,
        "method": config.method,
        "plain_flops": plain,
        "dense_sam": expected.model.dense_sam(expected.shapes) / plain,
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
