"""The contract of one step: gradients, weights, and nothing left behind, whatever happens in the closure."""

import logging

import pytest
import torch
from torch import nn

from slsam_peft import SLSAM, SLSAMConfig, arms_of
from slsam_peft.algorithm.ascents import Ahead
from slsam_peft.algorithm.sampa import Sampa
from slsam_peft.algorithm.step import Cut, Passes
from slsam_peft.algorithm.telemetry import RadiusWatch
from slsam_peft.trainer.riding import lora_pairs
from tests.decoders import batch, closures, decoder
from tests.look_ahead import look_ahead_passes
from tests.reference import assert_gradients_are, reference_step
from tests.tolerances import EXACT_FLOAT64


def network():
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1)]
    return nn.Sequential(*layers).double()


def problem(**settings):
    model = network()
    x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    calls = []

    def closure():
        calls.append(1)
        loss = (model(x) - 1).square().mean()
        loss.backward()
        return loss

    return model, SLSAM(arms_of(model, "module"), SLSAMConfig(**settings)), closure, calls


def snapshot(model, slsam):
    state = slsam.state_dict()
    return (
        [p.detach().clone() for p in model.parameters()],
        [p.requires_grad for p in model.parameters()],
        {k: v.clone() if torch.is_tensor(v) else v for k, v in state.items()},
        sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
    )


def same(a, b):
    return (
        all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))
        and a[1] == b[1]
        and a[2].keys() == b[2].keys()
        and all(
            torch.equal(torch.nan_to_num(v), torch.nan_to_num(b[2][k])) if torch.is_tensor(v) else v == b[2][k]
            for k, v in a[2].items()
        )
        and a[3] == b[3]
    )


def test_active_arms_get_the_descent_gradient_and_the_others_none():
    model, slsam, closure, calls = problem(active_fraction=0.5)
    for _ in range(20):
        weights = [p.detach().clone() for p in model.parameters()]
        slsam.update(closure)
        for arm, on in zip(slsam.arms, slsam.active.tolist(), strict=True):
            assert all((p.grad is not None) == on for p in arm.parameters)
        assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert len(calls) == 40
    assert slsam.active.dtype == torch.bool
    assert slsam.probabilities.dtype == torch.float64


def test_no_radius_means_one_pass_and_the_plain_gradient():
    model, slsam, closure, calls = problem(rho=0.0, active_fraction=1.0)
    slsam.update(closure)
    assert len(calls) == 1
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    closure()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), got, strict=True))


def test_a_stale_ascent_takes_one_pass_and_perturbs_from_the_second_on():
    _, slsam, closure, calls = problem(ascent="remembered", rho=0.3, active_fraction=1.0)
    losses = [float(slsam.update(closure)) for _ in range(2)]
    assert len(calls) == 2
    assert losses[1] > losses[0]
    assert slsam.memory.bytes == 2 * sum(p.numel() for arm in slsam.arms for p in arm.parameters)


def test_partial_ascent_needs_a_part():
    _, slsam, closure, _ = problem(ascent="partial", active_fraction=1.0)
    with pytest.raises(ValueError, match="ascent_closure"):
        slsam.update(closure)
    slsam.update(closure, ascent_closure=closure)


def riding(**settings):
    """Return an algorithm in whose passes sequences may ride along, and what runs its model on two batches."""
    model = decoder(dropout=0.0)
    slsam = SLSAM(arms_of(model), SLSAMConfig(method="auto", rho=0.2, **settings), pairs=lora_pairs(model))
    slsam.learning_rate = lambda parameter: 0.05
    return model, slsam


@pytest.mark.parametrize("ascent", ["ahead", "sampa"])
def test_an_update_from_one_batch_refuses_a_look_at_the_next_one(ascent):
    """It would be dense SAM or a small pass, under another name."""
    model, slsam = riding(ascent=ascent)
    closure, _ = closures(model, batch())
    with pytest.raises(
        ValueError, match=rf"ascent='{ascent}' .*update\(\) sees one batch alone.*use ascent='partial'"
    ):
        slsam.update(closure, closure)
    assert slsam.steps == 0
    plain = SLSAM(slsam.arms, SLSAMConfig(method="auto", ascent=ascent, rho=0.0))
    plain.update(closure)
    assert plain.steps == 1


