"""Rules of other papers, each held to a slow twin in float64 and to what its paper says of it."""

import gc
import math
from dataclasses import replace

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from slsam_peft import SLSAM, SLSAMConfig, arms_of
from slsam_peft.algorithm.adversary import Adversary
from slsam_peft.algorithm.ascents import Ahead, Ascent, seeded_normal
from slsam_peft.algorithm.balancing import Balancing
from slsam_peft.algorithm.factors import Factors
from slsam_peft.algorithm.noise import WeightNoise, _NoisyLinear
from slsam_peft.algorithm.radius import Offsets
from slsam_peft.algorithm.sampa import Sampa
from slsam_peft.algorithm.stack import Pair
from slsam_peft.algorithm.step import Cut, Passes
from slsam_peft.algorithm.zeroth_order import ZerothOrder
from slsam_peft.cost.expected import rule_of
from slsam_peft.cost.model import CostModel
from slsam_peft.presets import ASCENTS
from slsam_peft.runs.compare.methods import MethodSettings, slsam_config
from slsam_peft.saving.card import settings_of
from slsam_peft.trainer.cutting import scored_items
from slsam_peft.trainer.factors import _weight_of, factors_of
from slsam_peft.trainer.riding import lora_pairs
from tests.decoders import batch, closures, decoder, passes_of
from tests.look_ahead import exact_norms, first_rows, gradients_at, look_ahead_passes, mean_gradients, summed
from tests.tolerances import EXACT_FLOAT64, FIRST_ORDER, FLOAT32_NORMS, ORACLE, TRAJECTORY

RATE = 0.05
RIVALS = ("sampa", "zeroth_order", "bar", "obar", "bi_lora", "flat_lora")


def algorithm(model, **settings):
    """Return the algorithm over a decoder whose optimizer has one learning rate."""
    config = SLSAMConfig(**settings)
    slsam = SLSAM(arms_of(model), config, pairs=lora_pairs(model), factors=factors_of(model))
    slsam.learning_rate = lambda p: RATE
    return slsam


def trained(model):
    return [p for arm in arms_of(model) for p in arm.parameters]


def copied(tensors):
    return [t.detach().clone() for t in tensors]


def assert_same(got, expected, tolerance=ORACLE):
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=tolerance)


# Zeroth order


def test_a_zeroth_order_step_is_that_of_the_slow_reference():
    """Two forwards at w + mu u and w - mu u with the descent's own dropout, then the gradient at w + e."""
    model, twin = exact_norms(decoder()), exact_norms(decoder())
    slsam = algorithm(model, method="sam", ascent="zeroth_order", rho=0.3, active_fraction=0.6, seed=3)
    inputs, parameters = batch(), trained(twin)
    closure, forward_only = closures(model, inputs)
    start = torch.get_rng_state()
    slsam.update(closure, forward_only=forward_only)

    on = slsam.active[slsam.runner.owner].tolist()
    assert not all(on)
    drawn = [p for p, o in zip(parameters, on, strict=True) if o]
    u = ZerothOrder().direction(drawn, 3, 0)
    losses = []
    plain, forward = closures(twin, inputs)
    weights = copied(drawn)
    for sign in (1, -1):
        with torch.no_grad():
            for p, w, d in zip(drawn, weights, u, strict=True):
                p.copy_(w + sign * 0.05 * d)
        torch.set_rng_state(start)
        losses.append(float(forward()))
    slope = (losses[0] - losses[1]) / 0.1
    with torch.no_grad():
        for p, w, d in zip(drawn, weights, u, strict=True):
            p.copy_(w + 0.3 * math.copysign(1, slope) * d)
    torch.set_rng_state(start)
    plain()
    assert_same([p.grad for p in slsam.runner.parameters], [p.grad for p in parameters])
    assert slsam.metrics["grad_norm_ascent"] == pytest.approx(abs(slope), rel=1e-6)
    assert slsam.metrics["ascent_loss"] == pytest.approx(sum(losses) / 2, rel=ORACLE)


def test_no_backward_pass_makes_the_ascent():
    model = decoder(dropout=0.0)
    slsam = algorithm(model, method="sam", ascent="zeroth_order", rho=0.3)
    calls = []
    closure, forward_only = closures(model, batch())

    def noted(run, name):
        def call():
            calls.append((name, torch.is_grad_enabled()))
            return run()

        return call

    slsam.update(noted(closure, "both"), forward_only=noted(forward_only, "forward"))
    assert [name for name, _ in calls] == ["forward", "forward", "both"]


def test_the_direction_comes_from_a_seed_and_has_length_1():
    like = [torch.zeros(3, 4, dtype=torch.float64), torch.zeros(5)]
    first, again, later, other = (ZerothOrder().direction(like, *seeds) for seeds in ((0, 7), (0, 7), (0, 8), (1, 7)))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(first[0], x[0]) for x in (later, other))
    assert sum(float(x.double().square().sum()) for x in first) == pytest.approx(1.0, rel=1e-6)
    assert [x.dtype for x in first] == [torch.float64, torch.float32]


class Seen:
    """A radius that adds up the ascent gradients it is given, and moves nothing."""

    def __init__(self):
        self.total = 0.0

    def offsets(self, gradients, weights, norm, unit):
        self.total = self.total + gradients[0] * unit
        return Offsets([torch.zeros_like(g) for g in gradients], torch.zeros_like(norm))


