"""Measures how flat the loss is around an adapter: in its parameters, and in the full weights W + BA of its layers."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from slsam_peft.data.scoring import IGNORED, Tokens, padded
from slsam_peft.models.load import Tell
from slsam_peft.sharpness.curvature import HessianVector, lanczos
from slsam_peft.sharpness.measures import Objective, Space, average_rise, filter_normalized, line, plane, worst_case

ADAPTER_SPACE = "adapter"
FULL_SPACE = "full weight"

Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class FlatnessSettings:
    """What is measured.

    Args:
        rho (`float`): Radius of the worst case.
        adaptive_rho (`float`): Radius of the worst case over |w| + 0.01 (ASAM).
        sigma (`float`): Standard deviation of the noise on each entry.
        adaptive_sigma (`float`): Standard deviation of the noise over |w| + 0.01.
        ascent_steps (`int`): Steps of the worst case's ascent from each start.
        restarts (`int`): Its random starts.
        draws (`int`): Pairs of noise.
        lanczos_steps (`int`): Hessian-vector products; 0 leaves the curvature out.
        line_points (`int`): Points of the 1-D slice; 0 leaves it out.
        plane_points (`int`): Points of each side of the 2-D slice; 0 leaves it out.
        extent (`float`): How far slices reach, in filter-normalised directions: at 1 each filter has moved by its
            own length.
        seed (`int`): Seed of all draws.
    """

    rho: float
    adaptive_rho: float
    sigma: float
    adaptive_sigma: float
    ascent_steps: int
    restarts: int
    draws: int
    lanczos_steps: int
    line_points: int
    plane_points: int
    extent: float
    seed: int


def objective_of(model: Any, sequences: Sequence[Tokens], batch_size: int) -> Objective:
    """Return the mean loss of an answer token over sequences.

    Args:
        model (`PeftModel`): A causal language model in evaluation mode.
        sequences (`Sequence[Tokens]`): Each has at least one token to predict.
        batch_size (`int`): Sequences of a batch; those of like length come together.
    """
    device = model.get_input_embeddings().weight.device
    ordered = sorted(sequences, key=lambda sequence: len(sequence.ids))
    batches, counts = [], []
    for start in range(0, len(ordered), batch_size):
        ids, mask, labels = (t.to(device) for t in padded(ordered[start : start + batch_size]))
        batches.append(_batch_loss(model, ids, mask, labels))
        counts.append(int((labels[:, 1:] != IGNORED).sum()))
    return Objective(batches, [count / sum(counts) for count in counts])


def _batch_loss(model: Any, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> Callable[[], torch.Tensor]:
    first = max(0, int((labels != IGNORED).any(0).int().argmax()) - 1)  # logits before any answer are not computed
    targets = labels[:, first + 1 :]

    def loss() -> torch.Tensor:
        output = model(input_ids=ids, attention_mask=mask, logits_to_keep=ids.shape[1] - first, use_cache=False)
        logits = output.logits[:, :-1].flatten(0, 1)
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()
        return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED)

    return loss


def adapter_space(model: PeftModel) -> Space:
    """Return the adapter's trainable parameters as a space."""
    return Space([p for p in model.parameters() if p.requires_grad])


@contextmanager
def full_space(model: PeftModel) -> Iterator[Space | None]:
    """Yield the full weights of the adapted linear layers as a space; `None` where the adapter adds nothing to them.

    A layer's output W x + BA x gets a branch E x, with E at zero: so the base may be quantised, and no weight is
    modified. Each E takes as much memory as its W in float32, and so does each gradient.

    Args:
        model (`PeftModel`): LoRA or another kind that adds to a linear layer's weight; of DoRA, the lengths that
            adaptive radii refer to leave out its magnitudes.
    """
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and _adds_to_linear(m)]
    if not layers:
        yield None
        return
    branches = [_zero_branch(layer) for layer in layers]
    trainable = [p for p in model.parameters() if p.requires_grad]
    handles = [layer.register_forward_hook(_hook(branch)) for layer, branch in zip(layers, branches, strict=True)]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield Space(branches, lambda i: _full_weight(layers[i]))
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()


def _adds_to_linear(layer: Any) -> bool:
    base = layer.get_base_layer()
    return hasattr(layer, "get_delta_weight") and isinstance(base, nn.Linear) and bool(layer.active_adapters)


def _zero_branch(layer: Any) -> nn.Parameter:
    base = layer.get_base_layer()
    return nn.Parameter(torch.zeros(base.out_features, base.in_features, device=base.weight.device))


