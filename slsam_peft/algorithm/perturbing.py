"""Makes the perturbation e of a step: of its ascent gradients, or of those that an earlier step kept."""

from collections.abc import Collection, Sequence

import torch

from slsam_peft.algorithm.ascents import Ascent, Host
from slsam_peft.algorithm.exchange import average_ascent
from slsam_peft.algorithm.fallbacks import Fallbacks
from slsam_peft.algorithm.memory import GradientMemory
from slsam_peft.algorithm.norms import ArmNorms
from slsam_peft.algorithm.passes import PassRunner
from slsam_peft.algorithm.radius import Radius, slope_of
from slsam_peft.algorithm.shards import local
from slsam_peft.algorithm.step import Step, quotient


class Perturber:
    """Hands ascent gradients to the radius and lays e down in the step.

    Args:
        host (`Host`): The algorithm; what averages over ranks and scales the loss is asked of it in each step.
        runner (`PassRunner`): Holds the parameters and moves them.
        ascent (`Ascent`): Where the gradients come from.
        radius (`Radius`): Makes e of them.
        norms (`ArmNorms`): Of the gradients, per arm.
        memory (`GradientMemory`): Gradients that an earlier step kept.
        fallbacks (`Fallbacks`): Told of arms that are drawn and not perturbed.
    """

    def __init__(
        self,
        host: Host,
        runner: PassRunner,
        ascent: Ascent,
        radius: Radius,
        norms: ArmNorms,
        memory: GradientMemory,
        fallbacks: Fallbacks,
    ) -> None:
        self._host = host
        self._runner = runner
        self._ascent = ascent
        self.radius = radius
        self._norms = norms
        self._memory = memory
        self._fallbacks = fallbacks

    def of_ascent(self, step: Step) -> None:
        """Turn the ascent gradients in `.grad` into e and clear them."""
        gradients = average_ascent(self._host.reduce, self._runner, step, part=not self._ascent.exact)
        found = {i: g for i, g in enumerate(gradients) if g is not None}
        squared = self._norms.squared(gradients, self._runner.device_of(gradients))
        unit = self.share(step, squared)
        scale = self._host.loss_scale() if self._host.loss_scale is not None else None
        if scale is not None:
            unit = unit / scale.reshape(()).to(unit.device)
        step.ascent_squared = squared * unit.square()
        if found:
            self._tell_unperturbed(step, found)
            self._perturb(step, found, squared.sum().sqrt(), unit)
        self._runner.clear()

    def of_memory(self, step: Step) -> None:
        """Make e of the gradients that an earlier step kept for the drawn arms: its descent's, or look-ahead ones."""
        members = [i for i in self._runner.members(step.mask) if self._runner.parameters[i].requires_grad]
        gradients = self._memory.recall(members)
        if not gradients:
            return
        known: Sequence[torch.Tensor | None] = [gradients.get(i) for i in range(len(self._runner.parameters))]
        squared = self._norms.squared(known, self._runner.device_of(known))
        step.ascent_squared = squared
        self._perturb(step, gradients, squared.sum().sqrt(), squared.new_ones(()))

    def share(self, step: Step, like: torch.Tensor) -> torch.Tensor:
        """Return the factor that makes the ascent passes' loss the mean over their own sequences, shape `()`."""
        if self._ascent.exact:  # its sequences are all of those that the loss is divided by
            return like.new_ones(())
        return quotient(step.divisor, step.items, like)

    def _perturb(self, step: Step, gradients: dict[int, torch.Tensor], norm: torch.Tensor, unit: torch.Tensor) -> None:
        found = list(gradients.values())
        weights = [local(self._runner.parameters[i]) for i in gradients]
        with torch.no_grad():
            offsets, step.rho = self.radius.offsets(found, weights, norm, unit)
            slope = slope_of(self.radius, offsets, found, norm.device)
            step.slope = None if slope is None else slope * unit
            step.extrapolated = self._ascent.extrapolation(gradients, unit)
        step.perturbation = self._runner.perturbation(list(gradients), offsets)

    def _tell_unperturbed(self, step: Step, gradients: Collection[int]) -> None:
        """Tell of drawn arms that took no part in the ascent's loss, though others did."""
        for arm, drawn in enumerate(step.mask.tolist()):
            members = self._runner.members_of(arm) if drawn else ()
            members = [i for i in members if self._runner.parameters[i].requires_grad]
            if members and not any(i in gradients for i in members):
                self._fallbacks.add(
                    "a drawn arm is not perturbed in some steps",
                    f"{self._host.arms[arm].name} takes no part in the loss of the sequences that make the ascent "
                    "(layers whose output is not used, batches without images)",
                    "Such a step perturbs fewer arms than were drawn.",
                )
