"""An exception at each point of a step: afterwards all is as before it, and the next step is undisturbed."""

import copy
import resource
import signal

import pytest
import torch

from slsam_peft import SLSAM, SLSAMConfig, arms_of
from slsam_peft.algorithm import leaving, perturbation, swap
from slsam_peft.algorithm.step import Passes
from slsam_peft.algorithm.swap import Swap
from slsam_peft.saving.checkpoint import FILE_NAME, load_state, save_state
from tests.decoders import batch, closures, decoder
from tests.stateful import Following


class Fault(Exception):
    """What is thrown."""


class Training:
    """A small decoder with dropout, its optimizer, SL-SAM and random state; `closure` counts its calls."""

    def __init__(self, adapter, **settings):
        self.model = decoder(checkpointing=False, target_modules=["q_proj", "up_proj"])
        config = {"rho": 0.2, "active_fraction": 0.5, "design": "depth", "seed": 5, **settings}
        self.slsam = SLSAM(arms_of(self.model), SLSAMConfig(**config))
        self.slsam.cost = lambda step: 1.0
        if adapter == "in place":
            self.slsam.runner.in_place.update(self.slsam.runner.parameters)
        self.optimizer = torch.optim.AdamW([p for arm in self.slsam.arms for p in arm.parameters], lr=0.01)
        self.block = next(m for n, m in self.model.named_modules() if n.endswith("layers.4"))
        self.calls, self.at_call = 0, {}
        run, self.forward_only = closures(self.model, batch())

        def closure():
            self.calls += 1
            begin = self.at_call.get(self.calls)
            handle = begin() if begin else None
            try:
                return run()
            finally:
                if handle is not None:
                    handle.remove()

        self.closure = closure
        self.random = torch.Generator().manual_seed(1).get_state()

    def update(self):
        """One step, of two micro-batches, from where the last one left torch's generator; no optimizer's step."""
        torch.set_rng_state(self.random)
        passes = Passes(self.closure, self.closure, self.forward_only)
        try:
            return torch.stack([self.slsam.accumulate(passes, i, 2) for i in range(2)])
        finally:
            self.random = torch.get_rng_state()

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()


def tensors(training):
    """Everything that a step may touch, as tensors and plain values."""
    model, slsam = training.model, training.slsam
    return {
        **{f"weight.{n}": p.detach().clone() for n, p in model.named_parameters()},
        **{f"state.{n}": v for n, v in copy.deepcopy(slsam.state_dict()).items()},
        **{f"moment.{k}.{n}": v.clone() for k, s in training.optimizer.state.items() for n, v in s.items()},
        "parameters": [(n, id(p)) for n, p in model.named_parameters()],
        "gradients": [n for n, p in model.named_parameters() if p.grad is not None],
        "trainable": [n for n, p in model.named_parameters() if p.requires_grad],
        "pinned": [n for n, p in model.named_parameters() if "requires_grad_" in vars(p)],
        "hooks": [(n, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()],
        "shadowed": [n for n, m in model.named_modules() if "forward" in vars(m)],
        "checkpointed": [n for n, m in model.named_modules() if getattr(m, "gradient_checkpointing", False)],
        "kept": slsam.horizon.kept_bytes,
        "random": training.random,
    }


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value.nan_to_num(), two[name].nan_to_num()), name
        else:
            assert value == two[name], name


def fail(*args, **kwargs):
    raise Fault


def once(target, name, after=0):
    """Return an injector that makes `target.name` raise once, at the call after `after` others."""

    def inject(training, monkeypatch):
        owner = target(training) if callable(target) and not isinstance(target, type) else target
        original, left = getattr(owner, name), [after]

        def faulty(*args, **kwargs):
            left[0] -= 1
            if left[0] == -1:
                raise Fault
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, faulty)

    return inject


def in_forward(call):
    """In the forward of a pass: the last block raises."""

    def inject(training, monkeypatch):
        training.at_call[call] = lambda: training.block.register_forward_pre_hook(fail)

    return inject


def in_backward(call):
    """In the backward of a pass: the gradient of the last block's output raises."""

    def hooked(module, args, output):
        (output if isinstance(output, torch.Tensor) else output[0]).register_hook(fail)

    def inject(training, monkeypatch):
        training.at_call[call] = lambda: training.block.register_forward_hook(hooked)

    return inject


def after_learning(training, monkeypatch):
    """The bandit has already learnt when it raises."""
    learn = training.slsam.sampler.bandit.update

    def faulty(*args):
        learn(*args)
        monkeypatch.undo()
        raise Fault

    monkeypatch.setattr(training.slsam.sampler.bandit, "update", faulty)


