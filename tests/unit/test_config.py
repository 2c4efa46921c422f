"""The settings check themselves and say what to do."""

import dataclasses
import functools
import inspect
import json
import math
import operator
import re

import pytest

from slsam_peft import SLSAMConfig
from slsam_peft.algorithm.adversary import Adversary
from slsam_peft.algorithm.ascents import Ahead, Ascent, Part
from slsam_peft.algorithm.balancing import Balancing
from slsam_peft.algorithm.noise import WeightNoise
from slsam_peft.algorithm.radius import Adaptive, Length, LossRise, Neuron, build_radius
from slsam_peft.algorithm.rules import build_ascent
from slsam_peft.algorithm.sampa import Sampa
from slsam_peft.algorithm.zeroth_order import ZerothOrder
from slsam_peft.config import RECORD_NAME, RECORD_SCHEMA, rule_name
from slsam_peft.presets import ASCENTS, ONE_PASS, RADII

# Each rule that makes no e, by its name and as an object, and one of a class that a user derives from ours.
ONE_PASS_RULES = [(name, name) for name in ONE_PASS]
ONE_PASS_RULES += [("bar", Balancing()), ("obar", Balancing(by_gradients=False))]
ONE_PASS_RULES += [
    ("bi_lora", Adversary()),
    ("bi_lora", type("Own", (Adversary,), {})(0.2)),
    ("flat_lora", WeightNoise()),
]