def test_the_estimate_times_the_dimension_is_the_gradient_in_the_mean():
    """On a cubic the smoothed gradient has its own closed form: that of the mean over a ball."""
    cubic = torch.nn.Linear(3, 1, bias=False).double()
    w, mu, count, seen = torch.tensor([[0.1, -0.2, 0.3]], dtype=torch.float64), 0.5, 1000, Seen()
    with torch.no_grad():
        cubic.weight.copy_(w)
    config = SLSAMConfig(method="sam", ascent=ZerothOrder(1, smoothing=mu), radius=seen, granularity="tensor")
    slsam = SLSAM(arms_of(cubic, "tensor"), config)
    closure, forward_only = passes_of(lambda: (cubic.weight**3).sum())
    for _ in range(count):
        slsam.update(closure, forward_only=forward_only)
    # d/dw of the mean of (w + mu v)^3 over the ball: 3 w^2 + 3 mu^2 E[v_i^2], and E[v_i^2] = 1 / (d + 2)
    smoothed, estimated = 3 * w**2 + 3 * mu**2 / 5, 3 * seen.total / count
    torch.testing.assert_close(estimated, smoothed, rtol=0, atol=0.05)
    assert float((estimated - 3 * w**2).min()) > 0.1, "the smoothing is seen, not the point alone"


def test_a_loop_without_a_forward_alone_is_told_so():
    model = decoder(dropout=0.0)
    slsam = algorithm(model, method="sam", ascent="zeroth_order", rho=0.3)
    closure, _ = closures(model, batch())
    with pytest.raises(ValueError, match=r"ascent='zeroth_order' runs forward passes alone; pass forward_only"):
        slsam.update(closure)


# SAMPa


def two_epochs():
    """Return batches of two sequences, one and one, twice."""
    inputs = batch(2, 9)
    inputs = {**inputs, "labels": torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], -100)}
    rolled = [{**inputs, "input_ids": (inputs["input_ids"] + k) % 61 + 3} for k in range(3)]
    epoch = [rolled[0], first_rows(rolled[1], 1), first_rows(rolled[2], 1)]
    return [{**b, "labels": torch.where(b["labels"] == -100, -100, b["input_ids"])} for b in epoch] * 2


def run_epochs(model, slsam, after=lambda step: None):
    optimizer = torch.optim.SGD(trained(model), RATE)
    for step, own in enumerate(batches := two_epochs()):
        following = batches[step + 1] if step % 3 < 2 else None
        slsam.accumulate(look_ahead_passes(model, own, following))
        after(step)
        optimizer.step()


def test_sampa_without_lambda_and_extrapolation_is_look_ahead():
    ends = []
    for ascent in (Sampa(1, share=0.0, extrapolate=False), Ahead(1)):
        model = decoder(dropout=0.0)
        run_epochs(model, algorithm(model, method="auto", ascent=ascent, rho=0.2, active_fraction=0.4))
        ends.append(copied(trained(model)))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize(
    ("fraction", "checkpointing"),
    [
        pytest.param(1.0, None, id="1.0-plain", marks=pytest.mark.slow),
        pytest.param(1.0, True, id="1.0-reentrant", marks=pytest.mark.slow),
        pytest.param(0.4, None, id="0.4-plain", marks=pytest.mark.slow),
        pytest.param(0.4, False, id="0.4-checkpointed"),
        pytest.param(0.4, True, id="0.4-reentrant"),
    ],
)
def test_sampa_follows_the_slow_reference(fraction, checkpointing):
    """The paper's three equations with passes of their own; drawn arms alone are extrapolated and mixed."""
    model, twin = (exact_norms(decoder(checkpointing=c, dropout=0.0)) for c in (checkpointing, None))
    slsam = algorithm(model, method="auto", ascent="sampa", rho=0.2, active_fraction=fraction)
    parameters, optimizer = trained(twin), torch.optim.SGD(trained(twin), RATE)
    kept, batches, mixed = {}, two_epochs(), []

    def check(step):
        owner, own = slsam.runner.owner.tolist(), batches[step]
        following = batches[step + 1] if step % 3 < 2 else None
        drawn = [i for i, o in enumerate(owner) if slsam.active[o]]
        at_y = dict(kept)  # gradients at y_t
        if step % 3 == 0:
            fresh = mean_gradients(twin, first_rows(own, 1))
            at_y = {i: fresh[parameters[i]] for i in drawn}
        assert set(at_y) == set(drawn)
        norm = torch.stack([g.norm() for g in at_y.values()]).norm()
        _, perturbed = gradients_at(twin, own, {parameters[i]: 0.2 * g / norm for i, g in at_y.items()})
        expected = [perturbed[p] for p in parameters]
        kept.clear()
        if following is not None:
            y = {parameters[i]: -RATE * g for i, g in at_y.items()}
            _, ahead = gradients_at(twin, first_rows(following, 1), y)
            upcoming = slsam.sampler.upcoming.mask
            for i in (i for i, o in enumerate(owner) if upcoming[o]):
                expected[i] = 0.8 * expected[i] + 0.2 * ahead[parameters[i]]
                kept[i] = ahead[parameters[i]].bfloat16().double()
                mixed.append(i)
        assert_same([p.grad for p in slsam.runner.parameters], expected, TRAJECTORY)
        for p, g in zip(parameters, expected, strict=True):
            p.grad = g
        optimizer.step()

    run_epochs(model, slsam, check)
    assert mixed


def test_sampa_needs_a_learning_rate_and_pairs():
    model = decoder(dropout=0.0)
    slsam = algorithm(model, method="auto", ascent="sampa", rho=0.2)
    slsam.learning_rate = None
    with pytest.raises(ValueError, match=r"ascent='sampa' needs to know the optimizer's learning rate; set slsam"):
        run_epochs(model, slsam)
    with pytest.raises(ValueError, match=r"ascent='sampa' runs sequences at w and at w \+ e in one pass"):
        SLSAM(arms_of(model), SLSAMConfig(method="auto", ascent="sampa"))
    with pytest.raises(ValueError, match="lambda must be in"):
        Sampa(share=1.0)


# BAR


def balance(factors):
    """Return half the difference of the squared norms of each pair's factors."""
    return torch.stack([(f.up.detach().square().sum() - f.down.detach().square().sum()) / 2 for f in factors])


