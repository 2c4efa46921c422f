"""SAMPa looks ahead from an extrapolated point, whose gradient is part of the step as well."""

from collections.abc import Mapping, Sequence

import torch

from slsam_peft.algorithm.ascents import Ahead, Host, rate_of
from slsam_peft.algorithm.step import Step

SHARE = 0.2  # lambda of SAMPa-0.2, arXiv 2410.10683
NO_RATE = 1.0  # a learning rate of so much is none; see `Sampa`


class Sampa(Ahead):
    r"""SAMPa-lambda: look-ahead from an extrapolated point, whose gradient is part of the step, too (NeurIPS 2024).

    $$y_{t+1} = w_t - \eta_t \nabla L_t(y_t), \qquad
    g'_t = (1 - \lambda)\, \nabla L_t\Bigl(w_t + \rho \frac{\nabla L_t(y_t)}{\|\nabla L_t(y_t)\|}\Bigr)
    + \lambda\, \nabla L_{t+1}(y_{t+1})$$

    (Xie, Pethick and Cevher, arXiv 2410.10683). With $\lambda = 0$ and without extrapolation it is `Ahead`.
    Differences: $\nabla L_{t+1}(y_{t+1})$ is made by m sequences of the next batch, which ride along in this one's
    pass on the same device, not by all of it on a second one; only drawn arms are extrapolated, and only those that
    the next step perturbs have the second term; $y_{t+1}$ is a gradient step whatever the optimizer is. A step after
    which nothing comes (an epoch's last) is $g'_t$ with $\lambda = 0$.

    A gradient step at a rate of 1 is as long as the gradient, many times as long as the perturbation, and the paper's
    rates are 0.1 at most. So rates of 1 and more are refused. What asks for one is a rate that is none, as Prodigy's.

    Args:
        sequences (`int`, *optional*): As in `Part`.
        fraction (`float`, *optional*): As in `Part`.
        share (`float`, *optional*, defaults to `0.2`): lambda, in [0, 1); the paper's 0.2.
        extrapolate (`bool`, *optional*, defaults to `True`): Whether $y_{t+1}$ is another point than $w_t$.
    """

    rule = "sampa"

    def __init__(
        self,
        sequences: int | None = None,
        fraction: float | None = None,
        share: float = SHARE,
        extrapolate: bool = True,
    ) -> None:
        super().__init__(sequences, fraction)
        if not 0 <= share < 1:
            raise ValueError(f"share={share!r} is not allowed; lambda must be in [0, 1).")
        self.share = share
        self.extrapolate = extrapolate
        self._host: Host | None = None

    @property
    def extrapolates(self) -> bool:
        """Whether riding sequences run at $y_{t+1}$."""
        return self.extrapolate

    @property
    def paced(self) -> bool:
        """Whether there is a $y_{t+1}$, which lies as far away as the learning rate says."""
        return self.extrapolate

    def begin(self, host: Host) -> None:
        """See `Ascent.begin`."""
        self._host = host

    def extrapolation(self, gradients: Mapping[int, torch.Tensor], unit: torch.Tensor) -> dict[int, torch.Tensor]:
        """Return $y_{t+1} - w_t$, see `Ascent.extrapolation`."""
        if not self.extrapolate or self._host is None:
            return {}
        rate, parameters = rate_of(self._host, self.setting), self._host.parameters
        rates = {i: self._checked(rate(parameters[i])) for i in gradients}
        return {i: g * (-rates[i] * unit.to(g.device, g.dtype)) for i, g in gradients.items()}

    def _checked(self, rate: float) -> float:
        """Return a rate, and refuse one that no gradient step has."""
        if rate >= NO_RATE:
            raise ValueError(
                f"{self.setting} would look ahead from a gradient step at the learning rate {rate:.3g}; less than "
                f"{NO_RATE:g} is allowed. Lower it, or use an optimizer whose learning rate is the length of its "
                "steps (Prodigy's and D-Adaptation's 1 is not), or ascent=Sampa(extrapolate=False) "
                "(slsam_peft.algorithm.sampa), which reads none."
            )
        return rate

    def complete(self, step: Step, gradients: Sequence[torch.Tensor | None]) -> None:
        """Let the gradient at the extrapolated point count for lambda of the step's."""
        for i, riding in step.riding.items():
            gradient = gradients[i]
            if gradient is not None and self.share:
                share = self.share if step.rode_share is None else self.share * (step.rode_share > 0).to(gradient)
                gradient.lerp_(riding.to(gradient.dtype), share)
