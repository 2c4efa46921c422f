"""Builds what every run of a comparison trains: the base model, its rows in their order, the trainer."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from slsam_peft.data.scoring import Tokens, answered, tokenize
from slsam_peft.models.load import find_model, load_with_tokenizer
from slsam_peft.runs.compare import remedies
from slsam_peft.runs.compare.baselines import Baseline
from slsam_peft.runs.compare.control import RandomPerturbationTrainer
from slsam_peft.runs.compare.methods import slsam_config
from slsam_peft.runs.compare.settings import TrainingSettings
from slsam_peft.runs.compare.tasks import TaskData
from slsam_peft.runs.unrecorded import unrecorded
from slsam_peft.trainer.precision import restore_float32
from slsam_peft.trainer.trainer import SLSAMTrainer

Report = Callable[[int, int], None]  # steps done, steps in all


def lora(training: TrainingSettings) -> LoraConfig:
    """Return the adapters all methods train."""
    return LoraConfig(
        r=training.lora_r,
        lora_alpha=training.lora_alpha or 2 * training.lora_r,
        lora_dropout=training.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def training_rows(tokenizer: Any, data: TaskData, training: TrainingSettings) -> list[Tokens]:
    """Return training rows as tokens: those that have an answer to learn, or all where every token counts."""
    limits = (training.max_length, training.prompt_format)
    if not data.whole:
        return answered(tokenizer, data.train, *limits)
    return [Tokens(tokenize(tokenizer, pair, *limits).ids, 0) for pair in data.train]


def load_model(name: str, training: TrainingSettings) -> tuple[Any, Any]:
    """Load the base model and its tokenizer.

    Raises:
        UserError: it cannot be found or read.
    """
    return load_with_tokenizer(find_model(name), getattr(torch, training.dtype), nf4=training.quantize == "nf4")


def row_order(rows: int, wanted: int, seed: int) -> list[int]:
    """Return `wanted` row numbers: shuffled passes over all rows, one after the other.

    Two runs of the same seed and different lengths see the same rows in the same order as far as the shorter one goes.
    """
    shuffler = random.Random(seed)
    order: list[int] = []
    while len(order) < wanted:
        order += shuffler.sample(range(rows), rows)
    return order[:wanted]


class _Progress(TrainerCallback):
    """This callback tells how far a run is."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.report(state.global_step, state.max_steps)


def arguments_of(settings: Mapping[str, Any], scratch: str) -> SFTConfig:
    """Return the trainer's arguments of a run.

    Args:
        settings (`dict`): `Job.settings`.
        scratch (`str`): Folder for whatever the trainer writes.

    Raises:
        ValueError: transformers or TRL refuse a value.
    """
    training, seed = TrainingSettings(**settings["training"]), settings["seed"]
    baseline = Baseline(**settings.get("baseline", {}))
    # Rows arrive in the order of the run and nothing is saved or reported: a run leaves its row alone behind.
    return SFTConfig(
        output_dir=scratch,
        max_steps=settings["steps"],
        per_device_train_batch_size=training.batch_size,
        train_sampling_strategy="sequential",
        learning_rate=settings["learning_rate"],
        lr_scheduler_type=training.lr_scheduler_type,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        seed=seed,
        max_length=training.max_length,
        completion_only_loss=True,
        gradient_checkpointing=training.gradient_checkpointing,
        bf16=training.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        **unrecorded(),
        **remedies.arguments_for(baseline),
    )


def build_trainer(
    model: Any, tokenizer: Any, train: Sequence[Tokens], settings: Mapping[str, Any], scratch: str, report: Report
) -> SFTTrainer:
    """Return the trainer of a run.

    For every method of a seed the initial adapter, its dtype and the order of the rows are the same.

    Args:
        model (`PreTrainedModel`): Base model, from `load_model`.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        train (`Sequence[Tokens]`): Rows, in the order they are trained on.
        settings (`dict`): `Job.settings`.
        scratch (`str`): Folder for whatever the trainer writes.
        report (`Report`): Told after every step.
    """
    training, seed = TrainingSettings(**settings["training"]), settings["seed"]
    common = {
        "args": arguments_of(settings, scratch),
        "train_dataset": Dataset.from_list([row.columns() for row in train]),
        "processing_class": tokenizer,
        "peft_config": lora(training),
        "callbacks": [_Progress(report)],
    }
    set_seed(seed)  # of the adapters' start
    if settings["slsam"] is not None:
        slsam = slsam_config(settings["slsam"], seed=seed, trace=False)  # a trace would be gone with the folder
        trainer = SLSAMTrainer(model, slsam_config=slsam, **common)
    elif settings["random_rho"] is not None:
        trainer = RandomPerturbationTrainer(model, random_rho=settings["random_rho"], **common)
    else:
        trainer = SFTTrainer(model, **common)
    trained: Any = trainer.model
    restore_float32(trained, {})  # after TRL's cast on a quantized base; SLSAMTrainer has done it already
    trainer.remove_callback(PrinterCallback)
    return trainer
