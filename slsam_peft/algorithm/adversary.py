r"""Trains a second adapter against the first in the same pass, and drops it in the end."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from slsam_peft.algorithm.ascents import Ascent, Host, rate_of, seeded_normal, strength_of
from slsam_peft.algorithm.factors import Factors, check_factors, product_norm_squared
from slsam_peft.algorithm.stack import Beside
from slsam_peft.algorithm.step import Step

INSIDE = 1 - 1e-6  # of the radius: what rounds the number that all factors are scaled by must not reach beyond it
FASTEST = 0.1  # rate of Adam's ascent; a step moves each entry by about it


class Adversary(Ascent):
    r"""Bi-LoRA: an auxiliary pair beside each drawn one, moved by ascent in the same pass (ICLR 2026).

    $$\min_{B_1, A_1}\; \max_{\|s B_2 A_2\|_F \le \rho} L(W + s B_1 A_1 + s B_2 A_2)$$

    (arXiv 2508.19564): both pairs get their gradients from one pass at $W + s B_1 A_1 + s B_2 A_2$; the optimizer lets
    the primary pair descend, and here the auxiliary one ascends. Then all auxiliary factors are scaled by
    $\sqrt{\rho / c}$ where $c$, the norm of all $s B_2 A_2$ together, exceeds $\rho$. $A_2$ starts as LoRA's A does,
    from a seed, and $B_2$ at 0. It is no parameter of the model, so nothing that is saved or evaluated holds it.
    Differences: the ascent is Adam's, at the learning rate of the primary pair (plain ascent, the paper's equation,
    does not come near a radius at an adapter's rate; `adam=False` makes it); the radius counts the scale s; under the
    sampler a pair is drawn where both of its factors are.

    A step of Adam's moves each entry by about the rate, and $A_2$ starts within the root of 1 / in. So a rate above
    0.1 is refused: one step leaves nothing of those before. What asks for it is a rate that is none, as Prodigy's 1.

    Args:
        radius (`float`, *optional*): rho. Defaults to the config's `rho`.
        adam (`bool`, *optional*, defaults to `True`): Adam, or plain ascent.
    """

    rule = "bi_lora"
    doubles = True
    paced = True

    def __init__(self, radius: float | None = None, adam: bool = True) -> None:
        self.radius = radius
        self.adam = adam
        self._host: Host | None = None
        self._aux: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._moments: dict[int, list[torch.Tensor]] = {}
        self._norm = torch.zeros((), dtype=torch.float64)
        self._beside: Beside | None = None

    def begin(self, host: Host) -> None:
        """See `Ascent.begin`."""
        check_factors(self.setting, host.arms, host.factors)
        self._rho = strength_of(self, host)
        self._host = host
        self._aux = [_fresh(f, host.config.seed, i) for i, f in enumerate(host.factors)]
        self._moments = {}
        self._norm = torch.zeros((), dtype=torch.float64, device=self._aux[0][0].device)

    @property
    def strength(self) -> float | None:
        """The radius that it was made with."""
        return self.radius

    @property
    def auxiliary(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """$A_2$, shape `(r, in)`, and $B_2$, shape `(out, r)`, of each of `Host.factors`."""
        return self._aux

    @contextmanager
    def within(self, step: Step) -> Iterator[None]:
        """Let each drawn pair hold both: [A; A2] and [B, B2]."""
        host = self._host
        assert host is not None
        step.rho = self._norm
        if self._beside is None or self._beside.step is not step:
            drawn = {host.parameters[i] for i in host.members(step.mask)}
            on = [i for i, f in enumerate(host.factors) if drawn.issuperset(f.pair.weights)]
            self._beside = Beside({host.factors[i].pair: self._aux[i] for i in on}, step)
            self._on = on
        with self._beside.applied():
            yield

    def finish(self, step: Step) -> None:
        """Let the auxiliary pairs of the drawn arms ascend, and clip all of them to the radius."""
        host, beside = self._host, self._beside
        assert host is not None
        if beside is None or beside.step is not step:
            return
        self._beside = None
        gradients, targets, rates = [], [], []
        rate = rate_of(host, self.setting)
        for i in self._on:
            for side, weight in enumerate(host.factors[i].pair.weights):
                if not weight.requires_grad:  # frozen for now
                    continue
                found, own = beside.gradients.get(weight), self._aux[i][side]
                # One that took no part in the loss has a gradient of 0, as ranks send it: Adam goes on with momentum.
                gradients.append(torch.zeros_like(own) if found is None else found.to(own))
                targets.append(2 * i + side)
                rates.append(self._checked(rate(weight)))
        if not gradients:
            return
        scale = None if host.loss_scale is None else host.loss_scale()
        if scale is not None:
            gradients = [g / scale.reshape(()).to(g) for g in gradients]
        if host.reduce is not None:
            host.reduce(gradients)
        with torch.no_grad():
            for target, gradient, speed in zip(targets, gradients, rates, strict=True):
                own = self._aux[target // 2][target % 2]
                gradient = gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
                own.add_(self._direction(target, gradient) if self.adam else gradient, alpha=speed)
            self._clip()

    def _checked(self, rate: float) -> float:
        """Return a rate, and refuse one at which Adam's ascent forgets in each step what it had learnt."""
        if self.adam and rate > FASTEST:
            raise ValueError(
                f"{self.setting} would ascend at the learning rate {rate:.3g}; at most {FASTEST} is allowed. Lower "
                "it, or use an optimizer whose learning rate is the length of its steps (Prodigy's and D-Adaptation's "
                "1 is not)."
            )
        return rate

    def _direction(self, target: int, gradient: torch.Tensor) -> torch.Tensor:
        """Return Adam's step for one factor (betas 0.9 and 0.999), and keep its moments."""
        first, second, count = self._moments.setdefault(
            target, [torch.zeros_like(gradient), torch.zeros_like(gradient), torch.zeros((), dtype=torch.int64)]
        )
        count += 1
        first.lerp_(gradient, 0.1)
        second.lerp_(gradient.square(), 0.001)
        t = int(count)
        return (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)

    def _clip(self) -> None:
        """Scale all auxiliary factors alike where their product is longer than the radius.

        The product may be far shorter than its factors are. Then its norm is lost in a sum in float32, and rounding
        the scaled factors may lengthen it: by eps / 2 of both factors' lengths for each of the two.
        """
        host = self._host
        assert host is not None
        device = self._aux[0][0].device
        squares, spreads = [], []
        for factors, (a, b) in zip(host.factors, self._aux, strict=True):
            a, b, s = a.to(device, torch.float64), b.to(device, torch.float64), factors.scale
            squares.append(s**2 * product_norm_squared(b, a))
            spreads.append(s**2 * a.square().sum() * b.square().sum())
        norm, spread = (torch.stack(x).sum().sqrt() for x in (squares, spreads))
        longest = norm + torch.finfo(self._aux[0][0].dtype).eps * spread
        ratio = (INSIDE * self._rho / longest.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(max=1.0)
        for pair in self._aux:
            for own in pair:
                own.mul_(ratio.sqrt().to(own))
        self._norm = norm * ratio

    def kept_bytes(self, parameters: Sequence[nn.Parameter]) -> float:
        """Return the bytes of the auxiliary factors and of Adam's moments, which are never in half precision."""
        tensors = 3 if self.adam else 1
        return float(tensors * sum(p.numel() * max(4, p.element_size()) for p in parameters))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the auxiliary factors and their moments, see `Ascent.state_dict`."""
        state = {f"{i}.{side}": x.clone() for i, pair in enumerate(self._aux) for side, x in enumerate(pair)}
        for target, kept in self._moments.items():
            state |= {f"{target // 2}.{target % 2}.{k}": x.clone() for k, x in enumerate(kept)}
        return {**state, "norm": self._norm.clone()} if state else {}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned, see `Ascent.load_state_dict`."""
        known = {f"{i}.{side}": x for i, pair in enumerate(self._aux) for side, x in enumerate(pair)}
        wanted = {**known, "norm": self._norm}
        moved = known.keys() & {key.rpartition(".")[0] for key in state}  # those with moments
        for key in moved:
            wanted |= {f"{key}.0": known[key], f"{key}.1": known[key], f"{key}.2": torch.zeros(())}
        missing = [key for key, x in wanted.items() if key not in state or state[key].shape != x.shape]
        if wrong := missing or sorted(state.keys() - wanted.keys()):
            raise ValueError(
                f"the state has no second adapter that fits this one ({wrong[0]!r} is "
                f"{'missing or of another shape' if missing else 'of no pair here'}). Resume with the adapter that it "
                "was saved for, or start without the state."
            )
        with torch.no_grad():
            for key, x in known.items():
                x.copy_(state[key])
        self._norm = state["norm"].to(self._norm)
        self._moments = {}
        for target, (key, x) in enumerate(known.items()):
            if key in moved:
                first, second, count = (state[f"{key}.{k}"] for k in range(3))
                self._moments[target] = [first.to(x, copy=True), second.to(x, copy=True), count.clone()]


def _fresh(factors: Factors, seed: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return $A_2$ as LoRA starts its A (Kaiming, uniform within the root of 1 / in), and $B_2 = 0$."""
    down, up = factors.down, factors.up
    like = torch.empty_like(down, dtype=torch.promote_types(down.dtype, torch.float32), requires_grad=False)
    normal = seeded_normal([like], seed, index, 2)[0]
    uniform = torch.special.ndtr(normal) * 2 - 1
    return uniform / math.sqrt(down.shape[1]), torch.zeros_like(up, dtype=like.dtype, requires_grad=False)
