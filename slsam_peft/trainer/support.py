"""Checks, before the first step, what a trainer must not ask for and what its optimizer must hold."""

from collections.abc import Sequence
from typing import Any

from torch.distributed.tensor import DTensor
from trl import SFTTrainer

from slsam_peft.algorithm.arms import Arm


def check_trainer(trainer: Any) -> None:
    """Refuse set-ups that SL-SAM does not support.

    Raises:
        ValueError: DeepSpeed, FSDP, sharded parameters, DataParallel, torch.compile, or a trainer that generates
            inside its training step. The message says why and what to use instead.
    """
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "DeepSpeed is not supported: its engine owns the backward pass and the gradients, and a step here "
            "needs two. Use DDP (torchrun or accelerate launch)."
        )
    if trainer.is_fsdp_enabled or getattr(trainer.args, "fsdp", None):  # on a CPU accelerate ignores what args ask for
        raise ValueError(
            "FSDP is not supported: its flat and sharded parameters cannot be switched on and off by arm. Use DDP, or "
            "a quantised base on one device."
        )
    if any(isinstance(p, DTensor) for p in trainer.model.parameters()):
        raise ValueError(
            "the model's parameters are sharded (DTensor, by FSDP2 or tensor parallelism), which is not supported: "
            "their gradients are exchanged inside the backward pass, and a step here needs two. Use DDP, or a "
            "quantised base on one device."
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
    if hasattr(trainer, "_generate_and_score_completions"):
        raise ValueError(
            f"{type(trainer).__name__} is not supported: its training step generates completions and "
            "counts its calls, so it cannot be run twice on one batch. SFT, DPO, KTO and reward trainers work."
        )


def _is_compiled(module: Any) -> bool:
    """Whether a module was wrapped by `torch.compile(module)` or compiled in place by `module.compile()`."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def check_optimizer(optimizer: Any, arms: Sequence[Arm]) -> None:
    """Check that the optimizer holds every arm's parameters.

    Raises:
        ValueError: some are missing. They would get gradients and never be trained.
    """
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [
        n for arm in arms for n, p in zip(arm.parameter_names, arm.parameters, strict=True) if id(p) not in optimized
    ]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(
            f"the optimizer lacks {len(missing)} trainable parameters ({shown}), so their arms would never be "
            "trained. Build it over every parameter that requires grad, or let the trainer build it "
            "(optimizers=(None, None))."
        )


def check_ahead(trainer: Any) -> None:
    """Refuse trainers whose steps are no single pass over padded sequences of text.

    Raises:
        ValueError: no `SFTTrainer`, several ranks, gradient accumulation, packed or padding-free batches, or a loss
            that is no sum over tokens divided by the number that the trainer gives it. The message says what to use
            instead.
    """
    args: Any = trainer.args
    instead = "use ascent='partial'"
    if not isinstance(trainer, SFTTrainer):
        reason = f"joins batches of texts, and {type(trainer).__name__} makes others"
    elif args.world_size > 1:
        reason = f"runs in one process, and there are {args.world_size}"
    elif args.gradient_accumulation_steps > 1:
        reason = f"needs one micro-batch per step, and gradient_accumulation_steps={args.gradient_accumulation_steps}"
        instead += ": one of the micro-batches makes the ascent, at the same cost"
    elif args.packing or args.padding_free:
        reason = "needs one sequence per row of the batch, and packing or padding_free puts several into one"
        instead += " with gradient accumulation"
    elif trainer.compute_loss_func is not None or not trainer.model_accepts_loss_kwargs:
        reason = "needs TRL's own loss, normalised by num_items_in_batch, and here is another one"
    elif trainer.aux_loss_enabled:
        reason = "keeps sequences apart, and the router's auxiliary loss of a mixture of experts is over all of them"
    else:
        return
    raise ValueError(f"ascent='ahead' {reason}; {instead}.")
