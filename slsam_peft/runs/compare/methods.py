"""A method of a comparison is a way to train and the settings that are tried for it. This module imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from slsam_peft.config import SLSAMConfig
from slsam_peft.runs.compare.baselines import ALONE, Baseline
from slsam_peft.runs.compare.numbers import all_positive, at_least_one, positive

# What a mapping `slsam` without `method` means, whatever becomes of the defaults of `SLSAMConfig`: rows were made with
# it.
WITHOUT_METHOD = {
    "active_fraction": 0.2,
    "bandit": "scale_free",
    "design": "bernoulli",
    "ascent": "two_pass",
    "ascent_fraction": 0.25,
    "descent": "active",
    "rho": 0.05,
}
# Settings that say in another way what one of those says, which is left out beside them.
_SAID_BY = {
    "active_fraction": ("cost_budget",),
    "ascent_fraction": ("ascent_sequences",),
    "rho": ("loss_rise", "radius"),
}


def slsam_config(values: Mapping[str, Any], **more: Any) -> SLSAMConfig:
    """Return the settings of SL-SAM that a mapping in a comparison, or in a row, stands for.

    Args:
        values (`dict`): `MethodSettings.slsam` or a row's `slsam`. Without a `method` the rest is `WITHOUT_METHOD`.
        **more: Further fields of `SLSAMConfig`, which no row holds.

    Raises:
        ValueError: `SLSAMConfig` refuses a value.
    """
    given = {name for name, value in values.items() if value is not None}
    filled = dict(values)
    if "method" not in given:
        for name, value in WITHOUT_METHOD.items():
            if not given & {name, *_SAID_BY.get(name, ())}:
                filled[name] = value
    return SLSAMConfig.from_dict({**filled, **more})


class Candidate(NamedTuple):
    """A candidate holds settings of a method that are tried on the tuning seed.

    Args:
        rate (`float`): Learning rate.
        rho (`float`, *optional*): Radius as a length, where several are tried.
        loss_rise (`float`, *optional*): Radius as a rise of the loss, in nats, where several are tried.
        baseline (`Baseline`, *optional*): What is changed in training beside or instead of SL-SAM.
    """

    rate: float
    rho: float | None = None
    loss_rise: float | None = None
    baseline: Baseline | None = None

    @property
    def shown(self) -> str:
        """What was tried, as text: the learning rate, and the radius where several were tried."""
        radii = (("rho", self.rho), ("loss rise", self.loss_rise))
        shown = [f"{self.rate:g}", *(f"{name} {value:g}" for name, value in radii if value is not None)]
        return ", ".join(shown if self.baseline is None else [*shown, self.baseline.shown])


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """A method is a way to train and the settings that are tried for it.

    Args:
        learning_rates (`list[float]`): Tried on the tuning seed; the best one is used on all others. A single
            candidate (one rate, at most one radius) is not tried.
        slsam (`dict`, *optional*): Settings of SL-SAM, which name a `method`; without one the rest is
            `WITHOUT_METHOD`. Missing: plain LoRA.
        random_rho (`float`, *optional*): A control: a random perturbation of this L2 norm in place of an ascent.
        batch_size (`int`, *optional*): In place of `TrainingSettings.batch_size`; a step costs in proportion.
        steps_share (`float`, *optional*, defaults to `1.0`): Share of the steps that it gets, in (0, 1], for
            controls that stop early.
        rhos (`list[float]`, *optional*): Radii tried with each learning rate, in place of `slsam.rho`, which is left
            out, or `random_rho`.
        loss_rises (`list[float]`, *optional*): Radii as rises of the loss, in nats, tried with each learning rate in
            place of `slsam.loss_rise`, which is left out.
        baselines (`list[dict]`, *optional*): Baselines tried with each learning rate, see `Baseline`; beside `slsam`
            where that is set.
    """

    learning_rates: tuple[float, ...]
    slsam: Mapping[str, Any] | None = None
    random_rho: float | None = None
    batch_size: int | None = None
    steps_share: float = 1.0
    rhos: tuple[float, ...] | None = None
    loss_rises: tuple[float, ...] | None = None
    baselines: tuple[Baseline, ...] | None = None

    @property
    def candidates(self) -> tuple["Candidate", ...]:
        """Return the settings tried on the tuning seed."""
        return tuple(
            Candidate(rate, rho, rise, baseline)
            for rate in self.learning_rates
            for rho in self.rhos or (None,)
            for rise in self.loss_rises or (None,)
            for baseline in self.baselines or (None,)
        )

    def candidate_of(self, settings: Mapping[str, Any]) -> Candidate:
        """Return the candidate that a run of this method had.

        Args:
            settings (`dict`): `Job.settings`, or a row's.
        """
        radii = {"rho": settings["random_rho"], **(settings["slsam"] or {})}
        return Candidate(
            settings["learning_rate"],
            radii["rho"] if self.rhos else None,
            radii["loss_rise"] if self.loss_rises else None,
            next((baseline for baseline in self.baselines or () if baseline.is_of(settings)), None),
        )

    def slsam_with(self, tried: Candidate) -> dict[str, Any] | None:
        """Return the settings of SL-SAM with a candidate's radius in them; `None` for other ways to train."""
        radii = {name: value for name in ("rho", "loss_rise") if (value := getattr(tried, name)) is not None}
        return None if self.slsam is None else {**self.slsam, **radii}

    def __post_init__(self) -> None:
        # Every number is checked and made a float, whatever YAML took it for.
        object.__setattr__(self, "learning_rates", all_positive("learning_rates", self.learning_rates))
        if self.batch_size is not None:
            at_least_one("batch_size", self.batch_size)
        object.__setattr__(self, "steps_share", positive("steps_share", self.steps_share))
        if self.steps_share > 1:
            raise ValueError(f"steps_share={self.steps_share!r} is not allowed; it is a share in (0, 1].")
        # A method is plain LoRA, SL-SAM or the random control, and a radius belongs to one of the latter two.
        if self.random_rho is not None:
            object.__setattr__(self, "random_rho", positive("random_rho", self.random_rho))
            if self.slsam is not None:
                raise ValueError("slsam and random_rho are both set; a method is one of them or neither (plain LoRA).")
        if self.rhos is not None:
            object.__setattr__(self, "rhos", all_positive("rhos", self.rhos))
            if self.slsam is None and self.random_rho is None:
                raise ValueError(f"rhos={list(self.rhos)}: plain LoRA has no radius; leave it out.")
            if "rho" in (self.slsam or {}):
                raise ValueError("rhos and slsam.rho are both set; leave one of them out.")
        if self.loss_rises is not None:
            object.__setattr__(self, "loss_rises", all_positive("loss_rises", self.loss_rises))
            if self.slsam is None:
                raise ValueError(f"loss_rises={list(self.loss_rises)}: only SL-SAM has this radius; leave it out.")
            if self.rhos is not None or "loss_rise" in self.slsam:
                raise ValueError("loss_rises and rhos or slsam.loss_rise are both set; leave one of them out.")
        if self.baselines is not None:
            self._check_baselines()
        # What the comparison itself decides is no setting of one method.
        if self.slsam is not None:
            if "seed" in self.slsam:
                raise ValueError("slsam.seed is the run's own seed; leave it out.")
            if "adapter_dtype" in self.slsam:
                raise ValueError("slsam.adapter_dtype: the adapters of all methods are in float32; leave it out.")
            for tried in self.candidates:
                slsam_config(self.slsam_with(tried) or {})

    def _check_baselines(self) -> None:
        if not isinstance(self.baselines, list | tuple) or not self.baselines:
            raise ValueError(f"baselines={self.baselines!r} must be a list of one or more mappings.")
        read = tuple(b if isinstance(b, Baseline) else Baseline.from_mapping(b) for b in self.baselines)
        if len(set(read)) < len(read):
            raise ValueError("baselines has an entry twice; each is one try.")
        object.__setattr__(self, "baselines", read)
        for name in ALONE:
            if (self.slsam is not None or self.random_rho is not None) and any(name in b.given for b in read):
                raise ValueError(f"baselines: {name} is for plain LoRA; leave slsam and random_rho out, or {name}.")
