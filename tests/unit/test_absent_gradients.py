"""What reads the gradient of every parameter passes over those without one: what was not drawn stays as it was."""

import copy
from itertools import pairwise

import peft
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer

from slsam_peft import SLSAM, SLSAMConfig, arms_of
from slsam_peft.algorithm import absent
from slsam_peft.algorithm.absent import keep_importance, pass_over_absent_pairs
from tests.decoders import adapted, batch, closures
from tests.tolerances import EXACT_FLOAT64

TARGETS = {"target_modules": ["q_proj", "v_proj"]}
RATE = 1e-2


def adalora(**settings):
    shape = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1, "total_step": 12}
    return adapted(peft.AdaLoraConfig(**{**shape, "task_type": "CAUSAL_LM", **TARGETS, **settings}))


def lora():
    return adapted(peft.LoraConfig(r=2, lora_alpha=4, **TARGETS))


OPTIMIZERS = {
    "LoRA-FA": lambda model: create_lorafa_optimizer(model, r=2, lora_alpha=4, lr=RATE, weight_decay=0.1),
    "LoRA+": lambda model: create_loraplus_optimizer(
        model, optimizer_cls=torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=16
    ),
    "Riemannian": lambda model: create_riemannian_optimizer(model, torch.optim.AdamW, lr=RATE),
}


def drawing(*masks):
    """Return settings that draw these arms, step by step."""
    draws = iter(masks)
    return SLSAMConfig(rho=0.05, active_fraction=0.5, design=lambda p, g: torch.tensor(next(draws)) > 0)


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_of_peft_leave_arms_alone_that_are_not_drawn(name):
    model = lora()
    optimizer = OPTIMIZERS[name](model)
    slsam = SLSAM(arms_of(model), drawing([1, 0, 0, 1, 0], [0, 1, 0, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 0, 1]))
    closure, _ = closures(model, batch())
    for _ in range(4):
        before = trained(model)
        slsam.update(closure)
        optimizer.step()
        for arm, active in zip(slsam.arms, slsam.active.tolist(), strict=True):
            moved = [not torch.equal(before[n], model.get_parameter(n)) for n in arm.parameter_names]
            assert all(moved) if active else not any(moved)


def test_lora_fa_counts_a_pairs_own_steps():
    """A pair that was drawn in two of three steps has the moments of a training of those two steps."""
    ours, plain = lora(), lora()
    optimizer, reference = OPTIMIZERS["LoRA-FA"](ours), OPTIMIZERS["LoRA-FA"](plain)
    SLSAM(arms_of(ours), SLSAMConfig(rho=0.05))
    closure, _ = closures(plain, batch())
    closure()
    pairs = [name for name, p in plain.named_parameters() if p.grad is not None]
    out = pairs[::2]
    for step in range(3):
        for name in pairs:
            ours.get_parameter(name).grad = (step + 1) * plain.get_parameter(name).grad
        for name in out if step == 1 else ():
            ours.get_parameter(name).grad = None
        optimizer.step()
    gradients = {name: plain.get_parameter(name).grad for name in pairs}
    for step in (0, 2):
        for name in pairs:
            plain.get_parameter(name).grad = (step + 1) * gradients[name]
        reference.step()
    for name in pairs:
        same = torch.equal(ours.get_parameter(name), plain.get_parameter(name))
        assert same == (name in out)


def test_lora_fa_knows_its_pairs_again_after_a_step_and_after_one_that_raised(monkeypatch):
    model = lora()
    optimizer = OPTIMIZERS["LoRA-FA"](model)
    names = list(optimizer.param_groups[0]["names"])
    SLSAM(arms_of(model), SLSAMConfig(rho=0.05))
    optimizer.step()  # a skipped step: nothing has a gradient
    assert optimizer.param_groups[0]["names"] == names
    assert not optimizer.state

    def broken(*args, **kwargs):
        raise RuntimeError("no inverse")

    closures(model, batch())[0]()
    next(p for p in model.parameters() if p.grad is not None).grad = None
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "pinv", broken)
        with pytest.raises(RuntimeError, match="no inverse"):
            optimizer.step()
    optimizer.step()
    assert optimizer.param_groups[0]["names"] == names
    assert all(state["step"] == 1 for state in optimizer.state.values())


