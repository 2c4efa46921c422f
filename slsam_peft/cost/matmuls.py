"""Finds the matrix multiplications of a decoder in its modules, without running it.

A block is read as attention followed by a feed-forward part: the linear modules of the attention but its last one read
the block's input, the last one reads the attention's output; of the other linear modules those that lead back to the
model's width come last. Adapters are the further linear modules of whatever wraps a `base_layer`. Works on the meta
device and on quantised weights, since only the features of a module are read, never its weight.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from slsam_peft.algorithm.blocks import block_stacks

# Position of a linear module in its block, in order of computation.
BLOCK_INPUT, ATTENTION_OUTPUT, FEED_FORWARD_INPUT, FEED_FORWARD_OUTPUT = range(4)

_ROLES = {"q": ("q_proj", "query"), "k": ("k_proj", "key"), "v": ("v_proj", "value")}


@dataclass(frozen=True)
class Matmul:
    """One linear map of `features = in_features * out_features` multiply-adds per token.

    Args:
        name (`str`): Name of the module.
        features (`float`): Multiply-adds per token; for a mixture of experts, those of the experts a token visits.
        trainable (`frozenset[str]`): Names of its parameters that require a gradient.
        reads_input (`bool`, *optional*, defaults to `True`): Whether an adapter's factor reads the input of the module
            it adapts (LoRA's A) or the output of another factor (LoRA's B).
    """

    name: str
    features: float
    trainable: frozenset[str]
    reads_input: bool = True


@dataclass(frozen=True)
class AdaptedLinear:
    """A linear module of a block with the factors of its active adapters.

    Args:
        base (`Matmul`): The module itself.
        factors (`tuple[Matmul, ...]`): The adapters' linear factors, in order of computation.
        stage (`int`): `BLOCK_INPUT`, `ATTENTION_OUTPUT`, `FEED_FORWARD_INPUT` or `FEED_FORWARD_OUTPUT`.
        in_features (`int`): Width of its input.
        out_features (`int`): Width of its output.
        trainable (`frozenset[str]`): Names of its and its adapters' trainable parameters, vectors included.
        stage (`int`): `BLOCK_INPUT`, `ATTENTION_OUTPUT`, `FEED_FORWARD_INPUT` or `FEED_FORWARD_OUTPUT`.
        role (`str`): `"q"`, `"k"`, `"v"` where the attention has one module for each, otherwise `"qkv"`.
        experts (`bool`): Whether a router spreads the tokens over several of its kind.
    """

    base: Matmul
    factors: tuple[Matmul, ...]
    in_features: int
    out_features: int
    trainable: frozenset[str]
    stage: int = BLOCK_INPUT
    role: str = "qkv"
    experts: bool = False


@dataclass(frozen=True)
class Block:
    """The matmuls of one block.

    Args:
        linears (`tuple[AdaptedLinear, ...]`): Ordered by stage.
        attention (`float`): Heads times head width: multiply-adds of one score, and of its use, per pair of tokens.
        other_trainable (`frozenset[str]`): Trainable parameters that belong to no linear module (norms, vectors).
        parallel (`bool`): Whether the feed-forward part reads the block's input, beside the attention.
        tail (`bool`): Whether something that keeps its input for the backward pass (a norm, dropout) follows the last
            matmul, so that a checkpointed block is recomputed to its end.
    """

    linears: tuple[AdaptedLinear, ...]
    attention: float
    other_trainable: frozenset[str]
    parallel: bool
    tail: bool

    @cached_property
    def trainable(self) -> frozenset[str]:
        """Names of all trainable parameters."""
        return self.other_trainable.union(*(linear.trainable for linear in self.linears))


@dataclass(frozen=True)
class Decoder:
    """The matmuls of a causal language model.

    Args:
        blocks (`tuple[Block, ...]`): In depth order.
        block_names (`tuple[str, ...]`): Their module names.
        head (`float`): Multiply-adds of the language-model head per scored position.
        head_trainable (`frozenset[str]`): Names of the head's trainable parameters.
        below_trainable (`frozenset[str]`): Names of trainable parameters outside the blocks and the head.
    """

    blocks: tuple[Block, ...]
    block_names: tuple[str, ...]
    head: float
    head_trainable: frozenset[str]
    below_trainable: frozenset[str]


def features_of(module: nn.Module) -> tuple[int, int] | None:
    """Return `(in_features, out_features)` of a linear module, quantised or GPT-2's `Conv1D` included, else `None`."""
    for names in (("in_features", "out_features"), ("nx", "nf")):
        read, written = (getattr(module, name, None) for name in names)
        if isinstance(read, int) and isinstance(written, int):
            return read, written
    return None


