"""Says which sharded trainings (FSDP) a step can be made of, and why not the others.

What is allowed is what was seen to give the gradients of one process, on a mesh of two ranks on CPUs: parameters that
`fully_shard` (FSDP2) has sharded, wrapped as accelerate does it, moved in place. Everything else is refused by name.
"""

from collections.abc import Iterator
from typing import Any

from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor

from slsam_peft.config import SLSAMConfig

ELSEWHERE = "Use DDP, or a quantised base on one device."


def is_fsdp2(trainer: Any) -> bool:
    """Whether accelerate shards a trainer's model by FSDP2."""
    return bool(trainer.is_fsdp_enabled) and bool(trainer.accelerator.is_fsdp2)


def check_sharding(trainer: Any, config: SLSAMConfig) -> None:
    """Refuse sharded set-ups that SL-SAM does not support.

    Args:
        trainer (`Trainer`): A trainer.
        config (`SLSAMConfig`): Its settings, resolved.

    Raises:
        ValueError: FSDP 1; parameters that are distributed before the trainer has them; an FSDP2 setting, or one of
            ours, that has not been shown to be exact.
    """
    asked_for = trainer.is_fsdp_enabled or getattr(trainer.args, "fsdp", None)
    if asked_for and not is_fsdp2(trainer):  # on a CPU accelerate ignores what args ask for
        raise ValueError(
            "FSDP is not supported but for FSDP2 on accelerators: the flat parameters of FSDP 1 cannot be told apart "
            f"by arm. Set fsdp_version: 2 in accelerate's config (fsdp_config={{'version': 2}}). {ELSEWHERE}"
        )
    if any(isinstance(p, DTensor) for p in trainer.model.parameters()):
        raise ValueError(
            "the model's parameters are sharded already (DTensor, by FSDP2 or tensor parallelism), which is not "
            "supported: let accelerate shard it (fsdp_config={'version': 2}), or pass it to SLSAM in a loop of your "
            f"own. {ELSEWHERE}"
        )
    if asked_for and (reason := next(_reasons(trainer, config), None)):
        raise ValueError(f"{reason} is not supported under FSDP2. {ELSEWHERE}")


def check_resumed(trainer: Any, config: SLSAMConfig) -> None:
    """Refuse to go on from a checkpoint under FSDP2 where that was not seen to be exact.

    Args:
        trainer (`Trainer`): A trainer.
        config (`SLSAMConfig`): Its settings, resolved.

    Raises:
        ValueError: arms may not have been drawn yet, and a sharded optimizer cannot be loaded without their moments;
            or checkpoints are not saved in pieces.
    """
    if not is_fsdp2(trainer):
        return
    if config.is_perturbed and config.descent != "all":
        raise ValueError(
            f"resume_from_checkpoint is not supported under FSDP2 with descent={config.descent!r}: an arm that was "
            "not drawn yet has no moments, and a sharded optimizer is loaded with those of all or not at all. Set "
            f"descent='all' (the default method), or start afresh. {ELSEWHERE}"
        )
    kind = str(trainer.accelerator.state.fsdp_plugin.state_dict_type)
    if "SHARDED_STATE_DICT" not in kind:
        raise ValueError(
            f"resume_from_checkpoint is not supported under FSDP2 with {kind}: set state_dict_type to "
            f"SHARDED_STATE_DICT, accelerate's default. {ELSEWHERE}"
        )


def _reasons(trainer: Any, config: SLSAMConfig) -> Iterator[str]:
    """Yield what a trainer asks for that cannot be had under FSDP2."""
    plugin = trainer.accelerator.state.fsdp_plugin
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        yield "offloading parameters to the CPU (fsdp_offload_params)"
    if plugin.activation_checkpointing:
        yield (
            "FSDP's own activation checkpointing (set activation_checkpointing=True in the trainer's arguments "
            "instead; fsdp_activation_checkpointing)"
        )
    if trainer.args.fp16:
        yield "fp16=True (use bf16; a loss scale)"
    if any(type(p).__name__ in ("Params4bit", "Int8Params") for p in trainer.model.parameters()):
        yield "a base that bitsandbytes has quantised"
    if not config.is_perturbed:
        return
    if config.cost_budget is not None:
        yield f"cost_budget={config.cost_budget} (no pass is cut, so it cannot be met)"
    if config.ascent in ("remembered", "ahead") or getattr(config.ascent, "stale", False):
        yield f"ascent={config.ascent!r} (each rank would have to save its piece of the gradients that are kept)"