BAD = [
    ({"rho": -0.1}, "rho=-0.1", "finite number >= 0"),
    ({"rho": math.nan}, "rho=nan", "finite number >= 0"),
    ({"rho": math.inf}, "rho=inf", "finite number >= 0"),
    ({"rho": "0.05"}, "rho='0.05'", "finite number"),
    ({"rho": True}, "rho=True", "finite number"),
    ({"active_fraction": 0}, "active_fraction=0", "(0, 1]"),
    ({"active_fraction": 1.01}, "active_fraction=1.01", "(0, 1]"),
    ({"active_fraction": math.nan}, "active_fraction=nan", "(0, 1]"),
    ({"ascent_fraction": 0.0}, "ascent_fraction=0.0", "(0, 1]"),
    ({"ascent_fraction": 2}, "ascent_fraction=2", "(0, 1]"),
    ({"cost_budget": 0}, "cost_budget=0", "> 0"),
    ({"cost_budget": -1.0}, "cost_budget=-1.0", "> 0"),
    ({"cost_budget": 1.0, "active_fraction": 0.2}, "cost_budget=1.0", "leave one of them unset"),
    ({"min_probability": 1.0}, "min_probability=1.0", "[0, 1)"),
    ({"bandit_rate": 0}, "bandit_rate=0", "> 0"),
    ({"hidden_state_cache_limit_mib": -1}, "hidden_state_cache_limit_mib=-1", ">= 0"),
    ({"max_skipped_steps": 1.5}, "max_skipped_steps=1.5", "integer >= 0"),
    ({"seed": -1}, "seed=-1", "integer >= 0"),
    ({"granularity": "blok"}, "granularity='blok'", "Did you mean 'block'?"),
    ({"bandit": "scalefree"}, "bandit='scalefree'", "Did you mean 'scale_free'?"),
    ({"design": "bernouli"}, "design='bernouli'", "Did you mean 'bernoulli'?"),
    ({"ascent": "two-pass"}, "ascent='two-pass'", "Did you mean 'two_pass'?"),
    ({"descent": "al"}, "descent='al'", "Did you mean 'all'?"),
    ({"adapter_dtype": "float23"}, "adapter_dtype='float23'", "Did you mean 'float32'?"),
    ({"descent": "all", "ascent": "remembered"}, "descent='all'", "two_pass"),
    ({"ascent": "ahead"}, "active_fraction=None", "set descent='all', or active_fraction=1"),
    ({"method": "atuo"}, "method='atuo'", "Did you mean 'auto'?"),
    ({"method": all}, "method=<built-in function all>", "'auto', 'sam', 'paper', 'depth'"),
    ({"loss_rise": 0}, "loss_rise=0", "> 0, in nats"),
    ({"loss_rise": -0.1}, "loss_rise=-0.1", "> 0, in nats"),
    ({"loss_rise": math.nan}, "loss_rise=nan", "> 0, in nats"),
    ({"rho_max": 0.0}, "rho_max=0.0", "> 0"),
    ({"rho_max": math.inf}, "rho_max=inf", "finite"),
    ({"ascent_sequences": 0}, "ascent_sequences=0", "integer >= 1"),
    ({"ascent_sequences": 1.5}, "ascent_sequences=1.5", "integer >= 1"),
    ({"ascent_sequences": True}, "ascent_sequences=True", "integer >= 1"),
    ({"rho": 0.1, "loss_rise": 0.2}, "rho=0.1 and loss_rise=0.2", "leave one of them unset"),
    ({"rho": 0, "loss_rise": 0.2}, "rho=0 and loss_rise=0.2", "leave one of them unset"),
    ({"ascent_sequences": 2, "ascent_fraction": 0.5}, "ascent_sequences=2 and ascent_fraction=0.5", "leave one of"),
    ({"method": "auto", "cost_budget": 1.0}, "cost_budget=1.0 and method='auto'", "only method='depth'"),
    ({"method": "sam", "ascent_sequences": 2}, "ascent_sequences=2", "use ascent='partial' or method='auto'"),
    ({"method": "auto", "ascent": "remembered"}, "descent='all' (method='auto')", "use ascent='two_pass'"),
    ({"method": "paper", "ascent": "ahead"}, "descent='active' (method='paper')", "set descent='all'"),
    ({"radius": "lenght"}, "radius='lenght'", "Did you mean 'length'?"),
    ({"radius": "length", "loss_rise": 0.3}, "radius='length' and loss_rise=0.3", "leave one unset"),
    ({"radius": "loss_rise", "rho": 0.3}, "radius='loss_rise' and rho=0.3", "leave one unset"),
    ({"ascent": []}, "ascent=[]", "is not known"),
    ({"ascent": "ahead", "cost_budget": 1.0}, "active_fraction=None", "leave cost_budget unset"),
    ({"ascent_fraction": 0.5}, "ascent_fraction=0.5 and ascent='two_pass'", "leave ascent_fraction unset"),
    *(
        ({"method": method, name: value}, f"{name}={value} and ascent='{ascent}' (method='{method}')", "unset")
        for name, value in (("ascent_fraction", 0.5), ("ascent_fraction", 0.25), ("ascent_sequences", 1))
        for method, ascent in (
            *(("sam", "two_pass"), ("paper", "two_pass"), ("depth", "two_pass")),
            *((rule, rule) for rule in ("bar", "bi_lora", "flat_lora")),
        )
    ),
    *(
        ({"method": "auto", "ascent": Ahead(2), name: value}, f"{name}={value} and ascent=", "knows its own sequences")
        for name, value in (("ascent_fraction", 0.5), ("ascent_sequences", 2), ("ascent_sequences", 1))
    ),
    *(
        ({"method": "auto", "ascent": name, "ascent_sequences": 1}, f"ascent_sequences=1 and ascent='{name}'", "unset")
        for name in ("two_pass", "bar", "obar", "bi_lora", "flat_lora")
    ),
    *(
        ({"rho_max": 1.0, **values}, f"rho_max=1.0 and radius='{radius}'", "leave rho_max unset")
        for values, radius in (
            *(({"method": rule}, "length") for rule in ("bar", "bi_lora", "flat_lora", "sam", "paper", "depth")),
            *(({"rho": 0.1}, "length"), ({"method": "sam", "radius": "asam"}, "asam")),
            ({"radius": Length(0.1)}, "slsam_peft.algorithm.radius:Length"),
        )
    ),
    ({"method": "bar", "ascent": "partial"}, "method='bar' and ascent='partial' name two rules", "leave one of them"),
    ({"method": "bi_lora", "ascent": Ahead(1)}, "method='bi_lora' and ascent=", "name two rules"),
    *(
        ({"method": method, "ascent": given}, f"method='{method}' and ascent=", "an object of the method's own rule")
        for method in ("bar", "bi_lora", "flat_lora")
        for name, given in ONE_PASS_RULES
        if name.removeprefix("o") != method
    ),
    *(
        (
            {"method": "auto", "ascent": given, **values},
            f"radius='{radius}' and ascent='slsam_peft.algorithm.",
            "unset",
        )
        for given in (Balancing(), Adversary(0.2))
        for values, radius in (({"loss_rise": 0.3}, "loss_rise"), ({"radius": "asam"}, "asam"))
    ),
    ({"method": "bi_lora", "ascent": Adversary(0.2), "rho": 0.1}, "(0.2), and rho=0.1 is set", "leave one of them"),
    ({"ascent": WeightNoise(0.0), "rho": 0.1}, "(0.0), and rho=0.1 is set", "leave one of them"),
]


