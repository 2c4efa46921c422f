"""Finds where the transformer blocks of a model are, by structure and never by name."""

from collections.abc import Iterator

from torch import nn

_ADAPTED = ("base_layer", "original_module")  # PEFT's names of what it adapts or keeps a copy of


def block_stacks(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield the outermost stacks of blocks, each an `nn.ModuleList` of composite modules, with their names.

    Args:
        module (`nn.Module`): The model.
        path (`str`, *optional*, defaults to `""`): Name of `module` itself.
    """
    if isinstance(module, nn.ModuleList) and len(module) and all(_is_composite(block) for block in module):
        yield path, module
        return
    for name, child in module.named_children():
        yield from block_stacks(child, f"{path}.{name}" if path else name)


def _is_composite(module: nn.Module) -> bool:
    """Whether a module is made of others; what an adapter puts around a layer does not count."""
    while (adapted := adapted_layer(module)) is not None:
        module = adapted
    return next(module.children(), None) is not None


def adapted_layer(module: nn.Module) -> nn.Module | None:
    """Return what PEFT has put a module around, `None` where it is nothing of the kind."""
    return next((inner for name in _ADAPTED if (inner := module._modules.get(name)) is not None), None)
