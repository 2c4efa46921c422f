"""Runs one supervised fine-tuning from parsed settings: what can fail is checked before the model is loaded."""

import dataclasses
import errno
import logging
import math
import re
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from transformers import AutoConfig, TrainerCallback
from trl import ModelConfig, ScriptArguments, SFTConfig, get_peft_config, get_quantization_config

from slsam_peft.config import SLSAMConfig, hint_at
from slsam_peft.data.load import is_file_name, load_eval_split, load_split
from slsam_peft.errors import DivergedError, UserError
from slsam_peft.models.bnb_cpu import keep_trainable
from slsam_peft.models.load import find_model, refused
from slsam_peft.runs.sequences import CheckedTrainer, check_enough_rows, check_positions, check_token_ids
from slsam_peft.runs.signals import StopOnSignal
from slsam_peft.saving.record import base_name
from slsam_peft.saving.resume import intact_checkpoint, last_intact_checkpoint, what_is_missing
from slsam_peft.trainer.trainer import SLSAMTrainer

logger = logging.getLogger(__name__)

LONGEST_QUOTE = 300  # characters of an error of a library that reads damaged files
METRICS = ("loss", "runtime", "samples_per_second", "steps_per_second")  # of every evaluation
TOKEN_METRICS = ("entropy", "mean_token_accuracy", "num_tokens")  # that TRL adds
_REFUSALS = (ValueError, RuntimeError, OSError, ImportError, SafetensorError)  # of settings, by libraries
_UNBOUNDED = ("max_grad_norm",)  # settings in which infinity has a meaning: nothing is clipped


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
            reason = " ".join(str(error).split())[:LONGEST_QUOTE] if damage else str(error)
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


def damaged_file(checkpoint: str | None) -> str:
    """Return what is wrong with a checkpoint's files, as a line to add to a message; empty where nothing is found.

    Args:
        checkpoint (`str` or `None`): The folder.
    """
    if checkpoint is None:
        return ""
    archives = [path for path in sorted(Path(checkpoint).iterdir()) if path.suffix in (".pt", ".pth")]
    why = what_is_missing(checkpoint, sampler=False) or next(
        (f"{p.name} is damaged" for p in archives if not _is_sound(p)), ""
    )
    return f"\nIn {checkpoint}, {why}; resume from an older checkpoint." if why else ""


def _is_sound(archive: Path) -> bool:
    """Return whether what torch has saved in a zip archive has the checksums that were saved with it."""
    try:
        with zipfile.ZipFile(archive) as opened:
            return opened.testzip() is None
    except Exception:  # zipfile raises many kinds for a header of changed bytes
        return False


def check_output_folder(folder: str) -> None:
    """Check that `folder` can be created and written, and leave it as it was.

    Raises:
        UserError: it cannot.
    """
    path = Path(folder).expanduser().absolute()
    try:
        existing = next(part for part in (path, *path.parents) if part.exists())
        with tempfile.TemporaryDirectory(dir=existing, prefix=".slsam-peft-"):
            pass
    except OSError as error:
        raise UserError(
            f"output_dir={folder} cannot be written: {error.strerror}. Name a folder that can: --output_dir FOLDER."
        ) from error


def find_checkpoint(args: SFTConfig, *, sampler: bool = True) -> str | None:
    """Return the checkpoint folder that `args.resume_from_checkpoint` asks for, or `None` to start afresh.

    It is a path, `true` for the newest intact one in `output_dir`, or `auto` for the same where there is one.

    Args:
        args (`SFTConfig`): The run.
        sampler (`bool`, *optional*, defaults to `True`): Whether the sampler's state counts, see
            `last_intact_checkpoint`.

    Raises:
        UserError: there is none, or the one named is not intact.
    """
    asked = args.resume_from_checkpoint
    keyword = str(asked).lower()
    if asked is None or keyword in ("false", "none", "no"):
        return None
    if keyword == "auto":
        return last_intact_checkpoint(str(args.output_dir), sampler=sampler)
    if keyword == "true":
        asked = True
    else:
        # Anything else is a path.
        folder = Path(asked).expanduser()
        if not (folder / "trainer_state.json").is_file():
            raise UserError(
                f"resume_from_checkpoint={asked} is no checkpoint: {folder / 'trainer_state.json'} does not exist. "
                "Name a checkpoint-<step> folder, or true for the last one in output_dir, or auto for the same where "
                "there is one."
            )
        asked = str(folder)
    try:
        return intact_checkpoint(asked, str(args.output_dir), sampler=sampler)
    except ValueError as error:
        raise UserError(str(error)) from error


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
        if is_file_name(script.dataset_test_split):
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
