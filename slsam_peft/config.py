"""Holds the settings of SL-SAM in one frozen dataclass that checks itself.

This module imports neither torch nor any framework, so that a command line can list the settings at once.
"""

import difflib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

BANDITS = ("paper", "scale_free", "uniform")
DESIGNS = ("bernoulli", "fixed_size", "window", "depth")
ASCENTS = ("two_pass", "partial", "remembered", "ahead")
DESCENTS = ("active", "all")
GRANULARITIES = ("block", "module", "tensor")
ADAPTER_DTYPES = ("float32", "keep")

# How alike two names must be for one to be offered in place of the other, as difflib measures it: misspellings of
# short names ("roh" for rho) come to 0.67, names that have little in common ("lr" and rho) to 0.4.
NEAR = 0.6

RECORD_NAME = "slsam.json"  # beside an adapter; see saving/record.py
RECORD_SCHEMA = 2

PAPER_FRACTION = 0.2  # s in the paper's LLM experiments (arXiv 2602.09395)


def choices(allowed: tuple[str, ...], callable_too: bool = False) -> str:
    """Return the allowed names as a phrase for help texts and errors."""
    return ", ".join(f"'{name}'" for name in allowed) + (" or a callable" if callable_too else "")


def check_name(what: str, value: Any, allowed: tuple[str, ...], callable_too: bool = False) -> None:
    """Raise `ValueError` naming the nearest match unless `value` is one of `allowed` (or a callable, if asked)."""
    if isinstance(value, str) and value in allowed:
        return
    if callable_too and callable(value):
        return
    raise ValueError(
        f"{what}={value!r} is not known; allowed: {choices(allowed, callable_too)}.{hint_at(value, allowed)}"
    )


