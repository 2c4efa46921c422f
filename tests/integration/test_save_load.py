"""Adapters that plain PEFT loads, and checkpoints that go on bit for bit."""

import inspect
import json
import shutil
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from slsam_peft import SLSAMConfig, SLSAMTrainer
from slsam_peft.saving.checkpoint import FILE_NAME, StateMismatchError
from tests.stateful import Following
from tests.tiny import build, llama, lora, texts, tokenizer, train

STEPS, CUT = 6, 3


def logits(model):
    ids = torch.arange(5, 45).reshape(2, 20)
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
    ids=["LoRA", "DoRA", "modules_to_save"],
)
def test_saved_adapter_loads_in_plain_peft_with_identical_logits(settings, tmp_path):
    config = SLSAMConfig(rho=0.03, active_fraction=0.6, design="depth")
    trainer = train(SLSAMTrainer, tmp_path / "out", config, peft_config=lora(**settings))
    trainer.save_model(str(tmp_path / "adapter"))
    before = logits(llama())
    loaded = logits(PeftModel.from_pretrained(llama(), tmp_path / "adapter"))
    assert torch.equal(loaded, logits(trainer.model))
    assert not torch.equal(loaded, before)


def test_the_model_card_names_method_and_settings(tmp_path):
    config = SLSAMConfig(rho=0.03, active_fraction=0.6, design="depth", ascent="partial", ascent_fraction=0.5)
    trainer = train(SLSAMTrainer, tmp_path / "out", config)
    trainer.save_model(str(tmp_path / "adapter"))
    trainer.create_model_card(model_name="mine")
    expected = ("sl-sam", "sl-sam:rho=0.03", "sl-sam:design=depth", "sl-sam:ascent=partial")
    expected += ("sl-sam:active_fraction=0.6", "sl-sam:ascent_fraction=0.5", "sl-sam:granularity=block")
    for folder in ("adapter", "out"):
        card = (tmp_path / folder / "README.md").read_text()
        header = card.split("---")[1]
        for tag in expected:
            assert f"- {tag}\n" in header, (folder, tag)


def test_the_model_card_of_a_checkpoint_names_the_paper(tmp_path):
    trainer = train(SLSAMTrainer, tmp_path, SLSAMConfig(active_fraction=0.6), save_strategy="steps", save_steps=3)
    assert SLSAMConfig.from_pretrained(tmp_path / "checkpoint-3") == trainer.slsam_config
    card = (tmp_path / "README.md").read_text()
    assert "trained with SFT and SL-SAM, a method introduced in [Sparse Layer Sharpness-Aware" in card
    assert "https://huggingface.co/papers/2602.09395" in card
    assert "eprint        = {2602.09395}" in card


class Draws(TrainerCallback):
    """Records what each step drew and where it left the probabilities."""

    def __init__(self):
        self.seen = {}
        self.trainer = None

    def on_step_end(self, args, state, control, **kwargs):
        slsam = self.trainer.slsam
        self.seen[state.global_step] = (slsam.active.tolist(), slsam.probabilities.tolist())


class Worse(TrainerCallback):
    """Makes each evaluation worse than the one before, so that the first is the best."""

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_loss"] = float(state.global_step)


def run(folder, config, resume=None, more=None, **settings):
    draws = Draws()
    trainer = build(
        SLSAMTrainer,
        folder,
        config,
        parts={"callbacks": [draws, Worse()], **(more or {})},
        **{"max_steps": STEPS, "save_strategy": "steps", "save_steps": CUT, **settings},
    )
    draws.trainer = trainer
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer, draws.seen


def logs(trainer):
    times = ("runtime", "per_second", "total_flos", "train_loss")
    times += ("num_tokens",)  # TRL 1.16 counts from 0 again in a resumed run
    return [{k: v for k, v in log.items() if not any(t in k for t in times)} for log in trainer.state.log_history]


RESUMED = {
    "two_pass": {},
    "all descend": {"descent": "all", "design": "depth"},
    "module arms": {"granularity": "module", "bandit": "paper"},
}
IN_A_NEW_PROCESS_TOO = {  # by test_resume.py, always
    "partial": {"ascent": "partial", "ascent_fraction": 0.5},
    "remembered": {"ascent": "remembered"},
    "depth": {"design": "depth"},
    "window": {"design": "window"},
}


@pytest.mark.parametrize(
    "settings",
    [
        *(pytest.param(settings, id=name) for name, settings in RESUMED.items()),
        *(pytest.param(s, id=name, marks=pytest.mark.slow) for name, s in IN_A_NEW_PROCESS_TOO.items()),
    ],
)
def test_resuming_is_bitwise_going_on(settings, tmp_path):
    """With three micro-batches per step and LoRA dropout: weights, optimizer, sampler and logs."""
    config = SLSAMConfig(rho=0.1, active_fraction=0.5, **settings)
    common = {"gradient_accumulation_steps": 3, "peft_config": lora(lora_dropout=0.2)}
    assert_goes_on(tmp_path, config, **common)


