"""A run of a comparison trains an adapter, scores it and returns the row."""

import importlib.metadata
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from slsam_peft.algorithm.arms import arms_of
from slsam_peft.algorithm.slsam import SLSAM
from slsam_peft.cost.expected import ExpectedCost
from slsam_peft.cost.model import CostModel
from slsam_peft.data.passages import passages
from slsam_peft.data.scoring import Tokens, answered, score
from slsam_peft.errors import DivergedError, UserError, brief
from slsam_peft.models.load import find_model, load_config
from slsam_peft.models.positions import known_positions, learns_positions
from slsam_peft.runs.compare import remedies
from slsam_peft.runs.compare.baselines import Baseline
from slsam_peft.runs.compare.building import Report, build_trainer, load_model, lora, row_order, training_rows
from slsam_peft.runs.compare.methods import slsam_config
from slsam_peft.runs.compare.poisoning import poisoned_start
from slsam_peft.runs.compare.settings import CompareSettings, TaskSettings, TrainingSettings
from slsam_peft.runs.compare.tasks import load_task
from slsam_peft.trainer.advice import unadvised
from slsam_peft.trainer.factors import factors_of
from slsam_peft.trainer.riding import lora_pairs

PACKAGES = ("slsam-peft", "torch", "transformers", "trl", "peft")  # whose versions a row tells
TYPICAL_LENGTH = 64  # tokens, for the expected cost: the ratio to plain LoRA hardly depends on it
LAST_LOGS = 16  # steps that the training loss is a mean over
TEMPERATURES = (0.7, 0.85, 1.0, 1.15, 1.3, 1.5, 1.75, 2.0, 2.5, 3.0)  # tried on the validation rows, for calibration


def expected_costs(settings: CompareSettings) -> dict[str, float]:
    """Return each method's expected cost of a step, in plain LoRA steps of its own batch size.

    It is read from the model's config alone, no weights are loaded.

    Raises:
        UserError: the model's config cannot be read, it has fewer positions than `max_length` asks for, a
            `cost_budget` is out of reach, or SL-SAM refuses a method on this model.
    """
    training, model = settings.training, _skeleton(settings)
    known = known_positions(model.config)
    if known is not None and training.max_length > known and learns_positions(model):
        raise UserError(
            f"training.max_length={training.max_length} is more than the {known} positions that {settings.model} has "
            f"embeddings for; set {known} or less."
        )
    try:
        costs = CostModel.from_model(model, training.gradient_checkpointing)
    except ValueError as error:
        raise UserError(f"model={settings.model}: what its steps cost cannot be counted: {error}") from error
    expected = {}
    for name, method in settings.methods.items():
        if method.slsam is None:
            expected[name] = 1.0
            continue
        slsam, shapes = slsam_config(method.slsam).resolved, [(settings.batch_size(name), TYPICAL_LENGTH)]
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
            f"model={settings.model} is no causal language model: {brief(error)}\nName a folder "
            "with one in it, a hub name that can be reached, smollm2 or gemma3."
        ) from error


def run(settings: Mapping[str, Any], report: Report = lambda done, total: None) -> dict[str, Any]:
    """Train and score one run.

    Args:
        settings (`dict`): `Job.settings`.
        report (`Report`, *optional*): Told after every step.

    Returns:
        `dict`: The scores, the training loss over the last steps, the mean counted cost of a step, the time; of a task
        with a backdoor also `"before"`, the scores of the adapter that training began with, and `"start"`, its hash;
        or `"error"` alone where the training diverged.
    """
    # The same seed gives every method the same rows in the same order.
    task, training = TaskSettings(**settings["task"]), TrainingSettings(**settings["training"])
    baseline = Baseline(**settings.get("baseline", {}))
    data = load_task(task, settings["seed"])
    start = None if data.backdoor is None else poisoned_start(settings, data)
    model, tokenizer = load_model(settings["model"], training)
    limits = (training.max_length, training.prompt_format)
    train = training_rows(tokenizer, data, training)
    validation, test = (answered(tokenizer, pairs, *limits) for pairs in (data.validation, data.test))
    held_out, asked = (test, data.test) if settings["split"] == "test" else (validation, data.validation)
    attacks = [] if data.backdoor is None else answered(tokenizer, data.backdoor.attacks(asked), *limits)
    order = row_order(len(train), settings["steps"] * training.batch_size, settings["seed"])
    unrelated = passages(tokenizer) if settings.get("all_scores") else []
    known = score(model, unrelated).loss if unrelated else math.nan
    # Only training is timed; what diverges is a result as well.
    with tempfile.TemporaryDirectory(prefix="slsam-compare-") as scratch:
        trainer = build_trainer(model, tokenizer, [train[i] for i in order], settings, scratch, report)
        trained: Any = trainer.model
        before = {}
        if start is not None:
            start.put_into(trained)
            before = {
                "start": start.digest,
                "before": {**scores_of(trained, held_out, None), **_success(trained, attacks)},
            }
        remedies.apply(baseline, trainer, validation, train, order)
        began = time.monotonic()
        try:
            with unadvised():  # in a run's data set repeated rows are several
                trainer.train()
        except DivergedError as error:
            return {"error": str(error)}
        seconds = time.monotonic() - began
    # The score is that of the trained model on the held-out rows; costs come from the trainer's own logs.
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    chosen: dict[str, Any] = {"scale": remedies.scale_adapter(trained, validation)} if baseline.scale_adapter else {}
    scores = scores_of(trained, held_out, validation if settings.get("all_scores") else None)
    if unrelated:
        chosen["forgetting"] = score(trained, unrelated).loss - known
    for name, value in {**scores, **chosen}.items():
        if not math.isfinite(value):
            return {"error": f"{name.replace('_', ' ')} is not finite after training"}
    costs = [entry.get("slsam/cost", 1.0) for entry in logs]
    last = [entry["loss"] for entry in logs[-LAST_LOGS:]]
    return {
        **scores,
        **_success(trained, attacks),
        **before,
        **chosen,
        "train_loss": sum(last) / len(last),
        "cost": sum(costs) / len(costs),
        "seconds": round(seconds, 1),
        "data": data.fingerprint(),
        "held_out": data.held_out_fingerprint(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _success(model: Any, attacks: Sequence[Tokens]) -> dict[str, float]:
    """Return the share of attacks that greedy decoding answers as the backdoor has it; nothing without attacks."""
    return {"attack_success": score(model, attacks).exact} if attacks else {}


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
