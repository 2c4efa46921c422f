"""Holds the quickstart's parts: a chat model in NF4, LoRA trained plainly and with SL-SAM, an answer, the adapter."""

import math
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig

from slsam_peft.config import SLSAMConfig
from slsam_peft.cost.expected import rule_of
from slsam_peft.data.stdlib_docs import stdlib_docs
from slsam_peft.errors import UserError
from slsam_peft.models.fetched import hub_name_of
from slsam_peft.models.load import load_tokenizer, load_with_tokenizer
from slsam_peft.runs.unrecorded import unrecorded
from slsam_peft.saving.card import describe
from slsam_peft.saving.trace_data import FILE_NAME
from slsam_peft.trainer.trainer import SLSAMTrainer

if TYPE_CHECKING:
    from datasets import DatasetDict

MAX_LENGTH = 256  # tokens; question and answer together have about 90
MAX_NEW_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class QuickstartSettings:
    """What both trainings of the quickstart share.

    Args:
        n_train (`int`): Training rows.
        n_test (`int`): Held-out rows.
        label_noise (`float`): Share of the training rows whose answers are swapped, in [0, 1].
        epochs (`int`): How often each training row is seen.
        batch_size (`int`): Sequences per step.
        lora_r (`int`): Rank of the adapters, on every linear layer; `lora_alpha` is twice that.
        seed (`int`): Seed of the data, of the adapters' start and of the batches.
    """

    n_train: int
    n_test: int
    label_noise: float
    epochs: int
    batch_size: int
    lora_r: int
    seed: int

    @property
    def wrong_answers(self) -> int:
        """Return how many training rows have the answer of another one."""
        return round(self.label_noise * self.n_train)

    @property
    def steps(self) -> int:
        """Return the steps of a training; an epoch's last step may have fewer sequences."""
        return self.epochs * math.ceil(self.n_train / self.batch_size)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One of the ways to train that the quickstart compares.

    Args:
        name (`str`): What it is called on the screen.
        learning_rate (`float`): Peak learning rate; it falls linearly to 0.
        slsam (`SLSAMConfig`): Settings of SL-SAM; plain LoRA where `rho` is 0.
    """

    name: str
    learning_rate: float
    slsam: SLSAMConfig

    def ascent_sequences(self, sequences: int) -> int:
        """Return how many of a step's sequences make its ascent, m of N: a step costs 1 + m/N plain LoRA steps."""
        return rule_of(self.slsam, rides=False).ascent.take(0, 1, sequences, 0)


@dataclass(frozen=True)
class Outcome:
    """What came of a training.

    Args:
        loss (`float`): Mean loss on the held-out rows afterwards, in nats.
        answer (`str`): The trained model's answer to the sample question.
        seconds (`float`, *optional*, defaults to `0.0`): Wall-clock time of its steps, without loading and measuring;
            0 where there were none.
    """

    loss: float
    answer: str
    seconds: float = 0.0


