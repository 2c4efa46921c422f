"""2n steps in one go are n steps, a checkpoint, a new process and n more, bit for bit."""

import itertools
import multiprocessing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slsam_peft.presets import ASCENTS, BANDITS, DESIGNS
from tests.resume_worker import CUT, train
from tests.tiny import llama

# (ascent, design, bandit), optimizer, NF4 base, reentrant checkpointing
SOME = [
    (("two_pass", "depth", "scale_free"), "paged_adamw_8bit", True, False),
    (("partial", "fixed_size", "paper"), "adamw_torch", True, True),
    (("remembered", "window", "scale_free"), "adamw_torch", False, False),
]
ALL = [
    (case, ("adamw_torch", "paged_adamw_8bit")[i % 2], i // 2 % 2 == 0, i % 3 == 0)
    for i, case in enumerate(itertools.product(ASCENTS[:3], DESIGNS, BANDITS))  # "ahead": test_ahead.py
]


@pytest.fixture(scope="module")
def run():
    """Return a function that trains in a new process, forked from one that has imported everything and no more."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.resume_worker"])

    def in_new_process(*arguments):
        process = context.Process(target=train, args=arguments)
        process.start()
        process.join()
        assert process.exitcode == 0

    return in_new_process


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    llama(num_hidden_layers=3).save_pretrained(folder)
    return str(folder)


def check(case, run, base_folder, folder):
    (ascent, design, bandit), *others = case
    settings = {"ascent": ascent, "design": design, "bandit": bandit}
    settings |= {"ascent_fraction": 0.5} if ascent == "partial" else {}
    whole, parted = folder / "whole", folder / "parted"
    run(str(whole), base_folder, settings, *others, None)
    run(str(parted), base_folder, settings, *others, str(whole / f"checkpoint-{CUT}"))
    for name in ("end.safetensors", "end.json"):
        assert (whole / name).read_bytes() == (parted / name).read_bytes(), name
    moments = [v for n, v in load_file(whole / "end.safetensors").items() if n.endswith((".exp_avg", ".state1"))]
    assert {v.dtype for v in moments} == {torch.uint8 if "8bit" in others[0] else torch.float32}
    assert any(v.any() for v in moments)  # lora_A has none after one step, since lora_B began with zeros


@pytest.mark.parametrize("case", SOME, ids=lambda case: "-".join(case[0]))
def test_a_new_process_goes_on_bit_for_bit(case, run, base_folder, tmp_path):
    """With three micro-batches per step, dropout and checkpointing: weights, moments, sampler, draws and logs."""
    check(case, run, base_folder, Path(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=lambda case: "-".join([*case[0], case[1]]))
def test_every_rule_goes_on_bit_for_bit(case, run, base_folder, tmp_path):
    """Every ascent, sampling scheme and bandit; optimizers, bases and kinds of checkpointing in turn."""
    check(case, run, base_folder, Path(tmp_path))