@pytest.mark.parametrize("name", ["bar", "obar"])
@pytest.mark.parametrize("share", [1.0, 0.4], ids=["all", "drawn"])
def test_a_balancing_step_is_that_of_its_algorithm(name, share):
    """One plain pass; then the factors are scaled, of drawn arms alone, by the algorithm's own comparison."""
    model, twin = decoder(dropout=0.0), decoder(dropout=0.0)
    slsam = algorithm(model, method="auto", ascent=name, rho=0.7, active_fraction=share)
    slsam.progress = lambda: 0.25
    closure, forward_only = closures(model, batch())
    calls = []
    loss = slsam.update(lambda: calls.append(1) or closure(), forward_only=forward_only)
    assert calls == [1]
    plain, _ = closures(twin, batch())
    assert float(loss) == float(plain().detach())
    drawn = {p for p, o in zip(trained(model), slsam.active[slsam.runner.owner].tolist(), strict=True) if o}
    assert (len(drawn) == len(trained(model))) == (share == 1.0)
    by = 0.7 * 0.75 * RATE
    for f, g in zip(factors_of(model), factors_of(twin), strict=True):
        a, b = (x.grad.norm() if name == "bar" else -x.detach().norm() for x in (g.down, g.up))
        sign = (1 if a >= b else -1) * (f.down in drawn)
        torch.testing.assert_close(f.down.detach(), g.down.detach() * (1 + sign * by), rtol=ORACLE, atol=0)
        torch.testing.assert_close(f.up.detach(), g.up.detach() * (1 - sign * by), rtol=ORACLE, atol=0)
    for p, q in zip(trained(model), trained(twin), strict=True):
        assert torch.equal(p.grad, q.grad), "the gradient is the plain one, at w"


def unbalanced(by=4.0):
    """Return a pair of which A is so many times longer than it was made and B shorter, in a model, and a target."""
    torch.manual_seed(0)
    target = torch.randn(8, 6, dtype=torch.float64)
    down, up = (torch.nn.Linear(*shape, bias=False).double() for shape in ((6, 3), (3, 8)))
    with torch.no_grad():
        down.weight.mul_(by)
        up.weight.div_(by)
    return torch.nn.ModuleDict({"down": down, "up": up}), [Factors("f", Pair(down, up))], target


def factorization(name, steps=300, rate=0.01):
    """Fit B A to a noisy matrix from an unbalanced start, by plain SGD; return the imbalance along the way."""
    model, factors, target = unbalanced()
    down, up = factors[0].pair
    config = SLSAMConfig(method="bar", ascent=name, rho=0.5 if name else 0.0, granularity="tensor")
    slsam = SLSAM(arms_of(model, "tensor"), config, factors=factors)
    slsam.learning_rate = lambda p: rate
    optimizer = torch.optim.SGD(model.parameters(), rate)
    seen = []
    for _ in range(steps):
        noise = torch.randn(8, 6, dtype=torch.float64)

        def closure(noise=noise):
            loss = (up.weight @ down.weight - target - noise).square().mean() * 4
            loss.backward()
            return loss

        slsam.update(closure)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(abs(float(balance(factors)[0])))
    return seen


@pytest.mark.parametrize("name", ["bar", "obar"])
def test_the_imbalance_shrinks_as_it_does_not_under_plain_descent(name):
    """Plain descent preserves it in the limit of small steps (theorem 1), SAM and so BAR shrink it (corollary 1)."""
    plain, balanced = factorization(None), factorization(name)
    assert plain[-1] > 0.95 * plain[0]
    assert balanced[-1] < 0.1 * balanced[0]


def change_of_balance(rate, by, **settings):
    """Return what a step of SGD, and the rule before it, adds to the balance of an unbalanced pair."""
    model, factors, target = unbalanced(by)
    slsam = SLSAM(arms_of(model, "tensor"), SLSAMConfig(granularity="tensor", **settings), factors=factors)
    slsam.learning_rate = lambda p: rate
    (down, up), each = factors[0].pair, torch.eye(6, dtype=torch.float64)
    closure, _ = passes_of(lambda: (up(down(each)) - target.t()).square().sum() / 2)
    before = balance(factors)
    slsam.update(closure)
    torch.optim.SGD(model.parameters(), rate).step()
    return float(balance(factors) - before)


@pytest.mark.parametrize("by", [4.0, 0.25], ids=["A longer", "B longer"])
@pytest.mark.parametrize("by_gradients", [True, False], ids=["bar", "obar"])
def test_a_small_step_moves_the_balance_as_one_of_sam_does(by_gradients, by):
    """By eta rho (|g_B|^2 - |g_A|^2) / |g| (theorem 2); BAR's is eta alpha (|A|^2 + |B|^2), of the same sign."""
    _, (f,), target = unbalanced(by)
    (down, up), rate, rho = copied(f.pair.weights), 1e-5, 1e-3
    error = up @ down - target
    of_down, of_up = (up.t() @ error).square().sum(), (error @ down.t()).square().sum()
    expected = float(rho * (of_up - of_down) / (of_up + of_down).sqrt())
    alpha = abs(expected) / float(down.square().sum() + up.square().sum())
    plain = change_of_balance(rate, by, method="sam", rho=0.0)
    sam = change_of_balance(rate, by, method="sam", rho=rho) - plain
    rule = {"method": "auto", "ascent": Balancing(alpha, by_gradients), "active_fraction": 1.0}
    bar = change_of_balance(rate, by, **rule) - plain
    assert sam / rate == pytest.approx(expected, rel=FIRST_ORDER)
    assert bar / rate == pytest.approx(expected, rel=FIRST_ORDER)
    assert (bar > 0) == (by > 1), "the shorter factor grows"


