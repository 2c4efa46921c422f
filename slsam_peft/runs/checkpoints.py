"""Finds the checkpoint that a fine-tuning is to go on from, and what is wrong with one that cannot be read."""

import zipfile
from pathlib import Path

from trl import SFTConfig

from slsam_peft.errors import UserError
from slsam_peft.saving.resume import intact_checkpoint, last_intact_checkpoint, what_is_missing


def find_checkpoint(args: SFTConfig, *, sampler: bool = True) -> str | None:
    """Return the checkpoint folder that `args.resume_from_checkpoint` asks for, or `None` to start afresh.

    It is a path, `true` for the newest intact one in `output_dir`, or `auto` for the same where there is one.

    Args:
        args (`SFTConfig`): The run.
        sampler (`bool`, *optional*, defaults to `True`): Whether the sampler's state counts, see
            `last_intact_checkpoint`.

    Raises:
        UserError: there is none, or the one named is not intact.
    """
    asked = args.resume_from_checkpoint
    keyword = str(asked).lower()
    if asked is None or keyword in ("false", "none", "no"):
        return None
    if keyword == "auto":
        return last_intact_checkpoint(str(args.output_dir), sampler=sampler)
    if keyword == "true":
        asked = True
    else:
        # Anything else is a path.
        folder = Path(asked).expanduser()
        if not (folder / "trainer_state.json").is_file():
            raise UserError(
                f"resume_from_checkpoint={asked} is no checkpoint: {folder / 'trainer_state.json'} does not exist. "
                "Name a checkpoint-<step> folder, or true for the last one in output_dir, or auto for the same where "
                "there is one."
            )
        asked = str(folder)
    try:
        return intact_checkpoint(asked, str(args.output_dir), sampler=sampler)
    except ValueError as error:
        raise UserError(str(error)) from error


def damaged_file(checkpoint: str | None) -> str:
    """Return what is wrong with a checkpoint's files, as a line to add to a message; empty where nothing is found.

    Args:
        checkpoint (`str` or `None`): The folder.
    """
    if checkpoint is None:
        return ""
    archives = [path for path in sorted(Path(checkpoint).iterdir()) if path.suffix in (".pt", ".pth")]
    why = what_is_missing(checkpoint, sampler=False) or next(
        (f"{p.name} is damaged" for p in archives if not _is_sound(p)), ""
    )
    return f"\nIn {checkpoint}, {why}; resume from an older checkpoint." if why else ""


def _is_sound(archive: Path) -> bool:
    """Return whether what torch has saved in a zip archive has the checksums that were saved with it."""
    try:
        with zipfile.ZipFile(archive) as opened:
            return opened.testzip() is None
    except Exception:  # zipfile raises many kinds for a header of changed bytes
        return False
