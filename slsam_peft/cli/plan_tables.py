"""Shows the plan as tables."""

import os
import re
from typing import Any

from rich.console import Console
from rich.table import Table

from slsam_peft.presets import RIDING

GIB = 2**30
LISTED_ARMS = 40  # longer lists are shown by kind
_PARTS = {
    "weights": "frozen weights",
    "adapters": "adapters",
    "gradients": "their gradients",
    "perturbation": "perturbation",
    "kept_by_rule": "kept by the rule (second adapter and its moments, or what rounding leaves)",
    "noise": "noise on one weight",
    "gradient_memory": "gradients kept for the next step (bfloat16)",
    "optimizer": "optimizer states",
    "activations": "kept for the backward pass",
    "block": "one block's graph, unpacked weight included",
    "logits": "logits tile of the fused head",
    "hidden_state_cache": "hidden states kept between the passes",
    "runtime": "CUDA context and workspaces (assumed)",
}


def show(plan: dict[str, Any], *, arms: bool = False) -> None:
    """Print the plan to the terminal: the answer first, then what it is made of.

    Args:
        plan (`dict`): From `make_plan`.
        arms (`bool`, *optional*, defaults to `False`): List the arms, too.
    """
    console = Console(highlight=False)
    facts = plan["model"]
    console.print(
        f"[bold]{facts['name']}[/bold]: {_count(facts['parameters'])} parameters"
        f"{' in NF4' if facts['four_bit'] else ''}, {_count(facts['trainable_parameters'])} in adapters; a step is "
        f"{facts['micro_batches']} x {facts['batch_size']} sequences of {facts['max_length']} tokens, gradient "
        f"checkpointing {'on' if facts['gradient_checkpointing'] else 'off'}."
    )
    answers = {"Cost": _price(plan["cost"]), "Epoch": _epoch(plan), "Memory": _need(plan), "Fits": _verdict(plan)}
    for name, answer in answers.items():
        if answer:
            console.print(f"[bold]{name}[/bold]: {answer}")
    for fallback in plan["fallbacks"]:
        console.print(f"[bold]Falls back[/bold]: {fallback['what']}: {fallback['why']}. {fallback['costs']}")
    console.print()
    console.print(_cost(plan["cost"]))
    console.print(_memory(plan["memory"]))
    if arms:
        console.print(_arms(plan["arms"]))


def _price(cost: dict[str, Any]) -> str:
    n, m = cost["sequences"], cost["ascent_sequences"]
    if not m:
        how = ""
    elif m == n:
        how = ", all of which make the ascent,"
    else:
        where = ", beside the step before," if cost["rides"] else ", in a small pass of its own,"
        how = f", {m} of which make{'s' if m == 1 else ''} the ascent{where}"
    share = f"1 + {m}/{n}; " if 0 < m < n and cost["descent"] == "all" else ""
    return (
        f"a step on {n} sequence{'' if n == 1 else 's'}{how} is expected to cost {cost['expected']:.2f} plain LoRA "
        f"steps on the same {n} ({share}dense SAM: {cost['dense_sam']:.2f})."
    )


def _epoch(plan: dict[str, Any]) -> str:
    """Return what an epoch takes; empty where the rows are not known."""
    epoch, ratio = plan["epoch"], plan["cost"]["expected"]
    if epoch is None:
        return ""
    steps = f"{epoch['rows']:,} rows are {epoch['steps']:,} steps"
    if epoch["hours"] is None:
        return f"{steps}, each {ratio:.2f} times as long as plain LoRA's. --seconds_per_step X says hours."
    total = f" (of {epoch['epochs']:g}: {epoch['hours'] * epoch['epochs']:.2f} h)" if epoch["epochs"] != 1 else ""
    return f"{steps}, {epoch['hours']:.2f} h{total}; plain LoRA {epoch['plain_hours']:.2f} h."


def _need(plan: dict[str, Any]) -> str:
    total, plain, apart = plan["memory"]["total"], plan["plain_memory"], plan["no_more_memory"]
    said = f"{total / GIB:.2f} GiB at the peak, fragmentation not counted (plain LoRA: {plain / GIB:.2f})."
    if apart is not None and apart < total:
        flags = "--method auto --ascent partial"
        said += f" {flags}, a small pass for the ascent, costs the same and takes {apart / GIB:.2f}."
    return said