def test_half_precision_is_balanced_as_a_wider_one_is():
    """A step changes a factor by less than bfloat16 can tell; the sum of many is what it is in float32."""
    model, by, steps = decoder(dropout=0.0, dtype=torch.bfloat16), 1e-3, 12
    with torch.no_grad():
        for f in factors_of(model):
            f.down.mul_(4)  # the same factor shrinks in every step
    before = {p: p.detach().float() for p in trained(model)}
    closure, _ = closures(model, batch())
    settings = {"method": "bar", "ascent": "obar", "rho": by / RATE}
    slsam = algorithm(model, **settings)
    for step in range(steps):
        if step == 5:
            saved, slsam = slsam.state_dict(), algorithm(model, **settings)
            slsam.load_state_dict(saved)
        slsam.update(closure)
    rest = slsam.ascent.state_dict()
    for i, f in enumerate(factors_of(model)):
        for side, w in enumerate(f.pair.weights):
            whole = before[w] * (1 + (-by, by)[side]) ** steps
            torch.testing.assert_close(w.detach() + rest[f"{i}.{side}"], whole, rtol=FLOAT32_NORMS, atol=0)
            assert torch.equal(w.detach(), (w.detach() + rest[f"{i}.{side}"]).bfloat16()), "the nearest that there is"
            assert not torch.equal(w.detach(), before[w].bfloat16())
    with pytest.raises(ValueError, match=r"holds '0\.1', and no factor here has that name and shape"):
        slsam.ascent.load_state_dict({"0.1": torch.zeros(2)})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bar", r"would change a factor by 0\.5 of itself.*at most 0\.1 is allowed"),
        ("bi_lora", r"would ascend at the learning rate 1; at most 0\.1 is allowed"),
        (
            "sampa",
            r"from a gradient step at the learning rate 1; less than 1 is allowed.*or ascent=Sampa\(extrapolate",
        ),
    ],
)
def test_a_learning_rate_that_is_none_is_refused(name, message):
    """Prodigy's is 1, whatever its steps are. Nothing is left half changed."""
    model = decoder(dropout=0.0)
    slsam = algorithm(model, method="auto", ascent=name, rho=0.5)
    slsam.learning_rate = lambda p: 1.0
    before, (inputs, following, _) = copied(trained(model)), two_epochs()[:3]
    with pytest.raises(ValueError, match=message):
        slsam.accumulate(look_ahead_passes(model, inputs, following))
    assert slsam.steps == 0
    assert all(torch.equal(p, w) for p, w in zip(trained(model), before, strict=True))


ALL = {name: name for name in ASCENTS if name != "auto"}
ALL |= {"sampa at w": Sampa(1, extrapolate=False), "bi_lora by plain ascent": Adversary(0.1, adam=False)}


@pytest.mark.parametrize("ascent", ALL.values(), ids=ALL)
def test_a_rule_is_said_to_move_by_the_learning_rate_where_it_reads_it(ascent):
    """A trainer refuses optimizers by it before the first step."""
    model = decoder(dropout=0.0)
    slsam = algorithm(model, method="auto", ascent=ascent, active_fraction=1.0, descent="active")
    read, (inputs, following, _) = [], two_epochs()[:3]
    slsam.learning_rate = lambda p: read.append(p) or RATE
    passes = look_ahead_passes(model, inputs, following)
    slsam.accumulate(replace(passes, cut=None, forward_only=closures(model, inputs)[1]))
    assert slsam.steps == 1
    assert bool(read) == slsam.ascent.paced


def test_a_void_step_balances_nothing():
    model = decoder(dropout=0.0)
    slsam = algorithm(model, method="bar")
    closure, _ = closures(model, batch())
    before = copied(trained(model))
    slsam.update(lambda: closure() * math.nan)
    assert slsam.skipped == 1
    assert all(torch.equal(p, w) for p, w in zip(trained(model), before, strict=True))


# Bi-LoRA


def merged_twin(model, factors, extra):
    """Add matrices to the frozen weights of a twin, in place, and let them have gradients."""
    with torch.no_grad():
        for f, matrix in zip(factors, extra, strict=True):
            f.base.weight.add_(matrix)
    for f in factors:
        f.base.weight.requires_grad_(True)


def twin_step(inputs, extra):
    """Return gradients of the factors and of the merged weights at W + B A + extra, on a model of its own."""

    def run(state):
        twin = decoder(dropout=0.0)
        twin.load_state_dict(state)
        parameters, factors = trained(twin), factors_of(twin)
        merged_twin(twin, factors, extra)
        plain, _ = closures(twin, inputs)
        loss = float(plain().detach())
        return loss, [p.grad for p in parameters], [f.base.weight.grad for f in factors]

    return run


class SlowAdam:
    """Adam for one tensor, written out."""

    def __init__(self, like):
        self.first, self.second, self.steps = torch.zeros_like(like), torch.zeros_like(like), 0

    def __call__(self, gradient):
        self.steps += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient**2
        first, second = self.first / (1 - 0.9**self.steps), self.second / (1 - 0.999**self.steps)
        return first / (second.sqrt() + 1e-8)


