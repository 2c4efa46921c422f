# python recipes/fidelity.py --output fidelity.json
"""How much of a small radius survives bfloat16: the gradient difference g' - g against the same in float32.

SmolLM2-135M-Instruct, LoRA r=8 on all linear layers, its B factors trained a little, four sequences of documentation.
For each radius and each precision the script prints the cosine of g' - g with the float32 one, the ratio of their
lengths, and the ascent gain. The last rows compute g' at a radius that bfloat16 resolves and scale the difference back
to the one asked for.

With `--gains` it prints instead what the watch on the radius would see: the ascent gains of 20 batches, and whether
the warning would come.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from slsam_peft import arms_of
from slsam_peft.algorithm.perturbation import Perturbation
from slsam_peft.algorithm.radius import Length
from slsam_peft.algorithm.swap import sites_of
from slsam_peft.algorithm.telemetry import LOST_SHARE, LOW_GAIN, WATCHED_STEPS
from slsam_peft.data.stdlib_docs import stdlib_docs
from slsam_peft.models.smollm2 import fetch_smollm2

RADII = (0.003, 0.01, 0.05, 0.2)
RESOLVED = 0.05  # smallest radius whose difference bfloat16 still resolves (cosine about 0.95)
WARM_UP = 10  # AdamW steps in float32, so that B is not 0

# name: (base, adapters, autocast)
WAYS = {
    "float32 adapters, autocast": (torch.bfloat16, torch.float32, True),
    "bfloat16 adapters": (torch.bfloat16, torch.bfloat16, False),
}


class Probe:
    """One model in one precision, with its gradients on a fixed batch."""

    def __init__(self, folder: Path, batch: dict, base: torch.dtype, adapters: torch.dtype, autocast: bool) -> None:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=base, trust_remote_code=False)
        self.model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(adapters)
        self.batch, self.autocast = batch, autocast
        self.parameters = [arm.parameters[0] for arm in arms_of(self.model, "tensor")]
        self.sites = sites_of(self.model, self.parameters)

    def loss(self) -> float:
        """Return the loss alone."""
        with torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext():
            return float(self.model(**self.batch).loss)

    def gradient(self) -> tuple[float, list[torch.Tensor]]:
        """Return the loss and the gradients."""
        for parameter in self.parameters:  # in a pass at w + e the model's own list has w + e in it
            parameter.grad = None
        with torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext():
            loss = self.model(**self.batch).loss
        loss.backward()
        return float(loss.detach()), [p.grad.detach().clone() for p in self.parameters]

    @contextmanager
    def moved(self, gradients: list[torch.Tensor], rho: float) -> Iterator[None]:
        """Run the context at w + e, as a step does."""
        norm = torch.stack(torch._foreach_norm(gradients, 2, torch.float32)).norm()
        offsets = Length(rho).offsets(gradients, self.parameters, norm, torch.ones_like(norm)).offsets
        with Perturbation(self.parameters, offsets, self.sites).applied():
            yield


def flat(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Return one float32 vector."""
    return torch.cat([g.float().flatten() for g in gradients])


def differences(probe: Probe, rho: float) -> tuple[torch.Tensor, float]:
    """Return g' - g and the ascent gain at radius `rho`."""
    loss, gradients = probe.gradient()
    with probe.moved(gradients, rho):
        raised, shifted = probe.gradient()
    norm = float(flat(gradients).norm())
    return flat(shifted) - flat(gradients), (raised - loss) / (rho * norm)


def measure(folder: Path, batch: dict) -> list[dict]:
    """Return one row per way and radius."""
    # The reference: float32 throughout, and adapters that have begun to learn.
    reference = Probe(folder, batch, torch.float32, torch.float32, False)
    optimizer = torch.optim.AdamW(reference.parameters, lr=1e-3)
    for _ in range(WARM_UP):
        reference.gradient()
        optimizer.step()
    weights = [p.detach().clone() for p in reference.parameters]
    exact = {rho: differences(reference, rho) for rho in track(RADII, "float32")}
    rows = [{"way": "float32", "rho": r, "cosine": 1.0, "ratio": 1.0, "gain": exact[r][1]} for r in RADII]
    # Every other way starts from the same weights.
    for way, (base, adapters, autocast) in WAYS.items():
        probe = Probe(folder, batch, base, adapters, autocast)
        with torch.no_grad():
            torch._foreach_copy_(probe.parameters, weights)
        found = {rho: differences(probe, rho) for rho in track(RADII, way)}
        rows += [row(way, rho, found[rho], exact[rho]) for rho in RADII]
        resolved, gain = found[RESOLVED]
        rows += [
            row(f"{way}, scaled from {RESOLVED}", rho, (resolved * (rho / RESOLVED), gain), exact[rho])
            for rho in RADII
            if rho < RESOLVED
        ]
    return rows