# Two micro-batches of two passes each: the ascents are calls 1 and 2, the descents 3 and 4.
POINTS = {
    "draw": once(lambda t: t.slsam.sampler.scheme, "inclusion"),
    "ascent forward": in_forward(1),
    "second ascent forward": in_forward(2),
    "ascent backward": in_backward(1),
    "second ascent backward": in_backward(2),
    "entering the lowest active block": once(leaving, "split"),
    "ascent norms": once(lambda t: t.slsam._norms, "squared"),
    "between the passes": once(lambda t: t.slsam.radius, "offsets"),
    "perturbing": once(perturbation.Perturbation, "_moved"),
    "cache cleared": once(torch, "clear_autocast_cache"),
    "swapping": once(swap, "_readable", after=3),
    "swapped": once(Swap, "applied"),
    "descent forward": in_forward(3),
    "second descent forward": in_forward(4),
    "descent backward": in_backward(3),
    "second descent backward": in_backward(4),
    "descent norms": once(lambda t: t.slsam._norms, "squared", after=1),
    "numbers read": once(lambda t: t.slsam, "_read"),
    "bandit": once(lambda t: t.slsam.sampler.bandit, "update"),
    "bandit, afterwards": after_learning,
    "cost": once(lambda t: t.slsam, "cost"),
    "watch": once(lambda t: t.slsam._watch, "see"),
}
IN_PLACE = [
    "between the passes",
    "perturbing",
    "cache cleared",
    "descent forward",
    "second descent backward",
    "bandit",
]
CASES = [("swap", point) for point in POINTS if point != "cache cleared"] + [("in place", p) for p in IN_PLACE]


def assert_unmoved_by(fault, disturbed, other, monkeypatch):
    """A fault, after a good step, leaves all as it was; the next loss is equal, dropout included."""
    for training in (disturbed, other):
        training.update()
        training.step()
    before = tensors(disturbed)
    disturbed.calls = 0
    with monkeypatch.context() as patched:
        fault(disturbed, patched)
        with pytest.raises(Fault):
            disturbed.update()
    disturbed.at_call.clear()
    assert_same(before, tensors(disturbed))
    assert torch.equal(disturbed.update(), other.update())


@pytest.mark.parametrize(("adapter", "point"), CASES)
def test_a_fault_leaves_everything_as_it_was(adapter, point, monkeypatch):
    """The bits of the step that follows are those of a training that has seen no fault."""
    disturbed, other = Training(adapter), Training(adapter)
    assert_unmoved_by(POINTS[point], disturbed, other, monkeypatch)
    assert disturbed.slsam.metrics["lowest_active_block"] == 2.0, (
        "the case shows less where nothing lies below the lowest active block"
    )
    for p, q in zip(disturbed.model.parameters(), other.model.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.equal(p.grad, q.grad)
    for training in (disturbed, other):
        training.step()
    assert_same(
        {k: v for k, v in tensors(disturbed).items() if not k.startswith(("moment", "parameters"))},
        {k: v for k, v in tensors(other).items() if not k.startswith(("moment", "parameters"))},
    )


REMEMBERED = {
    "only forward": in_forward(1),
    "only backward": in_backward(1),
    "recall": once(lambda t: t.slsam.memory, "recall"),
    "remembering": once(lambda t: t.slsam.memory, "store"),
}


@pytest.mark.parametrize("point", REMEMBERED)
def test_a_fault_forgets_no_stale_gradient(point, monkeypatch):
    """With one pass per step, and what is read through the swap known from the step before."""
    disturbed, other = (Training("swap", ascent="remembered") for _ in range(2))
    assert_unmoved_by(REMEMBERED[point], disturbed, other, monkeypatch)
    assert torch.equal(disturbed.slsam.probabilities, other.slsam.probabilities)


@pytest.mark.parametrize("point", ["perturbing", "second descent forward", "bandit"])
def test_a_fault_teaches_a_radius_nothing(point, monkeypatch):
    """One of a user that has learnt from the ascent gradients when the step is aborted; the next step is as long."""
    disturbed, other = (Training("swap", rho=None, radius=Following()) for _ in range(2))
    assert_unmoved_by(POINTS[point], disturbed, other, monkeypatch)
    assert disturbed.slsam.metrics["rho"] == other.slsam.metrics["rho"]


def test_an_optimizer_that_raises(monkeypatch):
    """Its step lies outside: weights and hooks are as before, the sampler has learnt, and the next step works."""
    training = Training("swap")
    training.update()
    learnt = training.slsam.probabilities.clone()
    weights = [p.detach().clone() for p in training.model.parameters()]
    with monkeypatch.context() as patched:
        patched.setattr(training.optimizer, "step", fail)
        with pytest.raises(Fault):
            training.step()
    assert all(torch.equal(p, w) for p, w in zip(training.model.parameters(), weights, strict=True))
    assert torch.equal(training.slsam.probabilities, learnt)
    assert training.slsam.steps == 1
    assert torch.isfinite(training.update()).all()
    training.step()
    assert training.slsam.steps == 2


@pytest.mark.parametrize("adapter", ["swap", "in place"])
@pytest.mark.parametrize("call", [1, 3])
def test_low_precision_copies_do_not_outlive_a_fault(adapter, call):
    """Inside one autocast context, which keeps copies of the weights, the loss is what it was."""
    training = Training(adapter)
    training.model.float()
    inputs = batch()
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(0)
        before = training.model(**inputs).loss.detach()
        in_backward(call)(training, None)
        with pytest.raises(Fault):
            training.update()
        torch.manual_seed(0)
        assert torch.equal(training.model(**inputs).loss.detach(), before)


def test_a_full_disk_leaves_the_old_state(tmp_path):
    """The system refuses to write more than half of the file."""
    training = Training("swap")
    training.update()
    save_state(training.slsam, tmp_path)
    content = (tmp_path / FILE_NAME).read_bytes()
    training.step()
    training.update()
    before = tensors(training)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            save_state(training.slsam, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    assert (tmp_path / FILE_NAME).read_bytes() == content
    assert_same(before, tensors(training))
    load_state(training.slsam, tmp_path)
    assert training.slsam.steps == 1
