"""Trains a tiny model of a family for two steps in each way there is, and says where that is exact.

Every gradient is compared with one slow reference: its own passes, in place, over the whole model, in float64
throughout. From step to step weights go on along the gradient.
"""

import logging
from dataclasses import dataclass, field

import torch

from slsam_peft import SLSAM, SLSAMConfig, arms_of
from slsam_peft.trainer.joining import join
from slsam_peft.trainer.riding import lora_pairs
from tests.decoders import passes_of
from tests.double import in_double
from tests.families import batch_of, model_of
from tests.look_ahead import look_ahead_passes, mean_gradients
from tests.reference import clear, descent_of, gradients_of, random_state_now, set_random_state
from tests.tolerances import EXACT_FLOAT64

RHO = 0.1
STEPS = 2
STRIDE = 0.1  # length of a step
PLAIN, CHECKPOINTED, REENTRANT = None, False, True
# How the ascent is made and what is trained, by how the model is checkpointed.
WAYS = {
    PLAIN: [
        ("two_pass", "active"),
        ("two_pass", "all"),
        ("partial", "active"),
        ("partial", "all"),
        ("remembered", "active"),
        ("auto", "all"),
    ],
    CHECKPOINTED: [("two_pass", "all"), ("partial", "active")],
    REENTRANT: [("two_pass", "active"), ("two_pass", "all")],
}
CHECKPOINTING = {PLAIN: "plain", CHECKPOINTED: "checkpointed", REENTRANT: "reentrant"}


@dataclass
class Outcome:
    """What has come out of a family's trainings.

    Args:
        faults: Gradients that are off, by how they were trained.
        ways: How second passes and ascents were run.
        said: Warnings.
    """

    faults: list[str] = field(default_factory=list)
    ways: dict[str, None] = field(default_factory=dict)
    said: dict[str, None] = field(default_factory=dict)

    def note(self, way):
        self.ways[way] = None


class Listening(logging.Handler):
    """Takes in the package's warnings."""

    def __init__(self, outcome):
        super().__init__(logging.WARNING)
        self.outcome = outcome

    def emit(self, record):
        self.outcome.said[record.getMessage().partition(":")[0][:100]] = None


def sweep(family):
    """Train a family in every way; return the `Outcome`."""
    outcome = Outcome()
    logger, listening = logging.getLogger("slsam_peft"), Listening(outcome)
    logger.addHandler(listening)
    try:
        with in_double():
            for checkpointing, name in CHECKPOINTING.items():
                try:
                    model = model_of(family, checkpointing)
                except ValueError as error:
                    if checkpointing is PLAIN or "checkpointing" not in str(error):
                        raise
                    outcome.note("no checkpointing")
                    break
                if checkpointing is REENTRANT and not _trains_as_much(model, family):
                    outcome.note("not as much is trained (reentrant, plain torch)")
                    break
                for ascent, descent in WAYS[checkpointing]:
                    run = OwnPasses(model, family, ascent, descent)
                    outcome.faults += [f"{name}, {ascent}, {descent}: {fault}" for fault in run.faults()]
                    if ascent == "two_pass":
                        outcome.note(run.way() if checkpointing is PLAIN else f"{run.way()} ({name})")
                if checkpointing is PLAIN and _may_ride(model):
                    run = RidingPasses(model.eval(), family, "ahead", "all")
                    outcome.faults += [f"ahead: {fault}" for fault in run.faults()]
                    outcome.note(run.way())
    finally:
        logger.removeHandler(listening)
    return outcome


def _trains_as_much(model, family):
    """Whether plain torch trains under reentrant checkpointing what it trains without.

    It does not where the input of a stack requires no gradient, nor where something but the hidden state carries a
    graph from block to block; WavLM's backward pass takes all memory then.
    """
    return family != "wavlm" and _untrained(model, family) == _untrained(model_of(family, PLAIN), family)


def _untrained(model, family):
    """Return the names of what a plain pass gives no gradient; `None` where it fails."""
    torch.manual_seed(3)
    try:
        model(**batch_of(family)).loss.backward()
    except (AttributeError, RuntimeError):  # embeddings that return a tuple; a graph that is gone
        return None
    finally:
        found = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
        model.zero_grad(set_to_none=True)
    return found


def _may_ride(model):
    factors = {p for pair in lora_pairs(model) for p in pair.weights}
    causal = any(type(m).__name__.endswith(("ForCausalLM", "LMHeadModel")) for m in model.modules())
    return causal and {p for p in model.parameters() if p.requires_grad} == factors


