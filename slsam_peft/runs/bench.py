"""The clock: plain LoRA, LoRA-SAM and our modes in alternation, in one process, on one model and the same batches."""

import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import psutil
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from slsam_peft.config import SLSAMConfig, hint_at
from slsam_peft.errors import UserError
from slsam_peft.models.load import compute_dtype
from slsam_peft.trainer.precision import restore_float32
from slsam_peft.trainer.trainer import SLSAMTrainer

SAMPLE_SECONDS = 0.02  # between two looks at the process's memory


@dataclass(frozen=True)
class Mode:
    """A way to train.

    Args:
        config (`SLSAMConfig`, *optional*): Settings of SL-SAM; plain `SFTTrainer` without.
        fewer (`int`, *optional*, defaults to `0`): Parts that an update has less than the reference's: micro-batches
            under gradient accumulation, else sequences.
    """

    config: SLSAMConfig | None = None
    fewer: int = 0


# Reference, the method everybody knows, and what is proposed instead. The radius does not change the cost.
MODES = {
    "plain LoRA": Mode(),
    "LoRA-SAM": Mode(SLSAMConfig(active_fraction=1.0)),
    "paper's sampling": Mode(SLSAMConfig(bandit="paper", design="bernoulli", active_fraction=0.2)),
    "two_pass, depth, budget 1.0": Mode(SLSAMConfig(design="depth", cost_budget=1.0)),
    "partial 1/4, depth, budget 0.75": Mode(SLSAMConfig(ascent="partial", design="depth", cost_budget=0.75)),
    "remembered, depth, budget 0.65": Mode(SLSAMConfig(ascent="remembered", design="depth", cost_budget=0.65)),
    # The least fraction: one sequence, or one micro-batch.
    "partial of one, one fewer": Mode(SLSAMConfig(ascent="partial", ascent_fraction=0.01, active_fraction=1.0), 1),
    "ahead by one, one fewer": Mode(SLSAMConfig(ascent="ahead", ascent_fraction=0.01, active_fraction=1.0), 1),
}
REFERENCE = "plain LoRA"


