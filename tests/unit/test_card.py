"""Tags of model cards: each setting that counts, and none that does not."""

from typing import Any

import pytest

from slsam_peft import SLSAMConfig
from slsam_peft.algorithm.radius import Length
from slsam_peft.saving.card import describe, settings_of, tags_of

PARTS = {"granularity=block", "bandit=scale_free", "design=bernoulli", "descent=active"}


def settings(config: SLSAMConfig) -> set[str]:
    tags = describe(config)
    assert tags[0] == "sl-sam"
    assert len(set(tags)) == len(tags)
    return {tag.removeprefix("sl-sam:") for tag in tags[1:]}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {},
            {
                *("method=auto", "loss_rise=0.5", "ascent_sequences=1", "granularity=block", "bandit=scale_free"),
                *("design=fixed_size", "ascent=auto", "descent=all", "active_fraction=0.25"),
            },
        ),
        (
            {"method": "auto", "rho": 0.1, "ascent_fraction": 0.5},
            {
                *("method=auto", "rho=0.1", "ascent_fraction=0.5", "granularity=block", "bandit=scale_free"),
                *("design=fixed_size", "ascent=auto", "descent=all", "active_fraction=0.25"),
            },
        ),
        (
            {"method": "sam"},
            {
                *("method=sam", "rho=0.05", "granularity=block", "bandit=uniform", "design=bernoulli"),
                *("ascent=two_pass", "descent=all", "active_fraction=1.0"),
            },
        ),
        (
            {"method": "depth", "cost_budget": 1.25},
            {
                *("method=depth", "rho=0.05", "granularity=block", "bandit=scale_free", "design=depth"),
                *("ascent=two_pass", "descent=active", "cost_budget=1.25"),
            },
        ),
        ({"active_fraction": 0.5}, {*PARTS, "rho=0.05", "ascent=two_pass", "active_fraction=0.5"}),
        (
            {"ascent": "partial"},
            {*PARTS, "rho=0.05", "ascent=partial", "ascent_fraction=0.25", "active_fraction=0.2"},
        ),
    ],
)
def test_tags_name_what_was_trained_with(given: dict[str, Any], expected: set[str]) -> None:
    assert settings(SLSAMConfig(**given)) == expected


def test_a_radius_that_is_an_object_is_named() -> None:
    found = settings(SLSAMConfig(radius=Length(0.1)))
    assert "radius=slsam_peft.algorithm.radius:Length(rho=0.1)" in found
    assert not {name for name in found if name.startswith(("rho=", "loss_rise="))}


def test_nothing_is_said_of_what_a_record_lacks() -> None:
    """Records of earlier versions have no method, and theirs was the paper's share of layers."""
    assert tags_of({"rho": 0.05, "cost_budget": None}) == ["sl-sam", "sl-sam:rho=0.05", "sl-sam:active_fraction=0.2"]


def test_the_phrase_for_a_cards_text_has_the_settings_of_the_tags() -> None:
    config = SLSAMConfig()
    assert settings_of(config).startswith("method=auto, loss_rise=0.5, ascent_sequences=1, ")
    assert set(settings_of(config).split(", ")) == settings(config)
