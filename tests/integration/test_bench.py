"""The clock: modes in alternation on one model, each beside its prediction."""

import gc
import json
import math
import weakref

import pytest
import torch
from transformers import BitsAndBytesConfig, LlamaForCausalLM
from trl import SFTTrainer

from slsam_peft import SLSAMConfig
from slsam_peft.algorithm.radius import Length, Offsets
from slsam_peft.algorithm.stack import Stack
from slsam_peft.algorithm.swap import Swap
from slsam_peft.cli.bench_plot import draw
from slsam_peft.cli.main import main
from slsam_peft.cli.outputs import write_figure
from slsam_peft.errors import UserError
from slsam_peft.runs.bench import run_bench
from slsam_peft.runs.bench_check import CHANGE, IN_PLACE, RADII, STACK, SWAP, run_check
from slsam_peft.runs.bench_modes import MODES as ALL
from slsam_peft.runs.bench_modes import REFERENCE, Mode, select_modes
from tests.tiny import llama, tokenizer

MODES = {
    REFERENCE: Mode(),
    "sam": ALL["sam"],
    "half": Mode(SLSAMConfig(design="depth", active_fraction=0.5)),
    "small pass": ALL["auto, small pass"],
    "auto": ALL["auto"],
    "accumulated": ALL["auto, accumulated"],
}


def test_every_mode_is_timed_in_every_round_and_leaves_the_base_alone(tmp_path, capsys):
    model = llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    told = []
    measured = run_bench(
        model, tokenizer(), lora_r=4, batch=4, length=16, steps=2, rounds=2, modes=MODES, tell=told.append
    )
    assert [m.mode for m in measured] == list(MODES)
    assert told == [f"round {n} of 2: {mode}" for n in (1, 2) for mode in MODES]
    for m in measured:
        assert len(m.seconds) == len(m.ratios) == len(m.peak_bytes) == 2
        assert all(s > 0 for s in m.seconds)
        assert m.summary()["peak_bytes"] > 0
    plain, sam, half, small, ahead, accumulated = (m.summary() for m in measured)
    assert plain["ratio"] == plain["predicted"] == 1.0
    assert math.isclose(sam["predicted"], 2.0, rel_tol=0.1)
    assert half["predicted"] < sam["predicted"]
    # Four sequences, one of which makes the ascent; backward no further down than the drawn blocks.
    assert 1.15 < small["predicted"] <= 1.26
    assert 1.15 < accumulated["predicted"] <= 1.26
    # One of the next step, and a second pair of factors, which are wide in a model so thin.
    assert 1.25 <= ahead["predicted"] < 1.6
    after = {name.replace(".base_layer", ""): p for name, p in model.named_parameters()}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    picture = tmp_path / "bench.png"
    write_figure(picture, draw(measured))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_no_mode_pays_for_the_optimizer_of_another(monkeypatch):
    """Peak memory is a mode's own: optimizers are gone when the next mode trains."""
    made, alive = [], []
    create = SFTTrainer.create_optimizer

    def watched(self, *args, **kwargs):
        gc.collect()
        alive.append(sum(seen() is not None for seen in made))
        optimizer = create(self, *args, **kwargs)
        made.append(weakref.ref(optimizer))
        return optimizer

    monkeypatch.setattr(SFTTrainer, "create_optimizer", watched)
    modes = {name: MODES[name] for name in (REFERENCE, "sam", "auto")}
    run_bench(llama(), tokenizer(), lora_r=4, batch=2, length=12, steps=1, rounds=2, modes=modes)
    assert alive == [0] * 6


def test_one_sequence_at_a_time_takes_several():
    accumulated = {name for name, mode in ALL.items() if mode.accumulated}
    assert len(accumulated) == 2
    ours = [name for name, mode in ALL.items() if not mode.named]
    assert list(select_modes(None, 2, 1)) == ours
    assert list(select_modes(["bi-lora"], 2, 1)) == [REFERENCE, "bi-lora"], "of other papers, where it is named"
    for accumulation in (1, 4):
        assert set(ours) - set(select_modes(None, 1, accumulation)) == accumulated
    with pytest.raises(UserError, match="'auto, accumulated' needs --batch_size 2 or more"):
        select_modes(["auto, accumulated"], 1, 4)


def test_a_misspelt_mode_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"'papre' is not known\. Did you mean 'paper'\? The modes are:\n  plain LoRA"):
        select_modes(["papre"], 2, 1)


