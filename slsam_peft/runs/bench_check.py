r"""Checks on the user's own machine that each mode computes what it should: is there really an e in $w + e$?

Three steps of a trainer run in each mode, at a learning rate of 0. In the second one, whose ascent look-ahead has made
in the first, the gradient that the optimizer is handed, $g'$, is compared with a slow reference: weights written in
place, one plain pass of TRL's trainer at a time, in the same precision, quantisation and kernels. Adapters are in
float32, as trainings have them by default: in bfloat16 much of an e is rounded away. A mode passes where

$$\|g' - g'_\text{ref}\| \le 0.3\, \|g'_\text{ref} - g_\text{ref}\|.$$

Without e, $g' = g$ and the left side is all of the right norm.
"""

import importlib.util
import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from slsam_peft.algorithm.radius import Length
from slsam_peft.config import SLSAMConfig
from slsam_peft.runs.bench import emulates_bfloat16, random_sequences
from slsam_peft.runs.unrecorded import unrecorded
from slsam_peft.trainer.advice import unadvised
from slsam_peft.trainer.muting import muted
from slsam_peft.trainer.riding import why_not
from slsam_peft.trainer.trainer import SLSAMTrainer

BOUND = 0.3  # of the change that e makes
STEPS, COMPARED = 3, 1  # the second step: its ascent is look-ahead's, and sequences ride along in it
CHANGE = 0.2  # of the gradient: what e should change; kernels of other shapes round 0.02 of it in bfloat16 on an H200
RADII = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # tried in order
FACTOR_SCALE = 0.02  # of LoRA's B, which begins at 0 and would leave A without a gradient

SWAP, STACK, IN_PLACE = "swap", "look-ahead stack", "in place"
WAYS = {
    SWAP: SLSAMConfig(method="auto", ascent="partial", rho=RADII[0], trace=False),
    STACK: SLSAMConfig(method="auto", rho=RADII[0], trace=False),
    IN_PLACE: SLSAMConfig(method="auto", ascent="partial", rho=RADII[0], trace=False),
}


@dataclass(frozen=True)
class Checked:
    """How far one mode is from the reference.

    Args:
        mode (`str`): Its name.
        deviation (`float` or `None`): |g' - g'_ref| / |g'_ref - g_ref|; `None` where the mode did not run.
        change (`float`): |g'_ref - g_ref| / |g_ref|.
        radius (`float`): Length of e.
        note (`str`): What else there is to know; empty where there is nothing.
    """

    mode: str
    deviation: float | None
    change: float
    radius: float
    note: str = ""

    @property
    def good(self) -> bool | None:
        """Whether the mode passes; `None` where it did not run."""
        return None if self.deviation is None else self.deviation <= BOUND


def run_check(
    model: Any,
    tokenizer: Any,
    *,
    lora_r: int = 16,
    batch: int = 2,
    length: int = 128,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Checked]:
    """Compare each mode with the reference.

    Args:
        model (`PreTrainedModel`): The base model, possibly quantised; gets an adapter on all linear layers.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        lora_r (`int`, *optional*, defaults to `16`): Rank.
        batch (`int`, *optional*, defaults to `2`): Sequences per step.
        length (`int`, *optional*, defaults to `128`): Tokens per sequence.
        tell (`Callable[[str], None]`, *optional*): Told what runs.

    Returns:
        `list[Checked]`: One per mode, in order.
    """
    peft_model = get_peft_model(model, LoraConfig(r=lora_r, lora_alpha=2 * lora_r, target_modules="all-linear"))
    sequences = random_sequences(tokenizer, batch * STEPS, length)
    checked = []
    with tempfile.TemporaryDirectory() as folder:
        for name, config in WAYS.items():
            tell(f"checking: {name}")
            trainer = _Probe(
                peft_model,
                args=_arguments(folder, batch),
                train_dataset=sequences,
                processing_class=tokenizer,
                slsam_config=config,
            )
            trainer.remove_callback(PrinterCallback)
            _fill_factors(peft_model)
            checked.append(trainer.check(name))
    return checked


def _arguments(folder: str, batch: int) -> SFTConfig:
    return SFTConfig(
        folder,
        per_device_train_batch_size=batch,
        max_steps=STEPS,
        learning_rate=0.0,
        max_grad_norm=0.0,
        max_length=None,
        bf16=torch.cuda.is_available() and not emulates_bfloat16(),
        shuffle_dataset=False,
        logging_strategy="no",
        **unrecorded(),
    )


