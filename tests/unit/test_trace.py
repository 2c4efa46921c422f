"""The recorder: what it keeps of each step, what it keeps exact when rows are thinned out, and going on."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slsam_peft import SLSAM, SLSAMConfig, arms_of
from slsam_peft.algorithm.trace import MOST_CELLS, MOST_ROWS, Trace

ARMS = 5


def made(count, costs=True):
    """What `SLSAM` shows after each of `count` steps, as plain numbers of no meaning."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        metrics = {
            "lowest_active_block": float(torch.randint(ARMS, (), generator=generator)),
            "grad_norm_ascent": 0.25,
        }
        if costs:
            metrics["cost"] = float(torch.randint(1, 9, (), generator=generator)) / 4
        yield SimpleNamespace(
            drawn=torch.rand(ARMS, generator=generator, dtype=torch.float64),
            norms=torch.rand(ARMS, generator=generator, dtype=torch.float64),
            active=torch.rand(ARMS, generator=generator) < 0.4,
            loss=float(torch.rand((), generator=generator)),
            metrics=metrics,
        )


def recorded(seen, limit=None, first=1):
    trace = Trace([f"arm {i}" for i in range(ARMS)], list(range(ARMS)), limit)
    for step, slsam in enumerate(seen, first):
        trace.record(step, slsam)
    return trace


def assert_same(one, two):
    assert one.plain() == two.plain()
    first, second = one.tensors(), two.tensors()
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value.nan_to_num(-1.0), second[key].nan_to_num(-1.0)), key


@pytest.mark.parametrize("ascent", ["two_pass", "partial", "remembered"])
def test_rows_are_what_each_step_drew_and_saw(ascent):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(ARMS)))
    x = torch.randn(8, 4)
    slsam = SLSAM(arms_of(model, "module"), SLSAMConfig(rho=0.1, active_fraction=0.5, ascent=ascent, bandit_rate=1.0))
    trace = Trace([arm.name for arm in slsam.arms], [arm.depth for arm in slsam.arms])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def closure(rows=x):
        loss = model(rows).square().mean()
        loss.backward()
        return loss

    expected = {"probabilities": [], "active": [], "loss": [], "norms": [], "sharpness": []}
    for step in range(1, 13):
        expected["probabilities"].append(slsam.probabilities)
        expected["loss"].append(slsam.update(closure, lambda: closure(x[:2])))
        expected["active"].append(slsam.active)
        expected["norms"].append(slsam.norms)
        expected["sharpness"].append(torch.tensor(slsam.metrics.get("sharpness", math.nan)))
        trace.record(step, slsam)
        optimizer.step()
    found = trace.tensors()
    for key, values in expected.items():
        wanted = torch.stack([v.detach() for v in values]).to(found[key].dtype)
        assert torch.equal(found[key].nan_to_num(-1.0), wanted.nan_to_num(-1.0)), key
    assert not torch.equal(found["probabilities"][0], found["probabilities"][-1])
    assert torch.equal(found["step"], torch.arange(1, 13))
    assert torch.equal(found["activity"], torch.stack(expected["active"]).sum(0))
    assert not found["norms"][~found["active"]].any()
    assert bool(found["sharpness"].isnan().all()) is (ascent != "two_pass")
    assert math.isnan(trace.cost_total)  # no cost model


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 40), st.integers(0, 300), st.integers(1, 70))
def test_thinning_keeps_evenly_spaced_steps_and_exact_counts(limit, count, first):
    seen = list(made(count))
    trace = recorded(seen, limit, first)
    found = trace.tensors()
    steps = range(first, first + count)
    kept = [step for step in steps if (step - 1) % trace.stride == 0]
    assert found["step"].tolist() == kept
    assert len(trace) == len(kept) <= limit
    assert trace.stride & (trace.stride - 1) == 0
    if trace.stride > 1:  # no more is thrown away than must be
        assert sum((step - 1) % (trace.stride // 2) == 0 for step in steps) > limit
    assert all(len(table) <= limit for table in trace._tables())
    rows = [seen[step - first] for step in kept]
    for key, of in (("active", "active"), ("probabilities", "drawn"), ("norms", "norms")):
        assert all(torch.equal(a, getattr(b, of).to(a.dtype)) for a, b in zip(found[key], rows, strict=True))
    assert found["loss"].tolist() == [float(torch.tensor(slsam.loss)) for slsam in rows]
    assert found["activity"].tolist() == torch.stack([torch.zeros(ARMS), *(s.active for s in seen)]).sum(0).tolist()
    assert trace.cost_total == sum(slsam.metrics["cost"] for slsam in seen)
    assert (trace.steps, trace.last) == (count, steps[-1] if count else 0)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 30), st.integers(1, 200), st.floats(0, 1))
def test_going_on_from_what_was_saved_is_never_having_stopped(limit, count, at):
    seen = list(made(count))
    cut = int(at * count)
    first = recorded(seen[:cut], limit)
    parted = Trace.restored(first.tensors(), first.plain())
    for step, slsam in enumerate(seen[cut:], cut + 1):
        parted.record(step, slsam)
    assert_same(parted, recorded(seen, limit))
    assert len(first) == len(first.tensors()["step"])  # the saved copy is its own


def test_a_long_run_of_many_arms_stays_small():
    assert Trace(["a"], [0]).limit == MOST_ROWS
    many = Trace([str(i) for i in range(10_000)], [None] * 10_000)
    assert many.limit * 10_000 <= MOST_CELLS
    assert Trace([str(i) for i in range(3_000_000)], [None] * 3_000_000).limit == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("norms", torch.zeros(3, ARMS + 1)),
        ("loss", torch.zeros(2)),
        ("step", torch.zeros(3)),
        ("activity", torch.zeros(ARMS)),
        ("active", torch.zeros(3, ARMS)),
    ],
)
def test_what_does_not_fit_is_refused(key, value):
    trace = recorded(made(3))
    with pytest.raises(ValueError, match="is "):
        Trace.restored({**trace.tensors(), key: value}, trace.plain())
    with pytest.raises(KeyError):
        Trace.restored({k: v for k, v in trace.tensors().items() if k != key}, trace.plain())
