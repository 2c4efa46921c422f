"""Checks that a checkpoint is one of the training that goes on from it.

A checkpoint is chosen by its number, and a folder may hold those of several runs. What `slsam.json` and
`adapter_config.json` in it say of its base, its adapter and its training is compared with the trainer's own.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

from slsam_peft.errors import UserError
from slsam_peft.saving.record import TRAINING, UNNAMED, Record, base_shape, differing, plain_value
from slsam_peft.saving.recorded import read_record
from slsam_peft.saving.resume import checkpoints_in, has_optimizer
from slsam_peft.saving.row_digest import describe_rows

# Settings of PEFT that say where an adapter comes from or how it starts, and not what it computes.
_FREE = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "init_lora_weights",
    "loftq_config", "lora_dropout", "lora_ga_config", "peft_version", "revision", "runtime_config", "task_type",
}  # fmt: skip
# Those that choose modules: one choice can be spelled in many ways.
_PLACES = {
    "exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save", "target_modules",
    "target_parameters",
}  # fmt: skip
_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # others change the base's weights
_SHOWN = 4  # differences that a message names
_HOW = "Use the settings it was made with, name a checkpoint of this run, or start afresh in another output_dir."

logger = logging.getLogger(__name__)


def check_same_run(trainer: Any, checkpoint: str | os.PathLike) -> None:
    """Check that a checkpoint is of the trainer's own base, adapter and optimizer; warn of other settings.

    What is not recorded (by earlier versions, or where every weight is trained) is not compared.

    Args:
        trainer (`Trainer`): About to resume.
        checkpoint (`str` or `os.PathLike`): An intact checkpoint.

    Raises:
        ValueError: it is not; the message names both values and what to do.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not isinstance(model, PeftModel):
        return
    changed = []
    for name, config in model.peft_config.items():
        folder = Path(checkpoint) if name == UNNAMED else Path(checkpoint) / name
        record = _record_in(folder)
        if record is not None:
            _check_base(record, model, config, checkpoint)
            changed = _other_training(record, trainer, checkpoint)
        if (folder / ADAPTER_CONFIG_NAME).is_file():
            _check_adapter(PeftConfig.from_pretrained(str(folder)), config, model, name, folder)
    if changed:
        logger.warning(
            "%s was made with other settings: %s. Training goes on with its optimizer and schedule; a new "
            "learning rate takes no effect.",
            checkpoint,
            ", ".join(changed),
        )


def _record_in(folder: Path) -> Record | None:
    try:
        return read_record(folder)
    except UserError as error:
        logger.warning("What %s was trained with is not known: %s", folder, error)
        return None


def _check_base(record: Record, model: PeftModel, config: Any, checkpoint: str | os.PathLike) -> None:
    base: Any = model.get_base_model()
    then, here = record["base"], base_shape(base.config)
    names = f"{then['name']} there, {base.config.name_or_path} here"
    sizes = [
        f"{n} is {value} there, {here[n]} here" for n, value in then["shape"].items() if n in here and here[n] != value
    ]
    if sizes:
        raise ValueError(f"{checkpoint} is of another base model ({names}): {', '.join(sizes[:_SHOWN])}. {_HOW}")
    if getattr(config, "init_lora_weights", True) not in _STARTS:
        return
    wrong, compared = differing(then["values"], model)
    if wrong:
        raise ValueError(
            f"{checkpoint} is of another base model ({names}): {len(wrong)} of {compared} of its tensors that are "
            f"recorded have other values ({wrong[0]}). {_HOW}"
        )


def _check_adapter(then: Any, here: Any, model: PeftModel, name: str, folder: Path) -> None:
    before, now = then.to_dict(), here.to_dict()
    differ = [key for key in sorted((before.keys() & now.keys()) - _FREE) if not _same(before[key], now[key])]
    if set(differ) <= _PLACES and differ and _same_places(model, name, folder / ADAPTER_SAFE_WEIGHTS_NAME):
        return
    if differ:
        values = [f"{key}={_show(before[key])} there, {_show(now[key])} here" for key in differ[:_SHOWN]]
        raise ValueError(f"{folder} is of another adapter: {', '.join(values)}. {_HOW}")


def _same(one: Any, other: Any) -> bool:
    """Whether two settings mean the same: nothing is given in several ways, and lists of names have no order."""
    return (one or None) == (other or None) or (
        all(isinstance(v, list | set | tuple) for v in (one, other))
        and sorted(map(str, one)) == sorted(map(str, other))
    )


