"""An object in the place of a name serves the algorithm that was made last with it; an earlier one is refused."""

import copy
import functools
import gc

import pytest
import torch
from transformers import TrainerCallback

from slsam_peft import SLSAM, SLSAMConfig, SLSAMTrainer, arms_of
from slsam_peft.algorithm.adversary import Adversary
from slsam_peft.algorithm.ascents import Ahead, Ascent, Part, Remembered, TwoPass
from slsam_peft.algorithm.balancing import Balancing
from slsam_peft.algorithm.noise import WeightNoise
from slsam_peft.algorithm.ownership import SHARED
from slsam_peft.algorithm.radius import Adaptive, Length, LossRise, Neuron, Offsets
from slsam_peft.algorithm.rules import build_ascent
from slsam_peft.algorithm.sampa import Sampa
from slsam_peft.algorithm.zeroth_order import ZerothOrder
from slsam_peft.presets import ASCENTS
from slsam_peft.trainer.factors import factors_of
from slsam_peft.trainer.riding import lora_pairs
from tests.decoders import batch, closures, decoder
from tests.look_ahead import first_rows, look_ahead_passes
from tests.tiny import build


class Run:
    """A decoder of its own with an algorithm over it."""

    def __init__(self, config):
        self.model = decoder(dropout=0.0)
        given = {"pairs": lora_pairs(self.model), "factors": factors_of(self.model)}
        self.slsam = SLSAM(arms_of(self.model), config, **given)
        self.slsam.learning_rate = lambda p: 1e-2

    def step(self):
        """Make a step as every ascent can: on two sequences, of which one makes an ascent of a part."""
        inputs = {**batch(2, 9)}
        inputs["labels"] = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], -100)
        ascent = self.slsam.ascent
        if ascent.rides:
            self.slsam.accumulate(look_ahead_passes(self.model, inputs, inputs))
            return
        closure, forward_only = closures(self.model, inputs)
        small, small_forward = closures(self.model, first_rows(inputs, 1))
        part = None if not ascent.cuts else small_forward if ascent.forwards else small
        self.slsam.update(closure, part, forward_only)

    def state(self):
        """Return weights, gradients and what later steps depend on."""
        kept = {k: v.clone() for k, v in self.slsam.state_dict().items() if torch.is_tensor(v)}
        weights = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        grads = {f"{n}.grad": p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        return {**kept, **weights, **grads}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(torch.nan_to_num(v), torch.nan_to_num(other[k])) for k, v in one.items())


class Counted(Part):
    """A rule of a user that keeps something in a class derived from one that keeps nothing."""

    steps = 0

    def take(self, index, count, sequences, taken):
        self.steps += 1
        return super().take(index, count, sequences, taken)


class Growing:
    """A radius of a user, a little longer in each step."""

    length = 0.1

    def offsets(self, gradients, weights, norm, unit):
        self.length *= 1.01
        return Offsets([self.length * g / norm for g in gradients], torch.full_like(norm, self.length))


class Turns:
    """A sampling scheme and a bandit of a user, as an object and by a method."""

    def __init__(self):
        self.calls = 0

    def __call__(self, probabilities, generator):
        self.calls += 1
        return torch.arange(len(probabilities)) % 2 == self.calls % 2

    def learn(self, probabilities, mask, norms, inclusion):
        self.calls += 1
        return probabilities

    def state_dict(self):
        return {"calls": torch.tensor(self.calls)}

    def load_state_dict(self, state):
        self.calls = int(state["calls"])


def scheme(probabilities, generator, turns=None):
    return torch.ones_like(probabilities, dtype=torch.bool)


KEPT = {
    "bar": ("Balancing", lambda: {"method": "bar", "ascent": Balancing()}),
    "bi_lora": ("Adversary", lambda: {"method": "bi_lora", "ascent": Adversary()}),
    "flat_lora": ("WeightNoise", lambda: {"method": "flat_lora", "ascent": WeightNoise()}),
    "sampa": ("Sampa", lambda: {"method": "auto", "ascent": Sampa(1)}),
    "a derived class": ("Counted", lambda: {"method": "auto", "ascent": Counted(1)}),
    "radius": ("Growing", lambda: {"method": "auto", "radius": Growing()}),
    "design": ("Turns", lambda: {"method": "auto", "design": Turns()}),
    "bandit, by a method": ("Turns", lambda: {"method": "auto", "bandit": Turns().learn}),
    "a partial": ("Turns", lambda: {"method": "auto", "design": functools.partial(Turns())}),
}


@pytest.mark.parametrize("case", KEPT)
def test_an_earlier_algorithm_does_not_go_on_with_what_another_one_keeps(case):
    """By no way that reads or writes it; the other one is as if there had been none."""
    name, settings = KEPT[case]
    config = SLSAMConfig(**settings())
    first = Run(config)
    first.step()
    saved, message = first.slsam.state_dict(), rf"the {name} that this SLSAM was made with.*Make one {name} for each"
    second, alone = Run(config), Run(SLSAMConfig(**settings()))
    if name == "Turns":  # which no `begin` tells that it starts anew
        second.slsam.load_state_dict(alone.slsam.state_dict())
    for _ in range(2):
        for go_on in (first.step, first.slsam.state_dict, lambda: first.slsam.load_state_dict(saved)):
            with pytest.raises(ValueError, match=message):
                go_on()
        second.step()
        if name == "Growing":  # neither does it
            continue
        alone.step()
        assert_same(second.state(), alone.state())


@pytest.mark.parametrize("case", ["bi_lora", "design"])
def test_what_has_gone_leaves_no_owner(case):
    """Another one has been there, whoever of the two still is."""
    config = SLSAMConfig(**KEPT[case][1]())
    first, second = Run(config), Run(config)
    del second
    gc.collect()
    with pytest.raises(ValueError, match="has been handed to another SLSAM"):
        first.step()
    Run(config).step()


