"""The clock: modes in alternation on one model, each beside its prediction."""

import math

import torch

from slsam_peft import SLSAMConfig
from slsam_peft.cli.outputs import write_figure
from slsam_peft.integrations.bench import MODES as ALL
from slsam_peft.integrations.bench import REFERENCE, Mode, _possible, draw, run_bench
from tests.tiny import llama, tokenizer

MODES = {
    REFERENCE: Mode(),
    "dense": Mode(SLSAMConfig(active_fraction=1.0)),
    "half": Mode(SLSAMConfig(design="depth", active_fraction=0.5)),
    "fewer": Mode(SLSAMConfig(ascent="partial", ascent_fraction=0.01, active_fraction=1.0), fewer=1),
}


def test_every_mode_is_timed_in_every_round_and_leaves_the_base_alone(tmp_path, capsys):
    model = llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    told = []
    measured = run_bench(
        model, tokenizer(), lora_r=4, batch=4, length=16, updates=2, rounds=2, modes=MODES, tell=told.append
    )
    assert [m.mode for m in measured] == list(MODES)
    assert told == [f"round {n} of 2: {mode}" for n in (1, 2) for mode in MODES]
    for m in measured:
        assert len(m.seconds) == len(m.ratios) == len(m.peak_bytes) == 2
        assert all(s > 0 for s in m.seconds)
        assert m.summary()["peak_bytes"] > 0
    plain, dense, half, fewer = (m.summary() for m in measured)
    assert plain["ratio"] == plain["predicted"] == 1.0
    assert math.isclose(dense["predicted"], 2.0, rel_tol=0.1)
    assert half["predicted"] < dense["predicted"]
    assert math.isclose(fewer["predicted"], 1.0, rel_tol=0.1)  # three of four rows, and one of them for the ascent
    after = {name.replace(".base_layer", ""): p for name, p in model.named_parameters()}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    picture = tmp_path / "bench.png"
    write_figure(picture, draw(measured))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_mode_with_fewer_rows_needs_two():
    fewer = [name for name, mode in ALL.items() if mode.fewer]
    assert fewer
    assert [name for name, mode in ALL.items() if not _possible(mode, 2, 1)] == fewer
    assert [name for name, mode in ALL.items() if not _possible(mode, 3, 2)] == fewer
    assert all(_possible(mode, 3, 1) for mode in ALL.values())
