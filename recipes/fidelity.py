# python recipes/fidelity.py --output fidelity.json
"""How much of a small radius survives bfloat16: the gradient difference g' - g against the same in float32.

SmolLM2-135M-Instruct, LoRA r=8 on all linear layers, its B factors trained a little, four sequences of documentation.
For each radius and each way to perturb the script prints the cosine of g' - g with the float32 one, the ratio of their
lengths, and the ascent gain. The last way computes g' at a radius that bfloat16 resolves and scales the difference
back to the one asked for.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from slsam_peft import arms_of
from slsam_peft.integrations.smollm2 import fetch_smollm2
from slsam_peft.integrations.stdlib_docs import stdlib_docs
from slsam_peft.perturbation import Shift, ascent_offsets, perturbed

RADII = (0.003, 0.01, 0.05, 0.2)
RESOLVED = 0.05  # smallest radius whose difference bfloat16 still resolves (cosine about 0.95)
WARM_UP = 10  # AdamW steps in float32, so that B is not 0

# name: (base, adapters, autocast, perturbed by branch)
WAYS = {
    "float32 adapters, autocast, in place": (torch.bfloat16, torch.float32, True, False),
    "float32 adapters, autocast, branch": (torch.bfloat16, torch.float32, True, True),
    "bfloat16 adapters, in place": (torch.bfloat16, torch.bfloat16, False, False),
    "bfloat16 adapters, branch": (torch.bfloat16, torch.bfloat16, False, True),
}


class Probe:
    """One model in one precision, with its gradients on a fixed batch."""

    def __init__(self, folder: Path, batch: dict, base: torch.dtype, adapters: torch.dtype, autocast: bool) -> None:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=base)
        self.model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(adapters)
        self.batch, self.autocast = batch, autocast
        arms = arms_of(self.model, "tensor")
        self.parameters = [arm.parameters[0] for arm in arms]
        self.linears = [arm.linears[0] for arm in arms]

    def gradient(self) -> tuple[float, list[torch.Tensor]]:
        """Return the loss and the gradients."""
        self.model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext():
            loss = self.model(**self.batch).loss
        loss.backward()
        return float(loss), [p.grad.detach().clone() for p in self.parameters]

    @contextmanager
    def moved(self, gradients: list[torch.Tensor], rho: float, branch: bool) -> Iterator[None]:
        """Run the context at w + e."""
        norm = torch.stack(torch._foreach_norm(gradients, 2, torch.float32)).norm()
        offsets = ascent_offsets(gradients, norm, rho)
        linears = self.linears if branch else [None] * len(offsets)
        with perturbed([Shift(p, e, m) for p, e, m in zip(self.parameters, offsets, linears, strict=True)]):
            yield


def flat(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Return one float32 vector."""
    return torch.cat([g.float().flatten() for g in gradients])


def differences(probe: Probe, branch: bool, rho: float) -> tuple[torch.Tensor, float]:
    """Return g' - g and the ascent gain at radius `rho`."""
    loss, gradients = probe.gradient()
    with probe.moved(gradients, rho, branch):
        raised, shifted = probe.gradient()
    norm = float(flat(gradients).norm())
    return flat(shifted) - flat(gradients), (raised - loss) / (rho * norm)


def measure(folder: Path, batch: dict) -> list[dict]:
    """Return one row a way and radius."""
    reference = Probe(folder, batch, torch.float32, torch.float32, False)
    optimizer = torch.optim.AdamW(reference.parameters, lr=1e-3)
    for _ in range(WARM_UP):
        reference.gradient()
        optimizer.step()
    weights = [p.detach().clone() for p in reference.parameters]
    exact = {rho: differences(reference, True, rho) for rho in track(RADII, "float32")}
    rows = [{"way": "float32", "rho": r, "cosine": 1.0, "ratio": 1.0, "gain": exact[r][1]} for r in RADII]
    for way, (base, adapters, autocast, branch) in WAYS.items():
        probe = Probe(folder, batch, base, adapters, autocast)
        with torch.no_grad():
            torch._foreach_copy_(probe.parameters, weights)
        found = {rho: differences(probe, branch, rho) for rho in track(RADII, way)}
        rows += [row(way, rho, found[rho], exact[rho]) for rho in RADII]
        if branch:
            resolved, gain = found[RESOLVED]
            rows += [
                row(f"{way}, scaled from {RESOLVED}", rho, (resolved * (rho / RESOLVED), gain), exact[rho])
                for rho in RADII
                if rho < RESOLVED
            ]
    return rows


def row(way: str, rho: float, found: tuple[torch.Tensor, float], exact: tuple[torch.Tensor, float]) -> dict:
    """Compare a difference with the float32 one."""
    d, e = found[0], exact[0]
    cosine = float(torch.nn.functional.cosine_similarity(d, e, dim=0))
    return {"way": way, "rho": rho, "cosine": cosine, "ratio": float(d.norm() / e.norm()), "gain": found[1]}


def main() -> None:
    """Measure, print the table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub name or folder; SmolLM2-135M-Instruct where it is missing")
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    arguments = parser.parse_args()
    folder = arguments.model or fetch_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [r["prompt"] + r["completion"] for r in stdlib_docs(n_train=4, n_test=1)["train"]]
    texts = [tokenizer.apply_chat_template(m, tokenize=False) for m in messages]
    batch = dict(tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=128))
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    rows = measure(folder, batch)
    table = Table("way", "rho", "cosine", "length ratio", "ascent gain")
    for r in rows:
        table.add_row(r["way"], f"{r['rho']:g}", f"{r['cosine']:.3f}", f"{r['ratio']:.2f}", f"{r['gain']:.2f}")
    Console().print(table)
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