@pytest.mark.parametrize("adam", [False, True], ids=["plain ascent", "adam"])
@pytest.mark.parametrize("share", [1.0, 0.4], ids=["all", "drawn"])
def test_the_second_adapter_follows_the_slow_reference(share, adam):
    """Merged into the weights of a twin: primary gradients, the ascent from the weights' own, the global clip."""
    model, rho, rate = decoder(dropout=0.0), 0.02, 0.01 if adam else 30.0  # so that the clip is reached
    slsam = algorithm(model, method="auto", ascent=Adversary(rho, adam=adam), active_fraction=share)
    slsam.learning_rate = lambda p: rate
    inputs, factors = batch(), factors_of(model)
    aux = [copied(pair) for pair in slsam.ascent.auxiliary]
    ascents = [[SlowAdam(x) for x in pair] if adam else [lambda g: g] * 2 for pair in aux]
    assert all(not b.any() and a.any() for a, b in aux)
    clipped = 0
    for _ in range(4):
        state = copied_state(model)
        closure, _ = closures(model, inputs)
        loss = slsam.update(closure)
        drawn = {p for p, o in zip(trained(model), slsam.active[slsam.runner.owner].tolist(), strict=True) if o}
        on = [f.down in drawn for f in factors]
        assert all(on) == (share == 1.0)
        extra = [f.scale * (b @ a) * o for f, (a, b), o in zip(factors, aux, on, strict=True)]
        expected, gradients, of_weights = twin_step(inputs, extra)(state)
        assert float(loss) == pytest.approx(expected, rel=ORACLE)
        assert_same([p.grad for p in slsam.runner.parameters], gradients)
        for (a, b), f, o, g, (of_a, of_b) in zip(aux, factors, on, of_weights, ascents, strict=True):
            if o:
                down, up = f.scale * b.t() @ g, f.scale * g @ a.t()
                a.add_(rate * of_a(down))
                b.add_(rate * of_b(up))
        norm = length_of_products(factors, aux)
        if norm > rho:
            clipped += 1
            for pair in aux:
                for x in pair:
                    x.mul_((rho * (1 - 1e-6) / norm) ** 0.5)
        for got, wanted in zip(slsam.ascent.auxiliary, aux, strict=True):
            assert_same(got, wanted)
        assert length_of_products(factors, aux) <= rho
    assert clipped
    if adam:
        assert (len({each.steps for pair in ascents for each in pair}) > 1) == (share < 1), "each pair counts its own"


def length_of_products(factors, aux):
    """Return the norm of all s B2 A2 together."""
    products = [f.scale * b.double() @ a.double() for f, (a, b) in zip(factors, aux, strict=True)]
    return float(torch.stack([x.norm() for x in products]).norm())


@pytest.mark.parametrize("seed", range(3))
def test_the_radius_holds_in_float32_where_a_product_is_far_shorter_than_its_factors(seed):
    """B2 A2 = -0.001 Q R, as the difference of two products a thousand times as long."""
    torch.manual_seed(seed)
    down, up = torch.nn.Linear(96, 8, bias=False), torch.nn.Linear(8, 128, bias=False)
    model, factors, rho = torch.nn.Sequential(down, up), [Factors("f", Pair(down, up))], 1e-3
    slsam = SLSAM(
        arms_of(model, "tensor"), SLSAMConfig(method="bi_lora", granularity="tensor", rho=rho), factors=factors
    )
    slsam.learning_rate = lambda p: 0.0
    (a, b), (p, q, r) = slsam.ascent.auxiliary[0], (torch.randn(*shape) for shape in ((128, 4), (128, 4), (4, 96)))
    a.copy_(torch.cat([r, -r]))
    b.copy_(torch.cat([p, p + 1e-3 * q], dim=1))
    x = torch.randn(5, 96)
    closure, _ = passes_of(lambda: model(x).square().mean())
    slsam.update(closure)
    assert 0.99 * rho < length_of_products(factors, slsam.ascent.auxiliary) <= rho


def test_one_process_moves_a_pair_without_a_gradient_as_several_do():
    """Ranks send a gradient of 0 for a pair that took no part in the loss, and Adam goes on with its momentum."""
    ends = []
    for reduce in (None, lambda tensors: None):  # which is what averaging does where ranks see the same
        torch.manual_seed(0)
        layers = torch.nn.ModuleList([torch.nn.Linear(*s, bias=False).double() for s in ((6, 3), (3, 6)) * 2])
        factors = [Factors(str(i), Pair(*layers[i : i + 2])) for i in (0, 2)]
        config = SLSAMConfig(method="bi_lora", granularity="tensor", rho=1.0)
        slsam = SLSAM(arms_of(layers, "tensor"), config, factors=factors)
        slsam.learning_rate, slsam.reduce = lambda p: RATE, reduce
        x = torch.randn(5, 6, dtype=torch.float64)
        for used in (2, 2, 1, 2):

            def forward(layers=layers, x=x, used=used):
                return sum(layers[2 * i + 1](layers[2 * i](x)).square().mean() for i in range(used))

            slsam.update(passes_of(forward)[0])
        ends.append([t for pair in slsam.ascent.auxiliary for t in copied(pair)])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_what_is_frozen_for_now_is_not_moved_by_momentum():
    model = decoder(dropout=0.0)
    slsam = algorithm(model, method="bi_lora", rho=50.0)  # never clipped
    closure, _ = closures(model, batch())
    slsam.update(closure)
    slsam.update(closure)
    auxiliary = [x for pair in slsam.ascent.auxiliary for x in pair]
    before = copied(auxiliary)
    frozen = factors_of(model)[0].down
    frozen.requires_grad_(False)
    slsam.update(closure)
    moved = [not torch.equal(x, y) for x, y in zip(auxiliary, before, strict=True)]
    assert moved == [False] + [True] * (len(moved) - 1)


