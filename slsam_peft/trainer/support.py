"""Checks, before the first step, what a trainer must not ask for and what its optimizer must hold."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import torch
from torch import nn

from slsam_peft.algorithm.arms import Arm
from slsam_peft.config import SLSAMConfig, rule_name
from slsam_peft.described import to_name
from slsam_peft.saving.record import adapter_prefixes


def check_trainer(trainer: Any) -> None:
    """Refuse set-ups that SL-SAM does not support.

    Raises:
        ValueError: DeepSpeed, DataParallel, torch.compile, checkpoints in the middle of a step, or a trainer that
            generates inside its training step. The message says why and what to use instead.
    """
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "DeepSpeed is not supported: its engine owns the backward pass and the gradients, and a step here "
            "needs two. DeepSpeed 0.19.8 with ZeRO-2 on one CPU process was tried: it did not get beyond its start. "
            "Use DDP (torchrun or accelerate launch), or FSDP2 (fsdp_config={'version': 2})."
        )
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"one process for {trainer.args.n_gpu} GPUs is not supported: torch.nn.DataParallel copies the model in "
            "every pass, and the copies know neither arms nor perturbation. Start one process per GPU (torchrun or "
            "accelerate launch), or show it one (CUDA_VISIBLE_DEVICES=0)."
        )
    if trainer.args.torch_compile or any(_is_compiled(module) for module in trainer.model.modules()):
        raise ValueError(
            "torch.compile is not supported: active arms change in every step, so every step would be compiled "
            "again. Set torch_compile=False and pass the model as it was before torch.compile."
        )
    if trainer.args.enable_jit_checkpoint:
        raise ValueError(
            "enable_jit_checkpoint=True is not supported: it saves between a step's gradient and the optimizer's "
            "step, when the sampler is one step ahead of the weights. Use save_steps; `slsam-peft sft` saves at the "
            "end of the step when it is told to stop."
        )
    if hasattr(trainer, "_generate_and_score_completions"):
        raise ValueError(
            f"{type(trainer).__name__} is not supported: its training step generates completions and "
            "counts its calls, so it cannot be run twice on one batch. SFT, DPO, KTO and reward trainers work."
        )


def check_reference(trainer: Any, config: SLSAMConfig) -> None:
    """Refuse noise on frozen weights where these are the trainer's reference model, too, within a step.

    The trainers of preferences that have no model of its own for it run the trained one without its adapter.

    Raises:
        ValueError: the reference would be noisy. The message says how it need not be.
    """
    if rule_name(config.ascent) != "flat_lora" or not config.is_perturbed:
        return
    shared = hasattr(trainer, "ref_model") and trainer.ref_model is None
    if shared and not getattr(trainer.args, "precompute_ref_log_probs", False):
        raise ValueError(
            f"ascent={to_name(config.ascent)!r} adds noise to the frozen weights within a step, and "
            f"{type(trainer).__name__} takes its reference log-probabilities from the same weights there. Set "
            "precompute_ref_log_probs=True, hand over a ref_model, or use another rule."
        )


def check_quantized(model: nn.Module) -> None:
    """Refuse a base whose quantised layers pass no gradient on to their input: nothing below them could be trained.

    Kernels that quantise activations as they come often have no backward pass. Each layer whose weight is a packed
    tensor of a library's own is run on one token.

    Raises:
        ValueError: there is one. The message names the layer, and the kind of its weight.
    """
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        weight = module._parameters.get("weight")
        if weight is None or not hasattr(weight, "__tensor_flatten__") or weight.is_meta:
            continue
        with torch.enable_grad():
            token = torch.ones(1, module.in_features, dtype=weight.dtype, device=weight.device, requires_grad=True)
            passes_on = module(token).requires_grad
        if not passes_on:
            kind = f"{type(weight).__module__.partition('.')[0]}'s {type(weight).__name__}"
            raise ValueError(
                f"{name} is quantised so that it passes no gradient on to its input ({kind}; where activations are "
                "quantised as they come, as by Int8DynamicActivationInt8WeightConfig, the product has no backward "
                "pass). Quantise weights alone (for example Int8WeightOnlyConfig, NF4, or quanto's int8 and int4), or "
                "leave this layer out (modules_to_not_convert)."
            )


def _is_compiled(module: Any) -> bool:
    """Whether a module was wrapped by `torch.compile(module)` or compiled in place by `module.compile()`."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def check_optimizer(trainer: Any, arms: Sequence[Arm]) -> None:
    """Check that the trainer's optimizer holds every arm's parameters, and steps when it is told to.

    Raises:
        ValueError: some are missing, which would get gradients and never be trained; or it steps inside the backward
            pass (LOMO, layer-wise ones), and a second pass would start from other weights.
    """
    optimizer: Any = trainer.optimizer
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    named = [(n, p) for arm in arms for n, p in zip(arm.parameter_names, arm.parameters, strict=True)]
    missing = [n for n, p in named if id(p) not in optimized]
    name = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    hooked = [n for n, p in named if getattr(p, "_post_accumulate_grad_hooks", None)]
    if hooked or "lomo" in name or "layerwise" in name:
        what = f"optim={name!r}" if not hooked else f"{type(optimizer).__name__}, which hooks {hooked[0]}"
        raise ValueError(
            f"{what}, is not supported: it steps inside the backward pass, and a step here has two passes that must "
            "start from the same weights. Use an optimizer that steps afterwards, for example "
            "optim='paged_adamw_8bit'."
        )
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(
            f"the optimizer lacks {len(missing)} trainable parameters ({shown}), so their arms would never be "
            "trained. Build it over every parameter that requires grad, or let the trainer build it "
            "(optimizers=(None, None))."
        )


