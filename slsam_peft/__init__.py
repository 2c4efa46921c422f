"""Brings SL-SAM, sparse-layer sharpness-aware minimisation, to LoRA and QLoRA as a plug-in for TRL and PEFT."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from slsam_peft.config import SLSAMConfig

if TYPE_CHECKING:
    from slsam_peft.algorithm.arms import arms_of
    from slsam_peft.algorithm.slsam import SLSAM
    from slsam_peft.saving.resume import last_intact_checkpoint
    from slsam_peft.trainer.trainer import SLSAMMixin, SLSAMTrainer

__version__ = "0.1.0"

__all__ = ["SLSAM", "SLSAMConfig", "SLSAMMixin", "SLSAMTrainer", "arms_of", "last_intact_checkpoint"]

# torch and trl take seconds to import; a command line that only prints help must not pay for them.
_LAZY = {
    "SLSAM": "slsam_peft.algorithm.slsam",
    "SLSAMMixin": "slsam_peft.trainer.trainer",
    "SLSAMTrainer": "slsam_peft.trainer.trainer",
    "arms_of": "slsam_peft.algorithm.arms",
    "last_intact_checkpoint": "slsam_peft.saving.resume",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
