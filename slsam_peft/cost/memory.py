"""Estimates the memory of training on one GPU, by part, from a model on the meta device.

What a block keeps for its backward pass is read off the block itself, run on fake tensors under autocast. The rest is
counted. It is an estimate of what is allocated at the peak: fragmentation comes on top.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._pytree import tree_map

from slsam_peft.cost.block import Shapes
from slsam_peft.cost.matmuls import features_of, head_of
from slsam_peft.cost.model import CostModel, Rule

NF4_BYTES = 0.5 + 4 / 64  # four bits and a float32 absmax for each 64 weights (bitsandbytes)
NF4_NESTED_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # the absmax in 8 bits, with one float32 for each 256 of them
HEAD_TOKENS, HEAD_WORDS = 4096, 32768  # tile of TRL's fused head
RUNTIME_BYTES = 0.75 * 2**30  # CUDA context and library workspaces; differs between drivers and GPUs
BLOCKWISE_BYTES, SMALL = 1 + 4 / 256, 4096  # bitsandbytes' 8-bit states; tensors of fewer entries keep 32 bits

# Number of states per parameter (-1: factored), and whether they are 8-bit (8), 32-bit (32) or of its own dtype (0).
OPTIMIZERS: dict[str, tuple[int, int]] = {
    "adafactor": (-1, 32),
    "adagrad": (1, 0),
    "adamw_8bit": (2, 8),
    "adamw_bnb_8bit": (2, 8),
    "adamw_torch": (2, 0),
    "adamw_torch_fused": (2, 0),
    "lion_32bit": (1, 32),
    "lion_8bit": (1, 8),
    "paged_adamw_32bit": (2, 32),
    "paged_adamw_8bit": (2, 8),
    "paged_lion_32bit": (1, 32),
    "paged_lion_8bit": (1, 8),
    "rmsprop": (1, 0),
    "sgd": (0, 0),
}


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """What the memory depends on beside the model.

    Args:
        optimizer (`str`, *optional*, defaults to `"adamw_torch_fused"`): One of `OPTIMIZERS`, transformers' names.
        four_bit (`bool`, *optional*, defaults to `False`): Whether frozen linear modules are kept in NF4.
        nested (`bool`, *optional*, defaults to `False`): Whether their absmax is quantised too.
        compute_dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): What autocast computes in.
        hidden_state_cache_limit_bytes (`float`, *optional*): Most memory for kept hidden states. Defaults to 1 GiB.
    """

    optimizer: str = "adamw_torch_fused"
    four_bit: bool = False
    nested: bool = False
    compute_dtype: torch.dtype = torch.bfloat16
    hidden_state_cache_limit_bytes: float = 2.0**30


@dataclass(frozen=True)
class Activations:
    """What one block works on, for one micro-batch, in bytes.

    Args:
        hidden (`float`): Its input.
        saved (`float`): What it keeps for its backward pass, its weights not counted.
        largest (`float`): The largest tensor among them.
    """

    hidden: float
    saved: float
    largest: float


def memory_of(
    model: nn.Module, cost: CostModel, shapes: Shapes, rule: Rule, settings: MemorySettings, share: float = 1.0
) -> dict[str, float]:
    """Return bytes by part, the estimated peak under `"total"`.

    Of a block's graph and the head's tile only the larger counts towards the total, since they never exist together
    where blocks are checkpointed. Passes are taken to reach the lowest block, which is the most a step needs.

    Args:
        model (`nn.Module`): The model on the meta device, its adapters in the dtype they are trained in.
        cost (`CostModel`): Its costs, for the blocks and whether they are checkpointed.
        shapes (`Sequence[tuple[int, int]]`): `(batch, length)` of the micro-batches of a step.
        rule (`Rule`): How a step runs.
        settings (`MemorySettings`): The rest.
        share (`float`, *optional*, defaults to `1.0`): Of the adapters' parameters, how many are perturbed.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    reused, copies, remembered = rule.reused_shapes(shapes), _copies(rule, shapes), _remembered(rule, shapes, share)
    shapes = rule.run_on(shapes)
    adapters = float(sum(p.numel() * p.element_size() for p in trained))
    largest = max(shapes, key=lambda shape: shape[0] * shape[1])
    block = block_activations(model, cost.decoder.block_names[0], largest, settings.compute_dtype)
    kept = [block.hidden * b * t / (largest[0] * largest[1]) for b, t in reused]
    weights, unpacked = _frozen_bytes(model, settings)
    parts = {
        "weights": weights,
        "adapters": adapters,
        "gradients": adapters,
        "perturbation": adapters * share * copies,
        # a second adapter and the moments of its ascent, or what rounding leaves of balanced factors
        "kept_by_rule": rule.ascent.kept_bytes(trained),
        # of a weight with noise on it: the noise in float32, and the sum in what the module computes in
        "noise": _noise_bytes(cost, settings) if rule.ascent.merges else 0.0,
        "gradient_memory": 2.0 * sum(p.numel() for p in trained) * remembered,
        "optimizer": sum(_optimizer_bytes(p, settings.optimizer) for p in trained),
        "activations": _kept_graph(cost, block, kept, rule),
        "block": (block.saved if cost.checkpointing else 0.0) + 2 * block.largest + unpacked,
        "hidden_state_cache": _hidden_state_cache_bytes(kept, settings.hidden_state_cache_limit_bytes),
        "logits": _head_bytes(model, largest, settings.compute_dtype),
        "runtime": RUNTIME_BYTES,
    }
    working = ("block", "logits")
    parts["total"] = sum(v for k, v in parts.items() if k not in working) + max(parts[k] for k in working)
    return parts


