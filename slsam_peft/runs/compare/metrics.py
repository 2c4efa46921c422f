"""What methods of a comparison are compared by. This module imports no library."""

from typing import NamedTuple


class Metric(NamedTuple):
    """A score of a run.

    Args:
        heading (`str`): What it is called in tables and plots.
        unit (`str`): Its unit in brackets, or nothing.
        less_is_better (`bool`): Whether a smaller one is better.
    """

    heading: str
    unit: str
    less_is_better: bool


METRICS = {
    "loss": Metric("held-out loss", " (nats per token)", True),
    "accuracy": Metric("token accuracy", "", False),
    "exact": Metric("exact answers", "", False),
    "attack_success": Metric("attack success", "", True),
    "calibration_error": Metric("calibration error of answers", "", True),
    "calibrated_loss": Metric("held-out loss at the best temperature", " (nats per token)", True),
    "forgetting": Metric("rise of the loss on unrelated text", " (nats per token)", True),
}
