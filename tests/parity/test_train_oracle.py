"""Two whole trainings of a small network, number for number: weights, probabilities, norms and losses in float64."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from slsam_peft import SLSAM, SLSAMConfig, arms_of
from tests.tolerances import ORACLE

FOLDER = Path(__file__).parent / "oracle"
META = json.loads((FOLDER / "meta.json").read_text())


def network(trace):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    model.load_state_dict({k.removeprefix("w0."): v for k, v in trace.items() if k.startswith("w0.")})
    return model


def optimizer(model, meta):
    if meta["base"] == "sgd":
        return torch.optim.SGD(model.parameters(), lr=meta["lr"], weight_decay=meta["weight_decay"])
    return torch.optim.AdamW(model.parameters(), lr=meta["lr"], weight_decay=meta["weight_decay"])


@pytest.mark.parametrize("name", ["train_sgd", "train_adamw"])
def test_training_reproduces_the_trace(name):
    trace, meta = load_file(FOLDER / f"{name}.safetensors"), META[name]
    model = network(trace)
    base = optimizer(model, meta)
    masks = iter(trace["masks"].bool())
    config = SLSAMConfig(
        rho=meta["rho"],
        active_fraction=meta["budget_fraction"],
        bandit="paper",
        design=lambda p, generator: next(masks),
    )
    slsam = SLSAM(arms_of(model, "tensor"), config)

    for step in range(meta["steps"]):

        def closure(step=step):
            loss = nn.functional.cross_entropy(model(trace["X"][step]), trace["Y"][step])
            loss.backward()
            return loss

        loss = slsam.update(closure)
        base.step()
        base.zero_grad()
        assert float(loss) == pytest.approx(float(trace["loss_first"][step]), abs=ORACLE)
        second = slsam.metrics["sharpness"] + float(loss)
        assert second == pytest.approx(float(trace["loss_second"][step]), abs=ORACLE)
        norm = float(trace["grad_norms"][step].square().sum().sqrt())
        assert slsam.metrics["grad_norm_ascent"] == pytest.approx(norm, abs=ORACLE)
        torch.testing.assert_close(slsam.probabilities, trace["probs"][step + 1], rtol=0, atol=ORACLE)
        for key, value in model.state_dict().items():
            torch.testing.assert_close(value, trace[f"w.{key}"][step], rtol=0, atol=ORACLE)
