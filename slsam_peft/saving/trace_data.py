"""Reads traces from disk for pictures: it checks them, and needs no torch, so that it is quick."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load

from slsam_peft.errors import UserError
from slsam_peft.saving.checksum import verified_metadata

FILE_NAME = "slsam_trace.safetensors"
SCHEMA = 3

_PER_STEP = ("step", "loss", "sharpness", "lowest_active_block", "cost", "grad_norm")
_PER_ARM = ("probabilities", "norms", "active")


@dataclass(frozen=True, eq=False)
class TraceData:
    """One run's trace; `Trace.tensors` and `Trace.plain` say what the fields hold. Arms are in depth order.

    Args:
        label (`str`): Names the run in pictures.
        path (`Path`): The file.
        names, depths (`list`): The arms.
        values (`dict[str, np.ndarray]`): The tensors.
        plain (`dict`): Everything else, and the settings of the run: `config`, `fraction`, `budget`, `total`, `done`.
    """

    label: str
    path: Path
    names: list[str]
    depths: list[int | None]
    values: dict[str, np.ndarray]
    plain: dict[str, Any]

    def __getattr__(self, name: str) -> np.ndarray:
        values = self.__dict__.get("values", {})
        if name not in values:
            raise AttributeError(name)
        return values[name]

    def __len__(self) -> int:
        return len(self.values["step"])

    @property
    def labels(self) -> list[str]:
        """Short names of the arms."""
        return arm_labels(self.names, self.depths)

    @property
    def share(self) -> np.ndarray:
        """Share of all steps in which each arm was active, shape `(L,)`."""
        return self.values["activity"] / self.plain["steps"]

    @property
    def radius(self) -> str:
        """How far steps were perturbed, as it was set: a length, a rise of the loss, or an object by its name."""
        config = self.plain["config"]
        radius = config.get("radius")
        for name in ("rho", "loss_rise"):
            if config.get(name) is not None:
                unit = "" if radius in (None, "length", "loss_rise") else f" ({radius})"
                return f"{name} {config[name]:g}{unit}"
        return f"radius {radius}"

    @property
    def mean_cost(self) -> float:
        """Mean predicted cost over every step, in plain LoRA steps; NaN where none was predicted."""
        return float(self.values["cost_total"][0]) / self.plain["steps"]


def trace_path(run: Path) -> Path:
    """Return the trace file of a run: in its folder, or the file itself.

    Raises:
        UserError: there is none.
    """
    if run.is_file():
        return run
    if not run.is_dir():
        raise UserError(f"{run} does not exist; name the output folder of a training with SL-SAM, or a trace file.")
    if not (run / FILE_NAME).is_file():
        below = sorted(str(path.parent) for path in run.glob(f"*/{FILE_NAME}"))
        hint = f" There are traces in: {', '.join(below[:4])}." if below else ""
        raise UserError(
            f"{run} holds no {FILE_NAME}.{hint} SLSAMTrainer writes one into its output folder unless trace=False."
        )
    return run / FILE_NAME


def read_trace(path: Path, label: str = "") -> TraceData:
    """Read a trace file.

    Args:
        path (`Path`): The file.
        label (`str`, *optional*): Names the run; its folder where it is missing.

    Raises:
        UserError: it is damaged (any bit changed, or cut short), of another version, or has no step in it.
    """
    try:
        content = path.read_bytes()
        metadata = verified_metadata(content)
        if "trace" not in metadata:
            raise UserError(f"{path} is not a trace of SL-SAM; name a file {FILE_NAME} or the folder it is in.")
        if metadata["schema"] != str(SCHEMA):
            raise UserError(
                f"{path} has schema {metadata['schema']}; this version reads schema {SCHEMA}. Use the version of "
                "slsam-peft that wrote it."
            )
        plain, values = json.loads(metadata["trace"]), load(content)
        _check_shapes(values, plain)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not a trace of SL-SAM, or is damaged ({error}). Checkpoints hold copies of a run's trace."
        ) from error
    if not len(values["step"]):
        raise UserError(f"{path} is empty: no step has been recorded yet. Plot it once training has made some.")
    return _in_depth_order(label or path.absolute().parent.name, path, values, plain)


def _check_shapes(values: dict[str, np.ndarray], plain: dict[str, Any]) -> None:
    """Raise `ValueError` or `KeyError` naming the first value that is missing or does not fit the others."""
    steps, arms = len(values["step"]), len(plain["names"])
    expected: dict[str, tuple[int, ...]] = {name: (steps,) for name in _PER_STEP}
    expected |= {name: (steps, arms) for name in _PER_ARM}
    expected |= {"activity": (arms,), "cost_total": (1,)}
    for name, shape in expected.items():
        if values[name].shape != shape:
            raise ValueError(f"{name} has shape {values[name].shape} instead of {shape}")
    if len(plain["depths"]) != arms:
        raise ValueError(f"{len(plain['depths'])} depths of {arms} arms")
    for key in ("steps", "last", "stride", "total"):
        if not isinstance(plain[key], int):
            raise ValueError(f"{key} is {plain[key]!r}")
    for key in ("config", "fraction", "budget", "done"):
        _ = plain[key]


def _in_depth_order(label: str, path: Path, values: dict[str, np.ndarray], plain: dict[str, Any]) -> TraceData:
    names, depths = plain["names"], plain["depths"]
    order = list(range(len(names)))
    if None not in depths:
        order.sort(key=lambda i: depths[i])  # arms of one depth stay as they are
    values = {**values, **{name: values[name][:, order] for name in _PER_ARM}, "activity": values["activity"][order]}
    return TraceData(label, path, [names[i] for i in order], [depths[i] for i in order], values, plain)


def read_runs(runs: Sequence[Path]) -> list[TraceData]:
    """Read the traces of several runs of the same arms.

    Raises:
        UserError: as `trace_path` and `read_trace`; a run named twice; runs of different arms.
    """
    paths = [trace_path(run) for run in runs]
    twice = next((p for i, p in enumerate(paths) if any(p.samefile(q) for q in paths[:i])), None)
    if twice is not None:
        raise UserError(f"{twice} is named twice; name each run once.")
    traces = [read_trace(p, label) for p, label in zip(paths, _labels(paths), strict=True)]
    for other in traces[1:]:
        _check_same_arms(traces[0], other)
    return traces


def _check_same_arms(first: TraceData, other: TraceData) -> None:
    """Raise `UserError`, naming the first difference, unless two traces are of the same arms."""
    if other.names == first.names:
        return
    only_other = next((n for n in other.names if n not in first.names), None)
    only_first = next((n for n in first.names if n not in other.names), None)
    difference = "their order differs"
    if only_other:
        difference = f"only {other.label} has {only_other!r}"
    elif only_first:
        difference = f"only {first.label} has {only_first!r}"
    raise UserError(
        f"these are runs of different arms, so they do not fit into one plot: {first.label} has {len(first.names)} "
        f"arms, {other.label} has {len(other.names)}; {difference}. Plot them one by one."
    )


def _labels(paths: Sequence[Path]) -> list[str]:
    """Name each run by as few of its last folders as tell it from the others."""
    parts = [path.absolute().parent.parts if path.name == FILE_NAME else path.absolute().parts for path in paths]
    labels = []
    for own in parts:
        others = [p for p in parts if p is not own]
        depth = next((d for d in range(1, len(own)) if all(p[-d:] != own[-d:] for p in others)), len(own))
        labels.append("/".join(own[-depth:]))
    return labels


def arm_labels(names: Sequence[str], depths: Sequence[int | None]) -> list[str]:
    """Return short names: without the leading parts that all share, and "block 3" for a whole block."""
    parts = [name.split(".") for name in names]
    shared = 0
    while all(len(p) > shared + 1 for p in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    return [
        f"block {depth}" if depth is not None and own[-1] == str(depth) else ".".join(own[shared:])
        for own, depth in zip(parts, depths, strict=True)
    ]
