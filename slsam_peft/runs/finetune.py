"""Runs one supervised fine-tuning from parsed settings: what can fail is checked before the model is loaded."""

import errno
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import TrainerCallback
from trl import ModelConfig, ScriptArguments, SFTConfig, get_peft_config, get_quantization_config

from slsam_peft.config import SLSAMConfig
from slsam_peft.data.held_out import is_path, load_eval_split
from slsam_peft.data.load import load_split
from slsam_peft.errors import UserError, brief
from slsam_peft.models.bnb_cpu import keep_trainable
from slsam_peft.runs.checkpoints import damaged_file, find_checkpoint
from slsam_peft.runs.run_checks import (
    check_counts,
    check_finite,
    check_metric,
    check_model,
    check_named,
    check_output_folder,
    check_trained,
)
from slsam_peft.runs.sequences import CheckedTrainer, check_enough_rows, check_positions, check_token_ids
from slsam_peft.runs.signals import StopOnSignal
from slsam_peft.trainer.trainer import SLSAMTrainer

logger = logging.getLogger(__name__)

LONGEST_QUOTE = 300  # characters of an error of a library that reads damaged files
_REFUSALS = (ValueError, RuntimeError, OSError, ImportError, SafetensorError)  # of settings, by libraries


class _Begun(TrainerCallback):
    """Knows whether a step has begun: an error before that is one of the set-up."""

    step = False

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.step = True


def finetune(script: ScriptArguments, args: SFTConfig, model: ModelConfig, slsam: SLSAMConfig) -> SLSAMTrainer:
    """Train as TRL's `sft` script does, with SL-SAM, and save the adapter and the tokenizer.

    Args:
        script (`ScriptArguments`): The data, see `slsam_peft.data.load`.
        args (`SFTConfig`): The trainer's settings; evaluates where `eval_strategy` asks for it, resumes where
            `resume_from_checkpoint` does.
        model (`ModelConfig`): Base model, quantisation and LoRA.
        slsam (`SLSAMConfig`): SL-SAM's settings.

    Returns:
        `SLSAMTrainer`: The trainer, done; the adapter lies in `args.output_dir`.

    Raises:
        UserError: the output folder cannot be written, there is no such checkpoint, the data or the model cannot be
            read, or settings do not fit each other. Nothing has been written then.
        DivergedError: too many steps in a row had a NaN or infinite loss or gradient, or what was trained holds such
            values. Checkpoints stay; no adapter is saved.
        Interrupted: SIGINT or SIGTERM ended training, see `slsam_peft.runs.signals`.
    """
    # What can be refused without the model, from the cheapest check to the dearest.
    folder = str(args.output_dir)  # SFTConfig has set one
    check_counts(args)
    check_finite(args, model)
    check_metric(args)
    check_output_folder(folder)
    args.resume_from_checkpoint = find_checkpoint(args, sampler=not slsam.accept_state_mismatch)
    check_model(model, args)
    train, held_out = load_data(script, args)
    # Training; what fails before its first step is the fault of the settings or of the checkpoint's files.
    with leaving_nothing(folder):
        trainer = build_trainer(train, held_out, args, model, slsam)
        begun = _Begun()
        trainer.add_callback(begun)
        trainer.add_callback(stop := StopOnSignal())
        try:
            with stop.listening():
                trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        except Exception as error:
            if begun.step or getattr(error, "errno", None) == errno.ENOSPC:
                raise
            # A damaged file makes its reader raise anything; without one, what is no refusal is a bug.
            damage = damaged_file(args.resume_from_checkpoint)
            if not damage and not isinstance(error, _REFUSALS):
                raise
            reason = brief(error, LONGEST_QUOTE) if damage else str(error)
            raise UserError(f"training cannot start: {reason}{damage}") from error
        stop.raise_if_stopped()
        if trainer.state.global_step == 0:
            raise UserError(
                "no step was made: the data set gave no batch. Nothing was trained, and nothing is saved in "
                f"{folder}. Check its rows, max_length and the batch size."
            )
    # Only what was trained to the end, and to numbers, is saved as an adapter.
    check_trained(trainer.model, folder)
    trainer.save_model(folder)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    return trainer


def load_data(script: ScriptArguments, args: SFTConfig) -> tuple[Any, Any]:
    """Load the training rows and, where `eval_strategy` asks for them, the held-out ones.

    Raises:
        UserError: no data set is named, or it cannot be used; see `slsam_peft.data.load`.
    """
    if not script.dataset_name:
        raise UserError(
            "there is no data set; give a .json, .jsonl or .parquet file, a folder of them, or a name on the Hub: "
            "--dataset_name NAME."
        )
    options = {
        "config": script.dataset_config,
        "streaming": script.dataset_streaming,
        "text_field": args.dataset_text_field,
    }
    train = load_split(script.dataset_name, script.dataset_train_split, **options)
    if args.eval_strategy == "no":
        if is_path(script.dataset_test_split):
            logger.warning("%s is not used: set eval_strategy to evaluate on it.", script.dataset_test_split)
        return train, None
    return train, load_eval_split(script.dataset_name, script.dataset_test_split, **options)


def build_trainer(train: Any, held_out: Any, args: SFTConfig, model: ModelConfig, slsam: SLSAMConfig) -> SLSAMTrainer:
    """Load the model and return the trainer.

    Raises:
        UserError: what TRL, PEFT, transformers or SL-SAM refuse, in their words.
    """
    # TRL loads the model from these; what is given as a mapping wins.
    given = args.model_init_kwargs or {}
    if not isinstance(given, dict):
        raise UserError(
            f"model_init_kwargs={given!r} must be a mapping in YAML, or a JSON object, '{{...}}', as a flag."
        )
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    } | given
    if args.activation_offloading and args.device.type == "cpu":
        raise UserError(
            "activation_offloading=True moves activations from a GPU to the CPU's memory, and training runs on the "
            "CPU; leave it out."
        )
    # Whatever does not fit is found here, before anything is trained.
    try:
        trainer = CheckedTrainer(
            model=model.model_name_or_path,
            args=args,
            train_dataset=train,
            eval_dataset=held_out,
            quantization_config=get_quantization_config(model),
            peft_config=peft_config_of(model),
            slsam_config=slsam,
        )
        keep_trainable(trainer.model)
        check_token_ids(trainer)
        check_positions(trainer)
        check_named(trainer.model, model)
        check_enough_rows(trainer)
        _ = trainer.slsam  # builds the arms, so that what does not fit them is known before training
    except (ValueError, TypeError, ImportError, OSError, RuntimeError, TemplateError, SafetensorError) as error:
        raise UserError(f"{model.model_name_or_path} cannot be trained with these settings: {error}") from error
    return trainer


def peft_config_of(model: ModelConfig) -> Any:
    """Return the adapter's settings. TRL makes a text of a list of one module, and PEFT takes a text for a pattern."""
    config: Any = get_peft_config(model)
    if config is None:
        return None
    for name in ("target_modules", "target_parameters"):
        value = getattr(config, name, None)
        if isinstance(value, str) and value != "all-linear" and re.fullmatch(r"[\w.]+", value):
            setattr(config, name, {value} if name == "target_modules" else [value])
    return config


@contextmanager
def leaving_nothing(folder: str) -> Iterator[None]:
    """Remove the folders that a failing block created on the way to `folder`, if they are empty."""
    path = Path(folder).expanduser().absolute()
    missing = [part for part in (path, *path.parents) if not part.exists()]
    try:
        yield
    except BaseException:
        for part in missing:
            with suppress(OSError):
                part.rmdir()
        raise
