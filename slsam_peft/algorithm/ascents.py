r"""Ascents say where the ascent gradient of a step comes from: which of its sequences, or which earlier pass.

An ascent is an object. Another one is a class derived from `Ascent`; hand an instance to `SLSAMConfig(ascent=...)`.
What a step costs is worked out from the same object.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import nn

from slsam_peft.algorithm.arms import Arm
from slsam_peft.algorithm.factors import Factors
from slsam_peft.algorithm.memory import GradientMemory
from slsam_peft.algorithm.passes import PassRunner
from slsam_peft.algorithm.step import Closure, Pending, Step
from slsam_peft.config import SLSAMConfig


class Host(Protocol):
    """What an ascent may know of the algorithm that runs it: attributes of `SLSAM`."""

    config: SLSAMConfig
    arms: Sequence[Arm]
    factors: Sequence[Factors]
    steps: int
    learning_rate: Callable[[nn.Parameter], float] | None
    progress: Callable[[], float] | None
    loss_scale: Callable[[], torch.Tensor | None] | None
    reduce: Callable[[list[torch.Tensor]], None] | None

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """Every arm's parameters, in the order of positions."""
        ...

    def members(self, mask: torch.Tensor) -> list[int]:
        """Return the positions of the parameters of the arms in a mask, shape `(L,)`."""
        ...


class Ascent:
    """No ascent: every step is a plain one. Others derive from it.

    Attributes:
        rule (`str` or `None`): What the settings call it; `None` where they have no name for it.
        strength (`float` or `None`): How strong a rule without an e is, where it was made with that; else by `rho`.
        exact (`bool`): Whether the ascent is made by the whole step, so that the loss at w is known.
        stale (`bool`): Whether e is made of gradients that an earlier step kept.
        rides (`bool`): Whether the ascent of the next step is made by sequences of it that ride along in this one's
            pass.
        cuts (`bool`): Whether it may take a part of a micro-batch, whose sequences are to be counted then.
        forwards (`int`): How many forward passes alone stand in the place of an ascent pass, see `ZerothOrder`; 0: it
            is a forward and a backward pass.
        moves (`bool`): Whether the descent pass runs at other weights than w.
        doubles (`bool`): Whether perturbed factors hold two weights in the descent pass; for the cost model.
        merges (`bool`): Whether the product B A of perturbed factors is made in each descent pass; likewise.
        extrapolates (`bool`): Whether sequences that ride along run at other weights than w; likewise.
        paced (`bool`): Whether it moves anything by the optimizer's learning rates (`Host.learning_rate`), of which a
            trainer makes sure before the first step.
    """

    rule: str | None = None
    strength: float | None = None
    exact = False
    stale = False
    rides = False
    cuts = False
    forwards = 0
    moves = True
    doubles = False
    merges = False
    extrapolates = False
    paced = False

    @property
    def setting(self) -> str:
        """How messages call it: as the settings have it, or by its class."""
        return f"ascent={type(self).__name__}" if self.rule is None else f"ascent={self.rule!r}"

    def begin(self, host: Host) -> None:
        """Take note of the algorithm that runs this ascent, before its first step; what was kept is dropped.

        Raises:
            ValueError: it lacks what the ascent needs.
        """

    def ascend(self, host: Host, runner: PassRunner, step: Step, pending: Pending, closure: Closure) -> torch.Tensor:
        """Add the ascent gradient of one micro-batch to `.grad`; return its loss at w.

        Args:
            host (`Host`): The algorithm.
            runner (`PassRunner`): Runs passes.
            step (`Step`): The step.
            pending (`Pending`): The micro-batch.
            closure (`Closure`): Its ascent pass, forward and backward.

        Raises:
            ValueError: the micro-batch lacks what the ascent runs.
        """
        return runner.ascend(step, pending, closure)

    def within(self, step: Step) -> AbstractContextManager[None]:
        """Return the context that the step's descent passes run in."""
        return nullcontext()

    def extrapolation(self, gradients: Mapping[int, torch.Tensor], unit: torch.Tensor) -> dict[int, torch.Tensor]:
        """Return how far from w the sequences that ride along run, by position; where nothing is said, at w.

        Args:
            gradients (`Mapping[int, torch.Tensor]`): This step's ascent gradients by position.
            unit (`torch.Tensor`): As in `Radius.offsets`.
        """
        return {}

    def complete(self, step: Step, gradients: Sequence[torch.Tensor | None]) -> None:
        """Change the descent gradients, in place, once they are averaged over ranks.

        Args:
            step (`Step`): The step.
            gradients (`Sequence[torch.Tensor | None]`): By position.
        """

    def finish(self, step: Step) -> None:
        """Learn from a step that is not void; its descent gradients are in `.grad`, and no optimizer has stepped."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return what later steps depend on beside the gradients that are kept, as a flat dictionary of tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: it does not fit.
        """
        if state:
            raise ValueError(f"the state holds {sorted(state)[0]!r}, and {type(self).__name__} keeps nothing.")

    def kept_bytes(self, parameters: Sequence[nn.Parameter]) -> float:
        """Return how much of what `state_dict` returns there comes to be, in bytes; for the estimate of memory.

        Args:
            parameters (`Sequence[nn.Parameter]`): Every arm's parameters; on the meta device, too.
        """
        return 0.0

    def take(self, index: int, count: int, sequences: int | None, taken: int) -> int:
        """Return how many sequences of a micro-batch run an ascent pass of their own at w; 0: none.

        Args:
            index (`int`): Place of the micro-batch in the step.
            count (`int`): Micro-batches of the step.
            sequences (`int` or `None`): Sequences of the micro-batch; `None` where that is not known, and it is one
                that cannot be cut.
            taken (`int`): Sequences that earlier micro-batches of the step gave.
        """
        return 0

    def reach(self, count: int) -> int:
        """Return of how many micro-batches, the first of a step of so many, `take` may take sequences.

        Ranks make one e together, each of its own sequences: behind so many micro-batches every rank has taken them,
        whatever it holds.
        """
        return count

    def riding(self, sequences: int) -> int:
        """Return how many sequences of a next step of so many ride along in a lone micro-batch."""
        return 0

    def keep(
        self,
        memory: GradientMemory,
        descent: Mapping[int, torch.Tensor],
        riding: Mapping[int, torch.Tensor],
        scale: torch.Tensor | None,
    ) -> None:
        """Keep what the next step's ascent is made of.

        Args:
            memory (`GradientMemory`): Where to.
            descent (`dict[int, torch.Tensor]`): Descent gradients of a finished step by position; empty after a void
                one.
            riding (`dict[int, torch.Tensor]`): Gradients of the sequences that rode along, likewise.
            scale (`torch.Tensor` or `None`): Factor on the loss.
        """
        if self.rides:  # those of the next step's own sequences, or of none
            memory.replace(riding, scale)
        elif self.stale and descent:  # beside those of other arms
            memory.store(descent, scale)


