r"""Runs passes at $W + s B A + \epsilon$ with random noise that is made where it is used and never stored."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from slsam_peft.algorithm.ascents import Ascent, Host, seeded_normal, strength_of
from slsam_peft.algorithm.factors import Factors, check_factors
from slsam_peft.algorithm.step import Step


class WeightNoise(Ascent):
    r"""Flat-LoRA: the expected loss under Gaussian noise on the merged weight, one pass (Li et al., ICML 2025).

    $$\epsilon_{ij} \sim \mathcal N\Bigl(0, \frac{\sigma_t^2}{n} \|(W + s B A)_{i,:}\|_2^2\Bigr)$$

    for a weight of shape `(m, n)` (arXiv 2409.14396, equation 7), drawn anew in each step for the drawn arms' modules.
    $\sigma_t$ grows from 0 to $\sigma$ by a cosine where the length of the training is known, as the paper has it, and
    is $\sigma$ else. The gradient is that of A and B at $W + s B A + \epsilon$. Nothing is kept but a seed (the
    config's, the step's, the module's) and, for the step, the lengths of the rows. Differences: under the sampler a
    pair is drawn where both of its factors are; the noise is added to
    a copy of the weight inside the frozen module's own product, in the forward and again in the backward pass, so that
    no weight is written; on a 4-bit base the copy is the dequantised weight.

    Args:
        sigma (`float`, *optional*): sigma. Defaults to the config's `rho`.
    """

    rule = "flat_lora"
    merges = True

    def __init__(self, sigma: float | None = None) -> None:
        self.sigma = sigma
        self._host: Host | None = None
        self._step: Step | None = None
        self._noisy: list[_NoisyLinear] = []

    @property
    def strength(self) -> float | None:
        """The sigma that it was made with."""
        return self.sigma

    def begin(self, host: Host) -> None:
        """See `Ascent.begin`."""
        check_factors(self.setting, host.arms, host.factors)
        self._sigma = strength_of(self, host)
        for factors in host.factors:
            reason = _why_not(factors)
            if reason is not None:
                raise ValueError(
                    f"{self.setting} adds noise to the frozen weight in its module's product, and {factors.name} "
                    f"{reason}. Linear modules in float and in bitsandbytes' 4 bits can; use another rule here."
                )
        self._host = host
        self._step = None

    def deviation(self) -> float:
        """Return sigma of this step."""
        host = self._host
        assert host is not None
        grown = 1.0 if host.progress is None else (1 - math.cos(math.pi * host.progress())) / 2
        return self._sigma * grown

    @contextmanager
    def within(self, step: Step) -> Iterator[None]:
        """Let the frozen modules of the drawn arms compute with noise on their weights."""
        host = self._host
        assert host is not None
        if self._step is not step:
            drawn = {host.parameters[i] for i in host.members(step.mask)}
            sigma = self.deviation()
            self._noisy = [
                _NoisyLinear(f, sigma, (host.config.seed, host.steps, i))
                for i, f in enumerate(host.factors)
                if drawn.issuperset(f.pair.weights)
            ]
            self._step = step
            self._rho = torch.full((), sigma)
        step.rho = self._rho
        with ExitStack() as undo:
            for noisy in self._noisy:
                base = noisy.factors.base
                undo.callback(vars(base).pop, "forward", None)
                vars(base)["forward"] = noisy
            yield

    def finish(self, step: Step) -> None:
        """Forget the step's rows."""
        self._noisy, self._step = [], None


def _why_not(factors: Factors) -> str | None:
    """Return why a module's weight can have no noise; `None` where it can. A clause."""
    if factors.weight is None or factors.base is None:
        return f"is a {type(factors.base).__name__}"
    if "forward" in vars(factors.base):
        return "has a forward that something else has replaced"
    trained = [name for name, p in factors.base.named_parameters() if p.requires_grad]
    return f"has a trained {trained[0]}" if trained else None


class _NoisyLinear:
    """The forward of one frozen linear module with noise on its weight."""

    def __init__(self, factors: Factors, sigma: float, seeds: tuple[int, int, int]) -> None:
        self.factors = factors
        self.sigma = sigma
        self.seeds = seeds
        self._rows: torch.Tensor | None = None  # standard deviation of each row's noise, shape (out, 1)

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        base: Any = self.factors.base
        kind, own = input.device.type, self.factors.computes_in
        dtype = input.dtype if own is None else own(input) or input.dtype
        if own is None and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind) if input.dtype != torch.float64 else dtype
        output = _NoisyProduct.apply(input.to(dtype), self)
        if base.bias is not None:
            output = output + base.bias.to(output.dtype)  # type: ignore[operator]  # a tensor
        return output if own is None else output.to(input.dtype)  # type: ignore[union-attr]

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return a new tensor with W and its noise, shape `(out, in)`."""
        with torch.no_grad():
            weight = self.factors.weight()  # type: ignore[misc]
            if self._rows is None:
                self._rows = self._row_norms(weight) * (self.sigma / math.sqrt(weight.shape[1]))
            (noise,) = seeded_normal([self._rows.expand(weight.shape)], *self.seeds)
            return noise.mul_(self._rows).add_(weight).to(dtype)

    def _row_norms(self, weight: torch.Tensor) -> torch.Tensor:
        r"""Return $\|(W + s B A)_{i,:}\|_2$, shape `(out, 1)`, from $W A^T$ and $A A^T$: B A is as large as W."""
        exact, kind = torch.promote_types(weight.dtype, torch.float32), weight.device.type
        weight, up, down = (x.to(exact) for x in (weight, self.factors.up, self.factors.down))
        scaled = self.factors.scale * up
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            added = 2 * (scaled * (weight @ down.t())).sum(1, keepdim=True)
            added += (scaled * (scaled @ (down @ down.t()))).sum(1, keepdim=True)
        return (weight.norm(dim=1, keepdim=True).square() + added).clamp(min=0.0).sqrt()


class _NoisyProduct(torch.autograd.Function):
    """The product with a weight that is made for it, and made again for its backward pass."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, noisy: _NoisyLinear) -> torch.Tensor:  # noqa: D102
        ctx.noisy, ctx.dtype = noisy, input.dtype
        return F.linear(input, noisy.weight(input.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]  # noqa: D102
        return gradient @ ctx.noisy.weight(ctx.dtype).to(gradient.dtype), None
