r"""SL-SAM composes one step out of the bandit, a sampling scheme, the perturbation and the horizon.

    S_t ~ scheme(p)                          draw the active set
    g   = grad L(w) over S_t                 ascent pass
    e   = rho * g / (|g| + 1e-12)
    g'  = grad L(w + e) over S_t             descent pass; w is put back bit for bit
    the base optimizer steps on g'
    p   = bandit(p, S_t, |g_l|)              for the next step

(arXiv 2602.09395). An inactive arm has no gradient, so the optimizer neither moves nor decays it.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from slsam_peft.algorithm import rng, state
from slsam_peft.algorithm.arms import Arm, ArmNorms
from slsam_peft.algorithm.bandit import Bandit
from slsam_peft.algorithm.horizon import Horizon
from slsam_peft.algorithm.memory import GradientMemory
from slsam_peft.algorithm.order import watched_order
from slsam_peft.algorithm.passes import Closure, Passes, PassRunner, Pending, Step
from slsam_peft.algorithm.perturbation import Shift
from slsam_peft.algorithm.sampling import build_scheme
from slsam_peft.algorithm.telemetry import RadiusWatch, StepNumbers, step_metrics
from slsam_peft.config import SLSAMConfig
from slsam_peft.errors import DivergedError


class SLSAM:
    """Sparse-layer sharpness-aware minimisation over a set of arms.

    It produces gradients and owns no optimizer: after `update` the `.grad` of trained parameters is the descent
    gradient at w + e, every other arm's is `None`, and the weights are w, bit for bit.

    Args:
        arms (`Sequence[Arm]`): What `arms_of(model)` returns, or any list of arms that holds every trainable parameter
            of the model once: one that is trained and in no arm would gather the gradients of both passes.
        config (`SLSAMConfig`, *optional*): Settings; its `granularity` is not read here.
        fraction (`float`, *optional*): Expected share of active arms, in place of the config's; solved by the caller
            where `config.cost_budget` is set.
        cost (callable, *optional*): `Step` -> predicted cost in plain steps, or `None`; logged.

    Attributes:
        active (`torch.Tensor`): Arms perturbed in the last step, boolean, shape `(L,)`.
        metrics (`dict[str, float]`): Numbers of the last step.
        loss (`float`): Loss of the last step, as `update` returned it; summed over its micro-batches.
        norms (`torch.Tensor`): Gradient norms the bandit saw in it, 0 for arms it did not see, float64, shape `(L,)`.
        drawn (`torch.Tensor`): Probabilities its arms were drawn with, float64, shape `(L,)`.
        steps (`int`): Steps completed.
        skipped, skipped_in_a_row (`int`): Steps skipped because a loss or gradient was NaN or infinite.
        reduce (callable or `None`): Averages a list of tensors over ranks, in place: the active arms' gradients, and
            with the descent gradients the two losses, so that all ranks learn from, or skip, the same step.
        loss_scale (callable or `None`): Returns the factor on the loss (a tensor), or `None`.

    Raises:
        ValueError: no arms; a parameter in two of them; an explicit `active_fraction` of less than one arm (except for
            `bandit="paper"`); a sampling scheme that needs a depth order on arms without one; `cost_budget` without
            `fraction`; `ascent="ahead"` with a parameter that is not the weight of a linear module.

    Example:

        >>> import torch
        >>> from slsam_peft import SLSAM, SLSAMConfig, arms_of
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> slsam = SLSAM(arms_of(model, "module"), SLSAMConfig(rho=0.05, active_fraction=0.5))
        >>> x = torch.randn(8, 4)
        >>> def closure():
        ...     loss = model(x).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> loss = slsam.update(closure)
        >>> optimizer.step()
        >>> int(slsam.active.sum()) >= 1
        True
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        config: SLSAMConfig | None = None,
        *,
        fraction: float | None = None,
        cost: Callable[[Step], float] | None = None,
    ) -> None:
        # The arms must be a partition of the parameters.
        self.config = config = config or SLSAMConfig()
        self.arms = arms
        if not len(arms):
            raise ValueError("there are no arms; arms_of(model) needs a model with trainable parameters.")
        parameters = [p for arm in arms for p in arm.parameters]
        if len(set(parameters)) < len(parameters):
            names = [name for arm in arms for name in arm.parameter_names]
            twice = next(name for i, name in enumerate(names) if parameters[i] in set(parameters[:i]))
            raise ValueError(f"{twice} comes twice in the arms; each parameter belongs to one arm.")
        # The parts: what draws, what learns, what cuts passes, what runs them.
        self.cost = cost
        depths = [arm.depth for arm in arms]
        self._depths = torch.tensor([-1 if d is None else d for d in depths])
        self.bandit = Bandit(len(arms), len(arms) * self._fraction(fraction), config)
        self.design = build_scheme(config, depths)
        self.generator = torch.Generator().manual_seed(config.seed)
        self._check_ahead()
        blocks = getattr(arms, "blocks", ())
        limit, above = config.hidden_state_cache_limit_mib * 2**20, getattr(arms, "above", ())
        self.horizon = Horizon(blocks, limit, above) if blocks and None not in depths else None
        self.runner = PassRunner(
            parameters,
            torch.tensor([i for i, arm in enumerate(arms) for _ in arm.parameters]),
            [linear for arm in arms for linear in arm.linears],
            self.horizon,
            getattr(arms, "buffered", None),
        )
        # What callers set, and what they read.
        self.reduce: Callable[[list[torch.Tensor]], None] | None = None
        self.loss_scale: Callable[[], torch.Tensor | None] | None = None
        self.active = torch.zeros(len(arms), dtype=torch.bool)
        self.metrics: dict[str, float] = {}
        self.loss = math.nan
        self.norms = torch.zeros(len(arms), dtype=torch.float64)
        self.drawn = self.probabilities
        self.steps = self.skipped = self.skipped_in_a_row = 0
        # What lasts from one step to the next, and what an aborted step goes back to.
        self._norms = ArmNorms(arms)
        self.memory = GradientMemory(self.runner.parameters)
        self._watch = RadiusWatch(config.rho)
        self._current: Step | None = None
        self._before: dict[str, Any] = {}
        self._fired_before: set[torch.nn.Module] = set()
        self._random_before: rng.State = {}
        self._behind: dict[torch.nn.Module, bool] = {}

    def _fraction(self, solved: float | None) -> float:
        config, count = self.config, len(self.arms)
        if solved is not None:
            return solved
        if config.cost_budget is not None:
            raise ValueError(
                f"cost_budget={config.cost_budget} needs a cost model of the whole model; use SLSAMTrainer, or solve "
                "for the fraction (slsam_peft.cost.model) and pass SLSAM(..., fraction=...)."
            )
        if config.active_fraction is None:
            return max(config.fraction, 1.0 / count)
        if config.active_fraction * count < 1 - 1e-9 and config.bandit != "paper":
            raise ValueError(
                f"active_fraction={config.active_fraction} of {count} arms is less than one arm; use at least "
                f"{1 / count:.3g}, or a finer granularity."
            )
        return config.active_fraction

    def _check_ahead(self) -> None:
        if self.config.ascent != "ahead" or self.config.rho == 0:
            return
        for arm in self.arms:
            for name, linear in zip(arm.parameter_names, arm.linears, strict=True):
                if linear is None or "forward" in vars(linear):  # accelerate's hooks, for one, replace it
                    raise ValueError(
                        "ascent='ahead' runs sequences at w and at w + e in one pass, which only linear modules can, "
                        f"and {name} is no weight of one, or its forward has been replaced (as accelerate's hooks "
                        "do); use ascent='partial', or train LoRA factors only."
                    )

    @property
    def probabilities(self) -> torch.Tensor:
        """Inclusion probabilities for the next draw, float64 on the CPU, shape `(L,)`."""
        return self.bandit.probabilities

    def update(
        self,
        closure: Closure,
        ascent_closure: Closure | None = None,
        forward_only: Closure | None = None,
        sequences: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """Make the gradients of one step from one batch.

        Args:
            closure (`Closure`): Runs forward and backward on the batch and returns the loss. Called once or twice.
            ascent_closure (`Closure`, *optional*): The same on a part of the batch, for `ascent="partial"`.
            forward_only (`Closure`, *optional*): The forward alone, on the whole batch and under `torch.no_grad`. With
                it the second pass starts at the lowest active block; it is called once, to check that the model allows
                that.
            sequences (`tuple[int, int]`, *optional*): For `ascent="ahead"`, whose `closure` runs on sequences of this
                batch and, behind them, some of the next one: how many of each. Their losses are to be added, each
                scaled as this batch's sequences are without the others; `(n, 0)` where there is no next batch.

        Returns:
            `torch.Tensor`: The loss at w; at w + e where it is never computed at w on the whole batch (`ascent` other
            than `"two_pass"`).

        Raises:
            ValueError: `ascent="partial"` without `ascent_closure`, `ascent="ahead"` without `sequences`.
            DivergedError: more than `max_skipped_steps` steps in a row had a NaN or infinite loss or gradient; a
                `RuntimeError`.
        """
        return self.accumulate(Passes(closure, closure, ascent_closure, forward_only, sequences))

    def accumulate(self, passes: Passes, index: int = 0, count: int = 1) -> torch.Tensor:
        """Take in micro-batch `index` of the `count` of a step; the last one completes it.

        The arms are drawn once, with the first micro-batch. Ascent passes run as micro-batches come; once the last of
        them is in, the descent passes of all micro-batches so far run at w + e, and those of later ones as they come.
        Whatever is raised inside, weights, hooks, `requires_grad`, generators (torch's too) and bandit are as before.

        Args:
            passes (`Passes`): The micro-batch.
            index (`int`, *optional*, defaults to `0`): Its place in the step.
            count (`int`, *optional*, defaults to `1`): Micro-batches in the step.

        Returns:
            `torch.Tensor`: Loss to report for this call; the sum over the calls is the step's loss.

        Raises:
            ValueError, RuntimeError: as `update`; and a micro-batch that comes before the first of its step.
        """
        try:
            step = self._begin(count, passes) if index == 0 else self._current
            if step is None:
                raise RuntimeError(f"micro-batch {index} of {count} came before the first; start a step with 0.")
            with self.runner.switched(step.trained), self._watched_order():
                loss = self._micro_batch(step, passes, index)
                if index == count - 1:
                    self._finish(step)
        except BaseException:
            begun = bool(self._before)
            self._abort()
            if begun:
                rng.restore(self._random_before)
            raise
        return loss

    def _begin(self, count: int, passes: Passes) -> Step:
        """Draw the arms of a step, after noting everything that an abort must put back."""
        config = self.config
        if self._current is not None:  # the last step was never completed: it counts as if it had not begun
            self._abort()
        self._random_before = rng.snapshot(self.runner.accelerators)
        self._before, self._fired_before = state.sampler(self), set(self.runner.firings.fired)
        self.runner.clear()
        self._check_passes(passes, count)
        self._settle_order(passes)
        # Draw the arms. A mean probability of 1 leaves nothing to draw.
        mask = self.design(self.probabilities, self.generator)
        if self.bandit.mean == 1.0:
            mask = torch.ones_like(mask)
        trained = torch.ones_like(mask) if config.descent == "all" else mask
        step = Step(
            mask=mask,
            trained=trained,
            inclusion=self.design.inclusion(self.probabilities),
            lowest_active=int(self._depths[mask].min()),
            lowest_trained=int(self._depths[trained].min()),
            count=count,
        )
        # How many micro-batches have an ascent pass; without one e is made of stale gradients.
        if config.ascent == "partial" and config.rho > 0:
            step.ascents = 1 if count == 1 else max(1, round(config.ascent_fraction * count))
        elif config.rho > 0 and config.ascent == "two_pass":
            step.ascents = count
        elif config.rho > 0:
            step.shifts = self._recalled(mask)
        self._current = step
        return step

    @contextmanager
    def _watched_order(self) -> Iterator[None]:
        """Note which modules run behind the blocks, as long as that is a guess for some."""
        unsure = getattr(self.arms, "unsure", {})
        if not unsure:
            yield
            return
        modules = [module for modules in unsure.values() for module in modules]
        with watched_order(self.arms.all_blocks, modules) as behind:  # type: ignore[attr-defined]
            yield
        self._behind |= behind

    def _settle_order(self, passes: Passes) -> None:
        """Set the depth of arms by what runs behind the blocks: seen in a pass to spare, or else in the last step."""
        if not getattr(self.arms, "unsure", None):
            return
        if passes.forward_only is not None:
            with self._watched_order():
                passes.forward_only()
            rng.restore(self._random_before)
        if not self._behind:
            return
        arms: Any = self.arms
        if not arms.confirm(self._behind):
            return
        depths = [arm.depth for arm in arms]
        self._depths = torch.tensor([-1 if depth is None else depth for depth in depths])
        drawn_so_far = self.design.state_dict()
        self.design = build_scheme(self.config, depths)
        self.design.load_state_dict(drawn_so_far)
        if self.horizon is not None:
            self.horizon.above = arms.above

    def _check_passes(self, passes: Passes, count: int) -> None:
        """Refuse micro-batches that the ascent cannot be made of."""
        config = self.config
        partial = config.ascent == "partial" and config.rho > 0
        if partial and count == 1 and passes.part is None:
            raise ValueError(
                "ascent='partial' takes the ascent gradient from a part of the batch: pass ascent_closure, or several "
                "micro-batches, or use ascent='two_pass'."
            )
        ahead = config.ascent == "ahead" and config.rho > 0
        if ahead and (count > 1 or passes.sequences is None or self.reduce is not None):
            raise ValueError(
                "ascent='ahead' needs a step of one micro-batch on one rank, and its sequences=(sequences of this "
                "step, of the next); with several use ascent='partial', where one micro-batch makes the ascent."
            )
        if passes.sequences is not None and not ahead:
            raise ValueError(f"sequences={passes.sequences} belong to ascent='ahead' with rho > 0; leave them out.")

    def _micro_batch(self, step: Step, passes: Passes, index: int) -> torch.Tensor:
        """Run the passes that are due with this micro-batch; return the loss to report for it."""
        # Behind the ascent's micro-batches e is known, and there is the descent alone.
        exact = self.config.ascent == "two_pass" and step.ascents > 0
        pending = Pending(passes, rng.snapshot(self.runner.accelerators))
        if index >= step.ascents:
            return self._descend(step, pending, passes.logged)
        # The ascent's micro-batches run at w and wait for e.
        alone = step.count == 1 and self.config.ascent == "partial"
        closure = passes.logged if exact else (alone and passes.part) or passes.unlogged
        loss = self.runner.ascend(step, pending, closure)
        step.pending.append(pending)
        if index < step.ascents - 1:
            return loss if exact else torch.zeros_like(loss)
        # The last of them completes e: all that wait descend, each with the random state it had in its ascent.
        self._set_shifts(step)
        after = rng.snapshot(self.runner.accelerators)
        losses = [self._descend(step, p, p.passes.unlogged if exact else p.passes.logged) for p in step.pending]
        rng.restore(after)
        step.pending.clear()
        return loss if exact else torch.stack(losses).sum()

    def _descend(self, step: Step, pending: Pending, closure: Closure) -> torch.Tensor:
        """Run a descent pass; where it makes the next step's ascent too, note which linear modules run."""
        if self.config.ascent != "remembered" or self.config.rho == 0:
            return self.runner.descend(step, pending, closure)
        with self.runner.firings.watch(self.runner.watched_linears(step.mask)):
            return self.runner.descend(step, pending, closure)

    def _set_shifts(self, step: Step) -> None:
        """Turn the ascent gradients in `.grad` into e and clear them."""
        gradients = self._reduced(step.mask)
        squared = self._norms.squared(gradients, self._device(gradients))
        # Where some micro-batches have no ascent pass, the loss was scaled for more of them than it summed over.
        partial = step.ascents < step.count
        step.ascent_squared = squared * (step.count / step.ascents) ** 2 if partial else squared
        found = [(i, g) for i, g in enumerate(gradients) if g is not None]
        if found:
            members, ascent = zip(*found, strict=True)
            step.shifts = self.runner.shifts(members, ascent, squared.sum().sqrt(), self.config.rho)
        self.runner.clear()

    def _recalled(self, mask: torch.Tensor) -> list[Shift]:
        """Return e from stale gradients of the active arms: the last descent's (S2-SAM), or the look-ahead ones."""
        members, gradients, norm = self.memory.recall(self.runner.members(mask))
        return [] if norm is None else self.runner.shifts(members, gradients, norm, self.config.rho)

    def _reduced(self, mask: torch.Tensor, losses: torch.Tensor | None = None) -> list[torch.Tensor | None]:
        """Return each parameter's gradient, averaged over ranks; `None` where there is none.

        `losses` travel with them: what a decision rests on must be the same on every rank.
        """
        gradients = [p.grad for p in self.runner.parameters]
        if self.reduce is not None:
            sent = [] if losses is None else [losses]
            for i in self.runner.members(mask):  # the same tensors on every rank
                gradient = gradients[i]
                gradient = torch.zeros_like(self.runner.parameters[i]) if gradient is None else gradient
                gradients[i] = gradient
                sent.append(gradient)
            self.reduce(sent)
        return gradients

    def _device(self, gradients: Sequence[torch.Tensor | None]) -> torch.device:
        return next((g.device for g in gradients if g is not None), self.runner.parameters[0].device)

    def _finish(self, step: Step) -> None:
        """Read the step's numbers once, then learn from them, or skip the step if one is not finite."""
        # Across ranks the losses travel with the descent gradients, so that all ranks decide alike.
        losses = step.losses()
        gradients = self._reduced(step.trained, losses)
        if self.reduce is not None:
            for parameter, gradient in zip(self.runner.parameters, gradients, strict=True):
                parameter.grad = gradient
        # One copy to the host brings every number.
        scale = self.loss_scale() if self.loss_scale is not None else None
        numbers = self._numbers(step, gradients, losses, scale)
        self.norms, self.drawn = numbers.norms, self.probabilities
        self.loss = float(numbers.ascent_loss if self.config.ascent == "two_pass" else numbers.descent_loss)
        # The bandit learns from the arms whose gradient was seen, unless the step is void.
        seen = step.mask if step.ascent_squared is not None else step.trained & step.mask
        idle = self._is_idle(gradients, numbers)
        if idle:  # nothing that was drawn takes part in the loss
            self._skip_idle()
        elif not numbers.finite:
            self._skip(numbers)
        elif bool(self.norms[seen].any()):
            self.bandit.update(seen, self.norms, step.inclusion)
        # The metrics count a skipped step among those skipped in a row; only a good one ends the row.
        self.metrics = step_metrics(self, step, numbers)
        if numbers.finite and not idle:
            self.skipped_in_a_row = 0
        if "ascent_gain" in self.metrics:
            self._watch.see(self.metrics["ascent_gain"])
        # The step is complete: what belongs to it alone goes, what the next one needs stays.
        self._remember(step, numbers.finite, scale)
        self.active = step.mask
        self.steps += 1
        self._current = None
        self._before = {}
        self._release()

    def _numbers(
        self, step: Step, gradients: list[torch.Tensor | None], losses: torch.Tensor, scale: torch.Tensor | None
    ) -> StepNumbers:
        """Gather the step's numbers on the device and return them on the host."""
        squared = self._norms.squared(gradients, self._device(gradients))
        gathered = StepNumbers(
            ascent_squared=squared if step.ascent_squared is None else step.ascent_squared,
            next_ascent_norm=_joint_norm(step.next_ascent.values(), squared.device),
            descent_squared=squared.sum(),
            descent_loss=losses[0],
            ascent_loss=losses[1],
            loss_scale=torch.ones((), device=squared.device) if scale is None else scale,
        )
        return StepNumbers.unpacked(self._read(gathered.packed()))

    def _read(self, values: torch.Tensor) -> torch.Tensor:
        """Copy the step's numbers to the host: the one synchronisation of a step."""
        return values.to("cpu", torch.float64)

    def _is_idle(self, gradients: Sequence[torch.Tensor | None], numbers: StepNumbers) -> bool:
        """Whether nothing that was drawn takes part in the loss; ranks send zeros then."""
        nowhere = self.reduce is not None or all(gradient is None for gradient in gradients)
        return nowhere and float(numbers.descent_squared) == 0.0

    def _skip_idle(self) -> None:
        """Make a step void in which no drawn arm has a gradient. It says nothing about divergence."""
        self.skipped += 1
        self.runner.clear()  # the optimizer changes nothing
        if self.loss_scale is not None and self.loss_scale() is not None:
            self.runner.void()  # a gradient scaler wants to see one

    def _skip(self, numbers: StepNumbers) -> None:
        """Make the step void, and end the training where too many in a row were.

        Raises:
            DivergedError: more than `max_skipped_steps` steps in a row were skipped.
        """
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.loss_scale is None or self.loss_scale() is None:
            self.runner.clear()  # no gradient: the optimizer changes nothing
        elif math.isfinite(float(numbers.descent_squared)):  # a gradient scaler must see for itself that it is void
            self.runner.void()
        if self.skipped_in_a_row > self.config.max_skipped_steps:
            raise DivergedError(
                f"{self.skipped_in_a_row} steps in a row had a NaN or infinite loss or gradient (last: loss "
                f"{float(numbers.ascent_loss):g}, at w + e {float(numbers.descent_loss):g}, descent gradient norm "
                f"{float(numbers.descent_squared.sqrt()):g}); lower the learning rate or rho, or raise "
                "max_skipped_steps."
            )

    def _remember(self, step: Step, finite: bool, scale: torch.Tensor | None) -> None:
        """Keep the gradients that the next step's ascent is made of."""
        if self.config.ascent == "ahead":  # of that step's own sequences, or of none
            self.memory.replace(step.next_ascent if finite else {}, scale)
        elif finite and self.config.ascent == "remembered":
            trained = self.runner.members(step.trained)
            self.memory.store({i: g for i in trained if (g := self.runner.parameters[i].grad) is not None}, scale)

    def _abort(self) -> None:
        """Go back to before the step."""
        self._current = None
        self._release()
        self.runner.clear()
        if self._before:
            state.restore_sampler(self, self._before)
            self.runner.firings.fired = self._fired_before
            self._before = {}

    def _release(self) -> None:
        if self.horizon is not None:
            self.horizon.release()

    def state_dict(self) -> dict[str, Any]:
        """Return everything later steps depend on.

        Plain values under `"arms"`, `"config"`, `"steps"`, `"skipped"` and `"skipped_in_a_row"`, tensors under every
        other key.
        """
        return state.collect(self)

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; nothing changes if it does not fit.

        Raises:
            ValueError: the state belongs to other arms; the message names the first difference.
            KeyError: it is incomplete.
        """
        state.check_arms(saved["arms"], self.arms)
        before = state.collect(self)
        try:
            state.restore(self, saved)
        except BaseException:
            state.restore(self, before)
            raise


def _joint_norm(gradients: Collection[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return the norm of all gradients together, shape `()`; 0 where there are none."""
    if not gradients:
        return torch.zeros((), device=device)  # made there: a copy from the host would wait
    return torch.stack([norm.to(device) for norm in torch._foreach_norm(list(gradients))]).norm()
