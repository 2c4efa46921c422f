"""A tiny decoder whose parameters FSDP2 shards over ranks, trained on their rows; in one process, on all of them."""

from itertools import zip_longest

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from slsam_peft import SLSAM, SLSAMConfig, arms_of
from slsam_peft.algorithm.step import Cut, Passes
from tests.decoders import WORDS, decoder
from tests.decoders import passes_of as closures_of
from tests.look_ahead import exact_norms, token_losses
from tests.reference import descent_of, gradients_of

RATE = 0.5
STEPS = 3

# Settings of the training; rows of each rank, by micro-batch; shape of the mesh.
EVEN = [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
ACCUMULATED = [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
UNEVEN = [[[0, 1], [2, 3]], [[4], [5, 6, 7]]]  # where rank 1 would need a second micro-batch for its ascent
SHARDED = {
    "two passes": ({"ascent": "two_pass"}, EVEN, (2,)),
    "every arm is trained": ({"ascent": "two_pass", "descent": "all", "granularity": "module"}, EVEN, (2,)),
    "accumulation": ({"ascent": "two_pass"}, ACCUMULATED, (2,)),
    "a part": ({"ascent": "partial", "ascent_sequences": 2, "descent": "all"}, UNEVEN, (2,)),
    "a part, loss rise": (
        {"ascent": "partial", "ascent_fraction": 0.5, "rho": None, "loss_rise": 0.05, "descent": "all"},
        EVEN,
        (2,),
    ),
    "remembered": ({"ascent": "remembered"}, EVEN, (2,)),
    "no radius": ({"rho": 0.0}, EVEN, (2,)),
    "replicated": ({"ascent": "two_pass", "design": "bernoulli"}, EVEN, (2, 1)),
    "nf4": ({"ascent": "two_pass", "quantised": True}, EVEN, (2,)),
    "tensors, checkpointed": ({"ascent": "two_pass", "granularity": "tensor", "reentrant": True}, EVEN, (2,)),
}


def settings_of(name):
    """Return the config, the granularity and what the model is like."""
    settings = dict(SHARDED[name][0])
    granularity = settings.pop("granularity", "block")
    how = {name: settings.pop(name) for name in ("reentrant", "quantised") if name in settings}
    return SLSAMConfig(**{"rho": 0.1, "active_fraction": 0.5, **settings}), granularity, how


def model_of(reentrant=None, quantised=False):
    """Return the model; its lower factors have an odd number of rows, and their pieces differ in size."""
    if not quantised:
        return exact_norms(decoder("llama", checkpointing=reentrant, dropout=0.0))
    model = decoder("llama", dropout=0.0, dtype=torch.float32)
    for layer in [module for module in model.modules() if isinstance(module, LoraLayer)]:
        layer.base_layer = in_nf4(layer.base_layer)
    return model


def in_nf4(linear):
    """Return a linear layer as bitsandbytes packs it."""
    packed = Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
    )
    packed.load_state_dict(linear.state_dict())
    return packed.requires_grad_(False).to("cpu")


def rows_loss(model, rows, divisor):
    """Return the summed loss of rows, each the mean over its tokens, over a divisor."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, WORDS, (8, 10), generator=generator)[rows]
    return token_losses(model, {"input_ids": ids, "labels": ids}).mean() * len(rows) / divisor


def shard(model, mesh):
    """Shard each block, and the rest, as one does by hand."""
    for block in model.base_model.model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(tensor):
    """Return a tensor from its pieces."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train(name, rank=None):
    """Train a model for three steps; return what was decided, and each step's gradients, weights and norms."""
    _, rows, mesh = SHARDED[name]
    config, granularity, how = settings_of(name)
    model = model_of(**how)
    if rank is not None:
        model = shard(model, init_device_mesh("cpu", mesh, mesh_dim_names=("replicate", "shard")[2 - len(mesh) :]))
    slsam = SLSAM(arms_of(model, granularity), config)
    parameters = dict(zip((n for a in slsam.arms for n in a.parameter_names), slsam.runner.parameters, strict=True))
    own = [interleaved(*micro) for micro in zip(*rows, strict=True)] if rank is None else rows[rank]
    report, tensors = {"masks": [], "probabilities": [], "norms": [], "losses": [], "rho": []}, {}
    for step in range(STEPS):
        for m, batch in enumerate(own):
            slsam.accumulate(passes_of(model, batch, sum(map(len, own))), m, len(own))
        report["masks"].append(slsam.active.tolist())
        report["probabilities"].append(slsam.probabilities.tolist())
        report["norms"].append(slsam.norms.tolist())
        report["losses"].append(slsam.loss)
        report["rho"].append(slsam.metrics.get("rho", 0.0))
        for n, p in parameters.items():
            if p.grad is not None:
                tensors[f"{step}.gradient.{n}"] = whole(p.grad).clone()
                with torch.no_grad():
                    p.sub_(RATE * p.grad)
                p.grad = None
            tensors[f"{step}.{n}"] = whole(p.detach()).clone()
    return report, tensors


def interleaved(*rows):
    """Return the rows of all ranks, first the first ones of each."""
    return [row for some in zip_longest(*rows) for row in some if row is not None]


def expected_parts(masks):
    """Return the gradients of the uneven case by the slow reference: each rank gives a row of each micro-batch."""
    model = model_of()
    arms = arms_of(model)
    over = lambda rows, divisor: closures_of(lambda: rows_loss(model, rows, divisor))[0]  # noqa: E731
    gradients = []
    for mask in map(torch.tensor, masks):
        _, ascent = gradients_of(arms, mask, over([0, 4, 2, 5], 8))
        _, found = descent_of(arms, ascent, 0.1, over(list(range(8)), 8), torch.ones_like(mask))
        gradients.append(found)
        with torch.no_grad():
            for p, g in zip((p for arm in arms for p in arm.parameters), found, strict=True):
                p.sub_(RATE * g)
    return [n for arm in arms for n in arm.parameter_names], gradients


def passes_of(model, rows, divisor):
    """Return the passes over some rows; every row is a sequence."""

    def over(some):
        return closures_of(lambda: rows_loss(model, some, divisor))[0]

    return Passes(
        over(rows),
        over(rows),
        sequences=len(rows),
        cut=lambda wanted: Cut(over(rows[:wanted]), torch.tensor(wanted)),
        items=torch.tensor(len(rows)),
        divisor=torch.tensor(divisor),
    )
