"""How a number of trainings is spent: on learning rates, as many for each method, and on seeds. Imports no torch."""

from slsam_peft.errors import UserError

METHODS = 2  # plain LoRA and SL-SAM; plain LoRA with fewer steps makes three
LEAST_SEEDS = 3  # fewer give no interval
RATES = {12: 4, 8: 3, 5: 2, 0: 1}  # learning rates of a method, from so many trainings of it on
EACH = 6  # trainings of a method where nobody says how many: two learning rates and four seeds
SPACING = 3.0  # from one learning rate to the next
LEAST_OF_THREE = 3 * min(filter(None, RATES))  # trainings: learning rates are still chosen


def spend(runs: int, methods: int = METHODS) -> tuple[int, int]:
    """Return how many learning rates each method tries, and how many seeds all are trained on after that.

    Args:
        runs (`int`): Most trainings.
        methods (`int`, *optional*, defaults to `2`): How many methods there are.

    Raises:
        UserError: too few for three seeds of both methods.
    """
    least = METHODS * LEAST_SEEDS
    if runs < least:
        raise UserError(
            f"--runs={runs} is not allowed; it must be an integer >= {least}: both methods on {LEAST_SEEDS} seeds, "
            "which is the least that gives an interval."
        )
    rates = next(count for threshold, count in RATES.items() if runs >= methods * threshold)
    tuning = methods * rates if rates > 1 else 0  # a single one is not tried
    return rates, (runs - tuning) // methods


def rates_around(middle: float, count: int) -> list[float]:
    """Return learning rates in a constant ratio, of two significant digits, in ascending order.

    Args:
        middle (`float`): What they lie around; their geometric mean but for rounding.
        count (`int`): How many.
    """
    return [float(f"{middle * SPACING ** (i - (count - 1) / 2):.2g}") for i in range(count)]
