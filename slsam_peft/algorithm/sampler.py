"""The sampler draws each step's arms and learns from the norms of their gradients: bandit, scheme and generator."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from slsam_peft.algorithm.bandit import Bandit
from slsam_peft.algorithm.sampling import build_scheme
from slsam_peft.config import SLSAMConfig

State = dict[str, torch.Tensor]


class Draw(NamedTuple):
    """The arms of one step, and what they were drawn with; all of shape `(L,)`, on the CPU."""

    mask: torch.Tensor  # boolean: the arms drawn
    probabilities: torch.Tensor  # float64: what the scheme was given
    inclusion: torch.Tensor  # float64: the inclusion probabilities that the scheme realises


class Sampler:
    """The bandit, the sampling scheme and the generator of a training.

    A step's arms can be drawn one step early (`draw_ahead`). The draw is then held, with the probabilities that it was
    made with, until `draw` asks for it; it is part of the state.

    Args:
        depths (`Sequence[int | None]`): Depth of each of the $L$ arms, `None` in a model without blocks.
        budget (`float`): Sum of the probabilities, in (0, L].
        config (`SLSAMConfig`): Read: `bandit`, `bandit_rate`, `min_probability`, `design`, `seed`.

    Attributes:
        bandit (`Bandit`): What learns the probabilities.
        scheme (callable): What draws with them.
        generator (`torch.Generator`): What the scheme draws from.
        upcoming (`Draw` or `None`): The draw that is held for the next step.

    Raises:
        ValueError: `design="window"` or `"depth"` on arms without a depth order.
    """

    def __init__(self, depths: Sequence[int | None], budget: float, config: SLSAMConfig) -> None:
        config = config.resolved
        self.bandit = Bandit(len(depths), budget, config)
        self.scheme = build_scheme(config, depths)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.upcoming: Draw | None = None

    @property
    def probabilities(self) -> torch.Tensor:
        """Current probabilities, float64, shape `(L,)`."""
        return self.bandit.probabilities

    @property
    def mean(self) -> float:
        """Mean probability, the expected share of drawn arms."""
        return self.bandit.mean

    def draw(self) -> Draw:
        """Return this step's draw: the one that is held, or a new one."""
        held, self.upcoming = self.upcoming, None
        return self._new() if held is None else held

    def draw_ahead(self) -> Draw:
        """Return the next step's draw, and hold it until `draw` asks for it. The draw that is held stays the same."""
        if self.upcoming is None:
            self.upcoming = self._new()
        return self.upcoming

    def _new(self) -> Draw:
        probabilities = self.bandit.probabilities
        mask = self.scheme(probabilities, self.generator)
        if self.mean == 1.0:  # nothing to draw; the generator moves as for any other mean
            mask = torch.ones_like(mask)
        return Draw(mask, probabilities, self.scheme.inclusion(probabilities))

    def learn(self, draw: Draw, seen: torch.Tensor, norms: torch.Tensor) -> None:
        """Let the bandit learn from a step.

        Where arms were seen that were not drawn, because all are trained, no arm's norm was seen by chance: the bandit
        is told so (full information: `inclusion` is all 1, as is `mask` unless an arm had no gradient). The paper's
        rule learns from drawn arms alone, as published. A step in which no gradient was seen teaches nothing.

        Args:
            draw (`Draw`): What the step's arms were drawn with.
            seen (`torch.Tensor`): Arms whose gradient norm was seen, boolean, shape `(L,)`.
            norms (`torch.Tensor`): Gradient norms, finite where seen, float64, shape `(L,)`.

        Raises:
            ValueError: a callable rule returned something other than `L` probabilities in [0, 1].
        """
        inclusion = draw.inclusion
        if self.bandit.rule == "paper":
            seen = seen & draw.mask
        elif bool((seen & ~draw.mask).any()):
            inclusion = torch.ones_like(inclusion)
        if bool(norms[seen].any()):
            self.bandit.update(seen, norms, inclusion, draw.probabilities)

    def state_dict(self) -> State:
        """Return everything that later draws depend on, as a flat dictionary of tensors."""
        held = {} if self.upcoming is None else self.upcoming._asdict()
        return {
            "generator": self.generator.get_state(),
            **{f"design.{key}": value for key, value in self.scheme.state_dict().items()},
            **{f"bandit.{key}": value for key, value in self.bandit.state_dict().items()},
            **{f"upcoming.{key}": value.clone() for key, value in held.items()},
        }

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned; nothing changes if it does not fit.

        Raises:
            ValueError: it was saved by a sampler of other arms or settings, or it is incomplete.
        """
        before, held = self.state_dict(), self.upcoming
        try:
            _check_keys(state)
            upcoming = self._upcoming(_below(state, "upcoming."))
            self._check_scheme(set(_below(state, "design.")))
            self._restore(state)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            self._restore(before)
            self.upcoming = held
            missing = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(
                f"the sampler's state does not fit: {missing}. Use the arms and settings that it was saved with, or "
                "start without it."
            ) from error
        self.upcoming = upcoming

    def _restore(self, state: Mapping[str, torch.Tensor]) -> None:
        self.bandit.load_state_dict(_below(state, "bandit."))
        self.scheme.load_state_dict(_below(state, "design."))
        self.generator.set_state(state["generator"])

    def _check_scheme(self, saved: set[str]) -> None:
        """Refuse a state that another scheme left: one without a state would pass over it in silence."""
        own = set(self.scheme.state_dict())
        if saved != own:
            raise ValueError(
                f"its sampling scheme kept {sorted(saved) or 'nothing'}, and this one keeps {sorted(own) or 'nothing'}"
            )

    def _upcoming(self, state: State) -> Draw | None:
        """Return the held draw in a state, `None` where there is none."""
        if not state:
            return None
        count = len(self.bandit.probabilities)
        mask = state["mask"].to("cpu", torch.bool, copy=True)
        numbers = [state[name].to("cpu", torch.float64, copy=True) for name in ("probabilities", "inclusion")]
        shapes = [tuple(value.shape) for value in (mask, *numbers)]
        if shapes != [(count,)] * 3 or not bool(mask.any()):
            raise ValueError(
                f"the draw that it holds has shapes {shapes} and {int(mask.sum())} arms; here there are {count} arms, "
                "and at least one is drawn"
            )
        return Draw(mask, *numbers)


def _check_keys(state: Mapping[str, torch.Tensor]) -> None:
    """Refuse what no sampler has left there."""
    foreign = [key for key in state if key != "generator" and not key.startswith(("design.", "bandit.", "upcoming."))]
    if foreign:
        raise ValueError(f"it holds {foreign[0]!r}, which belongs to no sampler")


def _below(state: Mapping[str, torch.Tensor], prefix: str) -> State:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
