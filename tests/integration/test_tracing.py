"""The trace of a training: what is in the file, when it is written, and what it survives."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from slsam_peft import SLSAMConfig, SLSAMTrainer
from slsam_peft.saving import atomic
from slsam_peft.saving import trace_file as tracing
from slsam_peft.saving.checksum import add_checksum
from slsam_peft.saving.trace_data import FILE_NAME, read_trace
from tests.tiny import build, lora, train

CONFIG = SLSAMConfig(rho=0.1, active_fraction=0.5, design="depth", bandit_rate=0.5)
STEPS, CUT = 6, 3


class Draws(TrainerCallback):
    """Records what each step drew, and the probabilities it left."""

    def __init__(self):
        self.masks, self.probabilities, self.trainer = [], [], None

    def on_step_end(self, args, state, control, **kwargs):
        self.masks.append(self.trainer.slsam.active.tolist())
        self.probabilities.append(self.trainer.slsam.probabilities.float().numpy())


def run(folder, config=CONFIG, resume=None, draws=None, **settings):
    settings = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": CUT, **settings}
    trainer = build(SLSAMTrainer, folder, config, parts={"callbacks": [draws] if draws else []}, **settings)
    if draws:
        draws.trainer = trainer
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def assert_same(one, two):
    first, second = read_trace(one / FILE_NAME), read_trace(two / FILE_NAME)
    assert first.plain == second.plain
    assert first.names == second.names
    for key, value in first.values.items():
        np.testing.assert_array_equal(value, second.values[key], err_msg=key, strict=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of six steps with a checkpoint after the third."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, gradient_accumulation_steps=2, peft_config=lora(lora_dropout=0.2))
    return folder


def test_the_file_tells_what_the_sampler_did(tmp_path):
    draws = Draws()
    trainer = run(tmp_path, draws=draws, gradient_accumulation_steps=2)
    trace = read_trace(tmp_path / FILE_NAME)
    assert trace.step.tolist() == list(range(1, STEPS + 1))
    assert trace.active.tolist() == draws.masks
    assert trace.activity.tolist() == np.sum(draws.masks, 0).tolist()
    assert trace.names == [arm.name for arm in trainer.slsam.arms]
    assert trace.depths == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(trace.probabilities[0], np.full(5, 0.5, np.float32))
    np.testing.assert_array_equal(trace.probabilities[1:], draws.probabilities[:-1])
    logs = [log for log in trainer.state.log_history if "slsam/cost" in log]
    for key in ("sharpness", "lowest_active_block", "cost"):
        np.testing.assert_array_equal(trace.values[key], np.float32([log[f"slsam/{key}"] for log in logs]))
    np.testing.assert_allclose(trace.loss, [log["loss"] for log in logs], rtol=1e-3)  # TRL rounds to 4 digits
    assert (trace.norms > 0).tolist() == draws.masks
    assert trace.plain["config"] == CONFIG.to_dict()
    assert (trace.plain["total"], trace.plain["done"], trace.plain["fraction"]) == (STEPS, True, 0.5)


class Listener(TrainerCallback):
    """Keeps what a logger is handed, as TensorBoard's and W&B's are, and the sampler's own numbers."""

    def __init__(self):
        self.logs, self.metrics, self.trainer = [], [], None

    def on_step_end(self, args, state, control, **kwargs):
        self.metrics.append(dict(self.trainer.slsam.metrics))

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append({key.removeprefix("slsam/"): value for key, value in logs.items() if "slsam/" in key})


