"""Tells how many positions a model knows, and whether each has an embedding of its own."""

from typing import Any

from torch import nn

_LEARNED = ("position", "wpe")  # in names of embeddings of positions
_TOWERS = ("vision", "visual", "image", "audio")  # in names of what reads no text


def known_positions(config: Any) -> int | None:
    """Return how many tokens of a text a model was made for; `None` where its configuration does not say.

    Args:
        config (`PreTrainedConfig`): The model's.
    """
    known = getattr(config.get_text_config(), "max_position_embeddings", None)
    return known if isinstance(known, int) and known > 0 else None


def learns_positions(model: nn.Module) -> bool:
    """Return whether each position has an embedding of its own, so that a model cannot take a longer text.

    Positions in a picture or a sound do not count.
    """
    return any(
        isinstance(module, nn.Embedding)
        and any(word in name.rpartition(".")[2] for word in _LEARNED)
        and not any(word in name for word in _TOWERS)
        for name, module in model.named_modules()
    )
