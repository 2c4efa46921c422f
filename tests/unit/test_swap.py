"""Passes at w + e: what modules read is w + e, what arrives is the gradient, and w is never touched."""

import peft
import pytest
import torch
from torch import nn

from slsam_peft import SLSAM, SLSAMConfig, arms_of
from slsam_peft.algorithm.layout import Upper
from slsam_peft.algorithm.leaks import CrossLayerDependencyError, check_cut
from slsam_peft.algorithm.perturbation import Perturbation
from slsam_peft.algorithm.step import Passes
from slsam_peft.algorithm.swap import Swap, sites_of
from tests.decoders import batch, closures, decoder, passes_of
from tests.reference import assert_gradients_are, assert_step_is_exact, reference_step
from tests.tiny import llama, lora
from tests.tolerances import EXACT_FLOAT64
from tests.unit.test_peft_methods import METHODS, adapted

RHO = 0.3
CHECKPOINTING = {"non-reentrant": False, "reentrant": True}


def everything(model, **settings):
    """Return SL-SAM with every arm perturbed."""
    arms = arms_of(model, settings.pop("granularity", "block"))
    return SLSAM(arms, SLSAMConfig(rho=RHO, active_fraction=1.0, **settings))


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
@pytest.mark.parametrize("checkpointing", CHECKPOINTING.values(), ids=CHECKPOINTING)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_the_step_is_exact_under_checkpointing(method, checkpointing):
    """Which recomputes blocks in the backward pass: at w + e, too."""
    model = adapted(method)
    model.activation_checkpointing_enable({"use_reentrant": checkpointing})
    model.enable_input_require_grads()
    closure, forward_only = closures(model, batch())
    slsam = everything(model)
    assert_step_is_exact(slsam, torch.ones(len(slsam.arms), dtype=torch.bool), closure, forward_only)
    assert not slsam.runner.in_place, "nothing had to be moved in place"


TIED = {
    "adapters on embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "adapters on the head": {"target_modules": ["q_proj", "lm_head"]},
    "adapters on both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "tied adapters": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "tied adapters on both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "a trained head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "trained embeddings, tied": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "parameters by name": {"target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight"]},
}


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*", "ignore::RuntimeWarning:peft.*")
@pytest.mark.parametrize("case", TIED)
def test_what_is_tied_moves_together(case):
    model = peft.get_peft_model(llama(tie_word_embeddings=True).double(), lora(task_type="CAUSAL_LM", **TIED[case]))
    model = model.double().train()
    seen = set()
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.data_ptr() not in seen:
            nn.init.normal_(parameter, 0, 0.05)
            seen.add(parameter.data_ptr())
    storages = {p.untyped_storage().data_ptr() for p in model.parameters() if p.requires_grad}
    shared = sum(p.requires_grad for p in model.parameters()) - len(storages)
    assert (shared > 0) == ("tied adapters" in case), "the case shows nothing unless parameters share a storage"
    closure, forward_only = closures(model, batch())
    slsam = everything(model)
    assert_step_is_exact(slsam, torch.ones(len(slsam.arms), dtype=torch.bool), closure, forward_only)


@pytest.mark.parametrize("settings", [{}, {"ascent": "remembered"}], ids=["two passes", "one pass"])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", *CHECKPOINTING])
def test_hooks_of_parameters_fire_as_in_plain_passes(checkpointing, settings):
    """Once per pass, with the pass's own gradient, and what they return is what counts."""
    model = decoder(checkpointing=checkpointing, dropout=0.0)
    slsam = everything(model, **settings)
    scaled, seen = slsam.runner.parameters[2], []
    scaled.register_hook(lambda g: seen.append(g.clone()) or 0.5 * g)
    closure, _ = closures(model, batch())
    for _ in range(2):
        slsam.update(closure)
        assert torch.equal(scaled.grad, 0.5 * seen[-1])
    assert len(seen) == (2 if settings else 4)
    assert not torch.equal(seen[-1], seen[-2])


