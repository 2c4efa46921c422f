"""Whole trainings against the slow reference: other arms in every step, micro-batches, dropout, momentum."""

import pytest
import torch

from slsam_peft import SLSAM, SLSAMConfig, arms_of
from slsam_peft.algorithm.passes import Passes
from tests.decoders import batch, decoder
from tests.reference import reference_step
from tests.tolerances import TRAJECTORY

RHO, STEPS, RATE = 0.1, 8, 0.05


def micro_batches(step):
    """Return three micro-batches of unequal length and the number of tokens they predict."""
    parts = []
    for i in range(3):
        inputs = batch(2, 6 + 2 * i + step % 3)
        inputs["input_ids"] = (inputs["input_ids"] + 7 * step) % 61 + 3
        parts.append({**inputs, "labels": inputs["input_ids"]})
    return parts, sum(p["labels"][:, 1:].numel() for p in parts)


def passes_of(model, inputs, tokens):
    def run():
        loss = model(**inputs, num_items_in_batch=tokens).loss
        loss.backward()
        return loss

    def forward_only():
        with torch.no_grad():
            return model(**inputs, num_items_in_batch=tokens).loss

    return Passes(run, run, None, forward_only)


def optimizer(model):
    return torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=RATE, momentum=0.9, weight_decay=0.01
    )


def ours(model, config):
    """Train; return the masks drawn, the losses and the algorithm."""
    slsam, base = SLSAM(arms_of(model, config.granularity), config), optimizer(model)
    masks, losses = [], []
    for step in range(STEPS):
        parts, tokens = micro_batches(step)
        losses.append(float(sum(slsam.accumulate(passes_of(model, p, tokens), i, 3) for i, p in enumerate(parts))))
        base.step()
        masks.append(slsam.active.clone())
    return masks, losses, slsam


def reference(model, config, masks):
    """Train in the same active sets, every pass whole and every arm's gradient computed."""
    arms, base = arms_of(model, config.granularity), optimizer(model)
    losses = []
    for step, mask in enumerate(masks):
        parts, tokens = micro_batches(step)

        def closure(parts=parts, tokens=tokens):
            return sum(passes_of(model, p, tokens).logged() for p in parts)

        trained = torch.ones_like(mask) if config.descent == "all" else mask
        loss, gradients = reference_step(arms, mask, RHO, closure, trained)
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


# Every setting once, two of them checkpointed, always; each the other way in the slow run.
CASES = [
    pytest.param(
        settings,
        checkpointing,
        id=f"{name}-{kind}",
        marks=[pytest.mark.slow] * ((kind == "checkpointed") != (settings["design"] == "depth")),
    )
    for name, settings in SETTINGS.items()
    for kind, checkpointing in {"plain": None, "checkpointed": False}.items()
]


@pytest.mark.parametrize(("settings", "checkpointing"), CASES)
def test_training_follows_the_slow_reference(settings, checkpointing):
    config = SLSAMConfig(rho=RHO, active_fraction=0.5, **settings)
    models = [decoder("llama", checkpointing, dropout=0.2) for _ in range(2)]
    start = [p.detach().clone() for p in models[0].parameters()]
    torch.manual_seed(5)
    masks, losses, slsam = ours(models[0], config)
    torch.manual_seed(5)
    expected = reference(models[1], config, masks)
    lowest_blocks = {int(mask.nonzero()[0]) for mask in masks}
    assert len(lowest_blocks) > 2, "the case shows nothing unless the lowest active block changes"
    assert slsam.horizon.reuse
    assert slsam.horizon.peak_bytes > 0
    assert losses == pytest.approx(expected, rel=TRAJECTORY)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q, rtol=TRAJECTORY, atol=TRAJECTORY)
    moved = [not torch.equal(p, w) for p, w in zip(models[0].parameters(), start, strict=True) if p.requires_grad]
    assert sum(moved) > len(moved) // 2


def two_passes(slsam, ascent, descent):
    """Return loss and gradients at w + e, e from the pass `ascent`, and the norm of its gradient, in plain steps."""
    parameters = [p for arm in slsam.arms for p in arm.parameters]
    moved = [p for arm, on in zip(slsam.arms, slsam.active.tolist(), strict=True) if on for p in arm.parameters]
    for p in parameters:
        p.grad = None
    ascent()
    gradients = [p.grad.clone() for p in moved]
    norm = torch.sqrt(sum(g.square().sum() for g in gradients))
    saved = [p.detach().clone() for p in moved]
    for p in parameters:
        p.grad = None
    with torch.no_grad():
        for p, g in zip(moved, gradients, strict=True):
            p.add_(RHO * g / (norm + 1e-12))
    loss = descent().detach()
    with torch.no_grad():
        for p, w in zip(moved, saved, strict=True):
            p.copy_(w)
    return loss, [p.grad for p in parameters], norm


