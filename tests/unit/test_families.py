"""Families that run in ways of their own: exact against the plain two-pass, or told, and nothing crashes."""

import logging
import random

import numpy.random as np_random  # noqa: TID251 - some models draw from it
import pytest
import torch
from peft import LoraConfig, MontecloraConfig, get_peft_model
from torch import nn

from slsam_peft import SLSAM, SLSAMConfig, arms_of
from slsam_peft.algorithm import rng
from slsam_peft.algorithm.step import Cut, Passes
from tests.decoders import batch, closures, decoder, passes_of
from tests.families import batch_of, model_of
from tests.reference import assert_step_is_exact, reference_step

RHO = 0.1

ROUTED = ["qwen3-moe", "qwen3-moe every other", "mixtral", "gpt-oss", "jamba", "qwen3-next"]
TUPLES = ["bloom", "mpt", "falcon", "gpt-neo", "roformer", "megatron-bert", "deberta", "t5", "xlnet"]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Steps:
    """Steps on one batch that each draw every arm from a lowest one up, checked against the reference."""

    def __init__(self, model, inputs, **settings):
        self.arms = arms_of(model, settings.pop("granularity", "block"))
        self.lowest = 0
        config = SLSAMConfig(rho=RHO, active_fraction=0.9, design=lambda p, g: self.mask, **settings)
        self.slsam = SLSAM(self.arms, config)
        self.closure, self.forward_only = passes_of(lambda: model(**inputs).loss)

    @property
    def mask(self):
        return torch.arange(len(self.arms)) >= self.lowest

    def check(self, *lowest, spare=True):
        for self.lowest in lowest:
            assert_step_is_exact(self.slsam, self.mask, self.closure, self.forward_only if spare else None)


def said(caplog, text):
    """Return how many warnings say `text`."""
    return sum(text in r.message and r.levelno == logging.WARNING for r in caplog.records)


@pytest.mark.parametrize("descent", ["active", "all"])
@pytest.mark.parametrize("family", ROUTED)
def test_losses_of_routers_below_the_cut_are_kept(family, descent, caplog):
    steps = Steps(model_of(family), batch_of(family), descent=descent)
    steps.check(1, 3)
    assert not steps.slsam.horizon.reuse
    assert steps.slsam.runner.horizon is not None
    assert said(caplog, "the loss depends on more of the blocks below block") == 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_of_routers_under_checkpointing(checkpointing):
    steps = Steps(model_of("qwen3-moe", checkpointing), batch_of("qwen3-moe"))
    steps.check(2)
    assert not steps.slsam.horizon.reuse


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral"])
def test_experts_without_a_loss_of_their_own_are_reused(family):
    steps = Steps(model_of(family, output_router_logits=False), batch_of(family))
    steps.check(1, 3)
    assert steps.slsam.horizon.reuse
    assert steps.slsam.horizon.peak_bytes > 0


class FaintlyDeep(nn.Module):
    """Has a faint loss on something that a low block makes beside its hidden state."""

    def __init__(self, share):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4))
        self.share = share

    def forward(self, x):
        inner = []
        handle = self.layers[1][0].register_forward_hook(lambda module, args, output: inner.append(output))
        for layer in self.layers:
            x = layer(x)
        handle.remove()
        gate = torch.cat(inner).square().mean() if inner else 0.0
        return x.square().mean() + self.share * gate * x.mean()


@pytest.mark.parametrize("share", [1.0, 1e-9])
def test_side_channels_are_found_however_little_they_count(share):
    torch.manual_seed(0)
    model, x = FaintlyDeep(share).double(), torch.randn(5, 6, dtype=torch.float64)
    arms, lowest = arms_of(model), [0]
    slsam = SLSAM(arms, SLSAMConfig(rho=RHO, active_fraction=0.9, design=lambda p, g: torch.arange(4) >= lowest[0]))
    reuse = []
    for lowest[0] in (1, 2, 3):
        assert_step_is_exact(slsam, torch.arange(4) >= lowest[0], *passes_of(lambda: model(x)))
        reuse.append(slsam.horizon.reuse)
    assert reuse == [True, False, False]


@pytest.mark.parametrize("checkpointing", [None, True])
@pytest.mark.parametrize("family", TUPLES)
def test_blocks_that_return_tuples_are_cut_and_reused(family, checkpointing):
    if family == "xlnet" and checkpointing:
        pytest.skip("XLNet has no checkpointing")
    if family == "t5" and checkpointing:
        pytest.skip("its encoder hides its graph, see the test of encoders")
    model = model_of(family, checkpointing)
    steps = Steps(model, batch_of(family))
    steps.check(1, len(steps.arms) - 1)
    assert steps.slsam.horizon.reuse
    assert steps.slsam.horizon.peak_bytes > 0
    # Maps of attention are not kept: no block takes them in.
    kept = steps.slsam.horizon.peak_bytes
    assert kept < 10 * 3 * 8 * 32 * 8


