"""Checks a fine-tuning: its settings before the model is loaded, names in it once it is, and what has been trained."""

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import AutoConfig
from trl import ModelConfig, SFTConfig

from slsam_peft.errors import DivergedError, UserError
from slsam_peft.models.load import find_model, refused
from slsam_peft.names import hint_at
from slsam_peft.saving.atomic import nearest_folder, try_to_write
from slsam_peft.saving.record import base_name

logger = logging.getLogger(__name__)

METRICS = ("loss", "runtime", "samples_per_second", "steps_per_second")  # of every evaluation
TOKEN_METRICS = ("entropy", "mean_token_accuracy", "num_tokens")  # that TRL adds
_UNBOUNDED = ("max_grad_norm",)  # settings in which infinity has a meaning: nothing is clipped


def check_counts(args: SFTConfig) -> None:
    """Check the counts that transformers divides by, or takes for something else.

    Raises:
        UserError: one is too small. The message says what is allowed.
    """
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise UserError(f"{name}={getattr(args, name)} is not allowed; it must be an integer >= 1.")
    if args.max_steps == 0 or args.max_steps < -1:
        raise UserError(
            f"max_steps={args.max_steps} is not allowed; it must be an integer >= 1, or -1 to train num_train_epochs."
        )
    if args.max_steps == -1 and not args.num_train_epochs > 0:
        raise UserError(f"num_train_epochs={args.num_train_epochs} is not allowed; it must be a number > 0.")
    if args.max_length is not None and args.max_length < 1:
        raise UserError(f"max_length={args.max_length} is not allowed; it must be an integer >= 1.")


def check_finite(*settings: Any) -> None:
    """Check that the numbers among some settings are numbers: NaN and infinity pass the libraries' own comparisons.

    Args:
        settings (`SFTConfig`, `ModelConfig`): Dataclasses. Infinity is allowed in `max_grad_norm`, and in
            `num_train_epochs` where `max_steps` ends training.

    Raises:
        UserError: one is not finite. The message names it.
    """
    for group in settings:
        unbounded = (*_UNBOUNDED, "num_train_epochs") if getattr(group, "max_steps", -1) > 0 else _UNBOUNDED
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            if not isinstance(value, float) or math.isfinite(value):
                continue
            if math.isnan(value) or field.name not in unbounded:
                raise UserError(f"{field.name}={value} is not allowed; it must be a finite number.")
    noise = next((a for group in settings if (a := getattr(group, "neftune_noise_alpha", None)) is not None), 0.0)
    if noise < 0:
        raise UserError(f"neftune_noise_alpha={noise} is not allowed; it must be a number >= 0.")


def check_metric(args: SFTConfig) -> None:
    """Check that an evaluation gives the metric that tells the best checkpoint: the trainer looks after training.

    Raises:
        UserError: it does not.
    """
    name = args.metric_for_best_model
    known = (*METRICS, *TOKEN_METRICS)
    if args.eval_strategy == "no" or name is None or name.removeprefix("eval_") in known:
        return
    raise UserError(
        f"metric_for_best_model={name} is not allowed: an evaluation gives {', '.join(f'eval_{m}' for m in known)}."
    )


def check_output_folder(folder: str) -> None:
    """Check that `folder` can be created and written, and leave it as it was.

    Raises:
        UserError: it cannot.
    """
    try:
        try_to_write(nearest_folder(Path(folder).expanduser()))
    except OSError as error:
        raise UserError(
            f"output_dir={folder} cannot be written: {error.strerror}. Name a folder that can: --output_dir FOLDER."
        ) from error


def check_model(model: ModelConfig, args: SFTConfig) -> None:
    """Check that the base model can be found and what is asked of it goes together; `"smollm2"` becomes its folder.

    Raises:
        UserError: no such model, no network to fetch it, or a quantised base without adapters.
    """
    # What is asked of the model, before it is looked for.
    name = model.model_name_or_path
    if not name:
        raise UserError("there is no model; give a folder or a name on the Hub: --model_name_or_path NAME.")
    quantized = model.load_in_4bit or model.load_in_8bit
    if not (model.use_peft or quantized):
        logger.warning("use_peft is false: every weight of the model is trained, and no adapter.")
    if quantized and not model.use_peft:
        bits = 4 if model.load_in_4bit else 8
        raise UserError(
            f"load_in_{bits}bit without use_peft: a quantised base cannot be trained itself. Leave out use_peft to "
            f"train LoRA adapters on it, or leave out load_in_{bits}bit."
        )
    name = model.model_name_or_path = find_model(name, logger.warning)
    then = "\nmodel_name_or_path must be a model folder or a name on the Hub."
    with refused(f"model {name} cannot be loaded", then):
        config = AutoConfig.from_pretrained(
            name, revision=model.model_revision, trust_remote_code=args.trust_remote_code
        )
    if not config.architectures:
        raise UserError(f"model {name} cannot be loaded: its config.json names no class under 'architectures'.")


def check_named(model: Any, settings: ModelConfig) -> None:
    """Check that each entry of the adapter's settings has an effect.

    PEFT refuses a name in `target_modules` that matches nothing, and trains without one in the other settings.

    Args:
        model (`nn.Module`): The model; anything but a `PeftModel` passes.
        settings (`ModelConfig`): What was asked for: `lora_modules_to_save`, `lora_target_parameters`.

    Raises:
        UserError: a name matches nothing; the message names it and what is near.
    """
    if not isinstance(model, PeftModel):
        return
    saved = {name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)}
    wrapped = set(getattr(model.base_model, "targeted_parameter_names", ()))
    names = {base_name(name) for name, _ in model.get_base_model().named_parameters()}
    for setting, found in (("lora_modules_to_save", saved), ("lora_target_parameters", wrapped)):
        given = getattr(settings, setting) or ()
        for name in [given] if isinstance(given, str) else given:
            if any(full.endswith(name) for full in found):
                continue
            known = {".".join(full.split(".")[-2 if "." in name else -1 :]) for full in names}
            if setting == "lora_modules_to_save":
                known = {part for full in names for part in full.split(".")[:-1]}
            raise UserError(
                f"{setting}: {name!r} matches nothing in the model.{hint_at(name, known)} Name it by the end of its "
                "full name, or leave it out."
            )


def check_trained(model: Any, folder: str) -> None:
    """Check that everything that was trained is finite.

    Args:
        model (`nn.Module`): What was trained.
        folder (`str`): The run's output folder, for the message.

    Raises:
        DivergedError: some of it is not.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    wrong = [name for name, parameter in trained if not bool(torch.isfinite(parameter.detach()).all())]
    if wrong:
        raise DivergedError(
            f"training has diverged: {len(wrong)} of {len(trained)} trained tensors hold NaN or infinite values "
            f"({wrong[0]}). No adapter was saved; checkpoints in {folder} stay. Lower learning_rate or weight_decay."
        )
