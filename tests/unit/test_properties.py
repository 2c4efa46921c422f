"""What holds for every input: optimal projections, schemes as stated, settings that survive JSON, covering arms."""

import itertools
import json

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import nn

from slsam_peft import SLSAMConfig, arms_of
from slsam_peft.algorithm.projection import project, project_with_min_probability
from slsam_peft.algorithm.sampling import build_scheme
from slsam_peft.presets import ADAPTER_DTYPES, ASCENTS, BANDITS, DESCENTS, DESIGNS, GRANULARITIES, METHODS, RADII
from tests.tolerances import EXACT_FLOAT64, SUM

weights = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30).map(lambda v: torch.tensor(v, dtype=torch.float64))
fractions = st.floats(0.02, 1.0)
slow = settings(max_examples=60, deadline=None)


# Projections. Bounds, sums and order are checked in test_bandit.py.


def assert_divergence_is_least(p, w, minimum):
    """One factor c for all: p = c w inside the bounds, p >= c w at the least, p <= c w at 1. These conditions are
    those of Karush, Kuhn and Tucker for the least Kullback-Leibler divergence, so no other p of that sum is closer.
    """
    ratio = p / w
    inside = (p > minimum + SUM) & (p < 1 - SUM)
    if not inside.any():
        return
    c = ratio[inside].mean()
    torch.testing.assert_close(ratio[inside], c.expand(int(inside.sum())), rtol=SUM, atol=0)
    assert bool((ratio[p <= minimum + SUM] >= c * (1 - SUM)).all())
    assert bool((ratio[p >= 1 - SUM] <= c * (1 + SUM)).all())


@given(weights, fractions, st.floats(0.0, 0.99))
@slow
def test_the_projection_with_a_minimum_is_the_closest_point(w, fraction, share):
    minimum = share * fraction
    assert_divergence_is_least(project_with_min_probability(w, fraction * len(w), minimum), w, minimum)


@given(weights, fractions)
@slow
def test_the_papers_projection_is_the_closest_point_and_stays(w, fraction):
    p = project(w, fraction * len(w))
    assert_divergence_is_least(p, w, 0.0)
    torch.testing.assert_close(project(p, fraction * len(w)), p, rtol=0, atol=SUM)


@given(weights, fractions, st.integers(-20, 20))
@slow
def test_projections_do_not_depend_on_the_unit_of_the_weights(w, fraction, power):
    budget = fraction * len(w)
    assume(float(w.min()) * 2.0**power > 1e-4)  # below, the reference's guard lets the sum fall short
    torch.testing.assert_close(project(w * 2.0**power, budget), project(w, budget), rtol=SUM, atol=SUM)
    one, other = (project_with_min_probability(v, budget, 0.1 * fraction) for v in (w, w * 2.0**power))
    torch.testing.assert_close(one, other, rtol=SUM, atol=SUM)


# Designs


@st.composite
def probabilities(draw, most=12):
    """Probabilities as a bandit leaves them: at least a tenth of their mean, at most 1, at least one arm's worth."""
    w = torch.tensor(draw(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=most)), dtype=torch.float64)
    fraction = draw(st.floats(1 / len(w), 1.0))
    return project_with_min_probability(w, fraction * len(w), 0.1 * fraction)


def design_of(name, arms):
    return build_scheme(SLSAMConfig(design=name), list(range(arms)))


@given(st.sampled_from(DESIGNS), probabilities(), st.integers(0, 2**31))
@slow
def test_no_draw_is_empty_and_only_possible_arms_are_drawn(name, p, seed):
    design, generator = design_of(name, len(p)), torch.Generator().manual_seed(seed)
    before, stated = p.clone(), design.inclusion(p)
    assert bool(((stated > 0) & (stated <= 1 + EXACT_FLOAT64)).all())
    for _ in range(20):
        mask = design(p, generator)
        assert mask.dtype == torch.bool
        assert mask.shape == p.shape
        assert mask.any()
        assert mask[stated >= 1].all(), "an arm of probability 1 was left out"
        if name == "fixed_size":
            assert float(stated.sum()) - 1 < int(mask.sum()) < float(stated.sum()) + 1
    assert torch.equal(p, before)


