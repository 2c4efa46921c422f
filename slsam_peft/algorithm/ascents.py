r"""Ascents say where the ascent gradient of a step comes from: which of its sequences, or which earlier pass.

An ascent is an object. Another one is a class derived from `Ascent`; hand an instance to `SLSAMConfig(ascent=...)`.
What a step costs is worked out from the same object.
"""

from collections.abc import Mapping

import torch

from slsam_peft.algorithm.memory import GradientMemory


class Ascent:
    """No ascent: every step is a plain one. Others derive from it.

    Attributes:
        exact (`bool`): Whether the ascent is made by the whole step, so that the loss at w is known.
        stale (`bool`): Whether e is made of gradients that an earlier step kept.
        rides (`bool`): Whether the ascent of the next step is made by sequences of it that ride along in this one's
            pass.
        cuts (`bool`): Whether it may take a part of a micro-batch, whose sequences are to be counted then.
    """

    exact = False
    stale = False
    rides = False
    cuts = False

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


class Ahead(Part):
    """Look-ahead: `Part`, made one step early by sequences of the next batch at w in the pass of this one at w + e.

    A step for which nothing rode along (an epoch's first) is a `Part`.
    """

    stale = True
    rides = True

    def riding(self, sequences: int) -> int:
        """Return as many as `Part` takes."""
        return self.of(sequences)


class Remembered(Ascent):
    """Stale: the last descent gradient of the same arm; one pass (S2-SAM, NeurIPS 2024)."""

    stale = True


def build_ascent(
    name: str | Ascent | None, sequences: int | None = None, fraction: float | None = None, rides: bool = False
) -> Ascent:
    """Return the ascent of a name, or the object that it is.

    Args:
        name (`str`, `Ascent` or `None`): As `SLSAMConfig.ascent`, resolved; `None` for none.
        sequences (`int`, *optional*): As in `Part`.
        fraction (`float`, *optional*): As in `Part`.
        rides (`bool`, *optional*, defaults to `False`): Whether `"auto"` may let sequences of the next batch ride
            along.
    """
    if not isinstance(name, str):
        return Ascent() if name is None else name
    if name == "two_pass":
        return TwoPass()
    if name == "remembered":
        return Remembered()
    kind = Ahead if name == "ahead" or (name == "auto" and rides) else Part
    return kind(sequences, fraction)