def head_of(model: Any) -> nn.Module | None:
    """Return the language-model head of a transformers model, or `None`."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _largest_stack(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the names and modules of the blocks in the stack with the most parameters."""
    stacks = list(block_stacks(model))
    if not stacks:
        raise ValueError(
            f"{type(model).__name__} has no stack of transformer blocks (an nn.ModuleList of composite modules), so "
            "its cost cannot be predicted; leave cost_budget unset."
        )
    path, stack = max(stacks, key=lambda named: sum(p.numel() for p in named[1].parameters()))
    return [(f"{path}.{i}" if path else str(i), block) for i, block in enumerate(stack)]


def decoder_of(model: nn.Module, blocks: Sequence[nn.Module] | None = None) -> Decoder:
    """Read the matmuls of `model`.

    Args:
        model (`nn.Module`): A causal language model from transformers, with or without PEFT adapters.
        blocks (`Sequence[nn.Module]`, *optional*): Its blocks, where they are known already.

    Raises:
        ValueError: no stack of blocks is found.
    """
    if blocks:
        names = {id(module): name for name, module in model.named_modules()}
        named_blocks = [(names[id(block)], block) for block in blocks]
    else:
        named_blocks = _largest_stack(model)
    config = _text_config(model)
    head = head_of(model)
    owned = {id(p) for _, block in named_blocks for p in block.parameters()}
    outside = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in owned}
    head_ids = {id(p) for p in head.parameters()} if head is not None else set()
    # A head tied to the embedding is used below the blocks as well.
    for embedding in (m for m in model.modules() if isinstance(m, nn.Embedding)):
        head_ids -= {id(p) for p in embedding.parameters()}
    return Decoder(
        blocks=tuple(_block(name, block, config) for name, block in named_blocks),
        block_names=tuple(name for name, _ in named_blocks),
        head=float(math.prod(features_of(head) or (0,))) if head is not None else 0.0,
        head_trainable=frozenset(name for name, p in outside.items() if id(p) in head_ids),
        below_trainable=frozenset(name for name, p in outside.items() if id(p) not in head_ids),
    )


def _text_config(model: Any) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _block(name: str, block: nn.Module, config: Any) -> Block:
    found = list(_adapted(name, block, config))
    attention = next((m for m in block.children() if _is_attention(m)), None)
    inside = {id(m) for m in attention.modules()} if attention is not None else set()
    in_attention = [linear for module, linear in found if id(module) in inside]
    feed_forward = [linear for module, linear in found if id(module) not in inside]
    width = _width(found, config)
    linears = _attention_stages(in_attention, width) + _feed_forward_stages(feed_forward, width)
    in_linears = frozenset().union(*(linear.trainable for linear in linears))
    return Block(
        linears=tuple(linears),
        attention=float(sum(x.in_features for x in linears if x.stage == ATTENTION_OUTPUT)),
        other_trainable=_trainable(name, block) - in_linears,
        parallel=_is_parallel(block),
        tail=_has_tail(block) or any(x.experts for x in linears),
    )