def _hook(branch: nn.Parameter) -> Callable[..., torch.Tensor]:
    def add(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output + F.linear(args[0].to(branch.dtype), branch).to(output.dtype)

    return add


@torch.no_grad()
def _full_weight(layer: Any) -> torch.Tensor:
    base: Any = dequantize_module_weight(layer.get_base_layer())
    weight = base.detach().float()
    for name in layer.active_adapters:
        weight = weight + layer.get_delta_weight(name).float()
    return weight


def measure_flatness(
    model: PeftModel,
    data: Mapping[str, Sequence[Tokens]],
    settings: FlatnessSettings,
    *,
    batch_size: int,
    spaces: Sequence[str] = (ADAPTER_SPACE, FULL_SPACE),
    tell: Tell,
) -> Result:
    """Measure everything, on each data set and in each space.

    Args:
        model (`PeftModel`): In evaluation mode, its adapter trainable, the best in float32.
        data (`dict[str, Sequence[Tokens]]`): Sequences by the name of their data set; lines are taken on each, planes
            on the first.
        settings (`FlatnessSettings`): What to measure.
        batch_size (`int`): Sequences of a batch.
        spaces (`Sequence[str]`, *optional*): `"adapter"`, `"full weight"` or both.
        tell (callable): Is told of what is going on.

    Returns:
        `dict`: Plain values. `"loss"` by data set; `"spaces"`, by space, with `"parameters"`, `"line"`, `"plane"` and,
        under `"data"` by data set, the rises; `"curvature"` by data set.
    """
    objectives = {name: objective_of(model, sequences, batch_size) for name, sequences in data.items()}
    tell("Measuring the loss")
    result: Result = {
        "loss": {name: objective.value() for name, objective in objectives.items()},
        "rows": {name: len(sequences) for name, sequences in data.items()},
        "settings": asdict(settings),
        "spaces": {},
        "curvature": {},
    }
    # How the loss rises around the weights, and along slices through them.
    for kind in spaces:
        if kind == ADAPTER_SPACE:
            result["spaces"][kind] = _measure_space(adapter_space(model), kind, objectives, settings, tell)
            continue
        with full_space(model) as space:
            if space is not None:
                result["spaces"][kind] = _measure_space(space, kind, objectives, settings, tell)
    # The largest curvature, in the adapter's own parameters alone.
    if settings.lanczos_steps:
        parameters = [p for p in model.parameters() if p.requires_grad]
        for name, objective in objectives.items():
            result["curvature"][name] = _curvature(objective, parameters, settings, name, tell)
    return result


def _measure_space(
    space: Space, kind: str, objectives: dict[str, Objective], settings: FlatnessSettings, tell: Tell
) -> Result:
    """Measure the rises of the loss on each data set, plain and adaptive, and the slices."""
    measured: Result = {"parameters": space.size, "data": {}}
    for name, objective in objectives.items():
        where = f"Measuring the {kind} on {name}:"
        found = measured["data"][name] = {}
        for adaptive in (False, True):
            found |= _rises(objective, space, settings, adaptive, lambda what, where=where: tell(f"{where} {what}"))
    return measured | _slices(space, kind, objectives, settings, tell)


def _rises(objective: Objective, space: Space, settings: FlatnessSettings, adaptive: bool, tell: Tell) -> Result:
    """Measure how far the loss rises at worst within a radius, and on average under noise."""
    word = "adaptive " if adaptive else ""
    rho = settings.adaptive_rho if adaptive else settings.rho
    sigma = settings.adaptive_sigma if adaptive else settings.sigma
    # Each data set and each adapter of this shape gets the same noise.
    generator = torch.Generator().manual_seed(settings.seed)
    tell(f"{word}worst case")
    steps, restarts = settings.ascent_steps, settings.restarts
    worst = worst_case(objective, space, rho, steps=steps, restarts=restarts, generator=generator, adaptive=adaptive)
    tell(f"{word}average under noise")
    average = average_rise(objective, space, sigma, draws=settings.draws, generator=generator, adaptive=adaptive)
    return {f"{word}worst case": asdict(worst), f"{word}average": asdict(average)}


def _slices(
    space: Space, kind: str, objectives: dict[str, Objective], settings: FlatnessSettings, tell: Tell
) -> Result:
    """Take the loss along a random line through the weights on each data set, and on a plane on the first."""
    if not settings.line_points and not settings.plane_points:
        return {}
    generator = torch.Generator().manual_seed(settings.seed)
    first = filter_normalized(space, generator)
    result: Result = {}
    if settings.line_points:
        places = _places(settings.line_points, settings.extent)
        result["line"] = {"places": places, "loss": {}}
        for name, objective in objectives.items():
            tell(f"Measuring the {kind} on {name}: loss along a line")
            result["line"]["loss"][name] = line(objective, space, first, places)
    if settings.plane_points:
        name, objective = next(iter(objectives.items()))
        tell(f"Measuring the {kind} on {name}: loss on a plane")
        second = filter_normalized(space, generator)
        places = _places(settings.plane_points, settings.extent)
        losses = plane(objective, space, first, second, places, places)
        result["plane"] = {"places": places, "data": name, "loss": losses}
    return result


def _places(points: int, extent: float) -> list[float]:
    return [extent * (2 * i / (points - 1) - 1) for i in range(points)] if points > 1 else [0.0]


def _curvature(
    objective: Objective, parameters: list[nn.Parameter], settings: FlatnessSettings, name: str, tell: Tell
) -> Result:
    """Measure the largest curvature with Lanczos' method."""
    tell(f"Measuring the curvature on {name}: choosing how to multiply with the Hessian")
    product = HessianVector(objective, parameters)
    size = sum(p.numel() for p in parameters)
    # The gradient leans towards the largest curvature; what is random keeps the rest in sight.
    start = torch.randn(size, generator=torch.Generator().manual_seed(settings.seed)).to(parameters[0])
    gradient = torch.cat([g.reshape(-1) for g in objective.gradient(parameters)[1]])
    start = (start / start.norm() + gradient / gradient.norm().clamp_min(1e-12)).detach()
    done = 0

    def told(vector: torch.Tensor) -> torch.Tensor:
        nonlocal done
        done += 1
        tell(f"Measuring the curvature on {name}: product {done} of {settings.lanczos_steps}")
        return product(vector)

    found = asdict(lanczos(told, start, settings.lanczos_steps))
    return found | {"method": product.method, "agreement": product.agreement}


def finite(value: Any) -> Any:
    """Return a result with `None` for every number that JSON does not have."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