def shown(values):
    """What a case is called: no address of an object, which differs from one process to the next."""
    return re.sub(r" at 0x\w+", "", str(values))


@pytest.mark.parametrize(("values", "named", "advice"), BAD, ids=[shown(b[0]) for b in BAD])
def test_a_bad_value_is_named_with_what_is_allowed(values, named, advice):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is checked below
        SLSAMConfig(**values)
    assert named in str(error.value)
    assert advice in str(error.value)


@pytest.mark.parametrize(
    ("name", "given"), ONE_PASS_RULES, ids=[f"{n}, {type(g).__name__}" for n, g in ONE_PASS_RULES]
)
def test_a_method_takes_an_object_of_its_own_rule(name, given):
    """As it takes its name: everything else is the method's."""
    method = name.removeprefix("o")
    config, named = SLSAMConfig(method=method, ascent=given), SLSAMConfig(method=method, ascent=name)
    rho = named.resolved.rho if getattr(given, "strength", None) is None else None
    assert config.resolved == dataclasses.replace(named, ascent=given, rho=rho).resolved
    assert (config.resolved.ascent, config.resolved.rho, config.fraction) == (given, rho, 1.0)
    assert dataclasses.replace(config.resolved, seed=3).resolved.ascent is given, "resolved settings are settings"


@pytest.mark.parametrize("name", [*ASCENTS, *RADII])
def test_an_object_knows_what_the_settings_call_it(name):
    """Which the cards, the methods and the errors go by."""
    if name == "auto":
        assert build_ascent(name).rule == "partial"
        return
    if name in ASCENTS:
        made = build_ascent(name)
        assert made.setting == f"ascent='{name}'"
    else:
        number = {"loss_rise": 0.1} if name == "loss_rise" else {"rho": 0.1}
        made = build_radius(SLSAMConfig(method="auto", radius=name, **number))
    assert made.rule == rule_name(made) == rule_name(name) == name


def test_what_is_no_rule_of_the_settings_has_no_name():
    class Own(Ascent):
        """A rule of a user."""

    class Odd:
        rule = ["bar"]

    assert [rule_name(x) for x in (Own(), Odd(), None, "a", Ascent())] == [None] * 5
    assert Own().setting == "ascent=Own"


PARTS = ("active_fraction", "bandit", "design", "ascent", "descent", "ascent_sequences", "ascent_fraction")
PARTS += ("rho", "loss_rise", "radius", "cost_budget")
AUTO = (0.25, "scale_free", "fixed_size", "auto", "all", 1, None, None, 0.5, "loss_rise", None)
ALONE = (None, "scale_free", "bernoulli", "two_pass", "active", None, 0.25, 0.05, None, "length", None)
RESOLVED = [
    ({}, "auto", AUTO),
    ({"method": "auto"}, "auto", AUTO),
    ({"seed": 3, "trace": False, "granularity": "module"}, "auto", AUTO),
    ({"rho": 0.5}, "auto", (*AUTO[:7], 0.5, None, "length", None)),
    ({"loss_rise": 0.5}, "auto", (*AUTO[:8], 0.5, "loss_rise", None)),
    ({"radius": "length"}, "auto", (*AUTO[:7], 0.05, None, "length", None)),
    ({"ascent_sequences": 2}, "auto", (*AUTO[:5], 2, *AUTO[6:])),
    ({"method": "auto", "ascent_fraction": 0.5}, "auto", (*AUTO[:5], None, 0.5, *AUTO[7:])),
    ({"method": "auto", "ascent": "two_pass"}, "auto", (*AUTO[:3], "two_pass", "all", None, *AUTO[6:])),
    ({"method": "auto", "active_fraction": 0.5}, "auto", (0.5, *AUTO[1:])),
    (
        {"method": "sam"},
        "sam",
        (1.0, "uniform", "bernoulli", "two_pass", "all", None, None, 0.05, None, "length", None),
    ),
    (
        {"method": "sam", "loss_rise": 0.2},
        "sam",
        (1.0, "uniform", "bernoulli", "two_pass", "all", None, None, None, 0.2, "loss_rise", None),
    ),
    (
        {"method": "paper"},
        "paper",
        (0.2, "paper", "bernoulli", "two_pass", "active", None, None, 0.05, None, "length", None),
    ),
    (
        {"method": "depth"},
        "depth",
        (None, "scale_free", "depth", "two_pass", "active", None, None, 0.05, None, "length", 1.0),
    ),
    (
        {"method": "depth", "active_fraction": 0.3},
        "depth",
        (0.3, "scale_free", "depth", "two_pass", "active", None, None, 0.05, None, "length", None),
    ),
    ({"bandit": "scale_free"}, None, ALONE),
    ({"active_fraction": 0.5}, None, (0.5, *ALONE[1:])),
    ({"cost_budget": 1.0}, None, (*ALONE[:10], 1.0)),
    (
        {"ascent": "partial", "loss_rise": 0.1},
        None,
        (*ALONE[:3], "partial", *ALONE[4:7], None, 0.1, "loss_rise", None),
    ),
    *(
        (
            {"method": rule, **how},
            rule,
            (1.0, "uniform", "bernoulli", rule, "all", None, None, rho, None, "length", None),
        )
        for rule, rho in (("bar", 0.5), ("bi_lora", 0.05), ("flat_lora", 0.05))
        for how in ({}, {"radius": "length"})
    ),
    ({"rho": 0}, "auto", (1.0, *AUTO[1:7], 0, None, "length", None)),
    (
        {"rho": 0, "method": "paper"},
        "paper",
        (1.0, "paper", "bernoulli", "two_pass", "all", None, None, 0, None, "length", None),
    ),
    (
        {"rho": 0, "method": "depth"},
        "depth",
        (1.0, "scale_free", "depth", "two_pass", "all", None, None, 0, None, "length", None),
    ),
]


