"""Baselines of a comparison: each does to training what it says, and its settings are part of a run's key."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from slsam_peft.data.scoring import Tokens, answered, calibration_error, row_losses, score
from slsam_peft.errors import UserError
from slsam_peft.runs.compare import remedies, run
from slsam_peft.runs.compare.baselines import Baseline
from slsam_peft.runs.compare.jobs import Job, Plan
from slsam_peft.runs.compare.methods import Candidate
from slsam_peft.runs.compare.reading import parse_settings
from slsam_peft.runs.compare.run import build_trainer, load_model, row_order, scores_of
from slsam_peft.runs.compare.settings import TaskSettings, TrainingSettings
from slsam_peft.runs.compare.tasks import load_task

STEPS = 8


def comparison(model: Path, data: Path, *baselines: dict[str, Any], **method: Any) -> dict[str, Any]:
    """A comparison of plain LoRA with a method."""
    how = {"learning_rates": [1e-2], **method}
    if baselines:
        how["baselines"] = list(baselines)
    return {
        "model": str(model),
        "training": {"steps": STEPS, "batch_size": 2, "max_length": 48, "lora_r": 2},
        "tasks": {"sums": {"source": "jsonl", "file": str(data), "rows": 6, "validation_rows": 3, "test_rows": 3}},
        "methods": {"plain": {"learning_rates": [1e-2]}, "other": how},
        "seeds": [3],
        "tuning_seed": 7,
        "match": "epochs",
    }


def job_of(values: dict[str, Any], method: str = "other") -> Job:
    """The run of a method's first candidate."""
    settings = parse_settings(values)
    plan = Plan(settings, dict.fromkeys(settings.methods, 1.0))
    return plan.job("sums", method, "epochs", settings.methods[method].candidates[0], 3)


