# python recipes/count_operations.py
"""Count the operations of a step against plain `SFTTrainer` on the same sequences: what launches cost, not FLOPs.

Where a model is small or a batch is short, a GPU waits for the host, and a step costs as much as it launches. An
8-block Llama with LoRA on all linear layers is trained on the CPU, checkpointed, under bfloat16 autocast. Everything
between the start and the end of a step counts, optimizer included, except what only changes a tensor's shape or makes
one that is empty. What the sampler does with its L numbers on the host is counted apart, as is each read of a device's
number by the host.
"""

import argparse
import collections
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

from slsam_peft import SLSAMConfig, SLSAMTrainer
from slsam_peft.algorithm.sampler import Sampler
from slsam_peft.algorithm.slsam import SLSAM

WORDS, LENGTH, BLOCKS, STEPS = 400, 24, 8, 4

# They launch nothing: a tensor's shape changes, room is made for one, a name is noted for the profiler.
FREE = frozenset(
    "_local_scalar_dense _record_function_enter_new _record_function_exit _reshape_alias _unsafe_view alias "
    "as_strided chunk detach empty empty_like empty_strided expand is_pinned lift_fresh narrow new_empty "
    "new_empty_strided permute promote_types reshape resize_ select set_ slice split split_with_sizes squeeze t "
    "transpose unbind unsqueeze view".split()
)
READS = frozenset({"_local_scalar_dense", "equal", "is_nonzero"})
OF_THE_SAMPLER = ("draw", "draw_ahead", "learn", "state_dict")


@dataclass(frozen=True)
class Mode:
    """A way to train.

    Args:
        config (`SLSAMConfig` or `None`): Settings; plain `SFTTrainer` without.
        batch (`int`, *optional*, defaults to `4`): Sequences per micro-batch.
        accumulation (`int`, *optional*, defaults to `1`): Micro-batches per step.
        bar (`float`, *optional*): The most operations a step may have, in steps of `SFTTrainer`.
    """

    config: SLSAMConfig | None
    batch: int = 4
    accumulation: int = 1
    bar: float = 1.0


MODES = {
    "look-ahead, 4 + 1": Mode(SLSAMConfig(trace=False), bar=1.10),
    "sam": Mode(SLSAMConfig(method="sam", trace=False), bar=2.05),
    "remembered": Mode(SLSAMConfig(active_fraction=1.0, ascent="remembered", trace=False), bar=1.03),
    "one micro-batch of 8": Mode(SLSAMConfig(trace=False), batch=1, accumulation=8, bar=1.15),
}


@dataclass
class Counts:
    """Operations of one step, by name.

    Args:
        operations (`Counter`): Those that launch something.
        sampler (`int`): Those of the sampler.
        reads (`int`): Numbers that the host read.
    """

    operations: collections.Counter = field(default_factory=collections.Counter)
    sampler: int = 0
    reads: int = 0

    @property
    def total(self) -> int:
        """Operations, the sampler's left out."""
        return sum(self.operations.values())


