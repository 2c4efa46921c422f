"""Keeps what reads the gradient of every parameter from those that have none: what was not drawn stays as it was.

An arm that is not trained in a step has no gradient, and in a skipped step no arm has one. PyTorch's optimizers pass
over such parameters. Two things in PEFT multiply by `.grad` without a look, and are found here by what they hold:

- AdaLoRA's rank allocator, whose importance of a parameter is a running mean of |w * grad|: where there is no
  gradient it stays what it was, so it is a mean over the steps that trained the parameter;
- the LoRA-FA optimizer (arXiv 2308.03303), which goes through pairs of factors: a pair whose B has no gradient is left
  out of the step, moments and weight decay included.
"""

import logging
from collections.abc import Collection, Iterator
from itertools import pairwise
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

logger = logging.getLogger(__name__)

_UPDATE = "update_ipt"
_IMPORTANCES = ("ipt", "exp_avg_ipt", "exp_avg_unc")

_hidden: WeakKeyDictionary[torch.optim.Optimizer, list[list[str]]] = WeakKeyDictionary()
_hooks: list[Any] = []


class _WithGradients:
    """The parameters of a model that have a gradient, for what asks for nothing else of it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self._model.named_parameters() if p.grad is not None)


def rank_allocators(model: nn.Module) -> list[Any]:
    """Return AdaLoRA's rank allocators in a model, found by what they do.

    Args:
        model (`nn.Module`): The model.
    """
    found = (vars(module).get("rankallocator") for module in model.modules())
    return [allocator for allocator in found if hasattr(allocator, _UPDATE)]


def keep_importance(allocators: Collection[Any], *, always_trained: bool = True) -> None:
    """Let rank allocators keep the importance of parameters that have no gradient.

    Args:
        allocators (`Collection`): From `rank_allocators`; those that do so already are left alone.
        always_trained (`bool`, *optional*, defaults to `True`): Whether each arm has a gradient in each step;
            else what follows is told.
    """
    for allocator in allocators:
        if getattr(vars(allocator).get(_UPDATE), "__func__", None) is not _update_ipt:
            # A bound method, not a closure: a copy of the model must not write into this one's allocator.
            setattr(allocator, _UPDATE, MethodType(_update_ipt, allocator))
    if allocators and not always_trained:
        logger.warning(
            "AdaLoRA ranks parameters by their gradients, and an arm that is not drawn has none: its importance stays "
            "what it was when it was last trained. With descent='all' each arm has a gradient in each step."
        )


def _update_ipt(allocator: Any, model: nn.Module) -> None:
    type(allocator).update_ipt(allocator, _WithGradients(model))
    # The ranking needs an entry for each; those that never had a gradient have shown no importance.
    for name, parameter in model.named_parameters():
        if "lora_" in name and allocator.adapter_name in name:
            for kept in _IMPORTANCES:
                getattr(allocator, kept).setdefault(name, torch.zeros_like(parameter))


_update_ipt.__name__ = _UPDATE  # a pickled bound method is found again by its name


def pass_over_absent_pairs() -> None:
    """Let LoRA-FA optimizers pass over pairs without a gradient; once for the process, no other optimizer is changed.

    An optimizer is not known where gradients are made, so this is a hook on all of them.
    """
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_hide_absent_pairs))
        _hooks.append(register_optimizer_step_post_hook(_show_all_pairs))


def _hide_absent_pairs(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Take the names away by which a LoRA-FA optimizer knows the factors of a pair; what has none it passes over."""
    _show_all_pairs(optimizer, args, kwargs)  # a step that raised has left them hidden
    if not all("scaling_factors" in group and "names" in group for group in optimizer.param_groups):
        return
    _hidden[optimizer] = [group["names"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        names = list(group["names"])
        for (i, first), (j, second) in pairwise(enumerate(group["names"])):
            absent = group["params"][i].grad is None and group["params"][j].grad is None
            if absent and second == _partner(first):
                names[i] = names[j] = ""
        group["names"] = names


def _partner(name: str) -> str | None:
    """Return the name of the factor B that belongs to a factor A; `None` for what is none."""
    return next((name.replace(a, a[:-1] + "B") for a in ("lora_A", "lora_embedding_A") if a in name), None)


def _show_all_pairs(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for group, names in zip(optimizer.param_groups, _hidden.pop(optimizer, ()), strict=False):
        group["names"] = names
