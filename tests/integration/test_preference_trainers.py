"""TRL's preference trainers by the mixin, in one line each."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer

import slsam_peft
from slsam_peft import SLSAMConfig, SLSAMMixin
from slsam_peft.algorithm.adversary import Adversary
from slsam_peft.algorithm.noise import WeightNoise
from slsam_peft.trainer.paper import name_on_cards
from tests.tiny import completions, llama, lora, preferences, reward_model, sft_args, tokenizer
from tests.tolerances import FLOAT32_NORMS
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


NOISY = {"a name": {"method": "flat_lora"}, "an object": {"method": "auto", "ascent": WeightNoise(0.1)}}


@pytest.mark.parametrize("settings", NOISY.values(), ids=NOISY)
@pytest.mark.parametrize("name", ["DPO", "KTO"])
def test_noise_on_weights_that_are_the_reference_too_is_refused(name, settings, tmp_path):
    with pytest.raises(
        ValueError, match=rf"SLSAM{name}Trainer takes its reference.*Set precompute_ref_log_probs=True"
    ):
        build(OTHERS[name], tmp_path, SLSAMConfig(**settings))
    if settings["method"] == "flat_lora":
        build(OTHERS[name], tmp_path, SLSAMConfig(**settings, rho=0.0))
        build(OTHERS["reward"], tmp_path, SLSAMConfig(**settings))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_(en|dis)able. is deprecated:FutureWarning")  # by TRL 1.16
def test_noise_leaves_a_reference_of_its_own_alone(tmp_path):
    """As a second model and as log-probabilities that were made before training: the same rewards, in every step."""

    def rewards(**arguments):
        cls, config_class, *_ = OTHERS["DPO"]
        given = {"ref_model": llama()} if arguments.pop("second", False) else {}
        trainer = cls(
            llama(),
            args=sft_args(tmp_path, config_class=config_class, learning_rate=0.1, **arguments),
            train_dataset=preferences(),
            processing_class=tokenizer(),
            peft_config=lora(),
            slsam_config=SLSAMConfig(method="flat_lora", rho=0.3),
            **given,
        )
        trainer.train()
        return [[log[f"rewards/{side}"] for side in ("chosen", "rejected")] for log in trainer.state.log_history[:-1]]

    ahead, second = rewards(precompute_ref_log_probs=True), rewards(second=True)
    assert len(ahead) == 3
    for one, two in zip(ahead, second, strict=True):
        assert one == pytest.approx(two, rel=FLOAT32_NORMS, abs=FLOAT32_NORMS)
    assert any(abs(reward) > 100 * FLOAT32_NORMS for step in ahead for reward in step)


RULES = {
    "bar": {"method": "bar"},
    "bi_lora": {"method": "bi_lora"},
    "flat_lora": {"method": "flat_lora", "rho": 0.3},
    "zeroth_order": {"method": "auto", "ascent": "zeroth_order"},
}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_(en|dis)able. is deprecated:FutureWarning")  # by TRL 1.16
@pytest.mark.parametrize("rule", [r if r == "flat_lora" else pytest.param(r, marks=pytest.mark.slow) for r in RULES])
def test_rules_of_other_papers_train_with_preferences(rule, tmp_path):
    """With log-probabilities of the reference that were made before training; away from where plain training goes."""
    before = {"precompute_ref_log_probs": True}
    trainers = [build(OTHERS["DPO"], tmp_path, config, **before) for config in (None, SLSAMConfig(**RULES[rule]))]
    for trainer in trainers:
        trainer.train()
    plain, ours = ([p for p in t.model.parameters() if p.requires_grad] for t in trainers)
    assert trainers[1].slsam.steps == 3
    assert trainers[1].slsam.skipped == 0
    assert any(not torch.equal(p, q) for p, q in zip(plain, ours, strict=True))


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
    name_on_cards(trainer, SLSAMConfig())
    assert trainer._name == "DPO and SL-SAM"
    assert trainer._paper["id"] == "2602.09395"
    assert trainer._paper["citation"].index("rafailov2023direct") < trainer._paper["citation"].index("2602.09395")
    plain = SimpleNamespace()  # a trainer of transformers has no such card
    name_on_cards(plain, SLSAMConfig())
    assert not vars(plain)


OWN = "2602.09395"
CARDS = {
    "bar": ({"method": "bar"}, "BAR", "2410.14802", {"2410.14802"}),
    "obar, drawn": ({"method": "auto", "ascent": "obar"}, "SL-SAM with oBAR", OWN, {"2410.14802"}),
    "bi_lora": ({"method": "bi_lora"}, "Bi-LoRA", "2508.19564", {"2508.19564"}),
    "bi_lora, an object": (
        {"method": "auto", "ascent": Adversary(0.2)},
        "SL-SAM with Bi-LoRA",
        OWN,
        {"2508.19564"},
    ),
    "flat_lora": ({"method": "flat_lora"}, "Flat-LoRA", "2409.14396", {"2409.14396"}),
    "flat_lora, drawn": (
        {"method": "flat_lora", "active_fraction": 0.5},
        "SL-SAM with Flat-LoRA",
        OWN,
        {"2409.14396"},
    ),
    "sampa": ({"method": "auto", "ascent": "sampa"}, "SL-SAM with SAMPa", OWN, {"2410.10683"}),
    "two rules": (
        {"method": "auto", "ascent": "zeroth_order", "radius": "asam"},
        "SL-SAM with ZO-SAM and ASAM",
        OWN,
        {"2603.13115", "2102.11600"},
    ),
    "neuron": ({"method": "sam", "radius": "neuron"}, "SL-SAM with FT-SAM", OWN, {"2304.11823"}),
    "weight": ({"method": "sam", "radius": "weight"}, "SL-SAM", OWN, set()),
    "plain": ({"method": "bar", "rho": 0.0}, "SL-SAM", OWN, set()),
}


@pytest.mark.parametrize(("settings", "name", "linked", "cited"), CARDS.values(), ids=CARDS)
def test_the_model_card_names_the_rule_and_cites_its_paper(settings, name, linked, cited):
    """Whatever a rule's name is, it is in the card's text, where its paper is in the table of rules."""
    trainer = SimpleNamespace(_name=DPOTrainer._name, _paper=DPOTrainer._paper)
    name_on_cards(trainer, SLSAMConfig(**settings))
    assert trainer._name == f"DPO and {name}"
    assert trainer._paper["id"] == linked
    found = set(re.findall(r"eprint += \{([\d.]+)\}", trainer._paper["citation"])) - {"2305.18290"}
    assert found == {OWN, *cited}
    assert "rafailov2023direct" in trainer._paper["citation"]
    assert trainer._paper["title"] in trainer._paper["citation"]


def test_every_rule_with_a_paper_is_cited():
    """As the method's page has it: no rule is without its own one on a card."""
    table = (
        (Path(slsam_peft.__file__).parent / "algorithm" / "README.md")
        .read_text()
        .split("## Rules of other papers")[1]
        .split("\n\n")[2]
    )
    for row in table.splitlines()[2:]:
        papers = set(re.findall(r"arXiv (\d+\.\d+)", row)) if "| ours" not in row else set()
        for field, name in re.findall(r'(radius|ascent)="(\w+)"', row):
            trainer = SimpleNamespace(_name="SFT", _paper={})
            name_on_cards(trainer, SLSAMConfig(method="auto", **{field: name}))
            assert all(paper in trainer._paper["citation"] for paper in papers), name
            assert (trainer._paper["citation"].count("@misc") == 2) == ("| ours" not in row), name


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
