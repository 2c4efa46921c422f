"""Turns the recorded quantisation of an adapter's base into the settings that load it so again."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    AutoQuantizationConfig,
)

from slsam_peft.config import RECORD_NAME
from slsam_peft.errors import UserError, brief

BITSANDBYTES = "bitsandbytes"

# These can be made of a plain model while it is loaded, others are read from files that hold quantised weights alone.
# Whether the transformers that is installed makes them, `_check_here` asks it: not each version does.
ON_THE_FLY = (BITSANDBYTES, "quanto", "torchao", "hqq")


def settings_of(recorded: Mapping[str, Any] | None, config: Any, dtype: torch.dtype | None, base: str) -> Any:
    """Return what `from_pretrained` takes as `quantization_config`; `None` where the base's files decide.

    Args:
        recorded (`dict` or `None`): The quantisation in training.
        config (`PreTrainedConfig`): That of the base at hand.
        dtype (`torch.dtype` or `None`): What the model computes in.
        base (`str`): The base's name, for messages.

    Raises:
        UserError: this kind is not known or cannot be loaded here, or its settings are not what it takes.
    """
    if recorded is None:
        return None
    method = method_of(recorded)
    stored = getattr(config, "quantization_config", None)
    if stored is not None and method != BITSANDBYTES:
        return None  # the files are quantised themselves
    if method not in ON_THE_FLY:
        raise UserError(
            f"the adapter was trained on a base quantised by {method}, and {base} is not: its weights cannot be "
            "quantised so while it is loaded. Name the quantised model with --model."
        )
    settings = dict(recorded)
    if dtype is not None and method == BITSANDBYTES:
        settings["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
    try:
        made = AutoQuantizationConfig.from_dict(settings)
        _check_here(made)
    except (ImportError, NotImplementedError) as error:  # not installed, or read from quantised files alone
        raise UserError(
            f"the adapter was trained on a base quantised by {method}, which cannot be loaded here: "
            f"{brief(error, 300)}"
        ) from error
    except (TypeError, ValueError, AttributeError, KeyError, AssertionError) as error:  # values of odd types
        raise UserError(
            f"base model {base} cannot be quantised as recorded: {brief(error, 300)}. Delete "
            f"{RECORD_NAME} beside the adapter: it then counts as one on a base that was not quantised."
        ) from error
    return made


def method_of(recorded: Mapping[str, Any]) -> str:
    """Return the kind of quantisation that settings are of; bitsandbytes' may lack a name."""
    named = getattr(recorded.get("quant_method"), "value", recorded.get("quant_method"))
    if named is None and (recorded.get("load_in_4bit") or recorded.get("load_in_8bit")):
        return BITSANDBYTES
    return str(named)


def _check_here(settings: Any) -> None:
    """Ask the loader of this kind whether what it needs is installed, and whether it quantises a model as it loads it.

    Raises:
        ImportError: something is not installed.
        NotImplementedError: transformers reads models of this kind and makes none while it loads
            (`HfQuantizer.get_quantize_ops`).
    """
    method = method_of(settings.to_dict())
    if method != BITSANDBYTES:
        quantizer = AUTO_QUANTIZER_MAPPING[method](settings, pre_quantized=False)
        quantizer.validate_environment(device_map=None)
        quantizer.get_quantize_ops()
