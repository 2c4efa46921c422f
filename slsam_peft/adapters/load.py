"""Loads adapters from disk: their folder, their base model, whether the two fit, and the model made of both."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from slsam_peft.adapters.arms import SETTINGS, WEIGHTS, shapes_in
from slsam_peft.adapters.quantization import settings_of
from slsam_peft.adapters.vocabulary import as_trained, is_copy, resize, tensor_of
from slsam_peft.errors import UserError, brief
from slsam_peft.models import smollm2
from slsam_peft.models.load import (
    MALFORMED,
    find_model,
    is_path,
    load_config,
    load_model,
    load_tokenizer,
    refused,
)
from slsam_peft.saving.record import Record, base_name, base_shape
from slsam_peft.saving.recorded import read_record

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter in a folder.

    Args:
        folder (`Path`): Where it lies.
        config (`PeftConfig`): Its settings.
        shapes (`dict[str, tuple[int, ...]]`): Its tensors, by their names in the file.
        record (`dict` or `None`): What the trainer wrote beside it, see `slsam_peft.saving.record`.
        base (`str`): Folder or Hub name of the base model.
    """

    folder: Path
    config: Any
    shapes: Shapes
    record: Record | None
    base: str

    @property
    def quantization(self) -> dict[str, Any] | None:
        """How the base was quantised in training; `None` where it was not, or that is not known."""
        return None if self.record is None else self.record["base"]["quantization"]


@dataclass(frozen=True)
class Fit:
    """How an adapter's tensors fit a base model.

    Args:
        shape (`list[str]`): Fields of the base's config that differ from the recorded ones.
        unused (`list[str]`): Tensors in the file that the base has no place for.
        missing (`list[str]`): Tensors that the base has a place for and the file lacks.
        misshapen (`list[str]`): Tensors of another shape than the base's place for them.
    """

    shape: list[str]
    unused: list[str]
    missing: list[str]
    misshapen: list[str]

    def __bool__(self) -> bool:
        return not (self.shape or self.unused or self.missing or self.misshapen)


def open_adapter(folder: str | Path, model: str | None = None) -> Adapter:
    """Read what is cheap to read of an adapter: its settings, the header of its weights, its record.

    Args:
        folder (`str` or `Path`): A folder as `save_model` and `save_pretrained` write it, or a checkpoint.
        model (`str`, *optional*): The base model; the one the adapter names where it is missing.

    Raises:
        UserError: there is no such folder, no adapter in it, it is damaged, or its base cannot be found.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(f"adapter folder {folder} does not exist (from {Path.cwd()}).")
    if not (path / SETTINGS).is_file():
        what = "a full model, not an adapter" if (path / "config.json").is_file() else "no adapter"
        raise UserError(
            f"{folder} holds {what}: {SETTINGS} is missing. Name the folder an adapter was saved in.{below(path)}"
        )
    with refused(f"{path / SETTINGS} cannot be read"):
        config: Any = PeftConfig.from_pretrained(str(path))
    if config.task_type not in (None, "CAUSAL_LM"):
        raise UserError(f"{folder} is an adapter for {config.task_type}; adapters of causal language models work.")
    if config.is_prompt_learning:
        raise UserError(
            f"{folder} holds {config.peft_type.value} prompts, no weights of modules; it is not supported."
        )
    shapes = _header(path / WEIGHTS)
    return Adapter(path, config, shapes, read_record(path), _base_of(config, model))


def below(folder: Path) -> str:
    """Return a sentence on the adapters in the folders below one, such as PEFT makes for those with a name."""
    found = sorted(str(path.parent) for path in folder.glob(f"*/{SETTINGS}"))
    return f" There are adapters in: {', '.join(found[:4])}." if found else ""


def _header(path: Path) -> Shapes:
    if not path.is_file():
        pickled = path.with_suffix(".bin")
        hint = f" {pickled.name} is a pickle and is not read; save the adapter again." if pickled.exists() else ""
        raise UserError(f"{path} does not exist.{hint}")
    return shapes_in(path)


def _base_of(config: Any, given: str | None) -> str:
    """Return what `from_pretrained` takes for an adapter's base model.

    Args:
        config (`PeftConfig`): The adapter's settings.
        given (`str` or `None`): The base that the user has named.

    Raises:
        UserError: there is no name, or no such folder.
    """
    name = given or config.base_model_name_or_path
    if not name or not isinstance(name, str):
        named = f"names {name!r} as" if name else "does not name"
        raise UserError(f"the adapter {named} its base model; name it with --model.")
    there = Path(name).expanduser().is_dir()
    if is_path(name) and not there:
        if given is not None:
            raise UserError(f"--model={name} is not a folder; name one with a model in it, or a hub name.")
        raise UserError(f"the adapter's base model {name} is not here; name its folder or hub name with --model.")
    # Adapters of the quickstart name their base by its name on the Hub. Those on other models of the Hub, Gemma 3
    # among them, have been trained on the weights there, which are not those in the cache.
    return str(smollm2.fetch_smollm2()) if name == smollm2.PACKED.hub_name and not there else find_model(name)


def base_config(adapter: Adapter) -> Any:
    """Return the config of an adapter's base model, with as many embeddings as it had in training.

    Raises:
        UserError: it cannot be found or read, or some of the embeddings it had are nowhere.
    """
    try:
        config = load_config(adapter.base)
    except UserError as error:
        raise UserError(f"base {error}") from error
    return as_trained(config, adapter.shapes)


def fit(adapter: Adapter, config: Any) -> Fit:
    """Compare an adapter with a base model's config. No weights are read.

    Args:
        adapter (`Adapter`): The adapter.
        config (`PreTrainedConfig`): The base's.
    """
    # The adapter's tensors, against the places that PEFT makes for them.
    with torch.device("meta"), refused(f"no model can be made of the configuration of {adapter.base}"):
        base = AutoModelForCausalLM.from_config(plain_config(config), trust_remote_code=False)
        own = {name: tuple(p.shape) for name, p in base.named_parameters(remove_duplicate=False)}
    try:
        with torch.device("meta"):
            model: Any = get_peft_model(base, adapter.config, low_cpu_mem_usage=True)
    except MALFORMED as error:  # no module has a name that is to be adapted, or a setting is of a wrong kind
        shape = _other_sizes(adapter, config)
        return Fit([*shape, f"{adapter.folder / SETTINGS}: {brief(error)}"], sorted(adapter.shapes), [], [])
    # The base's own sizes, against those it had in training: with the blocks that PEFT repeats (layer_replication).
    shape = _other_sizes(adapter, base.config)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    places: Shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    # Embeddings that are adapted or were resized are saved in full beside the adapter.
    known = places | {key: own[name] for key in adapter.shapes if (name := base_name(key)) in own}
    known |= {key: own[tensor_of(key)] for key in adapter.shapes if is_copy(key, known) and tensor_of(key) in own}
    return Fit(
        shape=shape,
        unused=sorted(adapter.shapes.keys() - known.keys()),
        missing=sorted(places.keys() - adapter.shapes.keys()),
        misshapen=[
            f"{name}: {adapter.shapes[name]}, the base needs {known[name]}"
            for name in sorted(known.keys() & adapter.shapes.keys())
            if adapter.shapes[name] != known[name]
        ],
    )


def _other_sizes(adapter: Adapter, config: Any) -> list[str]:
    """Return the fields of a base's config that differ from the recorded ones; none where nothing is recorded."""
    if adapter.record is None:
        return []
    here = base_shape(config)
    recorded = adapter.record["base"]["shape"].items()
    return [f"{name} is {here[name]}, trained on {value}" for name, value in recorded if here[name] != value]


