"""Look-ahead: own tokens at w + e and riding tokens at w in one pass, as if each had a pass of its own."""

import logging

import pytest
import torch
from peft import get_peft_model
from torch import nn

from slsam_peft import SLSAM, SLSAMConfig, arms_of
from slsam_peft.algorithm import stack
from slsam_peft.trainer.joining import join
from slsam_peft.trainer.riding import lora_pairs
from tests import decoders
from tests.decoders import batch
from tests.look_ahead import exact_norms, gradients_at, look_ahead_passes, mean_gradients
from tests.tiny import llama, lora
from tests.tolerances import EXACT_FLOAT64

RHO = 0.2


def decoder(*args, **settings):
    """Return a decoder that is in float64 throughout."""
    return exact_norms(decoders.decoder(*args, **settings))


def padded(rows, length, shift=0):
    """Return texts, the first of them padded behind its end."""
    inputs = batch(rows, length)
    ids = (inputs["input_ids"] + shift) % 61 + 3
    attention = inputs["attention_mask"]
    return {"input_ids": ids, "attention_mask": attention, "labels": torch.where(attention == 1, ids, -100)}


def whole(rows, length, shift=0):
    """Return rows as packing by `wrapped` makes them: full, and each a sequence."""
    ids = padded(rows, length, shift)["input_ids"]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def documents(lengths, shift=0):
    """Return documents in one row, told apart by their position ids, as padding-free batches have them."""
    ids = padded(1, sum(lengths), shift)["input_ids"]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"input_ids": ids, "position_ids": positions, "labels": torch.where(positions == 0, -100, ids)}


LAYOUTS = {
    "padded, longer ones ride": (padded(3, 9), padded(2, 14, shift=5), 2),
    "padded, a shorter one rides": (padded(3, 12), padded(2, 8, shift=5), 1),
    "a lone sequence": (padded(1, 9), padded(1, 12, shift=5), 1),
    "packed": (whole(2, 12), whole(2, 12, shift=7), 1),
    "documents": (documents([5, 8, 4]), documents([7, 6], shift=9), 1),
    "several documents ride": (documents([5, 8]), documents([3, 7, 6], shift=9), 2),
}
CHECKPOINTING = {"plain": None, "checkpointed": False, "reentrant": True}


def stepped(model, own, coming, wanted, *, mask=None, **settings):
    """Run one look-ahead step; return the algorithm and the riding gradients as they were handed on."""
    arms = arms_of(model)
    mask = torch.arange(len(arms)) % 2 == 0 if mask is None else mask
    drawn = iter([mask, ~mask if not bool(mask.all()) else mask, mask])
    config = SLSAMConfig(
        rho=RHO,
        ascent="ahead",
        descent="all",
        ascent_sequences=wanted,
        active_fraction=0.5,
        design=lambda p, g: next(drawn),
        **settings,
    )
    slsam = SLSAM(arms, config, pairs=lora_pairs(model))
    kept, keep = {}, slsam.ascent.keep

    def noting(memory, descent, riding, scale):
        kept.update(riding)
        keep(memory, descent, riding, scale)

    slsam.ascent.keep = noting
    slsam.accumulate(look_ahead_passes(model, own, coming, wanted))
    return slsam, kept