ALONE = {
    "an object in update": (Ahead(1), True),
    "sampa as an object in update": (Sampa(1), True),
    "auto in update": ("auto", True),
    "a name in passes without riding": ("ahead", False),
    "sampa in passes without riding": ("sampa", False),
}


@pytest.mark.parametrize("part", [True, False], ids=["a part", "whole"])
@pytest.mark.parametrize("case", ALONE)
def test_it_is_told_once_that_nothing_rides_along(case, part, caplog):
    """And what its ascent costs in its place."""
    ascent, updates = ALONE[case]
    model, slsam = riding(ascent=ascent)
    assert slsam.runner.pairs
    closure, _ = closures(model, batch())
    for _ in range(4):
        if updates:
            slsam.update(closure, closure if part else None)
        else:
            cut = (lambda wanted: Cut(closure)) if part else None
            slsam.accumulate(Passes(closure, closure, cut=cut, sequences=4 if part else None, whole=not part))
        assert slsam.memory.bytes == 0
    told = ["no sequence rides along in the pass of another batch"]
    told += [] if part else ["the ascent is made by the whole batch"]
    assert sorted(fallback.what for fallback in slsam.fallbacks) == sorted(told)
    assert sum("rides along" in record.message for record in caplog.records) == 1


def test_an_epochs_first_and_last_step_tell_nothing():
    """Nor does one that is alone since the step before it was skipped."""
    model, slsam = riding(ascent="ahead")
    one, two = batch(rows=4), batch(rows=4)
    for own, following in ((one, two), (two, None), (two, one), (one, None)):
        slsam.accumulate(look_ahead_passes(model, own, following))
    assert not slsam.fallbacks
    slsam.memory.replace({})
    slsam.accumulate(look_ahead_passes(model, one, None))
    assert not slsam.fallbacks


def test_the_sampling_scheme_is_called_once_per_step():
    drawn = []

    def design(p, generator):
        drawn.append(1)
        return torch.tensor([True, False, True])

    _, slsam, closure, _ = problem(design=design, active_fraction=0.6)
    assert drawn == []
    for i in range(3):
        slsam.update(closure)
        assert len(drawn) == i + 1
        assert slsam.active.tolist() == [True, False, True]


@pytest.mark.parametrize("ascent", ["two_pass", "remembered"])
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("where", ["before", "after"])
def test_an_exception_leaves_everything_as_it_was(ascent, call, where):
    model, slsam, closure, calls = problem(active_fraction=0.5, rho=0.2, design="fixed_size", ascent=ascent)
    slsam.update(closure)
    model.zero_grad()
    before = snapshot(model, slsam)
    calls.clear()

    def faulty():
        if where == "before" and len(calls) + 1 == call:
            raise KeyboardInterrupt
        loss = closure()
        if len(calls) == call:
            raise KeyboardInterrupt
        return loss

    if ascent == "remembered" and call == 2:
        slsam.update(faulty)  # one pass: the second call never comes
        return
    with pytest.raises(KeyboardInterrupt):
        slsam.update(faulty)
    assert same(before, snapshot(model, slsam))
    assert all(p.grad is None for p in model.parameters())
    twin_model, twin, twin_closure, _ = problem(active_fraction=0.5, rho=0.2, design="fixed_size", ascent=ascent)
    twin.update(twin_closure)
    assert float(slsam.update(closure)) == float(twin.update(twin_closure))
    assert torch.equal(slsam.active, twin.active)
    assert torch.equal(slsam.probabilities, twin.probabilities)
    del twin_model