class TwoPass(Ascent):
    """Exact SAM: the step's whole batch (Foret et al. 2021; arXiv 2602.09395)."""

    rule = "two_pass"
    exact = True

    def take(self, index: int, count: int, sequences: int | None, taken: int) -> int:
        """Return all of them."""
        return 1 if sequences is None else sequences


class Part(Ascent):
    """Some sequences of the batch, in a small pass of their own (Bahri et al., ACL 2022).

    Args:
        sequences (`int`, *optional*): How many of a step.
        fraction (`float`, *optional*): Or which share, in (0, 1]: rounded, at least one; of whole micro-batches where
            there are several.
    """

    rule = "partial"
    cuts = True

    def __init__(self, sequences: int | None = None, fraction: float | None = None) -> None:
        self.sequences = sequences
        self.fraction = fraction

    def of(self, number: int) -> int:
        """Return how many of so many sequences (or micro-batches) make the ascent: here it is rounded."""
        if self.sequences is not None:
            return min(self.sequences, number)
        return max(1, round((self.fraction or 0.0) * number))

    def take(self, index: int, count: int, sequences: int | None, taken: int) -> int:
        """Return the first so many of the step; under a fraction, the first so many micro-batches whole."""
        here = 1 if sequences is None else sequences
        if self.sequences is not None:
            return min(here, max(0, self.sequences - taken))
        if count > 1:
            return here if index < self.of(count) else 0
        return self.of(here)

    def reach(self, count: int) -> int:
        """Return the micro-batches that a fraction takes, or as many as there are sequences: each has at least one."""
        return self.of(count)


class Ahead(Part):
    """Look-ahead: `Part`, made one step early by sequences of the next batch at w in the pass of this one at w + e.

    A step for which nothing rode along (an epoch's first) is a `Part`.
    """

    rule = "ahead"
    stale = True
    rides = True

    def riding(self, sequences: int) -> int:
        """Return as many as `Part` takes."""
        return self.of(sequences)


class Remembered(Ascent):
    """Stale: the last descent gradient of the same arm; one pass (S2-SAM, NeurIPS 2024)."""

    rule = "remembered"
    stale = True


def seeded_normal(like: Sequence[torch.Tensor], *seeds: int) -> list[torch.Tensor]:
    """Return standard normal numbers of the shapes, dtypes and devices of tensors, from seeds alone."""
    mixed = 0
    for seed in seeds:
        mixed = (mixed * 6364136223846793005 + seed + 1442695040888963407) % 2**63
    generators: dict[torch.device, torch.Generator] = {}
    made = []
    for x in like:
        if x.is_meta:  # a model without values, whose costs are counted
            made.append(torch.empty_like(x))
            continue
        if x.device not in generators:
            generators[x.device] = torch.Generator(x.device).manual_seed(mixed)
        made.append(torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generators[x.device]))
    return made


def rate_of(host: Host, what: str) -> Callable[[nn.Parameter], float]:
    """Return what tells a parameter's learning rate.

    Raises:
        ValueError: the algorithm owns no optimizer and was not told.
    """
    if host.learning_rate is None:
        raise ValueError(
            f"{what} needs to know the optimizer's learning rate; set slsam.learning_rate to a callable from a "
            "parameter to its rate, for example lambda p: optimizer.param_groups[0]['lr']. SLSAMTrainer does."
        )
    return host.learning_rate


def strength_of(ascent: Ascent, host: Host) -> float:
    """Return the number that says how strong a rule without an e is: its own, or the config's `rho`.

    Raises:
        ValueError: neither is set.
    """
    found = host.config.rho if ascent.strength is None else ascent.strength
    if found is None:
        raise ValueError(f"{ascent.setting} needs rho, and loss_rise is set in its place; set rho.")
    return found