def may_be_trained(model: nn.Module) -> set[str]:
    """Return the names of what training may come to train: what requires a gradient now, and adapters that are frozen.

    Names, since sharding puts other parameters in the place of those that were there. A base below adapters that
    is frozen now stays so: optimizers are often built over all of a model's parameters.

    Args:
        model (`nn.Module`): The model. Without adapters each of its parameters counts.
    """
    adapters = adapter_prefixes(model)
    parameters = model.named_parameters()
    return {name for name, p in parameters if p.requires_grad or not adapters or name.startswith(adapters)}


@contextmanager
def held(optimizer: Any, model: nn.Module, candidates: Collection[str]) -> Iterator[None]:
    """Let everything that an optimizer will train again require a gradient inside the context.

    Callbacks freeze parameters for a while. Those that the optimizer holds will be trained again.

    Args:
        optimizer (`torch.optim.Optimizer` or `None`): The optimizer; `None` where there is none yet.
        model (`nn.Module`): The model.
        candidates (`Collection[str]`): From `may_be_trained`, before training.
    """
    known = {p for name, p in model.named_parameters() if name in candidates}
    groups = [] if optimizer is None else optimizer.param_groups
    frozen = [p for group in groups for p in _stepped_on(group) if not p.requires_grad and p in known]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _stepped_on(group: dict[str, Any]) -> Iterator[nn.Parameter]:
    """Yield the parameters of an optimizer's group, without LoRA-FA's factors A: it reads them and moves B alone."""
    fixed = "scaling_factors" in group
    for parameter, name in zip(group["params"], group["names"] if fixed else repeat(""), strict=False):
        if "lora_A" not in name:
            yield parameter


def outside(model: nn.Module, arms: Sequence[Arm]) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters that belong to no arm, with their names."""
    known = {p for arm in arms for p in arm.parameters}
    return [(name, p) for name, p in model.named_parameters() if p not in known]


def refuse_thawed(outside: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Refuse parameters that belong to no arm and have come to require a gradient.

    Args:
        outside (`Iterable[tuple[str, nn.Parameter]]`): What `outside` returned.

    Raises:
        ValueError: there is one. It was neither trained before nor is it part of an adapter that the optimizer holds,
            or it would belong to an arm.
    """
    thawed = next((name for name, p in outside if p.requires_grad), None)
    if thawed is not None:
        raise ValueError(
            f"{thawed} requires a gradient since training began, and belongs to no arm: it was frozen when the "
            "trainer was built, and is no part of an adapter that the optimizer holds. Let it require a gradient when "
            "the trainer is built, and freeze it until it is wanted."
        )


def check_sequences(trainer: Any, config: SLSAMConfig) -> None:
    """Check that a step has as many sequences as are to make its ascent.

    Raises:
        ValueError: it has fewer.
    """
    args, wanted = trainer.args, config.ascent_sequences
    if wanted is None or not config.is_perturbed:
        return
    if getattr(args, "packing", False) or getattr(args, "padding_free", False):
        return  # documents are counted as they come
    each, count = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if wanted > each * count:
        raise ValueError(
            f"ascent_sequences={wanted} is more than the {each * count} sequences of a step "
            f"(per_device_train_batch_size={each}, gradient_accumulation_steps={count}); with all of them it is dense "
            f"SAM, method='sam'. Use at most {each * count}."
        )