def assert_close_to(got, expected):
    """Check gradients by key to 1e-12 of the largest entry of any of them."""
    largest = max(float(e.abs().max()) for e in expected.values() if e is not None)
    assert largest > 0
    assert got.keys() == expected.keys()
    for key, e in expected.items():
        torch.testing.assert_close(got[key], e, rtol=0, atol=EXACT_FLOAT64 * largest)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING.values(), ids=CHECKPOINTING)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_own_and_riding_tokens_get_the_gradients_of_passes_of_their_own(layout, checkpointing):
    """Every trained parameter, drawn or not; the riding ones are those of the arms that the next step perturbs."""
    own, coming, wanted = LAYOUTS[layout]
    model, twin = (decoder(checkpointing=c, dropout=0.0) for c in (checkpointing, None))
    slsam, riding = stepped(model, own, coming, wanted)
    parameters = [p for arm in arms_of(twin) for p in arm.parameters]
    positions = range(len(parameters))
    on = slsam.active[slsam.runner.owner].tolist()

    passes = look_ahead_passes(twin, own, coming, wanted)
    passes.cut(wanted).run()
    ascent = {p: p.grad.clone() for p, drawn in zip(parameters, on, strict=True) if drawn}
    norm = torch.stack([g.norm() for g in ascent.values()]).norm()
    loss, expected = gradients_at(twin, own, {p: RHO * g / (norm + 1e-12) for p, g in ascent.items()})
    assert_close_to(
        {i: slsam.runner.parameters[i].grad for i in positions}, {i: expected[parameters[i]] for i in positions}
    )
    assert slsam.loss == pytest.approx(loss, rel=EXACT_FLOAT64)

    alone = mean_gradients(twin, join(own, coming, wanted).riding)
    following = [i for i in positions if not on[i]]
    assert_close_to(riding, {i: alone[parameters[i]] for i in following})
    assert slsam.runner.pairs, "nothing has ridden along"


@pytest.mark.parametrize("checkpointing", CHECKPOINTING.values(), ids=CHECKPOINTING)
def test_hooks_see_the_gradient_of_own_tokens_once(checkpointing):
    """Masking and scaling by hooks works; what rides along does not reach them."""
    own, coming, wanted = LAYOUTS["padded, a shorter one rides"]
    model = decoder(checkpointing=checkpointing, dropout=0.0)
    masked = arms_of(model)[0].parameters[0]
    seen = []
    slsam, _ = stepped(model, own, coming, wanted)
    masked.register_hook(lambda g: seen.append(g.clone()) or g * 0)
    slsam.accumulate(look_ahead_passes(model, coming, own, wanted))
    assert len(seen) == 1
    assert bool((seen[0] != 0).any())
    assert bool((masked.grad == 0).all())


class Mixing(nn.Module):
    """Adds the mean over its batch, or over what it takes for it."""

    def __init__(self, inner, dim):
        super().__init__()
        self.inner, self.dim = inner, dim

    def forward(self, x):
        y = self.inner(x)
        return y + 0.1 * y.mean(self.dim, keepdim=True)


class Turned(nn.Module):
    """Runs its adapter with the first two dimensions turned round, as time-first models do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


class Flat(Turned):
    """Runs its adapter on tokens without a batch dimension, as experts do."""

    def forward(self, x):
        return self.inner(x.flatten(0, 1)).view(*x.shape[:-1], -1)


class Reading(nn.Module):
    """Reads an adapter's weight, kept outside, beside calling it."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.weights = inner, [inner.lora_A["default"].weight]

    def forward(self, x):
        return self.inner(x) + 1e-3 * self.weights[0].sum()


NOT_SEPARABLE = {
    "sequences mixed": (lambda inner: Mixing(inner, 0), padded(3, 10)),
    "time first": (Turned, padded(3, 10)),
    "time first, as long as there are rows": (Turned, whole(6, 7)),
    "without a batch dimension": (Flat, padded(3, 10)),
    "read beside its module": (Reading, padded(3, 10)),
}