def assert_goes_on(folder, config, checkpoint=lambda path: path / f"checkpoint-{CUT}", **common):
    """A run resumed from the checkpoint of another ends as it did; return both."""
    whole, drawn = run(folder / "whole", made(config), **{k: made(v) for k, v in common.items()})
    resumed = checkpoint(folder / "whole")
    parted, again = run(folder / "parted", made(config), resumed, **{k: made(v) for k, v in common.items()})
    assert again == {step: seen for step, seen in drawn.items() if step > CUT}
    assert torch.equal(whole.slsam.probabilities, parted.slsam.probabilities)
    for (name, p), q in zip(whole.model.named_parameters(), parted.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert logs(whole)[-(STEPS - CUT) :] == logs(parted)[-(STEPS - CUT) :]
    first, second = (t.optimizer.state_dict()["state"] for t in (whole, parted))
    assert first.keys() == second.keys()
    for key, state in first.items():
        assert all(torch.equal(state[k], second[key][k]) for k in ("exp_avg", "exp_avg_sq", "step"))
    one, two = whole.slsam.state_dict(), parted.slsam.state_dict()
    assert one.keys() == two.keys()
    for key, value in one.items():
        same = torch.equal(value, two[key]) if isinstance(value, torch.Tensor) else value == two[key]
        assert same, key
    return whole, parted


def made(value):
    """Return a value of its own for each run where a function makes it."""
    return value() if inspect.isfunction(value) else value


def test_a_radius_that_keeps_something_goes_on_bit_for_bit(tmp_path, monkeypatch):
    """Each run has an object of its own; without what the checkpoint holds it would begin with shorter steps."""

    def config():
        return SLSAMConfig(method="auto", radius=Following())

    common = {"gradient_accumulation_steps": 3, "peft_config": lora(lora_dropout=0.2)}
    for trainer in assert_goes_on(tmp_path, config, **common):
        assert float(trainer.slsam.state_dict()["radius.mean"]) > 0
    monkeypatch.delattr(Following, "load_state_dict")
    with pytest.raises(StateMismatchError, match=r"holds 'mean', and .* has no load_state_dict.*accept_state_mism"):
        run(tmp_path / "again", config(), tmp_path / "whole" / f"checkpoint-{CUT}", **common)


def low_precision():
    """Return a model in bfloat16 that carries an adapter in bfloat16."""
    return get_peft_model(llama().bfloat16(), lora(lora_dropout=0.2, use_dora=True), autocast_adapter_dtype=False)


def dtypes(trainer):
    return {p.dtype for p in trainer.model.parameters() if p.requires_grad}


def test_adapters_in_16_bits_go_on_bit_for_bit(tmp_path):
    """PEFT widens them when it loads them."""
    config = SLSAMConfig(rho=0.1, active_fraction=0.5, adapter_dtype="keep")
    for trainer in assert_goes_on(tmp_path, config, model=low_precision, peft_config=None):
        assert dtypes(trainer) == {torch.bfloat16}


def test_a_cost_budget_stays_as_it_was_solved(tmp_path):
    """It is solved for the first batches of the run, which a resumed one does not see."""
    config = SLSAMConfig(rho=0.1, design="depth", cost_budget=1.2)
    for trainer in assert_goes_on(tmp_path, config, peft_config=lora(lora_dropout=0.2)):
        assert trainer.slsam.sampler.bandit.budget != build(SLSAMTrainer, tmp_path, config).slsam.sampler.bandit.budget


def test_going_on_from_the_last_checkpoint_that_transformers_finds(tmp_path):
    """As scripts do that know nothing of `resume_from_checkpoint=True`."""

    def last(folder):
        shutil.rmtree(folder / f"checkpoint-{STEPS}")
        return get_last_checkpoint(str(folder))

    assert_goes_on(tmp_path, SLSAMConfig(rho=0.1, active_fraction=0.5), last, peft_config=lora(lora_dropout=0.2))


@pytest.mark.parametrize("low", [pytest.param(False, marks=pytest.mark.slow), True], ids=["float32", "bfloat16"])
def test_the_best_model_comes_with_its_sampler(low, tmp_path):
    """Resumed or not, a run ends with adapter and sampler of its best checkpoint, in the adapter's precision."""
    config = SLSAMConfig(rho=0.1, active_fraction=0.5, adapter_dtype="keep")
    model = {"model": low_precision, "peft_config": None} if low else {"peft_config": lora(lora_dropout=0.2)}
    evaluation = {"eval_strategy": "steps", "eval_steps": CUT, "load_best_model_at_end": True}
    trainers = assert_goes_on(tmp_path, config, more={"eval_dataset": texts(4, 1)}, **model, **evaluation)
    saved = load_file(tmp_path / "whole" / f"checkpoint-{CUT}" / "adapter_model.safetensors")
    for trainer in trainers:
        assert trainer.state.global_step == STEPS
        assert trainer.state.best_global_step == trainer.slsam.steps == CUT
        assert dtypes(trainer) == {torch.bfloat16 if low else torch.float32}
        loaded = get_peft_model_state_dict(trainer.model)
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[name], value) for name, value in saved.items())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    train(SLSAMTrainer, folder, SLSAMConfig(rho=0.1, active_fraction=0.5), save_strategy="steps", save_steps=2)
    return folder / "checkpoint-2"


