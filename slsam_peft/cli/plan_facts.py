"""Works out what `slsam-peft plan` tells: cost, memory and hours, of the shapes of a model alone."""

import argparse
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from slsam_peft.config import SLSAMConfig
from slsam_peft.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from slsam_peft.algorithm.arms import Arm
    from slsam_peft.cost.expected import ExpectedCost
    from slsam_peft.cost.model import Rule

GIB = 2**30
CARDS_GIB = (4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 80, 96, 141, 192)  # memory of GPUs that are sold


def make_plan(args: argparse.Namespace, config: SLSAMConfig) -> dict[str, Any]:
    """Return the plan as plain values.

    Args:
        args (`argparse.Namespace`): The flags of `slsam-peft plan`, checked.
        config (`SLSAMConfig`): What they set of the algorithm.

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
    """Return the share of active arms, as training settles it; a budget is solved for."""
    from slsam_peft.algorithm.assembly import fraction_of

    config = config.resolved
    solved = None if config.cost_budget is None else expected.solve(config.cost_budget)
    return fraction_of(config, len(expected.arms), solved)


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