def _same_places(model: PeftModel, name: str, file: Path) -> bool:
    """Whether a file holds a tensor for every place of the model's adapter, and no factor beside them."""
    own = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    try:
        with safe_open(file, framework="pt") as opened:
            saved = set(opened.keys())
    except (OSError, SafetensorError):
        return False  # pickled
    return own <= saved and not any("lora_" in key for key in saved - own)


def _show(value: Any) -> str:
    return repr(sorted(value) if isinstance(value, set) else value)


def _other_training(record: Record, trainer: Any, checkpoint: str | os.PathLike) -> list[str]:
    """Return the settings of training that differ from the recorded ones.

    Raises:
        ValueError: the optimizer is among them, and keeps other states.
    """
    then, args = record["training"], trainer.args
    changed = [name for name in TRAINING if name in then and then[name] != plain_value(args, name)]
    values = [f"{name}={then[name]} there, {plain_value(args, name)} here" for name in changed]
    own = trainer.optimizer is None  # one that is handed over has no name
    if "optim" in changed and own and has_optimizer(checkpoint) and _kind(then["optim"]) != _kind(args.optim):
        text = values[changed.index("optim")]
        raise ValueError(f"{checkpoint} was made with another optimizer: {text}. {_HOW}")
    return values + _other_rows(then, describe_rows(trainer.train_dataset))


def _other_rows(then: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Return that rows differ, where both are described, as a list of one line or none."""
    if not here or all(then.get(name, value) == value for name, value in here.items()):
        return []
    return [
        f"its {then.get('rows')} training rows are not the {here['rows']} here (other data, another order, or "
        "prepared in another way: max_length, packing, tokenizer, chat template)"
    ]


def _kind(optimizer: Any) -> str:
    """Return an optimizer's name without what only says how it computes."""
    name = str(getattr(optimizer, "value", optimizer)).removeprefix("paged_").removesuffix("_fused")
    return name.replace("_bnb_8bit", "_8bit")


def check_steps_left(state: Any, checkpoint: str | os.PathLike) -> None:
    """Check that a checkpoint leaves steps to make. The last one of a run of the same length passes, with a warning.

    A run may be killed between its last checkpoint and its end; resuming it saves what was trained.

    Args:
        state (`TrainerState`): As it is after the checkpoint's was read: `max_steps` is this run's.
        checkpoint (`str` or `os.PathLike`): The checkpoint.

    Raises:
        ValueError: there are none left, and the checkpoint is of a run of another length.
    """
    if state.global_step < state.max_steps:
        return
    planned = json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8")).get("max_steps")
    if state.global_step == state.max_steps == planned:
        logger.warning("%s has made all %d steps already: nothing is left to train.", checkpoint, state.max_steps)
        return
    raise ValueError(
        f"{checkpoint} has made {state.global_step} steps, of a run of {planned}, and this one has {state.max_steps}: "
        "nothing is left to train. Raise max_steps or num_train_epochs, or name a checkpoint of this run; those of an "
        "earlier run in the same folder are taken for its own until they are removed."
    )


def check_same_optimizer(before: set[str], optimizer: Any, name: Any, checkpoint: str | os.PathLike) -> None:
    """Check that an optimizer still has all settings that it had before a checkpoint's state was read into it.

    Args:
        before (`set[str]`): What `keys_of` returned then.
        optimizer (`Optimizer`): As it is now.
        name (`str`): `TrainingArguments.optim`, for the message.
        checkpoint (`str` or `os.PathLike`): The checkpoint.

    Raises:
        ValueError: it has not: the checkpoint's is of another kind.
    """
    if lost := before - keys_of(optimizer):
        raise ValueError(
            f"{checkpoint} was made with another optimizer than optim={name}: it has no {', '.join(sorted(lost))}. "
            "Use the same optimizer, or start afresh."
        )


def warn_of_earlier_runs(folder: str) -> None:
    """Warn where a run starts afresh in a folder with checkpoints: resuming takes the highest number.

    Args:
        folder (`str`): The run's `output_dir`; need not exist.
    """
    found = checkpoints_in(folder)
    if found:
        logger.warning(
            "output_dir=%s holds checkpoints of an earlier run, up to %s. resume_from_checkpoint=true takes the "
            "highest number, whichever run made it: remove them, or name another output_dir.",
            folder,
            found[-1].name,
        )


def keys_of(optimizer: Any) -> set[str]:
    """Return the names of the settings in an optimizer's groups; what it reads in a step is among them."""
    return {key for group in getattr(optimizer, "param_groups", ()) for key in group}
