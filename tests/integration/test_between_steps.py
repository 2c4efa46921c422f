"""What others do between two steps, or leave out of one, changes nothing of what the next one computes."""

import json
import logging
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTTrainer

from slsam_peft import SLSAMConfig, SLSAMTrainer
from slsam_peft.config import RECORD_NAME
from tests.tiny import build, texts
from tests.watch import clones


class TwoPlaces(torch.optim.SGD):
    """Has the weights elsewhere for evaluations, as schedule-free optimizers do."""

    where = "train"

    def _move(self, where, by):
        if self.where == where:
            return
        self.where = where
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(by)

    def eval(self):
        self._move("eval", 0.5)

    def train(self):
        self._move("train", -0.5)


EVALUATED = {
    "plain": (SFTTrainer, None),
    "riding": (SLSAMTrainer, SLSAMConfig()),
    "remembered": (SLSAMTrainer, SLSAMConfig(active_fraction=1.0, ascent="remembered")),
    "bi_lora": (SLSAMTrainer, SLSAMConfig(method="bi_lora", rho=0.05)),
}


@pytest.mark.parametrize(("cls", "config"), EVALUATED.values(), ids=EVALUATED)
def test_an_optimizer_that_moves_the_weights_for_evaluations(cls, config, tmp_path):
    """A step reads the weights that the optimizer trains, whatever an evaluation has put in their place."""

    def trained(evaluating):
        trainer = build(
            cls, tmp_path / str(evaluating), config, data=texts(12), max_steps=4,
            parts={"optimizer_cls_and_kwargs": (TwoPlaces, {"lr": 1e-2}), "eval_dataset": texts(3)},
            per_device_train_batch_size=3, eval_strategy="steps" if evaluating else "no", eval_steps=1,
        )  # fmt: skip
        trainer.train()
        trainer.optimizer.train()
        return clones(trainer.model, True)

    with_, without = trained(True), trained(False)
    # Half a unit there and back is rounded; gradients at other weights differ by far more.
    assert all(torch.allclose(with_[name], weight, rtol=0, atol=1e-6) for name, weight in without.items())


class EndsEarly(TrainerCallback):
    """Ends the first epoch within its second step."""

    def __init__(self):
        self.trainer, self.indices, self.ended = None, [], False

    def on_step_begin(self, args, state, control, **kwargs):
        self.indices.append(self.trainer._slsam_index)

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == 1 and not self.ended:
            self.ended = control.should_epoch_stop = True


@pytest.mark.parametrize("config", [SLSAMConfig(), SLSAMConfig(method="sam")], ids=["auto", "sam"])
def test_an_epoch_that_ends_within_a_step(config, tmp_path):
    """The step that was begun does not count, and those of the next epoch have all of their micro-batches."""
    ends = EndsEarly()
    trainer = build(
        SLSAMTrainer, tmp_path, config, data=texts(16), parts={"callbacks": [ends]},
        per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=6,
    )  # fmt: skip
    ends.trainer = trainer
    trainer.train()
    assert set(ends.indices) == {0}
    assert trainer.slsam.steps == trainer.state.global_step == 1 + 4


def test_a_batch_that_teaches_nothing_leaves_riding_alone(tmp_path, caplog):
    """Its loss is 0, as TRL's is, and not a sign that the loss is no sum over tokens."""
    ids = torch.randint(5, 200, (12, 8), generator=torch.Generator().manual_seed(0)).tolist()
    labels = [[-100] * 8 if row < 6 else ids[row] for row in range(12)]
    with caplog.at_level(logging.WARNING, logger="slsam_peft"):
        trainer = build(
            SLSAMTrainer, tmp_path, SLSAMConfig(), data=Dataset.from_dict({"input_ids": ids, "labels": labels}),
            per_device_train_batch_size=3, max_steps=4, train_sampling_strategy="sequential",
            dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        trainer.train()
    assert trainer.slsam.runner.pairs
    assert not [r.message for r in caplog.records if "rides along" in r.message]
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[:2] == [0.0, 0.0]
    assert all(loss > 1 for loss in losses[2:])


def test_a_refused_checkpoint_is_not_gone_on_with(tmp_path):
    settings = {"per_device_train_batch_size": 3, "data": texts(12)}
    first = build(SLSAMTrainer, tmp_path, SLSAMConfig(), max_steps=2, save_strategy="steps", save_steps=2, **settings)
    first.train()
    second = build(SLSAMTrainer, tmp_path / "second", SLSAMConfig(), max_steps=2, optim="sgd", **settings)
    with pytest.raises(ValueError, match="sgd"):
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    second.train()
    assert second.slsam.steps == 2
    assert second.state.global_step == 2


def test_a_push_takes_the_record_of_what_it_pushes(tmp_path, monkeypatch):
    """Adapter and record in the folder that is pushed are of one checkpoint."""
    pushed = []

    def upload(folder_path, **kwargs):
        folder = Path(folder_path)
        if not folder.name.startswith("checkpoint"):
            pushed.append(json.loads((folder / RECORD_NAME).read_text())["training"]["steps"])
        done = Future()
        done.set_result("commit")
        return done

    hub = SimpleNamespace(upload_folder=upload, create_repo=lambda *args, **kwargs: SimpleNamespace(repo_id="a/b"))
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    trainer = build(
        SLSAMTrainer, tmp_path, SLSAMConfig(), data=texts(12), max_steps=4, save_strategy="steps", save_steps=2,
        push_to_hub=True, hub_model_id="a/b", hub_always_push=True,
    )  # fmt: skip
    trainer.train()
    assert pushed[:2] == [2, 4]
