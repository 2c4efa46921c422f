"""The quickstart's parts: dtype, answers, loading errors and the adapter's folder."""

import errno
import io
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from slsam_peft.cli.screen import Screen
from slsam_peft.config import SLSAMConfig
from slsam_peft.errors import UserError
from slsam_peft.models import load as models
from slsam_peft.runs import quickstart
from tests.tiny import tokenizer


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
        self.slsam_config = SLSAMConfig(rho=0.25)
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


def test_screen_shows_untrusted_text_as_it_is() -> None:
    stream = io.StringIO()
    screen = Screen(Console(file=stream, width=80, highlight=False))
    with screen.working("[red]Loading[/red]") as say:
        say("Downloading [1/2]")
    screen.answers("What is `x[/]`?", "[b]before[/b]", "after", "docs")
    screen.cost(125.4, 3 << 29)
    screen.cost(5.0, None)
    text = stream.getvalue()
    for part in ("Downloading [1/2]", "`x[/]`", "[b]before[/b]", "2 min 5 s, peak memory 1.50 GiB.", "0 min 5 s."):
        assert part in text
