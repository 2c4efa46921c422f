"""What runs otherwise than meant is told once, as a warning, stands in the adapter's record, and is shown."""

import json
import logging

import pytest
import torch
from peft import LoraConfig
from transformers import BartConfig, CLIPVisionConfig, LlamaConfig, LlavaConfig

from slsam_peft import SLSAM, SLSAMConfig, arms_of
from slsam_peft.adapters.inspect import inspect
from slsam_peft.algorithm.fallbacks import Fallback, Fallbacks
from slsam_peft.algorithm.step import Passes
from slsam_peft.cli.main import main
from slsam_peft.errors import UserError
from slsam_peft.models.foresight import plans_in_part
from slsam_peft.saving.recorded import fallbacks_in, read_record
from slsam_peft.trainer.trainer import SLSAMTrainer
from tests.decoders import batch, decoder, passes_of
from tests.families import batch_of, model_of
from tests.tiny import build

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]

ESTIMATE = "costs are an estimate"
RIDES_NOT = "no sequence rides along in the pass of another batch"


def told(caplog):
    """Return the package's warnings."""
    return [r for r in caplog.records if r.levelno == logging.WARNING and r.name.startswith("slsam_peft")]


def test_each_is_told_once_whatever_its_reason(caplog):
    found = Fallbacks()
    for why in ("one reason", "another reason"):
        found.add("passes are not cut", why, "It costs 2.")
    assert [str(f) for f in found] == ["passes are not cut: one reason. It costs 2."]
    assert [r.getMessage() for r in told(caplog)] == ["passes are not cut: one reason. It costs 2."]


def test_what_an_earlier_process_recorded_is_kept_and_told_again_where_it_happens_again(caplog):
    found = Fallbacks()
    found.recall([Fallback("a", "b", "C."), Fallback("d", "e", "F.")])
    assert not told(caplog)
    found.add("d", "g", "F.")
    assert [f.what for f in found] == ["a", "d"]
    assert len(told(caplog)) == 1


def test_a_trainer_tells_records_and_shows(tmp_path, caplog):
    """DoRA's factors cannot run with two weights, so that `"auto"` makes a pass of its own."""
    adapter = LoraConfig(r=2, use_dora=True, task_type="CAUSAL_LM")
    trainer = build(SLSAMTrainer, tmp_path, SLSAMConfig(), peft_config=adapter, max_steps=2)
    trainer.train()
    mine = [r for r in told(caplog) if RIDES_NOT in r.getMessage()]
    assert len(mine) == 1
    assert mine[0].name == "slsam_peft.trainer.trainer"
    assert "only plain pairs of LoRA factors" in mine[0].getMessage()
    trainer.save_model(str(tmp_path))
    assert fallbacks_in(read_record(tmp_path)) == list(trainer.slsam_fallbacks)
    assert any(RIDES_NOT in note for note in inspect(str(tmp_path), "block").notes)


@pytest.mark.parametrize("requires", [False, True])
def test_blocks_that_plain_training_would_leave_as_they_are_are_told_of(requires):
    """Reentrant checkpointing passes no gradient on where the input of the blocks requires none."""
    model = decoder("llama", True)
    if not requires:
        model.get_input_embeddings()._forward_hooks.clear()
    arms = arms_of(model)
    slsam = SLSAM(arms, SLSAMConfig(rho=0.1, active_fraction=1.0))
    closure, forward_only = passes_of(lambda: model(**batch()).loss)
    slsam.update(closure, None, forward_only)
    assert all(p.grad is not None for arm in arms for p in arm.parameters)
    said = [f.what for f in slsam.fallbacks if f.what.startswith("blocks are trained that plain training leaves")]
    assert len(said) == (not requires)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_stages_whose_inner_blocks_plain_training_leaves_are_told_of(checkpointing):
    """A stage of Segformer is no checkpointed block; it holds some, whose input requires no gradient."""
    model = model_of("segformer", checkpointing)
    batch = batch_of("segformer")
    arms = arms_of(model)
    upper = torch.arange(len(arms)) >= len(arms) - 2
    slsam = SLSAM(arms, SLSAMConfig(rho=0.1, active_fraction=0.5, descent="all", design=lambda p, g: upper))
    closure, forward_only = passes_of(lambda: model(**batch).loss)
    slsam.update(closure, None, forward_only)
    said = [f.what for f in slsam.fallbacks if f.what.startswith("blocks are trained that plain training leaves")]
    assert len(said) == checkpointing


def test_where_nothing_falls_back_the_record_says_so(tmp_path):
    trainer = build(SLSAMTrainer, tmp_path, SLSAMConfig(), max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path))
    assert json.loads((tmp_path / "slsam.json").read_text())["fallbacks"] == []
    assert not any("fallback" in note for note in inspect(str(tmp_path), "block").notes)


def test_records_of_earlier_versions_are_read_and_damaged_ones_are_refused_by_name(tmp_path):
    trainer = build(SLSAMTrainer, tmp_path, SLSAMConfig(rho=0.0))
    trainer.save_model(str(tmp_path))
    path = tmp_path / "slsam.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in record.items() if k != "fallbacks"}))
    assert fallbacks_in(read_record(tmp_path)) == []
    for wrong in ("a text", [{"what": "a"}], [{"what": "a", "why": 1, "costs": "b"}]):
        path.write_text(json.dumps({**record, "fallbacks": wrong}))
        with pytest.raises(UserError, match="fallbacks is .* it must be a list of mappings of what, why, costs"):
            read_record(tmp_path)
        assert any("fallbacks is" in note for note in inspect(str(tmp_path), "block").notes)


