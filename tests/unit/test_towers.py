"""Models of several stacks of blocks: cut and reused in each, exact against the plain two-pass, or told."""

import logging
from itertools import product

import pytest
import torch
from torch import nn

from slsam_peft import SLSAM, SLSAMConfig, arms_of
from tests.decoders import passes_of
from tests.reference import assert_step_is_exact
from tests.towers import TOWERS, tower_batch, tower_of

RHO = 0.1

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

# Where second passes run whole, by depth: what lies above takes in more than a hidden state there.
WHOLE = {
    ("llava", "active"): {2},  # the features of the last vision layer are not used, those of the one before are
    ("llava", "all"): {2},
    ("qwen3-vl", "active"): {2, 3},  # mergers take in the vision blocks 0 and 2
    ("qwen3-vl", "all"): {2, 3, 5, 7},  # the text block above block 7 takes in features that are trained below it
    ("gemma3n", "active"): {3, 4, 5},  # keys and values of blocks 2 and 3 are shared with 4 and 5
    ("gemma3n", "all"): {3, 4, 5},
}


class Steps:
    """Steps that perturb every arm from a depth up, checked against the reference."""

    def __init__(self, model, inputs, descent="active", granularity="block"):
        self.arms = arms_of(model, granularity)
        self.lowest = -1
        config = SLSAMConfig(rho=RHO, active_fraction=0.9, design=lambda p, g: self.mask, descent=descent)
        self.slsam = SLSAM(self.arms, config)
        self.closure, self.forward_only = passes_of(lambda: model(**inputs).loss)
        self.check(-1)  # shows in which order everything runs

    @property
    def mask(self):
        return torch.tensor([arm.depth >= self.lowest for arm in self.arms])

    @property
    def stacks(self):
        return self.arms.layout.stacks

    def check(self, lowest):
        self.lowest = lowest
        assert_step_is_exact(self.slsam, self.mask, self.closure, self.forward_only)

    def left_out(self):
        """Run the step again; return the depths of the blocks that its second pass leaves out."""
        ran, begins, hooks = [], [], []
        for depth, block in enumerate(self.arms.layout.blocks):
            inner = next(m for m in block.modules() if isinstance(m, nn.Linear))
            hooks.append(inner.register_forward_hook(lambda m, args, out, depth=depth: ran.append(depth)))

        def closure():
            begins.append(len(ran))
            return self.closure()

        self.slsam.update(closure, forward_only=self.forward_only)
        for hook in hooks:
            hook.remove()
        assert len(begins) == 2
        return set(ran[: begins[1]]) - set(ran[begins[1] :])

    def below(self, depth):
        """Return the depths of the blocks below a block in its own stack."""
        first = 0
        for stack in self.stacks:
            if depth < first + len(stack) or stack is self.stacks[-1]:
                return set(range(first, depth))
            first += len(stack)
        raise AssertionError(depth)


# One that is fed from the side in the default run, for shared keys and features between blocks see the slow one.
DEFAULT = [("t5", "all")]
CASES = [
    pytest.param(*case, marks=[] if case in DEFAULT else pytest.mark.slow)
    for case in product(TOWERS, ("active", "all"))
]


@pytest.mark.parametrize(("family", "descent"), CASES)
def test_every_stack_is_cut_and_reused(family, descent):
    steps = Steps(tower_of(family), tower_batch(family), descent)
    whole = WHOLE.get((family, descent), set())
    for depth in sorted({arm.depth for arm in steps.arms} - {-1}):
        for _ in range(2):
            steps.check(depth)
        assert steps.left_out() == (set() if depth in whole else steps.below(depth)), depth
    assert len(steps.slsam.horizon.stacks) == len(steps.stacks)
    assert bool(len(steps.slsam.fallbacks)) == bool(whole)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["module", "tensor"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("descent", ["active", "all"])
@pytest.mark.parametrize("family", TOWERS)
def test_the_same_with_checkpointing_is_exact(family, descent, checkpointing, granularity):
    steps = Steps(tower_of(family, checkpointing), tower_batch(family), descent, granularity)
    for depth in sorted({arm.depth for arm in steps.arms} - {-1}):
        for _ in range(2):
            steps.check(depth)


def test_what_cannot_be_reused_is_told_once_for_each_stack(caplog):
    steps = Steps(tower_of("qwen3-vl"), tower_batch("qwen3-vl"), "all")
    for _ in range(2):
        for depth in (2, 3, 7):
            steps.check(depth)
    ours = [r for r in caplog.records if r.levelno == logging.WARNING and r.name.startswith("slsam_peft")]
    told = [r.getMessage() for r in ours if not r.msg.startswith("no method is named")]
    assert len(told) == 2
    assert all("the hidden-state cache is off in base_model.model.model." in line for line in told)
    assert told == [str(fallback) for fallback in steps.slsam.fallbacks]


def test_lists_of_adapted_layers_are_no_blocks():
    """Gemma 3n keeps projections of its streams in lists; an adapter makes of each more than one module."""
    arms = arms_of(tower_of("gemma3n"))
    assert [len(stack) for stack in arms.layout.stacks] == [6]
    assert len(arms.blocks) == 6


def test_projections_registered_behind_the_blocks_that_they_feed_lie_below():
    steps = Steps(tower_of("gemma3n"), tower_batch("gemma3n"))
    depths = {arm.name.removeprefix("base_model.model.model."): arm.depth for arm in steps.arms}
    assert {depths[f"altup_projections.{i}"] for i in range(3)} == {-1} == {depths["per_layer_model_projection"]}
    assert {depths[f"altup_unembed_projections.{i}"] for i in range(3)} == {6}


def test_projectors_lie_between_a_tower_and_its_decoder():
    steps = Steps(tower_of("llava"), tower_batch("llava"))
    depths = {arm.name.rpartition("model.")[2]: arm.depth for arm in steps.arms}
    assert depths["multi_modal_projector.linear_1"] == 2  # as if it were in the last of three vision blocks
    assert depths["layers.0"] == 3


def test_batches_without_images_are_cut_and_reused():
    steps = Steps(tower_of("llava"), tower_batch("llava", images=False))
    for _ in range(2):
        steps.check(5)
    assert steps.left_out() == {3, 4}
    assert [f.what for f in steps.slsam.fallbacks] == ["a drawn arm is not perturbed in some steps"]  # a vision block


class Behind(nn.Module):
    """Registers its tower behind the blocks that it feeds, and runs it only for some inputs."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
        self.tower = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(6, 1)

    def forward(self, x):
        for layer in (*self.tower, *self.layers):
            x = layer(x)
        return self.head(x).square().mean()


@pytest.mark.parametrize("descent", ["active", "all"])
def test_stacks_are_put_into_the_order_in_which_they_run(descent):
    torch.manual_seed(0)
    model, x = Behind().double(), torch.randn(5, 6, dtype=torch.float64)
    arms, lowest = arms_of(model), [0]
    mask = lambda: torch.tensor([arm.depth >= lowest[0] for arm in arms])  # noqa: E731
    slsam = SLSAM(arms, SLSAMConfig(rho=RHO, active_fraction=0.9, design=lambda p, g: mask(), descent=descent))
    closure, forward_only = passes_of(lambda: model(x))
    slsam.update(closure, forward_only=forward_only)
    assert {arm.name: arm.depth for arm in arms} == {
        "tower.0": 0, "tower.1": 1, "layers.0": 2, "layers.1": 3, "layers.2": 4, "head": 5
    }  # fmt: skip
    for lowest[0] in range(6):
        for _ in range(2):
            assert_step_is_exact(slsam, mask(), closure, forward_only)
    assert not slsam.fallbacks
