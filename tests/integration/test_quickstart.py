"""The quickstart's parts: two trainings alike, dtype, answers, loading errors, the adapter's folder, the screen."""

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from rich.console import Console

from slsam_peft.cli.screen import Screen
from slsam_peft.config import SLSAMConfig
from slsam_peft.errors import UserError
from slsam_peft.models import load as models
from slsam_peft.runs import quickstart
from tests.tiny import llama, tokenizer


@pytest.mark.parametrize(
    ("able", "expected"),
    [
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
        ({"avx2": True}, "float32"),
        ({}, "float32"),
    ],
)
def test_auto_dtype_is_bfloat16_only_where_the_processor_has_it(
    able: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert models.compute_dtype("auto") == getattr(torch, expected)
    assert models.compute_dtype("float32") == torch.float32
    assert models.compute_dtype("bfloat16") == torch.bfloat16


@pytest.mark.parametrize("config", ["{}", '{"model_type": "unheard_of"}', "not json"])
def test_a_folder_without_a_usable_model_is_a_user_error(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=f"model {tmp_path} could not be loaded: "):
        models.load_with_tokenizer(str(tmp_path), torch.float32, nf4=True)


def test_a_model_without_a_chat_template_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    plain = tokenizer()
    plain.chat_template = None
    plain.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path} has no chat template; name an instruct or chat model"):
        quickstart.load_chat_model(str(tmp_path), torch.float32)


class _FakeTrainer:
    """What `save_adapter` uses of a trainer."""

    def __init__(self, failure: OSError | None = None, base: str = "owner/model") -> None:
        self.failure = failure
        self.slsam_config = SLSAMConfig(rho=0.25).resolved
        self.model = SimpleNamespace(config=SimpleNamespace(name_or_path=base))
        self.args = SimpleNamespace(output_dir="nowhere")

    def save_model(self, folder: str) -> None:
        path = Path(folder)
        path.mkdir()
        (path / "adapter_model.safetensors").write_bytes(b"new")
        (path / "training_args.bin").write_bytes(b"a pickle")
        if self.failure:
            raise self.failure


def test_adapter_replaces_files_of_its_own_names_only(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "adapter"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    (folder / "adapter_model.safetensors").write_bytes(b"old")
    quickstart.save_adapter(_FakeTrainer(), folder, "# Card\n")
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "README.md"} == {
        "notes.txt": b"mine",
        "adapter_model.safetensors": b"new",
    }
    card = (folder / "README.md").read_text()
    assert card.endswith("# Card\n")
    assert "base_model: owner/model" in card
    assert "sl-sam:rho=0.25" in card
    assert list(folder.parent.iterdir()) == [folder]


def test_card_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    for base, expected in ((tmp_path, False), (tmp_path / "SmolLM2-135M-Instruct", True)):
        base.mkdir(exist_ok=True)
        quickstart.save_adapter(_FakeTrainer(base=str(base)), tmp_path / "out", "x")
        card = (tmp_path / "out" / "README.md").read_text()
        assert ("base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in card) == expected
        assert str(tmp_path) not in card


def test_a_full_disk_leaves_the_old_adapter(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"old")
    failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(UserError, match="could not be written to .*No space left on device"):
        quickstart.save_adapter(_FakeTrainer(failure), folder, "x")
    assert [(p.name, p.read_bytes()) for p in folder.iterdir()] == [("adapter_model.safetensors", b"old")]
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(("last", "expected"), [(2, "an answer"), (7, "an answer ...")])
def test_an_answer_that_was_cut_off_says_so(last: int, expected: str) -> None:
    model = torch.nn.Linear(1, 1)
    model.device = torch.device("cpu")
    model.generate = lambda **kwargs: torch.tensor([[5, 6, last]])

    class Batch(dict):
        def to(self, device: torch.device) -> "Batch":
            return self

    tokenizer = SimpleNamespace(
        eos_token_id=2,
        apply_chat_template=lambda *args, **kwargs: Batch(input_ids=torch.tensor([[5]])),
        decode=lambda ids, skip_special_tokens: " an answer ",
    )
    assert quickstart.answer(model, tokenizer, []) == expected
    assert model.training


def data(rows: int) -> DatasetDict:
    """Questions and answers in numbered words."""
    pairs = [(f"w{i} w{i + 1} w{i + 2}", f"w{3 * i} w{2 * i}") for i in range(rows)]
    split = Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": q}], "completion": [{"role": "assistant", "content": a}]}
            for q, a in pairs
        ]
    )
    return DatasetDict(train=split, test=split.select(range(2)))


def settings(**changes: float) -> quickstart.QuickstartSettings:
    values = {"n_train": 5, "n_test": 2, "label_noise": 0.4, "epochs": 2, "batch_size": 2, "lora_r": 2, "seed": 3}
    return quickstart.QuickstartSettings(**{**values, **changes})


def contender(rho: float | None = 0.0, rate: float = 1e-2) -> quickstart.Contender:
    return quickstart.Contender(name="x", learning_rate=rate, slsam=SLSAMConfig(rho=rho))