@pytest.mark.parametrize("case", NOT_SEPARABLE)
def test_what_is_not_separable_falls_back_to_a_pass_of_its_own(case, caplog):
    """One warning; this step and the next one are those of a model that never tried."""
    wrapped, own = NOT_SEPARABLE[case]
    coming = whole(1, 7, shift=5) if own["input_ids"].shape[1] == 7 else padded(2, 8, shift=5)
    runs = []
    for ascent in ("auto", "partial"):
        model = decoder(dropout=0.0)
        layer = model.get_base_model().model.layers[1].mlp
        layer.up_proj = wrapped(layer.up_proj)
        slsam = SLSAM(arms_of(model), SLSAMConfig(method="auto", ascent=ascent, rho=RHO), pairs=lora_pairs(model))
        gradients = []
        with caplog.at_level(logging.WARNING, logger="slsam_peft"):
            for this, following in ((own, coming), (coming, own)):
                slsam.accumulate(look_ahead_passes(model, this, following))
                gradients.append({i: p.grad.clone() for i, p in enumerate(slsam.runner.parameters)})
        runs.append((slsam, gradients))
    (slsam, got), (_, expected) = runs
    assert [r.message for r in caplog.records if "no sequence rides along" in r.message] == [
        r.message for r in caplog.records
    ][:1]
    assert slsam.runner.pairs == ()
    for one, other in zip(got, expected, strict=True):
        assert_close_to(one, other)


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_bad_riding_sequence_does_no_harm(fault):
    """The step is done again without it, and the next one makes its own ascent."""
    own, coming = padded(3, 10), padded(1, 8, shift=5)
    rows = len(own["input_ids"])
    results = []
    for poisoned in (True, False):
        model = decoder(dropout=0.0)
        slsam = SLSAM(arms_of(model), SLSAMConfig(method="auto", rho=RHO, seed=3), pairs=lora_pairs(model))
        passes = look_ahead_passes(model, own, coming if poisoned else None)
        head = model.get_base_model().lm_head

        def spoil(module, args, output):
            if len(output) > rows:
                bad = torch.ones_like(output)
                bad[rows:] = torch.nan
                if fault == "loss":
                    return output * bad
                if output.requires_grad:
                    output.register_hook(lambda g: g * bad)
            return output

        handle = head.register_forward_hook(spoil)
        state = torch.get_rng_state()
        loss = slsam.accumulate(passes)
        handle.remove()
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.isfinite(loss)
        results.append((slsam, model, loss, {i: p.grad.clone() for i, p in enumerate(slsam.runner.parameters)}))
    (slsam, model, _, got), (_, _, loss, expected) = results
    assert_close_to(got, expected)
    assert slsam.loss == pytest.approx(float(loss), rel=EXACT_FLOAT64)
    assert (slsam.skipped, slsam.memory.gradients) == (0, {})
    held = slsam.sampler.upcoming.mask
    slsam.accumulate(look_ahead_passes(model, coming, None))
    assert torch.equal(slsam.active, held), "the draw stands"
    assert slsam.metrics["rho"] == RHO


def test_what_is_frozen_is_left_alone_while_others_ride():
    own, coming, wanted = LAYOUTS["packed"]
    model, twin = (decoder(dropout=0.0) for _ in range(2))
    for m in (model, twin):
        for p in arms_of(m)[1].parameters[:3]:
            p.requires_grad_(False)
    everything = [p for arm in arms_of(decoder(dropout=0.0)) for p in arm.parameters]
    frozen = [n for n, p in model.named_parameters() if "lora_" in n and not p.requires_grad]
    assert 0 < len(frozen) < len(everything)
    for name in frozen:
        model.get_parameter(name).requires_grad_(True)
    arms, pairs = arms_of(model), lora_pairs(model)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    mask = torch.ones(len(arms), dtype=torch.bool)
    config = SLSAMConfig(rho=RHO, ascent="ahead", descent="all", active_fraction=1.0, ascent_sequences=wanted)
    slsam = SLSAM(arms, config, pairs=pairs)
    slsam.accumulate(look_ahead_passes(model, own, coming, wanted))
    assert bool(slsam.active.eq(mask).all())
    look_ahead_passes(twin, own, coming, wanted).cut(wanted).run()
    ascent = {p: p.grad.clone() for p in twin.parameters() if p.grad is not None}
    norm = torch.stack([g.norm() for g in ascent.values()]).norm()
    _, expected = gradients_at(twin, own, {p: RHO * g / (norm + 1e-12) for p, g in ascent.items()})
    names = {p: n for n, p in twin.named_parameters()}
    got = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert_close_to(got, {names[p]: g for p, g in expected.items()})
    assert [n for n, p in model.named_parameters() if "lora_" in n and not p.requires_grad] == frozen
    assert all(model.get_parameter(n).grad is None for n in frozen)


