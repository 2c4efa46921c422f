"""Holds the quickstart's parts: a chat model in NF4, LoRA trained with SL-SAM, one answer, the adapter on disk."""

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
from slsam_peft.errors import UserError
from slsam_peft.models.load import load_tokenizer, load_with_tokenizer
from slsam_peft.models.smollm2 import HUB_NAME, MODEL_NAME
from slsam_peft.saving.card import describe
from slsam_peft.saving.trace_data import FILE_NAME
from slsam_peft.trainer.trainer import SLSAMTrainer

if TYPE_CHECKING:
    from datasets import DatasetDict

MAX_LENGTH = 256  # tokens; question and answer together have about 90
MAX_NEW_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class QuickstartSettings:
    """What the quickstart trains with.

    Args:
        max_steps (`int`): Steps of training.
        batch_size (`int`): Sequences per step.
        learning_rate (`float`): Peak learning rate; it falls linearly to 0.
        lora_r (`int`): Rank of the adapters, on every linear layer; `lora_alpha` is twice that.
        seed (`int`): Seed of the adapters' start and of the batches.
        slsam (`SLSAMConfig`): Settings of SL-SAM.
    """

    max_steps: int
    batch_size: int
    learning_rate: float
    lora_r: int
    seed: int
    slsam: SLSAMConfig


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
    scratch: str,
    report: Callable[[int, dict[str, float]], None],
) -> SLSAMTrainer:
    """Return an `SLSAMTrainer` for `model` that reports every step.

    Args:
        model (`PreTrainedModel`): From `load_chat_model`.
        tokenizer (`PreTrainedTokenizerBase`): From `load_chat_model`.
        data (`datasets.DatasetDict`): Splits `"train"` and `"test"`, as `stdlib_docs` builds them.
        settings (`QuickstartSettings`): What to train with.
        scratch (`str`): Folder for whatever the trainer writes.
        report (`Callable`): Called with the step's number, from 1, and its log.
    """
    # What the trainer is told; the rest is TRL's default.
    set_seed(settings.seed)
    arguments = SFTConfig(
        output_dir=scratch,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        max_length=MAX_LENGTH,
        # 135M parameters and short sequences fit without recomputing activations.
        gradient_checkpointing=False,
        bf16=model.dtype == torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
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
        slsam_config=settings.slsam,
        callbacks=[_Report(report)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _card(trainer: SLSAMTrainer, text: str) -> ModelCard:
    base: Any = trainer.model.config.name_or_path  # type: ignore[union-attr]  # no model config is a tensor
    if Path(base).is_dir():  # a card is read elsewhere, where this folder means nothing
        base = HUB_NAME if Path(base).name == MODEL_NAME else None
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