def test_the_command_times_prints_and_writes(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    llama(num_hidden_layers=2).save_pretrained("model")
    tokenizer().save_pretrained("model")
    words = "bench --model model --lora_r 4 --batch_size 1 --max_length 16 --steps 1 --rounds 1 --rows 1000 --modes"
    assert main([*words.split(), "sam", "auto", "--output", "a.json", "--plot", "a.svg"]) == 0
    shown = capsys.readouterr().out
    assert not any("sees each sequence once" in r.getMessage() for r in caplog.records)  # nobody's data
    assert all(
        word in shown
        for word in (
            "Cost of a step on 1 sequence",
            "s/step",
            "h/epoch",
            "plain LoRA",
            "sam",
            "Written: a.json, a.svg",
        )
    )
    written = json.loads((tmp_path / "a.json").read_text())
    assert [mode["mode"] for mode in written["modes"]] == ["plain LoRA", "auto", "sam"]
    assert written["modes"][0]["seconds_per_step"] > 0


def test_the_help_lists_every_mode(capsys):
    assert main(["bench", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(f'"{name}"' in shown for name in ALL if name != REFERENCE)


def test_every_way_to_perturb_is_right():
    found = {checked.mode: checked for checked in run_check(llama(), tokenizer(), lora_r=4, batch=2, length=12)}
    assert list(found) == [SWAP, STACK, IN_PLACE]
    for checked in found.values():
        assert checked.good, checked
        assert checked.deviation < 0.05  # look-ahead keeps its gradient in bfloat16
        assert checked.change > 0.01


def test_on_a_quantised_base_it_looks_at_float32_adapters(tmp_path, monkeypatch):
    """TRL casts them to bfloat16 there, in which much of an e is rounded away; trainings cast them back by default."""
    monkeypatch.setattr("slsam_peft.runs.bench.emulates_bfloat16", lambda: False)
    llama(num_hidden_layers=2, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, device_map="cpu")
    for checked in run_check(model, tokenizer(), lora_r=4, batch=2, length=12):
        assert checked.good, checked
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_the_radius_grows_until_e_changes_enough(monkeypatch):
    monkeypatch.setattr("slsam_peft.runs.bench_check.RADII", (1e-4, 1e-3, *RADII))
    for checked in run_check(llama(num_hidden_layers=2), tokenizer(), lora_r=4, batch=2, length=12):
        assert checked.change >= CHANGE or checked.radius == RADII[-1]
        assert checked.radius > 1e-3


@pytest.mark.parametrize(
    ("broken", "wrong"),
    [
        (lambda patch: patch.setattr(Swap, "_moved", _unmoved), {SWAP}),
        (lambda patch: patch.setattr(Stack, "_stack", _both_at_w(Stack._stack)), {STACK}),
        (lambda patch: patch.setattr(Length, "offsets", _nothing), {SWAP, STACK, IN_PLACE}),
    ],
    ids=["swap", "stack", "radius"],
)
def test_a_mode_that_leaves_e_out_is_found(broken, wrong, monkeypatch):
    broken(monkeypatch)
    checked = run_check(llama(num_hidden_layers=2), tokenizer(), lora_r=4, batch=2, length=12)
    assert {found.mode for found in checked if not found.good} == wrong
    assert all(found.deviation > 0.9 for found in checked if found.mode in wrong)


def _unmoved(self, offsets, sites):
    return {p: p.detach().clone() for p in self.parameters}


def _both_at_w(stack):
    return lambda self, perturbed, offsets, extrapolated: stack(self, perturbed, {}, extrapolated)


def _nothing(self, gradients, weights, norm, unit):
    return Offsets([torch.zeros_like(g) for g in gradients], torch.zeros_like(norm))


def test_where_nothing_may_ride_along_the_check_says_why(monkeypatch):
    monkeypatch.setattr("slsam_peft.runs.bench_check.why_not", lambda trainer: "a reason")
    monkeypatch.setattr("slsam_peft.trainer.trainer.why_not", lambda trainer: "a reason")
    swap, stack, _ = run_check(llama(num_hidden_layers=2), tokenizer(), lora_r=4, batch=2, length=12)
    assert swap.good
    assert (stack.good, stack.note) == (None, "not used here: a reason")


def test_the_check_command_prints_what_it_holds_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    llama(num_hidden_layers=2).save_pretrained("model")
    tokenizer().save_pretrained("model")
    argv = "bench --check --model model --lora_r 4 --batch_size 2 --max_length 12".split()
    assert main(argv) == 0
    shown = capsys.readouterr().out
    for word in (
        "device",
        "attention",
        "sdpa",
        "torch 2",
        "flash_attn",
        SWAP,
        STACK,
        IN_PLACE,
        "Every mode that runs",
    ):
        assert word in shown
    assert not (tmp_path / "slsam-bench.json").exists()
    monkeypatch.setattr(Length, "offsets", _nothing)
    assert main(argv) == 1
    assert "Wrong here: swap, look-ahead stack, in place." in " ".join(capsys.readouterr().out.split())