@pytest.mark.parametrize("every", [1, 3])
def test_callbacks_receive_every_number_of_the_sampler(every, tmp_path):
    """Means over the steps since the last log, as the trainer's own numbers are."""
    listener = Listener()
    run(tmp_path, draws=listener, logging_steps=every, save_strategy="no", peft_config=lora(target_modules=["q_proj"]))
    logs = [logs for logs in listener.logs if logs]
    names = "active_fraction ascent_gain cost entropy grad_norm_ascent hidden_state_cache_mib "
    names += "lowest_active_block rho sharpness skipped"
    assert [" ".join(sorted(entry)) for entry in logs] == [names] * (STEPS // every)
    for i, entry in enumerate(logs):
        steps = listener.metrics[i * every : (i + 1) * every]
        assert entry == pytest.approx({name: np.mean([u[name] for u in steps]) for name in entry}, rel=1e-9)


def test_the_budget_and_what_it_was_solved_for(tmp_path):
    config = SLSAMConfig(design="depth", cost_budget=1.2)
    trainer = train(SLSAMTrainer, tmp_path, config)
    plain = read_trace(tmp_path / FILE_NAME).plain
    assert plain["budget"] == 1.2
    assert plain["fraction"] == trainer.slsam.sampler.bandit.mean


@pytest.mark.parametrize("elsewhere", [True, False], ids=["into another folder", "into its own folder"])
def test_a_resumed_run_has_the_trace_of_an_uninterrupted_one(elsewhere, whole, tmp_path):
    parted = tmp_path / "parted"
    checkpoint = whole / f"checkpoint-{CUT}"
    if not elsewhere:  # the run's own trace reaches further than its last checkpoint, as after a kill
        shutil.copytree(whole, parted)
        checkpoint = parted / f"checkpoint-{CUT}"
    run(parted, resume=checkpoint, gradient_accumulation_steps=2, peft_config=lora(lora_dropout=0.2))
    assert_same(whole, parted)


def test_a_checkpoints_trace_ends_with_it(whole):
    part, all_of_it = read_trace(whole / f"checkpoint-{CUT}" / FILE_NAME), read_trace(whole / FILE_NAME)
    assert part.plain["last"] == CUT
    assert not part.plain["done"]
    np.testing.assert_array_equal(part.probabilities, all_of_it.probabilities[:CUT])
    assert part.activity.tolist() == all_of_it.active[:CUT].sum(0).tolist()


@pytest.mark.parametrize("damage", ["missing", "cut off", "of other arms", "of another schema"])
def test_without_a_checkpoints_trace_the_recording_begins_there(damage, whole, tmp_path, caplog):
    shutil.copytree(whole, tmp_path / "out")
    checkpoint = tmp_path / "out" / f"checkpoint-{CUT}"
    file = checkpoint / FILE_NAME
    if damage == "missing":
        file.unlink()
    elif damage == "cut off":
        file.write_bytes(file.read_bytes()[:-10])
    else:
        old, new = (b"layers.4", b"layers.9") if damage == "of other arms" else (b'"schema":"3"', b'"schema":"7"')
        assert old in file.read_bytes()
        file.write_bytes(add_checksum(file.read_bytes().replace(old, new)))
    run(tmp_path / "out", resume=checkpoint, gradient_accumulation_steps=2)
    trace = read_trace(tmp_path / "out" / FILE_NAME)
    assert trace.step.tolist() == list(range(CUT + 1, STEPS + 1))
    assert trace.plain["steps"] == STEPS - CUT
    assert (f"begins after step {CUT}" in caplog.text) is (damage in ("cut off", "of another schema"))


def test_a_sampler_that_starts_afresh_starts_a_trace(whole, tmp_path):
    config = SLSAMConfig(rho=0.2, active_fraction=0.5, accept_state_mismatch=True)
    run(tmp_path, config, resume=whole / f"checkpoint-{CUT}", gradient_accumulation_steps=2)
    assert read_trace(tmp_path / FILE_NAME).step.tolist() == list(range(CUT + 1, STEPS + 1))


def test_recording_changes_nothing_that_is_trained(tmp_path):
    off = SLSAMConfig(**{**CONFIG.to_dict(), "trace": False})
    one, two = (run(tmp_path / name, config) for name, config in (("with", CONFIG), ("without", off)))
    assert [path.parent.name for path in tmp_path.rglob(FILE_NAME)].count("with") == 1
    assert not list((tmp_path / "without").rglob(FILE_NAME))
    for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_trace_may_be_switched_when_resuming(whole, tmp_path):
    off = SLSAMConfig(**{**CONFIG.to_dict(), "trace": False})
    trainer = run(tmp_path, off, resume=whole / f"checkpoint-{CUT}", gradient_accumulation_steps=2)
    assert trainer.state.global_step == STEPS


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(SLSAMTrainer, "is_world_process_zero", lambda self: False)
    train(SLSAMTrainer, tmp_path, CONFIG)
    assert not list(tmp_path.rglob(FILE_NAME))


def test_writes_are_rare_and_bounded_by_what_they_take(tmp_path, monkeypatch):
    """200 s of steps of 10 ms: a write every 5 s; where a write takes 100 ms, every 40 s."""
    trainer = train(SLSAMTrainer, tmp_path, SLSAMConfig(active_fraction=0.5, trace=False))
    for takes, most in ((0.001, 41), (0.1, 6)):
        clock, writes = [0.0], []
        monkeypatch.setattr(tracing.time, "monotonic", lambda clock=clock: clock[0])

        def write(target, content, takes=takes, clock=clock, writes=writes):
            clock[0] += takes
            writes.append(target)

        monkeypatch.setattr(tracing, "write_atomically", write)
        file = tracing.TraceFile(trainer.slsam, tmp_path, 20_000)
        step = 0
        while clock[0] < 200:
            step += 1
            clock[0] += 0.01
            file.see(step, trainer.slsam)
        assert most - 2 <= len(writes) <= most
        assert sum(takes for _ in writes) < 0.005 * clock[0]
        assert file.trace.steps == step


def test_a_folder_that_cannot_be_written_is_told_once_and_training_goes_on(tmp_path, monkeypatch, caplog):
    def full(target, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tracing, "write_atomically", full)
    monkeypatch.setattr(tracing, "WRITE_SECONDS", 0.0)
    trainer = train(SLSAMTrainer, tmp_path, CONFIG)
    assert trainer.state.global_step == 3
    assert caplog.text.count("cannot be written") == 1
    assert "No space left on device" in caplog.text


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    atomic.write_atomically(tmp_path / "file", b"old")

    def fail(*_):
        raise OSError("no")

    monkeypatch.setattr(atomic.os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        atomic.write_atomically(tmp_path / "file", b"new")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


WRITER = """
import sys
import torch
from slsam_peft import SLSAM, SLSAMConfig, arms_of
from slsam_peft.saving import trace_file as tracing
tracing.WRITE_SECONDS = 0.0
tracing.WRITE_SHARE = 1e9
model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(200)))
slsam = SLSAM(arms_of(model, "module"), SLSAMConfig(active_fraction=0.5))
def closure():
    loss = model(torch.ones(1, 2)).square().mean()
    loss.backward()
    return loss
slsam.update(closure)
file = tracing.TraceFile(slsam, sys.argv[1], 10**9)
for step in range(1, 10**9):
    file.see(step, slsam)
    if step == 50:
        sys.stdout.write("going\\n")
        sys.stdout.flush()
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_kill_leaves_a_file_that_can_be_read(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"going\n"
        time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    trace = read_trace(tmp_path / FILE_NAME)
    assert trace.plain["last"] >= 50
    assert not trace.plain["done"]
    assert trace.step.tolist() == list(range(1, trace.plain["last"] + 1))
