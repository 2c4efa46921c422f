"""Averages over ranks what a step's decisions rest on, so that every rank decides alike."""

from collections.abc import Callable

import torch

from slsam_peft.algorithm.passes import PassRunner
from slsam_peft.algorithm.shards import is_sharded
from slsam_peft.algorithm.step import Step, quotient

TINY = 1e-9  # in the place of a share of no rank

Gradients = list[torch.Tensor | None]
Reduce = Callable[[list[torch.Tensor]], None]


def average_ascent(reduce: Reduce | None, runner: PassRunner, step: Step, *, part: bool) -> Gradients:
    """Average the ascent gradients of the perturbed arms over ranks.

    With them travels the number of items, as a share of what the loss is divided by.

    Args:
        reduce (callable or `None`): Averages a list of tensors over ranks, in place; `None`: there is one rank.
        runner (`PassRunner`): Holds the parameters.
        step (`Step`): The step; its `items` and `divisor` are averaged.
        part (`bool`): Whether the ascent is made by a part of the sequences, so that their number counts.

    Returns:
        `list[torch.Tensor | None]`: Each parameter's gradient; `None` where there is none.
    """
    gradients = runner.gradients()
    if reduce is None:
        return gradients
    sent = []
    if part and isinstance(step.items, torch.Tensor):
        step.items, step.divisor = quotient(step.items, step.divisor, step.items.double()), 1.0
        sent.append(step.items)
    reduce(sent + _filled(runner, step.mask, gradients))
    return gradients


def average_descent(reduce: Reduce | None, runner: PassRunner, step: Step, losses: torch.Tensor) -> Gradients:
    """Average the descent gradients of the trained arms over ranks, the losses and what rode along.

    Args:
        reduce (callable or `None`): As in `average_ascent`.
        runner (`PassRunner`): Holds the parameters.
        step (`Step`): The step; its `riding` becomes the mean over those ranks where something rode along.
        losses (`torch.Tensor`): What `Step.losses` returned; averaged in place.

    Returns:
        `list[torch.Tensor | None]`: As `average_ascent`.
    """
    gradients = runner.gradients()
    if reduce is None:
        return gradients
    sent, share = [losses], None
    if step.next_mask is not None:
        share = losses.new_full((), float(bool(step.riding)))  # of the ranks
        sent.append(share)
        for i in runner.members(step.next_mask):
            sent.append(step.riding.setdefault(i, torch.zeros_like(runner.parameters[i])))
    reduce(sent + _filled(runner, step.trained, gradients))
    if share is not None:
        step.rode_share = share
        for riding in step.riding.values():
            riding.div_(share.clamp(min=TINY).to(riding.device, riding.dtype))
    return gradients


def _filled(runner: PassRunner, arms: torch.Tensor, gradients: Gradients) -> list[torch.Tensor]:
    """Return the gradients of the arms in a mask, the same on every rank: 0 where there is none."""
    sent = []
    for i in runner.members(arms):
        if not runner.parameters[i].requires_grad:  # frozen for now: a gradient of 0 would move it
            continue
        if is_sharded(runner.parameters[i]):  # it has come averaged
            continue
        gradient = gradients[i]
        gradient = torch.zeros_like(runner.parameters[i]) if gradient is None else gradient
        gradients[i] = gradient
        sent.append(gradient)
    return sent