def _copies(rule: Rule, shapes: Shapes) -> int:
    """Return how many times the perturbed parameters lie there in a step, beside themselves and their gradients."""
    perturbed = rule.ascent.stale or bool(rule.ascent_shapes(shapes))
    copies = 2 * perturbed  # e and w + e
    if rule.stacked(shapes):
        copies += 2 + rule.ascent.extrapolates  # what riding tokens see, its gradient; how far from w it lies
    if rule.ascent.doubles:
        copies += 3  # both pairs side by side, and the second one's gradient
    return copies


def _remembered(rule: Rule, shapes: Shapes, share: float) -> float:
    """Return of which share of the parameters a gradient is kept for the next step."""
    if rule.ascent.rides:  # of those that the next step perturbs
        return share * rule.stacked(shapes)
    return float(rule.ascent.stale)  # of all that was ever drawn


def block_activations(
    model: nn.Module, name: str, shape: tuple[int, int], compute_dtype: torch.dtype = torch.bfloat16
) -> Activations:
    """Run one block on fake tensors and measure what its backward pass would keep.

    Args:
        model (`nn.Module`): The model, on the meta device.
        name (`str`): Name of the block.
        shape (`tuple[int, int]`): `(batch, length)`.
        compute_dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): What autocast computes in.
    """
    block = model.get_submodule(name)
    args, kwargs = _block_inputs(model, block, shape)
    saved: dict[Any, float] = {}
    with FakeTensorMode():
        # Fake CPU tensors, not meta ones: autocast and fused attention know no meta device.
        weights = {key: _fake(p) for key, p in [*block.named_parameters(), *block.named_buffers()]}
        args, kwargs = tree_map(_fake, (args, kwargs))
        hidden = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_()
        args, kwargs = ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})
        own = {w.untyped_storage()._cdata for w in weights.values()}

        def note(x: torch.Tensor) -> torch.Tensor:
            storage = x.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage.nbytes()
            return x

        autocast = torch.autocast("cpu", compute_dtype, enabled=compute_dtype != torch.float32)
        with autocast, torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            output = functional_call(block, weights, args, kwargs)
        del output
    return Activations(float(hidden.nbytes), float(sum(saved.values())), float(max(saved.values(), default=0)))


class _ReachedError(Exception):
    """Ends a forward pass at the block whose inputs are wanted."""


