"""Keeps 4-bit layers trainable on processors with AVX512-BF16."""

from typing import Any

from torch import nn


def keep_trainable(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights of `model` for CPU inference.

    On a CPU with AVX512-BF16, `Linear4bit` (bitsandbytes 0.50) repacks its weight for good at the first forward in
    eval mode that needs no gradient, and the product with a repacked weight has no gradient with respect to its
    input. After one evaluation, training then goes on with gradients that skip the base layers, without an error:
    measured on SmolLM2-135M, a cosine of 0.02 to the true gradient at the embeddings.

    Raises:
        ValueError: a weight is repacked already.
    """
    module: Any  # bitsandbytes' attributes are unknown to torch's types
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
            raise ValueError(
                f"the 4-bit weight of {name} was repacked for inference by a forward pass in eval mode, and gradients "
                "no longer pass through it. Load the model again and train it before anything else."
            )
        module.support_avx512bf16_for_cpu = False
