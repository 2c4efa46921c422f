"""Tells what an adapter or a model consists of, arm by arm, from safetensors alone."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM

from slsam_peft.adapters.arms import (
    SETTINGS,
    arms_in,
    changes,
    read_structure,
    safe_file,
    shapes_in,
)
from slsam_peft.adapters.load import below
from slsam_peft.algorithm.arms import Arm, Arms
from slsam_peft.errors import UserError
from slsam_peft.models.load import is_path, refused
from slsam_peft.models.shapes import find_config, first_line
from slsam_peft.saving.recorded import fallbacks_in, read_record
from slsam_peft.saving.trace_data import FILE_NAME, read_trace


@dataclass(frozen=True)
class ArmRow:
    """One arm.

    Args:
        name (`str`): Its name.
        depth (`int` or `None`): See `Arm`.
        tensors (`int`): How many it has.
        parameters (`int`): How many numbers are in them.
        bytes (`int`): Memory of its weights.
        norm (`float` or `None`): L2 norm of its weights; `None` where no weights were read.
        change (`float` or `None`): Frobenius norm of what its LoRA modules add to the base weights; `None` where that
            is not known from the adapter alone, or the arm has no complete module.
        active (`float` or `None`): Share of the training's steps in which it was active, where a trace tells.
    """

    name: str
    depth: int | None
    tensors: int
    parameters: int
    bytes: int
    norm: float | None = None
    change: float | None = None
    active: float | None = None


@dataclass(frozen=True)
class Inspection:
    """Arms of an adapter or a model.

    Args:
        title (`str`): What was inspected.
        facts (`dict[str, str]`): What is known of it as a whole.
        rows (`list[ArmRow]`): The arms, in order.
        notes (`list[str]`): What could not be told, and why; what training fell back to, by the adapter's record.
    """

    title: str
    facts: dict[str, str]
    rows: list[ArmRow]
    notes: list[str]


def inspect(name: str, granularity: str) -> Inspection:
    """Inspect a PEFT adapter's folder, a model's folder, or a model known by its configuration only.

    Args:
        name (`str`): The folder, a built-in shape or a Hub ID.
        granularity (`str`): `"block"`, `"module"` or `"tensor"`.

    Raises:
        UserError: nothing of the kind is there, it is damaged, its weights are pickled, or its arms cannot be told.
    """
    folder = Path(name)
    if (folder / SETTINGS).is_file():
        return _inspect_adapter(folder, granularity)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds neither {SETTINGS} nor config.json; name an adapter or a model.{below(folder)}"
        )
    if folder.is_file():
        raise UserError(f"{folder} is a file; name the folder it is in.")
    if not folder.exists() and is_path(name):
        raise UserError(f"the folder {name} does not exist; name an adapter's or a model's folder.")
    return _inspect_model(name, granularity)


def _inspect_adapter(folder: Path, granularity: str) -> Inspection:
    adapter = read_structure(folder)
    arms = arms_in(adapter.model, granularity, str(folder))
    weights, active = adapter.weights(), _activity(folder, arms)
    change = changes(adapter, weights, arms)
    rows = [
        _row(arm, [weights[p] for p in arm.parameters], True, change.get(arm.name), active.get(arm.name))
        for arm in arms
    ]
    config = adapter.config
    facts = {"base model": str(config.base_model_name_or_path), "method": config.peft_type.value}
    for key in ("r", "lora_alpha", "use_rslora", "use_dora"):
        if getattr(config, key, None):
            facts[key] = str(getattr(config, key))
    notes = [adapter.note] if adapter.note else []
    return Inspection(f"Adapter {folder}", facts, rows, notes + _recorded(folder))


def _recorded(folder: Path) -> list[str]:
    """Return what the adapter's record says of passes that ran otherwise than meant, or that it cannot be read."""
    try:
        record = read_record(folder)
    except UserError as error:
        return [str(error)]
    return [f"Trained with a fallback: {fallback}" for fallback in fallbacks_in(record)]


def _activity(folder: Path, arms: Arms) -> dict[str, float]:
    """Return how often each arm was active, where the folder holds a trace of these very arms."""
    if not (folder / FILE_NAME).is_file():
        return {}
    try:
        trace = read_trace(folder / FILE_NAME)
    except UserError:
        return {}
    same = sorted(trace.names) == sorted(arm.name for arm in arms)
    return dict(zip(trace.names, map(float, trace.share), strict=True)) if same else {}


def _inspect_model(name: str, granularity: str) -> Inspection:
    model = _without_weights(name)
    arms = arms_in(model, granularity, name)
    facts = {"architecture": type(model).__name__, "blocks": str(len(arms.blocks))}
    if not os.path.isdir(name):
        rows = [_row(arm, arm.parameters, False) for arm in arms]
        return Inspection(f"Model {name}", facts, rows, ["Sizes from the configuration; no weights were read."])
    # An arm of which some tensors cannot be read gets its sizes from the configuration, and no norm.
    files = _model_files(Path(name))
    rows, lacking = [], 0
    for arm in arms:
        found = [_tensor(files, n) for n in arm.parameter_names]
        usable = [t for t in found if t is not None and t.is_floating_point()]
        lacking += len(found) - len(usable)
        complete = len(usable) == len(found)
        rows.append(_row(arm, usable if complete else arm.parameters, complete))
    note = f"{lacking} tensors are stored in another form (quantised, or under other names): no norm for their arms."
    return Inspection(f"Model {name}", facts, rows, [note] if lacking else [])


def _without_weights(name: str) -> Any:
    """Return a model on the meta device, from its configuration alone, with every parameter trainable."""
    config = find_config(name)
    config.quantization_config = None
    with refused(f"cannot build a {config.model_type!r} model"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model.requires_grad_(True)


def _row(
    arm: Arm, tensors: Sequence[torch.Tensor], read: bool, change: float | None = None, active: float | None = None
) -> ArmRow:
    squares = [float(torch.linalg.vector_norm(t, dtype=torch.float32)) ** 2 for t in tensors] if read else []
    return ArmRow(
        name=arm.name,
        depth=arm.depth,
        tensors=len(arm.parameters),
        parameters=arm.size,
        bytes=sum(t.numel() * t.element_size() for t in tensors),
        norm=sum(squares) ** 0.5 if read else None,
        change=change,
        active=active,
    )


def _model_files(folder: Path) -> dict[str, Path]:
    """Return the file each tensor of a model lies in."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        path = safe_file(folder, "model.safetensors", "pytorch_model.bin")
        return dict.fromkeys(shapes_in(path), path)
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {key: folder / Path(name).name for key, name in where.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} is damaged ({first_line(error)}); copy or save it again.") from error
    missing = next((path for path in files.values() if not path.is_file()), None)
    if missing is not None:
        raise UserError(f"{missing} is missing, though {index.name} names it; copy or save the model again.")
    return files


def _tensor(files: Mapping[str, Path], name: str) -> torch.Tensor | None:
    if name not in files:
        return None
    try:
        with safe_open(files[name], framework="pt") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{files[name]} is damaged ({error}); copy or save it again.") from error
