"""`SLSAMTrainer` is TRL's `SFTTrainer` with one argument more."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from trl import SFTTrainer

from slsam_peft.algorithm.arms import arms_of
from slsam_peft.algorithm.passes import Passes
from slsam_peft.algorithm.slsam import SLSAM
from slsam_peft.config import SLSAMConfig
from slsam_peft.cost.expected import ExpectedCost
from slsam_peft.models.bnb_cpu import keep_trainable
from slsam_peft.saving.card import describe
from slsam_peft.saving.checkpoint import FILE_NAME, StateMismatchError, load_state, save_state
from slsam_peft.saving.hashes import HASHES_NAME, write_hashes
from slsam_peft.saving.record import write_record
from slsam_peft.saving.resume import STATE_NAMES, intact_checkpoint
from slsam_peft.saving.trace_data import FILE_NAME as TRACE_NAME
from slsam_peft.saving.trace_file import TraceFile, recorded_until
from slsam_peft.trainer.batches import Joined, Lookahead, ascent_part, batch_shape, join, sequences_per_example
from slsam_peft.trainer.costing import StepCost, cost_model_of
from slsam_peft.trainer.distributed import average_over_ranks, has_ranks, of_first_rank, wait_for_ranks
from slsam_peft.trainer.muting import forward_only, muted
from slsam_peft.trainer.paper import name_on_cards
from slsam_peft.trainer.precision import float32_adapters, restore_float32, same_dtypes, warn_if_low_precision
from slsam_peft.trainer.support import check_ahead, check_optimizer, check_trainer

ASSUMED_LENGTH = 512  # tokens, until the first batch shows; the ratio of costs hardly depends on it

logger = logging.getLogger(__name__)

_Base: Any = object  # whichever trainer comes after the mixin


class _TrainingSpan(TrainerCallback):
    """Builds the arms when training starts: only then is it settled what is trained. Ends the trace with it."""

    def __init__(self, trainer: "SLSAMMixin") -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._begin_training()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._slsam_trace is not None:
            self.trainer._slsam_trace.finish()


class SLSAMMixin(_Base):
    """Sparse-layer sharpness-aware minimisation (arXiv 2602.09395) for a TRL or transformers trainer.

    Put it before the trainer: `class SLSAMDPOTrainer(SLSAMMixin, DPOTrainer): pass`. The one training method it
    overrides is `training_step`; `get_batch_samples` looks a batch ahead for `ascent="ahead"`;
    `_save_optimizer_and_scheduler` and `_load_optimizer_and_scheduler` carry its state in checkpoints;
    `_load_from_checkpoint` and `_load_best_model` keep the adapter's precision, and the best model's sampler comes
    with it; `train`, `_run_epoch`, `_save_checkpoint` and `_save_rng_state` see to it that training goes on from
    intact checkpoints and ends with its last step; `_save` writes `slsam.json` beside the adapter, see
    `slsam_peft.saving.record`.

    Args:
        slsam_config (`SLSAMConfig`, *optional*): Settings; the defaults where it is missing.
        *args, **kwargs: The trainer's own.

    Attributes:
        slsam (`SLSAM`): The algorithm; set when training starts.

    Raises:
        ValueError: a set-up that is not supported (DeepSpeed, FSDP, torch.compile, GRPO); no trainable parameter; an
            optimizer that lacks some arms. All before the first step.
    """

    def __init__(self, *args: Any, slsam_config: SLSAMConfig | None = None, **kwargs: Any) -> None:
        if slsam_config is not None and not isinstance(slsam_config, SLSAMConfig):
            raise TypeError(f"slsam_config={slsam_config!r} must be an SLSAMConfig.")
        self.slsam_config = slsam_config or SLSAMConfig()
        # TRL casts the adapter of a quantized base while it builds the trainer: copies go around that.
        model = kwargs.get("model", args[0] if args else None)
        before = float32_adapters(model) if self.slsam_config.adapter_dtype == "float32" else {}
        super().__init__(*args, **kwargs)
        check_trainer(self)
        if self._looks_ahead:
            check_ahead(self)
        keep_trainable(self.model)
        if self.slsam_config.adapter_dtype == "float32":
            restore_float32(self.model, before)
        warn_if_low_precision(self.model)
        # Set when training starts, or when a checkpoint is loaded.
        self._slsam: SLSAM | None = None
        self._slsam_batches: Lookahead | None = None
        self._slsam_goes_on = False
        self._slsam_restored = False
        self._slsam_unsolved = False
        self._slsam_index = 0
        self._slsam_checkpoint: str | None = None
        self._slsam_trace: TraceFile | None = None
        self.slsam_arms = arms_of(self.model, self.slsam_config.granularity)
        # Model cards: PEFT's takes its tags from the model, TRL's from the trainer.
        tags = describe(self.slsam_config)
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(tags)
        if hasattr(self, "_tag_names"):
            self._tag_names = [*self._tag_names, *tags]
        name_on_cards(self)
        self.add_callback(_TrainingSpan(self))

    @property
    def slsam(self) -> SLSAM:
        """The algorithm: its probabilities, active set and metrics."""
        if self._slsam is None:
            self._slsam = self._build_slsam()
        return self._slsam

    def _build_slsam(self, shapes: list[tuple[int, int]] | None = None) -> SLSAM:
        self.slsam_arms = arms_of(self.model, self.slsam_config.granularity)
        model = cost_model_of(self, self.slsam_arms, self.slsam_config)
        self._slsam_cost = None if model is None else StepCost(model, self.slsam_arms, self.slsam_config)
        fraction = None
        if model is not None and (budget := self.slsam_config.cost_budget) is not None:
            shapes = shapes or [(self.args.per_device_train_batch_size, ASSUMED_LENGTH)]
            fraction = ExpectedCost(model, self.slsam_arms, self.slsam_config, shapes).solve(budget)
        slsam = SLSAM(self.slsam_arms, self.slsam_config, fraction=fraction, cost=self._slsam_cost)
        if has_ranks():
            slsam.reduce = average_over_ranks
        slsam.loss_scale = self._loss_scale
        return slsam

    def _begin_training(self) -> None:
        if not self._slsam_restored:
            self._slsam = self._build_slsam()
        # A budget is solved for the batches that really come, and stays as solved when training is resumed.
        self._slsam_unsolved = self.slsam_config.cost_budget is not None and not self._slsam_restored
        self._slsam_goes_on = self._slsam_restored and not self.args.ignore_data_skip
        self._slsam_restored = False
        self._slsam_index = 0
        check_optimizer(self.optimizer, self.slsam.arms)
        self._slsam_trace = self._open_trace()
        self._slsam_checkpoint = None

    def _open_trace(self) -> TraceFile | None:
        if not (self.slsam_config.trace and self.is_world_process_zero()):
            return None
        before, step = None, self.state.global_step
        if self._slsam_checkpoint is not None:
            before = recorded_until(self._slsam_checkpoint, self.slsam, step)
        return TraceFile(self.slsam, self.args.output_dir, self.state.max_steps, before)

    def _loss_scale(self) -> torch.Tensor | None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is None or not scaler.is_enabled():
            return None
        return getattr(scaler, "_scale", None)  # the tensor: `get_scale()` would wait for the device

    @property
    def _looks_ahead(self) -> bool:
        return self.slsam_config.ascent == "ahead" and self.slsam_config.rho > 0

    def get_batch_samples(self, epoch_iterator: Iterator, *args: Any, **kwargs: Any) -> Any:
        """Take a step's batches from the epoch, as the trainer does; with `ascent="ahead"` see the next one."""
        if not self._looks_ahead:
            return super().get_batch_samples(epoch_iterator, *args, **kwargs)
        if self._slsam_batches is None:
            self._slsam_batches = Lookahead(epoch_iterator)
            if not self._slsam_goes_on:  # the stale gradients are of a batch that does not come
                self.slsam.memory.replace({})
            self._slsam_goes_on = False
        return super().get_batch_samples(self._slsam_batches, *args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run this micro-batch's passes; with the last one of a step `.grad` holds the descent gradient.

        The only change to the trainer's `training_step` is how often, on what and at which weights it runs. Its
        arguments and result are unchanged; the result is the loss at w, and at w + e for `ascent="partial"` and
        `"remembered"`, which never compute it at w. For `"ahead"` it is the mean over this batch's tokens at w + e and
        those of the next one's sequences that ride along, at w.
        """
        index, count = self._slsam_index, self.current_gradient_accumulation_steps
        self._slsam_index = (index + 1) % count
        self._see_shape(inputs, index, count)
        try:
            with self.accelerator.no_sync(model):  # gradients are averaged once, over active arms only
                loss = self.slsam.accumulate(self._passes(model, inputs, num_items_in_batch), index, count)
        except BaseException:
            self._slsam_index = 0
            raise
        if index == count - 1:
            self._log_step()
            if self._slsam_trace is not None:
                self._slsam_trace.see(self.state.global_step + 1, self.slsam)
        return loss

    def _passes(self, model: nn.Module, inputs: dict[str, Any], num_items: torch.Tensor | int | None) -> Passes:
        """Return the ways in which the algorithm may run the trainer's own `training_step` on a micro-batch.

        A pass takes a fresh dictionary, since the trainer's loss may take entries out of the one it is given.
        """
        if self._looks_ahead:
            return self._look_ahead_passes(model, inputs, num_items)
        step = super().training_step

        def logged() -> torch.Tensor:
            return step(model, dict(inputs), num_items)

        def unlogged() -> torch.Tensor:
            with muted(self):
                return step(model, dict(inputs), num_items)

        def without_backward() -> torch.Tensor:
            with muted(self), forward_only(self):
                return step(model, dict(inputs), num_items)

        def part() -> torch.Tensor:
            some, share = ascent_part(inputs, self.slsam_config.ascent_fraction, sequences_per_example(self))
            # The part's loss is a mean over its own tokens.
            with muted(self):
                return step(model, some, None if num_items is None else num_items * share)

        return Passes(logged, unlogged, part, without_backward)

    def _look_ahead_passes(
        self, model: nn.Module, inputs: dict[str, Any], num_items: torch.Tensor | int | None
    ) -> Passes:
        """Return the one pass of `ascent="ahead"`: over this batch and, behind it, some sequences of the next one."""
        step = super().training_step
        coming = None if self._slsam_batches is None else self._slsam_batches.coming
        joined = join(inputs, coming, self.slsam_config.ascent_fraction)
        if self._slsam_cost is not None:
            self._slsam_cost.joined = batch_shape(joined.inputs)
        if coming is None and self.state.global_step == 0:
            logger.warning(
                "an epoch is a single batch: no sequences come after it, and ascent='ahead' trains as plain LoRA does."
            )

        def both() -> torch.Tensor:
            loss = step(model, dict(joined.inputs), num_items)
            self._take_off_tokens(joined)
            return loss * joined.own_share if joined.sequences[1] else loss

        return Passes(both, both, sequences=joined.sequences)

    def _take_off_tokens(self, joined: Joined) -> None:
        """Take the next batch's tokens off TRL's count of those trained on: their step is still to come."""
        self._total_train_tokens -= joined.tokens
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

    def _see_shape(self, inputs: dict[str, Any], index: int, count: int) -> None:
        if self._slsam_cost is None:
            return
        if self._slsam_unsolved:
            # Batches differ between ranks, and their probabilities must not.
            self._slsam, self._slsam_unsolved = self._build_slsam(of_first_rank([batch_shape(inputs)] * count)), False
        if index == 0:
            self._slsam_cost.shapes.clear()
        self._slsam_cost.shapes.append(batch_shape(inputs))

    def _log_step(self) -> None:
        """Hand the step's numbers, read already, to TRL's averages."""
        metrics = getattr(self, "_metrics", None)
        if metrics is None:
            return
        for name, value in self.slsam.metrics.items():
            if value == value:  # a gain without a gradient is NaN
                metrics["train"][f"slsam/{name}"].append(value)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            write_record(self, output_dir or self.args.output_dir)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the trainer does; with `resume_from_checkpoint=True` from the newest intact checkpoint.

        Raises:
            ValueError: the checkpoint asked for was cut short while it was saved, or `True` and there is none.
        """
        if resume_from_checkpoint:
            sampler = not self.slsam_config.accept_state_mismatch
            resume_from_checkpoint = intact_checkpoint(
                resume_from_checkpoint, str(self.args.output_dir), sampler=sampler
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # The trainer looks for the last step after each one: resumed behind it, it would make one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            try:
                super()._run_epoch(*args, **kwargs)
            finally:
                self._slsam_batches = None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # `trainer_state.json` is written last and vouches for the rest; an earlier run's must not.
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
            for name in (TRAINER_STATE_NAME, HASHES_NAME, *(STATE_NAMES if self.args.save_only_model else ())):
                (folder / name).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        wait_for_ranks()  # each has written its own: `trainer_state.json`, which comes next, vouches for all
        if self.args.should_save:
            write_hashes(Path(output_dir), frozenset({FILE_NAME, TRACE_NAME}))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            save_state(self.slsam, output_dir)
        if self._slsam_trace is not None:
            self._slsam_trace.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._slsam = self._build_slsam()
            try:
                load_state(self._slsam, checkpoint)
            except StateMismatchError as error:
                if not self.slsam_config.accept_state_mismatch:
                    raise
                logger.warning("The sampler starts afresh: %s", error)
            else:
                self._slsam_checkpoint, self._slsam_restored = checkpoint, True
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with same_dtypes(self.model):
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_best_model(self) -> None:
        with same_dtypes(self.model):
            super()._load_best_model()
        if self.args.save_only_model:
            return
        try:
            load_state(self.slsam, self.state.best_model_checkpoint)
        except StateMismatchError as error:  # all that was trained is there: no reason to end with an error
            logger.warning("The sampler stays that of the last step: %s", error)


class SLSAMTrainer(SLSAMMixin, SFTTrainer):
    """TRL's `SFTTrainer` with SL-SAM: replace the class, add `slsam_config`, keep everything else.

    Args:
        slsam_config (`SLSAMConfig`, *optional*): Settings of SL-SAM. All other arguments are `SFTTrainer`'s.

    Example:

    ```python
    trainer = SLSAMTrainer(
        model, args=SFTConfig(output_dir="out"), train_dataset=dataset, peft_config=LoraConfig(),
        slsam_config=SLSAMConfig(rho=0.05, active_fraction=0.2),
    )
    trainer.train()
    trainer.slsam.probabilities
    ```
    """