class _Seen(quickstart.SLSAMTrainer):
    """Notes which rows each step trains on."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        vars(self).setdefault("seen", []).append(inputs["input_ids"].clone())
        return super().training_step(model, inputs, *args, **kwargs)


def adapter_of(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_both_trainings_start_from_one_adapter_and_see_the_same_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickstart, "SLSAMTrainer", _Seen)
    model = llama()
    base = {name: p.clone() for name, p in model.state_dict().items()}
    starts, ends, seen, steps = [], [], [], []
    for number, one in enumerate((contender(), contender(), contender(None, 2e-2))):
        trainer = quickstart.build_trainer(
            model, tokenizer(), data(5), settings(), one, str(tmp_path / str(number)), lambda n, _: steps.append(n)
        )
        if not number:  # as the quickstart does: a measurement must not move what is trained on
            quickstart.measure(trainer, data(2)["test"][0]["prompt"])
        starts.append(adapter_of(trainer))
        trainer.train()
        ends.append(adapter_of(trainer))
        seen.append(trainer.seen)
        model = quickstart.without_adapter(trainer)
    assert steps == 3 * list(range(1, settings().steps + 1))
    # The two plain ones are one and the same training; SL-SAM differs in its steps alone.
    for name, start in starts[0].items():
        assert torch.equal(start, starts[1][name])
        assert torch.equal(start, starts[2][name])
        assert torch.equal(ends[0][name], ends[1][name])
    assert any(not torch.equal(ends[0][name], ends[2][name]) for name in ends[0])
    for batches in seen[1:]:
        assert len(batches) == len(seen[0])
        assert all(torch.equal(a, b) for a, b in zip(batches, seen[0], strict=True))
    # Nothing is left of the adapters in the base model.
    assert {name: p.shape for name, p in model.state_dict().items()} == {name: p.shape for name, p in base.items()}
    assert all(torch.equal(p, base[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize(("config", "expected"), [({}, 1), ({"rho": 0.0}, 0), ({"method": "sam"}, 4)])
def test_how_many_sequences_make_the_ascent(config: dict[str, Any], expected: int) -> None:
    one = quickstart.Contender(name="x", learning_rate=1e-3, slsam=SLSAMConfig(**config))
    assert one.ascent_sequences(4) == expected


def test_a_share_of_the_answers_is_wrong_and_the_held_out_ones_are_right() -> None:
    noisy, clean = (quickstart.load_data(settings(n_train=10, label_noise=share)) for share in (0.4, 0.0))
    wrong = [a["completion"] != b["completion"] for a, b in zip(noisy["train"], clean["train"], strict=True)]
    assert sum(wrong) == settings(n_train=10).wrong_answers == 4
    assert noisy["train"]["prompt"] == clean["train"]["prompt"]
    assert noisy["test"].to_list() == clean["test"].to_list()


def shown(print_it: Callable[[Screen], None]) -> str:
    stream = io.StringIO()
    print_it(Screen(Console(file=stream, width=100, highlight=False)))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        (2.5, "SL-SAM's held-out loss is 0.250 nats lower than plain LoRA's."),
        (3.0, "SL-SAM's held-out loss is 0.250 nats higher than plain LoRA's."),
        (2.75, "SL-SAM's held-out loss is as high as plain LoRA's."),
    ],
)
def test_screen_says_what_came_out_whatever_it_is(ours: float, said: str) -> None:
    pair = [
        quickstart.Contender(name=name, learning_rate=rate, slsam=config)
        for name, rate, config in (
            ("Plain LoRA", 5e-4, SLSAMConfig(rho=0.0)),
            ("SL-SAM", 1e-3, SLSAMConfig()),
        )
    ]
    outcomes = [
        quickstart.Outcome(3.625, "a"),
        quickstart.Outcome(2.75, "b", 100.0),
        quickstart.Outcome(ours, "c", 130),
    ]
    text = shown(lambda screen: screen.outcomes(settings(n_train=9, batch_size=4), pair, outcomes))
    rows = {line[:28].strip(): line[28:].split() for line in text.splitlines()}
    assert rows["Held-out loss (nats)"] == ["3.625", "2.750", f"{ours:.3f}"]
    assert rows["Learning rate"] == ["0.0005", "0.001"]
    assert rows["Cost of a step, by count"] == ["1", *"1 + 1/4 = 1.25".split()]
    assert rows["Cost of a step, by the clock"] == ["1.00", "1.30"]
    assert rows["Time of the training"] == ["100", "s", "130", "s"]
    assert said in " ".join(text.split())


def test_screen_says_how_both_are_trained() -> None:
    pair = (contender(), contender(None, 2e-2))
    text = " ".join(shown(lambda screen: screen.settings("a/model", "float32", settings(), pair)).split())
    for part in ("5 questions", "2 of the answers swapped", "2 epochs, 6 steps of 2 sequences", "learning rate 0.01"):
        assert part in text
    ours = "learning rate 0.02, method=auto: 25% of the blocks perturbed in each step, all trained, loss_rise=0.5"
    assert ours in text


def test_screen_shows_untrusted_text_as_it_is() -> None:
    stream = io.StringIO()
    screen = Screen(Console(file=stream, width=80, highlight=False))
    with screen.working("[red]Loading[/red]") as say:
        say("Downloading [1/2]")
    screen.answers("What is `x[/]`?", "docs", {"Before": "[b]before[/b]", "[i]Ours": "after"})
    screen.cost(125.4, 3 << 29)
    screen.cost(5.0, None)
    text = stream.getvalue()
    for part in (
        "Downloading [1/2]",
        "`x[/]`",
        "[b]before[/b]",
        "[i]Ours",
        "2 min 5 s, peak memory 1.50 GiB.",
        "0 min 5 s.",
    ):
        assert part in text
