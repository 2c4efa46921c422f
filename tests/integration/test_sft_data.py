"""What `slsam-peft sft` refuses or says between the rows of a file and the first step."""

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast
from trl import ModelConfig, SFTTrainer

from slsam_peft import SLSAMConfig
from slsam_peft.cli.main import main
from slsam_peft.data.examples import load_examples
from slsam_peft.data.load import load_split
from slsam_peft.errors import UserError
from slsam_peft.runs.finetune import peft_config_of
from slsam_peft.runs.sequences import CheckedTrainer, check_enough_rows, check_token_ids
from slsam_peft.trainer.trainer import SLSAMTrainer
from tests.tiny import build, llama, tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]

LONG = {"prompt": " ".join(["w1"] * 20), "completion": " w2 w3"}
SHORT = {"prompt": "w1", "completion": " w2 w3"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".datasets")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(*given: dict[str, Any]) -> datasets.Dataset:
    return datasets.Dataset.from_list(list(given))


def trainer(
    data: datasets.Dataset, *, cls: type = CheckedTrainer, model: Any = None, parts: Any = None, **settings: Any
) -> Any:
    config = SLSAMConfig(active_fraction=1.0)
    return build(cls, "out", config, model=model, data=data, parts=parts, **settings)


def sft(*words: str) -> int:
    given = ["--model_name_or_path", "model", "--output_dir", "out", "--use_cpu", "--bf16", "false"]
    given += ["--report_to", "none", "--max_steps", "1", "--disable_tqdm", "true", "--active_fraction", "1"]
    return main(["sft", *given, *words])


def make_model(folder: str = "model", **changes: Any) -> None:
    llama().save_pretrained(folder)
    made = tokenizer()
    for name, value in changes.items():
        setattr(made, name, value)
    made.save_pretrained(folder)


@pytest.mark.parametrize("which", ["training", "held-out"])
def test_answers_that_are_all_cut_off_are_refused_with_the_length_that_would_do(which: str) -> None:
    cut, kept = rows(LONG, LONG | {"prompt": "w1 " + LONG["prompt"]}), rows(SHORT)
    data, held_out = (cut, kept) if which == "training" else (kept, cut)
    with pytest.raises(
        ValueError, match=rf"all 2 {which} rows have no answer within max_length=8; .*length=22, .*length=24\."
    ):
        trainer(data, parts={"eval_dataset": held_out}, eval_strategy="steps", max_length=8)


def test_the_length_that_is_named_does(caplog: pytest.LogCaptureFixture) -> None:
    made = trainer(rows(LONG, LONG | {"prompt": "w1 " + LONG["prompt"]}), max_length=22)
    assert len(made.train_dataset) == 2
    assert "left out" not in caplog.text


def test_some_answers_that_are_cut_off_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "slsam_peft"):
        made = trainer(rows(SHORT, LONG, LONG), max_length=8)
    assert len(made.train_dataset) == 1
    assert "2 of 3 training rows have no answer within max_length=8 and are left out" in caplog.text


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode:FutureWarning")
def test_what_is_kept_from_the_end_is_counted_from_there(caplog: pytest.LogCaptureFixture) -> None:
    data = rows({"input_ids": list(range(3, 13)), "labels": [3, *[-100] * 9]}, {"input_ids": [3, 4], "labels": [3, 4]})
    trainer(data, max_length=8, truncation_mode="keep_end")
    assert "1 of 2 training rows have no answer within max_length=8 and are left out" in caplog.text
    assert "an answer begins in each with max_length=10" in caplog.text


def test_rows_are_counted_from_python_too(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "slsam_peft"):
        made = trainer(rows(SHORT, LONG, LONG), cls=SLSAMTrainer, max_length=8)
    assert len(made.train_dataset) == 1
    assert "2 of 3 training rows have no answer within max_length=8 and are left out" in caplog.text
    with pytest.raises(ValueError, match=r"all 2 training rows have no answer within max_length=8; .*length=21"):
        trainer(rows(LONG, LONG), cls=SLSAMTrainer, max_length=8)


def test_rows_are_made_into_sequences_once_and_as_by_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    """The count needs no second tokenization, and what is trained on is what TRL makes of the rows."""
    calls = []
    made = PreTrainedTokenizerFast.__call__
    monkeypatch.setattr(
        PreTrainedTokenizerFast, "__call__", lambda self, *a, **k: calls.append(1) or made(self, *a, **k)
    )
    given = [SHORT, LONG, {"prompt": "w4", "completion": " w5 w6 w7"}]
    counts, found = [], []
    for cls in (SFTTrainer, SLSAMTrainer):
        calls.clear()
        config = None if cls is SFTTrainer else SLSAMConfig()
        found.append(build(cls, "out", config, data=rows(*given), max_length=8, shuffle_dataset=True).train_dataset[:])
        counts.append(len(calls))
    assert found[0] == found[1]
    assert counts[0] == counts[1] > 0


def test_rows_that_packing_cuts_off_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "slsam_peft"):
        trainer(rows(SHORT, LONG), cls=SLSAMTrainer, max_length=8, packing=True)
    assert "1 of 2 training rows have no answer within max_length=8 and teach nothing" in caplog.text