@pytest.mark.parametrize("bad_pass", [1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_skips_the_whole_step(bad_pass, value):
    model, slsam, closure, calls = problem(active_fraction=1.0, max_skipped_steps=1)
    before, parameters = slsam.probabilities.clone(), list(model.parameters())

    def faulty():
        loss = closure()
        if len(calls) % 2 == bad_pass % 2:
            for p in parameters:
                p.grad = torch.full_like(p, value)
        return loss

    slsam.update(faulty)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(slsam.probabilities, before)
    assert slsam.skipped == 1
    with pytest.raises(RuntimeError, match="2 steps in a row had a NaN or infinite"):
        slsam.update(faulty)
    slsam.update(closure)
    assert slsam.metrics["grad_norm_ascent"] > 0


@pytest.mark.parametrize("settings", [{}, {"ascent": "remembered"}, {"design": "fixed_size"}, {"bandit": "paper"}])
def test_state_goes_on_bit_for_bit(settings):
    def run(slsam, closure, model, steps):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(steps):
            slsam.update(closure)
            optimizer.step()

    settings = {"active_fraction": 0.5, "rho": 0.2, **settings}
    model, slsam, closure, _ = problem(**settings)
    run(slsam, closure, model, 4)
    state, weights = slsam.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    run(slsam, closure, model, 4)
    other, twin, twin_closure, _ = problem(**settings)
    other.load_state_dict(weights)
    twin.load_state_dict(state)
    run(twin, twin_closure, other, 4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert torch.equal(slsam.probabilities, twin.probabilities)
    assert torch.equal(slsam.active, twin.active)


def test_state_of_other_arms_is_refused_and_changes_nothing():
    model, slsam, closure, _ = problem(active_fraction=0.5)
    slsam.update(closure)
    before = snapshot(model, slsam)
    other = SLSAM(arms_of(model, "tensor"), SLSAMConfig(active_fraction=0.5))
    with pytest.raises(ValueError, match="saved for 6 arms and this model has 3; the first difference is '0.weight'"):
        slsam.load_state_dict(other.state_dict())
    assert same(before, snapshot(model, slsam))


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("descent", ["active", "all"])
def test_micro_batches_add_up_to_one_batch(count, descent):
    """A step of micro-batches of unequal length is that of their union: same arms, same e, same gradient."""
    model = decoder("llama", dropout=0.0)
    arms = arms_of(model)
    mask = torch.arange(len(arms)) >= 2
    parts = [batch(2, 6 + 2 * i) for i in range(count)]
    total = sum(int((p["labels"][:, 1:] != -100).sum()) for p in parts)

    def part(inputs):
        def run():
            loss = model(**inputs, num_items_in_batch=total).loss
            loss.backward()
            return loss

        def forward_only():
            with torch.no_grad():
                return model(**inputs, num_items_in_batch=total).loss

        return Passes(run, run, forward_only)

    def whole():
        return sum(part(p).logged() for p in parts)

    trained = torch.ones_like(mask) if descent == "all" else mask
    loss, expected = reference_step(arms, mask, 0.1, whole, trained)
    slsam = SLSAM(arms, SLSAMConfig(rho=0.1, active_fraction=0.9, design=lambda p, g: mask, descent=descent))
    losses = [slsam.accumulate(part(p), i, count) for i, p in enumerate(parts)]
    assert float(sum(losses)) == pytest.approx(float(loss), rel=EXACT_FLOAT64)
    assert_gradients_are(expected, [p for arm in arms for p in arm.parameters])


def test_a_parameter_whose_module_is_not_called_is_moved_in_place():
    """The head's weight is read, its module never called."""
    torch.manual_seed(0)
    body, head = nn.Linear(3, 3, bias=False).double(), nn.Linear(3, 2, bias=False).double()
    model, x = nn.ModuleDict({"body": body, "head": head}), torch.randn(5, 3, dtype=torch.float64)

    def closure():
        loss = (body(x).tanh() @ head.weight.T).square().mean()
        loss.backward()
        return loss

    arms = arms_of(model, "module")
    mask = torch.ones(2, dtype=torch.bool)
    _, expected = reference_step(arms, mask, 0.5, closure)
    SLSAM(arms, SLSAMConfig(rho=0.5, active_fraction=1.0)).update(closure)
    assert_gradients_are(expected, [p for arm in arms for p in arm.parameters])


def test_less_than_one_arm_is_refused_except_for_the_paper():
    with pytest.raises(ValueError, match=r"active_fraction=0.1 of 3 arms is less than one arm; use at least 0.333"):
        problem(active_fraction=0.1)
    problem(active_fraction=0.1, bandit="paper")
    assert problem()[1].sampler.bandit.budget == 1.0


def test_a_budget_needs_a_cost_model():
    with pytest.raises(ValueError, match="cost_budget=1.0 needs a cost model"):
        problem(cost_budget=1.0)


def test_the_watch_warns_once_when_half_of_the_first_gains_are_low(caplog):
    quiet, loud = RadiusWatch(), RadiusWatch()
    with caplog.at_level(logging.WARNING, logger="slsam_peft"):
        for i in range(60):
            quiet.see({"rho": 0.05, "ascent_gain": 1.0 if i % 9 else 0.1})
            loud.see({"rho": 0.003, "ascent_gain": 1.5 if i % 2 else -0.3} if i % 3 else {"rho": 0.003})
    assert len(caplog.records) == 1, "of those only the second is lost, and it says so once"
    assert "length 0.003" in caplog.records[0].message
    assert "in 10 of the first 20 steps" in caplog.records[0].message


@pytest.mark.parametrize("returned", [None, "1", {"loss": 1.0}, torch.ones(3)])
def test_a_closure_that_returns_no_loss_is_told_so(returned):
    model, slsam, closure, _ = problem(active_fraction=0.5)
    before = snapshot(model, slsam)
    with pytest.raises(TypeError, match=r"the closure returned .*; it must return its loss"):
        slsam.update(lambda: closure() and returned)
    assert same(snapshot(model, slsam), before)


@pytest.mark.parametrize("returned", [None, "all", [0, 2], torch.ones(3), torch.zeros(3, dtype=torch.bool)])
def test_what_a_callable_sampling_scheme_returns_is_checked(returned):
    model, slsam, closure, calls = problem(active_fraction=0.5, design=lambda p, generator: returned)
    with pytest.raises(
        ValueError, match=r"the sampling scheme returned .*; it must return a boolean mask of shape \(3,\)"
    ):
        slsam.update(closure)
    assert not calls


def test_a_sampling_scheme_may_use_its_tensor_again():
    mask = torch.tensor([True, False, False])
    _, slsam, closure, _ = problem(active_fraction=0.5, design=lambda p, generator: mask)
    slsam.update(closure)
    mask.fill_(True)
    assert slsam.active.tolist() == [True, False, False]


def test_a_parameter_in_two_arms_is_refused():
    arms = arms_of(network(), "module")
    with pytest.raises(ValueError, match=r"0\.weight comes twice in the arms"):
        SLSAM([*arms, arms[0]], SLSAMConfig(active_fraction=0.5))


def test_parts_without_a_method_are_told_to_bring_others_along(caplog):
    """Not where a method is named, where every part is, or where a trainer has resolved them already."""
    arms = arms_of(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)), "module")
    parts = {"bandit": "uniform", "design": "fixed_size", "ascent": "two_pass", "descent": "all"}
    for config in (SLSAMConfig(), SLSAMConfig(rho=0.1), SLSAMConfig(method="paper"), SLSAMConfig(**parts)):
        SLSAM(arms, config)
    assert not caplog.records
    given = SLSAMConfig(active_fraction=0.5, bandit="uniform")
    SLSAM(arms, given)
    (told,) = caplog.messages
    assert "these: design=bernoulli, ascent=two_pass, descent=active." in told
    SLSAM(arms, given.resolved)
    assert len(caplog.records) == 1
