"""Which checkpoints count as intact, and what resuming from others says."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slsam_peft import SLSAMConfig, SLSAMTrainer, last_intact_checkpoint
from slsam_peft.saving.checkpoint import StateMismatchError
from slsam_peft.saving.hashes import write_hashes
from slsam_peft.saving.resume import what_is_missing
from tests.tiny import build, lora, train

CONFIG = SLSAMConfig(rho=0.1, active_fraction=0.5)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of four steps with a checkpoint every two."""
    folder = tmp_path_factory.mktemp("made")
    adapter = lora(target_modules=["q_proj"])
    train(SLSAMTrainer, folder, CONFIG, peft_config=adapter, max_steps=4, save_strategy="steps", save_steps=2)
    return folder


@pytest.fixture
def run(made, tmp_path):
    """A copy of it to spoil."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 40])


def flip(path, share=0.7):
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 1
    path.write_bytes(content)


SPOILED = {
    "no state": (lambda c: (c / "trainer_state.json").unlink(), "trainer_state.json is missing"),
    "state cut short": (lambda c: cut(c / "trainer_state.json"), "trainer_state.json is cut short"),
    "empty state": (lambda c: (c / "trainer_state.json").write_text(""), "trainer_state.json is cut short"),
    "state of another kind": (
        lambda c: (c / "trainer_state.json").write_text("[]"),
        "trainer_state.json is cut short",
    ),
    "no optimizer": (lambda c: (c / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    "no scheduler": (lambda c: (c / "scheduler.pt").unlink(), "scheduler.pt is missing"),
    "no random state": (lambda c: (c / "rng_state.pth").unlink(), "rng_state.pth is missing"),
    "no adapter": (
        lambda c: (c / "adapter_model.safetensors").unlink(),
        "adapter_model.safetensors is missing",
    ),
    "no sampler": (lambda c: (c / "slsam.safetensors").unlink(), "slsam.safetensors is missing"),
    "optimizer cut short": (lambda c: cut(c / "optimizer.pt"), "optimizer.pt is cut short"),
    "adapter cut short": (lambda c: cut(c / "adapter_model.safetensors"), "adapter_model.safetensors is cut short"),
    "empty adapter": (
        lambda c: (c / "adapter_model.safetensors").write_bytes(b""),
        "adapter_model.safetensors is cut",
    ),
    "sampler cut short": (lambda c: cut(c / "slsam.safetensors"), "slsam.safetensors is cut short"),
    "sampler flipped": (lambda c: flip(c / "slsam.safetensors"), "slsam.safetensors is damaged"),
    "adapter flipped": (lambda c: flip(c / "adapter_model.safetensors"), "adapter_model.safetensors is damaged"),
    "optimizer flipped": (lambda c: flip(c / "optimizer.pt"), "optimizer.pt is damaged"),
    "scheduler flipped": (lambda c: flip(c / "scheduler.pt", 0.3), "scheduler.pt is damaged"),
    "random state flipped": (lambda c: flip(c / "rng_state.pth", 0.5), "rng_state.pth is damaged"),
    "hashes cut short": (lambda c: cut(c / "slsam_files.json"), "slsam_files.json is damaged"),
    "hashes of another kind": (lambda c: (c / "slsam_files.json").write_text("[]"), "slsam_files.json is damaged"),
    "transformers' mark": (lambda c: (c / "checkpoint-is-incomplete.txt").touch(), "checkpoint-is-incomplete.txt"),
}


@pytest.mark.parametrize(("spoil", "reason"), SPOILED.values(), ids=SPOILED.keys())
def test_a_checkpoint_that_is_not_intact_is_passed_over(spoil, reason, run):
    assert what_is_missing(run / "checkpoint-4") is None
    spoil(run / "checkpoint-4")
    assert what_is_missing(run / "checkpoint-4").startswith(reason)
    assert last_intact_checkpoint(run) == str(run / "checkpoint-2")


def test_a_checkpoint_of_the_model_alone_is_intact(tmp_path):
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    train(SLSAMTrainer, tmp_path, CONFIG, peft_config=lora(target_modules=["q_proj"]), **settings)
    assert not (tmp_path / "checkpoint-1" / "optimizer.pt").exists()
    assert last_intact_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    with pytest.raises(StateMismatchError, match=r"holds no state.*accept_state_mismatch=True"):
        trainer_over(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_what_training_goes_on_from_is_recorded(run):
    recorded = json.loads((run / "checkpoint-4" / "slsam_files.json").read_text())["sha256"]
    assert recorded.keys() == {"adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt"}


def test_a_checkpoint_of_an_earlier_version_is_gone_on_from(run):
    """It has no record of hashes."""
    (run / "checkpoint-4" / "slsam_files.json").unlink()
    trainer = trainer_over(run)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    assert trainer.slsam.steps == 6


def test_a_save_over_an_earlier_one_forgets_its_hashes(run):
    """A run that saves the model alone, in an old folder."""
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "save_only_model": True, "seed": 1}
    train(SLSAMTrainer, run, CONFIG, peft_config=lora(target_modules=["q_proj"]), **settings)
    assert not (run / "checkpoint-2" / "slsam_files.json").exists()


def test_a_recording_cut_short_costs_no_checkpoint(run):
    cut(run / "checkpoint-4" / "slsam_trace.safetensors")
    assert last_intact_checkpoint(run) == str(run / "checkpoint-4")


def test_names_in_the_record_are_not_followed(run):
    shutil.copy(run / "checkpoint-4" / "optimizer.pt", run / "secret.pt")
    record = run / "checkpoint-4" / "slsam_files.json"
    record.write_text(json.dumps({"sha256": {"../secret.pt": "0" * 64}}))
    assert what_is_missing(run / "checkpoint-4") == "../secret.pt is missing"


def test_each_adapter_of_several_must_be_there(run):
    other = run / "checkpoint-4" / "other"
    other.mkdir()
    shutil.copy(run / "checkpoint-4" / "adapter_config.json", other)
    assert what_is_missing(run / "checkpoint-4") == "other/adapter_model.safetensors is missing"


def test_nothing_to_go_on_from(tmp_path):
    assert last_intact_checkpoint(tmp_path / "none") is None
    (tmp_path / "checkpoint-x").mkdir()
    assert last_intact_checkpoint(tmp_path) is None


def trainer_over(folder, steps=6):
    return build(SLSAMTrainer, folder, CONFIG, peft_config=lora(target_modules=["q_proj"]), max_steps=steps)


def test_true_goes_on_from_the_newest_intact_one(run):
    cut(run / "checkpoint-4" / "trainer_state.json")
    trainer = trainer_over(run)
    trainer.train(resume_from_checkpoint=True)
    assert [log["step"] for log in trainer.state.log_history if "loss" in log] == [1, 2, 3, 4, 5, 6]
    assert trainer.slsam.steps == 6


def test_true_without_an_intact_one_is_refused(run):
    for step in (2, 4):
        (run / f"checkpoint-{step}" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="has no intact checkpoint-<step> folder.*start afresh"):
        trainer_over(run).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(("spoil", "reason"), SPOILED.values(), ids=SPOILED.keys())
def test_the_path_of_one_that_is_not_intact_is_refused(spoil, reason, run):
    """As `get_last_checkpoint` returns it after a kill in the middle of a save; transformers would go on without."""
    spoil(run / "checkpoint-4")
    with pytest.raises(ValueError, match="checkpoint-4") as caught:
        trainer_over(run).train(resume_from_checkpoint=str(run / "checkpoint-4"))
    if reason.startswith("slsam.safetensors"):  # refused where it is read, since a flag accepts it
        assert "accept_state_mismatch=True" in str(caught.value)
    else:
        assert f"checkpoint-4 is not intact: {reason}" in str(caught.value)
        assert f"Go on from {run / 'checkpoint-2'}" in str(caught.value)


def test_a_lost_sampler_that_is_accepted_vouches_for_nothing_else(run):
    """The flag is about the sampler's state alone."""
    (run / "checkpoint-4" / "slsam.safetensors").unlink()
    config = replace(CONFIG, accept_state_mismatch=True)
    trainer = build(SLSAMTrainer, run, config, peft_config=lora(target_modules=["q_proj"]), max_steps=5)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    assert (trainer.state.global_step, trainer.slsam.steps) == (5, 1)
    (run / "checkpoint-4" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"optimizer\.pt is missing"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))


