"""Holds the settings of SL-SAM in one frozen dataclass that checks itself.

This module imports neither torch nor any framework, so that a command line can list the settings at once.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from slsam_peft.described import PLAIN, described, to_name
from slsam_peft.names import check_name
from slsam_peft.presets import (
    ADAPTER_DTYPES,
    ADAPTIVE_RHO,
    ALONE,
    ASCENTS,
    BALANCING_RHO,
    BANDITS,
    DESCENTS,
    DESIGNS,
    EITHER_OR,
    GRANULARITIES,
    LOSS_RISE,
    METHODS,
    ONE_PASS,
    PAPER_FRACTION,
    PARTED,
    PARTLESS,
    PARTS,
    RADII,
    RHO,
    RHO_MAX,
    RIDING,
)

RECORD_NAME = "slsam.json"  # beside an adapter; see saving/record.py
RECORD_SCHEMA = 2


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True, kw_only=True)
class SLSAMConfig:
    r"""Settings of sparse-layer sharpness-aware minimisation (SL-SAM, arXiv 2602.09395).

    One step draws the active set $S$, takes the gradient $g$ over $S$ at $w$ and the gradient $g'$ at
    $w + e$, $e = \rho\, g / (\|g\|_2 + 10^{-12})$, and hands $g'$ to the base optimizer.

    | paper | here |
    |---|---|
    | layer $l$ | arm, see `granularity` |
    | $s$ | `active_fraction` |
    | $p_l$ | inclusion probability, learned by `bandit`, drawn by `design` |
    | $\rho$ | `rho` |

    Each field's meaning is its `metadata["help"]`; `slsam-peft sft --help` prints them. Fields that take a name or a
    callable are annotated `str` for command-line parsers and accept callables in Python.

    Raises:
        ValueError: a value is outside what its field allows. The message names the value, what is allowed and, for
            names, the nearest match.

    Example:

        >>> from slsam_peft import SLSAMConfig
        >>> SLSAMConfig(rho=0.05, active_fraction=0.2).fraction
        0.2
    """

    method: str | None = field(
        default=None,
        metadata=_help(
            "A whole configuration, of which every part can be set by its own field: 'auto' (some layers perturbed, "
            "all trained, the ascent made by a few sequences), 'sam' (every layer, two passes), 'paper' (SL-SAM "
            "exactly, arXiv 2602.09395), 'depth' (active sets compact in depth, at a cost_budget), or a rival in one "
            "pass over every layer, of which `ascent` tells more: 'bar', 'bi_lora', 'flat_lora'. "
            "Unset: 'auto'; but where active_fraction, bandit, design, ascent, ascent_fraction, descent or "
            "cost_budget is set, those parts alone, the rest being the paper's with the scale_free bandit."
        ),
    )
    rho: float | None = field(
        default=None,
        metadata=_help(
            "Radius of the perturbation as a length (L2 norm over the perturbed arms), rho in the paper. 0 trains "
            "without an ascent: plain LoRA under every method. Below about 0.02 a bfloat16 forward drowns it in "
            "rounding. In the radius's own units under radius='asam', 'neuron' and 'weight'; under 'bar', 'bi_lora' "
            "and 'flat_lora' how strong the rule is (mu_0, radius of the second adapter, sigma). Unset: loss_rise "
            "under 'auto', else 0.05 (Foret et al. 2021), 0.5 under 'asam', 'neuron' (Kwon et al. 2021) and 'bar'."
        ),
    )
    loss_rise: float | None = field(
        default=None,
        metadata=_help(
            "Radius of the perturbation as the rise, in nats, of the ascent sequences' mean loss to first order: "
            "rho = min(loss_rise / |g|, rho_max) in each step (LE-SAM, arXiv 2605.10183). In place of rho. Unset: 0.5 "
            "under 'auto' (measured, recipes/compare)."
        ),
    )
    rho_max: float = field(
        default=RHO_MAX,
        metadata=_help(
            "Longest perturbation that loss_rise may ask for, where the gradient is small; refused without loss_rise. "
            "Measured: 1 to 2."
        ),
    )
    ascent_sequences: int | None = field(
        default=None,
        metadata=_help(
            "How many of a step's N sequences make the ascent, m: a step costs 1 + m/N plain LoRA steps. Unset: 1 "
            "under 'auto', else by ascent_fraction."
        ),
    )
    cost_budget: float | None = field(
        default=None,
        metadata=_help(
            "Expected cost of a step in units of a plain LoRA step, for example 1.0; for method='depth'. Sets the "
            "expected number of active arms, so active_fraction must stay unset. Unset: 1.0 under 'depth'."
        ),
    )
    trace: bool = field(
        default=True,
        metadata=_help(
            "Record each step's probabilities, active arms and cost in slsam_trace.safetensors, in the output "
            "folder and in checkpoints, for slsam-peft plot. At most 20 MB; read by trainers only."
        ),
    )
    active_fraction: float | None = field(
        default=None,
        metadata=_help(
            "Expected share of arms that are active (perturbed) in a step, s in the paper, in (0, 1]; at least one "
            "arm. 1 activates every arm in every step. Unset: 0.25 under 'auto' (measured), 1 under 'sam', derived "
            "from cost_budget where there is one, else 0.2 (the paper's LLM setting)."
        ),
    )
    granularity: str = field(
        default="block",
        metadata=_help(
            "What an arm is: 'block' (all adapters of a transformer block), 'module' (one adapter module), 'tensor' "
            "(one parameter) or, in Python, a callable from parameter name to arm name."
        ),
    )
    adapter_dtype: str = field(
        default="float32",
        metadata=_help(
            "Precision of adapters on a quantised base: 'float32', or 'keep' what the trainer chose (TRL: bfloat16)."
        ),
    )
    seed: int = field(default=0, metadata=_help("Seed of the sampler's own random generator."))
    bandit: str | None = field(
        default=None,
        metadata=_help(
            "Rule that learns the inclusion probabilities: 'paper' (arXiv 2602.09395 as it stands), 'scale_free' "
            "(learns at every gradient scale, see min_probability), 'uniform' (learns nothing) or, in Python, a "
            "callable (probabilities, mask, norms, inclusion) -> probabilities. Unset: 'paper' under 'paper', else "
            "'scale_free'."
        ),
    )
    design: str | None = field(
        default=None,
        metadata=_help(
            "How arms are drawn from their probabilities: 'bernoulli' (independently, as in the paper), 'fixed_size' "
            "(constant number), 'window' (contiguous in depth), 'depth' (every arm above a drawn depth) or, in "
            "Python, a callable (probabilities, generator) -> boolean mask. Unset: 'fixed_size' under 'auto', 'depth' "
            "under 'depth', else 'bernoulli'."
        ),
    )
    ascent: str | None = field(
        default=None,
        metadata=_help(
            "Where the ascent direction comes from: 'two_pass' (the step's whole batch, exact SAM), 'partial' (some "
            "sequences of it, in a small pass of their own), 'ahead' (look-ahead: sequences of the next batch ride "
            "along in this one's pass; an epoch's first step is 'partial'), 'auto' ('ahead' where sequences are "
            "provably separate, else 'partial'), 'remembered' (stale: the last descent gradient of the same arm; one "
            "pass), 'sampa' (look-ahead from an extrapolated point, NeurIPS 2024), 'zeroth_order' (two forwards, "
            "ZO-SAM, arXiv 2603.13115), or one pass without an ascent, where rho is how strong the rule is: 'bar' "
            "and 'obar' (balance the norms of A and B, arXiv 2410.14802), 'bi_lora' (a second adapter that ascends, "
            "arXiv 2508.19564), 'flat_lora' (noise on W + B A, arXiv 2409.14396); in Python also an object, see "
            "slsam_peft.algorithm.ascents. Unset: 'auto' under 'auto', the method's own under 'bar', 'bi_lora' and "
            "'flat_lora', else 'two_pass'."
        ),
    )
    ascent_fraction: float | None = field(
        default=None,
        metadata=_help(
            "Share of the step's sequences that make a 'partial' or 'ahead' ascent, in (0, 1]; whole micro-batches "
            "under gradient accumulation; at least one. In place of ascent_sequences. Unset: 0.25 (Bahri et al., ACL "
            "2022) where no method is named."
        ),
    )
    radius: str | None = field(
        default=None,
        metadata=_help(
            "How the perturbation is made of the ascent gradient: 'length' (rho), 'loss_rise', 'asam' (rho in units "
            "of each weight, Kwon et al. 2021), 'neuron' (of each row's norm, FT-SAM, ICCV 2023), 'weight' (rho is "
            "the Frobenius norm of the change of B A) or, in Python, an object, see slsam_peft.algorithm.radius. "
            "Unset: whichever of rho and loss_rise is set."
        ),
    )
    descent: str | None = field(
        default=None,
        metadata=_help(
            "Which arms are trained: 'active' (only the drawn ones, as in the paper) or 'all' (the drawn arms are "
            "perturbed, every arm is trained). Unset: 'all' under 'auto' and 'sam', else 'active'."
        ),
    )
    min_probability: float = field(
        default=0.1,
        metadata=_help(
            "Least inclusion probability the 'scale_free' bandit leaves an arm, as a share of the mean probability, "
            "in [0, 1). 0.1 keeps every arm explored at a tenth of the uniform rate."
        ),
    )
    bandit_rate: float = field(
        default=0.05,
        metadata=_help(
            "Learning rate of the 'scale_free' bandit: the log-weight an arm of the largest norm gains per step "
            "when it is drawn at the mean probability."
        ),
    )
    hidden_state_cache_limit_mib: float = field(
        default=1024.0,
        metadata=_help(
            "Most memory, in MiB, for hidden states kept between the two passes of a step. Micro-batches beyond "
            "it run the blocks below the lowest active one again."
        ),
    )
    max_skipped_steps: int = field(
        default=10,
        metadata=_help(
            "Steps in a row that may be skipped for a NaN or infinite loss or gradient before training stops."
        ),
    )
    accept_state_mismatch: bool = field(
        default=False,
        metadata=_help(
            "Resume although the checkpoint has no SL-SAM state, or one of other arms or settings: the sampler then "
            "starts afresh."
        ),
    )

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_names()
        self._check_pairs()
        self._check_rules()
        self._check_unread()
        self.resolved._check_combinations()
        _ = self.resolved._described  # now: a rule may change what it was made with

    def _check_numbers(self) -> None:
        finite = "a finite number"
        _require_number("rho", self.rho, f"{finite} >= 0", lambda x: x >= 0)
        _require_number("loss_rise", self.loss_rise, f"{finite} > 0, in nats", lambda x: x > 0)
        _require_number("rho_max", self.rho_max, f"{finite} > 0", lambda x: x > 0)
        _require_number("active_fraction", self.active_fraction, "in (0, 1]", lambda x: 0 < x <= 1)
        _require_number("ascent_fraction", self.ascent_fraction, "in (0, 1]", lambda x: 0 < x <= 1)
        _require_number("cost_budget", self.cost_budget, f"{finite} > 0", lambda x: x > 0)
        _require_number("min_probability", self.min_probability, "in [0, 1)", lambda x: 0 <= x < 1)
        _require_number("bandit_rate", self.bandit_rate, f"{finite} > 0", lambda x: x > 0)
        limit = self.hidden_state_cache_limit_mib
        _require_number("hidden_state_cache_limit_mib", limit, f"{finite} >= 0", lambda x: x >= 0)
        for name, least in (("max_skipped_steps", 0), ("seed", 0), ("ascent_sequences", 1)):
            value = getattr(self, name)
            if value is None and name == "ascent_sequences":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r} is not allowed; it must be an integer >= {least}.")

    def _check_names(self) -> None:
        check_name("granularity", self.granularity, GRANULARITIES, callable_too=True)
        check_name("adapter_dtype", self.adapter_dtype, ADAPTER_DTYPES)
        if self.method is not None:
            check_name("method", self.method, METHODS)
        if self.bandit is not None:
            check_name("bandit", self.bandit, BANDITS, callable_too=True)
        if self.design is not None:
            check_name("design", self.design, DESIGNS, callable_too=True)
        if self.ascent is not None:
            check_name("ascent", self.ascent, ASCENTS, method="take")
        if self.radius is not None:
            check_name("radius", self.radius, RADII, method="offsets")
        if self.descent is not None:
            check_name("descent", self.descent, DESCENTS)

    def _check_pairs(self) -> None:
        """Refuse what contradicts itself as it was set, before anything is filled in."""
        for first, second, why in EITHER_OR:
            a, b = getattr(self, first), getattr(self, second)
            if a is not None and b is not None:
                raise ValueError(f"{first}={a!r} and {second}={b!r} are both set; {why}, so leave one of them unset.")
        if self.cost_budget is not None and self.method not in (None, "depth"):
            raise ValueError(
                f"cost_budget={self.cost_budget} and method={self.method!r}: only method='depth' has a budget; use "
                "it, or leave cost_budget unset."
            )
        other = "rho" if self.radius == "loss_rise" else "loss_rise"
        if isinstance(self.radius, str) and getattr(self, other) is not None:
            raise ValueError(
                f"radius={self.radius!r} and {other}={getattr(self, other)!r} contradict one another; leave one unset."
            )

    def _check_rules(self) -> None:
        """Refuse two rules where there is one, and strengths beside objects that know their own."""
        if self.radius is not None and not isinstance(self.radius, str) and (self.loss_rise or self.rho):
            raise ValueError(
                f"radius is an object, which knows its own size, and rho={self.rho} or loss_rise={self.loss_rise} is "
                "set beside it; leave both unset."
            )
        if self.rho and (strength := _own_strength(self.ascent)) is not None:
            raise ValueError(
                f"ascent={to_name(self.ascent)!r} is an object, which knows how strong it is ({strength}), and "
                f"rho={self.rho} is set beside it; leave one of them unset."
            )
        own = ("bar", "obar") if self.method == "bar" else (self.method,)
        if self.method in ONE_PASS and self.ascent is not None and rule_name(self.ascent) not in own:
            raise ValueError(
                f"method={self.method!r} and ascent={to_name(self.ascent)!r} name two rules; leave one of them unset, "
                "give an object of the method's own rule, or use method='sam' or 'auto' beside this ascent."
            )

    def _check_unread(self) -> None:
        """Refuse a number that is set and that nothing would read."""
        settled = self.resolved
        if not settled.is_perturbed:
            return
        how = "" if self.method is None else f" (method={self.method!r})"
        named = isinstance(settled.ascent, str)
        unread = not named or settled.ascent in PARTLESS
        # Resolved settings without a method say this share whatever their ascent is, and are settings, too.
        filled = PARTS[self.method].get("ascent_fraction") if named else None
        for name, ignored in (("ascent_sequences", None), ("ascent_fraction", filled)):
            value = getattr(self, name)
            if not unread or value in (None, ignored):
                continue
            raise ValueError(
                f"{name}={value} and ascent={to_name(settled.ascent)!r}{how}: this ascent "
                + ("is no part of a batch" if named else "is an object, which knows its own sequences")
                + f"; use ascent='partial' or method='auto', or leave {name} unset."
            )
        if self.rho_max != RHO_MAX and settled.radius != "loss_rise":
            raise ValueError(
                f"rho_max={self.rho_max} and radius={to_name(settled.radius)!r}{how}: it bounds what loss_rise "
                "asks for, and there is none; set loss_rise in place of rho and radius, or leave rho_max unset."
            )

    def _check_combinations(self) -> None:
        """Refuse parts that do not work together; on resolved settings."""
        how = f" (method={self.method!r})" if self.method is not None else ""
        if not self.is_perturbed:  # and then there is no ascent, whatever it is called
            return
        if self.descent == "all" and self.ascent == "remembered":
            raise ValueError(
                f"descent='all'{how} needs an ascent pass, and ascent='remembered' has none; use ascent='two_pass', "
                "or descent='active'."
            )
        if self.ascent in RIDING and self.descent == "active" and self.active_fraction != 1:
            raise ValueError(
                f"ascent={self.ascent!r} trains every arm in every step, and descent='active'{how} with "
                f"active_fraction={self.active_fraction} (unset: {PAPER_FRACTION}, or by cost_budget) only some of "
                "them; set descent='all', or active_fraction=1 and leave cost_budget unset."
            )
        if rule_name(self.ascent) in ONE_PASS and self.radius != "length":
            raise ValueError(
                f"radius={to_name(self.radius)!r} and ascent={to_name(self.ascent)!r}{how}: this rule makes no "
                "perturbation of an ascent gradient, and rho alone (of an object, what it was made with) says how "
                "strong it is; leave radius and loss_rise unset."
            )

    @cached_property
    def resolved(self) -> "SLSAMConfig":
        """The settings with every part filled in, from `method` where it is unset; resolving twice changes nothing."""
        alone = any(getattr(self, name) is not None for name in ALONE)
        method = "auto" if self.method is None and not alone else self.method
        values = dict(PARTS[method])
        # What is set in one of two ways leaves the other way unset.
        for first, second, _ in EITHER_OR:
            if getattr(self, first) is not None or getattr(self, second) is not None:
                values = _without(values, first, second)
        if self.radius is not None:
            values = _without(values, "rho", "loss_rise")
            values |= _radius_default(self.radius)
        ascent = self.ascent or values["ascent"]
        own_radius = self.radius not in (None, "length") or self.loss_rise is not None
        rule = rule_name(ascent)
        if rule in ONE_PASS and not own_radius and self.rho is None:
            values = _without(values, "rho", "loss_rise")
            values |= {} if _own_strength(ascent) is not None else {"rho": BALANCING_RHO if "bar" in rule else RHO}
        if not isinstance(ascent, str):  # an object knows its own
            values = _without(values, "ascent_sequences", "ascent_fraction")
        elif ascent in PARTLESS:
            values.pop("ascent_sequences", None)
        elif self.ascent_fraction is None and "ascent_fraction" not in values:
            values.setdefault("ascent_sequences", 1)
        # Without a radius every method is plain LoRA: nothing is perturbed, and everything is trained.
        if self.rho == 0 and method is not None:
            values |= {"descent": "all"} | ({} if self.cost_budget is not None else {"active_fraction": 1.0})
            values.pop("cost_budget", None)
        values |= {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        radius = "loss_rise" if values.get("loss_rise") is not None else "length"  # where none is named
        resolved = _unchecked({"radius": radius, **values, "method": method})
        vars(resolved)["resolved"] = resolved
        return resolved

    @property
    def fraction(self) -> float:
        """The share of active arms, resolved; the paper's 0.2 where nothing says it."""
        fraction = self.resolved.active_fraction
        return PAPER_FRACTION if fraction is None else fraction

    @property
    def filled_in(self) -> dict[str, Any]:
        """What unset parts are filled with where others are set and no `method` is named; empty otherwise."""
        named = self.resolved.method is not None
        return {} if named else {n: getattr(self.resolved, n) for n in PARTED if getattr(self, n) is None}

    @property
    def is_perturbed(self) -> bool:
        """Whether there is an ascent at all: not where `rho` is 0."""
        return self.rho != 0

    def to_dict(self) -> dict[str, Any]:
        """Return the resolved settings as plain values; a callable or an object becomes what `described` says."""
        return {f.name: getattr(self.resolved, f.name) for f in fields(self)} | self.resolved._described

    @cached_property
    def _described(self) -> dict[str, str]:
        """What is said of the settings that are callables or objects."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: described(value) for name, value in values.items() if not isinstance(value, PLAIN)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SLSAMConfig":
        """Rebuild a config from `to_dict`'s result.

        Raises:
            ValueError: a key is unknown (with the nearest match), or a value is the stored name of a callable: no code
                is loaded from a file, so pass the callable itself with `dataclasses.replace`.
        """
        known = {f.name for f in fields(cls)}
        for key in values:
            if key not in known:
                check_name("SLSAMConfig field", key, tuple(sorted(known)))
        for key in ("granularity", "bandit", "design", "ascent", "radius"):
            value = values.get(key)
            if isinstance(value, str) and ":" in value:
                raise ValueError(
                    f"{key}={value!r} names a callable, and no code is loaded from stored settings; drop the key and "
                    f"pass the callable itself: dataclasses.replace(config, {key}=...)."
                )
        return cls(**values)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> "SLSAMConfig":
        """Read the settings that an adapter was trained with from the `slsam.json` beside it.

        Args:
            folder (`str` or `os.PathLike`): The adapter's folder, a checkpoint included, or the file itself.

        Raises:
            FileNotFoundError: there is no such folder, or no `slsam.json` in it.
            ValueError: the file holds no settings that this version can read, or `from_dict` refuses them.
        """
        file = Path(folder)
        if not file.exists():
            raise FileNotFoundError(f"{file} does not exist; give the folder of an adapter that SLSAMTrainer saved.")
        if file.is_dir():
            file = file / RECORD_NAME
        if not file.is_file():
            raise FileNotFoundError(
                f"{file.parent} holds no {RECORD_NAME}, which SLSAMTrainer writes beside the adapters it saves; give "
                "the folder of such an adapter, or a checkpoint's."
            )
        settings = _recorded_settings(file)
        try:
            return cls.from_dict(settings)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the settings in {file} cannot be used: {error}") from error


def _recorded_settings(file: Path) -> dict[str, Any]:
    """Return the settings in an adapter's record, without the method's name."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # what is no UTF-8 included
        raise ValueError(
            f"{file} is not valid JSON ({error}); copy it again from where the adapter was saved."
        ) from error
    if not isinstance(record, dict) or record.get("schema") != RECORD_SCHEMA:
        found = record.get("schema") if isinstance(record, dict) else None
        raise ValueError(
            f"{file} has schema {found!r}, and this version of slsam_peft reads schema {RECORD_SCHEMA}; use the "
            "version that wrote it, or give the settings by hand."
        )
    method = record.get("method")
    if not isinstance(method, dict):
        raise ValueError(f'{file} has no settings under "method"; save the adapter again, or give them by hand.')
    settings = {name: value for name, value in method.items() if name != "name"}
    # A record of a version that had no methods holds parts alone; what it leaves out had these defaults.
    return settings if "method" in settings else {**PARTS[None], **settings}


