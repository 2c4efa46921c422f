"""Merges an adapter into its base one tensor at a time, by PEFT's own merge of each layer.

PEFT's layers are built around a base without values: every parameter is one zero, expanded to its shape. For each
tensor of the base the layer it belongs to is given the real values, merges, and has them taken away again.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import AutoModelForCausalLM

from slsam_peft.adapters.base_files import BaseFiles, Stored
from slsam_peft.adapters.load import Adapter, plain_config
from slsam_peft.errors import UserError, brief
from slsam_peft.models.load import refused
from slsam_peft.saving.record import adapter_prefixes, base_name

_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # others subtract from the base what the adapter starts with

ADAPTER_NAME = "default"  # what PEFT calls the one adapter it loads

Transform = Callable[[str, torch.Tensor], torch.Tensor]  # a base tensor's name and values to the values to merge into


class Merge:
    """The tensors of base and adapter in one.

    Args:
        adapter (`Adapter`): From `open_adapter`; it must fit.
        config (`PreTrainedConfig`): The base's.
        files (`BaseFiles`): The base's weights.
        transform (callable, *optional*): Changes a base tensor before it is merged into.

    Attributes:
        folder (`Path`): The base's.
        linears (`set[str]`): Weights of linear layers.
        untied (`bool`): Embeddings and head share one tensor in the base and no longer do.

    Raises:
        UserError: a kind of adapter that PEFT cannot merge layer by layer, or a base whose files name their tensors
            differently than the model does.
    """

    def __init__(self, adapter: Adapter, config: Any, files: BaseFiles, transform: Transform | None = None) -> None:
        self._files = files
        self.folder = files.folder
        self._transform = transform or (lambda name, tensor: tensor)
        start = getattr(adapter.config, "init_lora_weights", True)
        if start not in _STARTS:
            raise UserError(
                f"{adapter.folder} starts from init_lora_weights={start!r}, which changes the base's weights too. "
                "Save it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...), then merge it."
            )
        if getattr(adapter.config, "layer_replication", None):
            raise UserError(
                f"{adapter.folder} repeats blocks of its base (layer_replication="
                f"{adapter.config.layer_replication}): the base's files have one copy of each, so it cannot be merged "
                "into them. Hand it on as an adapter: leave out --merge."
            )
        model = without_base(adapter, config)
        base = model.get_base_model()
        self._layers = dict(_layers(model))
        self._replaced = dict(_replaced(model))
        self.linears = {base_name(f"{n}.weight") for n, m in model.named_modules() if _is_linear(m)}
        self._sources = self._locate(base)
        self.untied = self._untie(base)

    def __iter__(self) -> Iterator[str]:
        """Names of the merged model's tensors, in the order of the base's files."""
        return iter(self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one of the merged model's tensors."""
        return tuple(self._replaced[name].shape) if name in self._replaced else self._sources[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype that one of the merged model's tensors has in the base's files."""
        return self._sources[name].dtype

    def tensor(self, name: str) -> torch.Tensor:
        """Return one of the merged model's tensors: float32 where the adapter changed it, else as the base has it."""
        if name not in self._layers:
            return self._base(name)
        path, _, attribute = name.rpartition(".")
        layer = self._layers[name]
        names = [n for n, p in layer.get_base_layer().named_parameters(recurse=False) if f"{path}.{n}" in self._layers]
        values = {n: self._base(f"{path}.{n}").to(torch.float32, copy=True) for n in names}
        try:
            return _merged(layer, values)[attribute]
        except (ValueError, RuntimeError) as error:  # how PEFT and `_merged` refuse a layer
            raise UserError(f"{path} cannot be merged: {brief(error)}") from error

    def _base(self, name: str) -> torch.Tensor:
        if name in self._replaced:
            return self._replaced[name]
        return self._transform(name, self._files.read(self._sources[name]))

    def _locate(self, base: Any) -> dict[str, Stored]:
        prefix = f"{base.base_model_prefix}."
        known = {name for name, _ in base.named_parameters(remove_duplicate=False)}
        known = {base_name(name) for name in known}
        sources = {}
        for key, stored in self._files.tensors.items():
            name = next((n for n in (key, prefix + key, key.removeprefix(prefix)) if n in known), key)
            sources[name] = stored
        return sources

    def _untie(self, base: Any) -> bool:
        """Give embeddings and head a tensor each where only one of them is changed; check that all are found."""
        changed = self._layers.keys() | self._replaced.keys()
        tied = _tied(base)
        untied = bool(base.config.get_text_config().tie_word_embeddings) and any(name in changed for name in tied)
        if untied:
            for name, other in (tied, tied[::-1]):
                if name not in self._sources and other in self._sources:
                    self._sources[name] = self._sources[other]
        missing = sorted(changed - self._sources.keys())
        if missing:
            raise UserError(
                f"the adapter changes {len(missing)} tensors that the files in {self._files.folder} do not hold under "
                f"the model's names ({missing[0]}, ...): transformers converts this base while it loads it. Merge in "
                "memory: PeftModel.merge_and_unload()."
            )
        return untied


def without_base(adapter: Adapter, config: Any) -> PeftModel:
    """Return an adapter on a base that has shapes and no values: each of its parameters takes four bytes.

    Args:
        adapter (`Adapter`): It must fit the base.
        config (`PreTrainedConfig`): The base's.
    """
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(plain_config(config), dtype=torch.float32, trust_remote_code=False)
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in base.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in made:  # tied ones stay one
                made[parameter] = nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False)
            setattr(module, name, made[parameter])
    with refused(f"the adapter {adapter.folder} cannot be loaded"):
        return PeftModel.from_pretrained(base, str(adapter.folder), low_cpu_mem_usage=True, torch_device="cpu")


