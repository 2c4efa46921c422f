"""Times plain LoRA and our modes in alternation, in one process, on one model and the same batches."""

import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import psutil
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from slsam_peft.config import SLSAMConfig
from slsam_peft.models.load import compute_dtype
from slsam_peft.runs.bench_modes import REFERENCE, Mode, select_modes, sizes_of
from slsam_peft.runs.unrecorded import unrecorded
from slsam_peft.trainer.advice import unadvised
from slsam_peft.trainer.precision import restore_float32
from slsam_peft.trainer.trainer import SLSAMTrainer

SAMPLE_SECONDS = 0.02  # between two looks at the process's memory


@dataclass
class Measured:
    """What one mode cost: one entry per round.

    Args:
        mode (`str`): Its name.
        seconds (`list[float]`): Mean time of a step, in seconds.
        ratios (`list[float]`): The same over plain LoRA's in the same round.
        predicted (`list[float]`): Mean predicted cost of the same steps, in plain LoRA steps; none for plain LoRA.
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
    """Measures the time from the start to the end of each step, beside the cost it was predicted to have."""

    def __init__(self, trainer: SFTTrainer) -> None:
        self.trainer = trainer
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
            self.predicted.append(slsam.metrics["cost"])


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
        batch (`int`, *optional*, defaults to `2`): Sequences per micro-batch.
        length (`int`, *optional*, defaults to `128`): Tokens per sequence.
        accumulation (`int`, *optional*, defaults to `1`): Micro-batches per step.
        steps (`int`, *optional*, defaults to `16`): Timed steps of each mode per round; one that is
            not timed comes before them, and one behind.
        rounds (`int`, *optional*, defaults to `3`): Rounds.
        modes (`dict[str, Mode]`, *optional*): By name, `REFERENCE` first. Defaults to those of `MODES` that differ
            for such steps.
        tell (`Callable[[str], None]`, *optional*): Told what runs.

    Returns:
        `list[Measured]`: One per mode, in order.
    """
    # One model with one adapter serves all modes, on the same sequences.
    modes = modes or select_modes(None, batch, accumulation)
    peft_model = get_peft_model(model, LoraConfig(r=lora_r, lora_alpha=2 * lora_r, target_modules="all-linear"))
    sequences = random_sequences(tokenizer, batch * accumulation * (steps + 2), length)
    with tempfile.TemporaryDirectory() as folder:
        # Trainers are made before the clock starts.
        trainers = {}
        for name, mode in modes.items():
            args = _arguments(folder, *sizes_of(mode, batch, accumulation), steps)
            trainers[name] = _trainer(peft_model, tokenizer, args, sequences, mode.config)
        if emulates_bfloat16():  # undo TRL's cast of QLoRA adapters to it
            restore_float32(peft_model, {})
        # Modes alternate within a round, so that what else the machine does meets all of them.
        measured = {name: Measured(name) for name in modes}
        for number in range(rounds):
            for name, trainer in trainers.items():
                tell(f"round {number + 1} of {rounds}: {name}")
                _round(trainer, number, measured[name])
            for name in modes:
                measured[name].ratios.append(measured[name].seconds[-1] / measured[REFERENCE].seconds[-1])
    return list(measured.values())


def _arguments(folder: str, batch: int, accumulation: int, steps: int) -> SFTConfig:
    return SFTConfig(
        folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=steps + 2,
        max_length=None,
        bf16=torch.cuda.is_available(),
        logging_strategy="no",
        **unrecorded(),
    )


def _trainer(
    model: Any, tokenizer: Any, args: SFTConfig, sequences: Dataset, config: SLSAMConfig | None
) -> SFTTrainer:
    common = {"args": args, "train_dataset": sequences, "processing_class": tokenizer}
    trainer = (
        SFTTrainer(model, **common)
        if config is None
        else SLSAMTrainer(model, **common, slsam_config=replace(config, adapter_dtype=adapter_dtype(), trace=False))
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def emulates_bfloat16() -> bool:
    """Whether this machine computes in float32, since bfloat16 would be slower."""
    return compute_dtype("auto") == torch.float32


def adapter_dtype() -> str:
    """Return the `adapter_dtype` that gives all trainers the precision of the plain one: TRL's, or float32."""
    return "float32" if emulates_bfloat16() else "keep"


def _round(trainer: SFTTrainer, number: int, measured: Measured) -> None:
    """Train one round; its first step, which warms up and checks the model, and its last are not timed.

    Behind the last one no batch comes, of which sequences could ride along.

    Args:
        trainer (`SFTTrainer`): Of the mode.
        number (`int`): Of the round.
        measured (`Measured`): Gets what the round cost.
    """
    if isinstance(trainer, SLSAMTrainer):  # other draws in every round
        trainer.slsam_config = replace(trainer.slsam_config, seed=number)
    clock = _Clock(trainer)
    trainer.add_callback(clock)
    with unadvised(), PeakMemory() as peak:
        trainer.train()
    trainer.remove_callback(clock)
    _free(trainer)
    measured.seconds.append(statistics.mean(clock.seconds[1:-1]))
    measured.peak_bytes.append(peak.bytes)
    if clock.predicted:
        measured.predicted.append(statistics.mean(clock.predicted[1:-1]))


def _free(trainer: SFTTrainer) -> None:
    """Drop what a trainer holds on to between rounds, or the modes after it pay for it in memory."""
    trainer.accelerator.free_memory()
    trainer.optimizer = trainer.lr_scheduler = None  # made anew in the next round
    trainer.callback_handler.optimizer = trainer.callback_handler.lr_scheduler = None
    if isinstance(trainer, SLSAMTrainer):
        trainer.slsam.memory.replace({})


def random_sequences(tokenizer: Any, count: int, length: int) -> Dataset:
    """Return so many sequences of random tokens, the same in every call."""
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