def _radius_default(radius: Any) -> dict[str, float]:
    """Return the number that a radius has where none is given; an object knows its own."""
    if not isinstance(radius, str):
        return {}
    if radius == "loss_rise":
        return {"loss_rise": LOSS_RISE}
    return {"rho": ADAPTIVE_RHO if radius in ("asam", "neuron") else RHO}


def _own_strength(ascent: Any) -> float | None:
    """Return how strong an object of a rule without an e was made; `None`: as strong as `rho` says."""
    return getattr(ascent, "strength", None) if rule_name(ascent) in ONE_PASS else None


def _without(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _unchecked(values: Mapping[str, Any]) -> SLSAMConfig:
    """Return settings that are not checked again."""
    made = object.__new__(SLSAMConfig)
    for f in fields(SLSAMConfig):
        object.__setattr__(made, f.name, values.get(f.name, f.default))
    return made


def rule_name(given: Any) -> str | None:
    """Return what the settings call an ascent or a radius, given by name or as an object; `None`: they have no name.

    An object of ours says it itself (`rule`), and one of a class derived from ours is the same rule.
    """
    name = given if isinstance(given, str) else getattr(given, "rule", None)
    return name if name in (*ASCENTS, *RADII) else None


def _require_number(name: str, value: Any, allowed: str, test: Callable[[float], bool]) -> None:
    if value is None:
        return
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not test(value):
        raise ValueError(f"{name}={value!r} is not allowed; it must be {allowed}.")