def copied_state(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def test_it_ascends_and_nothing_of_it_is_in_the_model():
    """The loss at the perturbed weights rises above that at w; parameters, modules and names are as before."""
    model = decoder(dropout=0.0)
    names, before = list(model.state_dict()), copied(trained(model))
    slsam = algorithm(model, method="bi_lora", rho=0.5)
    closure, forward = closures(model, batch())
    rises = []
    for _ in range(8):
        rises.append(float(slsam.update(closure)) - float(forward()))
    assert rises[0] == pytest.approx(0.0, abs=EXACT_FLOAT64), "B2 starts at 0"
    assert rises[-1] > rises[1] > 0
    assert list(model.state_dict()) == names
    assert all(torch.equal(p, w) for p, w in zip(trained(model), before, strict=True))
    assert all(isinstance(p, torch.nn.Parameter) for p in model.parameters())
    assert 0 < slsam.metrics["rho"] <= 0.5


def test_its_state_goes_on_bit_for_bit():
    model = decoder(dropout=0.0)
    slsam = algorithm(model, method="bi_lora", rho=0.1, active_fraction=0.4)
    closure, _ = closures(model, batch())
    for _ in range(3):
        slsam.update(closure)
    saved = {k: v.clone() if torch.is_tensor(v) else v for k, v in slsam.state_dict().items()}
    other = algorithm(model, method="bi_lora", rho=0.1, active_fraction=0.4)
    other.load_state_dict(saved)
    gradients = []
    for each in (slsam, other):
        for _ in range(2):
            each.update(closure)
        gradients.append([None if p.grad is None else p.grad.clone() for p in trained(model)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    for a, b in zip(slsam.ascent.auxiliary, other.ascent.auxiliary, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def without(state, key):
    return {k: v for k, v in state.items() if k != key}


SPOILT = {
    "a factor is missing": (lambda s: without(s, "ascent.0.1"), "'0.1' is missing or of another shape"),
    "of another rank": (lambda s: {**s, "ascent.0.0": torch.zeros(2, 32)}, "'0.0' is missing or of another shape"),
    "the norm is missing": (lambda s: without(s, "ascent.norm"), "'norm' is missing or of another shape"),
    "a moment is missing": (lambda s: without(s, "ascent.0.1.1"), "'0.1.1' is missing or of another shape"),
    "a count is missing": (lambda s: without(s, "ascent.0.1.2"), "'0.1.2' is missing or of another shape"),
    "a moment of another shape": (lambda s: {**s, "ascent.0.1.0": torch.zeros(3)}, "'0.1.0' is missing or of another"),
    "a pair too many": (lambda s: {**s, "ascent.99.0": torch.zeros(3, 32)}, "'99.0' is of no pair here"),
    "moments of no pair": (lambda s: {**s, "ascent.99.0.1": torch.zeros(3, 32)}, "'99.0.1' is of no pair here"),
    "a moment too many": (lambda s: {**s, "ascent.0.1.3": torch.zeros(())}, "'0.1.3' is of no pair here"),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILT.values(), ids=SPOILT)
def test_a_state_that_does_not_fit_is_refused_by_name(spoil, message):
    model = decoder(dropout=0.0)
    slsam = algorithm(model, method="bi_lora", rho=0.1)
    closure, _ = closures(model, batch())
    slsam.update(closure)
    saved = slsam.state_dict()
    with pytest.raises(ValueError, match=rf"no second adapter that fits this one \({message}"):
        slsam.load_state_dict(spoil(saved))
    again = slsam.state_dict()
    assert all(torch.equal(v, again[k]) for k, v in saved.items() if torch.is_tensor(v)), "nothing has changed"


# Flat-LoRA


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
@pytest.mark.parametrize("share", [1.0, 0.4], ids=["all", "drawn"])
def test_noise_on_the_weights_is_that_of_the_slow_reference(share, checkpointing):
    """The noise of the same seed added to a twin's weights: gradients of every factor, whatever is recomputed."""
    model = decoder(checkpointing=checkpointing, dropout=0.0)
    slsam = algorithm(model, method="flat_lora", rho=0.3, active_fraction=share, seed=5)
    slsam.progress = lambda: 0.75
    inputs, factors = batch(), factors_of(model)
    before = copied_state(model)
    for step in range(2):
        closure, _ = closures(model, inputs)
        loss = slsam.update(closure)
        drawn = {p for p, o in zip(trained(model), slsam.active[slsam.runner.owner].tolist(), strict=True) if o}
        sigma = 0.3 * (1 - math.cos(0.75 * math.pi)) / 2
        extra = []
        for i, f in enumerate(factors):
            merged = f.base.weight + f.scale * f.up @ f.down
            (normal,) = seeded_normal([merged], 5, step, i)
            rows = torch.stack(
                [sigma / math.sqrt(merged.shape[1]) * row.norm() * n for row, n in zip(merged, normal, strict=True)]
            )
            extra.append((rows * (f.down in drawn)).detach())
        expected, gradients, _ = twin_step(inputs, extra)(before)
        assert float(loss) == pytest.approx(expected, rel=ORACLE)
        assert_same([p.grad for p in slsam.runner.parameters], gradients)
        assert slsam.metrics["rho"] == pytest.approx(sigma, rel=1e-6)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "no weight is written"
    assert not any(key.startswith("ascent.") for key in slsam.state_dict())
    assert not slsam.ascent._noisy, "nothing is kept but a seed"
    assert not any("forward" in vars(f.base) for f in factors)


def one_layer(base, out=24, features=40):
    torch.manual_seed(0)
    down, up = (torch.nn.Linear(*shape, bias=False) for shape in ((features, 3), (3, out)))
    weight, computes_in = _weight_of(base)
    return Factors("layer", Pair(down, up), 2.0, base, weight, computes_in)


def test_the_noise_has_mean_0_and_the_deviation_of_its_row():
    base = torch.nn.Linear(40, 24, bias=False)
    with torch.no_grad():
        base.weight[3] *= 20
    factors = one_layer(base)
    drawn = torch.stack([_NoisyLinear(factors, 0.3, (0, k, 0)).weight(torch.float32) for k in range(400)])
    noise = (drawn - base.weight.detach()).double()
    merged = (base.weight + 2.0 * factors.up @ factors.down).detach().double()
    rows = 0.3 / math.sqrt(40) * merged.norm(dim=1)
    assert float((noise.mean(0) / rows[:, None]).abs().max()) < 5 / math.sqrt(400)
    torch.testing.assert_close(noise.flatten(2).std((0, 2)) / rows, torch.ones_like(rows), rtol=0, atol=0.05)


def test_rows_are_as_long_under_autocast():
    """The forward runs within it, and a product in bfloat16 would be off by a 256th."""
    factors = one_layer(torch.nn.Linear(40, 24, bias=False))
    with torch.no_grad():
        factors.up.mul_(10)
    plain = _NoisyLinear(factors, 0.3, (0, 0, 0)).weight(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(_NoisyLinear(factors, 0.3, (0, 0, 0)).weight(torch.float32), plain)


def test_a_weight_with_noise_lives_in_its_product_alone():
    """Nothing as large as a weight is kept for the backward pass, neither by autograd nor beside it."""
    model, inputs = decoder(dropout=0.0), batch()
    shapes = {shape for f in factors_of(model) for shape in (f.base.weight.shape, f.base.weight.t().shape)}
    saved, alive = [], []

    def living():
        return sum(isinstance(x, torch.Tensor) and x.shape in shapes for x in gc.get_objects())

    def closure():
        before = living()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
            loss = model(**inputs).loss
        alive.append(living() - before)
        loss.backward()
        return loss

    algorithm(model, method="flat_lora", rho=0.3).update(closure)
    assert saved
    assert not shapes.intersection(saved)
    assert alive == [0]
    algorithm(model, method="flat_lora", rho=0.0).update(closure)
    assert shapes.intersection(saved), "a plain product does keep its weight"


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "nested"])
def test_on_four_bits_the_noise_is_on_the_dequantized_weight(compress):
    """Within the module's own product, forward and backward; the packed weight and its state stay as they are."""
    base = Linear4bit(
        64, 64, bias=True, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=compress
    ).to("cpu")
    base.requires_grad_(False)
    packed = base.weight.data.clone()
    factors = one_layer(base, 64, 64)
    dense = factors.weight().clone()
    x = torch.randn(5, 64, requires_grad=True)
    torch.testing.assert_close(_NoisyLinear(factors, 0.0, (0, 0, 0))(x), base(x), rtol=1e-5, atol=1e-5)
    noisy = _NoisyLinear(factors, 0.2, (0, 1, 2))
    moved = noisy.weight(torch.float32)
    assert float((moved - dense).abs().max()) > 0.01
    y = noisy(x)
    torch.testing.assert_close(y, x @ moved.t() + base.bias)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(5, 64) @ moved)
    assert torch.equal(base.weight.data, packed)


def test_modules_whose_weight_cannot_be_had_are_refused_by_name():
    model = decoder("gpt2", dropout=0.0)
    with pytest.raises(ValueError, match=r"ascent='flat_lora' adds noise.*h\.0\.attn\.c_attn is a Conv1D"):
        algorithm(model, method="flat_lora")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda base: base.bias.requires_grad_(True), "has a trained bias"),
        (lambda base: base.weight.requires_grad_(True), "has a trained weight"),
        (lambda base: setattr(base, "forward", base.forward), "has a forward that something else has replaced"),
    ],
    ids=["bias", "weight", "forward"],
)
def test_modules_that_something_else_works_on_are_refused_by_name(change, reason):
    """The noise would be in the loss and not in the gradient of the one, or push the other aside."""
    model = decoder("qwen2", dropout=0.0)
    config, arms, factors = SLSAMConfig(method="flat_lora"), arms_of(model), factors_of(model)
    change(factors[1].base)
    with pytest.raises(ValueError, match=rf"ascent='flat_lora' adds noise.*layers\.0\.self_attn\.k_proj {reason}"):
        SLSAM(arms, config, factors=factors)