def test_the_same_with_something_trained_above_the_blocks():
    model = model_of("bloom", True, {"modules_to_save": ["ln_f"]})
    steps = Steps(model, batch_of("bloom"))
    steps.check(2)
    assert sum(p.grad is not None for arm in steps.arms for p in arm.parameters) == 2 * 2 + 2


@pytest.mark.parametrize("descent", ["active", "all"])
def test_a_stack_that_runs_on_its_own_output_runs_whole(descent, caplog):
    steps = Steps(model_of("albert"), batch_of("albert"), descent=descent)
    steps.check(2, 1, 0)
    assert said(caplog, "passes are not cut") == 1


def test_a_stack_that_starts_more_often_than_before_is_not_trusted(caplog):
    """The first pass runs it once, the next one twice, the second time on its own output."""

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.head = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Tanh())]), nn.Linear(6, 1)
            self.times = 1

        def forward(self, x):
            for _ in range(self.times):
                x = self.layers[0](x)
            return self.head(x).square().mean()

    torch.manual_seed(0)
    model, x = Loop().double(), torch.randn(5, 6, dtype=torch.float64)
    mask = torch.tensor([False, True])
    slsam = SLSAM(arms_of(model), SLSAMConfig(rho=RHO, active_fraction=0.9, design=lambda p, g: mask, descent="all"))
    for model.times in (1, 2, 2):
        assert_step_is_exact(slsam, mask, *passes_of(lambda: model(x)))
    assert said(caplog, "passes are not cut: the blocks run 2 times") == 1


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "camembert"])
def test_heads_that_are_registered_before_their_body_lie_above_it(family):
    model = model_of(family)
    arms = arms_of(model)
    assert [arm.depth for arm in arms] == [0, 1, 2, 3, 4, 4]
    steps = Steps(model, batch_of(family))
    steps.check(5, 2)
    assert steps.slsam.runner.horizon is not None
    assert steps.slsam.horizon.reuse


class Crossed(nn.Module):
    """Registers its head first and, behind its blocks, what feeds them."""

    def __init__(self, wrong_body=False):
        super().__init__()
        self.head = nn.Linear(6, 1)
        self.rescale = nn.Linear(6, 6)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4))
        if wrong_body:
            self.base_model_prefix = "layers"

    def forward(self, x):
        x = self.rescale(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x).square().mean()


@pytest.mark.parametrize("spare", [True, False])
@pytest.mark.parametrize("wrong_body", [True, False])
def test_a_forward_pass_shows_what_runs_behind_the_blocks(wrong_body, spare):
    """With a pass to spare before the first draw, else from the second step on."""
    torch.manual_seed(0)
    model, x = Crossed(wrong_body).double(), torch.randn(5, 6, dtype=torch.float64)
    arms = arms_of(model)
    guess = 4 if wrong_body else -1
    named = {arm.name: arm.depth for arm in arms}
    assert (named["head"], named["rescale"]) == (guess, guess)
    top = torch.tensor([arm.name in ("layers.3", "head") for arm in arms])
    slsam = SLSAM(arms, SLSAMConfig(rho=RHO, active_fraction=0.9, design=lambda p, g: top))
    closure, forward_only = passes_of(lambda: model(x))
    lowest = []
    for _ in range(2):
        assert_step_is_exact(slsam, top, closure, forward_only if spare else None)
        lowest.append(slsam.metrics["lowest_active_block"])
    named = {arm.name: arm.depth for arm in slsam.arms}
    assert lowest == [3 if spare else -1, 3]
    assert (named["head"], named["rescale"]) == (4, -1)


def test_what_is_wrongly_taken_to_lie_above_never_gives_a_wrong_gradient():
    torch.manual_seed(0)
    model, x = Crossed(wrong_body=True).double(), torch.randn(5, 6, dtype=torch.float64)
    for lowest in range(6):
        arms = arms_of(model)
        mask = torch.arange(len(arms)) >= lowest
        slsam = SLSAM(arms, SLSAMConfig(rho=RHO, active_fraction=0.9, design=lambda p, g, m=mask: m))
        assert_step_is_exact(slsam, mask, passes_of(lambda: model(x))[0], None)


