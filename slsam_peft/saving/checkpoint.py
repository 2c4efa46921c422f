"""Keeps the sampler's state beside the trainer's own files: `slsam.safetensors` in every checkpoint folder."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from slsam_peft.algorithm.slsam import SLSAM
from slsam_peft.saving.atomic import write_atomically
from slsam_peft.saving.checksum import BLANK, DamagedError, add_checksum, verified_metadata

FILE_NAME = "slsam.safetensors"
SCHEMA = 4

# Settings that do not change what a step computes.
_FREE_SETTINGS = {"hidden_state_cache_limit_mib", "max_skipped_steps", "accept_state_mismatch", "trace"}


class StateMismatchError(ValueError):
    """The checkpoint's SL-SAM state is missing, damaged, or belongs to other arms or settings."""


def save_state(slsam: SLSAM, folder: str | os.PathLike) -> Path:
    """Write the state of `slsam` into a checkpoint folder, atomically.

    Args:
        slsam (`SLSAM`): The algorithm.
        folder (`str` or `os.PathLike`): An existing folder.

    Returns:
        `Path`: The file.
    """
    state = slsam.state_dict()
    tensors = {k: v.contiguous().cpu() for k, v in state.items() if isinstance(v, torch.Tensor)}
    plain = {k: v for k, v in state.items() if not isinstance(v, torch.Tensor)}
    content = save(tensors, metadata={"schema": str(SCHEMA), "state": json.dumps(plain), **BLANK})
    target = Path(folder) / FILE_NAME
    write_atomically(target, add_checksum(content))
    return target


def load_state(slsam: SLSAM, folder: str | os.PathLike) -> None:
    """Restore `slsam` from a checkpoint folder; nothing changes if it does not fit.

    Args:
        slsam (`SLSAM`): The algorithm, over the same arms and with the same settings.
        folder (`str` or `os.PathLike`): The checkpoint folder.

    Raises:
        StateMismatchError: the file is missing or damaged (cut short, or any bit changed), of another schema, of
            other arms or of other settings.
    """
    path = Path(folder) / FILE_NAME
    accept = "Set accept_state_mismatch=True to start the sampler afresh."
    if not path.is_file():
        raise StateMismatchError(
            f"{path} does not exist: the checkpoint was not made with SL-SAM, or holds no state. {accept}"
        )
    state = _read(path, accept)
    differences = _differences(state["config"], slsam.config.to_dict())
    if differences:
        raise StateMismatchError(f"{path} was made with other settings: {', '.join(differences)}. {accept}")
    try:
        slsam.load_state_dict(state)
    except (KeyError, ValueError, RuntimeError) as error:
        raise StateMismatchError(f"{path} does not fit: {error} {accept}") from error


def _read(path: Path, accept: str) -> dict[str, Any]:
    try:
        content = path.read_bytes()
        metadata = verified_metadata(content)
    except (OSError, DamagedError) as error:
        raise StateMismatchError(f"{path} is damaged ({error}); resume from an older checkpoint. {accept}") from error
    if metadata["schema"] != str(SCHEMA):
        raise StateMismatchError(
            f"{path} has schema {metadata['schema']}; this version reads schema {SCHEMA}. Use the version that wrote "
            f"it. {accept}"
        )
    return {**json.loads(metadata["state"]), **load(content)}


def _differences(saved: dict[str, Any], here: dict[str, Any]) -> list[str]:
    return [
        f"{key}={saved.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted({*saved, *here} - _FREE_SETTINGS)
        if saved.get(key) != here.get(key)
    ]
