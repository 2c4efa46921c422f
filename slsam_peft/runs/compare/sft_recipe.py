"""Writes what a comparison advises as a YAML file for `slsam-peft sft`. This module imports no torch."""

import math
import textwrap
from typing import Any

import yaml

from slsam_peft.runs.compare.advice import Advice
from slsam_peft.runs.compare.jobs import Plan
from slsam_peft.runs.compare.settings import CompareSettings

WIDTH = 118  # characters of a comment
OURS = "Written by slsam-peft compare, which writes it anew whenever it ends; copy it before you change it."


def sft_recipe(advice: Advice, settings: CompareSettings, path: str, output: str, *, gpu: bool) -> str:
    """Return the file's content: the settings that the runs of the advised method had, on all of the training data.

    Args:
        advice (`Advice`): With a method.
        settings (`CompareSettings`): The comparison.
        path (`str`): Where the file will lie, for the command in its first line.
        output (`str`): Folder for the adapter.
        gpu (`bool`): Whether this machine has a GPU.
    """
    parts = [
        "\n".join([f"# slsam-peft sft --config {path}", "#", _comment(advice.sentence), "#", f"# {OURS}"]),
        *(
            f"# {title}\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000)}".rstrip()
            for title, values in _groups(advice, settings, output, gpu).items()
        ),
    ]
    return "\n\n".join(parts) + "\n"


def is_ours(text: str) -> bool:
    """Return whether a file's content is one that `sft_recipe` has made."""
    return f"\n# {OURS}\n" in text


def says(text: str, advice: Advice) -> bool:
    """Return whether a file's content is made of some advice."""
    return is_ours(text) and f"\n{_comment(advice.sentence)}\n" in text


def _comment(sentence: str) -> str:
    return "\n".join(f"# {line}" for line in textwrap.wrap(sentence, WIDTH - 2))


def _groups(advice: Advice, settings: CompareSettings, output: str, gpu: bool) -> dict[str, dict[str, Any]]:
    assert advice.chosen is not None
    assert advice.method is not None
    training = settings.training
    bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if training.quantize == "nf4" else {}
    here = {} if gpu else {"use_cpu": True, "dataloader_pin_memory": False}
    return {
        "Model": {"model_name_or_path": settings.model, "dtype": training.dtype, **bits},
        "Adapters": {
            "use_peft": True,
            "lora_r": training.lora_r,
            "lora_alpha": training.lora_alpha or 2 * training.lora_r,
            "lora_dropout": training.lora_dropout,
            "lora_target_modules": "all-linear",
        },
        "Data": _data(settings),
        "Optimisation": {
            **_length(settings, advice.method),
            "per_device_train_batch_size": training.batch_size,
            "learning_rate": advice.chosen.rate,
            "lr_scheduler_type": training.lr_scheduler_type,
            "weight_decay": training.weight_decay,
            "gradient_checkpointing": training.gradient_checkpointing,
            "bf16": training.dtype == "bfloat16",
            **here,
        },
        "SL-SAM": {"method": "auto"} if advice.method == "auto" else {"rho": 0.0},  # without a radius: plain LoRA
        "Output": {"output_dir": output, "save_total_limit": 2, "report_to": "none"},
    }


def _data(settings: CompareSettings) -> dict[str, Any]:
    task = next(iter(settings.tasks.values()))
    held_out = {"eval_strategy": "no"}
    if task.test_file is not None:
        held_out = {"dataset_test_split": task.test_file, "eval_strategy": "epoch"}
    return {"dataset_name": task.file, **held_out, "max_length": settings.training.max_length}


def _length(settings: CompareSettings, method: str) -> dict[str, float]:
    """Return how long training is: as many epochs as the runs had, of more rows where some were held out of these."""
    [(name, task)] = settings.tasks.items()
    size, steps = settings.training.batch_size, Plan(settings, {}).steps(name, method, "epochs")
    assert steps is not None  # at equal cost alone it can be
    epochs = steps * size / task.rows
    near = round(epochs)
    exact = near * task.rows / size
    if steps in (math.ceil(exact), round(exact)):  # the last step of an epoch is rounded up, a share of all is rounded
        return {"num_train_epochs": near}
    return {"num_train_epochs": float(f"{epochs:.4g}")}
