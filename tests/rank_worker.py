"""What two ranks do, for test_ranks.py: `torchrun --nproc_per_node 2 tests/rank_worker.py <folder> <scenario>...`.

Each scenario leaves `<scenario>.<rank>.json` in the folder: what this rank saw.
"""

import json
import os
import signal
import sys
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from datasets import Dataset
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback
from trl import SFTTrainer

from slsam_peft import SLSAM, SLSAMConfig, SLSAMTrainer, arms_of
from slsam_peft.algorithm.ascents import Part
from slsam_peft.algorithm.step import Cut, Passes
from slsam_peft.trainer.distributed import average_over_ranks
from slsam_peft.trainer.factors import factors_of
from slsam_peft.trainer.riding import lora_pairs
from tests import sharded
from tests.tiny import build, llama, lora, texts

STEPS = 20
NON_REENTRANT = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
REENTRANT = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
PLAIN_SGD = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}

# Trained once by two ranks with two sequences each, and once by one process with four, in float64.
AGAINST_ONE = {
    "accumulation": ({"design": "depth"}, {"gradient_accumulation_steps": 3, **NON_REENTRANT}),
    "reentrant": ({"design": "window", "ascent": "remembered"}, REENTRANT),
    "no checkpointing": ({"descent": "all", "granularity": "module"}, {"activation_checkpointing": False}),
    "bar": ({"ascent": "bar", "descent": "all"}, {}),
    "bi_lora": ({"ascent": "bi_lora", "descent": "all"}, NON_REENTRANT),
    "flat_lora": ({"ascent": "flat_lora", "descent": "all"}, REENTRANT),
    "obar": ({"ascent": "obar", "descent": "all"}, {}),
    "weight": ({"radius": "weight", "descent": "all"}, {}),
    "asam": ({"radius": "asam", "descent": "all"}, {}),
    "neuron": ({"radius": "neuron", "descent": "all"}, {}),
    "zeroth_order": ({"ascent": "zeroth_order", "ascent_fraction": 1.0, "descent": "all"}, {}),
}

# Likewise, the two ranks sharded by accelerate, and under DDP.
UNDER_FSDP2 = {
    "fsdp2": ({}, {"max_steps": 3, "gradient_accumulation_steps": 2, **REENTRANT}),
    "fsdp2, a part": (
        {"ascent": "partial", "ascent_sequences": 1, "descent": "all", "rho": None, "loss_rise": 0.02},
        {"max_steps": 3, **NON_REENTRANT},
    ),
}