# What all of them owe


def micro_batch(model, inputs, tokens):
    """Return the passes over some of a step's sequences, of whose tokens there are so many."""

    def forward_of(rows):
        return lambda: summed(model, first_rows(inputs, rows), tokens, backward=False)

    def cut(rows):
        part = first_rows(inputs, rows)
        return Cut(lambda: summed(model, part, tokens), scored_items(part), forward_of(rows))

    count, run = len(inputs["input_ids"]), lambda: summed(model, inputs, tokens)
    return Passes(run, run, forward_of(count), count, cut, scored_items(inputs), tokens)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
@pytest.mark.parametrize("name", ["zeroth_order", "bar", "bi_lora", "flat_lora"])
def test_two_micro_batches_are_one_batch(name, checkpointing):
    """Gradients, weights, loss and what the rule keeps, whatever is recomputed in the backward pass."""
    inputs, ends = batch(4, 9), []
    inputs["labels"] = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], -100)
    tokens = scored_items(inputs)
    for rows, way in ((4, None), (2, checkpointing)):
        model = exact_norms(decoder(checkpointing=way, dropout=0.0))
        slsam = algorithm(model, method="auto", ascent=name, rho=0.3, active_fraction=0.6)
        optimizer, losses = torch.optim.SGD(trained(model), RATE), []
        for _ in range(2):
            parts = [
                {k: v[i : i + rows] if torch.is_tensor(v) else v for k, v in inputs.items()} for i in range(0, 4, rows)
            ]
            for i, part in enumerate(parts):
                slsam.accumulate(micro_batch(model, part, tokens), i, len(parts))
            losses.append(torch.tensor(slsam.loss, dtype=torch.float64))
            optimizer.step()
        kept = list(slsam.ascent.state_dict().values())
        ends.append([p.grad for p in trained(model)] + copied(trained(model)) + losses + kept)
    assert_same(*ends, tolerance=TRAJECTORY)


