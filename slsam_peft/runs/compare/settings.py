"""The settings of a comparison check themselves before anything is trained. This module imports no torch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from slsam_peft.config import SLSAMConfig, check_name
from slsam_peft.data.sources import SOURCES as PACKAGED

SOURCES = ("stdlib_docs", "reasoning_gym", "jsonl", *PACKAGED)
DTYPES = ("float32", "bfloat16")
QUANTIZATIONS = ("none", "nf4")
MATCHES = ("steps", "cost", "epochs")

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


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """A task says where its rows come from and how many there are.

    Args:
        source (`str`): `"stdlib_docs"`, `"reasoning_gym"`, `"jsonl"` or a task out of a package, see
            `slsam_peft.data.sources`.
        rows (`int`): Training rows. They are repeated where the steps take more.
        test_rows (`int`, *optional*, defaults to `128`): Held-out rows, the same for every seed.
        validation_rows (`int`, *optional*, defaults to `96`): Held-out rows that learning rates are chosen on; none of
            them is a test row.
        label_noise (`float`, *optional*, defaults to `0.0`): Share of training rows, in [0, 1], whose answers are
            swapped.
        steps (`int`, *optional*): In place of `TrainingSettings.steps`.
        puzzle (`str`, *optional*): The puzzle of `"reasoning_gym"`.
        puzzle_options (`dict`, *optional*): Its options.
        file (`str`, *optional*): Training rows of `"jsonl"`.
        test_file (`str`, *optional*): Its held-out rows; the last rows of `file` where it is missing.
    """

    source: str
    rows: int
    test_rows: int = 128
    validation_rows: int = 96
    label_noise: float = 0.0
    steps: int | None = None
    puzzle: str | None = None
    puzzle_options: Mapping[str, Any] = field(default_factory=dict)
    file: str | None = None
    test_file: str | None = None

    def __post_init__(self) -> None:
        check_name("source", self.source, SOURCES)
        for name in ("rows", "test_rows", "validation_rows"):
            _at_least_one(name, getattr(self, name))
        if self.steps is not None:
            _at_least_one("steps", self.steps)
        if not isinstance(self.label_noise, int | float) or not 0 <= self.label_noise <= 1:
            raise ValueError(f"label_noise={self.label_noise!r} is not allowed; it is a share in [0, 1].")
        for source, name in (("reasoning_gym", "puzzle"), ("jsonl", "file")):
            if (getattr(self, name) is not None) != (self.source == source):
                verb = "is needed for" if self.source == source else "belongs to"
                raise ValueError(f"{name}={getattr(self, name)!r}: it {verb} source='{source}'.")
        for source, name in (("reasoning_gym", "puzzle_options"), ("jsonl", "test_file")):
            if getattr(self, name) and self.source != source:
                raise ValueError(f"{name}={getattr(self, name)!r}: it belongs to source='{source}'.")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """All methods share these settings.

    Args:
        steps (`int`): Steps of a plain LoRA run.
        batch_size (`int`, *optional*, defaults to `4`): Sequences per step.
        max_length (`int`, *optional*, defaults to `256`): Tokens per sequence; longer ones are cut.
        lr_scheduler_type (`str`, *optional*, defaults to `"cosine"`): Schedule of the learning rate.
        warmup_steps (`int` or `float`, *optional*, defaults to `0`): Steps of linear warm-up, or their share.
        weight_decay (`float`, *optional*, defaults to `0.0`): Weight decay of AdamW.
        lora_r (`int`, *optional*, defaults to `8`): Rank of the adapters, on all linear layers.
        lora_alpha (`int`, *optional*): Defaults to twice the rank.
        lora_dropout (`float`, *optional*, defaults to `0.0`): Dropout on the adapters' input, in [0, 1).
        gradient_checkpointing (`bool`, *optional*, defaults to `False`): Whether activations are computed again.
        dtype (`str`, *optional*, defaults to `"float32"`): What the model computes in: `"float32"` or `"bfloat16"`.
        quantize (`str`, *optional*, defaults to `"none"`): `"nf4"` for a 4-bit base; adapters stay in float32.
        prompt_format (`str`, *optional*): What stands in place of the chat template around a single user message, with
            `{}` where it goes; the answer follows. Unset: the tokenizer's own template.
    """

    steps: int
    batch_size: int = 4
    max_length: int = 256
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0
    weight_decay: float = 0.0
    lora_r: int = 8
    lora_alpha: int | None = None
    lora_dropout: float = 0.0
    gradient_checkpointing: bool = False
    dtype: str = "float32"
    quantize: str = "none"
    prompt_format: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "max_length", "lora_r"):
            _at_least_one(name, getattr(self, name))
        for name in ("warmup_steps", "weight_decay", "lora_dropout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{name}={value!r} is not allowed; it must be a finite number >= 0.")
        if self.lora_dropout >= 1:
            raise ValueError(f"lora_dropout={self.lora_dropout!r} is not allowed; it is a share in [0, 1).")
        if self.lora_alpha is not None:
            _at_least_one("lora_alpha", self.lora_alpha)
        check_name("dtype", self.dtype, DTYPES)
        check_name("quantize", self.quantize, QUANTIZATIONS)
        if self.prompt_format is not None and self.prompt_format.count("{}") != 1:
            raise ValueError(f"prompt_format={self.prompt_format!r} must contain '{{}}' once, where the message goes.")


class Candidate(NamedTuple):
    """A candidate holds settings of a method that are tried on the tuning seed.

    Args:
        rate (`float`): Learning rate.
        rho (`float`, *optional*): Radius as a length, where several are tried.
        loss_rise (`float`, *optional*): Radius as a rise of the loss, in nats, where several are tried.
    """

    rate: float
    rho: float | None = None
    loss_rise: float | None = None

    @property
    def shown(self) -> str:
        """What was tried, as text: the learning rate, and the radius where several were tried."""
        radii = (("rho", self.rho), ("loss rise", self.loss_rise))
        return ", ".join([f"{self.rate:g}", *(f"{name} {value:g}" for name, value in radii if value is not None)])


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
    """

    learning_rates: tuple[float, ...]
    slsam: Mapping[str, Any] | None = None
    random_rho: float | None = None
    batch_size: int | None = None
    steps_share: float = 1.0
    rhos: tuple[float, ...] | None = None
    loss_rises: tuple[float, ...] | None = None

    @property
    def candidates(self) -> tuple["Candidate", ...]:
        """Return the settings tried on the tuning seed."""
        return tuple(
            Candidate(rate, rho, rise)
            for rate in self.learning_rates
            for rho in self.rhos or (None,)
            for rise in self.loss_rises or (None,)
        )

    def slsam_with(self, tried: Candidate) -> dict[str, Any] | None:
        """Return the settings of SL-SAM with a candidate's radius in them; `None` for other ways to train."""
        radii = {name: value for name in ("rho", "loss_rise") if (value := getattr(tried, name)) is not None}
        return None if self.slsam is None else {**self.slsam, **radii}

    def __post_init__(self) -> None:
        # Every number is checked and made a float, whatever YAML took it for.
        object.__setattr__(self, "learning_rates", _all_positive("learning_rates", self.learning_rates))
        if self.batch_size is not None:
            _at_least_one("batch_size", self.batch_size)
        object.__setattr__(self, "steps_share", _positive("steps_share", self.steps_share))
        if self.steps_share > 1:
            raise ValueError(f"steps_share={self.steps_share!r} is not allowed; it is a share in (0, 1].")
        # A method is plain LoRA, SL-SAM or the random control, and a radius belongs to one of the latter two.
        if self.random_rho is not None:
            object.__setattr__(self, "random_rho", _positive("random_rho", self.random_rho))
            if self.slsam is not None:
                raise ValueError("slsam and random_rho are both set; a method is one of them or neither (plain LoRA).")
        if self.rhos is not None:
            object.__setattr__(self, "rhos", _all_positive("rhos", self.rhos))
            if self.slsam is None and self.random_rho is None:
                raise ValueError(f"rhos={list(self.rhos)}: plain LoRA has no radius; leave it out.")
            if "rho" in (self.slsam or {}):
                raise ValueError("rhos and slsam.rho are both set; leave one of them out.")
        if self.loss_rises is not None:
            object.__setattr__(self, "loss_rises", _all_positive("loss_rises", self.loss_rises))
            if self.slsam is None:
                raise ValueError(f"loss_rises={list(self.loss_rises)}: only SL-SAM has this radius; leave it out.")
            if self.rhos is not None or "loss_rise" in self.slsam:
                raise ValueError("loss_rises and rhos or slsam.loss_rise are both set; leave one of them out.")
        # What the comparison itself decides is no setting of one method.
        if self.slsam is not None:
            if "seed" in self.slsam:
                raise ValueError("slsam.seed is the run's own seed; leave it out.")
            if "adapter_dtype" in self.slsam:
                raise ValueError("slsam.adapter_dtype: the adapters of all methods are in float32; leave it out.")
            for tried in self.candidates:
                slsam_config(self.slsam_with(tried) or {})


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """A comparison is made of tasks, methods and seeds.

    Args:
        tasks (`dict[str, TaskSettings]`): By the name they are shown under.
        methods (`dict[str, MethodSettings]`): By the name they are shown under.
        training (`TrainingSettings`): What all methods share.
        seeds (`list[int]`): Reported seeds: data, initial adapter, batches and sampler.
        tuning_seed (`int`): Seed on which learning rates are chosen; not reported.
        tuning_task (`str`, *optional*): Task that learning rates are chosen on, for all tasks. Unset: each on its own.
        model (`str`, *optional*, defaults to `"smollm2"`): Base model: `"smollm2"`, a folder or a name on the Hub.
        match (`list[str]`, *optional*): What methods have in common: `"steps"`, `"cost"` (a method of cost c per
            step gets 1/c of the steps) or `"epochs"` (a method of k times the common batch size gets 1/k of them);
            several of these too. Defaults to steps and cost.
        reference (`str`, *optional*, defaults to `"plain"`): Method that the others are compared with.
    """

    tasks: Mapping[str, TaskSettings]
    methods: Mapping[str, MethodSettings]
    training: TrainingSettings
    seeds: tuple[int, ...]
    tuning_seed: int
    tuning_task: str | None = None
    model: str = "smollm2"
    match: tuple[str, ...] = ("steps", "cost")
    reference: str = "plain"

    def batch_size(self, method: str) -> int:
        """Return the sequences per step of a method."""
        return self.methods[method].batch_size or self.training.batch_size

    def __post_init__(self) -> None:
        # Names must be those of methods, tasks and matches that there are.
        check_name("reference", self.reference, tuple(self.methods))
        if self.tuning_task is not None:
            check_name("tuning_task", self.tuning_task, tuple(self.tasks))
        for name in self.match:
            check_name("match", name, MATCHES)
        if not self.match or len(set(self.match)) < len(self.match):
            raise ValueError(f"match={list(self.match)} must be one or more different names.")
        if not isinstance(self.model, str) or not self.model:
            raise ValueError(f"model={self.model!r} is not allowed; name a folder, a hub name, or smollm2.")
        for name in self.methods:
            self._check_sequences(name)
        # Seeds are what torch and random take, and none is both tuned on and reported.
        for seed in (*self.seeds, self.tuning_seed):
            if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
                raise ValueError(
                    f"seeds and tuning_seed: {seed!r} is not allowed; a seed is an integer >= 0 and < 2**32."
                )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)} must be one or more different integers.")
        if self.tuning_seed in self.seeds:
            raise ValueError(
                f"tuning_seed={self.tuning_seed} is among seeds={list(self.seeds)}; learning rates must be chosen on "
                "a seed that is not reported."
            )
        # No method may choose from more candidates than another.
        budgets = {name: len(method.candidates) for name, method in self.methods.items()}
        if len(set(budgets.values())) > 1:
            listed = ", ".join(f"{name}: {count}" for name, count in budgets.items())
            raise ValueError(
                f"every method must try as many learning rates (times radii) as the others; they are {listed}."
            )

    def _check_sequences(self, name: str) -> None:
        """Refuse an ascent by a part of a step's sequences where a step has not so many."""
        slsam, size = self.methods[name].slsam, self.batch_size(name)
        if slsam is None:
            return
        parts = slsam_config(slsam).resolved
        if parts.ascent == "partial" and size < 2:
            raise ValueError(
                f"methods.{name}: ascent='partial' takes a part of a step's sequences, and batch_size={size} has one; "
                "use a larger batch_size, or ascent='two_pass'."
            )
        if parts.ascent_sequences is not None and parts.ascent_sequences > size:
            raise ValueError(
                f"methods.{name}: ascent_sequences={parts.ascent_sequences} is more than the {size} sequences of a "
                "step; with all of them it is dense SAM, method: sam. Use fewer, or a larger batch_size."
            )


def plain_values(settings: Any) -> dict[str, Any]:
    """Return a settings object as plain values, as JSON stores them."""
    return {key: plain_value(value) for key, value in asdict(settings).items()}


def plain_value(value: Any) -> Any:
    """Return a setting as JSON stores it."""
    return list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value


def _at_least_one(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} is not allowed; it must be an integer >= 1.")


def _all_positive(name: str, values: Any) -> tuple[float, ...]:
    if not isinstance(values, list | tuple) or not values:
        raise ValueError(f"{name}={values!r} must be a list of one or more numbers.")
    numbers = tuple(_positive(name, value) for value in values)
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{name}={list(values)!r} has a number twice; each is one try.")
    return numbers


def _positive(name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # YAML takes 1e-3 for a text, not 1.0e-3
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number <= 0:
        raise ValueError(f"{name}: {value!r} is not allowed; it must be a finite number > 0.")
    return number
