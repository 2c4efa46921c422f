r"""SL-SAM composes one step out of the sampler, the ascent, the radius and the passes.

    S_t ~ sampler                            draw the perturbed arms
    g   = grad L(w) over S_t                 ascent
    e   = radius(g)                          rho * g / |g|
    g'  = grad L(w + e)                      descent pass, over S_t or over every arm
    the base optimizer steps on g'
    the sampler learns from the norms

(arXiv 2602.09395). An arm that is not trained has no gradient, so the optimizer neither moves nor decays it.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from slsam_peft.algorithm import rng, state
from slsam_peft.algorithm.absent import keep_importance, pass_over_absent_pairs
from slsam_peft.algorithm.arms import Arm, Arms, check_partition
from slsam_peft.algorithm.assembly import build_runner, fraction_of, riding_pairs
from slsam_peft.algorithm.exchange import average_descent
from slsam_peft.algorithm.factors import Factors, check_factors
from slsam_peft.algorithm.fallbacks import Fallbacks
from slsam_peft.algorithm.horizons import Horizons
from slsam_peft.algorithm.memory import GradientMemory
from slsam_peft.algorithm.micro_batches import MicroBatches
from slsam_peft.algorithm.norms import ArmNorms, joint_norm
from slsam_peft.algorithm.order import RunOrder
from slsam_peft.algorithm.ownership import Ownership
from slsam_peft.algorithm.passes import NOT_RIDING, SMALL_PASS
from slsam_peft.algorithm.perturbing import Perturber
from slsam_peft.algorithm.radius import Radius, build_radius
from slsam_peft.algorithm.rules import build_ascent, check_sharded
from slsam_peft.algorithm.sampler import Draw, Sampler
from slsam_peft.algorithm.sampling import build_scheme
from slsam_peft.algorithm.shards import is_sharded, local, shards_of
from slsam_peft.algorithm.stack import Pair
from slsam_peft.algorithm.step import Closure, Cut, Passes, Pending, Step
from slsam_peft.algorithm.telemetry import RadiusWatch, StepNumbers, step_metrics
from slsam_peft.config import SLSAMConfig
from slsam_peft.errors import DivergedError
from slsam_peft.presets import RIDING

REDRAWS = 1000  # of arms that are not all frozen

logger = logging.getLogger(__name__)


def tell_filled_in(config: SLSAMConfig) -> None:
    """Warn that parts which are set without a `method` bring others along that are not the default's."""
    if filled := config.filled_in:
        logger.warning(
            "no method is named, so unset parts are these: %s. To change a part of the default, set method='auto' "
            "beside it.",
            ", ".join(f"{name}={value}" for name, value in filled.items()),
        )