def _arms(rows: list[dict[str, Any]]) -> Table:
    """Arms in order; long lists by kind, with the range of their probabilities."""
    # What all names begin with is said once; of many arms those that differ in a number only share a line.
    table = Table("arms", title=f"{len(rows)} arms", title_justify="left")
    for heading in ("parameters", "forward GFLOPs", "inclusion"):
        table.add_column(heading, justify="right", no_wrap=True)
    shown = os.path.commonprefix([row["name"] for row in rows]).rfind(".") + 1
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        name = row["name"][shown:]
        kind = name if len(rows) <= LISTED_ARMS else re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        groups.setdefault((kind, row["parameters"], row["forward_flops"]), []).append(row)
    # A probability that differs within a line is shown as a range.
    for (kind, parameters, flops), group in groups.items():
        many = len(group) > 1
        low, high = min(row["inclusion"] for row in group), max(row["inclusion"] for row in group)
        table.add_row(
            f"{kind} ({len(group)})" if many else kind,
            f"{parameters:,}{' each' if many else ''}",
            f"{flops / 1e9:,.1f}{' each' if many else ''}",
            f"{low:.3f}" if high - low < 5e-4 else f"{low:.3f} to {high:.3f}",
        )
    if shown:
        table.caption = f"names are below {rows[0]['name'][: shown - 1]}"
    return table


def _cost(cost: dict[str, Any]) -> Table:
    table = Table("a step costs", title="Cost (matmul FLOPs)", title_justify="left")
    table.add_column("TFLOPs", justify="right")
    table.add_column("plain LoRA = 1", justify="right")
    plain = cost["plain_flops"] / 1e12
    method = f"method {cost['method']}, " if cost["method"] else ""
    name = f"SL-SAM, {method}{cost['design']}, {cost['ascent']}, active_fraction {cost['active_fraction']:.3f}"
    if cost["descent"] == "all":
        name += ", all trained"
    for label, ratio in (
        ("plain LoRA", 1.0),
        ("dense SAM", cost["dense_sam"]),
        (f"{name} (expected)", cost["expected"]),
    ):
        table.add_row(label, f"{ratio * plain:,.2f}", f"{ratio:.3f}")
    if cost["method"] in (None, "depth") and cost["ascent"] not in RIDING:  # others take no budget
        table.caption = f"within reach of cost_budget: {cost['least']:.3f} to {cost['most']:.3f}"
    return table


def _memory(memory: dict[str, float]) -> Table:
    table = Table("memory", title="Memory at the peak", title_justify="left")
    table.add_column("GiB", justify="right")
    for part, label in _PARTS.items():
        if memory[part]:
            table.add_row(label, f"{memory[part] / GIB:.3f}")
    table.add_section()
    table.add_row("total (the larger of graph and tile)", f"[bold]{memory['total'] / GIB:.2f}[/bold]")
    return table


def _verdict(plan: dict[str, Any]) -> str:
    total, room, card = plan["memory"]["total"] / GIB, plan["memory_gib"], plan["smallest_card_gib"]
    if room is None:
        if card is None:
            return f"no single GPU that is sold. Try {_ways(plan['model'])}."
        return f"GPUs of {card} GiB or more. --memory GIB asks about one size."
    if plan["fits"]:
        return f"yes, a GPU of {room:.4g} GiB has {room - total:.1f} GiB to spare."
    smallest = "" if card is None else f" It fits GPUs of {card} GiB or more."
    return f"no, a GPU of {room:.4g} GiB lacks {total - room:.1f} GiB. Try {_ways(plan['model'])}.{smallest}"


def _ways(facts: dict[str, Any]) -> str:
    """Name the flags that save memory and are not in use yet."""
    ways = [] if facts["four_bit"] else ["--load_in_4bit"]
    ways += [] if facts["gradient_checkpointing"] else ["--gradient_checkpointing true"]
    ways += ["a smaller --batch_size with more --gradient_accumulation_steps", "--optim paged_adamw_8bit"]
    return ", ".join(ways)


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return str(number)