def _adapted(prefix: str, block: nn.Module, config: Any) -> Iterator[tuple[nn.Module, AdaptedLinear]]:
    """Yield the block's linear modules, adapters folded into the module they adapt."""
    # The configuration tells how many experts there are, and how many a token visits.
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    visited = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None)
    seen: set[int] = set()
    for name, module in block.named_modules(prefix=prefix):
        if id(module) in seen:
            continue
        # A module that adapts another has the other's shape, and must adapt a linear one.
        base = getattr(module, "base_layer", None)
        shape = features_of(base if isinstance(base, nn.Module) else module)
        if isinstance(base, nn.Module) and features_of(_innermost(base)) is None:
            raise ValueError(
                f"the adapter on {name!r} adapts no linear module (mixture-of-experts weights, for example), so its "
                "cost cannot be predicted; leave cost_budget unset, or let target_modules name linear modules."
            )
        # What is not linear may hold the experts' weights, all in one tensor.
        if shape is None:
            for key, p in module.named_parameters(prefix=name, recurse=False):
                if experts and visited and p.ndim == 3 and p.shape[0] == experts:
                    weight = frozenset({key} if p.requires_grad else ())
                    matmul = Matmul(key, float(p.shape[1] * p.shape[2] * visited), weight)
                    yield module, AdaptedLinear(matmul, (), p.shape[2], p.shape[1], weight, experts=True)
            continue
        # A linear module counts once, together with its adapter's factors.
        seen.update(id(m) for m in module.modules())
        factors, inner, inner_name = (), module, name
        if isinstance(base, nn.Module):
            factors, inner, inner_name = tuple(_factors(name, module, base, shape[0])), base, f"{name}.base_layer"
        matmul = Matmul(name, float(shape[0] * shape[1]), _trainable(inner_name, inner))
        yield module, AdaptedLinear(matmul, factors, *shape, _trainable(name, module))


def _innermost(base: nn.Module) -> nn.Module:
    while isinstance(inner := getattr(base, "base_layer", None), nn.Module):
        base = inner
    return base


def _factors(name: str, wrapper: nn.Module, base: nn.Module, width: int) -> Iterator[Matmul]:
    inside_base = {id(m) for m in base.modules()}
    active = set(getattr(wrapper, "active_adapters", None) or ())
    for key, module in wrapper.named_modules(prefix=name):
        shape = features_of(module)
        if module is wrapper or id(module) in inside_base or shape is None:
            continue
        # PEFT keeps one entry per adapter in module dictionaries; only the active adapters run.
        if active and key.rpartition(".")[2] not in active:
            continue
        yield Matmul(key, float(shape[0] * shape[1]), _trainable(key, module), reads_input=shape[0] == width)


def _trainable(name: str, module: nn.Module) -> frozenset[str]:
    return frozenset(key for key, p in module.named_parameters(prefix=name) if p.requires_grad)


def _is_attention(module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower() and any(features_of(m) for m in module.modules())


def _attention_stages(linears: list[AdaptedLinear], width: int) -> list[AdaptedLinear]:
    output = [x for x in linears if x.out_features == width][-1:] or linears[-1:]
    inputs = [x for x in linears if x not in output]
    roles = [next((r for r, ends in _ROLES.items() if x.base.name.endswith(ends)), "qkv") for x in inputs]
    if sorted(roles) != ["k", "q", "v"]:
        roles = ["qkv"] * len(roles)
    placed = [replace(x, stage=BLOCK_INPUT, role=role) for x, role in zip(inputs, roles, strict=True)]
    return placed + [replace(x, stage=ATTENTION_OUTPUT) for x in output]


def _feed_forward_stages(linears: list[AdaptedLinear], width: int) -> list[AdaptedLinear]:
    back = [x for x in linears if x.out_features == width and x.in_features != width] or linears[-1:]
    into = [x for x in linears if x not in back]
    return [replace(x, stage=FEED_FORWARD_INPUT) for x in into] + [replace(x, stage=FEED_FORWARD_OUTPUT) for x in back]


def _width(found: list[tuple[nn.Module, AdaptedLinear]], config: Any) -> int:
    width = getattr(config, "hidden_size", None)
    return width if isinstance(width, int) else (found[0][1].in_features if found else 0)


def _is_parallel(block: nn.Module) -> bool:
    flag = getattr(block, "use_parallel_residual", None)
    if flag is not None:
        return bool(flag)
    norms = [m for m in block.children() if "norm" in type(m).__name__.lower()]
    return len(norms) == 1


def _has_tail(block: nn.Module) -> bool:
    children = [name for name, m in block.named_children() if "norm" in type(m).__name__.lower()]
    if any(name.startswith("post_") and ("feedforward" in name or "mlp" in name) for name in children):
        return True
    if getattr(block, "do_layer_norm_before", True) is False:
        return True
    functional = getattr(block, "dropout", 0.0)
    if isinstance(functional, int | float) and functional > 0:
        return True
    adapters = {id(m) for w in block.modules() if hasattr(w, "base_layer") for m in w.modules()}
    dropouts = [m for m in block.modules() if isinstance(m, nn.Dropout) and id(m) not in adapters]
    return bool(dropouts) and dropouts[-1].p > 0
