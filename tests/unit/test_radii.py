"""Radii in units of the weights, of neurons and of the adapted weights: twins, and what each is invariant to."""

import math

import pytest
import torch

from slsam_peft import SLSAM, SLSAMConfig, SLSAMTrainer, arms_of
from slsam_peft.algorithm.factors import Factors, product_norm_squared
from slsam_peft.algorithm.norms import joint_norm
from slsam_peft.algorithm.radius import Adaptive, Length, LossRise, Neuron, Offsets, WeightSpace, build_radius
from slsam_peft.algorithm.stack import Pair
from slsam_peft.saving.card import settings_of
from slsam_peft.trainer.factors import factors_of
from tests.decoders import batch, decoder
from tests.look_ahead import gradients_at, mean_gradients, summed
from tests.tiny import build, lora
from tests.tolerances import EXACT_FLOAT64, FLOAT32_NORMS, ORACLE, ROOT

RHO = 0.3
NAMED = ("asam", "neuron", "weight")


def padded(rows=3, length=9):
    inputs = batch(rows, length)
    return {**inputs, "labels": torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], -100)}


def changes(factors, offsets):
    """Return the change of each adapted weight that offsets of its factors make, as a matrix."""
    found = []
    for f in factors:
        a, b = f.down.detach(), f.up.detach()
        moved = (b + offsets.get(f.up, 0)) @ (a + offsets.get(f.down, 0))
        found.append(f.scale * (moved - b @ a))
    return found


def length_of(tensors):
    return float(torch.stack([t.norm() for t in tensors]).norm())


def slow_offsets(radius, factors, gradients, rho):
    """Return e by its definition, entry by entry or, for the adapted weights, by bisection on whole matrices."""
    if radius == "weight":
        norm, low, high = length_of(gradients.values()), 0.0, 1e3
        for _ in range(200):
            middle = (low + high) / 2
            e = {p: middle * g / norm for p, g in gradients.items()}
            low, high = (middle, high) if length_of(changes(factors, e)) < rho else (low, middle)
        return {p: low * g / norm for p, g in gradients.items()}
    metric = {}
    for p in gradients:
        w = p.detach()
        rows = torch.stack([row.square().sum().sqrt().expand(row.shape) for row in w])
        metric[p] = (w.abs() if radius == "asam" else rows) + 0.01
    size = sum(float((metric[p] * g).square().sum()) for p, g in gradients.items()) ** 0.5
    return {p: rho * metric[p] ** 2 * g / size for p, g in gradients.items()}


@pytest.mark.parametrize("share", [1.0, 0.4], ids=["all", "drawn"])
@pytest.mark.parametrize("radius", NAMED)
def test_a_step_is_that_of_the_slow_reference(radius, share):
    """Descent gradients of every arm, the perturbed ones being all or those that were drawn."""
    models = [decoder(dropout=0.0) for _ in range(2)]
    inputs = padded()
    config = SLSAMConfig(method="sam", radius=radius, rho=RHO, active_fraction=share)
    slsam = SLSAM(arms_of(models[0]), config, factors=factors_of(models[0]))
    tokens = (inputs["labels"][:, 1:] != -100).sum()
    loss = slsam.update(lambda: summed(models[0], inputs, tokens))
    twin = [p for arm in arms_of(models[1]) for p in arm.parameters]
    on = slsam.active[slsam.runner.owner].tolist()
    assert all(on) == (share == 1.0)
    at_w = mean_gradients(models[1], inputs)
    drawn = {p: at_w[p] for p, o in zip(twin, on, strict=True) if o}
    e = slow_offsets(radius, factors_of(models[1]), drawn, RHO)
    _, expected = gradients_at(models[1], inputs, e)
    for p, q in zip(slsam.runner.parameters, twin, strict=True):
        torch.testing.assert_close(p.grad, expected[q], rtol=0, atol=ORACLE)
    assert float(loss) == pytest.approx(float(summed(models[1], inputs, tokens, backward=False)), rel=ORACLE)
    assert slsam.metrics["rho"] == RHO
    rise = sum(float((e[p] * g).sum()) for p, g in drawn.items())
    assert slsam.metrics["ascent_gain"] == pytest.approx(slsam.metrics["sharpness"] / rise, rel=ORACLE)


def split_unevenly(factors, c):
    """Write each product as (B / c) (c A)."""
    with torch.no_grad():
        for f in factors:
            f.down.mul_(c)
            f.up.div_(c)


