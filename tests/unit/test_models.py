"""The way from a model's name to a model."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoConfig

from slsam_peft.adapters.load import open_adapter
from slsam_peft.errors import UserError
from slsam_peft.models import load, smollm2
from slsam_peft.models.fetched import hub_name_of
from slsam_peft.models.shapes import BUILT_IN, SHAPE_OF, find_config


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in load.FETCHED:
        monkeypatch.setitem(load.FETCHED, name, lambda tell, name=name: tell(f"fetching {name}") or tmp_path / "cache")
    return tmp_path


def test_a_folder_is_taken_as_it_is(home: Path) -> None:
    (home / "model").mkdir()
    assert load.find_model("model") == load.find_model("./model") == "model"
    assert load.find_model("~/model") == str(home / "model")


def test_a_name_on_the_hub_is_left_to_the_loader(home: Path) -> None:
    for name in ("gpt2", "owner/model"):
        assert load.find_model(name) == name


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_a_short_name_is_fetched_unless_a_folder_has_it(name: str, home: Path) -> None:
    told: list[str] = []
    assert load.find_model(name, told.append) == str(home / "cache")
    assert told == [f"fetching {name}"]
    (home / name).mkdir()
    assert load.find_model(name, told.append) == name
    assert told == [f"fetching {name}"]


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
    with pytest.raises(UserError, match=r"Did you mean 'gemma3'\?\nName .* can be reached, or smollm2 or gemma3\."):
        load.load_config("gema3")
    with pytest.raises(UserError, match="Name a folder with a causal language model in it") as caught:
        load.load_config("owner/smolm2")
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize(("name", "shape"), [("smollm2", "smollm2-135m"), ("gemma3", "gemma-3-270m")])
def test_a_short_name_names_a_shape_too(name: str, shape: str, home: Path) -> None:
    assert find_config(name).to_dict() == find_config(shape).to_dict()
    assert find_config(name).hidden_size == BUILT_IN[shape]["hidden_size"]


def test_every_fetched_model_has_a_name_that_others_know(tmp_path: Path) -> None:
    assert SHAPE_OF.keys() == load.FETCHED.keys()
    assert list(map(hub_name_of, (tmp_path / "gemma-3-270m", "SmolLM2-135M-Instruct", tmp_path))) == [
        "google/gemma-3-270m",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        None,
    ]


def test_an_adapter_of_the_quickstart_finds_the_fetched_model_by_the_name_that_others_know(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    monkeypatch.setattr(smollm2, "fetch_smollm2", lambda: home / "fetched")
    LoraConfig(base_model_name_or_path=name, task_type="CAUSAL_LM").save_pretrained(home / "adapter")
    save_file({"weight": torch.zeros(1)}, home / "adapter" / "adapter_model.safetensors")
    assert open_adapter(home / "adapter").base == str(home / "fetched")
    (home / name).mkdir(parents=True)
    assert open_adapter(home / "adapter").base == name


def test_an_adapter_on_weights_of_the_hub_is_left_to_the_loader(home: Path) -> None:
    """What lies in the cache was quantised to 4 bits on its way: only adapters that were trained on it get it."""
    LoraConfig(base_model_name_or_path="google/gemma-3-270m", task_type="CAUSAL_LM").save_pretrained(home / "adapter")
    save_file({"weight": torch.zeros(1)}, home / "adapter" / "adapter_model.safetensors")
    assert open_adapter(home / "adapter").base == "google/gemma-3-270m"
