"""Lets passes leave no trace in a trainer's metrics, and make none of their host synchronisations."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from trl import KTOTrainer

_COUNTERS = ("_metrics", "_total_train_tokens", "_stored_metrics")
_GATHERING = ("gather_for_metrics", "gather")


def _own(value: Any, use_gather_object: bool = False) -> Any:
    return value


def _nothing_gathered(value: Any, use_gather_object: bool = False) -> Any:
    # A zero on the host: TRL's `.item()` on what is derived from it waits for no device.
    return torch.zeros(1) if isinstance(value, torch.Tensor) else value


def _sink() -> defaultdict:
    return defaultdict(lambda: defaultdict(list))


@contextmanager
def muted(trainer: Any) -> Iterator[None]:
    """Run a loss without logging it.

    TRL's `compute_loss` appends to `_metrics`, adds to `_total_train_tokens` and synchronises with the host three
    times per call, through `accelerator.gather_for_metrics`, and for rewards through `accelerator.gather`. Inside the
    context the first two are a sink and what gathers returns zeros on the host; for `KTOTrainer` it stays, since the
    loss itself depends on what it gathers.

    Args:
        trainer (`Trainer`): A transformers or TRL trainer.
    """
    counters = {name: trainer.__dict__[name] for name in _COUNTERS if name in trainer.__dict__}
    accelerator = trainer.accelerator
    for name, value in counters.items():
        trainer.__dict__[name] = value if isinstance(value, int) else _sink()
    if not isinstance(trainer, KTOTrainer):
        accelerator.__dict__.update(dict.fromkeys(_GATHERING, _nothing_gathered))
    try:
        yield
    finally:
        for name in _GATHERING:
            accelerator.__dict__.pop(name, None)
        trainer.__dict__.update(counters)


@contextmanager
def forward_only(trainer: Any) -> Iterator[None]:
    """Run `training_step` without its backward: no graph, and `accelerator.backward` does nothing.

    Nor does it exchange anything: whether such a pass runs can differ between ranks.
    """
    instead = {"backward": lambda loss, **kwargs: None, "gather": _own, "gather_for_metrics": _own}
    methods = trainer.accelerator.__dict__
    own = {name: methods[name] for name in instead if name in methods}
    methods.update(instead)
    try:
        with torch.no_grad():
            yield
    finally:
        for name in instead:
            methods.pop(name, None)
        methods.update(own)