def hint_at(value: Any, allowed: Iterable[str]) -> str:
    """Return the nearest of the allowed names as a question to end a message with; empty where none is near.

    Neither letter case nor the dashes in front of a flag count: "--lr" and "--rho" have two characters in common that
    say nothing.
    """
    if not isinstance(value, str) or value in (allowed := tuple(allowed)):
        return ""
    names = {name.lstrip("-").lower(): name for name in allowed}
    near = difflib.get_close_matches(value.lstrip("-").lower(), names, n=1, cutoff=NEAR)
    return f" Did you mean '{names[near[0]]}'?" if near else ""


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

    rho: float = field(
        default=0.05,
        metadata=_help(
            "Radius of the perturbation (L2 norm over the perturbed arms), rho in the paper. 0 trains without an "
            "ascent pass. Below about 0.02 a bfloat16 forward drowns it in rounding. The default is that of Foret et "
            "al. 2021."
        ),
    )
    active_fraction: float | None = field(
        default=None,
        metadata=_help(
            "Expected share of arms that are active in a step, s in the paper, in (0, 1]. Unset: 0.2 (the paper's "
            "LLM setting), or derived from cost_budget where that is set. 1 activates every arm in every step."
        ),
    )
    granularity: str = field(
        default="block",
        metadata=_help(
            "What an arm is: 'block' (all adapters of a transformer block), 'module' (one adapter module), 'tensor' "
            "(one parameter) or, in Python, a callable from parameter name to arm name."
        ),
    )
    bandit: str = field(
        default="scale_free",
        metadata=_help(
            "Rule that learns the inclusion probabilities: 'paper' (arXiv 2602.09395 as it stands), 'scale_free' "
            "(learns at every gradient scale, see min_probability), 'uniform' (learns nothing) or, in Python, a "
            "callable (probabilities, mask, norms, inclusion) -> probabilities."
        ),
    )
    design: str = field(
        default="bernoulli",
        metadata=_help(
            "How arms are drawn from their probabilities: 'bernoulli' (independently, as in the paper), 'fixed_size' "
            "(constant number), 'window' (contiguous in depth), 'depth' (every arm above a drawn depth) or, in "
            "Python, a callable (probabilities, generator) -> boolean mask."
        ),
    )
    ascent: str = field(
        default="two_pass",
        metadata=_help(
            "Where the ascent direction comes from: 'two_pass' (the step's whole batch, exact SAM), 'partial' (a "
            "part of it, see ascent_fraction), 'remembered' (stale: the last descent gradient of the same arm; one "
            "pass), 'ahead' (look-ahead: as 'partial', but made one step early, by sequences of the next batch in "
            "this one's pass: one pass of so many sequences more; an epoch's first step has none; active_fraction=1, "
            "SFT without gradient accumulation)."
        ),
    )
    ascent_fraction: float = field(
        default=0.25,
        metadata=_help(
            "Share of the step's sequences that ascent='partial' and 'ahead' use, in (0, 1]; whole micro-batches "
            "under gradient accumulation; at least one. The default is that of Bahri et al., ACL 2022."
        ),
    )
    descent: str = field(
        default="active",
        metadata=_help(
            "Which arms are trained: 'active' (only the drawn ones, as in the paper) or 'all' (the drawn arms are "
            "perturbed, every arm is trained)."
        ),
    )
    cost_budget: float | None = field(
        default=None,
        metadata=_help(
            "Expected cost of a step in units of a plain LoRA step, for example 1.0. Sets the expected number of "
            "active arms, so active_fraction must stay unset."
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
    adapter_dtype: str = field(
        default="float32",
        metadata=_help(
            "Precision of adapters on a quantised base: 'float32', or 'keep' what the trainer chose (TRL: bfloat16)."
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
    trace: bool = field(
        default=True,
        metadata=_help(
            "Record each step's probabilities, active arms and cost in slsam_trace.safetensors, in the output "
            "folder and in checkpoints, for slsam-peft plot. At most 20 MB; read by trainers only."
        ),
    )
    seed: int = field(default=0, metadata=_help("Seed of the sampler's own random generator."))

    def __post_init__(self) -> None:
        self._check_numbers()
        check_name("granularity", self.granularity, GRANULARITIES, callable_too=True)
        check_name("bandit", self.bandit, BANDITS, callable_too=True)
        check_name("design", self.design, DESIGNS, callable_too=True)
        check_name("ascent", self.ascent, ASCENTS)
        check_name("descent", self.descent, DESCENTS)
        check_name("adapter_dtype", self.adapter_dtype, ADAPTER_DTYPES)
        self._check_combinations()

    def _check_numbers(self) -> None:
        _require_number("rho", self.rho, "a finite number >= 0", lambda x: x >= 0)
        if self.active_fraction is not None:
            _require_number("active_fraction", self.active_fraction, "in (0, 1]", lambda x: 0 < x <= 1)
        _require_number("ascent_fraction", self.ascent_fraction, "in (0, 1]", lambda x: 0 < x <= 1)
        if self.cost_budget is not None:
            _require_number("cost_budget", self.cost_budget, "a finite number > 0", lambda x: x > 0)
        _require_number("min_probability", self.min_probability, "in [0, 1)", lambda x: 0 <= x < 1)
        _require_number("bandit_rate", self.bandit_rate, "a finite number > 0", lambda x: x > 0)
        _require_number(
            "hidden_state_cache_limit_mib", self.hidden_state_cache_limit_mib, "a finite number >= 0", lambda x: x >= 0
        )
        for name in ("max_skipped_steps", "seed"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name}={value!r} is not allowed; it must be an integer >= 0.")

    def _check_combinations(self) -> None:
        if self.cost_budget is not None and self.active_fraction is not None:
            raise ValueError(
                f"cost_budget={self.cost_budget} and active_fraction={self.active_fraction} are both set; cost_budget "
                "decides how many arms are active, so leave active_fraction unset."
            )
        if self.descent == "all" and self.ascent == "remembered":
            raise ValueError(
                "descent='all' needs an ascent pass, and ascent='remembered' has none; use ascent='two_pass'."
            )
        if self.ascent == "ahead" and self.active_fraction != 1:
            raise ValueError(
                "ascent='ahead' perturbs and trains every arm in every step, and active_fraction="
                f"{self.active_fraction} (unset: {PAPER_FRACTION}, or by cost_budget) asks for some of them; set "
                "active_fraction=1, and leave cost_budget unset."
            )

    @property
    def fraction(self) -> float:
        """`active_fraction`, or the paper's 0.2 where it is unset."""
        return PAPER_FRACTION if self.active_fraction is None else self.active_fraction

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values; callables become their qualified name, `"module:qualname"`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: _qualified_name(value) if callable(value) else value for name, value in values.items()}

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
        for key in ("granularity", "bandit", "design"):
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
    return {name: value for name, value in method.items() if name != "name"}


def _qualified_name(value: Any) -> str:
    """Name a function, the function of a partial, or the class of any other callable."""
    value = value.func if isinstance(value, partial) else value
    value = value if hasattr(value, "__qualname__") else type(value)
    return f"{value.__module__}:{value.__qualname__}"


def _require_number(name: str, value: Any, allowed: str, test: Callable[[float], bool]) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not test(value):
        raise ValueError(f"{name}={value!r} is not allowed; it must be {allowed}.")