@pytest.mark.parametrize(("values", "method", "parts"), RESOLVED, ids=[shown(r[0]) for r in RESOLVED])
def test_a_method_fills_in_what_is_not_set(values, method, parts):
    resolved = SLSAMConfig(**values).resolved
    assert resolved.method == method
    assert tuple(getattr(resolved, name) for name in PARTS) == parts
    assert resolved.resolved == resolved
    assert SLSAMConfig.from_dict(resolved.to_dict()).resolved == resolved, "stored settings resolve to themselves"
    assert resolved.is_perturbed is (values.get("rho") != 0)


def test_a_record_without_a_method_holds_parts_alone(tmp_path):
    """What it leaves out, and what was unset in it, has the defaults of the time."""
    (tmp_path / RECORD_NAME).write_text(json.dumps({"schema": RECORD_SCHEMA, "method": {"name": "x", "rho": 0.1}}))
    read = SLSAMConfig.from_pretrained(tmp_path).resolved
    assert read == SLSAMConfig(rho=0.1, bandit="scale_free").resolved
    assert (read.method, read.fraction, read.descent) == (None, 0.2, "active")


def test_it_is_keyword_only_and_frozen():
    with pytest.raises(TypeError):
        SLSAMConfig(0.05)
    with pytest.raises(dataclasses.FrozenInstanceError):
        SLSAMConfig().rho = 0.1


def test_it_round_trips_through_a_dict():
    config = SLSAMConfig(rho=0.3, cost_budget=1.0, design="depth", ascent="partial", seed=7)
    assert SLSAMConfig.from_dict(config.to_dict()) == config.resolved


def test_an_unknown_key_is_named_with_the_nearest_match():
    with pytest.raises(ValueError, match="'rh' is not known.*Did you mean 'rho'"):
        SLSAMConfig.from_dict({"rh": 0.1})


def all_of_them(probabilities, generator):
    return probabilities > 0


def test_a_callable_is_stored_by_name_and_never_loaded_from_one():
    stored = SLSAMConfig(design=all_of_them).to_dict()
    assert stored["design"] == f"{__name__}:all_of_them"
    with pytest.raises(ValueError, match="no code is loaded"):
        SLSAMConfig.from_dict(stored)


class Everything:
    """A sampling scheme with state that cannot be copied."""

    def __init__(self):
        self.source = iter([])

    def __call__(self, probabilities, generator):
        return probabilities > 0


@pytest.mark.parametrize(
    ("design", "name"),
    [
        (functools.partial(all_of_them), "all_of_them"),
        (Everything(), "Everything"),
        (Everything, "Everything"),
        (Everything().__call__, "Everything.__call__"),
    ],
    ids=["partial", "object", "class", "method"],
)
def test_callables_of_every_kind_have_a_name(design, name):
    assert SLSAMConfig(design=design).to_dict()["design"] == f"{__name__}:{name}"


def tilted(probabilities, generator, slope=0.0, others=None):
    return probabilities > slope


class Tilted:
    """A sampling scheme of a strength, which it changes itself, with something that is no plain value."""

    def __init__(self, slope, others=None, *, steep=True):
        self.slope, self.others, self.steep = slope, others, steep

    def __call__(self, probabilities, generator):
        return probabilities > self.slope


