"""Gives a base as many embeddings as an adapter was trained with: tokens may have been added before training.

PEFT saves embeddings in full where their number differs from the base's; it loads them onto a base that was resized
first, and onto no other.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from slsam_peft.errors import UserError
from slsam_peft.saving.record import base_name

Shapes = Mapping[str, tuple[int, ...]]

# PEFT saves what stands under this name a second time, beside the base's own tensor, where embeddings are saved.
_COPY = ".modules_to_save."


def tensor_of(key: str) -> str:
    """Return the name in the base of a tensor that an adapter's file holds in full, from its key in the file."""
    return base_name(key.replace(_COPY, "."))


def is_copy(key: str, shapes: Shapes) -> bool:
    """Return whether PEFT has saved this tensor of an adapter twice, and loads the other one."""
    return _COPY in key and key.replace(_COPY, ".") in shapes


def as_trained(config: Any, shapes: Shapes) -> Any:
    """Return a base's config with the number of embeddings that an adapter's file holds.

    Args:
        config (`PreTrainedConfig`): The base's. It stays as it is; a copy is returned where the numbers differ.
        shapes (`dict[str, tuple[int, ...]]`): The tensors in the adapter's file.

    Raises:
        UserError: the file holds only some of the embeddings' tensors, so that rows of the others are lost.
    """
    words = config.get_text_config().vocab_size
    full = {tensor_of(key): shape for key, shape in shapes.items() if len(shape) == 2 and "lora_" not in key}
    if not any(shape[0] != words for shape in full.values()):
        return config
    names = embedding_names(config)
    sizes = {name: full[name][0] for name in names if name in full}
    if not sizes or set(sizes.values()) == {words}:
        return config
    count = max(sizes.values())
    missing = [name for name in names if sizes.get(name) != count]
    if missing:
        raise UserError(
            f"the adapter was trained on a base with {count} embeddings instead of {words}, and has no {missing[0]}, "
            "so what the added tokens have there is lost. Name the base that was resized with --model."
        )
    resized = type(config).from_dict(config.to_dict())
    resized._attn_implementation = config._attn_implementation
    resized.get_text_config().vocab_size = count
    return resized


def embedding_names(config: Any) -> tuple[str, ...]:
    """Return the names of a base's embeddings and of its head, which are one tensor where they are tied."""
    copy = type(config).from_dict(config.to_dict())
    if hasattr(copy, "quantization_config"):
        del copy.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy, trust_remote_code=False)
    modules: list[nn.Module | None] = [model.get_input_embeddings()]
    if not config.get_text_config().tie_word_embeddings:
        modules.append(model.get_output_embeddings())
    names = {id(module): name for name, module in model.named_modules()}
    return tuple(f"{names[id(module)]}.weight" for module in modules if module is not None)


def resize(model: Any, config: Any) -> None:
    """Give a base the number of embeddings in `config`; an adapter fills the rows when it is loaded."""
    count = config.get_text_config().vocab_size
    if model.get_input_embeddings().weight.shape[0] != count:
        model.resize_token_embeddings(count, mean_resizing=False)
