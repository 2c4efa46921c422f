"""What a radius of a user keeps goes into the state and comes back; one that keeps nothing leaves no trace in it."""

import pytest
import torch

from slsam_peft import SLSAM, SLSAMConfig, arms_of
from slsam_peft.algorithm.radius import Length, Offsets
from tests.decoders import batch, closures, decoder
from tests.stateful import Following, Saved


def algorithm(radius, model=None):
    """Return an algorithm over a decoder, and its step."""
    model = decoder(dropout=0.0) if model is None else model
    slsam = SLSAM(arms_of(model), SLSAMConfig(method="sam", radius=radius))
    closure, forward_only = closures(model, batch())
    return slsam, lambda: slsam.update(closure, forward_only=forward_only)


def gradients(slsam):
    return [p.grad.clone() for p in slsam.parameters if p.grad is not None]


def test_it_goes_on_bit_for_bit():
    model = decoder(dropout=0.0)
    slsam, step = algorithm(Following(), model)
    for _ in range(3):
        step()
    saved = slsam.state_dict()
    other, again = algorithm(Following(), model)
    other.load_state_dict(saved)
    lengths = []
    for each, go_on in ((slsam, step), (other, again)):
        found = [(go_on(), each.metrics["rho"]) for _ in range(2)]
        lengths.append([rho for _, rho in found])
    assert lengths[0] == lengths[1]
    assert all(torch.equal(a, b) for a, b in zip(gradients(slsam), gradients(other), strict=True))
    fresh, first = algorithm(Following(), model)
    first()
    assert fresh.metrics["rho"] != lengths[0][0], "the case shows nothing where a fresh one is as long"


def test_a_state_is_not_changed_by_later_steps():
    """It holds copies: this radius writes into the one tensor that it hands out."""
    slsam, step = algorithm(Following())
    step()
    saved = slsam.state_dict()
    mean = saved["radius.mean"].clone()
    step()
    assert torch.equal(saved["radius.mean"], mean)
    assert not torch.equal(slsam.state_dict()["radius.mean"], mean)


class Short:
    """A radius of a user that keeps nothing."""

    def offsets(self, gradients, weights, norm, unit):
        return Offsets([0.1 * g / norm for g in gradients], torch.full_like(norm, 0.1))


@pytest.mark.parametrize("kind", [Short, lambda: Length(0.1)], ids=["a user's", "ours"])
def test_what_keeps_nothing_leaves_no_trace(kind):
    slsam, step = algorithm(kind())
    step()
    saved = slsam.state_dict()
    assert not [key for key in saved if key.startswith("radius")]
    other, _ = algorithm(kind())
    other.load_state_dict(saved)


MISMATCHES = {
    "it takes none": (Following, Short, r"the state holds 'mean', and <.*Short object.* has no load_state_dict"),
    "it reads none": (Saved, Saved, r"the state holds 'mean', and <.*Saved object.* has no load_state_dict"),
    "there is none": (Short, Following, "the state has no 'mean', which Following keeps"),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(case):
    saving, loading, message = MISMATCHES[case]
    slsam, step = algorithm(saving())
    step()
    other, go_on = algorithm(loading())
    go_on()
    go_on()
    before = other.state_dict()
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(slsam.state_dict())
    after = other.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(v, after[k]) if torch.is_tensor(v) else v == after[k] for k, v in before.items())


def test_a_void_step_teaches_it_nothing():
    """It has seen the gradient before the loss at w + e shows that the step is void."""
    model = decoder(dropout=0.0)
    radius = Following()
    slsam, step = algorithm(radius, model)
    closure, _ = closures(model, batch())
    step()
    mean, calls = radius.mean.clone(), []

    def spoiled():
        calls.append(closure())
        return calls[-1] * (float("nan") if len(calls) == 2 else 1.0)

    slsam.update(spoiled)
    assert (len(calls), slsam.skipped) == (2, 1)
    assert torch.equal(radius.mean, mean)
    slsam.update(closure)
    assert slsam.skipped == 1
    assert not torch.equal(radius.mean, mean)