class OperationCounter(TorchDispatchMode):
    """Counts the operations of steps.

    Attributes:
        steps (`list[Counts]`): One per step that has ended.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Counts] = []
        self._now: Counts | None = None
        self._in_sampler = False

    def begin(self) -> None:
        """Begin a step."""
        self._now = Counts()

    def end(self) -> None:
        """End it."""
        assert self._now is not None
        self.steps.append(self._now)
        self._now = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: D105
        result = func(*args, **(kwargs or {}))
        if self._now is not None:
            name = func.overloadpacket.__name__
            if self._in_sampler:
                self._now.sampler += name not in FREE
            else:
                self._now.reads += _reads(name, args)
                if name not in FREE:
                    self._now.operations[name] += 1
        return result

    @contextmanager
    def sampler_apart(self) -> Iterator[None]:
        """Count what the sampler does apart, inside the context."""
        methods = {name: self._apart(getattr(Sampler, name)) for name in OF_THE_SAMPLER}
        with (
            mock.patch.multiple(Sampler, **methods),
            mock.patch.object(SLSAM, "_read", self._noted(SLSAM._read)),
            mock.patch.object(torch.Tensor, "tolist", self._noted(torch.Tensor.tolist, _on_device)),
        ):
            yield

    def _noted(
        self, method: Callable[..., Any], where: Callable[[torch.Tensor], bool] = lambda _: True
    ) -> Callable[..., Any]:
        """Count as reads what copies to the host, of tensors that would lie on a device: here it is no operation."""

        def counted(*args: Any) -> Any:
            if self._now is not None and not self._in_sampler:
                self._now.reads += where(args[0])
            return method(*args)

        return counted

    def _apart(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            before, self._in_sampler = self._in_sampler, True
            try:
                return method(*args, **kwargs)
            finally:
                self._in_sampler = before

        return counted


def _reads(name: str, args: Any) -> bool:
    """Whether the host reads a device's number; float64 and masks are the host's own here, as they are on a GPU."""
    source = next((a for a in args if isinstance(a, torch.Tensor)), None)
    return name in READS and source is not None and _on_device(source)


def _on_device(tensor: torch.Tensor) -> bool:
    return tensor.dtype not in (torch.float64, torch.bool)


class _StepSpan(TrainerCallback):
    def __init__(self, counter: OperationCounter) -> None:
        self.counter = counter

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.counter.begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.counter.end()


def operations_of(mode: Mode, low_precision: bool = True, blocks: int = BLOCKS) -> Counts:
    """Return the counts of a step in the middle of a training.

    Args:
        mode (`Mode`): The mode.
        low_precision (`bool`, *optional*, defaults to `True`): Whether under bfloat16 autocast.
        blocks (`int`, *optional*, defaults to `8`): Of the model.
    """
    ours = {} if mode.config is None else {"slsam_config": mode.config}
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            folder,
            per_device_train_batch_size=mode.batch,
            gradient_accumulation_steps=mode.accumulation,
            max_steps=STEPS,
            max_length=2 * LENGTH,
            learning_rate=1e-3,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            bf16=low_precision,
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = (SLSAMTrainer if ours else SFTTrainer)(
            _model(blocks),
            args=args,
            train_dataset=_rows(mode.batch * mode.accumulation * (STEPS + 1)),
            processing_class=_tokenizer(),
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
            **ours,
        )
        counter = OperationCounter()
        trainer.add_callback(_StepSpan(counter))
        with counter.sampler_apart(), counter:
            trainer.train()
    return counter.steps[-2]  # the last step has no next batch to look ahead to


def _model(blocks: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=blocks, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, pad_token_id=1, bos_token_id=2, eos_token_id=2,
        )
    )  # fmt: skip


def _tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0", pad_token="w1", eos_token="w2")


def _rows(count: int) -> Dataset:
    ids = torch.randint(3, WORDS, (count, LENGTH), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"input_ids": ids.tolist()})


def main() -> int:
    """Print the table; return 1 where a mode is above its bar."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--float32", action="store_true", help="without autocast")
    parser.add_argument("--by_name", action="store_true", help="list the operations in which a step differs most")
    chosen = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    say = Console(highlight=False, soft_wrap=True, markup=False).print
    say("| mode | operations | plain SFTTrainer = 1 | bar | sampler's own | reads by the host (plain) |")
    say("|---|---|---|---|---|---|")
    above = False
    plain: dict[tuple[int, int], Counts] = {}
    for name, mode in MODES.items():
        shape = mode.batch, mode.accumulation
        if shape not in plain:
            plain[shape] = operations_of(Mode(None, *shape), not chosen.float32)
        counts, reference = operations_of(mode, not chosen.float32), plain[shape]
        ratio = counts.total / reference.total
        above |= ratio > mode.bar
        say(
            f"| {name} | {counts.total} | {ratio:.3f} | {mode.bar:.2f} | {counts.sampler} | "
            f"{counts.reads} ({reference.reads}) |"
        )
        if chosen.by_name:
            more = counts.operations.copy()
            more.subtract(reference.operations)
            say(f"  {dict(more.most_common(25))}")
    return int(above)


if __name__ == "__main__":
    sys.exit(main())
