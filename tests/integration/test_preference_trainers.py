"""TRL's preference trainers by the mixin, in one line each."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer

from slsam_peft import SLSAMConfig, SLSAMMixin
from slsam_peft.trainer.paper import name_on_cards
from tests.tiny import completions, llama, lora, preferences, reward_model, sft_args, tokenizer
from tests.watch import Watch, check, hooks

ROWS = 24


class SLSAMDPOTrainer(SLSAMMixin, DPOTrainer):
    """Preferences."""


class SLSAMKTOTrainer(SLSAMMixin, KTOTrainer):
    """Unpaired preferences."""


class SLSAMRewardTrainer(SLSAMMixin, RewardTrainer):
    """Reward models."""


def _labelled():
    return completions(ROWS).add_column("label", [i % 2 == 0 for i in range(ROWS)])


OTHERS = {
    "DPO": (SLSAMDPOTrainer, DPOConfig, llama, preferences, {}),
    "KTO": (SLSAMKTOTrainer, KTOConfig, llama, _labelled, {}),
    "reward": (SLSAMRewardTrainer, RewardConfig, reward_model, preferences, {"task_type": "SEQ_CLS"}),
}


def build(case, folder, config=None, **settings):
    """Build the trainer of a case, or TRL's own without a config."""
    cls, config_class, model, data, adapter = case
    return (cls if config else cls.__mro__[2])(
        model(),
        args=sft_args(folder, config_class=config_class, **settings),
        train_dataset=data(),
        processing_class=tokenizer(),
        peft_config=lora(**adapter),
        **({"slsam_config": config} if config else {}),
    )


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_(en|dis)able. is deprecated:FutureWarning")  # by TRL 1.16
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("case", OTHERS.values(), ids=OTHERS.keys())
def test_three_steps(case, checkpointing, tmp_path):
    """The right arms move, what is logged of the first step is what the trainer logs without SL-SAM, and nothing is
    left behind.

    TRL's preference trainers turn checkpointing off and on inside every loss, and each time transformers leaves a hook
    on the embeddings, with and without SL-SAM; every other module is as after plain training.
    """
    settings = {"activation_checkpointing": checkpointing}
    plain = build(case, tmp_path, **settings)
    ours = build(case, tmp_path, SLSAMConfig(rho=0.05, active_fraction=0.5), **settings)
    plain.train()
    watch = Watch(hooks=not checkpointing)
    ours.add_callback(watch)
    ours.train()
    check(ours, watch)
    left, expected = hooks(ours.model), hooks(plain.model)
    assert all(name.endswith("embed_tokens") for name in left if left[name] != expected[name])

    first, ours_first = plain.state.log_history[0], ours.state.log_history[0]
    assert {k: v for k, v in first.items() if k != "grad_norm"} == {
        k: ours_first[k] for k in first if k != "grad_norm"
    }
    added = ours_first.keys() - first.keys()
    assert "slsam/sharpness" in added
    assert all(name.startswith("slsam/") for name in added)
    assert "slsam/cost" not in added, "only SFTTrainer's steps have a cost model"


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_(en|dis)able. is deprecated:FutureWarning")
@pytest.mark.parametrize("case", OTHERS.values(), ids=OTHERS.keys())
def test_both_passes_have_the_same_loss(case, tmp_path):
    """At a tiny radius they differ by it times the gradient; KTO's rests on a divergence that is gathered."""
    settings = {"learning_rate": 0.3, "max_steps": 5, "per_device_train_batch_size": 3}  # odd: labels do not balance
    trainer = build(case, tmp_path, SLSAMConfig(rho=1e-6, active_fraction=0.5), **settings)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "slsam/sharpness" in log]
    assert len(logs) == 5
    assert all(abs(log["slsam/sharpness"]) < 1e-5 + 2e-6 * log["slsam/grad_norm_ascent"] for log in logs)
    if isinstance(trainer, KTOTrainer):
        assert any(log["kl"] > 1e-2 for log in logs), "the case shows nothing while the divergence is 0"


@pytest.mark.parametrize("case", OTHERS.values(), ids=OTHERS.keys())
def test_a_cost_budget_is_refused(case, tmp_path):
    trainer = build(case, tmp_path, SLSAMConfig(cost_budget=1.0, design="depth"))
    with pytest.raises(ValueError, match="needs a cost model, and only SFTTrainer's steps can be counted"):
        trainer.train()


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_(en|dis)able. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_(en|dis)able. is deprecated:FutureWarning")  # by TRL 1.16
@pytest.mark.parametrize("case", [OTHERS["DPO"], OTHERS["reward"]], ids=["DPO", "reward"])
def test_a_partial_ascent_takes_whole_pairs(case, tmp_path):
    """Of four pairs, stacked as four chosen above four rejected sequences, the ascent takes one of each."""
    config = SLSAMConfig(rho=0.05, active_fraction=0.5, ascent="partial", ascent_fraction=0.25)
    trainer = build(case, tmp_path, config, per_device_train_batch_size=4, max_steps=1)
    seen, compute_loss = [], trainer.compute_loss

    def noting(model, inputs, *args, **kwargs):
        seen.append(inputs["input_ids"])
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = noting
    trainer.train()
    part, whole = seen
    assert part.shape[0] == 2
    assert whole.shape[0] == 8
    assert torch.equal(part, whole[[0, 4]])


def test_the_model_card_keeps_the_trainers_own_citation():
    trainer = SimpleNamespace(_name=DPOTrainer._name, _paper=DPOTrainer._paper)
    name_on_cards(trainer)
    assert trainer._name == "DPO and SL-SAM"
    assert trainer._paper["id"] == "2602.09395"
    assert trainer._paper["citation"].index("rafailov2023direct") < trainer._paper["citation"].index("2602.09395")
    plain = SimpleNamespace()  # a trainer of transformers has no such card
    name_on_cards(plain)
    assert not vars(plain)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_(en|dis)able. is deprecated:FutureWarning")  # by TRL 1.16
@pytest.mark.parametrize("case", [OTHERS["DPO"], OTHERS["reward"]], ids=["DPO", "reward"])
def test_small_passes_gather_nothing(case, tmp_path, monkeypatch):
    """What is gathered for metrics makes the host wait, and ranks for each other."""
    calls = []
    gather = Accelerator.gather
    monkeypatch.setattr(Accelerator, "gather", lambda self, value: calls.append(0) or gather(self, value))

    def count(config):
        calls.clear()
        build(case, tmp_path, config, max_steps=2).train()
        return len(calls)

    assert count(SLSAMConfig(trace=False)) == count(None) > 0