def test_other_optimizers_are_not_touched():
    SLSAM(arms_of(lora()), SLSAMConfig(rho=0.05))
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([{"params": [weight], "names": ["x.lora_A.w"]}], lr=1.0)
    weight.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(weight, torch.zeros(2))
    assert optimizer.param_groups[0]["names"] == ["x.lora_A.w"]


def test_adalora_keeps_the_importance_of_what_was_not_drawn():
    """Each parameter's importance is the running mean over the steps that gave it a gradient, written plainly here."""
    model = adalora()
    allocator = model.base_model.rankallocator
    arms = arms_of(model)
    slsam = SLSAM(arms, drawing([1, 0, 1, 0, 0], [0, 1, 0, 0, 1], [1, 0, 0, 0, 0]))
    closure, _ = closures(model, batch())
    expected = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in model.base_model.model.named_parameters()}
    optimizer = torch.optim.SGD([p for arm in arms for p in arm.parameters], lr=RATE)
    for step in range(3):
        slsam.update(closure)
        optimizer.step()
        for name, parameter in model.base_model.model.named_parameters():
            if parameter.grad is not None:
                mean, unsure = expected[name]
                seen = (parameter * parameter.grad).abs().detach()
                mean = allocator.beta1 * mean + (1 - allocator.beta1) * seen
                expected[name] = mean, allocator.beta2 * unsure + (1 - allocator.beta2) * (seen - mean).abs()
        model.base_model.update_and_allocate(step)
    assert allocator.exp_avg_ipt
    assert any(not mean.any() for mean in allocator.exp_avg_ipt.values()), "one arm is never drawn"
    for name, mean in allocator.exp_avg_ipt.items():
        torch.testing.assert_close(mean, expected[name][0], rtol=EXACT_FLOAT64, atol=0.0)
        torch.testing.assert_close(allocator.exp_avg_unc[name], expected[name][1], rtol=EXACT_FLOAT64, atol=0.0)


def test_adalora_reaches_its_budget_under_sampling():
    model = adalora()
    slsam = SLSAM(arms_of(model), SLSAMConfig(rho=0.05, active_fraction=0.5, seed=1))
    closure, _ = closures(model, batch())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    ranks = []
    for step in range(13):
        slsam.update(closure)
        optimizer.step()
        model.base_model.update_and_allocate(step)
        ranks.append(sum(int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n))
    pairs = sum("lora_E" in n for n, _ in model.named_parameters())
    assert ranks[0] == 4 * pairs
    assert 0 < ranks[-1] <= 2 * pairs
    assert any(a > b for a, b in pairwise(ranks))


def test_a_copy_of_the_model_has_an_allocator_of_its_own():
    model = adalora()
    SLSAM(arms_of(model), SLSAMConfig(rho=0.05, active_fraction=0.5))
    other = copy.deepcopy(model)
    other.base_model.update_and_allocate(0)
    assert other.base_model.rankallocator.ipt
    assert not model.base_model.rankallocator.ipt


def test_an_allocator_that_was_loaded_is_guarded_again():
    """Unpickled, it has the method of its class in the place of the one that it was given."""
    model = adalora()
    allocator = model.base_model.rankallocator
    allocator.update_ipt = allocator.update_ipt
    keep_importance([allocator])
    model.base_model.update_and_allocate(0)
    assert not any(seen.any() for seen in allocator.ipt.values())


def test_what_adalora_does_with_arms_that_are_not_drawn_is_said(caplog):
    SLSAM(arms_of(adalora()), SLSAMConfig(method="auto"))
    assert not caplog.records
    SLSAM(arms_of(adalora()), SLSAMConfig(method="paper"))
    assert "its importance stays what it was when it was last trained" in caplog.text


def test_a_plain_training_with_lora_fa_is_what_it_is_without_our_hooks():
    """They hang on all optimizers of the process: where each pair has a gradient, nothing changes by a bit."""

    def weights():
        model = lora()
        optimizer = OPTIMIZERS["LoRA-FA"](model)
        closure, _ = closures(model, batch())
        for _ in range(3):
            closure()
            optimizer.step()
            optimizer.zero_grad()
        return trained(model)

    pass_over_absent_pairs()
    hooked = weights()
    for hook in absent._hooks:
        hook.remove()
    absent._hooks.clear()
    try:
        plain = weights()
    finally:
        pass_over_absent_pairs()
    start = trained(lora())
    assert any(not torch.equal(start[name], plain[name]) for name in plain)
    assert all(torch.equal(hooked[name], plain[name]) for name in plain)