def gains(folder: Path, batches: list[dict]) -> list[dict]:
    """Return the ascent gains over several batches, and whether they raise the warning."""
    rows = []
    for name, base, autocast, radii in (
        ("bfloat16", torch.bfloat16, True, (0.003, 0.01, 0.02, 0.05, 0.2)),
        ("float32", torch.float32, False, (0.003, 0.05)),
    ):
        probe = Probe(folder, batches[0], base, torch.float32, autocast)
        # B is 0 at first, and the loss rises in no direction of A.
        optimizer = torch.optim.AdamW(probe.parameters, lr=1e-3)
        for _ in range(WARM_UP):
            probe.gradient()
            optimizer.step()
        seen: dict[float, list[float]] = {rho: [] for rho in radii}
        for probe.batch in track(batches, name):
            loss, gradients = probe.gradient()
            norm = float(flat(gradients).norm())
            for rho in radii:
                with probe.moved(gradients, rho), torch.no_grad():
                    seen[rho].append((probe.loss() - loss) / (rho * norm))
        # The watch warns where enough gains are low.
        for rho, values in seen.items():
            low = sum(value < LOW_GAIN for value in values) / len(values)
            rows.append({"precision": name, "rho": rho, "low": low, "warns": low >= LOST_SHARE, "gains": values})
    return rows


def row(way: str, rho: float, found: tuple[torch.Tensor, float], exact: tuple[torch.Tensor, float]) -> dict:
    """Compare a difference with the float32 one."""
    d, e = found[0], exact[0]
    cosine = float(torch.nn.functional.cosine_similarity(d, e, dim=0))
    return {"way": way, "rho": rho, "cosine": cosine, "ratio": float(d.norm() / e.norm()), "gain": found[1]}


def batches(tokenizer: Any, count: int) -> list[dict]:
    """Return batches of four documentation pairs."""
    messages = [r["prompt"] + r["completion"] for r in stdlib_docs(n_train=4 * count, n_test=1)["train"]]
    texts = [tokenizer.apply_chat_template(m, tokenize=False) for m in messages]
    out = []
    for start in range(0, len(texts), 4):
        chunk = texts[start : start + 4]
        batch = dict(tokenizer(chunk, return_tensors="pt", padding=True, truncation=True, max_length=128))
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        out.append(batch)
    return out


def main() -> None:
    """Measure, print the table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub name or folder; SmolLM2-135M-Instruct where it is missing")
    parser.add_argument("--gains", action="store_true", help="the ascent gains of 20 batches instead")
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    arguments = parser.parse_args()
    # One of two measurements, as a table and, if asked for, as a file.
    folder = arguments.model or fetch_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if arguments.gains:
        rows = gains(folder, batches(tokenizer, WATCHED_STEPS))
        table = Table("precision", "rho", f"share of gains below {LOW_GAIN}", "least", "median", "warns")
        for r in rows:
            ordered = sorted(r["gains"])
            numbers = (r["low"], ordered[0], ordered[len(ordered) // 2])
            table.add_row(r["precision"], f"{r['rho']:g}", *(f"{n:.2f}" for n in numbers), str(r["warns"]))
    else:
        rows = measure(folder, batches(tokenizer, 1)[0])
        table = Table("way", "rho", "cosine", "length ratio", "ascent gain")
        for r in rows:
            table.add_row(r["way"], f"{r['rho']:g}", f"{r['cosine']:.3f}", f"{r['ratio']:.2f}", f"{r['gain']:.2f}")
    Console().print(table)
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
