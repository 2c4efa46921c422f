"""The two-pass update written plainly: clone, run, move, run, put back. Slow, and easy to check against the paper."""

import torch


def reference_update(arms, mask, rho, closure, trained=None):
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
    random_state = torch.get_rng_state()
    loss = closure().detach()
    ascent = [(p, p.grad.clone()) for p, on, _ in rows if on and p.grad is not None]
    after = torch.get_rng_state()
    norm = torch.sqrt(sum((g**2).sum() for _, g in ascent))
    clear()
    saved = [p.detach().clone() for p, _ in ascent]
    with torch.no_grad():
        for p, g in ascent:
            p.add_(rho * g / (norm + 1e-12))
    torch.set_rng_state(random_state)
    closure()
    torch.set_rng_state(after)
    with torch.no_grad():
        for (p, _), w in zip(ascent, saved, strict=True):
            p.copy_(w)
    gradients = [p.grad.clone() if kept and p.grad is not None else None for p, _, kept in rows]
    clear()
    return loss, gradients
