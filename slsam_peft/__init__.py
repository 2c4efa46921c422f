"""SL-SAM for LoRA and QLoRA: sparse-layer sharpness-aware minimisation as a plug-in for TRL and PEFT."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from slsam_peft.config import SLSAMConfig

if TYPE_CHECKING:
    from slsam_peft.arms import arms_of
    from slsam_peft.integrations.resume import last_whole_checkpoint
    from slsam_peft.integrations.trainer import SLSAMMixin, SLSAMTrainer
    from slsam_peft.slsam import SLSAM

__version__ = "0.1.0"

__all__ = ["SLSAM", "SLSAMConfig", "SLSAMMixin", "SLSAMTrainer", "arms_of", "last_whole_checkpoint"]

# torch and trl take seconds to import; a command line that only prints help must not pay for them.
_LAZY = {
    "SLSAM": "slsam_peft.slsam",
    "SLSAMMixin": "slsam_peft.integrations.trainer",
    "SLSAMTrainer": "slsam_peft.integrations.trainer",
    "arms_of": "slsam_peft.arms",
    "last_whole_checkpoint": "slsam_peft.integrations.resume",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
