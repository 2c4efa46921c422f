"""e(w): the branch equals moving the weight, and whatever is moved comes back bit for bit."""

import pytest
import torch
from torch import nn

from slsam_peft.algorithm.perturbation import Firings, Shift, ascent_offsets, perturbed
from tests.tolerances import EXACT_FLOAT64


def factors(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 2, bias=False), nn.Linear(2, 5, bias=False)).to(dtype)


def loss_of(model, x):
    loss = model(x).tanh().square().mean()
    loss.backward()
    return loss.detach()


def shifts_of(model, rho, branch):
    offsets = ascent_offsets([p.grad.clone() for p in model.parameters()], torch.tensor(1.0).to(model[0].weight), rho)
    return [Shift(m.weight, e, m if branch else None) for m, e in zip(model, offsets, strict=True)]


def test_the_branch_gives_the_loss_and_gradients_at_w_plus_e():
    model, x = factors(), torch.randn(4, 6, dtype=torch.float64)
    loss_of(model, x)
    results = []
    for branch in (False, True):
        shifts = shifts_of(model, 0.3, branch)
        gradients = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        with perturbed(shifts):
            loss = loss_of(model, x)
        results.append((loss, [p.grad.clone() for p in model.parameters()]))
        for p, g in zip(model.parameters(), gradients, strict=True):
            p.grad = g
    (loss, inplace), (other, branched) = results
    torch.testing.assert_close(other, loss, rtol=EXACT_FLOAT64, atol=0)
    for a, b in zip(inplace, branched, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=EXACT_FLOAT64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fails", [False, True])
def test_weights_come_back_bit_for_bit_and_hooks_go(dtype, fails):
    model = factors(dtype)
    before = [p.detach().clone() for p in model.parameters()]
    offsets = [torch.full_like(p, 0.3) for p in model.parameters()]
    shifts = [Shift(model[0].weight, offsets[0], None), Shift(model[1].weight, offsets[1], model[1])]

    def run():
        with perturbed(shifts):
            assert not torch.equal(model[0].weight, before[0])
            assert torch.equal(model[1].weight, before[1])
            if fails:
                raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            run()
    else:
        run()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
    assert not any(m._forward_hooks for m in model.modules())


def test_a_weight_moved_inside_autocast_is_seen():
    """autocast keeps low-precision copies of float32 weights; a stale one would give the same loss twice."""
    model, x = factors(torch.float32), torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        before = model(x).square().sum().item()
        with perturbed([Shift(model[0].weight, torch.ones_like(model[0].weight), None)]):
            moved = model(x).square().sum().item()
        after = model(x).square().sum().item()
    assert moved != before
    assert after == before


def test_offsets_have_the_radius_and_the_direction():
    gradients = [torch.randn(3, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
    norm = torch.sqrt(sum(g.square().sum() for g in gradients))
    offsets = ascent_offsets(gradients, norm, 0.2)
    assert float(torch.sqrt(sum(e.square().sum() for e in offsets))) == pytest.approx(0.2, rel=EXACT_FLOAT64)
    torch.testing.assert_close(offsets[0] / offsets[0].norm(), gradients[0] / gradients[0].norm())


def test_a_module_that_is_not_called_does_not_fire():
    model, firings = factors(), Firings()
    with firings.watch(list(model)):
        model[0](torch.randn(2, 6, dtype=torch.float64))
    assert firings.fired == {model[0]}
    with firings.watch(list(model)):
        pass
    assert firings.fired == set()
