"""The clock: modes in alternation on one model, each beside its prediction."""

import json
import math

import pytest
import torch

from slsam_peft import SLSAMConfig
from slsam_peft.cli.bench_plot import draw
from slsam_peft.cli.main import main
from slsam_peft.cli.outputs import write_figure
from slsam_peft.errors import UserError
from slsam_peft.runs.bench import run_bench
from slsam_peft.runs.bench_modes import MODES as ALL
from slsam_peft.runs.bench_modes import REFERENCE, Mode, select_modes
from tests.tiny import llama, tokenizer

MODES = {
    REFERENCE: Mode(),
    "dense": Mode(SLSAMConfig(active_fraction=1.0)),
    "half": Mode(SLSAMConfig(design="depth", active_fraction=0.5)),
    "fewer": Mode(SLSAMConfig(ascent="partial", ascent_fraction=0.01, active_fraction=1.0), fewer=1),
    "ahead": Mode(SLSAMConfig(ascent="ahead", ascent_fraction=0.01, active_fraction=1.0), fewer=1),
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
    plain, dense, half, fewer, ahead = (m.summary() for m in measured)
    assert plain["ratio"] == plain["predicted"] == 1.0
    assert math.isclose(dense["predicted"], 2.0, rel_tol=0.1)
    assert half["predicted"] < dense["predicted"]
    assert math.isclose(
        fewer["predicted"], 1.0, rel_tol=0.1
    )  # three of four sequences, and one of them for the ascent
    assert math.isclose(ahead["predicted"], 1.0, rel_tol=0.1)  # three sequences and one of the next step
    after = {name.replace(".base_layer", ""): p for name, p in model.named_parameters()}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    picture = tmp_path / "bench.png"
    write_figure(picture, draw(measured))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_under_accumulation_a_micro_batch_pays_for_the_ascent():
    modes = {name: MODES[name] for name in (REFERENCE, "fewer")}
    plain, fewer = run_bench(
        llama(), tokenizer(), lora_r=4, batch=1, length=16, accumulation=4, steps=2, rounds=1, modes=modes
    )
    assert math.isclose(fewer.summary()["predicted"], 1.0, rel_tol=0.1)  # four passes of one sequence, as plain LoRA's
    assert plain.summary()["predicted"] == 1.0


def test_a_mode_with_fewer_parts_needs_two():
    partial, ahead = (name for name, mode in ALL.items() if mode.fewer)
    assert list(select_modes(None, 3, 1)) == list(ALL)
    for (batch, accumulation), lacking in {
        (2, 1): {partial},
        (1, 3): {ahead},
        (2, 4): {ahead},
        (8, 2): {partial, ahead},
        (1, 1): {partial, ahead, "partial 1/4, depth, budget 0.75"},
    }.items():
        assert set(ALL) - set(select_modes(None, batch, accumulation)) == lacking
        for name in (partial, ahead):
            if name not in lacking:
                assert list(select_modes([name], batch, accumulation)) == [REFERENCE, name]
                continue
            with pytest.raises(UserError, match=r"needs --(batch_size 3|gradient_accumulation_steps 1 and --batch)"):
                select_modes([name], batch, accumulation)


def test_a_misspelt_mode_is_answered_with_the_nearest():
    with pytest.raises(
        UserError, match=r"'dense SAN' is not known\. Did you mean 'dense SAM'\? The modes are:\n  plain LoRA"
    ):
        select_modes(["dense SAN"], 2, 1)


def test_the_command_times_prints_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    llama(num_hidden_layers=2).save_pretrained("model")
    tokenizer().save_pretrained("model")
    words = "bench --model model --lora_r 4 --batch_size 1 --max_length 16 --steps 1 --rounds 1 --modes"
    assert main([*words.split(), "dense SAM", "--output", "a.json", "--plot", "a.svg"]) == 0
    shown = capsys.readouterr().out
    assert all(
        word in shown for word in ("Cost of a step", "s/step", "plain LoRA", "dense SAM", "Written: a.json, a.svg")
    )
    written = json.loads((tmp_path / "a.json").read_text())
    assert [mode["mode"] for mode in written["modes"]] == ["plain LoRA", "dense SAM"]
    assert written["modes"][0]["seconds_per_step"] > 0


def test_the_help_lists_every_mode(capsys):
    assert main(["bench", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(f'"{name}"' in shown for name in ALL if name != REFERENCE)