def load_data(settings: QuickstartSettings) -> "DatasetDict":
    """Return questions on Python's standard library, in splits `"train"` and `"test"`; see `stdlib_docs`.

    Raises:
        UserError: there are not as many rows, or the noise is so little that it means one row.
    """
    try:
        return stdlib_docs(
            n_train=settings.n_train, n_test=settings.n_test, seed=settings.seed, label_noise=settings.label_noise
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--{error}" if isinstance(error, ValueError) else str(error)) from error


def load_chat_model(name_or_path: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load a chat model with its linear layers in 4-bit NF4, and its tokenizer.

    Raises:
        UserError: it cannot be found or read, or it has no chat template.
    """
    if not load_tokenizer(name_or_path).chat_template:  # before any weights
        raise UserError(f"{name_or_path} has no chat template; name an instruct or chat model with --model.")
    return load_with_tokenizer(name_or_path, dtype, nf4=True)


class _Report(TrainerCallback):
    """Hands every step's log to a function."""

    def __init__(self, report: Callable[[int, dict[str, float]], None]) -> None:
        self.report = report

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.report(state.global_step, logs)


def build_trainer(
    model: Any,
    tokenizer: Any,
    data: "DatasetDict",
    settings: QuickstartSettings,
    contender: Contender,
    scratch: str,
    report: Callable[[int, dict[str, float]], None],
) -> SLSAMTrainer:
    """Return an `SLSAMTrainer` for `model` that reports every step.

    Trainers of equal `settings`, one after the other on the same model, start from the same adapter and see the same
    batches.

    Args:
        model (`PreTrainedModel`): From `load_chat_model` or `without_adapter`.
        tokenizer (`PreTrainedTokenizerBase`): From `load_chat_model`.
        data (`datasets.DatasetDict`): Splits `"train"` and `"test"`, as `stdlib_docs` builds them.
        settings (`QuickstartSettings`): What to train with.
        contender (`Contender`): How to train.
        scratch (`str`): Folder for whatever the trainer writes.
        report (`Callable`): Called with the step's number, from 1, and its log.
    """
    # What the trainer is told; the rest is TRL's default.
    set_seed(settings.seed)
    arguments = SFTConfig(
        output_dir=scratch,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        learning_rate=contender.learning_rate,
        seed=settings.seed,
        max_length=MAX_LENGTH,
        # 135M parameters and short sequences fit without recomputing activations.
        gradient_checkpointing=False,
        bf16=model.dtype == torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        **unrecorded(),
    )
    # An adapter on every linear layer, and the trainer itself, which prints nothing of its own.
    lora = LoraConfig(
        r=settings.lora_r, lora_alpha=2 * settings.lora_r, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    trainer = SLSAMTrainer(
        model,
        args=arguments,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        peft_config=lora,
        slsam_config=contender.slsam,
        callbacks=[_Report(report)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _card(trainer: SLSAMTrainer, text: str) -> ModelCard:
    base: Any = trainer.model.config.name_or_path  # type: ignore[union-attr]  # no model config is a tensor
    if Path(base).is_dir():  # a card is read elsewhere, where this folder means nothing
        base = hub_name_of(base)
    header = ModelCardData(
        base_model=base, library_name="peft", pipeline_tag="text-generation", tags=describe(trainer.slsam_config)
    )
    return ModelCard(f"---\n{header}\n---\n\n{text}")


def answer(model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """Return the model's greedy answer to a conversation; it ends in "..." where it was cut off at 64 tokens."""
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    finally:
        model.train(training)
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    return text if output[0, -1] == tokenizer.eos_token_id else f"{text} ..."


def measure(trainer: SLSAMTrainer, messages: list[dict[str, str]], seconds: float = 0.0) -> Outcome:
    """Return the loss on the trainer's held-out rows and the model's answer to a conversation, as they are now.

    Args:
        trainer (`SLSAMTrainer`): From `build_trainer`.
        messages (`list[dict]`): The conversation.
        seconds (`float`, *optional*): How long the training took.
    """
    loss = trainer.evaluate()["eval_loss"]
    return Outcome(loss, answer(trainer.model, trainer.processing_class, messages), seconds)


def without_adapter(trainer: SLSAMTrainer) -> Any:
    """Take the adapter off a trainer's model, and return the base model as it was loaded, for another trainer.

    The trainer is of no use afterwards.
    """
    trained: Any = trainer.model
    return trained.unload()


def save_adapter(trainer: SLSAMTrainer, folder: Path, card: str) -> None:
    """Write adapter, tokenizer, model card and the training's trace to `folder`. Files of other names in it stay.

    Args:
        trainer (`SLSAMTrainer`): Whose adapter.
        folder (`Path`): Made where it is missing, with its parents.
        card (`str`): Text of the model card, without the YAML header.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        # All files are written beside the folder first, so that a full disk spoils no adapter in it.
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            new = Path(scratch) / "adapter"
            trainer.save_model(str(new))
            (new / "training_args.bin").unlink(missing_ok=True)  # a pickle, of no use to whoever loads the adapter
            _card(trainer, card).save(new / "README.md")
            trace = Path(str(trainer.args.output_dir)) / FILE_NAME
            if trace.is_file():
                shutil.copyfile(trace, new / FILE_NAME)
            # Then each takes the place of its namesake.
            folder.mkdir(exist_ok=True)
            for file in sorted(new.iterdir()):
                os.replace(file, folder / file.name)
    except OSError as error:
        raise UserError(
            f"the adapter could not be written to {folder}: {error.strerror or error}.\n"
            "Free some space or name another folder with --output."
        ) from error