class SLSAM:
    """Sparse-layer sharpness-aware minimisation over a set of arms.

    It produces gradients and owns no optimizer: after `update` the `.grad` of trained parameters is the descent
    gradient at w + e, every other arm's is `None`, and the weights are w, bit for bit. One rule writes them itself:
    `ascent="bar"` or `"obar"`, which scales the factors of the drawn pairs before the optimizer steps.

    Args:
        arms (`Sequence[Arm]`): What `arms_of(model)` returns, or any list of arms that holds every trainable parameter
            of the model once: one that is trained and in no arm would gather the gradients of both passes.
        config (`SLSAMConfig`, *optional*): Settings; its `granularity` is not read here. Objects that are given there
            in the place of a name, and keep something, serve one `SLSAM` at a time: the one that was made last.
        fraction (`float`, *optional*): Expected share of active arms, in place of the config's; solved by the caller
            where `config.cost_budget` is set.
        cost (callable, *optional*): `Step` -> predicted cost in plain steps, or `None`; logged.
        pairs (`Sequence[Pair]`, *optional*, defaults to `()`): The low-rank pairs of the model. Where they hold every
            arm's parameters, sequences of the next step may ride along in a pass.
        fallbacks (`Fallbacks`, *optional*): Told of what runs otherwise than meant. Defaults to a new list.
        factors (`Sequence[Factors]`, *optional*, defaults to `()`): The same pairs with their scales and what they
            adapt, for rules that work on the adapted weights; `slsam_peft.trainer.factors.factors_of(model)`.

    Attributes:
        fallbacks (`Fallbacks`): What has run otherwise than meant, so that it costs or computes something else.
        config (`SLSAMConfig`): The resolved settings.
        active (`torch.Tensor`): Arms perturbed in the last step, boolean, shape `(L,)`.
        metrics (`dict[str, float]`): Numbers of the last step.
        loss (`float`): Loss of the last step, as `update` returned it; summed over its micro-batches.
        norms (`torch.Tensor`): Gradient norms the bandit saw in it, 0 for arms it did not see, float64, shape `(L,)`.
        drawn (`torch.Tensor`): Probabilities its arms were drawn with, float64, shape `(L,)`.
        steps (`int`): Steps completed.
        skipped, skipped_in_a_row (`int`): Steps skipped because a loss or gradient was NaN or infinite.
        idle (`bool`): Whether no drawn arm took part in the last step's loss, so that it was void.
        reduce (callable or `None`): Averages a list of tensors over ranks, in place: the active arms' gradients, and
            with the descent gradients the two losses, so that all ranks learn from, or skip, the same step. Set
            already where parameters are sharded (FSDP2); their gradients come averaged.
        loss_scale (callable or `None`): Returns the factor on the loss (a tensor), or `None`.
        learning_rate (callable or `None`): Returns the rate that the optimizer steps a parameter with in this step;
            some ascents need it.
        progress (callable or `None`): Returns the share of the training that is done, in [0, 1); `None`: not known.

    Raises:
        ValueError: no arms; a parameter in two of them; an explicit `active_fraction` of less than one arm without a
            method (except for `bandit="paper"`); a sampling scheme that needs a depth order on arms without one;
            `cost_budget` without `fraction`; `ascent="ahead"` or `"sampa"` where `pairs` do not hold all parameters;
            `radius="weight"` or an ascent on the product of factors where `factors` do not.

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
        pairs: Sequence[Pair] = (),
        fallbacks: Fallbacks | None = None,
        factors: Sequence[Factors] = (),
    ) -> None:
        # The arms must be a partition of the parameters.
        self.fallbacks = Fallbacks() if fallbacks is None else fallbacks
        config = config or SLSAMConfig()
        tell_filled_in(config)
        self.config = config = config.resolved
        self.arms, self.factors, self.cost = arms, factors, cost
        check_partition(arms)
        if config.is_perturbed and config.radius == "weight":
            check_factors("radius='weight'", arms, factors)
        parameters = [p for arm in arms for p in arm.parameters]
        shards = shards_of(parameters, getattr(arms, "gathering", ()))
        riding = riding_pairs(config, pairs, parameters, shards)
        # The parts: what draws and learns, where g comes from, what runs passes, what makes e of g.
        self._depths = _depths(arms)
        drawn = len(arms) * fraction_of(config, len(arms), fraction)
        self.sampler = Sampler([arm.depth for arm in arms], drawn, config)
        name: Any = config.ascent if config.is_perturbed else None
        self.ascent = build_ascent(name, config.ascent_sequences, config.ascent_fraction, rides=bool(riding))
        self._shards = shards
        pairs = riding if self.ascent.rides else ()
        self.runner = build_runner(arms, self._horizons(), self.fallbacks, pairs, shards)
        self._rides = bool(pairs)  # on every rank alike, also where one of them stops riding
        self.memory = GradientMemory([local(p) for p in parameters])
        self._norms = ArmNorms(arms, None if shards is None else shards.summed)
        radius = build_radius(config, factors)
        self._perturber = Perturber(self, self.runner, self.ascent, radius, self._norms, self.memory, self.fallbacks)
        self._micro_batches = MicroBatches(self, self.runner, self.ascent, self._perturber, self.fallbacks)
        if shards is not None:
            check_sharded(self.ascent, radius, config, shards, self.fallbacks)
        # What reads gradients that are not there: a parameter has none where it is not drawn, or a step is skipped.
        pass_over_absent_pairs()
        keep_importance(getattr(arms, "allocators", ()), always_trained=config.descent == "all")
        # What callers set, and what they read.
        self.reduce: Callable[[list[torch.Tensor]], None] | None = None if shards is None else shards.average
        self.loss_scale: Callable[[], torch.Tensor | None] | None = None
        self.learning_rate: Callable[[nn.Parameter], float] | None = None
        self.progress: Callable[[], float] | None = None
        self.active = torch.zeros(len(arms), dtype=torch.bool)
        self.metrics: dict[str, float] = {}
        self.loss = math.nan
        self.norms = torch.zeros(len(arms), dtype=torch.float64)
        self.drawn = self.probabilities
        self.steps = self.skipped = self.skipped_in_a_row = 0
        self.idle = False
        # The step in progress, and what an aborted one goes back to.
        self._watch = RadiusWatch()
        self._current: Step | None = None
        self._alone = False
        self._before: dict[str, Any] = {}
        self._random_before: rng.State = {}
        self._order = RunOrder(arms.layout if isinstance(arms, Arms) else None)
        self.ascent.begin(self)
        self._ownership = Ownership(self.ascent, config.radius, config.bandit, config.design)

    @property
    def probabilities(self) -> torch.Tensor:
        """Inclusion probabilities for the next draw, float64 on the CPU, shape `(L,)`."""
        return self.sampler.probabilities

    @property
    def rides(self) -> bool:
        """Whether sequences of the next step may ride along; with ranks alike on all, though one may have stopped."""
        return bool(self.runner.pairs) if self.reduce is None else self._rides

    @property
    def radius(self) -> Radius:
        """What makes e of the ascent gradients; another one may take its place between two steps."""
        return self._perturber.radius

    @radius.setter
    def radius(self, radius: Radius) -> None:
        self._ownership.check()
        self._perturber.radius = radius
        self._ownership = Ownership(self.ascent, radius, self.config.bandit, self.config.design)

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """Every arm's parameters, in the order of their positions."""
        return self.runner.parameters

    def members(self, mask: torch.Tensor) -> list[int]:
        """Return the positions of the parameters of the arms in a mask, shape `(L,)`."""
        return self.runner.members(mask)

    def update(
        self,
        closure: Closure,
        ascent_closure: Closure | None = None,
        forward_only: Closure | None = None,
    ) -> torch.Tensor:
        """Make the gradients of one step from one batch.

        Args:
            closure (`Closure`): Runs forward and backward on the batch and returns the loss. Called once or twice.
            ascent_closure (`Closure`, *optional*): The same on a part of the batch, for ascents that are made by one
                (`ascent="partial"`, and `"auto"`, which takes the whole batch without it). Its loss is to be the mean
                over that part. Under `ascent="zeroth_order"` it is to run the forward alone.
            forward_only (`Closure`, *optional*): The forward alone, on the whole batch and under `torch.no_grad`. With
                it the second pass starts at the lowest active block; it is called once, to check that the model allows
                that.

        Returns:
            `torch.Tensor`: The loss at w; at w + e where it is never computed at w on the whole batch (`ascent` other
            than `"two_pass"`).

        Raises:
            ValueError: `ascent="partial"` without `ascent_closure`; `ascent="ahead"` or `"sampa"`, which need the next
                batch, too; a rule that is an object has been handed to another `SLSAM` since.
            DivergedError: more than `max_skipped_steps` steps in a row had a NaN or infinite loss or gradient; a
                `RuntimeError`.
        """
        if self.config.ascent in RIDING and self.config.is_perturbed:
            raise ValueError(
                f"ascent={self.config.ascent!r} lets sequences of the next batch ride along, and update() sees one "
                "batch alone; hand accumulate() Passes that have a Riding (slsam_peft.algorithm.step), or use "
                "ascent='partial' or 'auto'."
            )
        alone = ascent_closure if self.ascent.forwards else None
        cut = None if ascent_closure is None else lambda wanted: Cut(ascent_closure, forward_only=alone)
        return self.accumulate(Passes(closure, closure, forward_only, cut=cut))

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
        self._ownership.check()  # before anything is put back: what is not its own is left alone
        try:
            step = self._begin(count, passes) if index == 0 else self._current
            if step is None:
                raise RuntimeError(f"micro-batch {index} of {count} came before the first; start a step with 0.")
            with self.runner.switched(step.trained), self._order.watched():
                loss = self._micro_batches.run(step, passes, index)
                lone = step.lone
                if index == count - 1:
                    self._finish(step)
                if lone is not None and step.lone is None and step.descent_loss is not None:  # it was done again
                    loss = step.descent_loss
        except BaseException:
            begun = bool(self._before)
            self._abort()
            if begun:
                rng.restore(self._random_before)
            raise
        return loss

    def _begin(self, count: int, passes: Passes) -> Step:
        """Draw the arms of a step, after noting everything that an abort must put back."""
        if self._current is not None:  # the last step was never completed: it counts as if it had not begun
            self._abort()
        self.idle = False
        self._random_before = rng.snapshot(self.runner.accelerators)
        self._before = state.before_step(self)
        self.runner.clear()
        self._check_passes(passes, count)
        self._settle_order(passes)
        # Draw the arms; frozen ones are left alone.
        thawed = self.runner.thawed()
        draw = self._draw(thawed)
        trained = thawed if self.config.descent == "all" else draw.mask
        lowest = -1 if self._order.unsure else self._lowest(draw.mask)  # where blocks run is not known yet
        step = Step(
            draw=draw,
            trained=trained,
            lowest_active=lowest,
            lowest_trained=min(lowest, self._lowest(trained)),
            below=torch.tensor(self._depths) < lowest,
            count=count,
            divisor=count if passes.divisor is None else passes.divisor,
        )
        # Where sequences of the next step ride along, its arms must be known; on every rank, whichever has some.
        if self.rides and count == 1 and (self.reduce is not None or passes.riding is not None):
            step.next_mask = self.sampler.draw_ahead().mask
        if self.ascent.stale and self.config.is_perturbed:
            self._perturber.of_memory(step)
        self._tell_alone(step, passes)
        self._current = step
        return step

    def _tell_alone(self, step: Step, passes: Passes) -> None:
        """Tell that nothing rides along where a riding ascent meets two steps in a row without a neighbour.

        One alone may be an epoch's last step after one that was skipped.
        """
        rides = bool(self.runner.pairs) and passes.riding is not None
        alone = self.ascent.rides and step.perturbation is None and not rides
        if alone and self._alone:
            why = (
                "no step brings sequences of the next one (Passes.riding), nor can SLSAM.update, which sees one batch"
            )
            self.fallbacks.add(NOT_RIDING, why, SMALL_PASS)
        self._alone = alone

    def _settle_order(self, passes: Passes) -> None:
        """Set the depth of arms by what runs behind the blocks: seen in a pass to spare, or else in the last step."""
        if not self._order.unsure:
            return
        if passes.forward_only is not None:
            with self._order.watched():
                passes.forward_only()
            rng.restore(self._random_before)
        if not self._order.settle(self.reduce, self.runner.parameters[0].device):
            return
        if isinstance(self.arms, Arms):
            self.arms.place_again()
        self._depths = _depths(self.arms)
        drawn_so_far = self.sampler.scheme.state_dict()
        self.sampler.scheme = build_scheme(self.config, [arm.depth for arm in self.arms])
        self.sampler.scheme.load_state_dict(drawn_so_far)
        self.runner.horizon = self._horizons()

    @property
    def horizon(self) -> Horizons | None:
        """What cuts the passes; `None` where they run whole."""
        return self.runner.horizon

    def _horizons(self) -> Horizons | None:
        """Return what cuts the passes; `None` where there is nothing to cut at, or ranks must run the same passes."""
        layout = self.arms.layout if isinstance(self.arms, Arms) else None
        if layout is None or not layout.stacks or self._shards is not None:
            return None
        return Horizons(layout, self.config.hidden_state_cache_limit_mib * 2**20, self.fallbacks)

    def _lowest(self, arms: torch.Tensor) -> int:
        """Return the depth of the lowest arm in a mask, shape `(L,)`."""
        return min(depth for depth, on in zip(self._depths, arms.tolist(), strict=True) if on)

    def _draw(self, thawed: torch.Tensor) -> Draw:
        """Draw arms of which at least one is not frozen."""
        free = thawed.tolist()
        if not any(free):
            raise ValueError(
                "every adapter parameter is frozen (requires_grad=False), so that there is nothing to train."
            )
        for _ in range(REDRAWS):
            draw = self.sampler.draw()
            if all(free):
                return draw
            if bool((draw.mask & thawed).any()):
                return draw._replace(mask=draw.mask & thawed)
        return draw._replace(mask=thawed)

    def _check_passes(self, passes: Passes, count: int) -> None:
        """Refuse micro-batches that the ascent cannot be made of."""
        if self.config.ascent == "partial" and self.config.is_perturbed and count == 1:
            if passes.cut is None and passes.sequences is None and not passes.whole:
                raise ValueError(
                    "ascent='partial' takes the ascent gradient from a part of the batch: pass ascent_closure, or "
                    "several micro-batches, or use ascent='two_pass'."
                )

    def _finish(self, step: Step) -> None:
        """Read the step's numbers once, then learn from them, or skip the step if one is not finite."""
        scale = self.loss_scale() if self.loss_scale is not None else None
        numbers = self._numbers(step, scale)
        if not numbers.finite and step.lone is not None and scale is None:  # a gradient scaler must see it itself
            numbers = self._without_riding(step, scale)
        if not float(numbers.riding_norm) > 0:  # nothing rode along
            step.riding = {}
        self.loss = float(numbers.ascent_loss if self.ascent.exact else numbers.descent_loss)
        # The sampler learns from the arms whose gradient was seen, unless the step is void.
        seen, self.norms = self._seen(step, numbers)
        self.drawn = step.draw.probabilities
        idle = self._is_idle(numbers)
        if idle:  # nothing that was drawn takes part in the loss
            self._skip_idle()
        elif not numbers.finite:
            self._skip(numbers)
        else:
            self.sampler.learn(step.draw, seen, self.norms)
            self.ascent.finish(step)
        step.uncut = self.runner.runs_whole(step)
        # The metrics count a skipped step among those skipped in a row; only a good one ends the row.
        self.metrics = step_metrics(self, step, numbers)
        if numbers.finite and not idle:
            self.skipped_in_a_row = 0
        self._watch.see(self.metrics, stale=step.rode_losses is not None)
        # The step is complete: what belongs to it alone goes, what the next one needs stays.
        self._remember(step, numbers.finite, scale)
        self.active = step.mask
        self.steps += 1
        self._current = None
        self._before = {}
        self._release()

    def _seen(self, step: Step, numbers: StepNumbers) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which arms' norms the sampler learns from, and the norms; both of shape `(L,)`.

        Where every arm is trained, its descent gradient is seen in every step; the paper's rule keeps to the ascent.
        """
        if self.config.descent == "all" and self.config.bandit != "paper":
            return step.trained, numbers.descent_norms
        if step.ascent_squared is not None and not self.ascent.stale and not self.ascent.forwards:
            return step.mask, numbers.ascent_norms
        return step.mask, numbers.descent_norms * step.mask

    def _numbers(self, step: Step, scale: torch.Tensor | None) -> StepNumbers:
        """Gather the step's numbers on the device and return them on the host."""
        losses = step.losses(self.runner.parameters[0].device)
        gradients = average_descent(self.reduce, self.runner, step, losses)
        with torch.no_grad():
            self.ascent.complete(step, gradients)
        for parameter, gradient in zip(self.runner.parameters, gradients, strict=True):
            # A fused optimizer takes wrong steps on others, without an error.
            if gradient is not None and not is_sharded(parameter):
                parameter.grad = gradient.contiguous()
        squared = self._norms.squared(gradients, self.runner.device_of(gradients))
        nothing = squared.new_full((), math.nan)
        unit = (nothing if step.seen_loss is None else self._perturber.share(step, squared)).to(losses.device)
        seen, before = step.rode_losses or (losses[2] * unit, losses[1] * unit)
        factor = torch.ones((), device=squared.device) if scale is None else scale.reshape(()).to(squared.device)
        gathered = StepNumbers(
            ascent_squared=squared / factor.square() if step.ascent_squared is None else step.ascent_squared,
            descent_squared=squared,
            riding_norm=joint_norm(step.riding.values(), squared.device),
            rho=nothing if step.rho is None else step.rho,
            slope=nothing if step.slope is None else step.slope,
            seen_loss=seen,
            part_loss=before,
            descent_loss=losses[0],
            ascent_loss=losses[1],
            loss_scale=factor,
        )
        return StepNumbers.unpacked(self._read(gathered.packed()), len(self.arms))

    def _read(self, values: torch.Tensor) -> torch.Tensor:
        """Copy the step's numbers to the host: the one synchronisation of a step."""
        return values.to("cpu", torch.float64)

    def _without_riding(self, step: Step, scale: torch.Tensor | None) -> StepNumbers:
        """Do the descent again without the sequences that rode along: a NaN of theirs reaches everything."""
        pending = step.lone
        assert pending is not None
        self.runner.clear()
        step.lone, step.next_mask, step.riding, step.descent_loss = None, None, {}, None
        rng.restore(pending.state)
        self.runner.descend(step, Pending(replace(pending.passes, riding=None), pending.state), logged=False)
        return self._numbers(step, scale)

    def _is_idle(self, numbers: StepNumbers) -> bool:
        """Whether nothing that was drawn takes part in the loss; ranks send zeros then."""
        nowhere = self.reduce is not None or all(p.grad is None for p in self.runner.parameters)
        return nowhere and float(numbers.descent_squared.sum()) == 0.0

    def _skip_idle(self) -> None:
        """Make a step void in which no drawn arm has a gradient. It says nothing about divergence."""
        self.skipped += 1
        self.idle = True
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
        state.skip_step(self, self._before)
        norm = float(numbers.descent_squared.sum().sqrt())
        if self.loss_scale is None or self.loss_scale() is None:
            self.runner.clear()  # no gradient: the optimizer changes nothing
        elif math.isfinite(norm):  # a gradient scaler must see for itself that it is void
            self.runner.void()
        if self.skipped_in_a_row > self.config.max_skipped_steps:
            raise DivergedError(
                f"{self.skipped_in_a_row} steps in a row had a NaN or infinite loss or gradient (last: loss "
                f"{float(numbers.ascent_loss):g}, at w + e {float(numbers.descent_loss):g}, descent gradient norm "
                f"{norm:g}); lower the learning rate or rho, or raise max_skipped_steps."
            )

    def _remember(self, step: Step, finite: bool, scale: torch.Tensor | None) -> None:
        """Keep the gradients that the next step's ascent is made of."""
        trained = self.runner.members(step.trained) if finite else []
        descent = {i: local(g) for i in trained if (g := self.runner.parameters[i].grad) is not None}
        self.ascent.keep(self.memory, descent, step.riding if finite else {}, scale)

    def _abort(self) -> None:
        """Go back to before the step."""
        self._current = None
        self._release()
        self.runner.clear()
        if self._before:
            state.abort_step(self, self._before)
            self._before = {}

    def _release(self) -> None:
        if self.horizon is not None:
            self.horizon.release()

    def state_dict(self) -> dict[str, Any]:
        """Return everything later steps depend on.

        Plain values under `"arms"`, `"config"`, `"steps"`, `"skipped"` and `"skipped_in_a_row"`, tensors under every
        other key.

        Raises:
            ValueError: a rule that is an object has been handed to another `SLSAM` since.
        """
        self._ownership.check()
        return state.collect(self)

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; nothing changes if it does not fit.

        Raises:
            ValueError: the state belongs to other arms; the message names the first difference. Or a rule that is an
                object has been handed to another `SLSAM` since.
            KeyError: it is incomplete.
        """
        self._ownership.check()
        state.check_arms(saved["arms"], self.arms)
        before = state.collect(self)
        try:
            state.restore(self, saved)
        except BaseException:
            state.restore(self, before)
            raise


def _depths(arms: Sequence[Arm]) -> list[int]:
    """Return the arms' depths; -1 where there are no blocks."""
    return [-1 if arm.depth is None else arm.depth for arm in arms]
