"""How the second pass of a step skips the blocks below the cut.

A block's `forward` is shadowed on the instance only while a pass that skips it runs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from slsam_peft.algorithm.cut_pass import Cursor, CutPass
from slsam_peft.algorithm.outputs import hidden_of, joined, mapped


@contextmanager
def skipped(block: nn.Module, cursor: Cursor, run: CutPass, *, last: bool) -> Iterator[None]:
    """Let a block, inside the context, pass the hidden state on without computing.

    Args:
        block (`nn.Module`): The block.
        cursor (`Cursor`): The hidden states that the first pass kept.
        run (`CutPass`): The pass that starts from them.
        last (`bool`): Whether it is the last block that is skipped: it returns the kept hidden state.
    """

    def left(module: nn.Module, args: tuple, output: Any) -> None:
        cursor.leave_block(last=last)

    with _shadowed_forward(block, _skipping(block, cursor, run, last=last)):
        hook = block.register_forward_hook(left)
        try:
            yield
        finally:
            hook.remove()


def _skipping(block: nn.Module, cursor: Cursor, run: CutPass, *, last: bool) -> Callable[..., Any]:
    """Return a stand-in for `block.forward` that passes the hidden state on, the kept one from the last such block."""
    original = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        cached = cursor.current
        if cached is None or cached.hidden is None:
            return original(*args, **kwargs)
        if not last:
            return joined(hidden_of(args, kwargs), mapped(cached.tail, lambda tensor: None))

        def leaf(kept: torch.Tensor) -> torch.Tensor:
            if not (run.sparse and id(kept) in cached.sources and torch.is_grad_enabled()):
                return kept.detach()
            given = cursor.leaf(cached.sources[id(kept)], kept)
            run.leaves.append(given)
            return given

        return joined(leaf(cached.hidden), mapped(cached.tail, leaf))

    return forward


@contextmanager
def _shadowed_forward(block: nn.Module, forward: Any) -> Iterator[None]:
    had_own = "forward" in block.__dict__  # accelerate's device hooks put one there
    own = block.__dict__.get("forward")
    block.__dict__["forward"] = forward
    try:
        yield
    finally:
        if had_own:
            block.__dict__["forward"] = own
        else:
            del block.__dict__["forward"]