def _block_inputs(model: nn.Module, block: nn.Module, shape: tuple[int, int]) -> tuple[tuple, dict[str, Any]]:
    found: list[tuple[tuple, dict[str, Any]]] = []

    def stop(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise _ReachedError

    handle = block.register_forward_pre_hook(stop, with_kwargs=True)
    ids = torch.zeros(shape, dtype=torch.long, device="meta")
    try:
        with _training(model):
            # Without a cache and a mask transformers looks for packed sequences in the data, and meta has none.
            model(input_ids=ids, use_cache=True)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    args, kwargs = found[0]
    return args, {key: None if "past_key_value" in key else value for key, value in kwargs.items()}


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    before = model.training
    model.train()
    try:
        yield
    finally:
        model.train(before)


def _fake(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty(value.shape, dtype=value.dtype).requires_grad_(value.requires_grad)


def _frozen_bytes(model: nn.Module, settings: MemorySettings) -> tuple[float, float]:
    """Return the frozen weights' bytes, and those of the largest packed one when unpacked for its matmul."""
    head = head_of(model)
    packed = NF4_NESTED_BYTES if settings.nested else NF4_BYTES
    total, unpacked, seen = 0.0, 0.0, set()
    for module in model.modules():
        quantized = settings.four_bit and module is not head and features_of(module) is not None
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad or id(p) in seen:
                continue
            seen.add(id(p))
            if quantized and name == "weight":
                total += p.numel() * packed
                unpacked = max(unpacked, float(p.numel() * settings.compute_dtype.itemsize))
            else:
                total += p.numel() * p.element_size()
    return total, unpacked


def _noise_bytes(cost: CostModel, settings: MemorySettings) -> float:
    """Bytes of the largest adapted weight's noise in float32, and of the weight with the noise on it.

    In float32 the noise itself becomes the sum. The lengths of the rows are taken before, and need no more.
    """
    sizes = (x.base.features for block in cost.decoder.blocks for x in block.linears if x.factors)
    rounded = 0.0 if settings.compute_dtype == torch.float32 else settings.compute_dtype.itemsize
    return max(sizes, default=0.0) * (4.0 + rounded)


def _optimizer_bytes(p: nn.Parameter, name: str) -> float:
    states, bits = OPTIMIZERS[name]
    if states < 0:  # Adafactor: a row and a column for a matrix
        return 4.0 * (p.numel() if p.ndim < 2 else (p.shape[-1] + p.shape[-2]) * math.prod(p.shape[:-2]))
    if bits == 8:
        return states * p.numel() * (BLOCKWISE_BYTES if p.numel() >= SMALL else 4.0)
    return float(states * p.numel() * (4 if bits == 32 else p.element_size()))


def _kept_graph(cost: CostModel, block: Activations, reused: list[float], rule: Rule) -> float:
    """Bytes kept between forward and backward: block inputs where blocks are checkpointed, else all they save."""
    per_block = block.hidden if cost.checkpointing else block.saved
    # For the dense descent a sparse ascent keeps the graph below its lowest active block, of every micro-batch.
    kept = sum(reused) / block.hidden if rule.descent == "all" else 0.0
    return len(cost) * per_block * max(1.0, kept)


def _hidden_state_cache_bytes(reused: list[float], limit: float) -> float:
    """Bytes of the hidden states kept between the passes, up to the limit."""
    kept = 0.0
    for size in reused:
        if kept + size > limit:
            break
        kept += size
    return kept


def _head_bytes(model: nn.Module, shape: tuple[int, int], compute_dtype: torch.dtype) -> float:
    """Bytes of the fused head's logits tile and the hidden states' gradient, which it accumulates in float32."""
    tokens = shape[0] * (shape[1] - 1)
    head = head_of(model)
    width = (features_of(head) or (0, 0))[0] if head is not None else 0
    return float(min(tokens, HEAD_TOKENS) * HEAD_WORDS * compute_dtype.itemsize + tokens * width * 4)