def test_under_depth_a_head_is_trained_as_often_as_the_top():
    model = model_of("xlm-roberta")
    slsam = SLSAM(arms_of(model), SLSAMConfig(active_fraction=0.3, design="depth"))
    masks = torch.stack([slsam.sampler.draw().mask for _ in range(50)])
    assert masks[:, -2:].all()


def test_augmentation_by_numpy_is_replayed():
    model = model_of("wav2vec2", layerdrop=0.0)
    np_random.seed(0)
    steps = Steps(model, batch_of("wav2vec2"))
    steps.check(2, 2, 0)
    slsam = SLSAM(steps.arms, SLSAMConfig(rho=1e-9, active_fraction=0.5))
    for _ in range(3):
        slsam.update(steps.closure, forward_only=steps.forward_only)
        assert abs(slsam.metrics["sharpness"]) < 1e-6


class Augmented(nn.Module):
    """Draws noise from Python's, NumPy's and torch's generators, and normalises with running statistics."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("drift", torch.zeros(()))

    def forward(self, x):
        self.drift = self.drift + 1.0
        x = self.norm(x * random.random() + np_random.rand() + torch.rand(()) + self.drift * x.square())
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def test_every_source_of_noise_is_replayed():
    torch.manual_seed(0)
    model, x = Augmented().double(), torch.randn(5, 6, dtype=torch.float64)
    slsam = SLSAM(arms_of(model, "module"), SLSAMConfig(rho=1e-9, active_fraction=1.0))
    closure, _ = passes_of(lambda: model(x))
    for step in range(1, 4):
        slsam.update(closure)
        assert abs(slsam.metrics["sharpness"]) < 1e-6
        assert float(model.drift) == step  # as in one pass
        assert int(model.norm.num_batches_tracked) == step


def test_numpy_is_not_loaded_for_its_generator(monkeypatch):
    monkeypatch.delitem(rng.sys.modules, "numpy.random")
    state = rng.snapshot(())
    drawn = random.random()
    rng.restore(state)
    assert random.random() == drawn
    assert "numpy.random" not in state


@pytest.mark.parametrize("part", [False, True])
def test_noise_that_cannot_be_replayed_is_refused_by_name(part):
    torch.manual_seed(0)
    model = decoder("llama", dropout=0.0).unload()
    settings = {"r": 2, "target_modules": ["q_proj"], "lora_dropout": 0.0}
    model = get_peft_model(model, LoraConfig(**settings, monteclora_config=MontecloraConfig())).double().train()
    closure, forward_only = closures(model, batch())
    slsam = SLSAM(arms_of(model), SLSAMConfig(active_fraction=1.0, ascent="partial" if part else "two_pass"))
    cut = Cut(closures(model, batch(rows=1))[0])
    passes = Passes(closure, closure, forward_only, sequences=2, cut=lambda wanted: cut)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj\.\S* and \d+ buffers more change"):
        slsam.accumulate(passes) if part else slsam.update(closure)
    assert all(p.grad is None for p in model.parameters())


def test_batch_norm_in_blocks_that_are_computed_again_is_no_noise():
    """Checkpointing counts the batch once more; what batch norm tracks is not read in training."""
    model = model_of("wav2vec2-conformer", False)
    closure, forward_only = passes_of(lambda: model(**batch_of("wav2vec2-conformer")).loss)
    slsam = SLSAM(arms_of(model), SLSAMConfig(rho=0.1, active_fraction=1.0))
    slsam.update(closure, None, forward_only)
    assert all(p.grad is not None for p in slsam.parameters)


class Residual(nn.Sequential):
    """Adds to its input what its layers make of it."""

    def forward(self, x):
        return x + super().forward(x)


class Dropping(nn.Module):
    """Residual blocks that are skipped at random, as LayerDrop does."""

    def __init__(self, rate, dropout=0.0):
        super().__init__()
        self.layers = nn.ModuleList(Residual(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(dropout)) for _ in range(4))
        self.head = nn.Linear(6, 1).requires_grad_(False)
        self.rate = rate

    def forward(self, x):
        for layer in self.layers:
            if torch.rand(()) >= self.rate:
                x = layer(x)
        return self.head(x).square().mean()


@pytest.mark.parametrize(("spare", "forwards"), [(True, 1), (True, 2), (False, 1)])
@pytest.mark.parametrize("descent", ["active", "all"])
def test_blocks_that_are_skipped_at_random_are_skipped_in_both_passes(descent, spare, forwards):
    torch.manual_seed(0)
    model, x = Dropping(0.3, dropout=0.2).double().train(), torch.randn(5, 6, dtype=torch.float64)
    lowest = [0]
    mask = lambda: torch.arange(4) >= lowest[0]  # noqa: E731
    slsam = SLSAM(
        arms_of(model), SLSAMConfig(rho=RHO, active_fraction=0.9, design=lambda p, g: mask(), descent=descent)
    )
    closure, forward_only = passes_of(lambda: sum(model(x + i) for i in range(forwards)))
    exact = 0
    for step in range(32):
        lowest[0] = step % 4
        state = torch.get_rng_state()
        try:
            trained = torch.ones(4, dtype=torch.bool) if descent == "all" else None
            loss, expected = reference_step(slsam.arms, mask(), RHO, closure, trained)
        except RuntimeError:  # the plain pass has no gradient either
            loss = None
        torch.set_rng_state(state)
        if loss is None and descent == "all":
            continue
        got = slsam.update(closure, forward_only=forward_only if spare else None)
        gradients = [p.grad for arm in slsam.arms for p in arm.parameters]
        if loss is None or all(e is None for e in expected):
            assert all(g is None for g in gradients)
            continue
        assert float(got) == float(loss)
        for g, e in zip(gradients, expected, strict=True):
            assert (g is None) == (e is None)
            if e is not None:
                torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-12)
        exact += 1
    assert exact > 16
    assert slsam.runner.horizon is not None
    assert slsam.horizon.reuse
    assert (slsam.horizon.peak_bytes > 0) == spare


def test_a_step_whose_arms_take_no_part_is_skipped_and_counted(caplog):
    torch.manual_seed(0)
    model, x = Dropping(0.9).double().train(), torch.randn(5, 6, dtype=torch.float64)
    mask = torch.arange(4) == 1
    slsam = SLSAM(arms_of(model), SLSAMConfig(active_fraction=0.5, design=lambda p, g: mask, max_skipped_steps=0))
    closure, forward_only = passes_of(lambda: model(x))
    probabilities = slsam.probabilities.clone()
    losses, none = [], 0
    for _ in range(20):
        losses.append(float(slsam.update(closure, forward_only=forward_only)))
        none += all(p.grad is None for p in model.parameters())
    assert none == slsam.skipped > 10
    assert slsam.metrics["skipped"] == none
    assert slsam.skipped_in_a_row == 0
    assert all(loss > 0 for loss in losses)
    assert slsam.steps == 20
    assert torch.allclose(slsam.probabilities.sum(), probabilities.sum())
    assert said(caplog, "none of the drawn arms takes part in the loss") == 1


def test_micro_batches_without_a_gradient_count_nothing():
    """One of two takes part: the step is that one's."""
    from slsam_peft.algorithm.step import Passes

    torch.manual_seed(0)
    model, x = Dropping(0.0).double().train(), torch.randn(5, 6, dtype=torch.float64)
    mask = torch.arange(4) == 3
    slsam = SLSAM(arms_of(model), SLSAMConfig(rho=RHO, active_fraction=0.5, design=lambda p, g: mask))

    def without(skip):
        def forward():
            y = x
            for layer in model.layers[:3] if skip else model.layers:
                y = layer(y)
            return model.head(y).square().mean()

        closure, forward_only = passes_of(forward)
        return Passes(closure, closure, forward_only)

    _, expected = reference_step(slsam.arms, mask, RHO, without(False).logged)
    slsam.accumulate(without(True), 0, 2)
    slsam.accumulate(without(False), 1, 2)
    assert slsam.skipped == 0
    for p, e in zip([p for arm in slsam.arms for p in arm.parameters], expected, strict=True):
        assert (p.grad is None) == (e is None)
        if e is not None:
            torch.testing.assert_close(p.grad, e, rtol=1e-12, atol=1e-14)


def test_a_model_in_which_nothing_trained_takes_part_is_an_error():
    model = Dropping(1.0)
    slsam = SLSAM(arms_of(model), SLSAMConfig(active_fraction=1.0))
    with pytest.raises(RuntimeError, match="does not require grad"):
        slsam.update(passes_of(lambda: model(torch.ones(2, 6)))[0])


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("family", ["bart", "whisper"])
def test_adapters_in_a_decoder_alone(family, checkpointing, caplog):
    steps = Steps(model_of(family, checkpointing), batch_of(family), descent="all")
    steps.check(1, 3)
    assert steps.slsam.runner.horizon is not None
    assert steps.slsam.horizon.reuse == (not checkpointing)
    assert said(caplog, "fed from the side") == bool(checkpointing)
