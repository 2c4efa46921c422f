"""Tells an adapter's arms from its own folder: its modules go to the meta device, its weights are read by name."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from slsam_peft.adapters.skeleton import Shapes, skeleton_of
from slsam_peft.adapters.vocabulary import as_trained
from slsam_peft.algorithm.arms import Arms, arms_of
from slsam_peft.errors import UserError
from slsam_peft.models.load import MALFORMED, load_config, refused
from slsam_peft.models.shapes import first_line

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True, eq=False)
class AdapterStructure:
    """An adapter without its base weights.

    Args:
        config (`PeftConfig`): Its settings.
        model (`nn.Module`): Its modules, on the meta device.
        keys (`dict[nn.Parameter, str]`): Name of each parameter in the file.
        file (`Path`): Its weights.
        note (`str`): Empty, or why its structure comes from its own names instead of its base model's configuration.
    """

    config: Any
    model: nn.Module
    keys: Mapping[nn.Parameter, str]
    file: Path
    note: str = ""

    def weights(self) -> dict[nn.Parameter, torch.Tensor]:
        """Read the weights, by parameter."""
        with safe_open(self.file, framework="pt") as file:
            return {parameter: file.get_tensor(key) for parameter, key in self.keys.items()}


def read_structure(folder: Path) -> AdapterStructure:
    """Read which modules and parameters an adapter consists of. No network is asked and no pickle read.

    Args:
        folder (`Path`): Holds `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        UserError: something is missing, damaged or pickled, or does not tell its structure.
    """
    file = safe_file(folder, WEIGHTS, "adapter_model.bin")
    shapes = shapes_in(file)
    config = _config(folder)
    if config.is_prompt_learning:
        raise UserError(
            f"{folder} holds prompts ({config.peft_type.value}): they are in no module, so there are no arms."
        )
    # The base model's configuration tells most; without one, the names and shapes in the file must do.
    found, reason = _in_base(config, shapes)
    if found is not None:
        return AdapterStructure(config, *found, file)
    fresh = _config(folder)
    fresh.task_type = None  # a plain module is all it is put into
    try:
        found = _placed(skeleton_of(shapes), fresh, shapes)
    except MALFORMED as error:
        raise UserError(
            f"the arms of {folder} cannot be told: {reason}, and its own names do not say enough "
            f"({first_line(error)}).\nPut the base model's config.json where {SETTINGS} says it is."
        ) from error
    return AdapterStructure(config, *found, file, f"Structure from the adapter's own names: {reason}.")


def _config(folder: Path) -> Any:
    with refused(f"{folder / SETTINGS} cannot be read"), _without_warnings():
        return PeftConfig.from_pretrained(str(folder))


_Placed = tuple[nn.Module, dict[nn.Parameter, str]]


def _in_base(config: Any, shapes: Shapes) -> tuple[_Placed | None, str]:
    """Return the adapter in its base model, or `None` and why not."""
    base = config.base_model_name_or_path
    try:
        with _without_warnings():
            shape = as_trained(load_config(str(base), local=True), shapes)
            shape.quantization_config = None
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(shape, trust_remote_code=False)
    except (UserError, *MALFORMED):
        return None, f"the configuration of its base model {base!r} is not at hand"
    try:
        return _placed(model, config, shapes), ""
    except MALFORMED:
        return None, f"it does not fit the configuration of its base model {base!r}"


def _placed(model: nn.Module, config: Any, shapes: Shapes) -> _Placed:
    """Put the adapter's modules into `model`, and match their parameters with the file's tensors.

    Raises:
        ValueError: a parameter has no tensor of its shape, or a tensor no parameter.
    """
    config.inference_mode = False
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # others compute with base weights, and there are none
    with _without_warnings():
        placed: Any = get_peft_model(model, config, low_cpu_mem_usage=True)
        trained = {n: p for n, p in placed.named_parameters() if p.requires_grad}
        named = get_peft_model_state_dict(placed, state_dict=dict(trained), save_embedding_layers=False)
    # PEFT names its parameters as it saves them; each must be in the file, and each of the file's factors among them.
    keys: dict[Any, str] = {parameter: key for key, parameter in named.items()}
    for parameter, key in keys.items():
        if shapes.get(key) != tuple(parameter.shape):
            raise ValueError(f"{key} has shape {shapes.get(key)} instead of {tuple(parameter.shape)}")
    if len(keys) != len(trained):
        raise ValueError(f"{len(trained) - len(keys)} trained parameters are not saved")
    left = [key for key in shapes if key not in named and "lora_" in key]
    if left:
        raise ValueError(f"{left[0]} belongs to no module")
    return placed, keys


def arms_in(model: nn.Module, granularity: str, name: str) -> Arms:
    """Return `arms_of(model, granularity)`.

    Raises:
        UserError: there are none.
    """
    try:
        return arms_of(model, granularity)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error


def changes(adapter: AdapterStructure, weights: Mapping[nn.Parameter, torch.Tensor], arms: Arms) -> dict[str, float]:
    """Return, by arm, the Frobenius norm of scaling * B A over its LoRA modules.

    Arms that hold only one factor of a module are left out, and DoRA, which changes base weights by more than that.
    """
    owner = {p: arm.name for arm in arms for p in arm.parameters}
    squares: dict[str, float] = {}
    for layer in adapter.model.modules():
        if not isinstance(layer, LoraLayer):
            continue
        for down, up, scaling in _factors(layer):
            arm = owner.get(down)
            if arm is None or owner.get(up) != arm or layer.use_dora.get("default") or down.ndim != 2:
                continue
            a, b = weights[down].double(), weights[up].double()
            squares[arm] = squares.get(arm, 0.0) + scaling**2 * float(((b.T @ b) * (a @ a.T)).sum())
    return {arm: max(value, 0.0) ** 0.5 for arm, value in squares.items()}


def _factors(layer: LoraLayer) -> Iterator[tuple[nn.Parameter, nn.Parameter, float]]:
    for key in layer.active_adapters:
        if key in layer.lora_A:
            down: Any = layer.lora_A[key]
            up: Any = layer.lora_B[key]
            yield down.weight, up.weight, layer.scaling[key]
        elif key in layer.lora_embedding_A:
            yield layer.lora_embedding_A[key], layer.lora_embedding_B[key], layer.scaling[key]


def safe_file(folder: Path, name: str, pickled: str) -> Path:
    """Return the path of a safetensors file.

    Raises:
        UserError: it is missing; where there is a pickle in its place, the message says why that is not opened.
    """
    if (folder / name).is_file():
        return folder / name
    if (folder / pickled).is_file():
        raise UserError(
            f"{folder / pickled} is a pickle, which may run code when it is opened, so it is not. Save the weights "
            "as safetensors (save_pretrained does so by default)."
        )
    raise UserError(f"{folder} holds no {name}: the weights are missing.")


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a safetensors file's tensors.

    Raises:
        UserError: it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); copy or save it again.") from error


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence what libraries say on the way: what matters of it is checked here."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
