"""Stacks whose blocks pass on more than a hidden state, or that run another way in each pass: exact, or told."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
)

from slsam_peft import SLSAM, SLSAMConfig, arms_of
from tests.decoders import FAMILIES, WORDS, batch, closures, decoder, passes_of
from tests.reference import assert_step_is_exact

RHO = 0.1
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SHAPE = {"vocab_size": WORDS, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, **_TOKENS}


def adapted(model, **lora):
    """Give a model non-zero adapters and training mode, all in float64."""
    model = get_peft_model(model.double(), LoraConfig(r=2, **lora), autocast_adapter_dtype=False).train()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.05 * torch.randn_like(parameter))
    return model


def above(lowest_active):
    """Return a sampling scheme that draws every arm from the one at `lowest_active` up."""
    return lambda p, generator: torch.arange(len(p)) >= lowest_active


def sharing(family):
    """Return six blocks; the last two attend to keys and values of blocks 2 (sliding) and 3 (full)."""
    torch.manual_seed(0)
    shape = {
        **_SHAPE,
        "num_hidden_layers": 6,
        "head_dim": 8,
        "sliding_window": 4,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": WORDS,
        "hidden_size_per_layer_input": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    }
    if family == "gemma3n":
        more = {"intermediate_size": [48] * 6, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 6}
        model = Gemma3nForCausalLM(Gemma3nTextConfig(**shape, **more))
    else:
        model = Gemma4ForCausalLM(Gemma4TextConfig(**shape, intermediate_size=48, global_head_dim=8))
    return adapted(model, target_modules=["q_proj", "v_proj", "down_proj"])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_keys_shared_across_blocks_are_found_at_whichever_lowest_active_they_matter(family, checkpointing, caplog):
    """Below the shared blocks a second pass may start anywhere; between source and reader it must run whole."""
    model = sharing(family)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    lowest_active = [0]
    arms = arms_of(model)
    slsam = SLSAM(arms, SLSAMConfig(rho=RHO, active_fraction=0.9, design=lambda p, g: above(lowest_active[0])(p, g)))
    closure, forward_only = closures(model, batch())
    reuse = []
    with caplog.at_level(logging.INFO, logger="slsam_peft"):
        for lowest_active[0] in (1, 2, 1, 3, 5, 4, 2):
            assert_step_is_exact(slsam, above(lowest_active[0])(arms, None), closure, forward_only)
            reuse.append(slsam.horizon.reuse)
    assert slsam.horizon.shares
    assert reuse == [True, True, True, False, False, False, False]
    assert slsam.horizon.at(0).whole == {3, 4, 5}  # and from 1 and 2 on second passes start as before
    assert sum("the hidden-state cache is off" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_ordinary_blocks_share_nothing_so_one_check_is_enough(family):
    model = decoder(family)
    closure, forward_only = closures(model, batch())
    checks = []
    lowest_blocks = iter(range(1, 5))
    design = lambda p, g: torch.arange(len(p)) >= next(lowest_blocks)  # noqa: E731
    slsam = SLSAM(arms_of(model), SLSAMConfig(rho=RHO, active_fraction=0.9, design=design))
    for _ in range(4):
        slsam.update(closure, forward_only=lambda: checks.append(1) or forward_only())
    assert slsam.horizon.reuse
    assert not slsam.horizon.shares
    assert len(checks) == 1


def test_a_cache_that_blocks_could_write_to_is_checked_at_each_lowest_active():
    model = decoder("llama")
    inputs = {**batch(), "use_cache": True}
    closure, forward_only = closures(model, inputs)
    checks = []
    lowest_blocks = iter([1, 2, 1, 2, 4])
    design = lambda p, g: torch.arange(len(p)) >= next(lowest_blocks)  # noqa: E731
    slsam = SLSAM(arms_of(model), SLSAMConfig(rho=RHO, active_fraction=0.9, design=design))
    for _ in range(5):
        slsam.update(closure, forward_only=lambda: checks.append(1) or forward_only())
    assert slsam.horizon.shares
    assert len(checks) == 3


@pytest.mark.parametrize("granularity", ["block", "module"])
def test_factors_that_are_read_without_their_module_being_called_are_swapped(granularity):
    """PEFT's `target_parameters` multiplies the factors of an expert weight itself, and reads them from the module."""
    torch.manual_seed(0)
    config = MixtralConfig(**_SHAPE, intermediate_size=48, num_hidden_layers=4, num_local_experts=4)
    model = adapted(
        MixtralForCausalLM._from_config(config, experts_implementation="eager"),
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    arms = arms_of(model, granularity)
    mask = torch.arange(len(arms)) >= len(arms) // 2
    slsam = SLSAM(arms, SLSAMConfig(rho=RHO, active_fraction=0.9, design=lambda p, g: mask))
    assert_step_is_exact(slsam, mask, *closures(model, batch()))
    assert any("experts" in name for arm in arms for name in arm.parameter_names)
    assert not slsam.runner.in_place


class Skipping(nn.Module):
    """Residual blocks, some of which may be skipped."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4))
        self.skipped = set()

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = x if i in self.skipped else layer(x)
        return x.square().mean()


def test_a_second_pass_that_skips_the_way_into_the_lowest_active_is_an_error_not_a_wrong_gradient():
    """As LayerDrop may: the kept hidden state would never be put in."""
    torch.manual_seed(0)
    model, x = Skipping().double(), torch.randn(5, 6, dtype=torch.float64)
    passes = []

    def closure():
        passes.append(1)
        model.skipped = {1} if len(passes) in (4, 5) else set()
        loss = model(x)
        loss.backward()
        return loss

    def forward_only():
        with torch.no_grad():
            return model(x)

    arms = arms_of(model)
    mask = torch.arange(4) >= 2
    slsam = SLSAM(arms, SLSAMConfig(rho=RHO, active_fraction=0.5, design=lambda p, g: mask))
    slsam.update(closure, forward_only=forward_only)
    probabilities = slsam.probabilities.clone()
    with pytest.raises(
        RuntimeError, match=r"entered block 2 0 times and the first 1 times.*hidden_state_cache_limit_mib=0"
    ):
        slsam.update(closure, forward_only=forward_only)
    assert torch.equal(slsam.probabilities, probabilities)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or "forward" in vars(m) for m in model.modules())
    passes.extend([1] * 2)
    assert_step_is_exact(slsam, mask, closure, forward_only)


class Block(nn.Module):
    """A residual block that may take something in from the side."""

    def __init__(self, open_to_the_side=False):
        super().__init__()
        self.inner, self.open = nn.Linear(6, 6), open_to_the_side

    def forward(self, x, side=None):
        x = x + self.inner(x).tanh()
        return x + 0.3 * side if self.open else x


class Stack(nn.Module):
    """Four blocks, and a projector and a head that are defined behind them."""

    def __init__(self, open_to_the_side=()):
        super().__init__()
        self.layers = nn.ModuleList(Block(i in open_to_the_side) for i in range(4))
        self.projector, self.head = nn.Linear(6, 6), nn.Linear(6, 1)


class Looped(Stack):
    """Runs its stack twice, the second time on its own output."""

    def forward(self, x):
        for _ in range(2):
            for layer in self.layers:
                x = layer(x)
            x = self.projector(x)
        return self.head(x).square().mean()


class LoopedInTheMiddle(Stack):
    """Runs blocks 1 and 2 twice, the second time on their own output."""

    def forward(self, x):
        for i in (0, 1, 2, 1, 2, 3):
            x = self.layers[i](x)
        return self.head(self.projector(x)).square().mean()


class FedFromTheSide(Stack):
    """Blocks 1 and 3 take in what a projector, defined behind the blocks, makes of other inputs."""

    def __init__(self):
        super().__init__((1, 3))

    def forward(self, x, plain=False):
        side = x if plain else self.projector(x.flip(0)).tanh()
        for layer in self.layers:
            x = layer(x, side=side)
        return self.head(x).square().mean()


class FedInItsSecondForward(FedFromTheSide):
    """The projector takes part in the second forward alone, after the first one has run blocks and head."""

    def forward(self, x):
        return super().forward(x.flip(1), plain=True) + super().forward(x)


class OtherNames(Stack):
    """Its blocks take their hidden state by a name of their own."""

    def forward(self, x):
        for layer in self.layers:
            x = layer(x=x)
        return self.head(self.projector(x)).square().mean()


# Floors from which a cut drops nothing, so that passes stay cut.
HARMLESS = {
    Looped: (),
    LoopedInTheMiddle: (0, 1, 3, 4),
    FedFromTheSide: (0, 1),
    FedInItsSecondForward: (0, 1),
    OtherNames: (),
}


@pytest.mark.parametrize("descent", ["active", "all"])
@pytest.mark.parametrize("rho", [RHO, 0.0])
@pytest.mark.parametrize("lowest_active", range(5))
@pytest.mark.parametrize("kind", HARMLESS)
def test_passes_run_whole_where_a_cut_would_drop_a_gradient(kind, lowest_active, rho, descent, caplog):
    torch.manual_seed(0)
    model, x = kind().double(), torch.randn(5, 6, dtype=torch.float64)
    arms = arms_of(model)
    assert [arm.depth for arm in arms] == [0, 1, 2, 3, 4, 4]
    mask = torch.arange(6) >= lowest_active
    slsam = SLSAM(arms, SLSAMConfig(rho=rho, active_fraction=0.9, design=lambda p, g: mask, descent=descent))
    with caplog.at_level(logging.INFO, logger="slsam_peft"):
        for _ in range(2):
            assert_step_is_exact(slsam, mask, *passes_of(lambda: model(x)))
    told = [r.message for r in caplog.records if "passes are not cut" in r.message]
    assert len(told) == (slsam.runner.horizon is None)
    assert all("every pass runs whole" in message.lower() for message in told)
    if descent == "active":
        assert (slsam.runner.horizon is not None) == (lowest_active in HARMLESS[kind]), told
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_a_closure_gathered_before_a_dependency_showed_is_not_added_twice():
    """It accumulates over two forwards by itself, and only the second one is fed from the side."""
    torch.manual_seed(0)
    model, x = FedFromTheSide().double(), torch.randn(5, 6, dtype=torch.float64)

    def closure():
        losses = [model(x, plain=True), model(x)]
        for loss in losses:
            loss.backward()
        return sum(losses).detach()

    arms = arms_of(model)
    mask = torch.arange(6) >= 2
    slsam = SLSAM(arms, SLSAMConfig(rho=RHO, active_fraction=0.9, design=lambda p, g: mask))
    assert_step_is_exact(slsam, mask, closure, None)
    assert slsam.runner.horizon is None


class LongSkip(Stack):
    """Takes what block 0 returns in again before block 3."""

    def forward(self, x):
        first = x = self.layers[0](x)
        for layer in self.layers[1:3]:
            x = layer(x)
        return self.head(self.projector(self.layers[3](x + first))).square().mean()


class DeepLoss(Stack):
    """Its loss is on the hidden state in the middle, too."""

    def forward(self, x):
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return self.head(self.projector(states[-1])).square().mean() + states[2].square().mean()


class LossBelowTheTop(DeepLoss):
    """Its loss is on what enters the last block."""

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = layer(x)
        return self.head(self.projector(self.layers[-1](x))).square().mean() + x.square().mean()


@pytest.mark.parametrize("descent", ["active", "all"])
@pytest.mark.parametrize("kind", [LongSkip, DeepLoss, LossBelowTheTop])
def test_hidden_states_that_are_kept_are_found_at_whichever_lowest_active_they_matter(kind, descent):
    """The first check is passed, since nothing below that block is kept."""
    torch.manual_seed(0)
    model, x = kind().double(), torch.randn(5, 6, dtype=torch.float64)
    arms, lowest_active = arms_of(model), [0]
    config = SLSAMConfig(
        rho=RHO, active_fraction=0.9, design=lambda p, g: above(lowest_active[0])(p, g), descent=descent
    )
    slsam = SLSAM(arms, config)
    reuse = []
    for lowest_active[0] in (1, 2, 3, 4, 1):
        assert_step_is_exact(slsam, torch.arange(6) >= lowest_active[0], *passes_of(lambda: model(x)))
        reuse.append(slsam.horizon.reuse)
    assert reuse[0]
    assert not reuse[3]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_without_adapters_is_exact(family, tied):
    """Every parameter is trained: embeddings, norms and heads too."""
    cls, config, shape = FAMILIES[family]
    torch.manual_seed(0)
    model = cls(config(**{**shape, "tie_word_embeddings": tied})).double().train()
    closure, forward_only = closures(model, batch())
    for granularity in ("block", "tensor"):
        arms = arms_of(model, granularity)
        positions = torch.arange(len(arms))
        for mask in (positions >= len(arms) // 2, positions == len(arms) // 3, positions == len(arms) - 1):
            for descent in ("active", "all"):
                config = SLSAMConfig(rho=RHO, active_fraction=0.9, design=lambda p, g, m=mask: m, descent=descent)
                slsam = SLSAM(arms, config)
                assert_step_is_exact(slsam, mask, closure, forward_only)
                assert slsam.runner.horizon is not None