def _fill_factors(model: nn.Module) -> None:
    """Give every trained factor that is 0 small random values, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * FACTOR_SCALE
                if not bool(parameter.any()):
                    parameter.copy_(noise)


class _Probe(SLSAMTrainer):
    """Trains and looks at the gradients of one step."""

    def check(self, mode: str) -> Checked:
        """Return how far a mode is from the reference, at the first radius whose e changes the gradient enough."""
        found = self._trained(mode, RADII[0])
        for radius in RADII[1:]:
            if found.deviation is None or found.change >= CHANGE:
                break
            found = self._trained(mode, radius)
        return found

    def _trained(self, mode: str, radius: float) -> Checked:
        self.mode, self.radius, self.at, self.found = mode, radius, 0, None
        with unadvised():
            self.train()
        assert self.found is not None
        self.slsam.memory.replace({})
        self.model.zero_grad(set_to_none=True)
        return self.found

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run the step, and the reference beside the one that is compared."""
        if self.at == 0:
            self._prepare()
        rides = bool(self.slsam.runner.pairs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.at == COMPARED:
            ours = self._gradients()
            self.found = self._compare(model, inputs, num_items_in_batch, ours, rides)
            for parameter, gradient in zip(self.slsam.runner.parameters, ours, strict=True):
                parameter.grad = gradient
        self.at += 1
        return loss

    def _prepare(self) -> None:
        """Set the radius and the mode's way to perturb."""
        if self.mode == IN_PLACE:
            self.slsam.runner.in_place.update(self.slsam.runner.parameters)
        self.slsam.radius = Length(self.radius)

    def _compare(
        self, model: nn.Module, inputs: dict[str, Any], items: Any, ours: Sequence[torch.Tensor], rides: bool
    ) -> Checked:
        runner = self.slsam.runner
        drawn = runner.members(self.slsam.active)
        before, ascent = self._plain(model, inputs, items), self._plain(model, _first(inputs), items)
        with self._moved([runner.parameters[i] for i in drawn], [ascent[i] for i in drawn]):
            after = self._plain(model, inputs, items)
        changed = _length(_differences(after, before))
        deviation = _length(_differences(ours, after)) / max(changed, torch.finfo(torch.float64).tiny)
        change = changed / max(_length(before), torch.finfo(torch.float64).tiny)
        note = ""
        joined = None if self._slsam_passes is None else self._slsam_passes.joined
        if self.mode == STACK and not (rides and runner.pairs and joined is not None):
            reason = why_not(self) or "the tokens of a batch cannot be told apart"
            return Checked(self.mode, None, change, self.radius, f"not used here: {reason}")
        if self.mode != IN_PLACE and runner.in_place:
            note = f"{len(runner.in_place)} parameters are read past their modules, and moved in place"
        return Checked(self.mode, deviation, change, self.radius, note)

    def _plain(self, model: nn.Module, inputs: dict[str, Any], items: Any) -> list[torch.Tensor]:
        """Return the gradients of one plain pass of TRL's trainer, at the weights as they are."""
        self.model.zero_grad(set_to_none=True)
        with muted(self):
            SFTTrainer.training_step(self, model, dict(inputs), items)
        return self._gradients()

    def _gradients(self) -> list[torch.Tensor]:
        return [
            torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in self.slsam.runner.parameters
        ]

    @contextmanager
    def _moved(self, parameters: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> Iterator[None]:
        """Write w + e, and w again afterwards."""
        kept, factor = [p.detach().clone() for p in parameters], self.radius / (_length(gradients) or 1.0)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.add_(gradient, alpha=factor)
        torch.clear_autocast_cache()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, kept, strict=True):
                    parameter.copy_(value)
            torch.clear_autocast_cache()


def _first(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the first sequence of a batch whose sequences are all of one length."""
    return {
        name: value[:1] if isinstance(value, torch.Tensor) and value.dim() else value for name, value in inputs.items()
    }


def _differences(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [a.double() - b.double() for a, b in zip(first, second, strict=True)]


def _length(tensors: Sequence[torch.Tensor]) -> float:
    return float(torch.stack([t.double().norm().cpu() for t in tensors]).norm())


def surroundings(model: Any) -> dict[str, str]:
    """Return what a check holds for: device, precision, kernels and versions.

    Args:
        model (`PreTrainedModel`): The base model.
    """
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    quantization = getattr(model.config, "quantization_config", None)
    return {
        "device": f"{device} ({name})",
        "dtype": f"{str(model.dtype).removeprefix('torch.')}, computed in "
        f"{'bfloat16 autocast' if torch.cuda.is_available() and not emulates_bfloat16() else 'the same'}",
        "quantisation": "none" if quantization is None else _quantization(quantization),
        "attention": str(getattr(model.config, "_attn_implementation", "not known")),
        "kernels": ", ".join(
            f"{package} {'there' if importlib.util.find_spec(package) else 'not there'}"
            for package in ("flash_attn", "triton", "unsloth", "liger_kernel")
        ),
        "versions": ", ".join(f"{package} {_version(package)}" for package in _PACKAGES),
    }


_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")


def _quantization(settings: Any) -> str:
    values = settings if isinstance(settings, dict) else settings.to_dict()
    if values.get("load_in_4bit"):
        return f"4 bits ({values.get('bnb_4bit_quant_type')}, computes in {values.get('bnb_4bit_compute_dtype')})"
    return "8 bits" if values.get("load_in_8bit") else str(values.get("quant_method"))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
