"""The way from a model's name to a model."""

from pathlib import Path

import pytest
from transformers import AutoConfig

from slsam_peft.errors import UserError
from slsam_peft.models import load
from slsam_peft.models.shapes import BUILT_IN, find_config


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(load, "fetch_smollm2", lambda tell: tell("fetching") or tmp_path / "cache" / "model")
    return tmp_path


def test_a_folder_is_taken_as_it_is(home: Path) -> None:
    (home / "model").mkdir()
    assert load.find_model("model") == load.find_model("./model") == "model"
    assert load.find_model("~/model") == str(home / "model")


def test_a_name_on_the_hub_is_left_to_the_loader(home: Path) -> None:
    for name in ("gpt2", "owner/model"):
        assert load.find_model(name) == name


def test_smollm2_is_fetched_unless_a_folder_has_its_name(home: Path) -> None:
    told: list[str] = []
    assert load.find_model("smollm2", told.append) == str(home / "cache" / "model")
    assert told == ["fetching"]
    (home / "smollm2").mkdir()
    assert load.find_model("smollm2", told.append) == "smollm2"
    assert told == ["fetching"]


@pytest.mark.parametrize("name", ["./gone", "/gone", "~/gone", "../gone", "a/b/gone"])
def test_a_path_that_is_not_there_is_refused_by_name(name: str, home: Path) -> None:
    with pytest.raises(UserError, match=f"model folder {name} does not exist.*name a folder with a model in it"):
        load.find_model(name)


def test_a_misspelt_name_is_answered_with_the_one_that_is_known(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError("there is no such repository.")

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    with pytest.raises(UserError, match=r"model smolm2 cannot be read: there is no .* Did you mean 'smollm2'\?"):
        load.load_config("smolm2")
    with pytest.raises(UserError, match="Name a folder with a causal language model in it") as caught:
        load.load_config("owner/smolm2")
    assert "Did you mean" not in str(caught.value)


def test_smollm2_names_a_shape_too(home: Path) -> None:
    assert find_config("smollm2").to_dict() == find_config("smollm2-135m").to_dict()
    assert find_config("smollm2").hidden_size == BUILT_IN["smollm2-135m"]["hidden_size"]
