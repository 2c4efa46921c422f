"""Watches a training: what it must restore, and what each step may move."""

import math

import torch
from transformers import TrainerCallback

STEPS = 3


def hooks(model):
    """Count the hooks, replaced forwards and parametrisations of every module."""
    names = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_state_dict_hooks",
        "_load_state_dict_pre_hooks",
    )
    return {
        name: [
            *(len(getattr(module, n)) for n in names),
            "forward" in vars(module),
            "parametrizations" in vars(module),
        ]
        for name, module in model.named_modules()
    }


def clones(model, trainable):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad is trainable}


class Watch(TrainerCallback):
    """Keeps what training must restore, and the weights around each step.

    Args:
        hooks: Whether hooks must be those of before; off where the trainer around SL-SAM itself changes them.
    """

    def __init__(self, hooks=True):
        self.compares_hooks = hooks

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.hooks = hooks(model)
        self.trainable = {n: p.requires_grad for n, p in model.named_parameters()}
        self.frozen = clones(model, False)
        self.first = clones(model, True)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        assert {n: p.requires_grad for n, p in model.named_parameters()} == self.trainable
        self.before = clones(model, True)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after = clones(model, True)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        assert not self.compares_hooks or hooks(model) == self.hooks
        assert {n: p.requires_grad for n, p in model.named_parameters()} == self.trainable
        frozen = clones(model, False)
        assert frozen.keys() == self.frozen.keys()
        for name, weight in frozen.items():
            assert torch.equal(weight, self.frozen[name]), name


def check(trainer, watch):
    """Check the last step and what all of them left behind."""
    slsam = trainer.slsam
    assert trainer.state.global_step == slsam.steps == STEPS
    assert slsam.skipped == 0
    on = slsam.active.tolist()
    assert 0 < sum(on) < len(on), "the case shows nothing unless some arms are active and some are not"
    for arm, active in zip(slsam.arms, on, strict=True):
        moved = [not torch.equal(watch.before[n], watch.after[n]) for n in arm.parameter_names]
        assert any(moved) == active, arm.name
        assert all(torch.isfinite(watch.after[n]).all() for n in arm.parameter_names), arm.name
    logged = [log for log in trainer.state.log_history if "slsam/sharpness" in log]
    assert len(logged) == STEPS
    assert all(math.isfinite(log["slsam/sharpness"]) and log["slsam/sharpness"] != 0 for log in logged)
