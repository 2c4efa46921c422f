"""Base models for the commands that need one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from slsam_peft.errors import UserError
from slsam_peft.models.bnb_cpu import keep_trainable
from slsam_peft.models.smollm2 import fetch_smollm2


def load_base(name: str | None, in_4bit: bool, tell: Callable[[str], None] = lambda _: None) -> tuple[Any, Any]:
    """Load a base model and its tokenizer onto the GPU, or the CPU where there is none.

    Args:
        name (`str` or `None`): Hub name or folder; `None` means SmolLM2-135M-Instruct, fetched as by the quickstart.
        in_4bit (`bool`): Linear layers in NF4.
        tell (`Callable[[str], None]`, *optional*): Told what is going on.

    Raises:
        UserError: it cannot be fetched, found or read.
    """
    source = name or str(fetch_smollm2(tell))
    return (load_nf4 if in_4bit else load_unquantized)(source, compute_dtype("auto"))


def load_nf4(source: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load a model with its linear layers in 4-bit NF4, and its tokenizer.

    Raises:
        UserError: it cannot be found or read. The message holds the loader's own words.
    """
    tokenizer = load_tokenizer(source)
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    place = "cuda:0" if torch.cuda.is_available() else "cpu"
    model = _load_model(source, dtype, quantization_config=quantized, device_map={"": place})
    keep_trainable(model)  # it may be evaluated before it is trained
    return model, tokenizer


def load_unquantized(source: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load a model as it is, and its tokenizer.

    Raises:
        UserError: it cannot be found or read. The message holds the loader's own words.
    """
    tokenizer = load_tokenizer(source)
    return _load_model(source, dtype).to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def load_tokenizer(source: str) -> Any:
    """Load a tokenizer.

    Raises:
        UserError: it cannot be found or read. The message holds the loader's own words.
    """
    with _named(source):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def _load_model(source: str, dtype: torch.dtype, **more: Any) -> Any:
    with _named(source):
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=False, **more)


@contextmanager
def _named(source: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:  # for names, files and architectures
        raise UserError(f"model {source} could not be loaded: {' '.join(str(error).split())[:400]}") from error


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