def plain_config(config: Any) -> Any:
    """Return a copy of a config without its quantisation."""
    copy = type(config).from_dict(config.to_dict())
    copy._attn_implementation = config._attn_implementation
    if hasattr(copy, "quantization_config"):
        del copy.quantization_config
    return copy


def check_fit(adapter: Adapter) -> Any:
    """Check that an adapter fits its base, and return the base's config.

    Raises:
        UserError: it does not, or the base cannot be read.
    """
    config = base_config(adapter)
    found = fit(adapter, config)
    if not found:
        reasons = [*found.shape, *found.misshapen]
        reasons += [
            f"{n} tensors {why}"
            for n, why in ((len(found.unused), "have no place"), (len(found.missing), "are missing"))
            if n
        ]
        raise UserError(
            f"the adapter {adapter.folder} does not fit {adapter.base}: {'; '.join(reasons[:3])}.\n"
            "Name the base it was trained on with --model."
        )
    return config


def load_adapted(
    adapter: Adapter, *, dtype: torch.dtype | None = None, trainable: bool = False, attention: str | None = None
) -> tuple[PeftModel, Any]:
    """Load the base as it was in training and put the adapter on it with plain PEFT.

    Args:
        adapter (`Adapter`): From `open_adapter`.
        dtype (`torch.dtype`, *optional*): What the base is loaded and computes in; as recorded where it is missing,
            else as its files are.
        trainable (`bool`, *optional*, defaults to `False`): Let the adapter's parameters require grad.
        attention (`str`, *optional*): The attention's implementation, as transformers names it.

    Returns:
        `tuple[PeftModel, PreTrainedTokenizerBase]`: In evaluation mode, on the GPU or the CPU where there is none.

    Raises:
        UserError: the base cannot be read, or the adapter does not fit it.
    """
    config = check_fit(adapter)
    recorded = None if adapter.record is None else getattr(torch, adapter.record["base"]["dtype"])
    dtype = dtype or recorded
    quantization = settings_of(adapter.quantization, config, dtype, adapter.base)
    base = load_model(adapter.base, dtype, quantization, attention)
    resize(base, config)
    with refused(f"the adapter {adapter.folder} cannot be loaded"):
        model = PeftModel.from_pretrained(base, str(adapter.folder), is_trainable=trainable)
    return model.eval(), adapter_tokenizer(adapter)


def adapter_tokenizer(adapter: Adapter) -> Any:
    """Return the tokenizer saved with an adapter, or its base's.

    Raises:
        UserError: neither has one.
    """
    own = (adapter.folder / "tokenizer_config.json").is_file()
    try:
        return load_tokenizer(str(adapter.folder) if own else adapter.base)
    except UserError as error:
        reason = brief(error.__cause__ or error)
        raise UserError(f"neither {adapter.folder} nor {adapter.base} has a tokenizer: {reason}") from error


def raw_tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors as they are in its file."""
    with safe_open(adapter.folder / WEIGHTS, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
