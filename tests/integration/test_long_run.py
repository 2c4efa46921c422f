"""Five thousand steps: nothing grows, nothing is left over, and the last step costs what the fiftieth did."""

import gc
import statistics
import time

import psutil
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from slsam_peft import SLSAM, SLSAMConfig, arms_of
from tests.decoders import batch, closures, decoder
from tests.tolerances import SUM
from tests.watch import hooks

pytestmark = pytest.mark.slow

STEPS, FIRST, WARM, WINDOW = 5_000, 50, 500, 60
# Of the process over 4,500 steps, below 3 KiB per step. It is flat but for steps of 2 to 4 MiB, the same in each
# run, where a kind of active set comes for the first time: two or three of them after the warm-up.
GROWTH_BYTES = 12 * 2**20

PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
FEW = 0.01  # of all operations: the projection takes as many steps as the probabilities need

SETTINGS = {
    "exact": {"design": "depth", "active_fraction": 0.5},
    "remembered": {"design": "window", "active_fraction": 0.5, "ascent": "remembered"},
}


class Operations(TorchDispatchMode):
    """Counts what reaches the device: all operations, and products of matrices."""

    def __init__(self):
        super().__init__()
        self.all = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.all += 1
        self.products += func in PRODUCTS
        return func(*args, **(kwargs or {}))


def live_tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())  # isinstance would run properties


@pytest.mark.parametrize("name", SETTINGS)
def test_the_last_step_is_like_the_fiftieth(name, record_property):
    model = decoder("llama", dropout=0.1, checkpointing=False, dtype=torch.float32)
    slsam = SLSAM(arms_of(model, "block"), SLSAMConfig(**SETTINGS[name]))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-5)
    closure, forward_only = closures(model, batch())
    before, process = hooks(model), psutil.Process()
    early, late, seconds = {}, {}, []

    def step():
        slsam.update(closure, forward_only=forward_only)
        optimizer.step()
        optimizer.zero_grad()

    for number in range(1, STEPS + 1):
        start = time.perf_counter()
        if not (FIRST < number <= FIRST + WINDOW or number > STEPS - WINDOW):
            step()
        else:
            with Operations() as operations:
                step()
            where = early if number <= WARM else late
            where[tuple(slsam.active.tolist())] = operations
        seconds.append(time.perf_counter() - start)
        if number == WARM:
            tensors, resident = live_tensors(), process.memory_info().rss
    assert slsam.steps == STEPS
    assert slsam.skipped == 0
    assert late.keys() & early.keys()
    for active in late.keys() & early.keys():
        assert late[active].products == early[active].products > 0, active
        assert late[active].all == pytest.approx(early[active].all, rel=FEW), active
    assert live_tensors() <= tensors
    assert process.memory_info().rss - resident < GROWTH_BYTES
    assert hooks(model) == before
    assert float(slsam.probabilities.sum()) == pytest.approx(slsam.sampler.bandit.mean * len(slsam.arms), abs=SUM)
    first, last = statistics.median(seconds[WARM:1000]), statistics.median(seconds[-500 - WINDOW : -WINDOW])
    record_property("milliseconds per step, first and last", (1e3 * first, 1e3 * last))