class Fused(nn.Module):
    """Was given another module's weight, and reads it past that module."""

    def __init__(self, linear):
        super().__init__()
        self.weights = [linear.weight]

    def forward(self, x):
        return x @ self.weights[0].T


class Network(nn.Module):
    """A layer that is called, and one whose weight is read by `Fused`, by itself too or not."""

    def __init__(self, twice=False):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.twice = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), twice
        self.fused = Fused(self.head)
        self.double()

    def forward(self, x):
        x = self.body(x).tanh()
        return self.fused(self.head(x)) if self.twice else self.fused(x)


class Recurrent(nn.Module):
    """A recurrent layer, which fills a list of its weights anew in every pass."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.rnn = nn.Linear(4, 4), nn.LSTM(4, 3, batch_first=True)
        self.double()

    def forward(self, x):
        return self.rnn(self.body(x).tanh())[0]


PAST = {
    "fused": (lambda: Network(), {"head.weight"}),
    "fused and called": (lambda: Network(twice=True), {"head.weight"}),
    "recurrent": (Recurrent, set()),
}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("case", PAST)
def test_weights_read_past_their_module_are_moved_in_place(case, count):
    """The pass in which that shows is done again; no micro-batch is lost or counted twice."""
    build, expected_names = PAST[case]
    model = build()
    x = torch.randn(count, 2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    calls = []

    def part(i):
        def run():
            calls.append(i)
            loss = model(x[i]).square().mean() / count
            loss.backward()
            return loss

        return Passes(run, run)

    arms = arms_of(model, "module")
    mask = torch.ones(len(arms), dtype=torch.bool)
    slsam = SLSAM(arms, SLSAMConfig(rho=RHO, active_fraction=1.0))
    for _ in range(2):
        loss, expected = reference_step(arms, mask, RHO, lambda: sum(part(i).logged() for i in range(count)))
        calls.clear()
        weights = [p.detach().clone() for p in model.parameters()]
        got = sum(slsam.accumulate(part(i), i, count) for i in range(count))
        assert float(got) == pytest.approx(float(loss), rel=1e-12)
        assert_gradients_are(expected, slsam.runner.parameters)
        assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert calls == [*range(count), *range(count)], "the second step knows"
    names = {p: n for n, p in model.named_parameters()}
    assert {names[p] for p in slsam.runner.in_place} == expected_names


def test_an_expert_without_tokens_keeps_the_swap():
    """It did not run, which is no sign of its weights being read elsewhere."""
    torch.manual_seed(0)
    experts = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(3)]).double()
    x = torch.randn(3, 5, 4, dtype=torch.float64)

    def part(i):
        def run():
            loss = experts[i](x[i]).square().mean()
            loss.backward()
            return loss

        return Passes(run, run)

    arms = arms_of(experts, "module")
    slsam = SLSAM(arms, SLSAMConfig(rho=RHO, active_fraction=1.0))
    for chosen in ((0, 0), (0, 1), (2, 1)):
        mask = torch.ones(3, dtype=torch.bool)
        _, expected = reference_step(arms, mask, RHO, lambda c=chosen: sum(part(i).logged() for i in c))
        for i, expert in enumerate(chosen):
            slsam.accumulate(part(expert), i, 2)
        assert_gradients_are(expected, slsam.runner.parameters)
    assert not slsam.runner.in_place


def factors(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 2, bias=False), nn.Linear(2, 5, bias=False)).to(dtype)


def perturbation(model, in_place=()):
    parameters = list(model.parameters())
    offsets = [torch.full_like(p, 0.3) for p in parameters]
    return Perturbation(parameters, offsets, sites_of(model, parameters), in_place)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_weights_come_back_bit_for_bit(dtype, fails, in_place):
    model = factors(dtype)
    parameters = dict(model.named_parameters())
    before = {n: p.detach().clone() for n, p in parameters.items()}
    moved = perturbation(model, {model[0].weight} if in_place else ())

    def run():
        with moved.applied():
            assert torch.equal(parameters["0.weight"], before["0.weight"]) is not in_place
            assert torch.equal(parameters["1.weight"], before["1.weight"])
            for name, value in before.items():
                assert torch.equal(
                    model.get_parameter(name)
                    if in_place and name[0] == "0"
                    else model[int(name[0])]._parameters["weight"],
                    value + 0.3,
                )
            if fails:
                raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            run()
    else:
        run()
    assert dict(model.named_parameters()) == parameters
    assert all(model.get_parameter(n) is p for n, p in parameters.items())
    assert all(torch.equal(p, before[n]) for n, p in parameters.items())


@pytest.mark.parametrize("in_place", [False, True])
def test_weights_moved_inside_autocast_are_seen(in_place):
    """autocast keeps low-precision copies of float32 weights; a stale one would give the same loss twice."""
    model, x = factors(torch.float32), torch.randn(4, 6)
    moved = perturbation(model, set(model.parameters()) if in_place else ())
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        before = model(x).square().sum().item()
        with moved.applied():
            shifted = model(x).square().sum().item()
        after = model(x).square().sum().item()
    assert shifted != before
    assert after == before


def test_gradients_are_contiguous():
    """A fused optimizer takes wrong steps on others, without an error."""
    torch.manual_seed(0)
    weight = nn.Linear(3, 5, bias=False).double()
    x = torch.randn(4, 3, dtype=torch.float64)

    def closure():
        loss = (x @ weight.weight.T.contiguous().T.expand(5, 3).T).square().sum()
        loss.backward()
        return loss

    slsam = SLSAM(arms_of(weight, "module"), SLSAMConfig(rho=RHO, active_fraction=1.0))
    weight.weight.register_hook(lambda g: g.T.contiguous().T)
    slsam.update(closure)
    assert weight.weight.grad.is_contiguous()


def test_a_cut_is_checked_at_w_plus_e_too():
    """What enters a cut may depend on a parameter above it by the tensor that stands in its place."""
    above, below = nn.Linear(3, 3), nn.Linear(3, 3)
    parameters = [above.weight, above.bias]
    swap = Swap(parameters, [torch.ones_like(p) for p in parameters], sites_of(above, parameters))
    x = torch.ones(1, 3)
    with swap.applied():
        check_cut(below(x), Upper((above,)), "the blocks")
        with pytest.raises(CrossLayerDependencyError, match="depends on parameters above it"):
            check_cut(below(above(x)), Upper((above,)), "the blocks")


class Past(nn.Module):
    """A block that reads its weight past its module where it keeps it in a list."""

    def __init__(self, past):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
        self.kept = [self.inner.weight] if past else None

    def forward(self, hidden):
        weight = self.inner.weight if self.kept is None else self.kept[0]
        return hidden + self.outer(torch.tanh(nn.functional.linear(hidden, weight, self.inner.bias)))


class Blocks(nn.Module):
    """Four of them, the last of which reads past its module."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Past(i == 3) for i in range(4)])

    def forward(self, hidden):
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden.square().mean()


@pytest.mark.parametrize("drawn", range(4))
def test_a_pass_from_kept_hidden_states_is_made_again_in_place(drawn):
    """Its graph below the kept hidden state has been run through by then."""
    torch.manual_seed(0)
    model, hidden = Blocks(), torch.randn(3, 4, dtype=torch.float64)
    mask = torch.arange(4) >= drawn
    slsam = SLSAM(arms_of(model), SLSAMConfig(rho=0.1, active_fraction=0.5, descent="all", design=lambda p, g: mask))
    closure, forward_only = passes_of(lambda: model(hidden))
    slsam.update(closure, None, forward_only)
    made = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    parameters = [p for n, p in model.named_parameters() if int(n.split(".")[1]) >= drawn]
    gradients = torch.autograd.grad(model(hidden), parameters)
    norm = torch.stack([g.norm() for g in gradients]).norm()
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.add_(0.1 * gradient / norm)
    model(hidden).backward()
    largest = max(float(p.grad.abs().max()) for p in model.parameters())
    for name, parameter in model.named_parameters():
        assert float((made[name] - parameter.grad).abs().max()) <= EXACT_FLOAT64 * largest, name