@pytest.mark.parametrize("name", ["bar", "bi_lora", "flat_lora"])
def test_a_pair_is_drawn_where_both_of_its_factors_are(name):
    """Where an arm is a tensor, a pair may be drawn by half; such a one is left alone, as what is not drawn is."""
    model = decoder(dropout=0.0)
    factors, touched = factors_of(model), []
    settings = {"method": "auto", "ascent": name, "rho": 0.5, "granularity": "tensor", "active_fraction": 0.5}
    slsam = SLSAM(arms_of(model, "tensor"), SLSAMConfig(**settings), factors=factors)
    slsam.learning_rate = lambda p: RATE
    closure, _ = closures(model, batch())
    before = {p: p.detach().clone() for p in trained(model)}

    def noted():
        touched.extend("forward" in vars(f.base) or len(f.down) == 6 for f in factors)
        return closure()

    slsam.update(noted)
    if name == "bar":
        touched = [not torch.equal(f.down, before[f.down]) for f in factors]
        assert touched == [not torch.equal(f.up, before[f.up]) for f in factors]
    drawn = {p for p, o in zip(trained(model), slsam.active[slsam.runner.owner].tolist(), strict=True) if o}
    halves = [len(drawn.intersection(f.pair.weights)) for f in factors]
    assert set(halves) == {0, 1, 2}
    assert touched == [number == 2 for number in halves]


@pytest.mark.parametrize("name", ["bar", "obar", "bi_lora", "flat_lora"])
def test_what_is_no_pair_is_refused_by_name(name):
    model = decoder(dropout=0.0, use_dora=True)
    with pytest.raises(ValueError, match=rf"ascent='{name}' works on the product.*is no factor of a plain pair"):
        algorithm(model, method="sam", ascent=name)


COMBINATIONS = {
    "a radius": ({"method": "bar", "radius": "asam"}, "radius='asam' and ascent='bar'"),
    "a loss rise": ({"method": "bi_lora", "loss_rise": 0.3}, "radius='loss_rise' and ascent='bi_lora'"),
    "a part": ({"method": "flat_lora", "ascent_sequences": 1}, "ascent_sequences=1 and ascent='flat_lora'"),
    "sampa that trains some": (
        {"ascent": "sampa", "active_fraction": 0.5},
        "ascent='sampa' trains every arm in every step, and descent='active'",
    ),
}


@pytest.mark.parametrize(("settings", "message"), COMBINATIONS.values(), ids=COMBINATIONS)
def test_combinations_without_a_meaning_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        SLSAMConfig(**settings)


@pytest.fixture(scope="module")
def arms():
    return arms_of(decoder(dropout=0.0))


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("method", ["auto", "sam", "depth", None])
def test_names_are_kept_where_settings_are_kept(name, method, arms):
    """In checkpoints and records, on cards and in comparisons; without a radius it is plain LoRA."""
    descent = {"descent": "all"} if name == "sampa" else {}
    config = SLSAMConfig(method=method, ascent=name, **descent)
    assert config.resolved.ascent == name
    assert SLSAMConfig.from_dict(config.to_dict()).resolved == config.resolved
    assert f"ascent={name}" in settings_of(config)
    assert slsam_config({"method": method, "ascent": name, "rho": 0.1, **descent}).ascent == name
    plain = SLSAM(arms, SLSAMConfig(method=method, ascent=name, rho=0, **descent), fraction=0.5)
    assert type(plain.ascent) is Ascent


@pytest.mark.parametrize("name", ["bar", "bi_lora", "flat_lora"])
def test_a_comparison_takes_them_by_method(name):
    how = MethodSettings(learning_rates=[1e-3], slsam={"method": name}, rhos=[0.05, 0.5])
    assert [slsam_config(how.slsam_with(tried)).rho for tried in how.candidates] == [0.05, 0.5]


def test_each_rule_says_what_it_costs():
    """On eight sequences, checkpointed; a plain pass of ours is a bit cheaper than TRL's, which goes below block 0."""
    model = decoder("llama", dropout=0.0, r=1)
    cost = CostModel.from_model(model, checkpointing=True)
    shapes, every = [(8, 64)], [True] * len(cost)

    def ratio(**settings):
        return cost.ratio(every, shapes, rule_of(SLSAMConfig(active_fraction=1.0, **settings)))

    plain = ratio(rho=0.0)
    assert plain == pytest.approx(1.0, abs=0.02)
    assert ratio(method="bar") == ratio(method="auto", ascent="obar") == plain
    assert 1.0 < ratio(method="bi_lora") / plain < 1.15
    assert 1.0 < ratio(method="flat_lora") / plain < 1.05
    assert ratio(method="auto", ascent="sampa") == ratio(method="auto", ascent="ahead")
    whole, part = (ratio(method="auto", ascent=name) for name in ("partial", "zeroth_order"))
    assert plain < part < whole
    eight = ratio(method="auto", ascent="zeroth_order", ascent_sequences=8)
    assert eight - plain == pytest.approx(8 * (part - plain))


def test_objects_take_their_own_strength():
    model = decoder(dropout=0.0)
    for ascent in (Balancing(0.3), Adversary(0.2), WeightNoise(0.1)):
        assert algorithm(model, method="auto", ascent=ascent).config.ascent is ascent
        resolved = SLSAMConfig(method="auto", ascent=ascent).resolved
        assert (resolved.rho, resolved.loss_rise, resolved.radius) == (None, None, "length"), "it knows its own"
        with pytest.raises(ValueError, match=rf"which knows how strong it is \({ascent.strength}\), and rho=0\.5 is"):
            SLSAMConfig(method="auto", ascent=ascent, rho=0.5)
        assert not SLSAMConfig(method="auto", ascent=ascent, rho=0.0).resolved.is_perturbed
        bare, named = (SLSAMConfig(method="auto", ascent=x).resolved for x in (type(ascent)(), ascent.rule))
        assert (bare.rho, bare.loss_rise, bare.radius) == (named.rho, None, "length")
        assert algorithm(model, method="auto", ascent=type(ascent)(), rho=0.7).config.rho == 0.7
