"""`SLSAMTrainer` is TRL's `SFTTrainer` with one argument more."""

import copy
import logging
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from trl import SFTTrainer

from slsam_peft.algorithm.arms import arms_of
from slsam_peft.algorithm.fallbacks import Fallbacks
from slsam_peft.algorithm.passes import NOT_RIDING, SMALL_PASS
from slsam_peft.algorithm.slsam import SLSAM, tell_filled_in
from slsam_peft.config import RECORD_NAME, SLSAMConfig
from slsam_peft.cost.expected import ExpectedCost
from slsam_peft.data.tables import is_table
from slsam_peft.models.bnb_cpu import keep_trainable
from slsam_peft.models.foresight import counts_in_part
from slsam_peft.presets import RIDING
from slsam_peft.saving.card import describe
from slsam_peft.saving.checkpoint import FILE_NAME, StateMismatchError, load_state, save_state
from slsam_peft.saving.hashes import HASHES_NAME, write_hashes
from slsam_peft.saving.record import write_record
from slsam_peft.saving.recorded import recorded_fallbacks
from slsam_peft.saving.resume import STATE_NAMES, intact_checkpoint
from slsam_peft.saving.same_run import (
    check_same_optimizer,
    check_same_run,
    check_steps_left,
    keys_of,
    warn_of_earlier_runs,
)
from slsam_peft.saving.trace_data import FILE_NAME as TRACE_NAME
from slsam_peft.saving.trace_file import TraceFile, recorded_until
from slsam_peft.trainer.advice import advise
from slsam_peft.trainer.answers import check_answers
from slsam_peft.trainer.batches import Lookahead, batch_shape
from slsam_peft.trainer.costing import StepCost, cost_model_of
from slsam_peft.trainer.distributed import average_over_ranks, has_ranks, of_first_rank, wait_for_ranks
from slsam_peft.trainer.factors import factors_of
from slsam_peft.trainer.paper import name_on_cards
from slsam_peft.trainer.passes import TrainerPasses
from slsam_peft.trainer.precision import float32_adapters, restore_float32, same_dtypes, warn_if_low_precision
from slsam_peft.trainer.rates import LearningRates, check_rates
from slsam_peft.trainer.riding import has_own_loss, lora_pairs, not_pairs, why_not
from slsam_peft.trainer.sharded import check_resumed, check_sharding, is_fsdp2
from slsam_peft.trainer.support import (
    check_optimizer,
    check_quantized,
    check_reference,
    check_sequences,
    check_trainer,
    held,
    may_be_trained,
    outside,
    refuse_thawed,
)
from slsam_peft.trainer.token_losses import TokenLosses

ASSUMED_LENGTH = 512  # tokens, until the first batch shows; the ratio of costs hardly depends on it

logger = logging.getLogger(__name__)

_Base: Any = object  # whichever trainer comes after the mixin


class _TrainingSpan(TrainerCallback):
    """Builds the arms when training starts: only then is it settled what is trained. Ends the trace with it."""

    def __init__(self, trainer: "SLSAMMixin") -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._begin_training()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._keep_loss_scale()

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._push_record()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._end_training()