def test_measuring_counts_them_too(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (LONG, SHORT)))
    found = load_examples(tokenizer(), "a.jsonl", rows=4, max_length=8)
    assert len(found) == 1
    assert "1 of the first 2 rows have no answer within 8 tokens" in caplog.text


@pytest.mark.parametrize("row", [{"text": "w1"}, SHORT], ids=lambda row: ", ".join(row))
def test_a_tokenizer_without_an_end_token_is_refused(row: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    make_model(eos_token=None)
    Path("a.jsonl").write_text(json.dumps(row) + "\n")
    assert sft("--dataset_name", "a.jsonl", "--max_length", "32") == 2
    assert "the tokenizer has no end token" in capsys.readouterr().err
    assert not Path("out").exists()


def test_more_tokens_than_embeddings_are_refused_only_where_they_come() -> None:
    last = llama().get_input_embeddings().weight.shape[0] - 1
    check_token_ids(trainer(rows({"input_ids": [3, last], "labels": [3, last]})))
    for data, held_out in ((3, last + 1), (last + 1, 3)):
        two = (rows({"input_ids": [3, i], "labels": [3, i]}) for i in (data, held_out))
        made = trainer(next(two), parts={"eval_dataset": next(two)})
        with pytest.raises(UserError, match=rf"token {last + 1} \(.*the model has {last + 1} embeddings"):
            check_token_ids(made)


def test_incomplete_batches_that_are_all_dropped_are_refused() -> None:
    check_enough_rows(trainer(rows(SHORT, SHORT), dataloader_drop_last=True))
    with pytest.raises(UserError, match=r"1 rows make none of 2; set per_device_train_batch_size=1"):
        check_enough_rows(trainer(rows(SHORT), dataloader_drop_last=True))


def test_no_adapter_is_reported_without_a_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model()
    Path("a.jsonl").write_text(json.dumps(SHORT) + "\n")
    monkeypatch.setattr("slsam_peft.runs.finetune.check_enough_rows", lambda trainer: None)
    words = ["--dataloader_drop_last", "true", "--per_device_train_batch_size", "8", "--save_strategy", "no"]
    assert sft("--dataset_name", "a.jsonl", *words) == 2
    shown = capsys.readouterr()
    assert "no step was made" in shown.err
    assert "The adapter is in" not in shown.out
    assert not Path("out/adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps=0 is not allowed"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size=0 is not allowed"),
        (["--per_device_eval_batch_size", "-1"], "per_device_eval_batch_size=-1 is not allowed"),
        (["--max_steps", "0"], "max_steps=0 is not allowed"),
        (["--max_steps", "-1", "--num_train_epochs", "0"], "num_train_epochs=0.0 is not allowed"),
        (["--max_length", "0"], "max_length=0 is not allowed"),
    ],
)
def test_counts_that_mean_nothing_are_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sft("--dataset_name", "gone.jsonl", *words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["q_proj"], {"q_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (["all-linear"], "all-linear"),
        ([r".*\.q_proj"], r".*\.q_proj"),
    ],
)
def test_one_target_module_is_a_name(given: list[str], expected: Any) -> None:
    config = peft_config_of(ModelConfig(use_peft=True, lora_target_modules=given))
    assert config.target_modules == expected


def test_an_adapter_is_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    Path("model").mkdir()
    Path("model/adapter_config.json").write_text('{"base_model_name_or_path": "its/base"}')
    Path("a.jsonl").write_text(json.dumps(SHORT) + "\n")
    assert sft("--dataset_name", "a.jsonl") == 2
    assert "model holds an adapter of the base model its/base, not a model. Name its/base;" in capsys.readouterr().err


PARTS = {"messages": [{"role": "user", "content": [{"type": "text", "text": "w1"}, {"type": "text", "text": "w2"}]}]}
PLAIN = {"messages": [{"role": "user", "content": "007"}]}


def test_parts_of_texts_are_no_python_lists_to_learn(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (PARTS, PLAIN)))
    made = trainer(load_split("a.jsonl"))
    texts = [made.processing_class.decode(row["input_ids"]) for row in made.train_dataset]
    assert texts == ["<user> w1 w2", "<user> <unk>"]
    assert "contents that are lists of texts into texts" in caplog.text


def test_parts_reach_a_template_that_takes_them(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = tokenizer()
    made.chat_template = "{% for m in messages %}{% for p in m.content %}{{ p.text }} {% endfor %}<eos>{% endfor %}"
    data = datasets.Dataset.from_list([PARTS])
    found = CheckedTrainer(
        llama(), args=build(CheckedTrainer, "out", data=data).args, train_dataset=data, processing_class=made
    )
    assert found.processing_class.decode(found.train_dataset[0]["input_ids"]) == "w1 w2 <eos>"
    assert caplog.text.count("were converted") == 1  # by the template of the trainer whose arguments were taken


def test_a_part_that_is_no_text_is_refused(folder: Path) -> None:
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]
    Path("a.jsonl").write_text(json.dumps(PLAIN) + "\n" + json.dumps({"messages": picture}) + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: 'messages', message 1 has a part of type 'image_url'"):
        trainer(load_split("a.jsonl"))
