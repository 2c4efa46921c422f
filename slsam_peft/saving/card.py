"""Names the method and its settings for model cards."""

from collections.abc import Mapping
from typing import Any

from slsam_peft.config import PAPER_FRACTION, SLSAMConfig

_SHOWN = ("method", "rho", "loss_rise", "granularity", "bandit", "design", "ascent", "descent", "cost_budget")


def describe(config: SLSAMConfig) -> list[str]:
    """Return the tags of an adapter's model card: `sl-sam`, and one `sl-sam:name=value` per setting."""
    return tags_of(config.to_dict())


def tags_of(method: Mapping[str, Any]) -> list[str]:
    """Return `describe`'s tags for settings as they are recorded, where a callable is no more than its name.

    Args:
        method (`dict`): `SLSAMConfig.to_dict()`, or the `"method"` of an adapter's record. Other keys do not count,
            missing ones give no tag.
    """
    tags = ["sl-sam", *(f"sl-sam:{name}={method[name]}" for name in _SHOWN if method.get(name) is not None)]
    if method.get("cost_budget") is None:
        fraction = method.get("active_fraction")
        tags.append(f"sl-sam:active_fraction={PAPER_FRACTION if fraction is None else fraction}")
    if method.get("ascent") in ("auto", "partial", "ahead"):
        names = ("ascent_sequences", "ascent_fraction")
        tags += [f"sl-sam:{name}={method[name]}" for name in names if method.get(name) is not None]
    return tags
