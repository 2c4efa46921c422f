"""Traces of runs that never were, written by the package's own recorder."""

from types import SimpleNamespace

import torch

from slsam_peft import SLSAMConfig
from slsam_peft.saving.trace_file import TraceFile

PREFIX = "base_model.model.model.layers"


def blocks(count):
    """Return names and depths of block arms."""
    return [f"{PREFIX}.{i}" for i in range(count)], list(range(count))


def modules(count, per_block=7):
    """Return names and depths of module arms."""
    pairs = [(i, j) for i in range(count) for j in range(per_block)]
    return [f"{PREFIX}.{i}.mlp.m{j}" for i, j in pairs], [i for i, _ in pairs]


def write_trace(folder, arms, steps, config=None, *, fraction=0.4, cost=True, done=True, seed=0):
    """Write the trace of a run whose probabilities rise with depth, and return the recorder."""
    names, depths = arms
    config = (config or SLSAMConfig(method="sam")).resolved
    slsam = SimpleNamespace(
        config=config,
        sampler=SimpleNamespace(mean=fraction),
        arms=[SimpleNamespace(name=n, depth=d) for n, d in zip(names, depths, strict=True)],
    )
    folder.mkdir(parents=True, exist_ok=True)
    file = TraceFile(slsam, folder, steps if done else 2 * steps)
    generator = torch.Generator().manual_seed(seed)
    rising = torch.linspace(0.1, 0.9, len(names), dtype=torch.float64)
    for step in range(1, steps + 1):
        slsam.drawn = 0.5 + (rising - 0.5) * step / steps
        slsam.active = torch.rand(len(names), generator=generator) < slsam.drawn
        slsam.norms = torch.where(slsam.active, rising, 0.0)
        slsam.loss = 3.0 / step + float(torch.rand((), generator=generator))
        slsam.metrics = {"lowest_active_block": float(slsam.active.double().argmax()), "grad_norm_ascent": 0.5}
        if config.ascent == "two_pass":
            slsam.metrics["sharpness"] = 0.1
        if cost:
            slsam.metrics["cost"] = 0.5 + float(torch.rand((), generator=generator))
        file.trace.record(step, slsam)
    file._write(folder, done)
    return file.trace
