"""The clock: modes in alternation on one model, each beside its prediction."""

import math

import torch

from slsam_peft import SLSAMConfig
from slsam_peft.cli.outputs import write_figure
from slsam_peft.integrations.bench import REFERENCE, draw, run_bench
from tests.tiny import llama, tokenizer

MODES = {
    REFERENCE: None,
    "dense": SLSAMConfig(active_fraction=1.0),
    "half": SLSAMConfig(design="depth", active_fraction=0.5),
}


def test_every_mode_is_timed_in_every_round_and_leaves_the_base_alone(tmp_path, capsys):
    model = llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    told = []
    measured = run_bench(
        model, tokenizer(), lora_r=4, batch=2, length=16, updates=2, rounds=2, modes=MODES, tell=told.append
    )
    assert [m.mode for m in measured] == list(MODES)
    assert told == [f"round {n} of 2: {mode}" for n in (1, 2) for mode in MODES]
    for m in measured:
        assert len(m.seconds) == len(m.ratios) == len(m.peak_bytes) == 2
        assert all(s > 0 for s in m.seconds)
        assert m.summary()["peak_bytes"] > 0
    plain, dense, half = (m.summary() for m in measured)
    assert plain["ratio"] == plain["predicted"] == 1.0
    assert math.isclose(dense["predicted"], 2.0, rel_tol=0.1)
    assert half["predicted"] < dense["predicted"]
    after = {name.replace(".base_layer", ""): p for name, p in model.named_parameters()}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    picture = tmp_path / "bench.png"
    write_figure(picture, draw(measured))
    assert picture.read_bytes().startswith(b"\x89PNG")