def train_small(cls, folder, config=None, *, double=False, dropout=0.0, resume=None, **settings):
    """Train the suite's small Llama with few adapters, on its rows in order."""
    model = llama().double() if double else llama()
    adapter = lora(target_modules=["q_proj", "down_proj"], lora_dropout=dropout)
    settings = {"train_sampling_strategy": "sequential", **settings}
    trainer = build(cls, folder, config, model=model, peft_config=adapter, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def train_against_one(name, folder, **settings):
    """Train one of `AGAINST_ONE`."""
    chosen, arguments = AGAINST_ONE[name]
    arguments = {"max_steps": 3, **PLAIN_SGD, **arguments, **settings}
    return train_small(Watched, folder, config_of(chosen), double=True, **arguments)


def config_of(settings):
    return SLSAMConfig(**{"rho": 0.1, "active_fraction": 0.5, **settings})


class Seen(TrainerCallback):
    """Notes what each step drew, what the bandit was fed, and where it left the probabilities."""

    def __init__(self):
        self.masks, self.probabilities, self.norms, self.skipped = [], [], [], []

    def follow(self, trainer):
        self.trainer = trainer
        trainer.add_callback(self)

    def on_step_begin(self, *args, **kwargs):
        bandit, learn = self.trainer.slsam.sampler.bandit, type(self.trainer.slsam.sampler.bandit).update

        def noting(mask, norms, *others):
            self.norms.append(norms[mask].tolist())
            learn(bandit, mask, norms, *others)

        bandit.update = noting

    def on_step_end(self, *args, **kwargs):
        slsam = self.trainer.slsam
        self.masks.append(slsam.active.tolist())
        self.probabilities.append(slsam.probabilities.tolist())
        self.skipped.append(slsam.skipped)

    def report(self):
        return {"masks": self.masks, "probabilities": self.probabilities, "norms": self.norms, "skipped": self.skipped}


class Watched(SLSAMTrainer):
    """Keeps what `Seen` notes."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = Seen()
        self.seen.follow(self)


def adapters(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


class Wire(TorchDispatchMode):
    """Counts the bytes each kind of collective is handed, whether Python or DDP's reducer starts it."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
            self.bytes[func.overloadpacket.__name__] += sum(t.numel() * t.element_size() for t in tensors)
        return func(*args, **(kwargs or {}))


def long(folder):
    """Twenty steps of AdamW with dropout."""
    config = config_of({"design": "fixed_size"})
    trainer = train_small(Watched, folder / "out", config, max_steps=STEPS, dropout=0.2)
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    logged = [log["slsam/sharpness"] for log in trainer.state.log_history if "slsam/sharpness" in log]
    return {**trainer.seen.report(), "sharpness": logged}, adapters(trainer)


def against_one(name):
    def scenario(folder):
        trainer = train_against_one(name, folder / "out")
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        return {**trainer.seen.report(), "losses": losses}, adapters(trainer)

    return scenario


def wire(folder):
    """Bytes of a plain and of our training, from the construction of the trainer to its end."""
    sent, trainers = [], []
    for cls, config in ((SFTTrainer, None), (Watched, config_of({}))):
        with Wire() as counted:
            trainers.append(train_small(cls, folder / cls.__name__, config))
        sent.append(dict(counted.bytes))
    slsam = trainers[1].slsam
    active = [sum(a.size for a, on in zip(slsam.arms, m, strict=True) if on) for m in trainers[1].seen.masks]
    return {"plain": sent[0], "ours": sent[1], "active": active, "all": sum(a.size for a in slsam.arms)}, {}


def spoiled(value, in_gradient):
    """The second step's first or second pass goes wrong on rank 1 alone."""

    class Spoiled(Watched):
        passes = 0

        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            type(self).passes += model.training and torch.is_grad_enabled()
            if type(self).passes != self.bad or dist.get_rank() == 0:
                return loss
            return loss * value if in_gradient else loss + value

        def training_step(self, *args, **kwargs):
            self.before.append(adapters(self))
            return super().training_step(*args, **kwargs)

    def scenario(folder):
        report, weights = {}, {}
        for bad in (3, 4):
            cls = type("Spoiled", (Spoiled,), {"bad": bad, "passes": 0, "before": []})
            trainer = train_small(cls, folder / f"out-{bad}", config_of({}), weight_decay=0.1)
            kept = all(torch.equal(p, cls.before[2][n]) for n, p in cls.before[1].items())
            report[bad] = {**trainer.seen.report(), "kept": kept}
            weights |= {f"{bad}.{n}": p for n, p in adapters(trainer).items()}
        return report, weights

    return scenario


def budget(folder):
    """Ranks whose first batches differ in length: the fraction that meets the budget is solved once for both."""
    config = SLSAMConfig(rho=0.1, cost_budget=1.0, design="depth")
    trainer = train_small(Watched, folder / "out", config)
    return {**trainer.seen.report(), "budget": trainer.slsam.sampler.bandit.budget}, adapters(trainer)


def resumed(folder):
    """Four steps in one go, and the last two of them once more from the checkpoint between."""
    settings = {"max_steps": 4, "dropout": 0.2, "save_strategy": "steps", "save_steps": 2}
    whole = train_small(Watched, folder / "whole", config_of({}), **settings)
    checkpoint = folder / "whole" / "checkpoint-2"
    parted = train_small(Watched, folder / "parted", config_of({}), resume=str(checkpoint), **settings)
    recorded = json.loads((checkpoint / "slsam_files.json").read_text())["sha256"]
    runs = {"whole": whole, "parted": parted}
    report = {"recorded": sorted(recorded), **{name: run.seen.report() for name, run in runs.items()}}
    return report, {f"{name}.{n}": p for name, run in runs.items() for n, p in adapters(run).items()}


def network():
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1)]
    return nn.Sequential(*layers).double()


