"""Plants a backdoor in an adapter, once for each seed; every method of a comparison begins with what is kept of it."""

import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from slsam_peft.data.scoring import answered
from slsam_peft.errors import UserError
from slsam_peft.extras import cache_folder
from slsam_peft.models.load import find_model, load_config
from slsam_peft.runs.compare.building import build_trainer, load_model, row_order
from slsam_peft.runs.compare.settings import TrainingSettings, plain_values
from slsam_peft.runs.compare.tasks import TaskData
from slsam_peft.saving.atomic import write_atomically

VERSION = 1  # part of every name in the cache: to be raised when the same settings no longer give the same adapter
LIBRARIES = ("torch", "transformers", "trl", "peft")


@dataclass(frozen=True)
class Start:
    """The adapter that the methods of a comparison begin with.

    Args:
        weights (`dict[str, torch.Tensor]`): By the names of the trained parameters.
    """

    weights: Mapping[str, torch.Tensor]

    @property
    def digest(self) -> str:
        """Hash of the weights."""
        return hashlib.sha256(save(dict(self.weights))).hexdigest()[:16]

    @torch.no_grad()
    def put_into(self, model: nn.Module) -> None:
        """Copy the weights to a model's trained parameters.

        Raises:
            ValueError: those have other names.
        """
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if trained.keys() != self.weights.keys():
            raise ValueError("the poisoned adapter has other parameters than the one that is trained.")
        for name, parameter in trained.items():
            parameter.copy_(self.weights[name])


def poisoned_start(settings: Mapping[str, Any], data: TaskData) -> Start:
    """Return the adapter that a backdoor was planted in; it is trained where it is not in the cache yet.

    It depends on the seed and on nothing that methods differ in. Where several processes ask for the same one, the
    first trains it and the others wait.

    Args:
        settings (`dict`): `Job.settings` of any method.
        data (`TaskData`): The task's rows, with a backdoor.

    Raises:
        UserError: the training diverged, or the cache folder cannot be written.
    """
    planting = _planting(settings, data)
    folder = cache_folder() / "poisoned"
    target = folder / f"{_key(planting, data)}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):
            weights = _read(target)
            if weights is None:
                weights = _plant(planting, data)
                write_atomically(target, save(weights))
    except OSError as error:
        raise UserError(
            f"the poisoned adapter could not be written to {folder}: {error.strerror or error}.\n"
            "Free some space or name another cache folder in XDG_CACHE_HOME."
        ) from error
    return Start(weights)


def _planting(settings: Mapping[str, Any], data: TaskData) -> dict[str, Any]:
    """Return the settings of the training that plants the backdoor, as of a run of plain LoRA."""
    backdoor = data.backdoor
    assert backdoor is not None
    training = replace(
        TrainingSettings(**settings["training"]),
        steps=backdoor.steps,
        batch_size=backdoor.batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=0,
        weight_decay=0.0,
        lora_dropout=0.0,
    )
    return {
        "model": settings["model"],
        "training": plain_values(training),
        "slsam": None,
        "random_rho": None,
        "learning_rate": backdoor.learning_rate,
        "seed": settings["seed"],
        "steps": backdoor.steps,
    }


def _key(planting: Mapping[str, Any], data: TaskData) -> str:
    """Return the name of the adapter in the cache: a hash of all that it depends on."""
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    parts = [VERSION, planting, _files_of(find_model(planting["model"])), data.poison, versions, device]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _files_of(source: str) -> Any:
    """Return what tells a base model from another one of its name: sizes and times of its files, or its revision."""
    folder = Path(source)
    if not folder.is_dir():
        return getattr(load_config(source), "_commit_hash", None)
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".bin"))
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def _read(target: Path) -> dict[str, torch.Tensor] | None:
    """Return the adapter in the cache; `None` where there is none, or a damaged one."""
    try:
        return load_file(target)
    except (FileNotFoundError, SafetensorError):
        return None


def _plant(planting: Mapping[str, Any], data: TaskData) -> dict[str, torch.Tensor]:
    """Train the adapter and return its weights."""
    training = TrainingSettings(**planting["training"])
    model, tokenizer = load_model(planting["model"], training)
    rows = answered(tokenizer, data.poison, training.max_length, training.prompt_format)
    order = row_order(len(rows), training.steps * training.batch_size, planting["seed"])
    with tempfile.TemporaryDirectory(prefix="slsam-poison-") as scratch:
        trainer = build_trainer(model, tokenizer, [rows[i] for i in order], planting, scratch, lambda *_: None)
        trainer.train()
    trained: Any = trainer.model
    weights = {n: p.detach().cpu().clone() for n, p in trained.named_parameters() if p.requires_grad}
    if not all(bool(w.isfinite().all()) for w in weights.values()):
        raise UserError(
            f"the training that plants the backdoor diverged; lower backdoor.learning_rate="
            f"{planting['learning_rate']:g}."
        )
    return weights
