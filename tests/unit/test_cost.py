"""The cost model by hand, its linear form, and budgets."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from slsam_peft.algorithm.arms import arms_of
from slsam_peft.algorithm.ascents import Ahead, Ascent, Part, Remembered
from slsam_peft.config import SLSAMConfig
from slsam_peft.cost.block import Size
from slsam_peft.cost.budget import independent_reach, reach_of, solve_active_fraction
from slsam_peft.cost.expected import ExpectedCost, rule_of
from slsam_peft.cost.model import CostModel, Rule
from tests.tolerances import EXACT_FLOAT64

BLOCKS, WIDTH, INNER, KEYS, WORDS, RANK = 6, 96, 256, 48, 500, 4
SHAPES = [(4, 64)]
NO_ASCENT = Rule(ascent=Ascent())


def tiny_llama(targets="all-linear", blocks=BLOCKS):
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        lora = LoraConfig(r=RANK, target_modules=targets, task_type="CAUSAL_LM")
        return get_peft_model(model, lora, low_cpu_mem_usage=True)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def cost(model):
    return CostModel.from_model(model, checkpointing=True)


# Multiply-adds per token of one block, written out: q and o, k and v, then gate, up and down.
BASE = 2 * WIDTH * WIDTH + 2 * WIDTH * KEYS + 3 * WIDTH * INNER
ADAPTERS = RANK * (2 * (WIDTH + WIDTH) + 2 * (WIDTH + KEYS) + 3 * (WIDTH + INNER))
INPUTS = WIDTH * (WIDTH + 2 * KEYS) + 3 * RANK * WIDTH  # read the block's input: q, k, v and their A
LAST = RANK * WIDTH  # B of down
TOKENS, PAIRS, SCORED = 4 * 64, 4 * 64 * 64, 4 * 63
HEAD = 3 * 2 * WORDS * WIDTH * SCORED


def test_plain_step_is_the_sum_written_out(cost):
    forward = 2 * (BASE + ADAPTERS) * TOKENS + 4 * WIDTH * PAIRS
    again = forward - 2 * LAST * TOKENS
    backward = 2 * (BASE + 2 * ADAPTERS) * TOKENS + 8 * WIDTH * PAIRS
    assert cost.plain(SHAPES) == BLOCKS * (forward + again + backward) + HEAD


def test_without_checkpointing_nothing_runs_again_and_block_0_needs_no_input_gradient(model):
    plain = CostModel.from_model(model, checkpointing=False).plain(SHAPES)
    forward = 2 * (BASE + ADAPTERS) * TOKENS + 4 * WIDTH * PAIRS
    backward = 2 * (BASE + 2 * ADAPTERS) * TOKENS + 8 * WIDTH * PAIRS
    assert plain == BLOCKS * (forward + backward) - 2 * INPUTS * TOKENS + HEAD


def test_two_passes_over_everything(cost):
    lowest_active = 2 * 2 * INPUTS * TOKENS  # in both passes
    assert cost.step([True] * BLOCKS, SHAPES) == 2 * cost.plain(SHAPES) - lowest_active
    assert cost.dense_sam(SHAPES) == 2 * cost.plain(SHAPES)


def test_one_pass_above_a_lowest_active(cost):
    """Below the lowest active block forward only; an inactive block above it passes gradients on but makes none."""
    active = [False, False, True, False, True, True]
    forward = 2 * (BASE + ADAPTERS) * TOKENS + 4 * WIDTH * PAIRS
    through = forward - 2 * LAST * TOKENS + 2 * (BASE + ADAPTERS) * TOKENS + 8 * WIDTH * PAIRS
    expected = BLOCKS * forward + 4 * through + 3 * 2 * ADAPTERS * TOKENS - 2 * INPUTS * TOKENS + HEAD
    assert cost.step(active, SHAPES, NO_ASCENT) == expected


def test_the_hidden_state_cache_saves_the_forward_below_the_lowest_active(cost):
    active = [False] * 4 + [True] * 2
    forward = 2 * (BASE + ADAPTERS) * TOKENS + 4 * WIDTH * PAIRS
    whole, reused = (cost.step(active, SHAPES, Rule(reused=kept)) for kept in (0, None))
    assert whole - reused == 4 * forward


def test_partial_ascent_is_two_passes_where_it_sees_everything(cost):
    active, shapes = [False] * 3 + [True] * 3, [(2, 32)] * 4
    assert cost.step(active, shapes, Rule(ascent=Part(fraction=1.0))) == cost.step(active, shapes)
    quarter = Rule(ascent=Part(fraction=0.25))
    first, rest = cost.step(active, shapes[:1]), 3 * cost.step(active, shapes[:1], Rule(ascent=Remembered()))
    assert cost.step(active, shapes, NO_ASCENT) < cost.step(active, shapes, quarter)
    assert cost.step(active, shapes, quarter) == pytest.approx(first + rest, rel=EXACT_FLOAT64)


def test_parts_of_a_partial_ascent():
    rule = Rule(ascent=Part(fraction=0.25))
    assert rule.parts([(8, 16)])[1:] == (Size.of([(2, 16)]), Size())
    assert rule.parts([(2, 16)] * 8)[1:] == (Size.of([(2, 16)] * 2),) * 2
    assert rule.parts([(1, 16), (3, 8)])[1] == Size.of([(1, 16)])
    assert [Part(fraction=0.25).of(n) for n in (1, 2, 4, 7, 8)] == [1, 1, 1, 2, 2]
    # So many sequences: of the first micro-batches, whole ones and a part of the next.
    assert Rule(ascent=Part(3)).parts([(2, 16)] * 4)[1:] == (Size.of([(2, 16), (1, 16)]), Size.of([(2, 16)]))
    assert Rule(ascent=Part(1)).parts([(1, 16)] * 4)[1:] == (Size.of([(1, 16)]),) * 2


@pytest.mark.parametrize(("sequences", "batch"), [(1, 4), (2, 8)])
def test_a_sparse_ascent_makes_the_gradients_of_drawn_arms_alone(cost, sequences, batch):
    """A small pass: forward on m sequences; backward from the lowest drawn block up, weight gradients where drawn."""
    active, tokens, pairs = [False, False, True, False, False, True], sequences * 64, sequences * 64 * 64
    forward = 2 * (BASE + ADAPTERS) * tokens + 4 * WIDTH * pairs
    through = forward - 2 * LAST * tokens + 2 * (BASE + ADAPTERS) * tokens + 8 * WIDTH * pairs
    head = 3 * 2 * WORDS * WIDTH * sequences * 63
    small = BLOCKS * forward + 4 * through + 2 * 2 * ADAPTERS * tokens - 2 * INPUTS * tokens + head
    rule = Rule(ascent=Part(sequences), descent="all")
    alone = cost.step(active, [(batch, 64)], Rule(ascent=Ascent(), descent="all"))
    assert cost.step(active, [(batch, 64)], rule) - alone == small


def test_sequences_that_ride_along_cost_their_share_and_a_second_pair_of_factors(cost):
    """One pass, so many sequences longer; every factor is twice as wide in it, forward, again and backward."""
    wide = Rule(ascent=Ahead(1), descent="all")
    assert wide.run_on([(4, 64)]) == [(5, 64)]
    assert wide.run_on([(4, 64), (4, 64)]) == [(4, 64), (4, 64)]  # only a lone micro-batch has another one's behind it
    assert Rule(ascent=Ahead(1), joined=(5, 80)).run_on([(4, 64)]) == [(5, 80)]
    plain, tokens = Rule(ascent=Ascent(), descent="all"), 5 * 64
    # Block 0 has an input without a gradient: no gradient of the hidden state reaches q, k and v's A.
    factors = BLOCKS * 2 * (4 * ADAPTERS - LAST) * tokens - 2 * 3 * RANK * WIDTH * tokens
    more = cost.step([True] * BLOCKS, [(4, 64)], wide) - cost.step([True] * BLOCKS, [(5, 64)], plain)
    assert more == factors


def test_a_step_costs_one_and_the_share_of_its_ascent(cost):
    """The words of the documentation: 1 + m/N, whichever way the ascent's sequences run; factors come on top."""
    everything = [True] * BLOCKS
    for n, m in ((4, 1), (16, 1), (16, 4)):
        fresh = cost.ratio(everything, [(n, 64)], Rule(ascent=Part(m), descent="all"))
        assert fresh == pytest.approx(1 + m / n, rel=0.02)
        assert cost.ratio(everything, [(1, 64)] * n, Rule(ascent=Part(m), descent="all")) <= 1 + m / n
    assert cost.ratio(everything, [(4, 64)], Rule(ascent=Part(9), descent="all")) == pytest.approx(2.0, rel=0.02)