@dataclass
class Measured:
    """What one mode cost: one entry a round.

    Args:
        mode (`str`): Its name.
        seconds (`list[float]`): Mean time of an update, in seconds.
        ratios (`list[float]`): The same over plain LoRA's in the same round.
        predicted (`list[float]`): Mean predicted cost of the same updates, in plain LoRA updates; none for it.
        peak_bytes (`list[int]`): Most memory in use: allocated on the GPU, else resident in the process.
    """

    mode: str
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    predicted: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Return the medians, with the rounds they come from."""
        return {
            "mode": self.mode,
            "seconds_per_step": statistics.median(self.seconds),
            "ratio": statistics.median(self.ratios),
            "predicted": statistics.median(self.predicted) if self.predicted else 1.0,
            "peak_bytes": max(self.peak_bytes),
            "rounds": {name: value for name, value in asdict(self).items() if name != "mode"},
        }


class _Clock(TrainerCallback):
    """Time from the start to the end of each update, and the cost it was predicted to have."""

    def __init__(self, trainer: SFTTrainer, share: float) -> None:
        self.trainer = trainer
        self.share = share
        self.seconds: list[float] = []
        self.predicted: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _synchronise()
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _synchronise()
        self.seconds.append(time.perf_counter() - self.started)
        slsam = getattr(self.trainer, "slsam", None)
        if slsam is not None and "cost" in slsam.metrics:
            self.predicted.append(slsam.metrics["cost"] * self.share)


def run_bench(
    model: Any,
    tokenizer: Any,
    *,
    lora_r: int = 16,
    batch: int = 2,
    length: int = 128,
    accumulation: int = 1,
    steps: int = 16,
    rounds: int = 3,
    modes: dict[str, Mode] | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Measured]:
    """Measure the modes in alternation.

    Args:
        model (`PreTrainedModel`): The base model, possibly quantised; gets an adapter on all linear layers.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        lora_r (`int`, *optional*, defaults to `16`): Rank.
        batch (`int`, *optional*, defaults to `2`): Sequences a micro-batch.
        length (`int`, *optional*, defaults to `128`): Tokens a sequence.
        accumulation (`int`, *optional*, defaults to `1`): Micro-batches an update.
        steps (`int`, *optional*, defaults to `16`): Updates of each mode a round; the first is not timed.
        rounds (`int`, *optional*, defaults to `3`): Rounds.
        modes (`dict[str, Mode]`, *optional*): By name, `REFERENCE` first. Defaults to those of `MODES` that an update
            has parts for.
        tell (`Callable[[str], None]`, *optional*): Told what runs.

    Returns:
        `list[Measured]`: One a mode, in order.
    """
    modes = modes or select_modes(None, batch, accumulation)
    parts = _parts(batch, accumulation)
    peft_model = get_peft_model(model, LoraConfig(r=lora_r, lora_alpha=2 * lora_r, target_modules="all-linear"))
    rows = _random_rows(tokenizer, batch * accumulation * (steps + 1), length)
    with tempfile.TemporaryDirectory() as folder:
        trainers = {}
        for name, mode in modes.items():
            sizes = (batch, parts - mode.fewer) if accumulation > 1 else (parts - mode.fewer, 1)
            trainers[name] = _trainer(peft_model, tokenizer, _arguments(folder, *sizes, steps), rows, mode.config)
        if _emulates_bfloat16():  # undo TRL's cast of QLoRA adapters to it
            restore_float32(peft_model, {})
        measured = {name: Measured(name) for name in modes}
        for number in range(rounds):
            for name, trainer in trainers.items():
                tell(f"round {number + 1} of {rounds}: {name}")
                _round(trainer, number, measured[name], 1 - modes[name].fewer / parts)
            for name in modes:
                measured[name].ratios.append(measured[name].seconds[-1] / measured[REFERENCE].seconds[-1])
    return list(measured.values())


def select_modes(names: Sequence[str] | None, batch: int, accumulation: int) -> dict[str, Mode]:
    """Return plain LoRA and the modes of the given names, or all modes that are possible.

    Args:
        names (`Sequence[str]` or `None`): Keys of `MODES`; `None` for all that an update has parts for.
        batch (`int`): Sequences a micro-batch.
        accumulation (`int`): Micro-batches an update.

    Raises:
        UserError: a name is unknown, or its mode needs more sequences or micro-batches.
    """
    missing = {name: _missing(mode, batch, accumulation) for name, mode in MODES.items()}
    if names is None:
        return {name: mode for name, mode in MODES.items() if missing[name] is None}
    for name in names:
        if name not in MODES:
            allowed = "".join(f"\n  {known}" for known in MODES)
            raise UserError(f"--modes: {name!r} is not known.{hint_at(name, MODES)} The modes are:{allowed}")
        if missing[name] is not None:
            raise UserError(f"--modes: {name!r} needs {missing[name]}.")
    return {name: mode for name, mode in MODES.items() if name == REFERENCE or name in names}


def _parts(batch: int, accumulation: int) -> int:
    """Return what an update consists of: its micro-batches, or the sequences of its only one."""
    return accumulation if accumulation > 1 else batch


def _missing(mode: Mode, batch: int, accumulation: int) -> str | None:
    """Return what an update needs for a mode with fewer parts, where it does not have it."""
    if mode.config is not None and mode.config.ascent == "ahead":
        enough = accumulation == 1 and batch - mode.fewer >= 1
        return None if enough else "--gradient_accumulation_steps 1 and --batch_size 2 or more"
    partial = mode.config is not None and mode.config.ascent == "partial"
    least = 2 + mode.fewer if partial else 1  # of two the ascent takes one
    enough = _parts(batch, accumulation) >= least
    return None if enough else f"--batch_size {least} or more, or --gradient_accumulation_steps {least} or more"


def _arguments(folder: str, batch: int, accumulation: int, steps: int) -> SFTConfig:
    return SFTConfig(
        folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=steps + 1,
        max_length=None,
        bf16=torch.cuda.is_available(),
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _trainer(model: Any, tokenizer: Any, args: SFTConfig, rows: Dataset, config: SLSAMConfig | None) -> SFTTrainer:
    common = {"args": args, "train_dataset": rows, "processing_class": tokenizer}
    # The same precision for all: TRL's, as in the plain reference, or float32, see above.
    kept = "float32" if _emulates_bfloat16() else "keep"
    trainer = (
        SFTTrainer(model, **common)
        if config is None
        else SLSAMTrainer(model, **common, slsam_config=replace(config, adapter_dtype=kept, trace=False))
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _emulates_bfloat16() -> bool:
    return compute_dtype("auto") == torch.float32


def _round(trainer: SFTTrainer, number: int, measured: Measured, share: float) -> None:
    """Train one round; the first update, which warms up and checks prefix reuse, is not timed.

    Args:
        trainer (`SFTTrainer`): Of the mode.
        number (`int`): Of the round.
        measured (`Measured`): Gets what the round cost.
        share (`float`): Sequences an update as a share of the reference's.
    """
    if isinstance(trainer, SLSAMTrainer):  # other floors in every round
        trainer.slsam_config = replace(trainer.slsam_config, seed=number)
    clock = _Clock(trainer, share)
    trainer.add_callback(clock)
    with PeakMemory() as peak:
        trainer.train()
    trainer.remove_callback(clock)
    if isinstance(trainer, SLSAMTrainer):  # or the modes after it pay for what it remembers
        trainer.slsam.memory.replace({})
    measured.seconds.append(statistics.mean(clock.seconds[1:]))
    measured.peak_bytes.append(peak.bytes)
    if clock.predicted:
        measured.predicted.append(statistics.mean(clock.predicted[1:]))


def _random_rows(tokenizer: Any, count: int, length: int) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(tokenizer) // 2, (count, length), generator=generator)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class PeakMemory:
    """Most memory in use inside the context: allocated on the GPU, else resident in the process, in bytes."""

    def __enter__(self) -> "PeakMemory":
        self.bytes = 0
        self._done = threading.Event()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            self._process = psutil.Process()
            self._watch = threading.Thread(target=self._sample, daemon=True)
            self._watch.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.bytes = max(self.bytes, self._process.memory_info().rss)

    def __exit__(self, *_: Any) -> None:
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated()
        else:
            self._done.set()
            self._watch.join()


def peak_resident_bytes() -> int:
    """Return the most memory the process ever had resident, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def draw(measured: Sequence[Measured]) -> Any:
    """Draw measured beside predicted ratios.

    Args:
        measured (`Sequence[Measured]`): What `run_bench` returned.

    Returns:
        `matplotlib.figure.Figure`: The picture.
    """
    from matplotlib.figure import Figure

    names = [m.mode for m in measured]
    figure = Figure(figsize=(8, 0.6 * len(names) + 1.7), layout="constrained")
    axes = figure.subplots()
    rows = range(len(names))
    summaries = [m.summary() for m in measured]
    axes.barh(rows, [s["ratio"] for s in summaries], color="#4c72b0", height=0.55, label="measured, median of rounds")
    axes.plot([s["predicted"] for s in summaries], rows, "D", color="black", ms=6, label="predicted from FLOPs")
    for row, m in zip(rows, measured, strict=True):
        axes.plot(m.ratios, [row] * len(m.ratios), "|", color="#c44e52", ms=12, mew=2, label=None if row else "rounds")
    axes.axvline(1.0, color="grey", lw=1, ls="--")
    axes.set_yticks(rows, names)
    axes.invert_yaxis()
    axes.set_xlabel("time of an update / plain LoRA's (same round)")
    axes.set_title("Cost of an update")
    figure.legend(loc="outside lower center", ncols=3)  # inside it would lie on the marks
    return figure