def loss_at_w_plus_e(model, radius, inputs):
    """Return the loss at w + e, e made by a radius of the gradient of the same batch."""
    gradients = mean_gradients(model, inputs)
    norm = joint_norm(list(gradients.values()), torch.device("cpu"))
    one = torch.ones((), dtype=torch.float64)
    offsets, *_ = radius(model).offsets(list(gradients.values()), list(gradients), norm, one)
    loss, _ = gradients_at(model, inputs, dict(zip(gradients, offsets, strict=True)))
    return loss


def test_the_adaptive_radius_does_not_see_how_a_product_is_split():
    """A -> c A, B -> B / c leaves the model as it is, and the perturbed one as well; under plain rho it does not."""
    inputs = padded()
    found = {}
    for c in (1.0, 7.0):
        model = decoder(dropout=0.0)
        split_unevenly(factors_of(model), c)
        found[c] = {
            "asam": loss_at_w_plus_e(model, lambda m: Adaptive(RHO, eta=0.0), inputs),
            "plain": loss_at_w_plus_e(model, lambda m: Length(RHO), inputs),
        }
    assert found[7.0]["asam"] == pytest.approx(found[1.0]["asam"], rel=EXACT_FLOAT64)
    assert abs(found[7.0]["plain"] - found[1.0]["plain"]) > 1e-3


@pytest.mark.parametrize("radius", [Adaptive, Neuron])
def test_factors_that_are_zero_move_by_eta(radius):
    """B = 0 when training starts, and then A has no gradient: eta moves B alone, a hundredth of rho far."""
    model = decoder(dropout=0.0)
    with torch.no_grad():
        for f in factors_of(model):
            f.up.zero_()
    gradients = mean_gradients(model, padded())
    norm = joint_norm(list(gradients.values()), torch.device("cpu"))
    for eta in (0.01, 0.0):
        offsets, *_ = radius(RHO, eta=eta).offsets(list(gradients.values()), list(gradients), norm, torch.ones(()))
        assert length_of(offsets) == pytest.approx(RHO * eta, rel=EXACT_FLOAT64)
        assert all(bool(torch.isfinite(e).all()) for e in offsets)


def test_each_row_moves_by_the_square_of_its_norm():
    """e_i is proportional to |w_i|^2 g_i, and T^-1 e has the length that was asked for."""
    torch.manual_seed(0)
    weight, gradient = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    weight[2] *= 10
    (e,), rho = Neuron(RHO, eta=0.0).offsets([gradient], [weight], gradient.norm(), torch.ones(()))
    norms = weight.norm(dim=1)
    factor = e / gradient / norms[:, None] ** 2
    torch.testing.assert_close(factor, factor[:1, :1].expand(5, 7), rtol=EXACT_FLOAT64, atol=0)
    assert float((e / norms[:, None]).norm()) == pytest.approx(RHO, rel=EXACT_FLOAT64)
    assert float(rho) == RHO


def twice_the_rank(model):
    """Write each product as a sum of its halves: twice the rank, A and B each divided by the root of two."""
    for f in factors_of(model):
        halves = [torch.cat([f.down, f.down]) / 2**0.5, torch.cat([f.up, f.up], dim=1) / 2**0.5]
        f.pair.down.weight, f.pair.up.weight = (torch.nn.Parameter(h.detach()) for h in halves)


