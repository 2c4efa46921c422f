"""Micro-batches through SFTTrainer: a step is the plain two-pass on their union, and a bad one skips it whole."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from slsam_peft import SLSAMConfig, SLSAMTrainer, arms_of
from tests.reference import reference_step
from tests.sft import llama, train
from tests.tiny import build
from tests.tolerances import FUSED_HEAD
from tests.watch import clones

RATE = 0.05


class Recording(SLSAMTrainer):
    """Keeps every micro-batch, and the active set of every step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.start = copy.deepcopy(self.model.state_dict())
        self.steps = [[]]
        self.masks = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.steps[-1].append({k: v.clone() for k, v in inputs.items()})
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._slsam_index == 0:
            self.steps.append([])
            self.masks.append(self.slsam.active.clone())
        return loss


def summed_loss(model, parts):
    """Sum over micro-batches of the negative log-likelihood, divided by the tokens of all of them."""
    total = sum(int((p["labels"][:, 1:] != -100).sum()) for p in parts)
    losses = []
    for part in parts:
        logits = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"], use_cache=False).logits
        nll = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), part["labels"][:, 1:].flatten(), reduction="sum", ignore_index=-100
        )
        losses.append(nll / total)
    return sum(losses)


@pytest.mark.parametrize("settings", [{}, {"descent": "all", "design": "depth"}, {"granularity": "module"}])
def test_training_follows_a_plain_reference(settings, tmp_path):
    """Three micro-batches of two per step, of unequal length, against clone-run-move-run-put-back with plain SGD."""
    config = SLSAMConfig(rho=0.1, active_fraction=0.5, **settings)
    trainer = train(
        Recording,
        tmp_path,
        config,
        double=True,
        dropout=0.0,
        steps=4,
        gradient_accumulation_steps=3,
        optim="sgd",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
    )
    batches = trainer.steps[:-1]
    assert [len(parts) for parts in batches] == [3] * 4
    assert len({p["input_ids"].shape[1] for parts in batches for p in parts}) > 3
    model, losses = get_peft_model(llama(torch.float64), LoraConfig(r=4, target_modules="all-linear")).double(), []
    model.load_state_dict(trainer.start)
    arms = arms_of(model, config.granularity)
    for mask, parts in zip(trainer.masks, batches, strict=True):

        def closure(parts=parts):
            loss = summed_loss(model, parts)
            loss.backward()
            return loss

        trained = torch.ones_like(mask) if config.descent == "all" else mask
        loss, gradients = reference_step(arms, mask, config.rho, closure, trained)
        losses.append(float(loss))
        with torch.no_grad():
            for p, g in zip([p for arm in arms for p in arm.parameters], gradients, strict=True):
                if g is not None:
                    p.sub_(RATE * g)
    logged = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert logged == pytest.approx(losses, rel=FUSED_HEAD)
    for (name, p), q in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=FUSED_HEAD, atol=FUSED_HEAD, msg=lambda m, n=name: f"{n}: {m}")


class Faulty(SLSAMTrainer):
    """Makes the loss NaN in the given passes, counted from 1; checks what a step leaves behind."""

    bad = ()
    passes = 0

    def compute_loss(self, model, inputs, *args, **kwargs):
        type(self).passes += 1
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * math.nan if type(self).passes in self.bad else loss


def faulty(*bad):
    return type("Faulty", (Faulty,), {"bad": bad, "passes": 0})


OPTIMIZERS = ["adamw_torch", "sgd", "adafactor", "paged_adamw_8bit"]

# A step of two micro-batches is four passes; one forward alone checks the hidden-state cache, in the first step.
ASCENT, DESCENT = (6, 7), (8, 9)


BAD = {"first ascent": ASCENT[:1], "last ascent": ASCENT[1:], "descent": DESCENT[1:]}

# Every pass with one optimizer and every optimizer with one pass always, the other pairs in the slow run.
PAIRS = [
    pytest.param(passes, optimizer, id=f"{name}-{optimizer}", marks=[pytest.mark.slow] * (i > 0 and j > 0))
    for i, (name, passes) in enumerate(BAD.items())
    for j, optimizer in enumerate(OPTIMIZERS)
]


@pytest.mark.parametrize(("bad", "optimizer"), PAIRS)
def test_a_bad_micro_batch_skips_its_step_whole(bad, optimizer, tmp_path):
    """The second of four: weights, decay, moments and probabilities stay, training goes on."""
    config = SLSAMConfig(rho=0.05, active_fraction=0.6, design="depth")
    seen = []

    class Noted(faulty(*bad)):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if self._slsam_index == 0:
                moments = copy.deepcopy(self.optimizer.optimizer.state_dict()["state"])
                seen.append((clones(model, True), self.slsam.probabilities.clone(), moments, type(self).passes))
            return super().training_step(model, inputs, num_items_in_batch)

    settings = {"gradient_accumulation_steps": 2, "max_steps": 4, "optim": optimizer, "weight_decay": 0.1}
    trainer = build(Noted, tmp_path, config, **settings)
    trainer.train()
    assert trainer.state.global_step == trainer.slsam.steps == 4
    assert trainer.slsam.skipped == 1
    assert trainer.slsam.skipped_in_a_row == 0
    assert seen[1][3] == ASCENT[0] - 1, "the passes are not those the case means to spoil"
    (weights, probabilities, moments, _), (after, learned, moments_after, _) = seen[1], seen[2]
    assert all(torch.equal(after[n], w) for n, w in weights.items())
    assert torch.equal(learned, probabilities)
    assert _same(moments, moments_after)
    assert not all(torch.equal(p, after[n]) for n, p in clones(trainer.model, True).items())
    logged = [log["slsam/skipped"] for log in trainer.state.log_history if "slsam/skipped" in log]
    assert logged == [0, 1, 1, 1]


def _same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return a == b


def test_too_many_bad_steps_in_a_row_stop_training(tmp_path):
    config = SLSAMConfig(rho=0.05, active_fraction=0.2, max_skipped_steps=1)
    trainer = build(faulty(*range(4, 100)), tmp_path, config, max_steps=10)
    with pytest.raises(RuntimeError, match=r"2 steps in a row had a NaN or infinite.*max_skipped_steps"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
