"""Writes `slsam.json` beside an adapter: what it was trained with, on which base, what it answered when it was saved.

PEFT keeps the base model's name only. To tell later whether a base is the one an adapter belongs to, whether it was
quantised, and whether the adapter still computes what it did, the trainer writes down a few numbers with it.
"""

import importlib.metadata
import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from slsam_peft.algorithm.shards import is_sharded
from slsam_peft.config import RECORD_NAME, RECORD_SCHEMA
from slsam_peft.saving.atomic import write_atomically
from slsam_peft.saving.row_digest import describe_rows

SAMPLED_TENSORS = 256  # tensors of the base that are sampled, at most
SAMPLED_VALUES = 4  # values of each
SAMPLE_TOLERANCE = 2**-7  # relative: one unit in the last place of bfloat16, whatever dtype the base is loaded in

UNNAMED = "default"  # the adapter that PEFT saves in a folder itself, and others below it

PROBE_TOKENS = 16
PROBE_POSITIONS = 4  # the last tokens of the probe
PROBE_VALUES = 64  # logits of each position that are recorded

SHAPE_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)

# Names of what lies below a layer of PEFT and is the base model's.
_BASE_CHILDREN = ("base_layer", "original_module", "token_adapter")
_PACKAGES = ("slsam_peft", "torch", "transformers", "trl", "peft", "bitsandbytes")
TRAINING = (
    "learning_rate",
    "lr_scheduler_type",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "weight_decay",
    "seed",
)

Record = dict[str, Any]

logger = logging.getLogger(__name__)


def write_record(trainer: Any, folder: str | os.PathLike) -> None:
    """Write `slsam.json` for a trainer's adapter beside it, atomically; nothing for a model without adapters.

    A record that cannot be made is worth a warning and no more: the adapter itself has been saved.

    Args:
        trainer (`Trainer`): The trainer.
        folder (`str` or `os.PathLike`): Where the model was saved; an adapter with a name lies in a folder below.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not isinstance(model, PeftModel):
        return
    try:
        record = {
            "schema": RECORD_SCHEMA,
            "method": {"name": "sl-sam", **trainer.slsam_config.to_dict()},
            "training": {
                "steps": trainer.state.global_step,
                **{name: plain_value(trainer.args, name) for name in TRAINING},
                **describe_rows(trainer.train_dataset),
            },
            "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
            "fallbacks": [fallback._asdict() for fallback in trainer.slsam_fallbacks],
            "base": describe_base(model),
            "probe": None
            if any(is_sharded(p) for p in model.parameters())
            else probe(model),  # one rank alone is here
        }
    except Exception:  # any kind of model: whatever it refuses, its adapter must not be lost
        logger.warning("%s was not written: the adapter's record could not be made.", RECORD_NAME, exc_info=True)
        return
    for name in model.active_adapters:
        beside = Path(folder) if name == UNNAMED else Path(folder) / name
        beside.mkdir(parents=True, exist_ok=True)
        write_atomically(beside / RECORD_NAME, f"{json.dumps(record, indent=1)}\n".encode())


def describe_base(model: PeftModel) -> dict[str, Any]:
    """Return what tells a base model from others: name, shape, dtype, quantisation and some of its values."""
    base: Any = model.get_base_model()
    quantization = getattr(base.config, "quantization_config", None)
    if quantization is not None and not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    return {
        "name": base.config.name_or_path,
        "shape": base_shape(base.config),
        "dtype": str(base.dtype).removeprefix("torch."),
        "quantization": None if quantization is None else json.loads(json.dumps(quantization, default=str)),
        "unquantized": None if quantization is None else sorted(_plain_linears(model)),
        "values": sample_base(model),
    }


def base_shape(config: Any) -> dict[str, Any]:
    """Return the fields of a model's config that an adapter depends on."""
    text = config.get_text_config()
    return {name: getattr(text, name, None) for name in SHAPE_FIELDS}


