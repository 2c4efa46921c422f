"""The two-pass step written plainly: clone, run, move, run, put back. Slow, and easy to check against the paper."""

import numpy.random as np_random  # noqa: TID251 - some models draw from it
import torch

from tests.tolerances import EXACT_FLOAT64


def reference_step(arms, mask, rho, closure, trained=None):
    """Return the loss at w and the descent gradient of every parameter in arm order, `None` where it is not trained.

    Args:
        arms: The arms.
        mask: Perturbed arms, boolean, shape `(L,)`.
        rho: Radius.
        closure: Runs forward and backward on the batch and returns the loss.
        trained: Arms that get a descent gradient; those of `mask` where it is missing.
    """
    random_state = random_state_now()
    loss, ascent = gradients_of(arms, mask, closure)
    after = random_state_now()
    set_random_state(random_state)
    _, gradients = descent_of(arms, ascent, rho, closure, mask if trained is None else trained)
    set_random_state(after)
    return loss, gradients


def gradients_of(arms, mask, closure):
    """Run a pass at the weights as they are; return its loss and the gradients of the arms in a mask, by parameter."""
    clear(arms)
    loss = closure().detach()
    flags = zip(arms, mask.tolist(), strict=True)
    gradients = {p: p.grad.clone() for arm, on in flags if on for p in arm.parameters if p.grad is not None}
    clear(arms)
    return loss, gradients


def descent_of(arms, ascent, rho, closure, trained):
    """Return the loss at w + e and the gradient there of every parameter in arm order; w is put back.

    Args:
        arms: The arms.
        ascent: The ascent gradient of those parameters that move.
        rho: Length of e.
        closure: As in `reference_step`.
        trained: As in `reference_step`.
    """
    norm = sum(((g**2).sum() for g in ascent.values()), torch.zeros(())).sqrt()
    saved = {p: p.detach().clone() for p in ascent}
    with torch.no_grad():
        for p, g in ascent.items():
            p.add_(rho * g / (norm + 1e-12))
    loss, found = gradients_of(arms, trained, closure)
    with torch.no_grad():
        for p, w in saved.items():
            p.copy_(w)
    return loss, [found.get(p) for arm in arms for p in arm.parameters]


def clear(arms):
    """Drop every gradient."""
    for arm in arms:
        for p in arm.parameters:
            p.grad = None


def random_state_now():
    """Return the state of the generators that models draw from."""
    return torch.get_rng_state(), np_random.get_state()


def set_random_state(state):
    """Put back what `random_state_now` returned."""
    torch.set_rng_state(state[0])
    np_random.set_state(state[1])


def assert_step_is_exact(slsam, mask, closure, forward_only):
    """Check one step that draws `mask` against the reference: loss, gradients, weights, random state, switches."""
    parameters = [p for arm in slsam.arms for p in arm.parameters]
    trained = torch.ones_like(mask) if slsam.config.descent == "all" else mask
    state = random_state_now()
    loss, expected = reference_step(slsam.arms, mask, slsam.config.rho, closure, trained)
    after = torch.get_rng_state()
    weights = [p.detach().clone() for p in parameters]
    set_random_state(state)
    got = slsam.update(closure, forward_only=forward_only)
    assert torch.equal(slsam.active, mask)
    assert float(got) == float(loss)
    assert torch.equal(torch.get_rng_state(), after)
    assert all(torch.equal(p, w) for p, w in zip(parameters, weights, strict=True))
    assert all(p.requires_grad for p in parameters)
    assert_gradients_are(expected, parameters)


def assert_gradients_are(expected, parameters, tolerance=EXACT_FLOAT64):
    """Check `.grad` of each parameter, `None` included, to a tolerance times the largest entry of any of them."""
    largest = max(float(e.abs().max()) for e in expected if e is not None)
    for p, e in zip(parameters, expected, strict=True):
        assert (p.grad is None) == (e is None)
        if e is not None:
            torch.testing.assert_close(p.grad, e, rtol=tolerance, atol=tolerance * largest)
