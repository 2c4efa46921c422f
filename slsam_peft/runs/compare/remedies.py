"""Carries out the baselines of a run: what they change in the arguments, the trainer, training and the end of it."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerCallback
from trl import SFTTrainer

from slsam_peft.data.scoring import Tokens, row_losses, score
from slsam_peft.runs.compare.baselines import Baseline

EMA_DECAY = 0.95  # a memory of 20 steps, where runs have about a hundred
LOOKS = 8  # at the validation split
SCALES = (0.3, 0.5, 0.7, 0.85, 1.0)  # of B A


def arguments_for(baseline: Baseline) -> dict[str, Any]:
    """Return the arguments of `SFTConfig` that a baseline sets."""
    arguments: dict[str, Any] = {}
    if baseline.neftune_noise_alpha is not None:
        arguments["neftune_noise_alpha"] = float(baseline.neftune_noise_alpha)
    if baseline.label_smoothing is not None:
        arguments |= {"label_smoothing_factor": baseline.label_smoothing, "loss_type": "nll"}
    if baseline.dft:
        arguments["loss_type"] = "dft"
    return arguments


def apply(
    baseline: Baseline, trainer: SFTTrainer, validation: Sequence[Tokens], rows: Sequence[Tokens], order: list[int]
) -> None:
    """Change a trainer as a baseline asks for.

    Args:
        baseline (`Baseline`): What to change.
        trainer (`SFTTrainer`): Built, not trained yet; the rows of its data set are in the run's order.
        validation (`Sequence[Tokens]`): Rows to stop by.
        rows (`Sequence[Tokens]`): Training rows, each once.
        order (`list[int]`): Which of them each row of the trainer's data set is.
    """
    if baseline.loraplus_ratio is not None:
        trainer.optimizer = _loraplus(trainer, baseline.loraplus_ratio)
    if baseline.average is not None:
        decay = None if baseline.average == "mean" else baseline.ema_decay or EMA_DECAY
        trainer.add_callback(_Average(decay))
    if baseline.stop_on_validation:
        trainer.add_callback(_KeepBest(validation))
    if baseline.trim is not None:
        trainer.train_dataset = _Trimmed(trainer.train_dataset, order, trainer.args.seed)
        trainer.add_callback(_Trim(trainer.train_dataset, rows, baseline.trim))


def scale_adapter(model: nn.Module, validation: Sequence[Tokens]) -> float:
    """Scale an adapter's product B A by the factor that is best on validation rows, and return it."""
    layers: list[Any] = [module for module in model.modules() if isinstance(getattr(module, "scaling", None), dict)]
    whole = [dict(layer.scaling) for layer in layers]

    def scale(factor: float) -> None:
        for layer, scaling in zip(layers, whole, strict=True):
            layer.scaling.update({name: factor * value for name, value in scaling.items()})

    def loss(factor: float) -> float:
        scale(factor)
        return score(model, validation).loss

    best = min(SCALES, key=loss)
    scale(best)
    return best


def _loraplus(trainer: SFTTrainer, ratio: float) -> Any:
    from peft.optimizers import create_loraplus_optimizer

    model: Any = trainer.model
    optimizer, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
    return create_loraplus_optimizer(
        model=model,
        optimizer_cls=optimizer,
        loraplus_lr_ratio=float(ratio),
        loraplus_weight_decay=trainer.args.weight_decay,
        **options,
    )


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class _Average(TrainerCallback):
    """Leaves the average of the trained weights over steps behind: an exponential one, or that of the last half."""

    def __init__(self, decay: float | None) -> None:
        self.decay = decay
        self.count = 0
        self.average: list[torch.Tensor] = []

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        weights = _trained(model)
        if self.decay is None and 2 * state.global_step <= state.max_steps:
            return
        self.count += 1
        if self.count == 1:
            self.average = [w.detach().clone() for w in weights]
            return
        share = 1 / self.count if self.decay is None else 1 - self.decay
        torch._foreach_lerp_(self.average, [w.detach() for w in weights], share)

    @torch.no_grad()
    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        torch._foreach_copy_([w.detach() for w in _trained(model)], self.average)


class _KeepBest(TrainerCallback):
    """Leaves those of the trained weights behind that were best on validation rows."""

    def __init__(self, validation: Sequence[Tokens]) -> None:
        self.validation = validation
        self.best = float("inf")
        self.weights: list[torch.Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step * LOOKS // state.max_steps == (state.global_step - 1) * LOOKS // state.max_steps:
            return
        loss = score(model, self.validation).loss
        if loss < self.best:
            self.best = loss
            self.weights = [w.detach().clone() for w in _trained(model)]

    @torch.no_grad()
    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.weights:  # none where no loss was finite
            torch._foreach_copy_([w.detach() for w in _trained(model)], self.weights)


class _Trimmed(Dataset):
    """A data set whose order may change while it is read. The loader reads one batch ahead."""

    def __init__(self, rows: Any, order: Sequence[int], seed: int) -> None:
        self.rows = rows
        self.first = {row: position for position, row in reversed(list(enumerate(order)))}
        self.order = list(order)
        self.seed = seed

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> Any:
        return self.rows[self.first[self.order[position]]]

    def keep(self, kept: Sequence[int], start: int) -> None:
        """Replace the order from a position on: shuffled passes over the kept rows alone."""
        shuffler = random.Random(self.seed)
        rest: list[int] = []
        while len(rest) < len(self.order) - start:
            rest += shuffler.sample(list(kept), len(kept))
        self.order[start:] = rest[: len(self.order) - start]


class _Trim(TrainerCallback):
    """Leaves the rows of the largest loss out once each was seen."""

    def __init__(self, data: _Trimmed, rows: Sequence[Tokens], share: float) -> None:
        self.data, self.rows, self.share = data, rows, share
        self.done = False

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        position = state.global_step * args.per_device_train_batch_size
        if self.done or position < len(self.rows):
            return
        self.done = True
        losses = row_losses(model, self.rows)
        kept = sorted(range(len(self.rows)), key=losses.__getitem__)[: round((1 - self.share) * len(self.rows))]
        self.data.keep(sorted(kept), position)