class OwnPasses:
    """Steps whose ascent has passes of its own, or none."""

    def __init__(self, model, family, ascent, descent):
        self.model, self.ascent, self.descent = model, ascent, descent
        self.whole, self.part = batch_of(family), batch_of(family, rows=1)
        self.arms = arms_of(model)
        torch.manual_seed(2)
        place = torch.arange(len(self.arms))
        self.masks = [place >= len(place) // 2, (len(place) - place) % 2 == 1]
        drawn = iter([*self.masks, self.masks[0]])
        config = SLSAMConfig(
            rho=RHO, active_fraction=0.5, ascent=ascent, descent=descent, design=lambda p, g: next(drawn)
        )
        self.slsam = SLSAM(self.arms, config, pairs=lora_pairs(model) if ascent == "ahead" else ())
        self.parameters = [p for arm in self.arms for p in arm.parameters]
        self.kept = {}

    def way(self):
        """Say how second passes were run."""
        horizon = self.slsam.horizon
        if self.slsam.runner.horizon is None:
            return "whole"
        return "cut, reused" if horizon.reuse and horizon.peak_bytes else "cut"

    def faults(self):
        """Yield what is off in each step."""
        for step, mask in enumerate(self.masks):
            trained = mask if self.descent == "active" else torch.ones_like(mask)
            state, weights = random_state_now(), [p.detach().clone() for p in self.parameters]
            expected_loss, expected = self.expected(step, mask, trained)
            after = random_state_now()
            set_random_state(state)
            loss = self.update(step)
            if not torch.equal(self.slsam.active, mask):
                yield f"step {step}: arms {self.slsam.active.tolist()}"
            if not all(torch.equal(p, w) for p, w in zip(self.parameters, weights, strict=True)):
                yield f"step {step}: weights have moved"
            if not torch.allclose(loss.double(), expected_loss.double(), rtol=EXACT_FLOAT64):
                yield f"step {step}: loss {float(loss)} instead of {float(expected_loss)}"
            yield from (f"step {step}: {fault}" for fault in self.differences(expected))
            set_random_state(after)
            self.go_on(expected)

    def go_on(self, gradients):
        """Take a step of a fixed length along gradients."""
        found = {p: g for p, g in zip(self.parameters, gradients, strict=True) if g is not None}
        length = sum(float(g.square().sum()) for g in found.values()) ** 0.5
        with torch.no_grad():
            for p, g in found.items():
                p.sub_(STRIDE * g / max(length, 1e-9))
        clear(self.arms)

    def differences(self, expected):
        """Yield which gradients are off by more than 1e-12 of the largest entry of any of them."""
        largest = max((float(e.abs().max()) for e in expected if e is not None), default=0.0)
        names = [name for arm in self.arms for name in arm.parameter_names]
        off = []
        for name, p, e in zip(names, self.parameters, expected, strict=True):
            if (p.grad is None) != (e is None):
                off.append((float("inf"), f"{name} has {'no' if p.grad is None else 'a'} gradient"))
            elif e is not None and not (error := float((p.grad - e).abs().max())) <= EXACT_FLOAT64 * largest:
                off.append((error / largest, f"{name} off by {error / largest:.1e}"))
        if off:
            yield f"{len(off)} of {len(names)}, {max(off)[1]}"

    def expected(self, step, mask, trained):
        """Return the loss and the gradients of the slow reference."""
        state = random_state_now()
        whole = passes_of(lambda: self.model(**self.whole).loss)[0]
        part = passes_of(lambda: self.model(**self.part).loss)[0]
        if self.ascent == "remembered":
            loss, gradients = descent_of(self.arms, self.recalled(mask), RHO, whole, trained)
            self.keep(dict(zip(self.parameters, gradients, strict=True)))
            return loss, gradients
        loss, ascent = gradients_of(self.arms, mask, whole if self.ascent == "two_pass" else part)
        set_random_state(state)
        at_w_plus_e, gradients = descent_of(self.arms, ascent, RHO, whole, trained)
        return loss if self.ascent == "two_pass" else at_w_plus_e, gradients

    def keep(self, gradients):
        """Keep gradients for the next step, as they are kept: in bfloat16."""
        self.kept |= {p: g.bfloat16().to(g) for p, g in gradients.items() if g is not None}

    def recalled(self, mask):
        """Return what is kept of the arms in a mask."""
        drawn = [arm for arm, on in zip(self.arms, mask.tolist(), strict=True) if on]
        return {p: self.kept[p] for arm in drawn for p in arm.parameters if p in self.kept}

    def update(self, step):
        """Take the step."""
        closure, forward_only = passes_of(lambda: self.model(**self.whole).loss)
        part, _ = passes_of(lambda: self.model(**self.part).loss)
        return self.slsam.update(closure, None if self.ascent == "two_pass" else part, forward_only)


class RidingPasses(OwnPasses):
    """Steps whose ascent is made one step early, by sequences of the next batch behind those of this one."""

    def __init__(self, model, family, ascent, descent):
        super().__init__(model, family, ascent, descent)
        generator = torch.Generator().manual_seed(3)
        self.batches = [_texts(3, 6 + 2 * i, generator) for i in range(STEPS + 1)]

    def way(self):
        """Say whether sequences rode along."""
        return "rides" if self.slsam.runner.pairs else "small pass"

    def expected(self, step, mask, trained):
        """Return the loss and the gradients of passes of their own."""
        own, coming = self.batches[step : step + 2]
        passes = look_ahead_passes(self.model, own, None)
        ascent = self.recalled(mask)
        if not (ascent and self.slsam.runner.pairs):
            _, ascent = gradients_of(self.arms, mask, passes.cut(1).run)
        loss, gradients = descent_of(self.arms, ascent, RHO, passes.logged, trained)
        self.keep(mean_gradients(self.model, join(own, coming, 1).riding))
        return loss, gradients

    def update(self, step):
        """Take the step."""
        return self.slsam.accumulate(look_ahead_passes(self.model, *self.batches[step : step + 2]))


def _texts(rows, length, generator):
    ids = torch.randint(3, 40, (rows, length), generator=generator)
    attention = torch.ones_like(ids)
    attention[0, length - 2 :] = 0
    return {"input_ids": ids, "attention_mask": attention, "labels": torch.where(attention == 1, ids, -100)}
