"""The settings of a comparison check themselves before anything is trained. This module imports no torch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from slsam_peft.data.sources import SOURCES as PACKAGED
from slsam_peft.names import check_name
from slsam_peft.runs.compare.backdoor import Backdoor
from slsam_peft.runs.compare.methods import MethodSettings, slsam_config
from slsam_peft.runs.compare.numbers import at_least_one

SOURCES = ("stdlib_docs", "reasoning_gym", "jsonl", "own_data", *PACKAGED)
DTYPES = ("float32", "bfloat16")
QUANTIZATIONS = ("none", "nf4")
MATCHES = ("steps", "cost", "epochs")

SEED_STRIDE = 2_000_000  # far from the generator's seeds of held-out rows, too


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """A task says where its rows come from and how many there are.

    Args:
        source (`str`): `"stdlib_docs"`, `"reasoning_gym"`, `"jsonl"`, `"own_data"` (which `slsam-peft compare --data`
            writes) or a task out of a package, see `slsam_peft.data.sources`.
        rows (`int`): Training rows. They are repeated where the steps take more.
        test_rows (`int`, *optional*, defaults to `128`): Held-out rows, the same for every seed.
        validation_rows (`int`, *optional*, defaults to `96`): Held-out rows that learning rates are chosen on; none of
            them is a test row.
        label_noise (`float`, *optional*, defaults to `0.0`): Share of training rows, in [0, 1], whose answers are
            swapped.
        steps (`int`, *optional*): In place of `TrainingSettings.steps`.
        puzzle (`str`, *optional*): The puzzle of `"reasoning_gym"`.
        puzzle_options (`dict`, *optional*): Its options.
        seed_stride (`int`, *optional*): How far apart the generators of two neighbouring seeds begin.
            `"reasoning_gym"` makes row i from the generator's seed + i: with a stride of 1 two seeds share nearly all
            training rows, and differ in whose answers are swapped, the order and the initial adapter. Defaults to
            `SEED_STRIDE`, which gives each seed rows of its own.
        file (`str`, *optional*): Training rows of `"jsonl"`, or of `"own_data"` whatever `slsam-peft sft` takes.
        test_file (`str`, *optional*): Its held-out rows; where it is missing the last rows of `file`, or those that
            `slsam_peft.data.own_rows` holds out.
        digest (`str`, *optional*): Hash of the rows of `"own_data"`. Rows of which it is not the hash are refused.
        backdoor (`dict`, *optional*): All methods train on from an adapter that this backdoor has been planted in,
            with further rows of the same source, see `Backdoor`. Scores tell of it before and after.
    """

    source: str
    rows: int
    test_rows: int = 128
    validation_rows: int = 96
    label_noise: float = 0.0
    steps: int | None = None
    puzzle: str | None = None
    puzzle_options: Mapping[str, Any] = field(default_factory=dict)
    seed_stride: int | None = None
    file: str | None = None
    test_file: str | None = None
    digest: str | None = None
    backdoor: Backdoor | None = None

    def __post_init__(self) -> None:
        check_name("source", self.source, SOURCES)
        for name in ("rows", "test_rows", "validation_rows"):
            at_least_one(name, getattr(self, name))
        if self.source == "reasoning_gym" and self.seed_stride is None:
            object.__setattr__(self, "seed_stride", SEED_STRIDE)
        for name in ("steps", "seed_stride"):
            if getattr(self, name) is not None:
                at_least_one(name, getattr(self, name))
        if not isinstance(self.label_noise, int | float) or not 0 <= self.label_noise <= 1:
            raise ValueError(f"label_noise={self.label_noise!r} is not allowed; it is a share in [0, 1].")
        files = ("jsonl", "own_data")
        for sources, name in ((("reasoning_gym",), "puzzle"), (files, "file"), (("own_data",), "digest")):
            if (getattr(self, name) is not None) != (self.source in sources):
                needed = self.source in sources
                verb, which = ("is needed for", self.source) if needed else ("belongs to", sources[0])
                raise ValueError(f"{name}={getattr(self, name)!r}: it {verb} source='{which}'.")
        puzzles = ("reasoning_gym",)
        for sources, name in ((puzzles, "puzzle_options"), (puzzles, "seed_stride"), (files, "test_file")):
            if getattr(self, name) and self.source not in sources:
                raise ValueError(f"{name}={getattr(self, name)!r}: it belongs to source='{sources[0]}'.")
        if self.backdoor is not None:
            self._check_backdoor(self.backdoor)

    def _check_backdoor(self, backdoor: Any) -> None:
        if not isinstance(backdoor, Backdoor):
            object.__setattr__(self, "backdoor", Backdoor.from_mapping(backdoor))
        if self.source == "own_data":
            raise ValueError("backdoor: source='own_data' takes all rows for training; use source='jsonl'.")
        if self.label_noise:
            raise ValueError(f"label_noise={self.label_noise} and backdoor are both set; the rows after it are clean.")


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
            `{}` where it goes; the answer follows; a BOS token comes first where the tokenizer adds one. Unset: the
            tokenizer's own template.
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
            at_least_one(name, getattr(self, name))
        for name in ("warmup_steps", "weight_decay", "lora_dropout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{name}={value!r} is not allowed; it must be a finite number >= 0.")
        if self.lora_dropout >= 1:
            raise ValueError(f"lora_dropout={self.lora_dropout!r} is not allowed; it is a share in [0, 1).")
        if self.lora_alpha is not None:
            at_least_one("lora_alpha", self.lora_alpha)
        check_name("dtype", self.dtype, DTYPES)
        check_name("quantize", self.quantize, QUANTIZATIONS)
        if self.prompt_format is not None and self.prompt_format.count("{}") != 1:
            raise ValueError(f"prompt_format={self.prompt_format!r} must contain '{{}}' once, where the message goes.")


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
        model (`str`, *optional*, defaults to `"smollm2"`): Base model: `"smollm2"`, `"gemma3"`, a folder or a name on
            the Hub.
        match (`list[str]`, *optional*): What methods have in common: `"steps"`, `"cost"` (a method of cost c per
            step gets 1/c of the steps) or `"epochs"` (a method of k times the common batch size gets 1/k of them);
            several of these too. Defaults to steps and cost.
        reference (`str`, *optional*, defaults to `"plain"`): Method that the others are compared with.
        primary (`str`, *optional*): Method that the comparison is made for, named before there are results: its
            p-value is not corrected for those of the others.
        all_scores (`bool`, *optional*, defaults to `False`): Also score the held-out loss at a temperature chosen on
            the validation rows, and how much worse the model has become on unrelated text, which is fetched.
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
    primary: str | None = None
    all_scores: bool = False

    def batch_size(self, method: str) -> int:
        """Return the sequences per step of a method."""
        return self.methods[method].batch_size or self.training.batch_size

    def __post_init__(self) -> None:
        # Names must be those of methods, tasks and matches that there are.
        check_name("reference", self.reference, tuple(self.methods))
        others = tuple(name for name in self.methods if name != self.reference)
        if self.primary is not None and not others:
            raise ValueError(
                f"primary={self.primary!r}: there is no method beside reference={self.reference!r}, and its p-value "
                "would be of the difference to that; add the method, or leave primary out."
            )
        if self.primary is not None:
            check_name("primary", self.primary, others)
        if self.tuning_task is not None:
            check_name("tuning_task", self.tuning_task, tuple(self.tasks))
        for name in self.match:
            check_name("match", name, MATCHES)
        if not self.match or len(set(self.match)) < len(self.match):
            raise ValueError(f"match={list(self.match)} must be one or more different names.")
        if not isinstance(self.model, str) or not self.model:
            raise ValueError(f"model={self.model!r} is not allowed; name a folder, a hub name, smollm2 or gemma3.")
        for name, how in self.methods.items():
            self._check_sequences(name)
            poisoned = [task for task, of in self.tasks.items() if of.backdoor is not None]
            if poisoned and any(b.lora_r is not None for b in how.baselines or ()):
                raise ValueError(
                    f"methods.{name}: baselines: lora_r makes another adapter, and every method of task {poisoned[0]} "
                    "begins with the same poisoned one; leave it out."
                )
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
        # No method may choose from more candidates than another; one that chooses nothing has no advantage.
        budgets = {name: len(how.candidates) for name, how in self.methods.items() if len(how.candidates) > 1}
        if len(set(budgets.values())) > 1:
            listed = ", ".join(f"{name}: {count}" for name, count in budgets.items())
            raise ValueError(
                f"every method must try as many learning rates (times radii) as the others, or a single one; they are "
                f"{listed}."
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