def sample_base(model: nn.Module) -> dict[str, list[float]]:
    """Return a few values of the base weights that are neither trained nor quantised, by their names in the base.

    Args:
        model (`nn.Module`): A PEFT model.
    """
    names = dict(_base_parameters(model))
    chosen = sorted(names)
    if len(chosen) > SAMPLED_TENSORS:
        chosen = [chosen[i * len(chosen) // SAMPLED_TENSORS] for i in range(SAMPLED_TENSORS)]
    return {name: _values(names[name]) for name in chosen}


def differing(recorded: dict[str, list[float]], model: nn.Module) -> tuple[list[str], int]:
    """Compare a base model with a record.

    Args:
        recorded (`dict[str, list[float]]`): From `sample_base`.
        model (`nn.Module`): A PEFT model.

    Returns:
        `tuple[list[str], int]`: Tensors with other values, and how many could be compared.
    """
    here = {name: p for name, p in _base_parameters(model) if name in recorded}
    wrong = [
        name
        for name, parameter in here.items()
        if not all(
            math.isclose(a, b, rel_tol=SAMPLE_TOLERANCE, abs_tol=1e-30)
            for a, b in zip(_values(parameter), recorded[name], strict=True)
        )
    ]
    return wrong, len(here)


def probe_ids(vocab_size: int) -> torch.Tensor:
    """Return the token ids that a model is probed with, of shape `(1, 16)`: spread over the vocabulary."""
    return torch.tensor([[(7919 * i + 13) % vocab_size for i in range(1, PROBE_TOKENS + 1)]])


@torch.no_grad()
def probe_logits(model: Any) -> torch.Tensor:
    """Return the logits of the probe, float32 on the CPU, of shape `(16, vocabulary)`; in evaluation mode.

    Args:
        model (`PeftModel` or `PreTrainedModel`): A decoder. What accelerate has put around a `PeftModel` (autocast)
            does not count.
    """
    inner = model.base_model if isinstance(model, PeftModel) else model
    device = model.get_input_embeddings().weight.device
    ids = probe_ids(model.config.get_text_config().vocab_size).to(device)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        return inner(input_ids=ids, use_cache=False).logits[0].float().cpu()
    finally:
        for module, mode in modes.items():
            module.training = mode


def probe(model: PeftModel) -> list[list[float | None]] | None:
    """Return part of the probe's logits, of 4 positions and 64 tokens.

    Returns:
        `list[list[float]]` or `None`: `None` for what is no decoder, and where several adapters answer together.
    """
    if (
        len(model.active_adapters) > 1
        or model.active_peft_config.is_prompt_learning
        or getattr(model.config, "is_encoder_decoder", False)
    ):
        return None
    logits = probe_logits(model)
    if logits.dim() != 2 or logits.shape[0] != PROBE_TOKENS:
        return None  # a reward model's
    return [[v if math.isfinite(v) else None for v in row] for row in part_of(logits).tolist()]


def part_of(logits: torch.Tensor) -> torch.Tensor:
    """Return the part of `probe_logits` that is recorded, of shape `(4, 64)`."""
    columns = torch.arange(PROBE_VALUES) * logits.shape[1] // PROBE_VALUES
    return logits[-PROBE_POSITIONS:, columns]


def _base_parameters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    adapters = adapter_prefixes(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or parameter.is_meta or not parameter.is_floating_point():
            continue  # trained, elsewhere, or packed
        if type(parameter.data) is not torch.Tensor:
            continue  # packed by a library whose tensors look like plain ones
        if not name.startswith(adapters):
            yield base_name(name), parameter


def adapter_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Return the beginnings of names in a PEFT model that do not belong to the base."""
    found = []
    kinds: Any = (BaseTunerLayer, AuxiliaryTrainingWrapper)  # the first is no module by its own bases
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            inner = [child for child, _ in module.named_children()] + [
                n for n, _ in module.named_parameters(recurse=False)
            ]
            found += [f"{name}.{child}" for child in inner if child not in _BASE_CHILDREN]
    return tuple(found)


def base_name(name: str) -> str:
    """Return a parameter's name in the base model, from its name in a PEFT model."""
    name = name.removeprefix("base_model.model.")
    return name.replace(".base_layer.", ".").replace(".original_module.", ".").replace(".token_adapter.", ".")


def _values(parameter: torch.Tensor) -> list[float]:
    flat = parameter.detach().reshape(-1)
    places = [i * flat.numel() // SAMPLED_VALUES for i in range(SAMPLED_VALUES)] if flat.numel() else []
    return [float(f"{v:.4e}") for v in flat[places].float().tolist()]


def _plain_linears(model: nn.Module) -> Iterator[str]:
    """Yield names of linear layers that a quantised model keeps as they were, adapters left out."""
    adapters = adapter_prefixes(model)
    for name, module in model.named_modules():
        if type(module) is nn.Linear and not name.startswith(adapters):
            yield base_name(f"{name}.").removesuffix(".")


def plain_value(arguments: Any, name: str) -> Any:
    """Return a setting of `TrainingArguments` as it is recorded: an enumeration's value."""
    value = getattr(arguments, name)
    return getattr(value, "value", value)
