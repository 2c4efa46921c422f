r"""Predicts what a step costs, in matmul FLOPs, from the model's structure and the active set alone.

Counted as `torch.utils.flop_counter.FlopCounterMode` counts: a product of $m \times k$ and $k \times n$ is $2mnk$. The
attention is the eager one, all $T \times T$ scores. The head is TRL's fused one, which keeps no logits: its backward
pass computes them again before their gradient. Not counted, below 2 % together: rotary products, routers, the norms
of DoRA.

Every kind of step has one form: with $f$ the index of the lowest active block,

$$\mathrm{cost} = \mathrm{const} + \sum_{l \ge f} \mathrm{term}_l(\text{active?}, l = f),$$

so that expectations need only $P(f \le l)$ and the inclusion probabilities.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from slsam_peft.algorithm.ascents import Ascent, TwoPass
from slsam_peft.cost.block import NONE, BlockCost, Shapes, Size, cost_of_block
from slsam_peft.cost.budget import LinearCost
from slsam_peft.cost.matmuls import Decoder, decoder_of

Active = Sequence[bool] | Collection[str]


class _Parts(NamedTuple):
    """What the passes run on: everything, the part of pass 1, and the part of pass 2 that is cut."""

    total: Size
    first: Size
    reused: Size


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How a step runs.

    Args:
        ascent (`Ascent`, *optional*): Which sequences make the ascent; the algorithm's own object. Defaults to all.
        descent (`str`, *optional*, defaults to `"active"`): `"active"` or `"all"`, as in `SLSAMConfig`.
        reused (`int`, *optional*): Most micro-batches whose second pass starts at the lowest active block; 0 where the
            hidden-state cache is off. Defaults to all of them.
        recalled (`bool`, *optional*): Whether e is made of what an earlier step kept, so that this one has no ascent
            pass. Defaults to whether the ascent's are so in the long run.
        joined (`tuple[int, int]`, *optional*): `(batch, length)` of a lone micro-batch with the sequences that ride
            along in it. Defaults to the ascent's number of them, of the same length.
        wanted (`frozenset[str]`, *optional*): Names of the parameters that the next step perturbs, whose gradients of
            riding tokens are wanted. Defaults to none, which is off by less than 0.1 % of a step of an 8B model.
        uncut (`bool`, *optional*, defaults to `False`): Whether passes run whole, since they cannot be cut: their
            backpropagation goes down to the input of block 0, for checkpointing or by the very graph that stands in
            the way of a cut, and none starts above it.
    """

    ascent: Ascent = field(default_factory=TwoPass)
    descent: str = "active"
    reused: int | None = None
    recalled: bool | None = None
    joined: tuple[int, int] | None = None
    wanted: frozenset[str] = NONE
    uncut: bool = False

    def stacked(self, shapes: Shapes) -> bool:
        """Return whether sequences of the next step ride along; perturbed factors hold two weights then."""
        return len(shapes) == 1 and (self.joined is not None or self.ascent.rides)

    def doubled(self, shapes: Shapes) -> bool:
        """Return whether perturbed factors hold two weights: for riding sequences, or for a second adapter."""
        return self.stacked(shapes) or self.ascent.doubles

    def run_on(self, shapes: Shapes) -> Shapes:
        """Return the micro-batches with the sequences of the next step that ride along in them."""
        if not self.stacked(shapes):
            return shapes
        batch, length = shapes[0]
        return [self.joined or (batch + self.ascent.riding(batch), length)]

    def ascent_shapes(self, shapes: Shapes) -> Shapes:
        """Return what the ascent passes run on: for each micro-batch that has one, its sequences and their length."""
        recalled = self.ascent.rides and len(shapes) == 1 if self.recalled is None else self.recalled
        first: list[tuple[int, int]] = []
        for i, (batch, length) in enumerate([] if recalled else shapes):
            taken = self.ascent.take(i, len(shapes), batch, sum(n for n, _ in first))
            if taken:
                first.append((taken, length))
        return first

    def parts(self, shapes: Shapes) -> _Parts:
        """Split micro-batches of `(batch, length)` over the passes."""
        first, reused = self.ascent_shapes(shapes), self.reused_shapes(shapes)
        return _Parts(Size.of(self.run_on(shapes)), Size.of(first), Size.of(reused))

    def reused_shapes(self, shapes: Shapes) -> Shapes:
        """Return the micro-batches whose second pass starts at the lowest active block."""
        if self.ascent.forwards or self.uncut:  # which keep nothing
            return []
        # The hidden states of a part of a micro-batch fit no other pass.
        first = self.ascent_shapes(shapes)
        whole = [shape for shape, ran in zip(shapes, first, strict=False) if tuple(shape) == tuple(ran)]
        return whole if self.reused is None else whole[: self.reused]


TWO_PASS = Rule()


