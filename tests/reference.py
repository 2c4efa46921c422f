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
    trained = mask if trained is None else trained
    flags = zip(arms, mask.tolist(), trained.tolist(), strict=True)
    rows = [(p, on, kept) for arm, on, kept in flags for p in arm.parameters]

    def clear():
        for p, _, _ in rows:
            p.grad = None

    clear()
    random_state = torch.get_rng_state(), np_random.get_state()
    loss = closure().detach()
    ascent = [(p, p.grad.clone()) for p, on, _ in rows if on and p.grad is not None]
    after = torch.get_rng_state(), np_random.get_state()
    norm = torch.stack([torch.zeros((), dtype=loss.dtype), *((g**2).sum() for _, g in ascent)]).sum().sqrt()
    clear()
    saved = [p.detach().clone() for p, _ in ascent]
    with torch.no_grad():
        for p, g in ascent:
            p.add_(rho * g / (norm + 1e-12))
    _set_random_state(random_state)
    closure()
    _set_random_state(after)
    with torch.no_grad():
        for (p, _), w in zip(ascent, saved, strict=True):
            p.copy_(w)
    gradients = [p.grad.clone() if kept and p.grad is not None else None for p, _, kept in rows]
    clear()
    return loss, gradients


def _set_random_state(state):
    torch.set_rng_state(state[0])
    np_random.set_state(state[1])


def assert_step_is_exact(slsam, mask, closure, forward_only):
    """Check one step that draws `mask` against the reference: loss, gradients, weights, random state, switches."""
    parameters = [p for arm in slsam.arms for p in arm.parameters]
    trained = torch.ones_like(mask) if slsam.config.descent == "all" else mask
    state = torch.get_rng_state(), np_random.get_state()
    loss, expected = reference_step(slsam.arms, mask, slsam.config.rho, closure, trained)
    after = torch.get_rng_state()
    weights = [p.detach().clone() for p in parameters]
    _set_random_state(state)
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
