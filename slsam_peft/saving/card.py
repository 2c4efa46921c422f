"""Names the method and its settings for model cards."""

from collections.abc import Mapping
from typing import Any

from slsam_peft.config import SLSAMConfig
from slsam_peft.presets import PAPER_FRACTION

# In the order they are shown; what is not set gives no tag.
_SHOWN = (
    "method",
    "rho",
    "loss_rise",
    "ascent_sequences",
    "granularity",
    "bandit",
    "design",
    "ascent",
    "descent",
    "cost_budget",
)


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
    # A share of the sequences counts where the ascent is made by some of them, and no number of them is set.
    if (
        method.get("ascent") in ("auto", "partial", "ahead", "sampa", "zeroth_order")
        and method.get("ascent_fraction") is not None
    ):
        tags.append(f"sl-sam:ascent_fraction={method['ascent_fraction']}")
    # These names of radii say no more than `rho` and `loss_rise` do.
    if method.get("radius") not in (None, "length", "loss_rise"):
        tags.append(f"sl-sam:radius={method['radius']}")
    return tags


def settings_of(config: SLSAMConfig) -> str:
    """Return the settings of `describe`'s tags as a phrase for a card's text: "method=auto, loss_rise=0.5, ..."."""
    return ", ".join(tag.removeprefix("sl-sam:") for tag in describe(config)[1:])
