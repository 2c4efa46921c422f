"""Checks whether an adapter is undamaged, fits its base, and computes what it did when it was saved."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.save_and_load import get_peft_model_state_dict

from slsam_peft.adapters.load import Adapter, base_config, fit, load_adapted, raw_tensors
from slsam_peft.models.load import Tell
from slsam_peft.saving.record import differing, part_of, probe_logits

# A share of the recorded logits' standard deviation: kernels sum in other orders on other machines.
PROBE_TOLERANCE = {"float32": 1e-3, "float64": 1e-3, "bfloat16": 0.1, "float16": 0.02}
COARSEST = max(PROBE_TOLERANCE.values())  # of other dtypes

NAMED = 3  # tensors of a list that a finding names


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        what (`str`): What was looked at.
        result (`str`): What was found.
        good (`bool` or `None`): Whether it is as it should be; `None` where it could not be told.
    """

    what: str
    result: str
    good: bool | None


def examine(adapter: Adapter, tell: Tell) -> Iterator[Finding]:
    """Yield what is found, from what is cheap to what needs the base model; it ends where the adapter does not fit.

    Args:
        adapter (`Adapter`): From `open_adapter`.
        tell (callable): Is told of what takes time.

    Raises:
        UserError: the base cannot be read.
    """
    tensors = raw_tensors(adapter)
    yield _values(tensors)
    yield _trained(adapter, tensors)
    found = fit(adapter, base_config(adapter))
    yield _list("base's shape", found.shape, "as the adapter needs it")
    yield _list("modules", [*found.misshapen, *found.missing], "each has its tensors", "wrong or missing")
    yield _list("unused tensors", found.unused, "none", "the base has no place for")
    if not found:
        return
    tell("Loading the base model")
    model, _ = load_adapted(adapter)
    yield _loaded(model, tensors)
    yield _base_values(adapter, model)
    yield _logits(adapter, model)


def _values(tensors: dict[str, torch.Tensor]) -> Finding:
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    count = sum(t.numel() for t in tensors.values())
    return _list("values", bad, f"{count:,} in {len(tensors)} tensors, all finite", "NaN or infinite in")


def _trained(adapter: Adapter, tensors: dict[str, torch.Tensor]) -> Finding:
    """Find tensors at their start: factors that are zero, scales that are one."""
    scales = adapter.config.peft_type.value == "IA3"
    start = [n for n, t in tensors.items() if t.numel() and bool((t == (1 if scales and "ia3" in n else 0)).all())]
    return _list("training", start, "every module has moved from its start", "never trained, or without effect:")


def _loaded(model: Any, tensors: dict[str, torch.Tensor]) -> Finding:
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    differ = [n for n, t in state.items() if n in tensors and not torch.equal(t.cpu(), tensors[n].to(t.dtype))]
    return _list("plain PEFT", differ, "loads every tensor as it is in the file", "loads other values of")


def _base_values(adapter: Adapter, model: Any) -> Finding:
    if adapter.record is None:
        return Finding("base's weights", "no record beside the adapter tells what they were", None)
    wrong, compared = differing(adapter.record["base"]["values"], model)
    if not compared:
        return Finding("base's weights", "none that can be compared", None)
    good = f"as in training, in {compared} tensors sampled"
    return _list("base's weights", wrong, good, f"others than in training, in {len(wrong)} of {compared} tensors:")


def _logits(adapter: Adapter, model: Any) -> Finding:
    recorded = None if adapter.record is None else adapter.record["probe"]
    if recorded is None:
        return Finding("logits", "none were recorded when it was saved", None)
    before = torch.tensor([[float("nan") if v is None else v for v in row] for row in recorded])
    difference = float((part_of(probe_logits(model)) - before).abs().max() / before.std())
    tolerance = PROBE_TOLERANCE.get(adapter.record["base"]["dtype"], COARSEST) if adapter.record is not None else 0.0
    share = f"differ from those of the trained state by {difference:.2%} of their spread at most"
    return Finding("logits", f"{share}; up to {tolerance:.1%} is rounding", difference <= tolerance)


def _list(what: str, bad: list[str], good: str, problem: str = "") -> Finding:
    if not bad:
        return Finding(what, good, True)
    more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    return Finding(what, f"{problem} {', '.join(bad[:NAMED])}{more}".strip(), False)
