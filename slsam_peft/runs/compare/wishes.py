"""What somebody may ask of a comparison on data of their own, and what stands for the rest. Imports no torch."""

import math
from dataclasses import dataclass
from pathlib import Path

from slsam_peft.data.load import is_file_name
from slsam_peft.names import check_name
from slsam_peft.runs.compare.grid import spend
from slsam_peft.runs.compare.numbers import at_least_one, positive
from slsam_peft.runs.compare.settings import DTYPES

TUNING_SEED = 100
BATCH_SIZE = 4
PLAIN_RATE = 3e-4  # of plain LoRA in PEFT's method comparison, and amid what was best in recipes/compare
RATE_FACTOR = 2.0  # of SL-SAM's learning rates to plain LoRA's: about two did best in recipes/compare
FEWER_FACTOR = 4.0  # the same with fewer steps: four in raters.yaml and auto_batch16.yaml there, eight in rivals.yaml
LONGEST = 1024  # tokens; longer sequences are cut unless somebody asks for them
EPOCHS, MOST_EPOCHS, SEQUENCES = 3, 8, 400  # few rows are repeated more often, until so many sequences are seen
MANY_ROWS = 2000  # are seen once
LARGER_RANK_FROM = 1000  # rows


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What somebody asks for. `None` where it is to be derived from the data.

    Args:
        data (`str`): Training data, see `slsam_peft.data.load`.
        eval_data (`str`, *optional*): Held-out data: a file, or a split of `data`. A part of `data` where missing.
        model (`str`, *optional*, defaults to `"smollm2"`): Base model.
        runs (`int`, *optional*): Most trainings: 6 for each method, which are two learning rates and four seeds. From
            15 on plain LoRA is trained with fewer steps as well, where rows are repeated.
        epochs (`float`, *optional*): How often each training row is seen: 3 times; up to 8 times where rows are few,
            until 400 sequences are seen; once from 2,000 rows on.
        steps (`int`, *optional*): In place of `epochs`.
        batch_size (`int`, *optional*, defaults to `4`): Sequences per step.
        max_length (`int`, *optional*): Tokens per sequence: as many as the longest row has, at most 1,024 and what the
            model takes.
        lora_r (`int`, *optional*): Rank of the adapters: 8, and 16 from 1,000 training rows on.
        learning_rate (`float`, *optional*, defaults to `3e-4`): Middle one of those that plain LoRA tries.
            With fewer steps they are four times these.
        slsam_learning_rate (`float`, *optional*): The same of SL-SAM; twice plain LoRA's.
        dtype (`str`, *optional*): What the model computes in: `"bfloat16"` on a GPU that multiplies in it, else
            `"float32"`.
        load_in_4bit (`bool`, *optional*, defaults to `False`): Quantise the base to NF4.
        gradient_checkpointing (`bool`, *optional*, defaults to `False`): Compute activations again.

    Raises:
        ValueError: a number is not allowed.
        UserError: `runs` are too few.
    """

    data: str
    eval_data: str | None = None
    model: str = "smollm2"
    runs: int | None = None
    epochs: float | None = None
    steps: int | None = None
    batch_size: int = BATCH_SIZE
    max_length: int | None = None
    lora_r: int | None = None
    learning_rate: float = PLAIN_RATE
    slsam_learning_rate: float | None = None
    dtype: str | None = None
    load_in_4bit: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "max_length", "lora_r"):
            if (value := getattr(self, name)) is not None:
                at_least_one(name, value)
        for name in ("epochs", "learning_rate", "slsam_learning_rate"):
            if (value := getattr(self, name)) is not None:
                positive(name, value)
        if self.dtype is not None:
            check_name("dtype", self.dtype, DTYPES)
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"epochs={self.epochs} and steps={self.steps} are both set; leave one of them out.")
        if self.runs is not None:
            spend(self.runs)


def epochs_of(rows: int) -> int:
    """Return how often so many training rows are seen, see `Wishes`."""
    return 1 if rows >= MANY_ROWS else max(EPOCHS, min(MOST_EPOCHS, math.ceil(SEQUENCES / rows)))


def place_of(data: str) -> str:
    """Return a name of data that is good from any folder: a file or folder by its whole path, others as they are."""
    path = Path(data).expanduser()
    return str(path.absolute()) if is_file_name(data) or path.is_dir() else data


def place_of_model(name: str) -> str:
    """Return a name of a model that is good from any folder: a folder by its whole path, others as they are."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.is_dir() else name


def name_of(data: str) -> str:
    """Return what a comparison on some data is called: the file's or folder's name without what follows a dot."""
    return Path(data).name.lstrip(".").partition(".")[0] or "data"