def _layers(model: PeftModel) -> Iterator[tuple[str, Any]]:
    """Yield each base tensor that a layer of the adapter acts on, with that layer."""
    for path, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        kind = type(layer).__name__
        base: Any = layer.get_base_layer()
        stacked = isinstance(getattr(layer, "base_layer", None), BaseTunerLayer)
        if isinstance(layer, ParamWrapper) or stacked or not hasattr(layer, "merge") or not hasattr(base, "weight"):
            raise UserError(
                f"{path} is a {kind} of PEFT, which cannot be merged tensor by tensor; export without --merge."
            )
        for name, _ in base.named_parameters(recurse=False):
            yield base_name(f"{path}.{name}"), layer


def _replaced(model: PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what the adapter's file holds in full: saved modules, resized embeddings, trained biases."""
    saved_names = set()
    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            saved: Any = module.modules_to_save[ADAPTER_NAME]
            for name, parameter in saved.named_parameters():
                saved_names.add(base_name(f"{path}.{name}"))
                yield base_name(f"{path}.{name}"), parameter.detach()
    prefixes = adapter_prefixes(model)
    for name, parameter in model.named_parameters():
        if any(parameter.stride()) and not name.startswith(prefixes):  # no longer an expanded zero
            if base_name(name) in saved_names:
                continue  # what the module that was trained stood beside; PEFT saves embeddings with both
            yield base_name(name), parameter.detach()


def _is_linear(module: nn.Module) -> bool:
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return type(base) is nn.Linear


def _tied(base: Any) -> tuple[str, str]:
    names = {id(module): name for name, module in base.named_modules()}
    found = [names[id(part)] for part in (base.get_input_embeddings(), base.get_output_embeddings())]
    first, second = (base_name(f"{name}.weight") for name in found)
    return first, second


def _merged(layer: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Lend a layer the real values of its base, let PEFT merge into them, and take them away again."""
    base = layer.get_base_layer()
    kept = {name: base._parameters[name] for name in values}
    try:
        for name, value in values.items():
            base._parameters[name] = nn.Parameter(value, requires_grad=False)
        layer.merge()
        if layer.get_base_layer() is not base:  # LN tuning puts another module in its place
            layer.unmerge()
            raise ValueError(f"{type(layer).__name__} does not merge into its base layer")
        return {name: base._parameters[name].detach() for name in values}
    finally:
        base._parameters.update(kept)
        layer.merged_adapters.clear()
