"""Cut passes, the hidden-state cache and the sparse ascent are exact: the plain two-pass is the reference."""

import logging
from itertools import product

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from slsam_peft import SLSAM, SLSAMConfig, arms_of
from tests.decoders import FAMILIES, WORDS, batch, closures, decoder, passes_of
from tests.reference import assert_step_is_exact

RHO = 0.1


def masks(count):
    """Floors at the bottom, in the middle and at the top, and a set with gaps."""
    for lowest_active in (0, count // 2, count - 1):
        yield torch.arange(count) >= lowest_active
    yield torch.zeros(count, dtype=torch.bool).index_fill_(0, torch.tensor([count // 3, count - 1]), True)


CHECKPOINTING = {"plain": None, "checkpointed": False, "reentrant": True}

# One family in every kind of checkpointing and in one way by module always, the rest in the slow run.
CASES = [
    pytest.param(
        family,
        CHECKPOINTING[kind],
        granularity,
        id=f"{family}-{kind}-{granularity}",
        marks=[] if family == "llama" and (granularity == "block" or kind == "reentrant") else pytest.mark.slow,
    )
    for family, kind, granularity in product(FAMILIES, CHECKPOINTING, ("block", "module"))
]


@pytest.mark.parametrize(("family", "checkpointing", "granularity"), CASES)
def test_gradients_equal_the_plain_two_pass(family, checkpointing, granularity):
    model = decoder(family, checkpointing)
    closure, forward_only = closures(model, batch())
    arms = arms_of(model, granularity)
    for mask, descent, check in product(masks(len(arms)), ("active", "all"), (None, forward_only)):
        config = SLSAMConfig(rho=RHO, active_fraction=0.9, design=lambda p, g, m=mask: m, descent=descent)
        slsam = SLSAM(arms, config)
        assert_step_is_exact(slsam, mask, closure, check)
        reused = check is not None and int(arms[int(mask.nonzero()[0])].depth) > 0
        assert (slsam.horizon.peak_bytes > 0) == reused
        assert slsam.runner.horizon is slsam.horizon


def test_nothing_below_the_lowest_active_builds_a_graph():
    model = decoder("llama", dropout=0.0)
    arms = arms_of(model)
    seen = []
    for block in arms.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    mask = torch.arange(len(arms)) >= 3
    closure, forward_only = closures(model, batch())
    slsam = SLSAM(arms, SLSAMConfig(active_fraction=0.9, design=lambda p, g: mask))
    slsam.update(closure, forward_only=forward_only)  # looks for side channels: one block at a time has a graph
    seen.clear()
    slsam.update(closure, forward_only=forward_only)
    ascent, descent = seen[:5], seen[-5:]
    assert ascent == [False, False, False, True, True]
    assert descent[3:] == [True, True]
    assert not any(descent[:3])


def test_hidden_states_beyond_the_limit_are_computed_again():
    model = decoder("llama")
    arms = arms_of(model)
    mask = torch.arange(len(arms)) >= 3
    closure, forward_only = closures(model, batch())
    slsam = SLSAM(
        arms, SLSAMConfig(rho=RHO, active_fraction=0.9, design=lambda p, g: mask, hidden_state_cache_limit_mib=0.0)
    )
    assert_step_is_exact(slsam, mask, closure, forward_only)
    assert slsam.horizon.peak_bytes == 0


class LeakyBlock(nn.Module):
    """A block that also hands its input on past the next ones, through a shared dictionary."""

    def __init__(self, width):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.Tanh())

    def forward(self, hidden, shared):
        out = hidden + self.inner(hidden) + 0.3 * shared["sum"]
        shared["sum"] = shared["sum"] + hidden
        return out


class LeakyStack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(LeakyBlock(6) for _ in range(4))
        self.head = nn.Linear(6, 1)

    def forward(self, x):
        shared = {"sum": torch.zeros_like(x)}
        for layer in self.layers:
            x = layer(x, shared)
        return self.head(x).square().mean()


def test_a_stack_with_a_cross_layer_dependency_falls_back_with_one_log_line(caplog):
    torch.manual_seed(0)
    model, x = LeakyStack().double(), torch.randn(5, 6, dtype=torch.float64)
    arms = arms_of(model)
    mask = torch.tensor([False, False, True, True, True])
    assert [arm.depth for arm in arms] == [0, 1, 2, 3, 4]

    closure, forward_only = passes_of(lambda: model(x))
    slsam = SLSAM(arms, SLSAMConfig(rho=RHO, active_fraction=0.9, design=lambda p, g: mask))
    for _ in range(2):
        with caplog.at_level(logging.INFO, logger="slsam_peft"):
            assert_step_is_exact(slsam, mask, closure, forward_only)
    assert not slsam.horizon.reuse
    assert sum("the hidden-state cache is off" in record.message for record in caplog.records) == 1


def test_router_losses_turn_reuse_off():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(MixtralForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).train()
    closure, forward_only = closures(model, batch())
    arms = arms_of(model)
    mask = torch.arange(len(arms)) >= 2
    slsam = SLSAM(arms, SLSAMConfig(active_fraction=0.9, design=lambda p, g: mask))
    slsam.update(closure, forward_only=forward_only)
    assert not slsam.horizon.reuse


def test_forwards_outside_a_pass_are_left_alone():
    model = decoder("llama", dropout=0.0)
    inputs = batch()
    with torch.no_grad():
        before = model(**inputs).logits
    arms = arms_of(model)
    mask = torch.arange(len(arms)) >= 3
    closure, forward_only = closures(model, inputs)
    slsam = SLSAM(arms, SLSAMConfig(active_fraction=0.9, design=lambda p, g: mask))
    slsam.update(closure, forward_only=forward_only)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)
    assert all("forward" not in block.__dict__ for block in arms.blocks)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("settings", [{}, {"ascent": "remembered"}, {"descent": "all"}, {"granularity": "module"}])
def test_whole_steps_run_on_the_meta_device(settings, monkeypatch):
    """No value is read by the host but the one vector of norms, and no CPU tensor slips in."""
    model = decoder("llama", dropout=0.0, device="meta", dtype=torch.float32)
    monkeypatch.setattr(SLSAM, "_read", lambda self, values: torch.ones(values.shape, dtype=torch.float64))
    arms = arms_of(model, settings.pop("granularity", "block"))
    slsam = SLSAM(arms, SLSAMConfig(design="depth", active_fraction=0.5, **settings))
    closure, forward_only = closures(model, batch(device="meta"))
    for _ in range(6):
        slsam.update(closure, forward_only=forward_only)
    assert slsam.steps == 6
    assert slsam.skipped == 0
