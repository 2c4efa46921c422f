"""`slsam-peft plan`: numbers, tables, errors, and what it takes to make them."""

import dataclasses
import json
import resource
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig
from trl import ModelConfig, SFTConfig

from slsam_peft import SLSAM, arms_of
from slsam_peft.algorithm import noise
from slsam_peft.cli import plan, plan_facts
from slsam_peft.cli.main import main
from slsam_peft.cli.parsing import Parser
from slsam_peft.config import SLSAMConfig
from slsam_peft.cost.memory import NF4_BYTES, NF4_NESTED_BYTES
from slsam_peft.cost.model import CostModel
from slsam_peft.models.shapes import BUILT_IN, find_config, meta_model
from slsam_peft.presets import BANDITS
from slsam_peft.trainer.factors import factors_of
from tests.tiny import lora

# Parameters of the published checkpoints, as their repositories on huggingface.co state them.
PUBLISHED = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "smollm2-135m": 134_515_008,
    "gemma-3-270m": 268_098_176,
}


@pytest.fixture
def folder(tmp_path):
    """A folder with the configuration of a tiny Llama."""
    LlamaConfig(
        vocab_size=500, hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    return str(tmp_path)


def planned(capsys, *argv):
    assert main(["plan", "--json", *argv]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_shapes_have_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(find_config(name))
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


def test_plan_of_a_local_configuration(capsys, folder):
    made = planned(capsys, "--model", folder, "--batch_size", "4", "--max_length", "64", "--lora_r", "4")
    cost = CostModel.from_model(meta_model(find_config(folder), lora_r=4), True)
    assert made["cost"]["plain_flops"] == cost.plain([(4, 64)])
    assert made["cost"]["dense_sam"] == 2
    assert (made["cost"]["sequences"], made["cost"]["ascent_sequences"], made["cost"]["rides"]) == (4, 1, True)
    assert [arm["name"].rpartition(".")[2] for arm in made["arms"]] == ["0", "1", "2", "3"]
    assert sum(arm["parameters"] for arm in made["arms"]) == made["model"]["trainable_parameters"]
    parts = {k: v for k, v in made["memory"].items() if k not in ("total", "block", "logits")}
    assert made["memory"]["total"] == sum(parts.values()) + max(made["memory"]["block"], made["memory"]["logits"])


def held_by(rule, folder, monkeypatch):
    """Return the bytes of what a rule keeps and of the largest noisy weight, with its noise, that a step really has.

    Of float32 adapters on a bfloat16 base, as the plan's.
    """
    base = AutoModelForCausalLM.from_config(find_config(folder)).bfloat16()
    model = get_peft_model(base, lora(), autocast_adapter_dtype=True)
    slsam = SLSAM(arms_of(model), SLSAMConfig(method=rule), factors=factors_of(model))
    slsam.learning_rate = lambda parameter: 1e-3
    drawn, noisy = [], []
    weight, seeded_normal = noise._NoisyLinear.weight, noise.seeded_normal

    def noted(*args):
        made = weight(*args)
        noisy.append(drawn[-1].nbytes + made.nbytes)
        return made

    def drawing(*args):
        drawn.extend(seeded_normal(*args))
        return drawn[-1:]

    monkeypatch.setattr(noise._NoisyLinear, "weight", noted)
    monkeypatch.setattr(noise, "seeded_normal", drawing)

    def closure():
        loss = model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss
        loss.backward()
        return loss

    slsam.update(closure)
    state = slsam.ascent.state_dict()
    return {
        "adapters": sum(p.nbytes for p in slsam.parameters),
        "kept_by_rule": sum(x.nbytes for x in state.values() if x.dim() == 2),
        "noise": max(noisy, default=0),
    }


@pytest.mark.parametrize("rule", ["bar", "bi_lora", "flat_lora"])
def test_what_rules_of_other_papers_hold_is_what_is_planned(rule, capsys, folder, monkeypatch):
    """Counted in a step."""
    base = ("--model", folder, "--batch_size", "4", "--max_length", "64", "--lora_r", "4")
    memory = planned(capsys, *base, "--method", rule)["memory"]
    held = held_by(rule, folder, monkeypatch)
    assert {name: memory[name] for name in held} == held
    assert bool(held["kept_by_rule"]) == (rule == "bi_lora")
    assert bool(held["noise"]) == (rule == "flat_lora")


def test_rules_of_other_papers_are_planned(capsys, folder):
    """What each costs beside a pass of its own kind."""
    base = ("--model", folder, "--batch_size", "4", "--max_length", "64", "--lora_r", "4")
    made = {m: planned(capsys, *base, "--method", m) for m in ("bar", "bi_lora", "flat_lora")}
    plain = planned(capsys, *base, "--rho", "0")["cost"]["expected"]
    assert made["bar"]["cost"]["expected"] == plain
    assert 1 < made["bi_lora"]["cost"]["expected"] / plain < 1.3  # factors are a large part of a model so thin
    assert 1 < made["flat_lora"]["cost"]["expected"] / plain < 1.02
    assert all(m["cost"]["ascent_sequences"] == 0 and not m["cost"]["rides"] for m in made.values())
    memory = {name: m["memory"] for name, m in made.items()}
    assert memory["bar"]["perturbation"] == memory["flat_lora"]["perturbation"] == memory["bar"]["kept_by_rule"] == 0
    half = (*base, "--load_in_4bit", "--adapter_dtype", "keep", "--method", "auto", "--ascent", "obar")
    rounded = planned(capsys, *half)["memory"]
    assert rounded["kept_by_rule"] == 2 * rounded["adapters"] > 0, "float32 beside bfloat16"
    ahead, sampa = (planned(capsys, *base, "--method", "auto", "--ascent", a)["cost"] for a in ("ahead", "sampa"))
    assert sampa["expected"] == ahead["expected"]
    small, zeroth = (
        planned(capsys, *base, "--method", "auto", "--ascent", a)["cost"]["expected"]
        for a in ("partial", "zeroth_order")
    )
    assert plain < zeroth < small
    assert main(["plan", *base, "--ascent", "sampa", "--gradient_accumulation_steps", "2"]) == 2
    assert "--ascent sampa needs steps of one micro-batch" in " ".join(capsys.readouterr().err.split())
    assert planned(capsys, *base, "--method", "sam", "--radius", "neuron")["cost"]["expected"] > 1.9


def test_a_budget_is_met_and_its_design_shown(capsys, folder):
    made = planned(capsys, "--model", f"{folder}/config.json", "--design", "depth", "--cost_budget", "1.2")
    assert made["cost"]["expected"] == pytest.approx(1.2, rel=1e-3)
    inclusion = [arm["inclusion"] for arm in made["arms"]]
    assert inclusion == sorted(inclusion)
    assert inclusion[-1] == 1
    assert sum(inclusion) / 4 == pytest.approx(made["cost"]["active_fraction"], rel=1e-6)


@pytest.mark.slow
def test_flags_change_what_they_should(capsys):
    base = ["--model", "smollm2-135m", "--batch_size", "2", "--max_length", "256"]
    base += ["--ascent", "two_pass"]
    plain = planned(capsys, *base)["memory"]
    packed = planned(capsys, *base, "--load_in_4bit")["memory"]
    linear = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    assert plain["weights"] - packed["weights"] == pytest.approx(linear * (2 - NF4_BYTES), rel=1e-9)
    assert planned(capsys, *base, "--optim", "sgd")["memory"]["optimizer"] == 0
    assert planned(capsys, *base, "--rho", "0")["memory"]["perturbation"] == 0
    assert planned(capsys, *base, "--gradient_checkpointing", "false")["memory"]["activations"] > plain["activations"]
    assert planned(capsys, *base, "--ascent", "remembered")["memory"]["gradient_memory"] == plain["adapters"] / 2
    assert planned(capsys, *base, "--method", "auto", "--ascent", "partial")["memory"]["gradient_memory"] == 0
    assert (
        plain["adapters"]
        == 2 * planned(capsys, *base, "--load_in_4bit", "--adapter_dtype", "keep")["memory"]["adapters"]
    )
    assert (
        planned(capsys, *base, "--gradient_accumulation_steps", "3")["memory"]["hidden_state_cache"]
        == 3 * plain["hidden_state_cache"]
    )
    limited = planned(capsys, *base, "--gradient_accumulation_steps", "3", "--hidden_state_cache_limit_mib", "1")[
        "memory"
    ]["hidden_state_cache"]
    assert limited == plain["hidden_state_cache"] == 2 * 256 * 576 * 2


def test_tables_name_the_parts_and_the_verdict(capsys, folder):
    argv = ["plan", "--model", folder, "--granularity", "module", "--batch_size", "2", "--max_length", "32"]
    assert main([*argv, "--memory", "24", "--arms"]) == 0
    shown = capsys.readouterr().out
    for word in (
        "28 arms",
        "0.self_attn.q_proj",
        "plain LoRA",
        "dense SAM",
        "optimizer states",
        "Fits: yes, a GPU of 24 GiB",
    ):
        assert word in shown
    assert main([*argv, "--memory", "0.5"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Fits: no, a GPU of 0.5 GiB lacks" in shown
    assert "--load_in_4bit" in shown


def test_the_answer_comes_first_and_arms_only_if_asked_for(capsys, folder, monkeypatch):
    monkeypatch.setattr(plan_facts, "_own_memory", lambda: None)  # whatever machine this is
    assert main(["plan", "--model", folder, "--batch_size", "2", "--max_length", "32"]) == 0
    shown = capsys.readouterr().out
    answers = [
        shown.index(word)
        for word in ("Cost: a step on 2 sequences, 1 of which makes", "Memory: ", "Fits: GPUs of 4 GiB or")
    ]
    assert answers == sorted(answers)
    assert answers[-1] < shown.index("dense SAM ")
    assert "inclusion" not in shown


@pytest.mark.slow
def test_a_model_that_fits_no_card_says_so(capsys, monkeypatch):
    monkeypatch.setattr(plan_facts, "_own_memory", lambda: None)
    base = ["--model", "smollm2-135m", "--batch_size", "2", "--max_length", "32"]
    assert planned(capsys, *base)["smallest_card_gib"] == 4
    assert planned(capsys, *base)["fits"] is None
    monkeypatch.setattr(plan_facts, "CARDS_GIB", (0.1,))
    assert planned(capsys, *base)["smallest_card_gib"] is None
    assert main(["plan", *base]) == 0
    assert "Fits: no single GPU that is sold. Try --load_in_4bit" in " ".join(capsys.readouterr().out.split())


def test_the_memory_of_this_machine_is_asked_for(capsys, folder, monkeypatch):
    monkeypatch.setattr(plan_facts, "_own_memory", lambda: 3.5)
    made = planned(capsys, "--model", folder)
    assert (made["memory_gib"], made["fits"]) == (3.5, True)
    assert planned(capsys, "--model", folder, "--memory", "0.1")["fits"] is False


def test_the_plan_does_not_depend_on_the_bandit(capsys, folder):
    words = ("--model", folder, "--design", "depth", "--active_fraction", "0.5")  # a whole arm, which all rules draw
    first, *others = (planned(capsys, *words, "--bandit", name) for name in BANDITS)
    assert all(other == first for other in others)


def test_long_lists_of_arms_are_shown_by_kind(capsys):
    assert main(["plan", "--model", "smollm2-135m", "--granularity", "module", "--max_length", "32", "--arms"]) == 0
    shown = capsys.readouterr().out
    assert "210 arms" in shown
    assert "*.mlp.up_proj (30)" in shown


def test_defaults_are_those_of_trl_and_of_the_method():
    parser = Parser("plan", "")
    plan.add_arguments(parser)
    values = parser.read(["--model", "x"])
    trl = {f.name: f.default for f in (*dataclasses.fields(SFTConfig), *dataclasses.fields(ModelConfig))}
    assert values.batch_size == trl["per_device_train_batch_size"]
    assert values.max_length == trl["max_length"]
    assert values.optim == trl["optim"]
    assert values.lora_r == trl["lora_r"]
    assert values.gradient_checkpointing == trl["gradient_checkpointing"]
    defaults = {f.name: f.default for f in dataclasses.fields(SLSAMConfig)}
    for name, value in vars(values).items():
        assert name not in defaults or value == defaults[name] or name == "adapter_dtype", name
    assert SLSAMConfig(method=values.method, ascent=values.ascent).resolved.method == "auto"


@pytest.mark.parametrize("nested", [False, True])
def test_packed_bytes_are_those_of_bitsandbytes(nested):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(512, 1024)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    size = packed.nbytes + state.absmax.nbytes + (state.state2.absmax.nbytes if nested else 0)
    assert size == weight.numel() * (NF4_NESTED_BYTES if nested else NF4_BYTES)


def test_help_needs_no_torch():
    code = (
        "import sys; from slsam_peft.cli.main import main; code = main(['plan', '--help']); "
        "sys.exit(code or 'torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--cost_budget" in done.stdout


@pytest.mark.slow
def test_70b_takes_less_than_a_minute_and_2_gib():
    argv = [
        "plan",
        "--model",
        "llama-3.1-70b",
        "--load_in_4bit",
        "--design",
        "depth",
        "--cost_budget",
        "1.0",
        "--json",
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "slsam_peft", *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60
    )  # of a core: what else runs is left out
    peak = after.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    assert peak < 2 * 2**30
    made = json.loads(done.stdout)
    assert len(made["arms"]) == 80
    assert made["cost"]["expected"] == pytest.approx(1.0, rel=1e-3)
    assert 36 * 2**30 < made["memory"]["weights"] < 42 * 2**30


AUTO = ["--batch_size", "8", "--max_length", "32"]


def test_the_cost_is_said_for_the_users_own_step(capsys, folder):
    """The count is 1 + m/N, whether the ascent's sequences ride along, run apart or come first in an accumulation."""

    def price(*argv):
        assert main(["plan", "--model", folder, *argv]) == 0
        return " ".join(capsys.readouterr().out.split()).partition("Cost: ")[2].partition("Fits")[0]

    said = price(*AUTO)
    assert said.startswith("a step on 8 sequences, 1 of which makes the ascent, beside the step before, is expected")
    assert "plain LoRA steps on the same 8 (1 + 1/8; dense SAM: 2.00)" in said
    assert "--method auto --ascent partial, a small pass for the ascent, costs the same and takes" in said
    assert "2 of which make the ascent, in a small pass" in price(
        *AUTO, "--method", "auto", "--ascent", "partial", "--ascent_sequences", "2"
    )
    said = price("--batch_size", "1", "--gradient_accumulation_steps", "8", "--max_length", "32")
    assert said.startswith("a step on 8 sequences, 1 of which makes the ascent, in a small pass of its own,")
    assert "--ascent partial" not in said
    assert "a step on 8 sequences, all of which make the ascent, is expected to cost" in price(
        *AUTO, "--method", "sam"
    )
    # The lowest of four blocks hands no gradient down, which TRL with checkpointing computes.
    assert "a step on 8 sequences is expected to cost 0.99" in price(*AUTO, "--rho", "0")


@pytest.mark.parametrize("steps", [1, 8])
def test_a_small_pass_takes_no_more_memory_than_plain_lora_but_e(capsys, folder, steps):
    argv = ["--model", folder, *AUTO, "--gradient_accumulation_steps", str(steps)]
    made = planned(capsys, *argv, "--method", "auto", "--ascent", "partial")
    kept = made["memory"]["perturbation"] + made["memory"]["hidden_state_cache"]
    assert made["memory"]["total"] - made["plain_memory"] == pytest.approx(kept)
    if steps == 1:
        assert (
            planned(capsys, *argv)["no_more_memory"]
            == made["memory"]["total"]
            < planned(capsys, *argv)["memory"]["total"]
        )


def test_hours_of_an_epoch_where_a_speed_is_known(capsys, folder):
    argv = ["--model", folder, *AUTO, "--rows", "1001", "--epochs", "3"]
    assert planned(capsys, *argv)["epoch"] == {
        "rows": 1001, "epochs": 3.0, "steps": 126, "plain_hours": None, "hours": None,
    }  # fmt: skip
    made = planned(capsys, *argv, "--seconds_per_step", "20")
    assert made["epoch"]["plain_hours"] == pytest.approx(0.7)
    assert made["epoch"]["hours"] == pytest.approx(0.7 * made["cost"]["expected"])
    assert main(["plan", *argv, "--seconds_per_step", "20"]) == 0
    assert "Epoch: 1,001 rows are 126 steps, 0." in " ".join(capsys.readouterr().out.split())
    assert planned(capsys, "--model", folder, *AUTO)["epoch"] is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ascent_sequences", "9"], "--ascent_sequences=9 is more than the 8 sequences of a step"),
        (["--rows", "0"], "--rows=0 is not allowed; it must be 1 or more"),
        (["--rows", "5", "--epochs", "nan"], "--epochs=nan is not allowed"),
        (["--seconds_per_step", "2"], "--seconds_per_step=2.0 needs --rows"),
        (["--rho", "1", "--loss_rise", "1"], "are both set"),
    ],
)
def test_wrong_numbers_are_refused(capsys, folder, argv, message):
    assert main(["plan", "--model", folder, *AUTO, *argv]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
