"""Arguments of a trainer that leaves nothing behind: no checkpoint, no report, no bar of its own."""

from typing import Any

import torch


def unrecorded() -> dict[str, Any]:
    """Return arguments of `TrainingArguments` for a training whose result is read in this process."""
    return {
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
