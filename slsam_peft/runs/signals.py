"""Ends training on Ctrl-C or SIGTERM after the step in progress, with a checkpoint where checkpoints are saved."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from slsam_peft.errors import Interrupted
from slsam_peft.trainer.distributed import has_ranks

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopOnSignal(TrainerCallback):
    """Ends training when a signal asks for it.

    The first SIGINT or SIGTERM lets the step in progress finish; a checkpoint is saved unless `save_strategy` is
    `"no"` (`enable_jit_checkpoint` asks for one as well). A second signal ends at once, and so does the first one
    where several ranks train: the others would wait for this one's gradients.

    Example:

    ```python
    stop = StopOnSignal()
    trainer.add_callback(stop)
    with stop.listening():
        trainer.train()
    stop.raise_if_stopped()
    ```

    Attributes:
        received (`int` or `None`): The signal that ended training.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._saved = ""
        self._inside = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside the context; outside the main thread Python allows no handler."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def raise_if_stopped(self) -> None:
        """Raise once training has returned.

        Raises:
            Interrupted: a signal ended it.
        """
        if self.received is not None:
            raise Interrupted(self.received, self._saved)

    def _receive(self, number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        if self.received is not None or not self._inside or has_ranks():
            raise Interrupted(number, f"{name}: stopped at once.")
        self.received = number
        logger.warning("%s: training ends after this step. The same signal again ends it at once.", name)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Note that steps have begun."""
        self._inside = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End training, with a checkpoint, if a signal has come."""
        if self.received is None:
            return
        if state.global_step >= state.max_steps:  # it has come too late to stop anything
            self.received = None
            return
        control.should_training_stop = True
        control.should_save = args.save_strategy != "no" or args.enable_jit_checkpoint
        self._saved = f"{signal.Signals(self.received).name}: stopped after step {state.global_step}. "
        if control.should_save:
            self._saved += (
                f"Checkpoint: {args.output_dir}/checkpoint-{state.global_step}; go on with the same command and "
                "--resume_from_checkpoint true."
            )
        else:
            self._saved += "No checkpoint was saved (save_strategy=no)."

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Note that steps have ended."""
        self._inside = False
