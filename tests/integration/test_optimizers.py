"""Optimizers through the trainer: what they hold makes no arms, and what was not drawn they leave alone."""

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback
from transformers.training_args import OptimizerNames

from slsam_peft import SLSAMConfig, SLSAMTrainer
from tests.tiny import BLOCKS, build, llama, lora
from tests.watch import Watch, check

QUICK = ("adamw_torch_fused", "lion_8bit", "adafactor")
PAPER = SLSAMConfig(method="paper", active_fraction=0.4, seed=1)
PROJECTED = {"optim_target_modules": ["lora_A", "lora_B"], "optim_args": "rank=2,update_proj_gap=2,scale=0.5"}
STILL = ("schedule_free_radam",)  # moves nothing in its first five steps


def each_optimizer():
    for name in OptimizerNames:
        if "layerwise" not in name.value and "lomo" not in name.value and name.value not in STILL:
            marks = [] if name.value in QUICK else [pytest.mark.slow]
            if name.value == "galore_adamw_8bit":
                marks.append(
                    pytest.mark.skipif(
                        not torch.cuda.is_available(),
                        reason="its step is written for CUDA; SLSAM_TEST_GPU=1 shows a GPU",
                    )
                )
            yield pytest.param(name.value, marks=marks)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of packages that some of them come from
@pytest.mark.filterwarnings("ignore:CUDA is not available:UserWarning")
@pytest.mark.parametrize("name", list(each_optimizer()))
def test_optimizers_of_transformers_leave_arms_alone_that_are_not_drawn(name, tmp_path):
    settings = PROJECTED if "galore" in name or "apollo" in name else {}
    trainer = build(SLSAMTrainer, tmp_path, PAPER, optim=name, **settings)
    watch = Watch()
    trainer.add_callback(watch)
    try:  # transformers alone: what this package refuses is no reason to skip
        Trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    except (ImportError, ValueError) as error:
        pytest.skip(f"{name} cannot be made here: {str(error)[:120]}")  # its package, or its device, is not there
    trainer.train()
    check(trainer, watch)


def trained(model, optimizer, folder, config=None, callbacks=(), **settings):
    parts = {"optimizers": (optimizer, None), "callbacks": list(callbacks)}
    trainer = build(SLSAMTrainer, folder, config, model=model, peft_config=None, parts=parts, **settings)
    trainer.train()
    return trainer


def adapted(model=None):
    return get_peft_model(model or llama(), lora(task_type="CAUSAL_LM"))


@pytest.mark.parametrize("config", [None, PAPER], ids=["default", "paper"])
def test_a_base_that_the_optimizer_holds_is_not_trained(config, tmp_path):
    """The training is, bit for bit, that with an optimizer over the adapter alone: the same arms, the same passes."""

    def weights(folder, chosen):
        model = adapted()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad or not chosen], lr=1e-2)
        trainer = trained(model, optimizer, tmp_path / folder, config)
        assert len(trainer.slsam.arms) == BLOCKS
        assert len(trainer.slsam.runner.pairs) == (7 * BLOCKS if config is None else 0)
        return list(trainer.model.parameters())

    assert all(torch.equal(p, q) for p, q in zip(weights("all", False), weights("own", True), strict=True))


def test_a_quantised_base_that_the_optimizer_holds(tmp_path):
    llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    settings = BitsAndBytesConfig(load_in_4bit=True)
    options = {"quantization_config": settings, "device_map": "cpu", "dtype": torch.float32}
    model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options))
    trainer = trained(model, torch.optim.AdamW(model.parameters(), lr=1e-2), tmp_path / "out")
    assert len(trainer.slsam.arms) == BLOCKS


class Poisoned(TrainerCallback):
    """Makes the second step's loss infinite."""

    def __init__(self):
        self.handle = None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            self.handle = model.get_input_embeddings().register_forward_hook(lambda m, a, out: out * float("inf"))
        elif self.handle is not None:
            self.handle.remove()


@pytest.mark.parametrize("config", [SLSAMConfig(), PAPER], ids=["default", "paper"])
def test_lora_fa(config, tmp_path):
    """Its factors A are frozen and in no arm; a skipped step, in which nothing has a gradient, moves nothing."""
    model = adapted()
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)
    watch = Watch()
    trainer = trained(model, optimizer, tmp_path / "a", config, [watch])
    assert {n.rsplit(".", 3)[1] for arm in trainer.slsam.arms for n in arm.parameter_names} == {"lora_B"}
    assert len(trainer.slsam.arms) == BLOCKS
    if config is PAPER:
        check(trainer, watch)
    model = adapted()
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)
    trainer = trained(model, optimizer, tmp_path / "b", config, [Poisoned()])
    assert trainer.slsam.skipped == 1
    assert trainer.slsam.skipped_in_a_row == 0
    assert max(state["step"] for state in optimizer.state.values()) == 2


class Allocating(TrainerCallback):
    """Calls AdaLoRA's update as PEFT's documentation says: between the optimizer's step and its `zero_grad`."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        model.base_model.update_and_allocate(state.global_step)


@pytest.mark.parametrize("config", [SLSAMConfig(), PAPER], ids=["default", "paper"])
def test_adalora(config, tmp_path):
    shape = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1, "total_step": 8}
    adapter = AdaLoraConfig(**shape, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    parts = {"callbacks": [Allocating(), Poisoned()]}
    trainer = build(SLSAMTrainer, tmp_path, config, peft_config=adapter, parts=parts, max_steps=8)
    trainer.train()
    assert trainer.slsam.skipped == 1
    ranks = [int((p != 0).sum()) for n, p in trainer.model.named_parameters() if "lora_E" in n]
    assert 0 < sum(ranks) <= 2 * len(ranks)