def test_auto_rides_unless_it_cannot():
    assert rule_of(SLSAMConfig()).ascent.rides
    assert not rule_of(SLSAMConfig(), rides=False).ascent.rides
    assert not rule_of(SLSAMConfig(rho=0.0)).ascent_shapes(SHAPES)
    assert rule_of(SLSAMConfig(method="sam")).ascent_shapes(SHAPES) == SHAPES


RULES = [
    Rule(),
    Rule(reused=0),
    NO_ASCENT,
    Rule(ascent=Remembered()),
    Rule(ascent=Part(fraction=0.25)),
    Rule(ascent=Part(1)),
    Rule(descent="all"),
    Rule(ascent=Part(fraction=0.25), descent="all"),
    Rule(ascent=Ahead(1), descent="all"),
]


@given(
    active=st.lists(st.booleans(), min_size=BLOCKS, max_size=BLOCKS).filter(any),
    rule=st.sampled_from(RULES),
    shapes=st.lists(st.tuples(st.integers(1, 4), st.integers(2, 40)), min_size=1, max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_linear_form_and_names_agree_with_the_step(cost, active, rule, shapes):
    exact = cost.ratio(active, shapes, rule)
    lowest_active = active.index(True)
    reach = [float(i >= lowest_active) for i in range(BLOCKS)]
    assert cost.linear_terms(shapes, rule).expected(reach, active) == pytest.approx(exact, rel=EXACT_FLOAT64)
    names = [name for block, on in zip(cost.decoder.blocks, active, strict=True) if on for name in block.trainable]
    assert cost.ratio(names, shapes, rule) == pytest.approx(exact, rel=EXACT_FLOAT64)


@pytest.mark.parametrize("rule", RULES)
def test_a_nested_scheme_is_linear_in_its_probabilities(cost, rule):
    lowest_blocks = [0.1, 0.0, 0.2, 0.3, 0.15, 0.25]
    reach = list(itertools.accumulate(lowest_blocks))
    exact = sum(
        share * cost.ratio([i >= lowest_active for i in range(BLOCKS)], SHAPES, rule)
        for lowest_active, share in enumerate(lowest_blocks)
    )
    assert cost.linear_terms(SHAPES, rule).expected(reach, reach) == pytest.approx(exact, rel=EXACT_FLOAT64)


def test_a_higher_lowest_active_never_costs_more(cost):
    for rule in RULES:
        costs = [
            cost.step([i >= lowest_active for i in range(BLOCKS)], SHAPES, rule) for lowest_active in range(BLOCKS)
        ]
        assert costs == sorted(costs, reverse=True)


def test_independent_reach_against_all_masks():
    p = [0.3, 0.05, 0.6, 0.2]
    masks = [mask for mask in itertools.product((False, True), repeat=4) if any(mask)]
    weights = [torch.tensor([q if on else 1 - q for q, on in zip(p, mask, strict=True)]).prod() for mask in masks]
    total = float(sum(weights))
    reach, inclusion = independent_reach(p)
    for i in range(4):
        below = sum(float(w) for w, m in zip(weights, masks, strict=True) if any(m[: i + 1])) / total
        active = sum(float(w) for w, m in zip(weights, masks, strict=True) if m[i]) / total
        assert reach[i] == pytest.approx(below, rel=1e-6)
        assert inclusion[i] == pytest.approx(active, rel=1e-6)
    assert reach_of([(False, True, True), (False, False, True)]) == ([0.0, 0.5, 1.0], [0.0, 0.5, 1.0])


@pytest.mark.parametrize(
    ("changes", "budget"),
    [
        ({"design": "depth"}, 1.2),
        ({"design": "depth", "ascent": "partial"}, 0.85),
        ({"design": "depth", "ascent": "remembered"}, 0.7),
        ({"design": "bernoulli"}, 1.7),
        ({"design": "fixed_size"}, 1.7),
        ({"design": "depth", "descent": "all"}, 1.4),
    ],
)
def test_budget_is_met_in_expectation(model, cost, changes, budget):
    config = SLSAMConfig(**changes)
    expected = ExpectedCost(cost, arms_of(model), config, SHAPES)
    fraction = expected.solve(budget)
    assert 1 / BLOCKS <= fraction <= 1
    # averaged over 256 draws, the expectation of a fixed-size scheme moves in steps
    assert expected(fraction) == pytest.approx(budget, rel=1e-2 if config.design == "fixed_size" else 1e-3)
    assert expected(1.0) == pytest.approx(cost.ratio([True] * BLOCKS, SHAPES, rule_of(config)), rel=EXACT_FLOAT64)


def test_finer_arms_reach_lower_than_blocks(model, cost):
    config = SLSAMConfig(design="bernoulli")
    block, module = (ExpectedCost(cost, arms_of(model, name), config, SHAPES) for name in ("block", "module"))
    assert module(0.2) > block(0.2)  # more arms, a lower one among them


def test_solver_names_what_is_reachable():
    def expected(fraction):
        return 0.5 + 1.5 * fraction

    assert solve_active_fraction(expected, 1.1, 0.1) == pytest.approx(0.4, abs=1e-3)
    with pytest.raises(ValueError, match=r"cost_budget=0\.5 .* between 0\.650 and 2\.000 .*ascent='partial'"):
        solve_active_fraction(expected, 0.5, 0.1)
    with pytest.raises(ValueError, match=r"cost_budget=2\.5 .* between 0\.650 and 2\.000 .*active_fraction=1"):
        solve_active_fraction(expected, 2.5, 0.1)


def test_wrong_active_sets_are_refused(cost):
    with pytest.raises(ValueError, match="3 flags; the model has 6 blocks"):
        cost.step([True] * 3, SHAPES)
    with pytest.raises(ValueError, match="empty"):
        cost.step([False] * BLOCKS, SHAPES)
    with pytest.raises(ValueError, match="empty"):
        cost.step(["no.such.parameter"], SHAPES)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="no stack of transformer blocks"):
        CostModel.from_model(torch.nn.Linear(2, 2), True)


def test_adapters_on_expert_weights_are_refused():
    config = MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    lora = LoraConfig(target_parameters=["mlp.experts.down_proj"], target_modules=[], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="adapts no linear module"):
        CostModel.from_model(get_peft_model(model, lora), True)


def test_only_the_active_adapter_counts(cost):
    model = tiny_llama()
    model.add_adapter("second", LoraConfig(r=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert CostModel.from_model(model, True).plain(SHAPES) == cost.plain(SHAPES)


def test_trained_embeddings_send_the_lowest_active_to_the_bottom():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_llama().config)
        lora = LoraConfig(
            r=RANK, target_modules="all-linear", modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, lora, low_cpu_mem_usage=True)
    cost = CostModel.from_model(model, checkpointing=False)
    below, head = cost.decoder.below_trainable, cost.decoder.head_trainable
    assert len(below) == len(head) == 1
    assert "embed_tokens" in next(iter(below))
    top = cost.decoder.blocks[-1].trainable
    low, high = cost.step([*below, *top], SHAPES), cost.step(top, SHAPES)
    assert low > high
    assert cost.step([*top, *head], SHAPES) - high == pytest.approx(2 * HEAD / 3, rel=EXACT_FLOAT64)


def test_packed_four_bit_weights_count_like_dense_ones(cost):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny_llama()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name == "base_layer" and isinstance(child, torch.nn.Linear):
                packed = bitsandbytes.nn.Linear4bit(child.in_features, child.out_features, bias=False, device="meta")
                setattr(parent, name, packed)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    assert CostModel.from_model(model, True).plain(SHAPES) == cost.plain(SHAPES)
