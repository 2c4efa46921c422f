"""Takes apart what blocks are given and what they return, and puts it together again.

A block takes the hidden state first, or as `hidden_states`. It returns the bare hidden state, or a tuple that starts
with it; what follows (attention weights, position biases, `None`) is the tail.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

_PLAIN = (bool, int, float, str)

KEYWORD = "hidden_states"


def split(output: Any) -> tuple[torch.Tensor | None, tuple | None]:
    """Return the hidden state and its tail, `None` where there is none.

    The hidden state is `None` where the block returns anything whose tensors cannot be told: a container that it and
    others may write to, such as a cache of keys and values.
    """
    if isinstance(output, torch.Tensor):
        return output, None
    if type(output) is tuple and output and isinstance(output[0], torch.Tensor) and is_immutable(output):
        return output[0], output[1:]
    return None, None


def joined(hidden: torch.Tensor, tail: tuple | None) -> Any:
    """Undo `split`."""
    return hidden if tail is None else (hidden, *tail)


def is_immutable(value: Any) -> bool:
    """Whether nobody who holds a value can write to it, tensors left out."""
    if isinstance(value, tuple):
        return all(is_immutable(x) for x in value)
    return value is None or isinstance(value, (torch.Tensor, *_PLAIN))


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for x in value:
            yield from tensors(x)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def mapped(value: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """Return a value with `function` applied to each tensor in its nested tuples; everything else stays as it is."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if type(value) is tuple:
        return tuple(mapped(x, function) for x in value)
    return value


def hidden_of(args: tuple, kwargs: dict[str, Any]) -> Any:
    """Return what a block is given as its hidden state; `None` where it comes under another name."""
    return args[0] if args else kwargs.get(KEYWORD)


def with_hidden(hidden: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Return a block's arguments with another hidden state."""
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, KEYWORD: hidden}


def with_sides(
    function: Callable[[torch.Tensor], torch.Tensor], args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """Return a block's arguments with `function` applied to each tensor but the hidden state."""
    sides = {
        name: value if name == KEYWORD and not args else mapped(value, function) for name, value in kwargs.items()
    }
    return (*args[:1], *mapped(args[1:], function)), sides