def test_what_a_checkpoint_recorded_is_kept_when_training_goes_on(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    first = build(SLSAMTrainer, tmp_path, SLSAMConfig(), **settings)
    first.slsam_fallbacks.add("something", "for a reason", "It costs.")
    first.train()
    second = build(SLSAMTrainer, tmp_path, SLSAMConfig(), **settings)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert Fallback("something", "for a reason", "It costs.") in list(second.slsam_fallbacks)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"model_type": "llama"}, []),
        (
            {"model_type": "qwen3_moe", "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
            ["the hidden-state cache is off", RIDES_NOT],
        ),
        (
            {
                "model_type": "gemma3n_text",
                "num_kv_shared_layers": 2,
                "vocab_size_per_layer_input": 64,
                "hidden_size_per_layer_input": 8,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "intermediate_size": [48] * 4,
                "activation_sparsity_pattern": [0.0] * 4,
                "laurel_rank": 4,
            },
            ["the hidden-state cache is off between those blocks"],
        ),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_the_plan_says_what_the_structure_shows(model, expected, tmp_path, capsys):
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    (tmp_path / "config.json").write_text(json.dumps({**sizes, **model}))
    command = ["plan", "--model", str(tmp_path), "--max_length", "64", "--lora_target_modules", "q_proj", "v_proj"]
    assert main([*command, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [fallback["what"] for fallback in plan["fallbacks"]] == expected
    assert plan["cost"]["rides"] == (RIDES_NOT not in expected)
    assert main(command) == 0
    assert capsys.readouterr().out.count("Falls back") == len(expected)


def test_the_plan_of_a_model_of_several_stacks_is_said_to_be_an_estimate(tmp_path, capsys):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes)
    both = LlavaConfig(vision_config=CLIPVisionConfig(image_size=8, patch_size=4, **sizes), text_config=text)
    for config, others in ((text, None), (both, "vision_config")):
        folder = tmp_path / config.model_type
        config.save_pretrained(folder)
        command = ["plan", "--model", str(folder), "--max_length", "64", "--lora_target_modules", "q_proj"]
        assert main([*command, "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        estimates = [f["why"] for f in plan["fallbacks"] if f["what"] == ESTIMATE]
        assert len(estimates) == (others is not None)
        assert all(f"has {others} beside it" in why for why in estimates)
        assert main(command) == 0
        assert (f"Falls back: {ESTIMATE}" in capsys.readouterr().out) == (others is not None)


def test_the_plan_of_a_decoder_says_that_its_encoder_is_left_out():
    found = plans_in_part(BartConfig())
    assert found is not None
    assert "has an encoder beside it" in found.why


def test_the_plan_prices_second_passes_of_routers_as_whole(tmp_path, capsys):
    config = {
        "model_type": "mixtral", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4,
    }  # fmt: skip
    costs = []
    for coefficient in (0.001, 0.0):
        (tmp_path / "config.json").write_text(json.dumps({**config, "router_aux_loss_coef": coefficient}))
        command = ["plan", "--model", str(tmp_path), "--max_length", "64", "--lora_target_modules", "q_proj"]
        assert main([*command, "--method", "paper", "--json"]) == 0
        costs.append(json.loads(capsys.readouterr().out)["cost"]["expected"])
    assert costs[0] > costs[1]


def test_a_step_whose_drawn_arm_is_not_perturbed_is_told(caplog):
    """One of two drawn arms has no part in the loss."""

    class Unused(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x).square().mean()

    torch.manual_seed(0)
    model, x = Unused(), torch.randn(2, 3)
    slsam = SLSAM(arms_of(model, "module"), SLSAMConfig(rho=0.1, active_fraction=1.0))
    for _ in range(2):
        slsam.update(passes_of(lambda: model(x))[0])
    assert sum("a drawn arm is not perturbed" in r.getMessage() for r in told(caplog)) == 1
    assert "unused takes no part" in caplog.text


def test_an_idle_step_is_logged_once_where_the_whole_batch_makes_an_inexact_ascent():
    """Its only logged pass is the descent: what counts tokens there must see a batch without a gradient, too."""
    torch.manual_seed(0)
    used, unused = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    model, x, logged = torch.nn.ModuleDict({"used": used, "unused": unused}), torch.randn(2, 3), []
    config = SLSAMConfig(rho=0.1, active_fraction=0.5, ascent="partial", design=lambda p, g: torch.tensor([0, 1]) > 0)
    slsam = SLSAM(arms_of(model, "module"), config)

    def loss():
        return used(x).square().mean()

    closure, forward_only = passes_of(loss)

    def counted():
        logged.append(len(x))
        return closure()

    for _ in range(2):
        reported = slsam.accumulate(Passes(counted, closure, forward_only, sequences=1))
        assert float(reported) == pytest.approx(float(loss().detach()))
    assert slsam.skipped == 2
    assert len(logged) == 2