class SLSAMMixin(_Base):
    """Sparse-layer sharpness-aware minimisation (arXiv 2602.09395) for a TRL or transformers trainer.

    Put it before the trainer: `class SLSAMDPOTrainer(SLSAMMixin, DPOTrainer): pass`. The one training method it
    overrides is `training_step`; `get_batch_samples` looks a batch ahead for look-ahead ascents;
    `_save_optimizer_and_scheduler` and `_load_optimizer_and_scheduler` carry its state in checkpoints;
    `_load_from_checkpoint` and `_load_best_model` keep the adapter's precision, and the best model's sampler comes
    with it; `train`, `_run_epoch`, `_save_checkpoint` and `_save_rng_state` see to it that training goes on from
    intact checkpoints and ends with its last step; `_save` writes `slsam.json` beside the adapter, see
    `slsam_peft.saving.record`, and `_push_from_checkpoint` lets it come along.

    Args:
        slsam_config (`SLSAMConfig`, *optional*): Settings; the defaults where it is missing.
        *args, **kwargs: The trainer's own.

    Attributes:
        slsam (`SLSAM`): The algorithm, made anew when training starts: what is set on an earlier one is not heeded.
        slsam_fallbacks (`Fallbacks`): What has run otherwise than meant so far; it stands in `slsam.json`, too.

    Raises:
        ValueError: a set-up that is not supported (DeepSpeed, FSDP 1, torch.compile, GRPO, noise on weights that are
            the reference, too); a base whose quantised layers pass no gradient on; no trainable parameter; an
            optimizer that lacks some arms, or that makes its own learning rate where the rule moves by it. All before
            the first step.
    """

    def __init__(self, *args: Any, slsam_config: SLSAMConfig | None = None, **kwargs: Any) -> None:
        if slsam_config is not None and not isinstance(slsam_config, SLSAMConfig):
            raise TypeError(f"slsam_config={slsam_config!r} must be an SLSAMConfig.")
        slsam_config = slsam_config or SLSAMConfig()
        tell_filled_in(slsam_config)
        self.slsam_config = slsam_config.resolved
        # TRL casts the adapter of a quantized base while it builds the trainer: copies go around that.
        model = kwargs.get("model", args[0] if args else None)
        before = float32_adapters(model) if self.slsam_config.adapter_dtype == "float32" else {}
        super().__init__(*args, **kwargs)
        check_trainer(self)
        check_reference(self, self.slsam_config)
        check_sharding(self, self.slsam_config)
        check_quantized(self.model)
        check_sequences(self, self.slsam_config)
        named = self.slsam_config.ascent
        if named in RIDING and self.slsam_config.is_perturbed and (reason := why_not(self)):
            raise ValueError(f"ascent={named!r} cannot be used here: {reason}. Use ascent='auto', or 'partial'.")
        keep_trainable(self.model)
        if self.slsam_config.adapter_dtype == "float32":
            restore_float32(self.model, before)
        warn_if_low_precision(self.model)
        self.slsam_fallbacks = Fallbacks(logger)
        # Set when training starts, or when a checkpoint is loaded.
        self._slsam: SLSAM | None = None
        self._slsam_batches: Lookahead | None = None
        self._slsam_passes: TrainerPasses | None = None
        self._slsam_goes_on = False
        self._slsam_restored = False
        self._slsam_unsolved = False
        self._slsam_index = 0
        self._slsam_scale: torch.Tensor | None = None
        self._slsam_outside: list[tuple[str, nn.Parameter]] = []
        self._slsam_candidates = may_be_trained(self.model)
        self._slsam_checkpoint: str | None = None
        self._slsam_pushed: str | None = None
        self._slsam_trace: TraceFile | None = None
        self.slsam_arms = arms_of(self.model, self.slsam_config.granularity)
        # Model cards: PEFT's takes its tags from the model, TRL's from the trainer.
        tags = describe(self.slsam_config)
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(tags)
        if hasattr(self, "_tag_names"):
            self._tag_names = [*self._tag_names, *tags]
        name_on_cards(self, self.slsam_config)
        self.add_callback(_TrainingSpan(self))

    @property
    def slsam(self) -> SLSAM:
        """The algorithm: its probabilities, active set and metrics."""
        if self._slsam is None:
            self._slsam = self._build_slsam()
        return self._slsam

    def _build_slsam(self, shapes: list[tuple[int, int]] | None = None) -> SLSAM:
        config = self.slsam_config
        # What a callback has frozen for now belongs to an arm.
        with held(self.optimizer, self.model, self._slsam_candidates):
            self.slsam_arms = arms_of(self.model, config.granularity)
            self._slsam_outside = outside(self.model, self.slsam_arms)
            pairs, factors = lora_pairs(self.model) if self._may_ride else [], factors_of(self.model)
            model = cost_model_of(self, self.slsam_arms, config)
        if is_fsdp2(self):  # every pass runs whole, which the model does not know
            model = None
        self._slsam_cost = None if model is None else StepCost(model, self.slsam_arms, config)
        fraction = None
        if model is not None and (budget := config.cost_budget) is not None:
            shapes = shapes or [(self.args.per_device_train_batch_size, ASSUMED_LENGTH)]
            fraction = ExpectedCost(model, self.slsam_arms, config, shapes).solve(budget)
        slsam = SLSAM(
            self.slsam_arms,
            config,
            fraction=fraction,
            cost=self._slsam_cost,
            pairs=pairs,
            factors=factors,
            fallbacks=self.slsam_fallbacks,
        )
        if model is not None and (estimate := counts_in_part(self.model, model.decoder.block_names[0])):
            self.slsam_fallbacks.add(*estimate)
        may_ride = config.ascent == "auto" or slsam.ascent.rides
        if may_ride and config.is_perturbed and not slsam.runner.pairs:
            self.slsam_fallbacks.add(NOT_RIDING, why_not(self) or not_pairs(slsam.arms, pairs), SMALL_PASS)
        if has_ranks() and slsam.reduce is None:  # gradients of sharded parameters come averaged
            slsam.reduce = average_over_ranks
        slsam.loss_scale = self._loss_scale
        slsam.learning_rate = LearningRates(self)
        slsam.progress = lambda: self.state.global_step / max(1, self.state.max_steps)
        return slsam

    @property
    def _may_ride(self) -> bool:
        config = self.slsam_config
        ascent: Any = config.ascent
        wanted = ascent in (*RIDING, "auto") if isinstance(ascent, str) else bool(getattr(ascent, "rides", False))
        return wanted and config.is_perturbed and why_not(self) is None

    def _begin_training(self) -> None:
        if not self._slsam_restored:
            self._slsam = self._build_slsam()
        # A budget is solved for the batches that really come, and stays as solved when training is resumed.
        self._slsam_unsolved = self.slsam_config.cost_budget is not None and not self._slsam_restored
        self._slsam_goes_on = self._slsam_restored and not self.args.ignore_data_skip
        self._slsam_restored = False
        self._slsam_index = 0
        check_optimizer(self, self.slsam.arms)
        if self.slsam.ascent.paced:
            check_rates(self.optimizer)
        self._slsam_passes = self._make_passes()
        self._slsam_trace = self._open_trace()
        self._slsam_checkpoint = None
        advise(self, self.slsam)

    def _make_passes(self) -> TrainerPasses:
        losses = None
        if self.slsam_config.is_perturbed and has_own_loss(self):
            losses = TokenLosses(self.model, str(self.args.loss_type))
        return TrainerPasses(self, super().training_step, self.slsam.ascent, losses, self.slsam_fallbacks)

    def _end_training(self) -> None:
        if self._slsam_trace is not None:
            self._slsam_trace.finish()
        self._slsam_passes = None

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

    def _keep_loss_scale(self) -> None:
        """Undo what a gradient scaler made of an idle step: it takes one without a gradient for an overflow."""
        if self._slsam_scale is not None and (scale := self._loss_scale()) is not None:
            scale.copy_(self._slsam_scale)
        self._slsam_scale = None

    def get_batch_samples(self, epoch_iterator: Iterator, *args: Any, **kwargs: Any) -> Any:
        """Take a step's batches from the epoch, as the trainer does; for a look-ahead ascent see the next one."""
        if not self.slsam.rides and self._slsam_batches is None:
            return super().get_batch_samples(epoch_iterator, *args, **kwargs)
        if self._slsam_batches is None:
            self._slsam_batches = Lookahead(epoch_iterator)
            if not self._slsam_goes_on:  # what was kept is of a batch that does not come
                self.slsam.memory.replace({})
            self._slsam_goes_on = False
        return super().get_batch_samples(self._slsam_batches, *args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run this micro-batch's passes; with the last one of a step `.grad` holds the descent gradient.

        The only change to the trainer's `training_step` is how often, on what and at which weights it runs. Its
        arguments and result are unchanged; the result is the loss of this step's own tokens: at w where the ascent is
        made by the whole batch, at w + e otherwise.
        """
        # What an evaluation has put in the place of the weights (schedule-free optimizers) goes before w is read.
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        index, count = self._slsam_index, self.current_gradient_accumulation_steps
        self._slsam_index = (index + 1) % count
        self._see_shape(inputs, index, count)
        if index == 0:
            refuse_thawed(self._slsam_outside)
        if self._slsam_passes is None:
            self._slsam_passes = self._make_passes()
        coming = self._slsam_batches.coming if self._slsam_batches is not None and count == 1 else None
        try:
            passes = self._slsam_passes.of(
                model, inputs, num_items_in_batch, coming if self.slsam.runner.pairs else None
            )
            if self._slsam_cost is not None:
                joined = self._slsam_passes.joined
                self._slsam_cost.joined = None if joined is None else batch_shape(joined.inputs)
            with self._own_exchange(model), self._in_hand():
                loss = self.slsam.accumulate(passes, index, count)
            if count == 1:
                self._slsam_passes.uncount_riding(on_all_ranks=has_ranks() and self.slsam.rides)
        except BaseException:
            self._slsam_index = 0
            raise
        if index == count - 1:
            self._log_step()
            if self.slsam.idle and (scale := self._loss_scale()) is not None:
                self._slsam_scale = scale.clone()
            if self._slsam_trace is not None:
                self._slsam_trace.see(self.state.global_step + 1, self.slsam)
        return loss

    def _own_exchange(self, model: Any) -> AbstractContextManager[None]:
        """Return the context in which gradients are averaged once, over active arms only; by FSDP2 in every pass."""
        if not is_fsdp2(self):
            return self.accelerator.no_sync(model)
        model.set_requires_gradient_sync(True)  # the trainer has it wait for the last micro-batch
        return nullcontext()

    def _in_hand(self) -> AbstractContextManager[None]:
        """Return the context in which the loader is where this step's batch is, not where the next one is."""
        if self._slsam_batches is None:
            return nullcontext()
        return self._slsam_batches.in_hand(self.accelerator.gradient_state.active_dataloader)

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
            ValueError: the checkpoint asked for was cut short while it was saved, or `True` and there is none; it is
                of another base, adapter, optimizer or run (see `slsam_peft.saving.same_run`); or FSDP2 shards the
                model in a way that cannot be resumed.
        """
        if resume_from_checkpoint:
            check_resumed(self, self.slsam_config)
            sampler = not self.slsam_config.accept_state_mismatch
            resume_from_checkpoint = intact_checkpoint(
                resume_from_checkpoint, str(self.args.output_dir), sampler=sampler
            )
            check_same_run(self, resume_from_checkpoint)
        elif self.args.should_save and self.args.save_strategy != "no":
            warn_of_earlier_runs(str(self.args.output_dir))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # The trainer looks for the last step after each one: resumed behind it, it would make one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            self._slsam_index = 0  # a callback may have ended the last epoch within a step
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

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._slsam_pushed = checkpoint_folder
        try:
            super()._push_from_checkpoint(checkpoint_folder)
        finally:
            self._slsam_pushed = None

    def _push_record(self) -> None:
        """Let the record of a checkpoint that is pushed lie beside its adapter, as the trainer's copies do."""
        record = None if self._slsam_pushed is None else Path(self._slsam_pushed, RECORD_NAME)
        if record is not None and record.is_file():
            shutil.copy(record, Path(str(self.args.output_dir), RECORD_NAME))

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
        restored = False
        if checkpoint is not None:
            self._slsam = self._build_slsam()
            self.slsam_fallbacks.recall(recorded_fallbacks(checkpoint))
            try:
                load_state(self._slsam, checkpoint)
            except StateMismatchError as error:
                if not self.slsam_config.accept_state_mismatch:
                    raise
                logger.warning("The sampler starts afresh: %s", error)
            else:
                restored = True
        before = keys_of(self.optimizer)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            check_steps_left(self.state, checkpoint)
            check_same_optimizer(before, self.optimizer, self.args.optim, checkpoint)
        if restored:  # nothing has been refused
            self._slsam_checkpoint, self._slsam_restored = checkpoint, True

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
    """TRL's `SFTTrainer` with SL-SAM: replace the class, keep everything else.

    Args:
        slsam_config (`SLSAMConfig`, *optional*): Settings of SL-SAM; `method="auto"` where they are missing. All other
            arguments are `SFTTrainer`'s.

    Raises:
        ValueError: as `SLSAMMixin`; and rows of which every answer is cut off by `max_length`.

    Example:

    ```python
    trainer = SLSAMTrainer(
        model, args=SFTConfig(output_dir="out"), train_dataset=dataset, peft_config=LoraConfig(),
    )
    trainer.train()
    trainer.slsam.probabilities
    ```
    """

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """Make sequences of rows as TRL does, and say of how many nothing is left to learn within `max_length`.

        Raises:
            ValueError: of none anything is; the message names the length that would do.
        """
        cut = args.max_length is not None and (not packing or args.packing_strategy == "bfd")
        if cut and is_table(dataset):
            whole = copy.copy(args)
            whole.max_length, whole.shuffle_dataset = None, False
            dataset = super()._prepare_dataset(dataset, processing_class, whole, False, formatting_func, dataset_name)
            check_answers(dataset, args, dataset_name, packing=packing)
            formatting_func = None  # TRL takes rows with tokens for ready: it cuts or packs them, and nothing else
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
