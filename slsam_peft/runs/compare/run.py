"""A run of a comparison trains an adapter, scores it and returns the row."""

import importlib.metadata
import logging
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from slsam_peft.algorithm.arms import arms_of
from slsam_peft.algorithm.slsam import SLSAM
from slsam_peft.cost.expected import ExpectedCost
from slsam_peft.cost.model import CostModel
from slsam_peft.data.passages import passages
from slsam_peft.data.scoring import Tokens, answered, score, tokenize
from slsam_peft.errors import DivergedError, UserError
from slsam_peft.models.load import find_model, load_config, load_with_tokenizer
from slsam_peft.runs.compare import remedies
from slsam_peft.runs.compare.baselines import Baseline
from slsam_peft.runs.compare.control import RandomPerturbationTrainer
from slsam_peft.runs.compare.methods import slsam_config
from slsam_peft.runs.compare.settings import CompareSettings, TaskSettings, TrainingSettings
from slsam_peft.runs.compare.tasks import TaskData, load_task
from slsam_peft.trainer import advice
from slsam_peft.trainer.factors import factors_of
from slsam_peft.trainer.precision import restore_float32
from slsam_peft.trainer.riding import lora_pairs
from slsam_peft.trainer.trainer import SLSAMTrainer

TYPICAL_LENGTH = 64  # tokens, for the expected cost: the ratio to plain LoRA hardly depends on it
LAST_LOGS = 16  # steps that the training loss is a mean over
TEMPERATURES = (0.7, 0.85, 1.0, 1.15, 1.3, 1.5, 1.75, 2.0, 2.5, 3.0)  # tried on the validation rows, for calibration

Report = Callable[[int, int], None]  # steps done, steps in all


def expected_costs(settings: CompareSettings) -> dict[str, float]:
    """Return each method's expected cost of a step, in plain LoRA steps of its own batch size.

    It is read from the model's config alone, no weights are loaded.

    Raises:
        UserError: the model's config cannot be read, a `cost_budget` is out of reach, or SL-SAM refuses a method on
            this model.
    """
    training, model = settings.training, _skeleton(settings)
    try:
        costs = CostModel.from_model(model, training.gradient_checkpointing)
    except ValueError as error:
        raise UserError(f"model={settings.model}: what its steps cost cannot be counted: {error}") from error
    expected = {}
    for name, method in settings.methods.items():
        if method.slsam is None:
            expected[name] = 1.0
            continue
        slsam, shapes = slsam_config(method.slsam), [(settings.batch_size(name), TYPICAL_LENGTH)]
        try:
            arms = arms_of(model, slsam.granularity)
            cost = ExpectedCost(costs, arms, slsam, shapes)
            solved = None if slsam.cost_budget is None else cost.solve(slsam.cost_budget)
            rules = {"pairs": lora_pairs(model), "factors": factors_of(model)}
            SLSAM(arms, slsam, fraction=solved, **rules)  # refuses here what it would in a run
        except ValueError as error:
            raise UserError(f"methods.{name}: {error}") from error
        expected[name] = cost(slsam.fraction if solved is None else solved)
    return expected


def _skeleton(settings: CompareSettings) -> Any:
    """Return the model with its adapters, without weights."""
    config = load_config(find_model(settings.model))
    try:
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            return get_peft_model(base, lora(settings.training))
    except (ValueError, KeyError) as error:  # what transformers and PEFT raise for architectures
        raise UserError(
            f"model={settings.model} is no causal language model: {' '.join(str(error).split())[:400]}\nName a folder "
            "with one in it, a hub name that can be reached, or smollm2."
        ) from error


