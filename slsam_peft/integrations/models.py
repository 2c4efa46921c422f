"""Base models for the commands that need one."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slsam_peft.errors import UserError
from slsam_peft.integrations.quickstart import compute_dtype, load_nf4
from slsam_peft.integrations.smollm2 import fetch_smollm2


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
    dtype = compute_dtype("auto")
    if in_4bit:
        return load_nf4(source, dtype)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:  # what transformers raises for names, files and architectures
        said = " ".join(str(error).split())
        raise UserError(f"--model {source} could not be loaded: {said[:400]}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer
