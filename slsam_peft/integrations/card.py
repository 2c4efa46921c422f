"""How the method and its settings are named on model cards."""

from slsam_peft.config import SLSAMConfig

_SHOWN = ("rho", "granularity", "bandit", "design", "ascent", "descent", "cost_budget")


def describe(config: SLSAMConfig) -> list[str]:
    """Return the tags of an adapter's model card: `sl-sam` and one `sl-sam:name=value` a setting."""
    values = config.to_dict()
    tags = ["sl-sam", *(f"sl-sam:{name}={values[name]}" for name in _SHOWN if values[name] is not None)]
    if config.cost_budget is None:
        tags.append(f"sl-sam:active_fraction={config.fraction}")
    if config.ascent == "partial":
        tags.append(f"sl-sam:ascent_fraction={config.ascent_fraction}")
    return tags