def lora(training: TrainingSettings) -> LoraConfig:
    """Return the adapters all methods train."""
    return LoraConfig(
        r=training.lora_r,
        lora_alpha=training.lora_alpha or 2 * training.lora_r,
        lora_dropout=training.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def run(settings: Mapping[str, Any], report: Report = lambda done, total: None) -> dict[str, Any]:
    """Train and score one run.

    Args:
        settings (`dict`): `Job.settings`.
        report (`Report`, *optional*): Told after every step.

    Returns:
        `dict`: The scores, the training loss over the last steps, the mean counted cost of a step, the time; or
        `"error"` alone where the training diverged.
    """
    # The same seed gives every method the same rows in the same order.
    task, training = TaskSettings(**settings["task"]), TrainingSettings(**settings["training"])
    baseline = Baseline(**settings.get("baseline", {}))
    model, tokenizer = load_model(settings["model"], training)
    data = load_task(task, settings["seed"])
    limits = (training.max_length, training.prompt_format)
    train = training_rows(tokenizer, data, training)
    validation, test = (answered(tokenizer, pairs, *limits) for pairs in (data.validation, data.test))
    order = row_order(len(train), settings["steps"] * training.batch_size, settings["seed"])
    unrelated = passages(tokenizer) if settings.get("all_scores") else []
    before = score(model, unrelated).loss if unrelated else math.nan
    # Only training is timed; what diverges is a result as well.
    with tempfile.TemporaryDirectory(prefix="slsam-compare-") as scratch:
        trainer = build_trainer(model, tokenizer, [train[i] for i in order], settings, scratch, report)
        remedies.apply(baseline, trainer, validation, train, order)
        start = time.monotonic()
        try:
            with _without_advice():
                trainer.train()
        except DivergedError as error:
            return {"error": str(error)}
        seconds = time.monotonic() - start
    # The score is that of the trained model on the held-out rows; costs come from the trainer's own logs.
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    trained: Any = trainer.model
    chosen: dict[str, Any] = {"scale": remedies.scale_adapter(trained, validation)} if baseline.scale_adapter else {}
    held_out = test if settings["split"] == "test" else validation
    scores = scores_of(trained, held_out, validation if settings.get("all_scores") else None)
    if not math.isfinite(scores["loss"]):
        return {"error": "the held-out loss is not finite"}
    if unrelated:
        chosen["forgetting"] = score(trained, unrelated).loss - before
    costs = [entry.get("slsam/cost", 1.0) for entry in logs]
    last = [entry["loss"] for entry in logs[-LAST_LOGS:]]
    return {
        **scores,
        **chosen,
        "train_loss": sum(last) / len(last),
        "cost": sum(costs) / len(costs),
        "seconds": round(seconds, 1),
        "data": data.fingerprint(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl", "peft")},
    }


def training_rows(tokenizer: Any, data: TaskData, training: TrainingSettings) -> list[Tokens]:
    """Return training rows as tokens: those that have an answer to learn, or all where every token counts."""
    limits = (training.max_length, training.prompt_format)
    if not data.whole:
        return answered(tokenizer, data.train, *limits)
    return [Tokens(tokenize(tokenizer, pair, *limits).ids, 0) for pair in data.train]


@contextmanager
def _without_advice() -> Iterator[None]:
    """Keep back what the trainer advises those who see rows once: in a run's data set repeated rows are several."""
    logger = logging.getLogger(advice.__name__)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def scores_of(model: Any, held_out: Sequence[Tokens], validation: Sequence[Tokens] | None) -> dict[str, Any]:
    """Return a trained model's scores on held-out rows.

    Args:
        model (`PreTrainedModel`): The trained model.
        held_out (`Sequence[Tokens]`): Rows that are scored.
        validation (`Sequence[Tokens]`, *optional*): Rows that a temperature is chosen on; the held-out loss at that
            temperature is then one of the scores.
    """
    scores = asdict(score(model, held_out, () if validation is None else TEMPERATURES))
    at = scores.pop("losses_at")
    if validation is None:
        return scores
    chosen = at if validation is held_out else score(model, validation, TEMPERATURES).losses_at
    best = min(range(len(TEMPERATURES)), key=chosen.__getitem__)
    return {**scores, "calibrated_loss": at[best], "temperature": TEMPERATURES[best]}


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
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
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