def test_nothing_rides_where_only_some_arms_are_trained():
    """The next step's arms would get no gradient from what rides along: their ascent is a pass of its own."""
    model = decoder(dropout=0.0)
    config = SLSAMConfig(rho=RHO, ascent="auto", active_fraction=0.5, descent="active", ascent_sequences=1)
    slsam = SLSAM(arms_of(model), config, pairs=lora_pairs(model))
    assert slsam.runner.pairs == ()
    own, coming, _ = LAYOUTS["padded, a shorter one rides"]
    for this, following in ((own, coming), (coming, own)):
        before = model.state_dict()
        slsam.accumulate(look_ahead_passes(model, this, following))
        assert slsam.metrics["grad_norm_ascent"] > 0
        assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())


def test_pairs_must_hold_all_that_is_trained():
    model = decoder(dropout=0.0, modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="only pairs of LoRA factors can"):
        SLSAM(arms_of(model), SLSAMConfig(ascent="ahead", descent="all"), pairs=lora_pairs(model))
    slsam = SLSAM(arms_of(model), SLSAMConfig(), pairs=lora_pairs(model))
    assert not slsam.ascent.rides


def failing(*args, **kwargs):
    raise KeyboardInterrupt


def in_the_head(backward):
    def hook(module, args, output):
        if not backward:
            raise KeyboardInterrupt
        if output.requires_grad:
            output.register_hook(failing)

    return lambda slsam, model, patch: model.get_base_model().lm_head.register_forward_hook(hook)


FAULTS = {
    "forward": in_the_head(backward=False),
    "backward": in_the_head(backward=True),
    "stacking": lambda slsam, model, patch: patch.setattr(stack._Both, "apply", failing),
    "halving": lambda slsam, model, patch: patch.setattr(stack.Stack, "_halve", failing),
    "numbers": lambda slsam, model, patch: patch.setattr(slsam, "_read", failing),
    "learning": lambda slsam, model, patch: patch.setattr(slsam.sampler, "learn", failing),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_exceptions_leave_everything_as_it_was(fault, monkeypatch):
    """Modules, generators, what has ridden along and the draw that stands; the next step is undisturbed."""
    own, coming, wanted = LAYOUTS["packed"]
    results = []
    for disturbed in (True, False):
        torch.manual_seed(3)
        model = decoder(dropout=0.1)
        slsam = SLSAM(arms_of(model), SLSAMConfig(method="auto"), pairs=lora_pairs(model))
        slsam.accumulate(look_ahead_passes(model, own, coming, wanted))
        parameters = list(model.named_parameters())
        if disturbed:
            before, random = slsam.state_dict(), torch.get_rng_state()
            with monkeypatch.context() as patch:
                handle = FAULTS[fault](slsam, model, patch)
                with pytest.raises(KeyboardInterrupt):
                    slsam.accumulate(look_ahead_passes(model, coming, own, wanted))
            if handle is not None:
                handle.remove()
            after = slsam.state_dict()
            assert before.keys() == after.keys()
            assert any(key.startswith("remembered.") for key in after)
            assert all(torch.equal(v, after[k]) if torch.is_tensor(v) else v == after[k] for k, v in before.items())
            assert torch.equal(random, torch.get_rng_state())
            assert all(p is q for (_, p), (_, q) in zip(parameters, model.named_parameters(), strict=True))
            assert all(not module._forward_hooks for pair in slsam.runner.pairs for module in pair)
            assert all(p.grad is None for p in model.parameters())
        slsam.accumulate(look_ahead_passes(model, coming, own, wanted))
        results.append({i: p.grad for i, p in enumerate(slsam.runner.parameters)})
    assert all(torch.equal(p, results[1][i]) for i, p in results[0].items())


def test_factors_with_a_bias_are_no_pairs():
    """Frozen or not: a pair that is not perturbed is computed without its module, which would add the bias."""
    model = get_peft_model(
        llama(attention_bias=True), lora(task_type="CAUSAL_LM", lora_bias=True, target_modules=["q_proj"])
    )
    assert lora_pairs(model) == []
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B.default.bias"):
            parameter.requires_grad_(False)
    assert lora_pairs(model) == []
