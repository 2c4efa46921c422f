"""SAMPa looks ahead from an extrapolated point, whose gradient is part of the step as well."""

from collections.abc import Mapping, Sequence

import torch

from slsam_peft.algorithm.ascents import Ahead, Host, rate_of
from slsam_peft.algorithm.step import Step

SHARE = 0.2  # lambda of SAMPa-0.2, arXiv 2410.10683


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

    Args:
        sequences (`int`, *optional*): As in `Part`.
        fraction (`float`, *optional*): As in `Part`.
        share (`float`, *optional*, defaults to `0.2`): lambda, in [0, 1); the paper's 0.2.
        extrapolate (`bool`, *optional*, defaults to `True`): Whether $y_{t+1}$ is another point than $w_t$.
    """

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

    def begin(self, host: Host) -> None:
        """See `Ascent.begin`."""
        self._host = host

    def extrapolation(self, gradients: Mapping[int, torch.Tensor], unit: torch.Tensor) -> dict[int, torch.Tensor]:
        """Return $y_{t+1} - w_t$, see `Ascent.extrapolation`."""
        if not self.extrapolate or self._host is None:
            return {}
        rate, parameters = rate_of(self._host, "ascent='sampa'"), self._host.parameters
        return {i: g * (-rate(parameters[i]) * unit.to(g.device, g.dtype)) for i, g in gradients.items()}

    def complete(self, step: Step, gradients: Sequence[torch.Tensor | None]) -> None:
        """Let the gradient at the extrapolated point count for lambda of the step's."""
        for i, riding in step.riding.items():
            gradient = gradients[i]
            if gradient is not None and self.share:
                share = self.share if step.rode_share is None else self.share * (step.rode_share > 0).to(gradient)
                gradient.lerp_(riding.to(gradient.dtype), share)
