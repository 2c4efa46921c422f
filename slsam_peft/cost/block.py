"""Counts one block's FLOPs, per token and per pair: forward, and backward with the checkpoint's second forward."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from slsam_peft.cost.matmuls import BLOCK_INPUT, FEED_FORWARD_INPUT, AdaptedLinear, Block

Shapes = Sequence[tuple[int, int]]
NONE: frozenset[str] = frozenset()


class Size(NamedTuple):
    """What a set of micro-batches holds: `tokens`, `pairs` of tokens (batch x length squared), `scored` positions."""

    tokens: int = 0
    pairs: int = 0
    scored: int = 0

    @classmethod
    def of(cls, shapes: Shapes) -> "Size":
        """Add up micro-batches of shape `(batch, length)`; the last position of a sequence predicts nothing."""
        return cls(
            sum(b * t for b, t in shapes), sum(b * t * t for b, t in shapes), sum(b * (t - 1) for b, t in shapes)
        )

    def minus(self, other: "Size") -> "Size":
        """Return what is left without `other`."""
        return Size(self.tokens - other.tokens, self.pairs - other.pairs, self.scored - other.scored)


class Work(NamedTuple):
    """FLOPs per token and per pair of tokens."""

    token: float = 0.0
    pair: float = 0.0

    def on(self, size: Size) -> float:
        """FLOPs on micro-batches of `size`."""
        return self.token * size.tokens + self.pair * size.pairs

    def plus(self, other: "Work") -> "Work":
        """Return the sum."""
        return Work(self.token + other.token, self.pair + other.pair)

    def minus(self, other: "Work") -> "Work":
        """Return the difference."""
        return Work(self.token - other.token, self.pair - other.pair)


class BlockCost(NamedTuple):
    """What a block costs: its `forward` pass, and its backward pass with the checkpoint's second forward, `back`."""

    forward: Work
    back: Work


def cost_of_block(
    block: Block,
    active: frozenset[str],
    input_grad: bool,
    stacked: frozenset[str] = NONE,
    wanted: frozenset[str] = NONE,
    checkpointing: bool = True,
    early_stop: bool = True,
) -> BlockCost:
    """Count the passes of one block.

    Args:
        block (`Block`): The block.
        active (`frozenset[str]`): Names of its parameters that require a gradient.
        input_grad (`bool`): Whether its input requires one.
        stacked (`frozenset[str]`, *optional*): Names of factors of pairs that hold two weights side by side, for
            tokens at w + e and at w.
        wanted (`frozenset[str]`, *optional*): Names of factors whose gradient is wanted of both kinds of tokens apart.
        checkpointing (`bool`, *optional*, defaults to `True`): Whether its forward runs again in the backward pass.
        early_stop (`bool`, *optional*, defaults to `True`): Whether that second forward stops once every tensor the
            backward pass needs is there, as torch's non-reentrant checkpoint does.
    """
    forward = sum(_forward(linear, stacked) for linear in block.linears)
    pair = 4 * block.attention
    at_input = input_grad or bool(block.other_trainable & active)
    back, grads, roles = 0.0, at_input, set()
    stage, stage_grad = BLOCK_INPUT, at_input
    for linear in block.linears:
        if linear.stage != stage:
            stage = linear.stage
            stage_grad = at_input if block.parallel and stage == FEED_FORWARD_INPUT else grads
        back += _backward(linear, stage_grad, active, stacked, wanted)
        if stage_grad or linear.trainable & active:
            grads = True
            if stage == BLOCK_INPUT:
                roles.add(linear.role)
    if not grads:
        return BlockCost(Work(forward, pair), Work())
    backward = Work(back, _attention_backward(roles) * block.attention)
    if checkpointing:
        backward = backward.plus(Work(forward - (_after_last_saved(block, stacked) if early_stop else 0.0), pair))
    return BlockCost(Work(forward, pair), backward)


def _width(linear: AdaptedLinear, stacked: frozenset[str]) -> int:
    """Return how many weights a module's factors hold."""
    return 2 if linear.trainable & stacked else 1


def _forward(linear: AdaptedLinear, stacked: frozenset[str]) -> float:
    factors = sum(2 * factor.features for factor in linear.factors)
    return 2 * linear.base.features + _width(linear, stacked) * factors


def _backward(
    linear: AdaptedLinear,
    input_grad: bool,
    active: frozenset[str],
    stacked: frozenset[str],
    wanted: frozenset[str],
) -> float:
    """FLOPs of a linear module's backward pass: input gradients where something below needs them, weight gradients."""
    cost = 2 * linear.base.features * (input_grad + bool(linear.base.trainable & active))
    reached = input_grad
    for factor in linear.factors:
        needs = input_grad if factor.reads_input else reached
        trained = bool(factor.trainable & active)
        width = _width(linear, stacked)
        apart = 2 if factor.trainable & wanted else width
        cost += 2 * factor.features * (width * needs + apart * trained)
        reached = needs or trained
    return cost


def _attention_backward(roles: Collection[str]) -> float:
    """FLOPs per pair and unit of attention width: gradients of the values, the probabilities, queries and keys."""
    if not roles:
        return 0.0
    whole = "qkv" in roles
    query, key, value = (whole or role in roles for role in "qkv")
    return 2.0 * (value + (query or key) + query + key)


def _after_last_saved(block: Block, stacked: frozenset[str]) -> float:
    """FLOPs that a checkpoint's second forward leaves out: the last matmul, whose operands are saved before it."""
    if block.tail or not block.linears:
        return 0.0
    last = block.linears[-1]
    return 2 * _width(last, stacked) * last.factors[-1].features if last.factors else 2 * last.base.features