@given(probabilities(most=8))
@slow
def test_bernoulli_states_the_expectation_over_all_non_empty_sets(p):
    expected, kept = torch.zeros_like(p), 0.0
    for members in itertools.product([False, True], repeat=len(p)):
        mask = torch.tensor(members)
        if mask.any():
            chance = torch.where(mask, p, 1 - p).prod()
            expected[mask] += chance
            kept += float(chance)
    torch.testing.assert_close(design_of("bernoulli", len(p)).inclusion(p), expected / kept, rtol=SUM, atol=0)


@given(st.sampled_from(["window", "depth"]), probabilities())
@example("window", torch.tensor([0.025, 0.25, 0.025, 0.7], dtype=torch.float64))  # 0.025 + 0.25 - 0.25 > 0.025
@settings(max_examples=30, deadline=None)
def test_schemes_of_one_point_state_how_long_each_arm_is_active(name, p):
    """An arm is active on one interval of u: counted on an even grid, its length is right to a point at each end."""
    points = 500
    design, counts = design_of(name, len(p)), torch.zeros_like(p)
    for i in range(points):
        design.next_point = lambda generator, i=i: (i + 0.5) / points
        mask = design(p, torch.Generator())
        assert mask.any()
        counts += mask
    torch.testing.assert_close(counts / points, design.inclusion(p), rtol=0, atol=1.001 / points)


@given(probabilities(), st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_fixed_size_draws_as_often_as_stated(p, seed):
    """By Bernstein's inequality a count is off by more than this once in 10^9."""
    draws = 500
    design, generator, counts = design_of("fixed_size", len(p)), torch.Generator().manual_seed(seed), 0
    for _ in range(draws):
        counts = counts + design(p, generator).double()
    spread = (draws * p * (1 - p)).clamp(min=0).sqrt()
    assert bool(((counts - draws * p).abs() <= 7 * spread + 16).all())


@given(probabilities())
@slow
def test_depth_never_falls_with_depth_and_keeps_the_sum_where_it_can(p):
    stated = design_of("depth", len(p)).inclusion(p)
    assert bool((stated.diff() >= 0).all())
    assert float(stated[-1]) == 1.0
    least = 1.0 + 0.1 * p.mean() * (len(p) - 1)  # the top arm always, every other at its least
    torch.testing.assert_close(stated.sum(), torch.maximum(p.sum(), least), rtol=1e-5, atol=0)


# Settings


open_unit = {"exclude_min": True}
positive = st.floats(0, 1e9, **open_unit)
SETTINGS = {
    "method": st.sampled_from(METHODS) | st.none(),
    "rho": st.floats(0, 1e9) | st.integers(0, 10) | st.none(),
    "loss_rise": positive | st.none(),
    "rho_max": positive,
    "ascent_sequences": st.integers(1, 100) | st.none(),
    "radius": st.sampled_from(RADII) | st.none(),
    "active_fraction": st.floats(0, 1, **open_unit) | st.just(1) | st.none(),
    "granularity": st.sampled_from(GRANULARITIES),
    "bandit": st.sampled_from(BANDITS) | st.none(),
    "design": st.sampled_from(DESIGNS) | st.none(),
    "ascent": st.sampled_from(ASCENTS) | st.none(),
    "ascent_fraction": st.floats(0, 1, **open_unit) | st.none(),
    "descent": st.sampled_from(DESCENTS) | st.none(),
    "cost_budget": positive | st.none(),
    "min_probability": st.floats(0, 1, exclude_max=True),
    "bandit_rate": positive,
    "hidden_state_cache_limit_mib": st.floats(0, 1e9),
    "adapter_dtype": st.sampled_from(ADAPTER_DTYPES),
    "max_skipped_steps": st.integers(0, 10**9),
    "accept_state_mismatch": st.booleans(),
    "trace": st.booleans(),
    "seed": st.integers(0, 2**63 - 1),
}


def test_every_setting_is_drawn():
    assert SETTINGS.keys() == SLSAMConfig().to_dict().keys()


@given(st.fixed_dictionaries({}, optional=SETTINGS))
def test_settings_survive_a_dictionary_and_json_bit_for_bit(values):
    """What is stored is resolved: read again, it says the same and contradicts nothing."""
    try:
        config = SLSAMConfig(**values)
    except ValueError as error:  # drawn values are allowed one by one; together they may contradict
        assert any(word in str(error) for word in ("unset", "use ", "set "))  # noqa: PT017
        return
    resolved = config.resolved
    assert all(getattr(resolved, name) == value for name, value in values.items() if value is not None)
    assert resolved.rho is not None or resolved.loss_rise is not None
    assert SLSAMConfig.from_dict(config.to_dict()).resolved == resolved
    assert SLSAMConfig.from_dict(json.loads(json.dumps(config.to_dict()))).resolved == resolved


# Arms of random models

LEAVES = ("frozen", "linear", "adapter", "vector", "norm", "embedding", "half frozen", "shared parameter", "again")
KINDS = ("module", "list", "sequence", "dictionary")
specifications = st.recursive(
    st.sampled_from(LEAVES),
    lambda inner: st.tuples(st.sampled_from(KINDS), st.lists(inner, min_size=1, max_size=4)),
    max_leaves=14,
)


class Adapter(nn.Module):
    """A frozen layer with two trained factors in dictionaries, as PEFT builds it."""

    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(2, 2).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(2, 1, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(1, 2, bias=False)})


