"""Makes the weights that training on a quantised base saw: quantised as bitsandbytes does it, and back."""

from typing import Any

import bitsandbytes.functional as bnb
import torch

from slsam_peft.errors import UserError

NF4: dict[str, Any] = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": False,
}


def dequantized(weight: torch.Tensor, quantization: dict[str, Any], dtype: torch.dtype) -> torch.Tensor:
    """Return a linear layer's weight as a quantised base multiplies with it.

    Args:
        weight (`torch.Tensor`): The original weight, shape `(out, in)`.
        quantization (`dict`): bitsandbytes' settings, as a model's config has them.
        dtype (`torch.dtype`): What the model was loaded in.

    Returns:
        `torch.Tensor`: Shape and dtype of `weight` in `dtype`.

    Raises:
        UserError: the settings are of another kind of quantisation.
    """
    check_quantization(quantization)
    source = weight.to(dtype).contiguous()
    if torch.cuda.is_available():
        source = source.cuda()
    if quantization.get("load_in_8bit"):
        rows, scales, _ = bnb.int8_vectorwise_quant(source.half())
        return bnb.int8_vectorwise_dequant(rows, scales).to(dtype).cpu()
    packed, state = bnb.quantize_4bit(
        source,
        compress_statistics=bool(quantization.get("bnb_4bit_use_double_quant")),
        quant_type=quantization.get("bnb_4bit_quant_type", "fp4"),
    )
    return bnb.dequantize_4bit(packed, state).to(dtype).cpu()


def check_quantization(quantization: dict[str, Any]) -> None:
    """Refuse what `dequantized` cannot repeat.

    Raises:
        UserError: it is not bitsandbytes in 4 or 8 bits.
    """
    method = quantization.get("quant_method")
    if method != "bitsandbytes" or not (quantization.get("load_in_4bit") or quantization.get("load_in_8bit")):
        raise UserError(
            f"a base quantised by {method} cannot be dequantized here; bitsandbytes in 4 and 8 bits can. Merge into "
            "the original weights: --base original."
        )
