"""The plan as tables."""

from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table

GIB = 2**30
_PARTS = {
    "weights": "frozen weights",
    "adapters": "adapters",
    "gradients": "their gradients",
    "perturbation": "perturbation e",
    "remembered": "remembered gradients (bfloat16)",
    "optimizer": "optimizer states",
    "activations": "kept for the backward pass",
    "block": "one block's graph, unpacked weight included",
    "logits": "logits tile of the fused head",
    "prefix": "hidden states kept between the passes",
    "runtime": "CUDA context and workspaces (assumed)",
}


def show(plan: dict[str, Any]) -> None:
    """Print the plan to the terminal."""
    console = Console(highlight=False)
    facts = plan["model"]
    console.print(
        f"[bold]{facts['name']}[/bold]: {_count(facts['parameters'])} parameters"
        f"{' in NF4' if facts['four_bit'] else ''}, {_count(facts['trainable_parameters'])} in adapters; an update is "
        f"{facts['micro_batches']} x {facts['batch_size']} sequences of {facts['seq_len']} tokens, gradient "
        f"checkpointing {'on' if facts['gradient_checkpointing'] else 'off'}."
    )
    console.print(_arms(plan["arms"]))
    console.print(_cost(plan["cost"]))
    console.print(_memory(plan["memory"]))
    console.print(_verdict(plan))


def _arms(rows: list[dict[str, Any]]) -> Table:
    """Arms in order; neighbours with equal numbers share a row."""
    table = Table("arms", title=f"{len(rows)} arms", title_justify="left")
    for heading in ("parameters each", "forward GFLOPs each", "inclusion"):
        table.add_column(heading, justify="right")
    for numbers, group in groupby(rows, key=lambda r: (r["parameters"], r["forward_flops"], round(r["inclusion"], 4))):
        names = [row["name"] for row in group]
        name = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]} ({len(names)})"
        table.add_row(name, f"{numbers[0]:,}", f"{numbers[1] / 1e9:,.1f}", f"{numbers[2]:.3f}")
    return table


def _cost(cost: dict[str, Any]) -> Table:
    table = Table("an update costs", title="Cost (matmul FLOPs)", title_justify="left")
    table.add_column("TFLOPs", justify="right")
    table.add_column("plain LoRA = 1", justify="right")
    plain = cost["plain_flops"] / 1e12
    name = f"SL-SAM, {cost['design']}, {cost['ascent']}, active_fraction {cost['active_fraction']:.3f}"
    if cost["descent"] == "all":
        name += ", every arm trained"
    for label, ratio in (
        ("plain LoRA", 1.0),
        ("LoRA-SAM", cost["lora_sam"]),
        (f"{name} (expected)", cost["expected"]),
    ):
        table.add_row(label, f"{ratio * plain:,.2f}", f"{ratio:.3f}")
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
    total, room = plan["memory"]["total"] / GIB, plan["gpu_gib"]
    if plan["fits"]:
        return f"Fits a GPU of {room:g} GiB with {room - total:.1f} GiB to spare, fragmentation not counted."
    ways = [] if plan["model"]["four_bit"] else ["--load_in_4bit"]
    ways += [] if plan["model"]["gradient_checkpointing"] else ["--gradient_checkpointing true"]
    ways += ["a smaller --batch_size with more --gradient_accumulation", "--optim paged_adamw_8bit"]
    return f"Does not fit a GPU of {room:g} GiB: {total - room:.1f} GiB too much. Try {', '.join(ways)}."


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return str(number)