class Vector(nn.Module):
    """Parameters that no linear layer owns, one of them in a dictionary."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.more = nn.ParameterDict({"default": torch.ones(1)})


def built(specification, made):
    """Build a module; `made` collects what "again" and "shared parameter" may use a second time."""
    if isinstance(specification, str):
        module = leaf(specification, made)
        made.append(module)
        return module
    kind, inner = specification
    children = [built(part, made) for part in inner]
    if kind == "list":
        return nn.ModuleList(children)
    if kind == "sequence":
        return nn.Sequential(*children)
    if kind == "dictionary":
        return nn.ModuleDict({f"d{i}": child for i, child in enumerate(children)})
    module = nn.Module()
    for i, child in enumerate(children):
        setattr(module, f"m{i}", child)
    return module


def leaf(kind, made):
    if kind == "again" and made:
        return made[0]
    if kind == "shared parameter":
        module = nn.Linear(2, 2)
        module.weight = next((m.weight for m in made if getattr(m, "weight", None) is not None), module.weight)
        return module
    if kind == "half frozen":
        module = nn.Linear(2, 2)
        module.weight.requires_grad_(False)
        return module
    simple = {"adapter": Adapter, "vector": Vector, "norm": lambda: nn.LayerNorm(2)}
    simple["embedding"] = lambda: nn.Embedding(3, 2)
    simple["frozen"] = lambda: nn.Linear(2, 2).requires_grad_(False)
    return simple.get(kind, lambda: nn.Linear(2, 2))()


@given(specifications, st.sampled_from(["block", "module", "tensor", "callable"]))
@settings(max_examples=150, deadline=None)
def test_each_trainable_parameter_is_in_one_arm_once(specification, granularity):
    model = nn.Module()
    model.body = built(specification, [])
    wanted = {id(p): p for p in model.parameters() if p.requires_grad}
    names = dict(model.named_parameters(remove_duplicate=False))
    how = granularity if granularity != "callable" else lambda name: name[:9]
    try:
        arms = arms_of(model, how)
    except ValueError as error:
        assert not wanted  # noqa: PT017 - whether it is raised depends on the model
        assert "no trainable parameter" in str(error)  # noqa: PT017
        return
    covered = [p for arm in arms for p in arm.parameters]
    assert sorted(map(id, covered)) == sorted(wanted)
    assert all(names[n] is p for arm in arms for n, p in zip(arm.parameter_names, arm.parameters, strict=True))
    assert all(arm.parameters for arm in arms)
    assert len({arm.name for arm in arms}) == len(arms)
    assert all(len(arm.sites) == len(arm.parameters) for arm in arms)
    places = [(site, p) for arm in arms for sites, p in zip(arm.sites, arm.parameters, strict=True) for site in sites]
    assert all(site.module._parameters[site.name] is site.parameter for site, _ in places)
    readers = {
        (id(m), n) for m in model.modules() for n, q in m._parameters.items() if q is not None and id(q) in wanted
    }
    assert {(id(site.module), site.name) for site, p in places if site.parameter is p} == readers, "a place is missing"
    if granularity in ("block", "module"):
        depths = [-1 if arm.depth is None else arm.depth for arm in arms]
        assert depths == sorted(depths)


@pytest.mark.parametrize("kind", ["adapter", "linear"])
def test_random_models_do_have_blocks(kind):
    """What the property above draws reaches the case that matters most."""
    model = nn.Module()
    model.body = built(("list", [("module", [kind]), ("module", [kind, "norm"])]), [])
    assert [arm.depth for arm in arms_of(model)] == [0, 1]