class Steps(TrainerCallback):
    """Keeps the trained weights after each step."""

    def __init__(self) -> None:
        self.weights: list[list[torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.weights.append([p.detach().clone() for p in model.parameters() if p.requires_grad])


def trained(job: Job, folder: Path) -> tuple[Any, list[list[torch.Tensor]], list[Tokens], list[Tokens]]:
    """Train a run; return its trainer, the weights after each step, its training rows and its validation rows."""
    model, tokenizer = load_model(job.settings["model"], TrainingSettings(**job.settings["training"]))
    data = load_task(parse_task(job), 3)
    rows, validation = (answered(tokenizer, pairs, 48) for pairs in (data.train, data.validation))
    order = row_order(len(rows), STEPS * 2, 3)
    trainer = build_trainer(model, tokenizer, [rows[i] for i in order], job.settings, str(folder), lambda *_: None)
    steps = Steps()
    trainer.add_callback(steps)
    remedies.apply(Baseline(**job.settings.get("baseline", {})), trainer, validation, rows, order)
    trainer.train()
    return trainer, steps.weights, rows, validation


def parse_task(job: Job) -> TaskSettings:
    """The task of a run."""
    return TaskSettings(**job.settings["task"])


def left(trainer: Any) -> list[torch.Tensor]:
    """The trained weights that a run leaves behind."""
    return [p.detach() for p in trainer.model.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        ({"lora_dropout": 1.0}, r"lora_dropout=1\.0 is not allowed; it must be a number > 0 and < 1"),
        ({"weight_decay": 0}, "weight_decay=0 is not allowed"),
        ({"lora_r": 1.5}, r"lora_r=1\.5 is not allowed"),
        ({"dft": False}, "dft=False is not allowed; it is true or left out"),
        ({"dft": True, "label_smoothing": 0.1}, "label_smoothing and dft are both losses"),
        ({"average": "median"}, "average='median'"),
        ({"ema_decay": 0.9}, r"ema_decay=0\.9 belongs to average: ema"),
        ({"label_smothing": 0.1}, "label_smothing.*label_smoothing"),
        ({}, "each is a mapping such as"),
    ],
)
def test_bad_baselines_are_named(baseline: dict[str, Any], message: str, tiny_model: Path, chats: Path) -> None:
    with pytest.raises(UserError, match=message):
        parse_settings(comparison(tiny_model, chats, baseline))


def test_what_is_for_plain_lora_is_refused_beside_slsam(tiny_model: Path, chats: Path) -> None:
    with pytest.raises(UserError, match="trim is for plain LoRA"):
        parse_settings(comparison(tiny_model, chats, {"trim": 0.3}, slsam={"method": "auto"}))


def test_a_baseline_is_part_of_the_key_and_plain_runs_keep_theirs(tiny_model: Path, chats: Path) -> None:
    plain = job_of(comparison(tiny_model, chats))
    assert plain.key == job_of(comparison(tiny_model, chats), "plain").key
    assert "baseline" not in plain.settings
    keys = {plain.key}
    for baseline in ({"lora_dropout": 0.1}, {"dft": True}, {"average": "mean"}, {"weight_decay": 0.1}):
        keys.add(job_of(comparison(tiny_model, chats, baseline)).key)
    assert len(keys) == 5
    # What all methods have a setting for is recorded there, so that such runs are shared with comparisons that set it.
    values = comparison(tiny_model, chats)
    values["training"]["lora_dropout"] = 0.1
    assert job_of(values, "plain").key == job_of(comparison(tiny_model, chats, {"lora_dropout": 0.1})).key


def test_baselines_are_tried_with_each_learning_rate(tiny_model: Path, chats: Path) -> None:
    values = comparison(tiny_model, chats, {"average": "mean"}, {"average": "ema"})
    values["methods"]["other"]["learning_rates"] = [1e-2, 2e-2]
    tried = parse_settings(values).methods["other"].candidates
    assert [(c.rate, c.baseline.average) for c in tried] == [(r, a) for r in (1e-2, 2e-2) for a in ("mean", "ema")]
    assert Candidate(1e-2, baseline=Baseline(average="ema", dft=True)).shown == "0.01, dft, average ema"


@pytest.mark.parametrize("average", ["mean", "ema"])
def test_the_average_is_that_of_the_steps(average: str, tmp_path: Path, tiny_model: Path, chats: Path) -> None:
    trainer, steps, *_ = trained(job_of(comparison(tiny_model, chats, {"average": average})), tmp_path)
    if average == "mean":
        expected = [torch.stack(w).mean(0) for w in zip(*steps[STEPS // 2 :], strict=True)]
    else:
        expected = steps[0]
        for weights in steps[1:]:
            expected = [0.95 * old + 0.05 * new for old, new in zip(expected, weights, strict=True)]
    torch.testing.assert_close(left(trainer), expected)


def test_the_best_on_validation_rows_is_kept(tmp_path: Path, tiny_model: Path, chats: Path) -> None:
    values = comparison(tiny_model, chats, {"stop_on_validation": True})
    values["methods"]["other"]["learning_rates"] = [0.3]  # large enough for the loss to go up as well
    trainer, steps, _, validation = trained(job_of(values), tmp_path)
    kept = [w.clone() for w in left(trainer)]
    losses = []
    for weights in steps:
        with torch.no_grad():
            torch._foreach_copy_(left(trainer), weights)
        losses.append(score(trainer.model, validation).loss)
    best = min(range(STEPS), key=losses.__getitem__)
    assert best < STEPS - 1
    assert all(torch.equal(a, b) for a, b in zip(kept, steps[best], strict=True))


def test_rows_of_the_largest_loss_are_left_out_after_the_first_epoch(
    tmp_path: Path, tiny_model: Path, chats: Path
) -> None:
    job = job_of(comparison(tiny_model, chats, {"trim": 1 / 3}))
    model, tokenizer = load_model(job.settings["model"], TrainingSettings(**job.settings["training"]))
    rows = answered(tokenizer, load_task(parse_task(job), 3).train, 48)
    order = row_order(len(rows), STEPS * 2, 3)
    trainer = build_trainer(model, tokenizer, [rows[i] for i in order], job.settings, str(tmp_path), lambda *_: None)
    remedies.apply(Baseline(trim=1 / 3), trainer, [], rows, order)
    losses: list[list[float]] = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            losses.append(row_losses(model, rows))

    trainer.add_callback(Look())
    trainer.train()
    at_the_end_of_the_epoch = losses[len(rows) // 2 - 1]
    worst = sorted(range(len(rows)), key=at_the_end_of_the_epoch.__getitem__)[-2:]
    after = trainer.train_dataset.order[len(rows) :]
    assert trainer.train_dataset.order[: len(rows)] == order[: len(rows)]
    assert set(after) == set(range(len(rows))) - set(worst)


def test_the_adapter_is_scaled_by_the_best_factor(tmp_path: Path, tiny_model: Path, chats: Path) -> None:
    values = comparison(tiny_model, chats)
    values["methods"]["other"]["learning_rates"] = [0.1]
    trainer, _, _, validation = trained(job_of(values), tmp_path)
    layers = [m for m in trainer.model.modules() if isinstance(getattr(m, "scaling", None), dict)]
    before = layers[0].scaling["default"]
    losses = {}
    for factor in remedies.SCALES:
        with torch.no_grad():
            for name, p in trainer.model.named_parameters():
                if "lora_B" in name:
                    p.mul_(factor)
            losses[factor] = score(trainer.model, validation).loss
            for name, p in trainer.model.named_parameters():
                if "lora_B" in name:
                    p.div_(factor)
    best = remedies.scale_adapter(trainer.model, validation)
    assert best == min(losses, key=losses.__getitem__)
    assert {layer.scaling["default"] for layer in layers} == {before * best}
    assert score(trainer.model, validation).loss == pytest.approx(losses[best], rel=1e-4)


def test_loraplus_trains_b_at_a_multiple_of_the_rate(tmp_path: Path, tiny_model: Path, chats: Path) -> None:
    trainer, *_ = trained(job_of(comparison(tiny_model, chats, {"loraplus_ratio": 16})), tmp_path)
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    rates = {
        (names[id(p)].split(".")[-3][-1:], g["initial_lr"])
        for g in trainer.optimizer.param_groups
        for p in g["params"]
    }
    assert rates == {("A", 1e-2), ("B", 16e-2)}


@pytest.mark.filterwarnings("ignore:.label_smoothing_factor. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("baseline", "arguments"),
    [
        ({"neftune_noise_alpha": 5}, {"neftune_noise_alpha": 5.0}),
        ({"label_smoothing": 0.1}, {"label_smoothing_factor": 0.1, "loss_type": "nll"}),
        ({"dft": True}, {"loss_type": "dft"}),
        ({"lora_dropout": 0.1}, {}),
    ],
)
def test_switches_are_those_of_the_trainer(
    baseline: dict[str, Any], arguments: dict[str, Any], tmp_path: Path, tiny_model: Path, chats: Path
) -> None:
    trainer, changed, *_ = trained(job_of(comparison(tiny_model, chats, baseline)), tmp_path / "a")
    assert {name: getattr(trainer.args, name) for name in arguments} == arguments
    _, plain, *_ = trained(job_of(comparison(tiny_model, chats)), tmp_path / "b")
    assert not torch.equal(changed[-1][0], plain[-1][0])


def test_the_calibration_error_by_hand() -> None:
    confidence = torch.tensor([0.95, 0.92, 0.55, 0.51, 0.15], dtype=torch.float64)
    right = torch.tensor([True, False, True, True, False])
    expected = (abs(0.95 + 0.92 - 1) + abs(0.55 + 0.51 - 2) + 0.15) / 5
    assert calibration_error(confidence, right) == pytest.approx(expected)
    assert calibration_error(torch.tensor([1.0]), torch.tensor([True])) == 0


def test_the_temperature_is_that_of_the_validation_rows(tmp_path: Path, tiny_model: Path, chats: Path) -> None:
    values = comparison(tiny_model, chats)
    values["methods"]["other"]["learning_rates"] = [0.3]  # sure of wrong answers
    trainer, _, rows, validation = trained(job_of(values), tmp_path)
    scores = scores_of(trainer.model, rows, validation)
    at = {t: loss_at(trainer.model, validation, t) for t in run.TEMPERATURES}
    assert scores["temperature"] == min(at, key=at.__getitem__) != 1
    assert scores["calibrated_loss"] == pytest.approx(loss_at(trainer.model, rows, scores["temperature"]), rel=1e-5)
    assert scores["loss"] == pytest.approx(loss_at(trainer.model, rows, 1.0), rel=1e-5)


@torch.no_grad()
def loss_at(model: Any, rows: list[Tokens], temperature: float) -> float:
    """The mean loss of the answer tokens, one row at a time."""
    model.eval()
    losses = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row.ids])).logits[0].double() / temperature
        for position in range(row.prompt, len(row.ids)):
            losses.append(-logits[position - 1].log_softmax(-1)[row.ids[position]].item())
    return math.fsum(losses) / len(losses)


def test_forgetting_is_the_change_of_the_loss_on_other_text(
    tiny_model: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "passages", lambda tokenizer: [Tokens(tokenizer("some other text")["input_ids"], 1)])
    values = {**comparison(tiny_model, chats), "all_scores": True}
    row = run.run(job_of(values).settings)
    assert row["forgetting"] != 0
    assert {"calibrated_loss", "temperature", "calibration_error"} <= row.keys()
    assert "forgetting" not in run.run(job_of(comparison(tiny_model, chats)).settings)
    values["methods"]["other"]["learning_rates"] = [1e-30]  # nothing is learnt, so nothing is forgotten
    assert run.run(job_of(values).settings)["forgetting"] == pytest.approx(0, abs=1e-6)
