"""Whole trainings against the slow reference: floors that change in every update, micro-batches, dropout, momentum."""

import pytest
import torch

from slsam_peft import SLSAM, SLSAMConfig, arms_of
from slsam_peft.passes import Passes
from tests.decoders import batch, decoder
from tests.reference import reference_update
from tests.tolerances import TRAJECTORY

RHO, UPDATES, RATE = 0.1, 8, 0.05


def micro_batches(update):
    """Return three micro-batches of unequal length and the number of tokens they predict."""
    parts = []
    for i in range(3):
        inputs = batch(2, 6 + 2 * i + update % 3)
        inputs["input_ids"] = (inputs["input_ids"] + 7 * update) % 61 + 3
        parts.append({**inputs, "labels": inputs["input_ids"]})
    return parts, sum(p["labels"][:, 1:].numel() for p in parts)


def passes_of(model, inputs, tokens):
    def run():
        loss = model(**inputs, num_items_in_batch=tokens).loss
        loss.backward()
        return loss

    def probe():
        with torch.no_grad():
            return model(**inputs, num_items_in_batch=tokens).loss

    return Passes(run, run, None, probe)


def optimizer(model):
    return torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=RATE, momentum=0.9, weight_decay=0.01
    )


def ours(model, config):
    """Train; return the masks drawn, the losses and the algorithm."""
    slsam, base = SLSAM(arms_of(model, config.granularity), config), optimizer(model)
    masks, losses = [], []
    for update in range(UPDATES):
        parts, tokens = micro_batches(update)
        losses.append(float(sum(slsam.accumulate(passes_of(model, p, tokens), i, 3) for i, p in enumerate(parts))))
        base.step()
        masks.append(slsam.active.clone())
    return masks, losses, slsam


def reference(model, config, masks):
    """Train in the same active sets, every pass whole and every arm's gradient computed."""
    arms, base = arms_of(model, config.granularity), optimizer(model)
    losses = []
    for update, mask in enumerate(masks):
        parts, tokens = micro_batches(update)

        def closure(parts=parts, tokens=tokens):
            return sum(passes_of(model, p, tokens).counted() for p in parts)

        trained = torch.ones_like(mask) if config.descent == "all" else mask
        loss, gradients = reference_update(arms, mask, RHO, closure, trained)
        losses.append(float(loss))
        for p, g in zip([p for arm in arms for p in arm.parameters], gradients, strict=True):
            p.grad = g
        base.step()
        base.zero_grad()
    return losses


SETTINGS = {
    "bernoulli": {"design": "bernoulli"},
    "depth": {"design": "depth"},
    "window of modules": {"design": "window", "granularity": "module"},
    "all descend": {"design": "depth", "descent": "all"},
}


@pytest.mark.parametrize("checkpointing", [None, False], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_training_follows_the_slow_reference(settings, checkpointing):
    config = SLSAMConfig(rho=RHO, active_fraction=0.5, **settings)
    models = [decoder("llama", checkpointing, dropout=0.2) for _ in range(2)]
    start = [p.detach().clone() for p in models[0].parameters()]
    torch.manual_seed(5)
    masks, losses, slsam = ours(models[0], config)
    torch.manual_seed(5)
    expected = reference(models[1], config, masks)
    floors = {int(mask.nonzero()[0]) for mask in masks}
    assert len(floors) > 2, "the case shows nothing unless floors change"
    assert slsam.horizon.reuse
    assert slsam.horizon.peak_bytes > 0
    assert losses == pytest.approx(expected, rel=TRAJECTORY)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q, rtol=TRAJECTORY, atol=TRAJECTORY)
    moved = [not torch.equal(p, w) for p, w in zip(models[0].parameters(), start, strict=True) if p.requires_grad]
    assert sum(moved) > len(moved) // 2


def test_partial_ascent_follows_its_definition():
    """e from the first of three micro-batches, g' from all of them; the bandit sees norms on the scale of all."""
    config = SLSAMConfig(rho=RHO, active_fraction=0.9, ascent="partial", ascent_fraction=0.3, design="bernoulli")
    model = decoder("llama", dropout=0.0)
    arms = arms_of(model)
    parts, tokens = micro_batches(0)
    passes = [passes_of(model, p, tokens) for p in parts]
    slsam = SLSAM(arms, config)
    losses = [slsam.accumulate(p, i, 3) for i, p in enumerate(passes)]
    members = [p for arm, on in zip(arms, slsam.active.tolist(), strict=True) if on for p in arm.parameters]
    got = [p.grad.clone() for p in members]

    model.zero_grad()
    passes[0].counted()
    ascent = [p.grad.clone() for p in members]
    norm = torch.sqrt(sum(g.square().sum() for g in ascent))
    model.zero_grad()
    saved = [p.detach().clone() for p in members]
    with torch.no_grad():
        for p, g in zip(members, ascent, strict=True):
            p.add_(RHO * g / (norm + 1e-12))
    loss = sum(p.counted() for p in passes)
    for p, g in zip(members, got, strict=True):
        torch.testing.assert_close(g, p.grad, rtol=TRAJECTORY, atol=TRAJECTORY)
    with torch.no_grad():
        for p, w in zip(members, saved, strict=True):
            p.copy_(w)
    assert float(sum(losses)) == pytest.approx(float(loss.detach()), rel=TRAJECTORY)
    assert float(losses[0]) != 0
    assert slsam.metrics["grad_norm_ascent"] == pytest.approx(3 * float(norm), rel=TRAJECTORY)
    assert "sharpness" not in slsam.metrics


def test_remembered_ascent_follows_its_definition():
    """e_t from the last descent gradient of each active arm, in bfloat16; an arm not seen before is not perturbed."""
    config = SLSAMConfig(rho=RHO, active_fraction=0.4, ascent="remembered", design="fixed_size")
    models = [decoder("llama", dropout=0.0) for _ in range(2)]
    slsam = SLSAM(arms_of(models[0]), config)
    base, twin_base = optimizer(models[0]), optimizer(models[1])
    arms, memory = arms_of(models[1]), {}
    perturbed = set()
    for update in range(UPDATES):
        parts, tokens = micro_batches(update)
        loss = slsam.update(passes_of(models[0], parts[0], tokens).counted)
        base.step()

        on = slsam.active.tolist()
        members = [p for arm, a in zip(arms, on, strict=True) if a for p in arm.parameters]
        known = [p for p in members if p in memory]
        norm = torch.stack([torch.zeros((), dtype=torch.float64), *(memory[p].norm() for p in known)]).norm()
        saved = [p.detach().clone() for p in known]
        with torch.no_grad():
            for p in known:
                p.add_(RHO * memory[p] / (norm + 1e-12))
        models[1].zero_grad()
        expected = passes_of(models[1], parts[0], tokens).counted()
        with torch.no_grad():
            for p, w in zip(known, saved, strict=True):
                p.copy_(w)
        for arm, a in zip(arms, on, strict=True):
            for p in arm.parameters:
                p.grad = p.grad if a else None
        memory.update({p: p.grad.to(torch.bfloat16).double() for p in members})
        twin_base.step()
        perturbed.update(known)
        assert float(loss) == pytest.approx(float(expected.detach()), rel=TRAJECTORY)
    assert perturbed
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q, rtol=TRAJECTORY, atol=TRAJECTORY)