@dataclass(frozen=True)
class CostModel:
    """FLOPs of training steps of one model.

    Args:
        decoder (`Decoder`): Its matmuls.
        checkpointing (`bool`): Whether blocks are checkpointed, that is run again in the backward pass.
        reentrant (`bool`, *optional*, defaults to `False`): Whether checkpointing is the reentrant kind, which runs
            blocks again to their end and gives the lowest active block an input that requires a gradient.
    """

    decoder: Decoder
    checkpointing: bool
    reentrant: bool = False
    _seen: dict = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        checkpointing: bool,
        reentrant: bool = False,
        blocks: Sequence[nn.Module] | None = None,
    ) -> "CostModel":
        """Read the structure of `model`, adapters attached; weights are not touched, meta and packed ones included.

        Args:
            model (`nn.Module`): The model as it will be trained.
            checkpointing (`bool`): Whether gradient checkpointing will be on.
            reentrant (`bool`, *optional*, defaults to `False`): Whether with `use_reentrant=True`.
            blocks (`Sequence[nn.Module]`, *optional*): The transformer blocks, where they are known already.

        Raises:
            ValueError: the model has no stack of blocks, or an adapter on something else than a linear module.
        """
        return cls(decoder_of(model, blocks), checkpointing, reentrant)

    def __len__(self) -> int:
        return len(self.decoder.blocks)

    def plain(self, shapes: Shapes) -> float:
        """FLOPs of a plain LoRA step of `SFTTrainer` on micro-batches of `(batch, length)`.

        With checkpointing TRL lets the embeddings' output require a gradient, so that backpropagation runs through
        the input of block 0 as well.
        """
        size = Size.of(shapes)
        total = self._head(size, bool(self.decoder.head_trainable))
        for i, block in enumerate(self.decoder.blocks):
            passes = self._passes(i, block.trainable, i > 0 or self.checkpointing or self._uncut)
            total += passes.forward.on(size) + passes.back.on(size)
        return total

    def dense_sam(self, shapes: Shapes) -> float:
        """FLOPs of a SAM step of all adapters: two plain ones."""
        return 2 * self.plain(shapes)

    def step(self, active: Active, shapes: Shapes, rule: Rule = TWO_PASS) -> float:
        """FLOPs of a step.

        Args:
            active (`Sequence[bool]` or `Collection[str]`): The active blocks, one flag each, or the names of the
                active parameters as in `model.named_parameters()`, for arms finer than a block or outside the blocks.
            shapes (`Sequence[tuple[int, int]]`): `(batch, length)` of each micro-batch.
            rule (`Rule`, *optional*): How the step runs. Defaults to exact two-pass SL-SAM.

        Raises:
            ValueError: nothing is active, or the flags are not one per block.
        """
        per_block, below, head = self._split(active)
        parts = rule.parts(shapes)
        to_bottom = below or rule.uncut
        lowest_active = 0 if to_bottom else next((i for i, names in enumerate(per_block) if names), len(self))
        total = self._const(parts, rule, head)
        total += sum(self._beside(i, names, shapes, parts, rule) for i, names in enumerate(per_block))
        for i in range(lowest_active, len(self)):
            total += self._term(i, per_block[i], i == lowest_active and not to_bottom, parts, rule)
        return total

    def ratio(self, active: Active, shapes: Shapes, rule: Rule = TWO_PASS) -> float:
        """Cost of a step in units of a plain LoRA step on the same micro-batches; arguments as in `step`."""
        return self.step(active, shapes, rule) / self.plain(shapes)

    def forward_flops(self, names: Collection[str], shapes: Shapes) -> float:
        """FLOPs of one forward pass of what an arm adapts: its blocks if it holds all of theirs, else its modules.

        Args:
            names (`Collection[str]`): Names of the arm's parameters.
            shapes (`Sequence[tuple[int, int]]`): `(batch, length)` of each micro-batch.
        """
        size, chosen, total = Size.of(shapes), frozenset(names), 0.0
        for i, block in enumerate(self.decoder.blocks):
            if block.trainable and block.trainable <= chosen:
                total += self._passes(i, NONE, True).forward.on(size)
            else:
                own = [linear for linear in block.linears if linear.trainable & chosen]
                total += 2 * size.tokens * sum(x.base.features + sum(f.features for f in x.factors) for x in own)
        return total

    def linear_terms(self, shapes: Shapes, rule: Rule = TWO_PASS) -> LinearCost:
        """Return the terms of the expected cost with block arms; arguments as in `step`."""
        unit, parts = self.plain(shapes), rule.parts(shapes)
        reached, active, lowest_active = [], [], []
        for i, block in enumerate(self.decoder.blocks):
            inactive = self._term(i, NONE, False, parts, rule)
            chosen = self._term(i, block.trainable, False, parts, rule)
            beside = self._beside(i, block.trainable, shapes, parts, rule)
            reached.append(inactive / unit)
            active.append((chosen + beside - inactive) / unit)
            lowest_active.append((self._term(i, block.trainable, True, parts, rule) - chosen) / unit)
        return LinearCost(self._const(parts, rule, False) / unit, tuple(reached), tuple(active), tuple(lowest_active))

    def _split(self, active: Active) -> tuple[list[frozenset[str]], bool, bool]:
        """Split the active set into names per block, whether anything below them and whether the head is active."""
        blocks = self.decoder.blocks
        below = head = False
        if active and all(isinstance(name, str) for name in active):
            names = frozenset(active)
            per_block = [block.trainable & names for block in blocks]
            below, head = bool(self.decoder.below_trainable & names), bool(self.decoder.head_trainable & names)
        elif len(active) != len(blocks):
            raise ValueError(f"the active set has {len(active)} flags; the model has {len(blocks)} blocks.")
        else:
            per_block = [block.trainable if on else NONE for block, on in zip(blocks, active, strict=True)]
        if not (below or head or any(per_block)):
            raise ValueError("the active set is empty; a step needs at least one trainable parameter.")
        return per_block, below, head

    def _const(self, parts: _Parts, rule: Rule, head_active: bool) -> float:
        """Cost of what runs wherever the cut lies: forward passes below it, the head, a dense descent."""
        head_trained = bool(self.decoder.head_trainable) if rule.descent == "all" else head_active
        forwards = rule.ascent.forwards
        cost = self._head(parts.total, head_trained)
        cost += forwards * self._logits(parts.first) if forwards else self._head(parts.first, head_active)
        rest = parts.total.minus(parts.reused)
        for i, block in enumerate(self.decoder.blocks):
            forward = self._passes(i, NONE, True).forward
            cost += max(1, forwards) * forward.on(parts.first) + forward.on(rest)
            if rule.descent == "all":
                input_grad = i > 0 or self.reentrant or self._uncut or rule.uncut
                cost += self._passes(i, block.trainable, input_grad).back.on(parts.total)
        return cost

    def _term(self, index: int, names: frozenset[str], is_lowest: bool, parts: _Parts, rule: Rule) -> float:
        """Cost that block `index` adds when it is not below the cut, `names` being what is active in it."""
        dense = rule.descent == "all"
        trained = self.decoder.blocks[index].trainable if dense else names
        input_grad = not is_lowest or self.reentrant
        # An ascent whose graph a dense descent goes on from has every trained arm on, any other the drawn ones alone.
        kept = self._passes(index, trained, input_grad or (dense and index == 0 and self._uncut))
        fresh = self._passes(index, names, input_grad)
        cost = 0.0 if rule.ascent.forwards else fresh.back.on(parts.first.minus(parts.reused))
        cost += kept.back.on(parts.reused) + kept.forward.on(parts.reused)
        # A dense descent runs below the lowest active block too: `_const` counts it.
        return cost if dense else cost + kept.back.on(parts.total)

    def _beside(self, index: int, names: frozenset[str], shapes: Shapes, parts: _Parts, rule: Rule) -> float:
        """Cost that a block's perturbed parameters add to its descent passes beside what every pass costs."""
        cost = 0.0
        if rule.doubled(shapes):
            cost += self._riding(index, names, names if rule.ascent.doubles else rule.wanted, parts)
        if rule.ascent.merges:
            linears = [x for x in self.decoder.blocks[index].linears if x.trainable & names]
            # B A is a product of (out, r) and (r, in): made once a step, for the lengths of its rows.
            cost += sum(2 * x.factors[-1].features * x.in_features for x in linears if x.factors)
        return cost

    def _riding(self, index: int, names: frozenset[str], wanted: frozenset[str], parts: _Parts) -> float:
        """Cost that telling tokens apart adds to a block's pass: its perturbed factors hold two weights."""
        trained = self.decoder.blocks[index].trainable
        input_grad = index > 0 or self.reentrant or self._uncut
        two = self._passes(index, trained, input_grad, names, wanted & trained)
        one = self._passes(index, trained, input_grad)
        return two.forward.minus(one.forward).on(parts.total) + two.back.minus(one.back).on(parts.total)

    @property
    def _uncut(self) -> bool:
        """Whether backpropagation through everything has to leave block 0 downwards."""
        return bool(self.decoder.below_trainable)

    def _logits(self, size: Size) -> float:
        """FLOPs of the head of a forward pass alone."""
        return 2 * self.decoder.head * size.scored

    def _head(self, size: Size, trainable: bool) -> float:
        """FLOPs of the fused head: logits, logits again, gradient of the hidden states (and of its weight)."""
        return 2 * self.decoder.head * size.scored * (4 if trainable else 3)

    def _passes(
        self,
        index: int,
        names: frozenset[str],
        input_grad: bool,
        stacked: frozenset[str] = NONE,
        wanted: frozenset[str] = NONE,
    ) -> BlockCost:
        key = (index, names, input_grad, stacked, wanted)
        if key not in self._seen:
            block, how = self.decoder.blocks[index], (self.checkpointing, not self.reentrant)
            self._seen[key] = cost_of_block(block, names, input_grad, stacked, wanted, *how)
        return self._seen[key]
