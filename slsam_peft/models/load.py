"""The one way from a base model's name to its configuration, its tokenizer and its weights.

`find_model` turns a name into what `from_pretrained` takes; everything else here takes that.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedConfig

from slsam_peft.errors import UserError, brief
from slsam_peft.models.bnb_cpu import keep_trainable
from slsam_peft.models.fetched import FETCHED
from slsam_peft.names import hint_at

# What transformers and PEFT raise, one way or another, for files that hold values of a wrong kind, or that do not
# belong on each other: their constructors check few of them.
MALFORMED = (
    OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, ImportError,
    AssertionError, RecursionError, re.error, SafetensorError, StrictDataclassError,
)  # fmt: skip

Tell = Callable[[str], None]  # is told what is going on, before each part that takes time


def find_model(name: str, tell: Tell = lambda _: None) -> str:
    """Return what `from_pretrained` takes for a model's name: a folder that is there, or a name on the Hub.

    Args:
        name (`str`): A folder, a name on the Hub, or `"smollm2"` or `"gemma3"`, which are fetched where they are not
            there yet. A folder of that name comes first.
        tell (callable, *optional*): Is told of a download.

    Raises:
        UserError: the name is spelled as a path and there is no such folder, the folder holds an adapter, or the
            model cannot be fetched.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        _refuse_adapter(folder)
        return str(folder)
    if name in FETCHED:
        return str(FETCHED[name](tell))
    if is_path(name):
        raise UserError(
            f"model folder {name} does not exist (from {Path.cwd()}); name a folder with a model in it, a name on the "
            f"Hub, or {' or '.join(FETCHED)}."
        )
    return name


def _refuse_adapter(folder: Path) -> None:
    """Refuse a folder with an adapter and no model, by the name of the adapter's base."""
    settings = folder / "adapter_config.json"
    if not settings.is_file() or (folder / "config.json").is_file():
        return
    try:
        base = json.loads(settings.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    of = f" of the base model {base}" if base else ""
    raise UserError(
        f"{folder} holds an adapter{of}, not a model. Name {base or 'its base model'}; to train on from the adapter, "
        f"merge it first: slsam-peft export {folder} --merge --output FOLDER, and name that folder."
    )


def is_path(name: str) -> bool:
    """Return whether a model's name is spelled as no name on the Hub is, so that it can only be a local path."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def load_config(source: str, *, local: bool = False) -> PreTrainedConfig:
    """Load a model's configuration.

    Args:
        source (`str`): From `find_model`, or a JSON file.
        local (`bool`, *optional*, defaults to `False`): Ask no network.

    Raises:
        UserError: it cannot be found or read. The message holds the loader's own words.
    """
    with refused_by_name(source, "cannot be read"):
        return AutoConfig.from_pretrained(source, local_files_only=local, trust_remote_code=False)


def load_tokenizer(source: str) -> Any:
    """Load a tokenizer.

    Raises:
        UserError: it cannot be found or read. The message holds the loader's own words.
    """
    with refused_by_name(source):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def load_model(
    source: str,
    dtype: torch.dtype | None,
    quantization: Any = None,
    attention: str | None = None,
) -> Any:
    """Load a causal language model onto the GPU, or the CPU where there is none.

    Args:
        source (`str`): From `find_model`.
        dtype (`torch.dtype` or `None`): Of its weights; `None` keeps that of its files.
        quantization (`QuantizationConfigMixin`, *optional*): How its linear layers are quantised.
        attention (`str`, *optional*): The attention's implementation, as transformers names it.

    Raises:
        UserError: it cannot be found or read. The message holds the loader's own words.
    """
    with refused_by_name(source):
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype or "auto",
            quantization_config=quantization,
            attn_implementation=attention,
            device_map={"": "cuda:0" if torch.cuda.is_available() else "cpu"},
            trust_remote_code=False,
        )
    keep_trainable(model)  # it may be evaluated before it is trained
    return model


def load_with_tokenizer(source: str, dtype: torch.dtype, *, nf4: bool = False) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        source (`str`): From `find_model`.
        dtype (`torch.dtype`): Of its weights; what quantised layers compute in.
        nf4 (`bool`, *optional*, defaults to `False`): Quantise its linear layers to 4-bit NF4.

    Raises:
        UserError: it cannot be found or read. The message holds the loader's own words.
    """
    tokenizer = load_tokenizer(source)  # before any weights
    quantization = None
    if nf4:
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return load_model(source, dtype, quantization), tokenizer


@contextmanager
def refused(what: str, then: str = "") -> Iterator[None]:
    """Turn whatever a library raises, while it makes an object of a file, into a refusal that names the file.

    Args:
        what (`str`): The beginning of the message: the file, and what cannot be done with it.
        then (`str`, *optional*): Its end: what to do.

    Raises:
        UserError: the block raised one of `MALFORMED`, or a `UserError`, which passes as it is.
    """
    try:
        yield
    except MALFORMED as error:
        raise UserError(f"{what}: {brief(error)}{then}") from error


@contextmanager
def refused_by_name(source: str, what: str = "could not be loaded") -> Iterator[None]:
    """Turn whatever a library raises for a model's files into a refusal that names the model, as `refused` does."""
    hint = "" if "/" in source or Path(source).exists() else hint_at(source, FETCHED)
    then = (
        f"{hint}\nName a folder with a causal language model in it, a name on the Hub that can be reached, or "
        f"{' or '.join(FETCHED)}."
    )
    with refused(f"model {source} {what}", then):
        yield


def compute_dtype(name: str) -> torch.dtype:
    """Return the dtype the model computes in: the named one, or for `"auto"` the fast one on this machine.

    bfloat16 pays where the processor multiplies in it; elsewhere it is emulated, and float32 is faster and exact.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    able = torch.cpu.get_capabilities()
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32