@pytest.mark.parametrize(
    ("design", "said"),
    [
        (functools.partial(tilted, slope=0.3), "tilted(slope=0.3)"),
        (functools.partial(tilted, slope=0.3, others=[1]), "tilted(slope=0.3)"),
        (Tilted(0.3), "Tilted(slope=0.3, others=None, steep=True)"),
        (Tilted(0.3, others=[1], steep=False), "Tilted(slope=0.3, steep=False)"),
        (Tilted(0.3).__call__, "Tilted.__call__(slope=0.3, others=None, steep=True)"),
        (operator.itemgetter(0), None),
    ],
    ids=["partial", "partial of an object", "object", "object of an object", "method", "written in C"],
)
def test_plain_values_that_a_callable_was_made_with_are_recorded(design, said):
    expected = "operator:itemgetter" if said is None else f"{__name__}:{said}"
    assert SLSAMConfig(design=design).to_dict()["design"] == expected


def test_what_is_recorded_is_what_a_rule_was_made_with():
    """A rule that changes its own strength in training goes on from a checkpoint of its own."""
    rule = Tilted(0.3)
    config = SLSAMConfig(design=rule)
    before = config.to_dict()
    rule.slope = 0.9
    assert config.to_dict() == config.resolved.to_dict() == before


RULES = {
    "ascent": (Part, Ahead, Sampa, ZerothOrder, Balancing, Adversary, WeightNoise),
    "radius": (Length, LossRise, Adaptive, Neuron),
}


@pytest.mark.parametrize(("field", "rule"), [(field, rule) for field, rules in RULES.items() for rule in rules])
def test_every_value_of_our_own_rules_is_recorded(field, rule):
    """Each tells one object from another."""
    names = list(inspect.signature(rule).parameters)
    plain = {name: 0.25 for name in names}

    def said(**values):
        return SLSAMConfig(method="auto", **{field: rule(**{**plain, **values})}).to_dict()[field]

    assert names
    for name in names:
        assert f"{name}=0.25" in said()
        assert f"{name}=0.5" in said(**{name: 0.5})


def test_every_field_has_its_help():
    assert all(field.metadata["help"] for field in dataclasses.fields(SLSAMConfig))


def written(folder, config=None, **changes):
    """Write what a trainer would record of a config, with changes at the top of the record."""
    method = {"name": "sl-sam", **(config or SLSAMConfig()).to_dict()}
    file = folder / RECORD_NAME
    file.write_text(json.dumps({"schema": RECORD_SCHEMA, "method": method, **changes}))
    return file


def test_it_is_read_from_the_folder_of_an_adapter_or_from_the_file(tmp_path):
    config = SLSAMConfig(rho=0.3, cost_budget=1.0, design="depth", ascent="partial", seed=7)
    file = written(tmp_path, config)
    assert SLSAMConfig.from_pretrained(tmp_path) == SLSAMConfig.from_pretrained(str(file)) == config.resolved


def test_a_folder_without_a_record_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path} holds no slsam.json.*give the folder"):
        SLSAMConfig.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"gone does not exist; give the folder"):
        SLSAMConfig.from_pretrained(tmp_path / "gone")


BAD_RECORDS = {
    "no JSON": ("{", "not valid JSON"),
    "a list": ("[]", "has schema None.*reads schema 2"),
    "another schema": ('{"schema": 9, "method": {}}', "has schema 9.*reads schema 2; use the version"),
    "no settings": ('{"schema": 2}', 'has no settings under "method"'),
    "a typing error": ('{"schema": 2, "method": {"rh": 0.1}}', "'rh' is not known.*Did you mean 'rho'"),
    "a bad value": ('{"schema": 2, "method": {"rho": -1}}', "rho=-1 is not allowed"),
    "a callable": ('{"schema": 2, "method": {"design": "os:system"}}', "no code is loaded"),
}


@pytest.mark.parametrize(("text", "expected"), BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_a_bad_record_is_named_with_what_is_wrong(text, expected, tmp_path):
    (tmp_path / RECORD_NAME).write_text(text)
    with pytest.raises(ValueError, match=rf"(?s){tmp_path / RECORD_NAME}.*{expected}"):
        SLSAMConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("ascent", ["remembered", "ahead", "two_pass", "partial"])
def test_without_a_radius_no_ascent_is_refused(ascent):
    """It is plain LoRA, whatever the ascent would have been."""
    for method in (None, "auto", "paper", "sam", "depth"):
        assert not SLSAMConfig(method=method, ascent=ascent, rho=0).resolved.is_perturbed