def resume(checkpoint, folder, config, peft_config="lora", steps=4):
    trainer = build(SLSAMTrainer, folder, config, peft_config=peft_config, max_steps=steps)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


def without(checkpoint, folder):
    copy = folder / "checkpoint-2"
    shutil.copytree(checkpoint, copy)
    (copy / FILE_NAME).unlink()
    return copy


def test_other_settings_are_refused_by_name(checkpoint, tmp_path):
    with pytest.raises(StateMismatchError, match=r"rho=0\.1 there, 0\.2 here") as caught:
        resume(checkpoint, tmp_path, SLSAMConfig(rho=0.2, active_fraction=0.5))
    assert "accept_state_mismatch=True" in str(caught.value)


def test_settings_that_change_no_step_are_not_compared(checkpoint, tmp_path):
    config = SLSAMConfig(rho=0.1, active_fraction=0.5, hidden_state_cache_limit_mib=1, max_skipped_steps=3)
    assert resume(checkpoint, tmp_path, config).slsam.steps == 4


def test_an_adapter_on_other_modules_is_refused_by_name(checkpoint, tmp_path):
    """PEFT itself would load the factors that fit and leave the rest."""
    config = SLSAMConfig(rho=0.1, active_fraction=0.5)
    with pytest.raises(ValueError, match=r"of another adapter: layers_to_transform=None there, \[1, 2, 4\] here"):
        resume(checkpoint, tmp_path, config, lora(target_modules=["q_proj"], layers_to_transform=[1, 2, 4]))


def test_a_checkpoint_of_a_plain_trainer_is_refused(checkpoint, tmp_path):
    plain = without(checkpoint, tmp_path)
    with pytest.raises(
        StateMismatchError, match=f"{FILE_NAME} does not exist: the checkpoint was not made with SL-SAM"
    ):
        resume(plain, tmp_path / "out", SLSAMConfig(rho=0.1, active_fraction=0.5))


def test_a_damaged_state_is_refused(checkpoint, tmp_path):
    damaged = without(checkpoint, tmp_path)
    content = (checkpoint / FILE_NAME).read_bytes()
    (damaged / FILE_NAME).write_bytes(content[: len(content) // 2])
    with pytest.raises(StateMismatchError, match="is damaged"):
        resume(damaged, tmp_path / "out", SLSAMConfig(rho=0.1, active_fraction=0.5))


@pytest.mark.parametrize("case", ["settings", "missing", "arms"])
def test_accepting_a_mismatch_goes_on_with_a_fresh_sampler(case, checkpoint, tmp_path, caplog):
    rho = 0.2 if case == "settings" else 0.1
    config = SLSAMConfig(
        rho=rho,
        active_fraction=0.5,
        granularity="module" if case == "arms" else "block",
        accept_state_mismatch=True,
    )
    folder = without(checkpoint, tmp_path) if case == "missing" else checkpoint
    trainer = resume(folder, tmp_path / "out", config)
    assert trainer.state.global_step == 4
    assert trainer.slsam.steps == 2, "the sampler counts from its fresh start"
    assert "The sampler starts afresh" in caplog.text


def test_accepting_a_mismatch_solves_the_cost_budget_anew(tmp_path):
    """A fresh sampler's budget is solved for the batches that come, not for those assumed before any was seen."""
    common = {"data": Dataset.from_list([{"text": " ".join(f"w{i}" for i in range(8))}] * 24)}
    common |= {"peft_config": lora(), "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    config = SLSAMConfig(rho=0.2, design="depth", cost_budget=1.2, accept_state_mismatch=True)
    first = train(SLSAMTrainer, tmp_path, replace(config, rho=0.1), **common)
    other = build(SLSAMTrainer, tmp_path, config, **{**common, "max_steps": 4})
    assumed = other.slsam.sampler.bandit.budget
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert other.slsam.steps == 2
    assert other.slsam.sampler.bandit.budget == first.slsam.sampler.bandit.budget != assumed


def test_the_state_is_plain_data(checkpoint):
    """The state holds the settings as plain JSON: no pickle, readable by anything."""
    from safetensors import safe_open

    with safe_open(checkpoint / FILE_NAME, framework="pt") as file:
        state = json.loads(file.metadata()["state"])
    assert state["config"]["rho"] == 0.1
    assert len(state["arms"]) == 5


def test_only_adapter_and_tokenizer_are_saved(tmp_path):
    """What `save_model` writes is the adapter and the tokenizer, never the base model or the sampler."""
    trainer = train(SLSAMTrainer, tmp_path / "out", SLSAMConfig())
    trainer.save_model(str(tmp_path / "adapter"))
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"} <= names
    assert FILE_NAME not in names
    assert not any(name.startswith("model") for name in names)
    assert tokenizer().vocab_size == trainer.processing_class.vocab_size