def assert_partial_step(slsam, got, losses, expected, share):
    """Check gradients `got` and `losses` of a step against what `two_passes` returned."""
    loss, gradients, norm = expected
    for g, e in zip(got, gradients, strict=True):
        if g is not None:
            torch.testing.assert_close(g, e, rtol=TRAJECTORY, atol=TRAJECTORY)
    on = torch.ones_like(slsam.active) if slsam.config.descent == "all" else slsam.active
    assert [g is not None for g in got] == on[slsam.runner.owner].tolist()
    assert float(sum(losses)) == pytest.approx(float(loss), rel=TRAJECTORY)
    assert slsam.metrics["grad_norm_ascent"] == pytest.approx(float(norm) / share, rel=TRAJECTORY)
    assert "sharpness" not in slsam.metrics, "the loss at w is never computed on the whole batch"


PARTIAL = [("bernoulli", "active"), ("depth", "active"), ("depth", "all")]


@pytest.mark.parametrize(("design", "descent"), PARTIAL)
def test_partial_ascent_on_micro_batches(design, descent):
    """e from the first of three micro-batches, g' from all of them; the bandit sees norms on the scale of all."""
    config = SLSAMConfig(
        rho=RHO, active_fraction=0.6, ascent="partial", ascent_fraction=0.3, design=design, descent=descent
    )
    model = decoder("llama", dropout=0.0)
    slsam = SLSAM(arms_of(model), config)
    for step in range(3):
        parts, tokens = micro_batches(step)
        passes = [passes_of(model, p, tokens) for p in parts]
        losses = [slsam.accumulate(p, i, 3) for i, p in enumerate(passes)]
        got = [p.grad for arm in slsam.arms for p in arm.parameters]
        expected = two_passes(slsam, passes[0].logged, lambda p=passes: sum(x.logged() for x in p))
        assert_partial_step(slsam, got, losses, expected, share=1 / 3)
    assert slsam.horizon.peak_bytes > 0


@pytest.mark.parametrize(("design", "descent"), PARTIAL)
def test_partial_ascent_on_part_of_a_lone_batch(design, descent):
    """e from the first of two sequences, g' from both."""
    config = SLSAMConfig(rho=RHO, active_fraction=0.6, ascent="partial", design=design, descent=descent)
    model = decoder("llama", dropout=0.0)
    slsam = SLSAM(arms_of(model), config)
    for step in range(3):
        (inputs, *_), tokens = micro_batches(step)
        whole = passes_of(model, inputs, tokens)
        part = passes_of(model, {k: v[:1] if torch.is_tensor(v) else v for k, v in inputs.items()}, tokens / 2).logged
        losses = [slsam.update(whole.logged, ascent_closure=part, forward_only=whole.forward_only)]
        got = [p.grad for arm in slsam.arms for p in arm.parameters]
        assert_partial_step(slsam, got, losses, two_passes(slsam, part, whole.logged), share=1)


