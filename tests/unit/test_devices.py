"""Models that lie on two devices (`device_map`): the CPU and one without values, where torch checks devices alike.

What comes of it are no numbers; every operation on tensors of both devices that torch does not allow is an error.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.overrides import TorchFunctionMode

from slsam_peft import SLSAM, SLSAMConfig, arms_of
from slsam_peft.algorithm.step import Cut, Passes, Riding
from slsam_peft.trainer.riding import lora_pairs

CPU, OTHER = torch.device("cpu"), torch.device("meta")


class Crossing(torch.autograd.Function):
    """Brings a hidden state to the other device, and its gradient back."""

    @staticmethod
    def forward(ctx, hidden):
        return torch.empty_like(hidden, device=OTHER)

    @staticmethod
    def backward(ctx, gradient):
        return torch.ones(gradient.shape)


class Brought(TorchFunctionMode):
    """Brings tensors from the device without values as ones; torch has nothing to copy."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.to and args[0].is_meta:
            places = [x.device if isinstance(x, torch.Tensor) else x for x in (*args[1:], *kwargs.values())]
            if any(place in (CPU, "cpu") for place in places):
                args = (torch.ones(args[0].shape, dtype=args[0].dtype), *args[1:])
        if func.__name__.startswith(
            "_foreach_"
        ):  # on accelerators one tensor for all must lie where each of them does
            others = [x for x in args[1:] if isinstance(x, torch.Tensor)]
            assert all(tensor.device == other.device for tensor in args[0] for other in others)
        return func(*args, **kwargs)


class Block(nn.Module):
    def __init__(self, device):
        super().__init__()
        self.linear = nn.Linear(6, 6, device=device)

    def forward(self, hidden):
        if hidden.device != self.linear.weight.device:
            hidden = Crossing.apply(hidden)
        return hidden + self.linear(hidden).tanh()


class Split(nn.Module):
    """The lower blocks on one device, the upper ones on another, and the loss there."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block(device) for device in (CPU, CPU, OTHER, OTHER))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


class Unread(SLSAM):
    """Takes its checks as made, and reads numbers that do not exist as ones."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.runner._read |= set(self.runner.parameters)
        self.runner._ridden = self.runner._checks._separate = True

    def _read(self, values):  # lists of tensors of which one has no values give none
        assert values.device == CPU
        return torch.ones(values.shape, dtype=torch.float64)


def steps(ascent, targets=r".*linear", **settings):
    """Take three steps; return the algorithm."""
    torch.manual_seed(0)
    model = get_peft_model(Split(), LoraConfig(r=2, target_modules=targets))
    pairs = lora_pairs(model) if ascent == "ahead" else ()
    config = SLSAMConfig(ascent=ascent, active_fraction=1.0, **{"rho": 0.1, **settings})
    slsam = Unread(arms_of(model), config, pairs=pairs)
    x, items = torch.randn(3, 4, 6), torch.ones(())

    def over(rows):
        def run():
            loss = model(rows)
            loss.backward()
            return loss

        return run

    own = torch.ones(3, 4, dtype=torch.bool)
    riding = Riding(over(x), over(x), over(x), own, items) if pairs else None
    for _ in range(3):
        cut = lambda wanted: Cut(over(x[:wanted]), items)  # noqa: E731
        passes = Passes(over(x), over(x), sequences=3, cut=cut, items=items, divisor=items, riding=riding)
        with Brought():
            slsam.accumulate(passes)
        gradients = [(p, p.grad) for p in slsam.runner.parameters if p.grad is not None]
        assert gradients
        assert all(g.device == p.device and g.shape == p.shape for p, g in gradients)
    return slsam


@pytest.mark.parametrize(
    ("ascent", "settings"),
    [
        ("two_pass", {}),
        ("partial", {"rho": None, "loss_rise": 0.5, "descent": "all"}),
        ("remembered", {}),
        ("ahead", {"descent": "all"}),
        ("ahead", {"descent": "all", "rho": None, "loss_rise": 0.5}),
    ],
)
def test_every_operation_has_its_tensors_on_one_device(ascent, settings):
    slsam = steps(ascent, **settings)
    assert {p.device for p in slsam.runner.parameters} == {CPU, OTHER}
    assert slsam.skipped == 0
    assert ascent != "ahead" or slsam.runner.pairs


def test_noise_of_devices_on_which_nothing_is_trained_is_replayed(monkeypatch):
    """Frozen blocks draw noise, too."""
    model = get_peft_model(Split(), LoraConfig(r=2, target_modules=r"layers\.[01]\.linear"))
    arms = arms_of(model)
    assert {p.device for arm in arms for p in arm.parameters} == {CPU}
    assert set(arms.devices) == {CPU, OTHER}
    monkeypatch.setattr("slsam_peft.algorithm.rng.SILENT", ("cpu",))
    assert SLSAM(arms, SLSAMConfig(active_fraction=1.0)).runner.accelerators.devices == (OTHER,)