def own_loop(rank=None, steps=8):
    """Train a small network on 16 rows; with a rank, on that half of them."""
    model, x = network(), torch.randn(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = x if rank is None else x[8 * rank : 8 * rank + 8]
    slsam = SLSAM(arms_of(model, "module"), SLSAMConfig(rho=0.1, active_fraction=0.5))
    slsam.reduce = None if rank is None else average_over_ranks
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = {}

    def closure():
        loss = (model(x) - 1).square().mean()
        loss.backward()
        return loss

    for i in range(steps):
        slsam.update(closure)
        if i == 0:
            seen |= {f"gradient.{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    seen |= {n: p.detach().clone() for n, p in model.named_parameters()}
    return {"metrics": slsam.metrics}, {**seen, "probabilities": slsam.probabilities}


def loss_rise(rank=None):
    """Take a step whose ascent is made by three rows of the first half and five of the second one."""
    model, x = network(), torch.randn(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    taken = [[0, 1, 2], [8, 9, 10, 11, 12]]
    own = list(range(16)) if rank is None else list(range(8 * rank, 8 * rank + 8))
    part = [*taken[0], *taken[1]] if rank is None else taken[rank]
    config = SLSAMConfig(loss_rise=0.05, active_fraction=1.0, ascent="partial")
    slsam = SLSAM(arms_of(model, "module"), config)
    slsam.reduce = None if rank is None else average_over_ranks

    def over(rows):
        def closure():
            loss = (model(x[rows]) - 1).square().sum() / len(own)
            loss.backward()
            return loss

        return closure

    slsam.accumulate(
        Passes(
            over(own),
            over(own),
            sequences=len(own),
            cut=lambda wanted: Cut(over(part), torch.tensor(len(part))),
            items=torch.tensor(len(own)),
            divisor=torch.tensor(len(own)),
        )
    )
    seen = {n: p.grad.clone() for n, p in model.named_parameters()}
    return {"metrics": slsam.metrics}, {**seen, "norms": slsam.norms}


def rides(folder, ascent="auto"):
    """Sequences that ride along; one rank gives that up in the third step of the first of two epochs.

    The rows do not fill an epoch's last batches.
    """

    class GivesUp(Watched):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 2 and dist.get_rank() == 1:
                self.slsam.runner.pairs = ()
            radii.append(self.slsam.metrics.get("rho"))
            ahead.append(self._slsam_batches is not None)
            return super().training_step(*args, **kwargs)

    radii, ahead = [], []
    config = SLSAMConfig(method="auto", ascent=ascent, loss_rise=0.02)
    trainer = train_small(GivesUp, folder / "out", config, data=texts(13), max_steps=6, **PLAIN_SGD)
    report = {
        "radii": radii,
        "pairs": len(trainer.slsam.runner.pairs),
        "ahead": ahead,
        "tokens": [log["num_tokens"] for log in trainer.state.log_history if "num_tokens" in log],
        "lengths": [len(row["input_ids"]) for row in trainer.train_dataset],
    }
    return report, adapters(trainer)


def uneven(folder):
    """Packed rows, the first ones of one document on a rank and of two on the other: so one rank's ascent is complete
    behind the first of three micro-batches, and the other's behind the second.

    Trained with a count of tokens, which ranks exchange between micro-batches, and without.
    """
    words = [" ".join(f"w{i}" for i in range(n - 1)) for n in (16, *(8,) * 10)]  # and the end of each
    packed = {"packing": True, "packing_strategy": "bfd", "max_length": 16, "per_device_train_batch_size": 1}
    config = SLSAMConfig(method="auto", ascent_sequences=2, loss_rise=0.02)
    report, weights = {}, {}
    for counts in (False, True):
        trainer = train_small(
            Watched,
            folder / f"out-{counts}",
            config,
            data=Dataset.from_list([{"text": text} for text in words]),
            gradient_accumulation_steps=3,
            include_num_input_tokens_seen=counts,
            max_steps=2,
            **packed,
            **PLAIN_SGD,
        )
        rho = [log["slsam/rho"] for log in trainer.state.log_history if "slsam/rho" in log]
        report[str(counts)] = {**trainer.seen.report(), "rho": rho, "seen": trainer.state.num_input_tokens_seen}
        weights |= {f"{counts}.{n}": p for n, p in adapters(trainer).items()}
    return report, weights


def sharded_steps(name):
    return lambda folder: sharded.train(name, dist.get_rank())


class OnCPU(Watched):
    """Has accelerate shard the model by FSDP2, which it does on accelerators alone, on CPUs."""

    plugin: Any = None

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.state.distributed_type = DistributedType.FSDP
        self.accelerator.state.fsdp_plugin = self.plugin
        self.is_fsdp_enabled = True


@contextmanager
def sharding_on_cpus(state_dict_type="FULL_STATE_DICT"):
    """Yield the trainer's class that accelerate shards for, inside the context."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        state_dict_type=state_dict_type,
    )
    try:
        yield type("OnCPU", (OnCPU,), {"plugin": plugin})
    finally:
        state = AcceleratorState()  # one for all trainers
        state.distributed_type = DistributedType.MULTI_CPU
        del state.fsdp_plugin


def fsdp2(settings, arguments):
    """Two ranks that accelerate gives pieces of each parameter, and the same two under DDP; what is saved."""

    def scenario(folder):
        ddp = train_small(Watched, folder / "ddp", config_of(settings), double=True, **PLAIN_SGD, **arguments)
        with sharding_on_cpus() as cls:
            trainer = train_small(cls, folder / "out", config_of(settings), double=True, **PLAIN_SGD, **arguments)
            assert trainer.slsam.runner.shards is not None
            trainer.accelerator.get_state_dict = _gathered(trainer.accelerator.get_state_dict)
            trainer.save_model(str(folder / "saved"))
        report = {name: _told(run) for name, run in {"ddp": ddp, "fsdp2": trainer}.items()}
        weights = {f"fsdp2.{n}": p.full_tensor() for n, p in adapters(trainer).items()}
        return report, weights | {f"ddp.{n}": p for n, p in adapters(ddp).items()}

    return scenario


def fsdp2_resumed(folder):
    """Four steps of sharded parameters in one go, and the last two of them once more from the checkpoint between."""
    settings = {"max_steps": 4, "dropout": 0.2, "save_strategy": "steps", "save_steps": 2, "double": True}
    with sharding_on_cpus("SHARDED_STATE_DICT") as cls:
        whole = train_small(cls, folder / "whole", config_of({"descent": "all"}), **settings)
        checkpoint = folder / "whole" / "checkpoint-2"
        parted = train_small(cls, folder / "parted", config_of({"descent": "all"}), resume=str(checkpoint), **settings)
        assert all(run.slsam.runner.shards is not None for run in (whole, parted))
    runs = {"whole": whole, "parted": parted}
    report = {name: run.seen.report() for name, run in runs.items()}
    return report, {f"{name}.{n}": p.full_tensor() for name, run in runs.items() for n, p in adapters(run).items()}


def _told(trainer):
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return {**trainer.seen.report(), "losses": losses}


def _gathered(get_state_dict):
    """Put pieces together, which accelerate hands over as they are on CPUs."""

    def gathering(*args, **kwargs):
        found = get_state_dict(*args, **kwargs)
        return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in found.items()}

    return gathering


def refused(folder):
    """FSDP2, asked for through the trainer's arguments and done to the model beforehand."""
    from torch.distributed.fsdp import fully_shard

    messages = {}
    model = llama()
    for block in model.model.layers:
        fully_shard(block)
    assert any(isinstance(p, DTensor) for p in model.parameters())
    for name, settings in {
        "sharded model": {"model": fully_shard(model)},
        "arguments": {"fsdp": True, "fsdp_config": {"version": 2}},
    }.items():
        try:
            build(SLSAMTrainer, folder / "out", config_of({}), **settings)
        except ValueError as error:
            messages[name] = str(error)
    return messages | _refused_rules(), {}


# Rules that may need whole weights, and an object of a user's own that may, too.
WHOLE = [
    *(("ascent", name) for name in ("zeroth_order", "bar", "obar", "bi_lora", "flat_lora", "sampa")),
    *(("radius", name) for name in ("asam", "neuron", "weight")),
    ("ascent", type("Own", (Part,), {})(1)),
]


def _refused_rules():
    """Return what is said of each of `WHOLE`, by its place, in a loop of one's own over sharded parameters."""
    model = sharded.shard(sharded.model_of(), init_device_mesh("cpu", (2,)))
    given = {"pairs": lora_pairs(model), "factors": factors_of(model)}
    messages = {}
    for place, (field, rule) in enumerate(WHOLE):
        try:
            SLSAM(arms_of(model), SLSAMConfig(method="auto", rho=0.1, **{field: rule}), **given)
        except ValueError as error:
            messages[f"rule {place}"] = str(error)
    return messages


def dying(folder):
    """Rank 1 is killed in the descent pass of the third step, while rank 0 goes on to the exchange."""

    class Dying(SLSAMTrainer):
        passes = 0

        def compute_loss(self, *args, **kwargs):
            type(self).passes += 1
            if type(self).passes == 6 and dist.get_rank() == 1:
                (folder / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().compute_loss(*args, **kwargs)

    train_small(Dying, folder / "out", config_of({}), max_steps=STEPS)
    return {}, {}


SCENARIOS = {
    "long": long,
    **{name: against_one(name) for name in AGAINST_ONE},
    "wire": wire,
    "nan loss": spoiled(float("nan"), in_gradient=False),
    "nan gradient": spoiled(float("nan"), in_gradient=True),
    "budget": budget,
    "resumed": resumed,
    "own loop": lambda folder: own_loop(dist.get_rank()),
    "loss rise": lambda folder: loss_rise(dist.get_rank()),
    "rides": rides,
    "rides, sampa": partial(rides, ascent="sampa"),
    "uneven": uneven,
    **{f"sharded, {name}": sharded_steps(name) for name in sharded.SHARDED},
    **{name: fsdp2(*chosen) for name, chosen in UNDER_FSDP2.items()},
    "fsdp2, resumed": fsdp2_resumed,
    "refused": refused,
    "dying": dying,
}


def main(folder, *names):
    dist.init_process_group("gloo")
    for name in names:
        place = Path(folder) / name
        place.mkdir(exist_ok=True)
        report, tensors = SCENARIOS[name](place)
        rank = dist.get_rank()
        save_file({n: t.contiguous() for n, t in tensors.items()}, place / f"{rank}.safetensors")
        (place / f"{rank}.json").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