def four_times_alpha(model):
    """Let the scale be four times as large and both factors half as large."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling["default"] *= 4
        for f in factors_of(model):
            f.down.div_(2)
            f.up.div_(2)


@pytest.mark.parametrize("radius", [Length(0.3), LossRise(0.5, 2.0)])
def test_where_there_is_no_gradient_the_length_is_zero(radius):
    """As of a sequence with nothing to learn: what is logged is the length of e, and that is none."""
    nothing = torch.zeros(3)
    offsets, rho = radius.offsets([nothing], [torch.ones(3)], torch.zeros(()), torch.ones(()))
    assert float(rho) == 0.0
    assert not offsets[0].any()


@pytest.mark.parametrize("rewritten", [twice_the_rank, four_times_alpha])
def test_the_radius_in_weight_space_sees_neither_ranks_nor_alpha(rewritten):
    """The same adapted weights written otherwise are moved alike; under plain rho, alpha moves them farther."""
    inputs, found = padded(), []
    for change in (None, rewritten):
        model = decoder(dropout=0.0)
        if change is not None:
            change(model)
        found.append(
            [
                loss_at_w_plus_e(model, lambda m: WeightSpace(RHO, factors_of(m)), inputs),
                loss_at_w_plus_e(model, lambda m: Length(RHO), inputs),
            ]
        )
    (before, plain), (after, plain_after) = found
    assert after == pytest.approx(before, rel=ROOT)
    if rewritten is four_times_alpha:
        assert abs(plain_after - plain) > 1e-3


@pytest.mark.parametrize("rho", [1e-3, 0.3, 30.0])
@pytest.mark.parametrize("zero", [None, "up"], ids=["trained", "at the start"])
def test_the_adapted_weights_change_by_rho_and_never_by_more(rho, zero):
    model = decoder(dropout=0.0)
    factors = factors_of(model)
    if zero:
        with torch.no_grad():
            for f in factors:
                f.up.zero_()
    gradients = mean_gradients(model, padded())
    norm = joint_norm(list(gradients.values()), torch.device("cpu"))
    offsets, *_ = WeightSpace(rho, factors).offsets(list(gradients.values()), list(gradients), norm, torch.ones(()))
    change = length_of(changes(factors, dict(zip(gradients, offsets, strict=True))))
    assert change == pytest.approx(rho, rel=ROOT)
    assert change <= rho * (1 + EXACT_FLOAT64)


def test_changes_that_cancel_do_not_carry_the_radius_past_its_first_root():
    """X = -Y: the norm rises, falls to 0 at t = 1 and rises again; the first t is meant, and it is approached."""
    a, b = torch.eye(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    down, up = (torch.nn.Linear(2, 2, bias=False).double() for _ in range(2))
    with torch.no_grad():
        down.weight.copy_(a)
        up.weight.copy_(b)
    factors = [Factors("f", Pair(down, up))]
    gradients = [-a, -b]
    norm = joint_norm(gradients, torch.device("cpu"))
    highest = 2**0.5  # of |(1 - t)^2 - 1| |I|, before t = 1
    for rho in (0.5, 0.9 * highest):
        offsets, *_ = WeightSpace(rho, factors).offsets(gradients, [down.weight, up.weight], norm, torch.ones(()))
        moved = dict(zip([down.weight, up.weight], offsets, strict=True))
        assert length_of(changes(factors, moved)) == pytest.approx(rho, rel=1e-3)
        assert length_of([offsets[0]]) < length_of([a])


def test_a_gradient_of_zero_moves_nothing():
    model = decoder(dropout=0.0)
    parameters = [p for f in factors_of(model) for p in f.pair.weights]
    gradients = [torch.zeros_like(p) for p in parameters]
    for radius in (Adaptive(RHO), Neuron(RHO), WeightSpace(RHO, factors_of(model))):
        offsets, rho = radius.offsets(gradients, parameters, torch.zeros((), dtype=torch.float64), torch.ones(()))
        assert length_of(offsets) == float(rho) == 0.0


def test_a_gradient_that_can_move_nothing_has_no_length():
    """The metric of weights that are all 0 is 0, and so is the change of a product whose other factor is."""
    weights = [torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.float64)) for _ in range(2)]
    gradients = [torch.ones_like(w) for w in weights]
    norm = joint_norm(gradients, torch.device("cpu"))
    for radius in (Adaptive(RHO, eta=0.0), Neuron(RHO, eta=0.0)):
        offsets, rho = radius.offsets(gradients, weights, norm, torch.ones(()))
        assert length_of(offsets) == float(rho) == 0.0
    modules = [torch.nn.Linear(2, 2, bias=False) for _ in weights]
    for module, weight in zip(modules, weights, strict=True):
        module.weight = weight
    radius = WeightSpace(RHO, [Factors("f", Pair(*modules))])
    offsets, rho = radius.offsets(gradients[:1], weights[:1], norm, torch.ones(()))
    assert length_of(offsets) == float(rho) == 0.0
    offsets, rho = radius.offsets(gradients, weights, norm, torch.ones(()))
    assert float(rho) == RHO


@pytest.mark.parametrize("seed", [1, 3])
def test_in_float32_changes_that_nearly_cancel_do_not_carry_the_radius_too_far(seed):
    """X = B dA + dB A is a thirtieth of either: its norm is not in a sum of float32."""
    torch.manual_seed(seed)
    down, up = torch.nn.Linear(96, 8, bias=False), torch.nn.Linear(8, 128, bias=False)
    with torch.no_grad():
        up.weight.mul_(down.weight.norm() / up.weight.norm())
    gradients = [down.weight.detach(), -up.weight.detach() - 0.03 * torch.randn(128, 8) * up.weight.std()]
    norm, factors, rho = joint_norm(gradients, torch.device("cpu")), [Factors("f", Pair(down, up))], 1e-4
    offsets, *_ = WeightSpace(rho, factors).offsets(gradients, [down.weight, up.weight], norm, torch.ones(()))
    a, b, da, db = (x.detach().double() for x in (down.weight, up.weight, *offsets))
    change = length_of([(b + db) @ (a + da) - b @ a])
    assert change == pytest.approx(rho, rel=1e-3)
    assert change <= rho * (1 + FLOAT32_NORMS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_half_precision_are_neither_rounded_nor_out_of_range(dtype):
    gradients = [torch.full((30, 40), 3000.0, dtype=dtype), torch.full((7,), 1.0, dtype=dtype)]
    exact = length_of([g.double() for g in gradients])
    found = joint_norm(gradients, torch.device("cpu"))
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(exact, rel=FLOAT32_NORMS)
    (e,), _ = Neuron(RHO, eta=0.0).offsets([gradients[1][:, None]], [gradients[1][:, None]], found, torch.ones(()))
    assert float(e.double().norm()) == pytest.approx(RHO, rel=torch.finfo(dtype).eps)


def test_the_norm_of_a_product_is_that_of_the_matrix():
    torch.manual_seed(0)
    up, down = torch.randn(9, 3, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    assert float(product_norm_squared(up, down)) == pytest.approx(float((up @ down).square().sum()), rel=EXACT_FLOAT64)


def test_what_is_no_factor_is_named():
    model = decoder(dropout=0.0, modules_to_save=["norm"])
    with pytest.raises(ValueError, match=r"radius='weight' works on the product.*norm.* is no factor.*factors_of"):
        SLSAM(arms_of(model), SLSAMConfig(method="sam", radius="weight"), factors=factors_of(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"radius": "asam", "loss_rise": 0.3}, "radius='asam' and loss_rise=0.3 contradict"),
        ({"radius": "neurons"}, "Did you mean 'neuron'"),
    ],
)
def test_contradictions_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SLSAMConfig(**settings)


@pytest.mark.parametrize(("radius", "rho"), [("asam", 0.5), ("neuron", 0.5), ("weight", 0.05)])
@pytest.mark.parametrize("method", ["auto", "sam", None])
def test_a_radius_by_name_has_a_length_of_its_own(radius, rho, method):
    config = SLSAMConfig(method=method, radius=radius)
    assert (config.resolved.rho, config.resolved.loss_rise) == (rho, None)
    assert SLSAMConfig.from_dict(config.to_dict()).resolved == config.resolved
    assert f"radius={radius}" in settings_of(config)


SETTINGS = {
    "look-ahead": ({"method": "auto"}, {}),
    "accumulated": ({"method": "auto"}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}),
    "two passes": ({"method": "sam"}, {"activation_checkpointing": True}),
    "reentrant": (
        {"method": "paper"},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    ),
}


class Measured:
    """A radius that notes how long, in units of its own, what it makes is."""

    def __init__(self, radius, name, factors):
        self.radius, self.name, self.factors, self.lengths = radius, name, factors, []

    def offsets(self, gradients, weights, norm, unit):
        offsets, rho = self.radius.offsets(gradients, weights, norm, unit)
        self.lengths.append(self.length(dict(zip(weights, offsets, strict=True))))
        return Offsets(offsets, rho)

    def length(self, e):
        if self.name == "weight":
            return length_of(changes(self.factors, e))
        sizes = {w: w.detach().abs() if self.name == "asam" else w.detach().norm(dim=1, keepdim=True) for w in e}
        return length_of([x / (sizes[w] + 0.01) for w, x in e.items()])


@pytest.mark.parametrize("how", SETTINGS)
@pytest.mark.parametrize("radius", NAMED)
def test_it_trains_in_the_trainer(radius, how, tmp_path, monkeypatch):
    """LoRA starts at B = 0, where a radius in units of the weights must not be stuck: e is as long as it is to be."""
    method, training = SETTINGS[how]
    config = SLSAMConfig(radius=radius, **method)

    def measured(config, factors=()):
        return Measured(build_radius(config, factors), radius, factors)

    monkeypatch.setattr("slsam_peft.algorithm.slsam.build_radius", measured)
    trainer = build(SLSAMTrainer, tmp_path, config, peft_config=lora(), **training)
    trainer.train()
    lengths = trainer.slsam.radius.lengths
    assert trainer.slsam.steps == len(lengths) == 3
    assert trainer.slsam.skipped == 0
    rho = config.resolved.rho
    assert lengths == pytest.approx([rho] * 3, rel=1e-3)
    assert trainer.slsam.metrics["rho"] == pytest.approx(rho)
    assert math.isfinite(trainer.slsam.metrics["ascent_gain"])