def summed_loss(model, ids, tokens):
    """Run forward and backward on the summed loss of the sequences over `tokens`, in float64 throughout."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / tokens
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("checkpointing", [None, False], ids=["plain", "checkpointed"])
def test_ascent_ahead_follows_its_definition(checkpointing):
    """e_t from the gradient, one step earlier, of a sequence of batch t; one pass, whose other sequences make g'."""
    config = SLSAMConfig(rho=RHO, active_fraction=1.0, ascent="ahead")
    models = [decoder("llama", checkpointing, dropout=0.0) for _ in range(2)]
    slsam = SLSAM(arms_of(models[0]), config)
    bases, memory = [optimizer(m) for m in models], {}
    members = [p for arm in arms_of(models[1]) for p in arm.parameters]
    batches = [(batch(2, 9)["input_ids"] + 7 * step) % 61 + 3 for step in range(STEPS)]
    for step, own in enumerate(batches):
        coming = batches[step + 1][:1] if step + 1 < STEPS else own[:0]
        both = torch.cat([own, coming])
        before = [p.detach().clone() for p in models[0].parameters()]
        tokens = own[:, 1:].numel()
        loss = slsam.update(
            lambda both=both, tokens=tokens: summed_loss(models[0], both, tokens), sequences=(len(own), len(coming))
        )
        assert all(torch.equal(p, w) for p, w in zip(models[0].parameters(), before, strict=True))
        bases[0].step()

        ascent = {}
        expected = 0.0
        if len(coming):
            expected = float(summed_loss(models[1], coming, tokens))
            ascent = {p: p.grad.bfloat16().double() for p in members}
            models[1].zero_grad()
        norm = torch.stack([torch.zeros((), dtype=torch.float64), *(g.norm() for g in memory.values())]).norm()
        saved = [p.detach().clone() for p in members]
        with torch.no_grad():
            for p, g in memory.items():
                p.add_(RHO * g / (norm + 1e-12))
        expected += float(summed_loss(models[1], own, tokens))
        with torch.no_grad():
            for p, w in zip(members, saved, strict=True):
                p.copy_(w)
        memory = ascent
        assert float(loss) == pytest.approx(expected, rel=TRAJECTORY)
        got = [p.grad for arm in slsam.arms for p in arm.parameters]
        for p, g in zip(members, got, strict=True):
            torch.testing.assert_close(g, p.grad, rtol=TRAJECTORY, atol=TRAJECTORY)
        bases[1].step()
        bases[1].zero_grad()
    assert slsam.memory.gradients == {}, "no sequences come after the last step"
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q, rtol=TRAJECTORY, atol=TRAJECTORY)


def test_an_overflow_in_the_look_ahead_gradient_voids_the_step_for_a_gradient_scaler():
    """The descent gradient is finite: a scaler would step on it and not lower its scale."""
    model = decoder("llama", dropout=0.0)
    slsam = SLSAM(arms_of(model), SLSAMConfig(rho=RHO, active_fraction=1.0, ascent="ahead"))
    slsam.loss_scale = lambda: torch.tensor(1024.0)
    ids = batch(3, 9)["input_ids"]

    def overflowing():
        logits = model(input_ids=ids, use_cache=False).logits
        logits.register_hook(lambda g: torch.cat([g[:2], g[2:] * torch.inf]))
        loss = logits.square().mean()
        loss.backward()
        return loss.detach()

    slsam.update(overflowing, sequences=(2, 1))
    assert slsam.skipped == 1
    assert slsam.memory.gradients == {}
    assert any(p.grad.isnan().any() for p in slsam.runner.parameters)


@pytest.mark.parametrize("settings", [{}, {"ascent": "partial"}, {"ascent": "ahead", "rho": 0.0}])
def test_sequences_belong_to_a_look_ahead_ascent(settings):
    model = decoder("llama", dropout=0.0)
    slsam = SLSAM(arms_of(model), SLSAMConfig(active_fraction=1.0, **settings))
    ids = batch(3, 9)["input_ids"]

    def closure():
        return summed_loss(model, ids, 16)

    with pytest.raises(ValueError, match=r"sequences=\(2, 1\) belong to ascent='ahead'"):
        slsam.update(closure, closure, sequences=(2, 1))
    ahead = SLSAM(arms_of(model), SLSAMConfig(active_fraction=1.0, ascent="ahead"))
    with pytest.raises(ValueError, match=r"needs .* its sequences="):
        ahead.update(closure)
    with pytest.raises(ValueError, match=r"where sequences=\(3, 1\) are 4 sequences"):
        ahead.update(closure, sequences=(3, 1))
    assert not any("forward" in vars(linear) for linear in ahead.runner.linears)


def test_a_stale_ascent_follows_its_definition():
    """e_t from the last descent gradient of each active arm, in bfloat16; an arm not seen before is not perturbed."""
    config = SLSAMConfig(rho=RHO, active_fraction=0.4, ascent="remembered", design="fixed_size")
    models = [decoder("llama", dropout=0.0) for _ in range(2)]
    slsam = SLSAM(arms_of(models[0]), config)
    base, twin_base = optimizer(models[0]), optimizer(models[1])
    arms, memory = arms_of(models[1]), {}
    perturbed = set()
    for step in range(STEPS):
        parts, tokens = micro_batches(step)
        loss = slsam.update(passes_of(models[0], parts[0], tokens).logged)
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
        expected = passes_of(models[1], parts[0], tokens).logged()
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
