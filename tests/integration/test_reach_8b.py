"""The price of steps at the shape of Llama-3.1-8B, counted on the meta device: no weights, no values."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from slsam_peft import SLSAM, SLSAMConfig, arms_of
from slsam_peft.algorithm.step import Cut, Passes, Riding
from slsam_peft.cost.expected import ExpectedCost, active_names, rule_of
from slsam_peft.cost.model import CostModel
from slsam_peft.models.shapes import find_config, meta_model
from slsam_peft.trainer.riding import lora_pairs
from tests.decoders import passes_of
from tests.tolerances import COUNTED_FLOPS_8B

pytestmark = pytest.mark.slow

BATCH, LENGTH, STEPS = 4, 256, 3
SHARE = 0.01  # of 1 + m/N, by which a step may cost more

# settings, least and most allowed expected cost in plain LoRA steps
MODES = {
    "the paper's sampling": (SLSAMConfig(bandit="paper", active_fraction=0.2), 1.75, 1.85),
    "dense SAM": (SLSAMConfig(method="sam"), 1.97, 2.01),
    "exact, at plain LoRA's price": (SLSAMConfig(design="depth", cost_budget=1.0), 0.99, 1.01),
    "ascent on a quarter": (SLSAMConfig(ascent="partial", design="depth", cost_budget=0.75), 0.74, 0.76),
    "remembered ascent": (SLSAMConfig(ascent="remembered", design="depth", cost_budget=0.65), 0.64, 0.66),
    "sparse ascent, dense descent": (SLSAMConfig(descent="all", design="depth", cost_budget=1.25), 1.24, 1.26),
}


@pytest.fixture(scope="module")
def model():
    config = find_config("llama-3.1-8b")
    config._attn_implementation = "eager"  # the counter has no formula for the CPU's fused attention
    made = meta_model(config, float32_adapters=False)
    made.activation_checkpointing_enable({"use_reentrant": False})
    made.enable_input_require_grads()
    return made.train()


def closures(model, inputs):
    """Return a closure and a forward-only one. Their head computes logits twice, as the fused one of TRL does."""
    decoder = model.base_model.model

    def head_loss(hidden, labels):
        return F.cross_entropy(decoder.lm_head(hidden[:, :-1]).flatten(0, 1).float(), labels[:, 1:].flatten())

    def forward():
        ids = inputs["input_ids"]
        mask = torch.zeros(len(ids), 1, LENGTH, LENGTH, dtype=torch.bfloat16, device="meta")  # one of ids is read
        hidden = decoder.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
        return checkpoint(head_loss, hidden, inputs["labels"], use_reentrant=False)

    return passes_of(forward)


def batch(sequences=BATCH):
    ids = torch.zeros(sequences, LENGTH, dtype=torch.long, device="meta")
    return {"input_ids": ids, "labels": ids}


@pytest.fixture(scope="module")
def plain(model):
    with FlopCounterMode(display=False) as counter:
        closures(model, batch())[0]()
    model.zero_grad()
    return counter.get_total_flops()


def test_a_plain_step_is_as_predicted(model, plain):
    predicted = CostModel.from_model(model, checkpointing=True).plain([(BATCH, LENGTH)])
    assert predicted == pytest.approx(plain, rel=COUNTED_FLOPS_8B)


@pytest.mark.parametrize("name", MODES)
def test_steps_cost_what_is_expected_and_what_is_predicted(name, model, plain, monkeypatch, record_property):
    """The expectation meets the budget; each step's count meets its prediction, so their mean does as well."""
    config, least, most = MODES[name]
    monkeypatch.setattr(SLSAM, "_read", lambda self, values: torch.ones(values.shape, dtype=torch.float64))
    costs, arms, shapes = CostModel.from_model(model, checkpointing=True), arms_of(model, "block"), [(BATCH, LENGTH)]
    expected = ExpectedCost(costs, arms, config, shapes)
    fraction = config.fraction if config.cost_budget is None else expected.solve(config.cost_budget)
    assert least <= expected(fraction) <= most

    slsam = SLSAM(arms, config, fraction=fraction)
    inputs = batch()
    closure, forward_only = closures(model, inputs)
    part, _ = closures(model, batch(1))
    counted, predicted = [], []
    for _ in range(STEPS):
        with FlopCounterMode(display=False) as counter:
            slsam.update(closure, part, forward_only)
        names = active_names(arms, slsam.active)
        counted.append(counter.get_total_flops())
        predicted.append(costs.step(names, shapes, rule_of(config)))
        model.zero_grad()
    assert counted == pytest.approx(predicted, rel=COUNTED_FLOPS_8B)
    record_property("expected and counted", (expected(fraction), sum(counted) / STEPS / plain))


def riding_passes(model, sequences, riding):
    """Return the passes of a step whose next one's ascent rides along."""
    closure, forward_only = closures(model, batch(sequences))
    longer, longer_forward = closures(model, batch(sequences + riding))
    own = torch.ones(sequences + riding, LENGTH, dtype=torch.bool, device="meta")
    return Passes(
        closure,
        closure,
        forward_only,
        sequences=sequences,
        cut=lambda wanted: Cut(closures(model, batch(wanted))[0]),
        riding=Riding(longer, longer, lambda: torch.stack([longer_forward()] * 2), own),
    )


@pytest.mark.parametrize("way", ["ahead", "small pass", "accumulated"])
@pytest.mark.parametrize(("sequences", "ascent"), [(4, 1), (16, 1), (16, 4)])
def test_a_step_costs_one_and_the_share_of_its_ascent(way, sequences, ascent, model, monkeypatch, record_property):
    """The default, m of N sequences making the ascent, r = 16, equal lengths: 1 + m/N, and as predicted."""
    monkeypatch.setattr(SLSAM, "_read", lambda self, values: torch.ones(values.shape, dtype=torch.float64))
    ascents = {"ahead": "auto"}.get(way, "partial")
    config = SLSAMConfig(method="auto", ascent=ascents, ascent_sequences=ascent)
    arms, costs = arms_of(model, "block"), CostModel.from_model(model, checkpointing=True)
    slsam = SLSAM(arms, config, pairs=lora_pairs(model))
    shapes = [(1, LENGTH)] * sequences if way == "accumulated" else [(sequences, LENGTH)]
    passes = riding_passes(model, shapes[0][0], ascent if way == "ahead" else 1)
    for _ in range(2):  # the first step's ascent is a pass of its own, and it has checks
        model.zero_grad()
        with FlopCounterMode(display=False) as counter:
            for index in range(len(shapes)):
                slsam.accumulate(passes, index, len(shapes))
    model.zero_grad()
    counted, predicted = (
        counter.get_total_flops(),
        costs.step(active_names(arms, slsam.active), shapes, rule_of(config)),
    )
    assert counted == pytest.approx(predicted, rel=COUNTED_FLOPS_8B)
    ratio = counted / costs.plain(shapes)
    record_property("cost", ratio)
    # Where an ascent runs apart, it has no backward pass below its lowest drawn block.
    spared = 0.0 if way == "ahead" else ascent / sequences
    assert (1 + ascent / sequences) * (1 - SHARE) - spared <= ratio <= (1 + ascent / sequences) * (1 + SHARE)
