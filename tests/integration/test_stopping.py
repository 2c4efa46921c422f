"""Stopping `slsam-peft sft` by SIGTERM, Ctrl-C or divergence: a clean end, a checkpoint if saved, an exit code."""

import json
import os
import signal
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file

from slsam_peft import SLSAM, last_intact_checkpoint
from slsam_peft.cli.main import main
from slsam_peft.errors import DivergedError
from slsam_peft.runs import finetune
from tests.tiny import llama, texts, tokenizer

# TRL sets fields of transformers by their old names.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The arguments of a run of five steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".datasets")
    llama(num_hidden_layers=2).save_pretrained("model")
    tokenizer().save_pretrained("model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts()))
    words = "sft --model_name_or_path model --dataset_name rows.jsonl --use_peft --lora_target_modules q_proj v_proj"
    words += " --max_steps 5 --per_device_train_batch_size 2 --use_cpu --bf16 false --report_to none"
    words += " --logging_steps 1 --disable_tqdm true --active_fraction 0.6 --lora_dropout 0.1"
    return words.split()


@pytest.fixture
def signals(monkeypatch):
    """Signals that are sent in the middle of a step, by its number; cleared, none are."""
    sent = {}
    accumulate = SLSAM.accumulate

    def signalled(slsam, passes, index=0, count=1):
        loss = accumulate(slsam, passes, index, count)
        for number in sent.get(slsam.steps, ()):
            os.kill(os.getpid(), number)
        return loss

    monkeypatch.setattr(SLSAM, "accumulate", signalled)
    return sent


def test_a_command_that_is_started_again_and_again(command, signals):
    """As a spot machine does: the same words each time, from nothing to a finished run and once more."""
    assert main([*command, "--output_dir", "whole"]) == 0
    words = [*command, "--output_dir", "out", "--resume_from_checkpoint", "auto"]
    signals[1], signals[3] = [signal.SIGTERM], [signal.SIGTERM]
    assert [main(words) for _ in range(4)] == [143, 143, 0, 0]
    ours, expected = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("out", "whole"))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[n], expected[n]) for n in ours)


@pytest.mark.parametrize("number", CODES)
def test_training_stops_with_a_checkpoint_and_goes_on_from_it(number, command, signals, capsys):
    handlers = [signal.getsignal(n) for n in CODES]
    assert main([*command, "--output_dir", "whole"]) == 0
    signals[2] = [number]
    assert main([*command, "--output_dir", "out"]) == CODES[number]
    said = capsys.readouterr().err
    assert f"{number.name}: stopped after step 2. Checkpoint: out/checkpoint-2; go on with" in said
    assert "Traceback" not in said
    assert last_intact_checkpoint("out") == "out/checkpoint-2"
    assert not Path("out/adapter_model.safetensors").exists(), "an adapter that is not done"
    assert [signal.getsignal(n) for n in CODES] == handlers
    signals.clear()
    assert main([*command, "--output_dir", "out", "--resume_from_checkpoint", "true"]) == 0
    ours, expected = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("out", "whole"))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[n], expected[n]) for n in ours)


def test_without_checkpoints_none_is_saved(command, signals, capsys):
    signals[2] = [signal.SIGTERM]
    assert main([*command, "--output_dir", "out", "--save_strategy", "no"]) == 143
    assert "stopped after step 2. No checkpoint was saved (save_strategy=no)" in capsys.readouterr().err
    assert not list(Path("out").glob("checkpoint-*"))


def test_a_second_signal_stops_at_once(command, signals, capsys):
    signals[2] = [signal.SIGINT, signal.SIGINT]
    assert main([*command, "--output_dir", "out"]) == 130
    assert "SIGINT: stopped at once" in capsys.readouterr().err
    assert not list(Path("out").glob("checkpoint-*"))


def test_a_signal_in_the_last_step_stops_nothing(command, signals):
    signals[5] = [signal.SIGTERM]
    assert main([*command, "--output_dir", "out"]) == 0
    assert Path("out/adapter_model.safetensors").exists()


def test_a_signal_before_training_leaves_nothing(command, monkeypatch, capsys):
    monkeypatch.setattr(finetune, "load_data", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert main([*command, "--output_dir", "out"]) == 143
    assert capsys.readouterr().err.endswith("slsam-peft: terminated.\n")
    assert not Path("out").exists()


def test_training_that_diverges_ends_with_its_message(command, capsys):
    """A base with a NaN in its head: no step is finite."""
    model = llama(num_hidden_layers=2)
    with torch.no_grad():
        model.lm_head.weight[7, 3] = float("nan")
    model.save_pretrained("model")
    assert main([*command, "--output_dir", "out", "--max_skipped_steps", "2"]) == 1
    said = capsys.readouterr().err
    assert "slsam-peft: training has diverged: 3 steps in a row had a NaN or infinite loss or gradient" in said
    assert "Traceback" not in said
    assert not Path("out/adapter_model.safetensors").exists()
    with pytest.raises(DivergedError):
        main([*command, "--output_dir", "out", "--max_skipped_steps", "0", "--debug"])