FREE = {
    "two_pass": {"method": "sam", "ascent": TwoPass()},
    "partial": {"method": "auto", "ascent": Part(1)},
    "ahead": {"method": "auto", "ascent": Ahead(1)},
    "zeroth_order": {"method": "auto", "ascent": ZerothOrder(1)},
    "remembered": {"method": "auto", "descent": "active", "active_fraction": 1.0, "ascent": Remembered()},
    **{type(radius).__name__: {"method": "auto", "radius": radius} for radius in (Length(0.1), LossRise(0.3, 2.0))},
    **{type(radius).__name__: {"method": "auto", "radius": radius} for radius in (Adaptive(0.5), Neuron(0.5))},
    "function": {"method": "auto", "design": scheme},
    "partial of a function": {"method": "auto", "design": functools.partial(scheme, turns=None)},
}


@pytest.mark.parametrize("case", FREE)
def test_what_keeps_nothing_serves_several_at_once(case):
    config, own = SLSAMConfig(**FREE[case]), SLSAMConfig(**copy.deepcopy(FREE[case]))
    first, second, alone = Run(config), Run(config), Run(own)
    for _ in range(2):
        for run in (first, second, alone):
            run.step()
    assert_same(first.state(), alone.state())
    assert_same(second.state(), alone.state())


@pytest.mark.parametrize("name", sorted(set(ASCENTS) - {"auto"}))
def test_of_our_own_rules_those_alone_are_shared_that_keep_nothing(name):
    descent = {"descent": "active", "active_fraction": 1.0} if name == "remembered" else {}
    run = Run(SLSAMConfig(method="auto", ascent=name, **descent))
    before = dict(vars(build_ascent(name, run.slsam.config.ascent_sequences)))
    run.step()
    assert (vars(run.slsam.ascent) == before) == (type(run.slsam.ascent) in SHARED)


@pytest.mark.parametrize("case", ["bar", "bi_lora", "flat_lora", "design"])
def test_a_copy_of_an_algorithm_has_copies_of_its_rules(case):
    run = Run(SLSAMConfig(**KEPT[case][1]()))
    run.step()
    copied = copy.deepcopy(run)
    for either in (run, copied):
        either.step()
    assert_same(run.state(), copied.state())


def test_a_rule_is_read_where_it_was_made():
    """It is no copy: a user reads what it holds, before and after an algorithm was made anew with it."""
    rule = Adversary(0.2)
    config = SLSAMConfig(method="bi_lora", ascent=rule)
    for _ in range(2):
        run = Run(config)
        run.step()
        assert run.slsam.ascent is rule
        assert float(run.slsam.ascent.auxiliary[0][1].abs().max()) > 0
        assert rule.auxiliary[0][1] is run.slsam.ascent.auxiliary[0][1]


def test_trainers_take_turns_and_each_begins_anew(tmp_path):
    """One after the other with the same settings, and one of them again; not one within the other."""
    config = SLSAMConfig(method="bi_lora", ascent=Adversary(), rho=0.2, trace=False)
    first, second = (build(SLSAMTrainer, tmp_path / name, config, max_steps=1) for name in ("first", "second"))
    assert first.slsam.steps == 0  # made before training, for a look at it
    first.train()
    second.train()
    assert first.slsam.steps == second.slsam.steps == 1
    with pytest.raises(ValueError, match="the Adversary that this SLSAM was made with.*Make one Adversary for each"):
        first.slsam.state_dict()
    first.train()
    assert first.slsam.steps == 1
    with pytest.raises(ValueError, match="the Adversary that this SLSAM"):
        second.slsam.state_dict()


def test_a_radius_that_takes_the_place_of_another_is_owned_too():
    radius = Growing()
    first, second = (Run(SLSAMConfig(method="auto")) for _ in range(2))
    for run in (first, second):
        run.slsam.radius = radius
        run.step()
    with pytest.raises(ValueError, match="the Growing that this SLSAM was made with"):
        first.step()
    with pytest.raises(ValueError, match="the Growing that this SLSAM was made with"):
        first.slsam.radius = Length(0.1)
    second.slsam.radius = Length(0.1)
    Run(SLSAMConfig(method="auto", radius=radius)).step()
    second.step()


class Within(TrainerCallback):
    """Lets another trainer take its first step within the first step of this one."""

    def __init__(self, other):
        self.other = other

    def on_step_end(self, *args, **kwargs):
        self.other.train()


SHARED_IN_TRAINERS = {"bandit": ("Turns", lambda: Turns().learn), "design": ("Turns", Turns)}


@pytest.mark.parametrize("field", SHARED_IN_TRAINERS)
def test_a_sampler_is_not_shared_by_two_trainings_at_once(field, tmp_path):
    """What one has left in a user's bandit or sampling scheme, the other one does not go on with."""
    name, make = SHARED_IN_TRAINERS[field]
    config = SLSAMConfig(method="auto", trace=False, **{field: make()})
    inner = build(SLSAMTrainer, tmp_path / "inner", config, max_steps=1)
    outer = build(SLSAMTrainer, tmp_path / "outer", config, max_steps=2, parts={"callbacks": [Within(inner)]})
    with pytest.raises(ValueError, match=f"the {name} that this SLSAM was made with.*Make one {name} for each"):
        outer.train()
    assert (outer.slsam.steps, inner.slsam.steps) == (1, 1)


class Nothing(Ascent):
    """A rule of a user."""


def test_a_rule_without_an_ascent_pass_is_owned_too():
    config = SLSAMConfig(method="sam", ascent=Nothing())
    first, _ = Run(config), Run(config)
    with pytest.raises(ValueError, match="the Nothing that"):
        first.step()