def test_an_earlier_run_does_not_vouch_for_a_save_that_is_cut_short(run, monkeypatch):
    """A new run in an old folder dies while it saves the same step."""
    trainer = build(SLSAMTrainer, run, CONFIG, peft_config=lora(target_modules=["q_proj"]), save_strategy="steps")
    trainer.args.save_steps = trainer.state.save_steps = 2

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert what_is_missing(run / "checkpoint-2") == "trainer_state.json is missing"


@pytest.mark.parametrize("epochs", [None, 1], ids=["in the middle of an epoch", "at the end of one"])
def test_resumed_behind_the_last_step_none_is_made(epochs, tmp_path):
    """A kill between the last checkpoint and the end of the process must not add to the training."""
    length = {"max_steps": 2} if epochs is None else {"num_train_epochs": epochs}
    options = {"peft_config": lora(target_modules=["q_proj"]), "save_strategy": "steps", "save_steps": 1, **length}
    once = train(SLSAMTrainer, tmp_path, CONFIG, **options)
    again = build(SLSAMTrainer, tmp_path, CONFIG, **options)
    again.train(resume_from_checkpoint=last_intact_checkpoint(tmp_path))

    assert again.state.global_step == once.state.global_step == once.state.max_steps
    assert torch.equal(again.slsam.probabilities, once.slsam.probabilities)
    for (name, one), other in zip(once.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_without_the_samplers_state_only_what_accepts_it_goes_on(run, caplog):
    """Checkpoints of the plain trainer, or of which `slsam.safetensors` alone was lost."""
    for state in run.glob("checkpoint-*/slsam.safetensors"):
        state.unlink()
    assert last_intact_checkpoint(run) is None
    assert "checkpoint-4 is passed over: slsam.safetensors is missing" in caplog.text
    assert last_intact_checkpoint(run, sampler=False) == str(run / "checkpoint-4")
    with pytest.raises(ValueError, match=r"checkpoint-4, slsam.safetensors is missing.*accept_state_mismatch"):
        trainer_over(run, 5).train(resume_from_checkpoint=True)
    accepting = build(
        SLSAMTrainer,
        run,
        SLSAMConfig(rho=0.1, active_fraction=0.5, accept_state_mismatch=True),
        peft_config=lora(target_modules=["q_proj"]),
        max_steps=5,
    )
    accepting.train(resume_from_checkpoint=True)
    assert (accepting.state.global_step, accepting.slsam.steps) == (5, 1)


def test_files_of_others_may_change(run):
    """What a callback has put into the folder is not the trainer's; neither hashed nor missed."""
    (run / "checkpoint-4" / "merged").mkdir()
    for name in ("ema.safetensors", "merged/model.safetensors"):
        shutil.copy(run / "checkpoint-4" / "adapter_model.safetensors", run / "checkpoint-4" / name)
    write_hashes(run / "checkpoint-4", frozenset({"slsam.safetensors", "slsam_trace.safetensors"}))
    (run / "checkpoint-4" / "merged" / "model.safetensors").unlink()
    with (run / "checkpoint-4" / "ema.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    assert what_is_missing(run / "checkpoint-4") is None


def test_a_model_saved_over_an_intact_checkpoint_leaves_no_state_of_the_old_one(run):
    options = {"peft_config": lora(target_modules=["q_proj"]), "save_strategy": "steps", "save_steps": 2}
    train(SLSAMTrainer, run, CONFIG, max_steps=2, save_only_model=True, **options)
    assert what_is_missing(run / "checkpoint-2") is None
    assert not {"optimizer.pt", "scheduler.pt", "rng_state.pth", "slsam.safetensors"} & {
        path.name for path in (run / "checkpoint-2").iterdir()
    }
