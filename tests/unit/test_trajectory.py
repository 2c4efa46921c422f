"""Whole trainings against the slow reference: other arms in every step, micro-batches, dropout, momentum."""

import pytest
import torch

from slsam_peft import SLSAM, SLSAMConfig, arms_of
from slsam_peft.algorithm.step import Passes
from slsam_peft.trainer.riding import lora_pairs
from tests.decoders import batch, decoder
from tests.look_ahead import exact_norms, first_rows, gradients_at, look_ahead_passes, mean_gradients
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
    """Return the passes over a micro-batch of a step of so many scored tokens."""

    def run():
        loss = model(**inputs, num_items_in_batch=tokens).loss
        loss.backward()
        return loss

    def forward_only():
        with torch.no_grad():
            return model(**inputs, num_items_in_batch=tokens).loss

    own = int((inputs["labels"][:, 1:] != -100).sum())
    return Passes(run, run, forward_only, items=own, divisor=tokens)


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


ALWAYS = (("bernoulli", "plain"), ("window of modules", "plain"), ("all descend", "checkpointed"))

# Two settings without checkpointing and one with it always; each in the other ways in the slow run.
CASES = [
    pytest.param(
        settings,
        checkpointing,
        id=f"{name}-{kind}",
        marks=[] if (name, kind) in ALWAYS else pytest.mark.slow,
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
    """Check gradients `got` and `losses` of a step against what `two_passes` returned.

    `share` is the ascent sequences' of what their loss was divided by.
    """
    loss, gradients, norm = expected
    for g, e in zip(got, gradients, strict=True):
        if g is not None:
            torch.testing.assert_close(g, e, rtol=TRAJECTORY, atol=TRAJECTORY)
    on = torch.ones_like(slsam.active) if slsam.config.descent == "all" else slsam.active
    assert [g is not None for g in got] == on[slsam.runner.owner].tolist()
    assert float(sum(losses)) == pytest.approx(float(loss), rel=TRAJECTORY)
    assert slsam.metrics["grad_norm_ascent"] == pytest.approx(float(norm) / share, rel=TRAJECTORY)
    assert "sharpness" not in slsam.metrics, "the loss at w is never computed on the whole batch"
    arms = [0.0] * len(slsam.arms)
    for i, g in zip(slsam.runner.owner.tolist(), gradients, strict=True):
        arms[i] += float(g.square().sum())
    if slsam.config.descent == "all":  # every arm's descent gradient is seen: full information
        assert slsam.norms.square().tolist() == pytest.approx(arms, rel=TRAJECTORY)
    else:
        assert (slsam.norms > 0).tolist() == slsam.active.tolist()


PARTIAL = [("bernoulli", "active"), ("depth", "active"), ("depth", "all")]


@pytest.mark.parametrize(("design", "descent"), PARTIAL)
def test_partial_ascent_on_micro_batches(design, descent):
    """e from the first of three micro-batches, g' from all of them; the ascent's norm is of its own mean loss."""
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
        assert_partial_step(slsam, got, losses, expected, share=parts[0]["labels"][:, 1:].numel() / tokens)
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


@pytest.mark.parametrize("checkpointing", [None, False], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("radius", [{"rho": RHO}, {"loss_rise": 0.05}], ids=["length", "loss rise"])
def test_look_ahead_trainings_follow_the_slow_reference(radius, checkpointing):
    """e_t from the gradient, one step earlier, of a sequence of batch t; an epoch's first step makes its own.

    Two epochs of batches of two sequences, one and one: the last of an epoch has a single sequence.
    """
    config = SLSAMConfig(method="auto", active_fraction=0.4, **radius)
    models = [exact_norms(decoder("llama", checkpointing, dropout=0.0)) for _ in range(2)]
    slsam = SLSAM(arms_of(models[0]), config, pairs=lora_pairs(models[0]))
    bases = [optimizer(m) for m in models]
    arms = arms_of(models[1])
    epoch = [micro_batches(0)[0][1], first_rows(micro_batches(1)[0][0], 1), first_rows(micro_batches(2)[0][2], 1)]
    epoch = [{**b, "labels": torch.where(b["attention_mask"] == 0, -100, b["labels"])} for b in epoch]
    batches = [*epoch, *epoch]
    memory, perturbed = {}, 0
    for step, own in enumerate(batches):
        following = batches[step + 1] if step % 3 < 2 else None
        loss = slsam.accumulate(look_ahead_passes(models[0], own, following))
        bases[0].step()

        # The ascent: fresh where no sequence has ridden along, else what was kept.
        mask, parameters = slsam.active, [p for arm in arms for p in arm.parameters]
        drawn = [i for i, owner in enumerate(slsam.runner.owner.tolist()) if mask[owner]]
        ascent = {i: memory[i] for i in drawn if i in memory}
        if step % 3 == 0:
            assert not ascent
            fresh = mean_gradients(models[1], first_rows(own, 1))
            ascent = {i: fresh[parameters[i]] for i in drawn}
        assert len(ascent) == len(drawn), "a drawn arm is not perturbed"
        perturbed += len(ascent)
        riding = None if following is None else mean_gradients(models[1], first_rows(following, 1))
        norm = torch.stack([g.norm() for g in ascent.values()]).norm()
        rho = RHO if "rho" in radius else min(config.loss_rise / float(norm), config.rho_max)
        expected, gradients = gradients_at(
            models[1], own, {parameters[i]: rho * g / (norm + 1e-12) for i, g in ascent.items()}
        )
        for p in parameters:
            p.grad = gradients[p]
        bases[1].step()
        following_mask = None if slsam.sampler.upcoming is None else slsam.sampler.upcoming.mask
        memory = {}
        if riding is not None:
            kept = [i for i, owner in enumerate(slsam.runner.owner.tolist()) if following_mask[owner]]
            memory = {i: riding[parameters[i]].bfloat16().double() for i in kept}
        assert slsam.memory.gradients.keys() == memory.keys()
        assert float(loss) == pytest.approx(expected, rel=TRAJECTORY)
        assert slsam.metrics["rho"] == pytest.approx(rho, rel=TRAJECTORY)
        assert slsam.metrics["grad_norm_ascent"] == pytest.approx(float(norm), rel=TRAJECTORY)
        for p, q in zip(slsam.runner.parameters, parameters, strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=TRAJECTORY, atol=TRAJECTORY)
    assert perturbed
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q, rtol=TRAJECTORY, atol=TRAJECTORY)


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
