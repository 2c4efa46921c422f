"""The notebook is valid, holds no outputs, names only what exists, and runs from top to bottom."""

import ast
import importlib
import inspect
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import trl
from nbclient import NotebookClient
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from slsam_peft import SLSAMTrainer
from slsam_peft.cli import export
from slsam_peft.cli import quickstart as command
from slsam_peft.cli.parsing import Parser

NOTEBOOK = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.ipynb"


@pytest.fixture
def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parameters(notebook: Any) -> Any:
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    assert len(tagged) == 1
    return tagged[0]


def assigned(source: str) -> dict[str, Any]:
    """What a cell's assignments of plain values set; other values are `None`."""
    values: dict[str, Any] = {}
    for node in ast.parse(source).body:
        assert isinstance(node, ast.Assign)
        target = node.targets[0]
        names = target.elts if isinstance(target, ast.Tuple) else [target]
        given = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
        for name, value in zip(names, given, strict=True):
            assert isinstance(name, ast.Name)
            values[name.id] = value.value if isinstance(value, ast.Constant) else None
    return values


def test_it_is_valid_and_holds_no_outputs(notebook: Any) -> None:
    nbformat.validate(notebook)
    for cell in code_cells(notebook):
        assert cell.outputs == []
        assert cell.execution_count is None
    assert len(notebook.cells) <= 20


def test_parameters_come_first_and_are_the_quickstarts(notebook: Any) -> None:
    first = code_cells(notebook)[0]
    assert first is parameters(notebook)
    values = assigned(first.source)
    defaults = {name: default for name, _, default, _ in command.NUMBERS}
    names = {"rows": "n_train", "test_rows": "n_test", "plain_rate": "learning_rate"}
    for name in ("rows", "test_rows", "label_noise", "batch_size", "plain_rate"):
        assert values[name] == defaults[names.get(name, name)], name
    assert values["steps"] * values["batch_size"] == defaults["epochs"] * values["rows"]
    assert f"slsam_rate = {command.RATE_FACTOR:g} * plain_rate" in first.source
    assert {"model_name", "load_in_4bit", "device"} <= values.keys()


def imported(tree: ast.Module) -> Iterator[tuple[str, Any]]:
    """The names that a cell imports, and what they are; fails where there is no such thing."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.asname or alias.name, importlib.import_module(alias.name)) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            yield from ((alias.asname or alias.name, getattr(module, alias.name)) for alias in node.names)


def known_arguments(called: Any) -> set[str] | None:
    """The keywords that a callable takes; `None` where it takes any."""
    taken = inspect.signature(called).parameters
    if called is SLSAMTrainer:
        return {"slsam_config", *inspect.signature(trl.SFTTrainer).parameters}
    return None if any(p.kind is p.VAR_KEYWORD for p in taken.values()) else set(taken)


def test_code_parses_and_names_only_what_exists(notebook: Any) -> None:
    names: dict[str, Any] = {}
    checked = set()
    for cell in code_cells(notebook):
        tree = ast.parse(cell.source)
        names |= dict(imported(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
                known = known_arguments(names[node.func.id])
                given = {keyword.arg for keyword in node.keywords if keyword.arg}
                assert known is None or given <= known, (node.func.id, given - (known or set()))
                checked.add(node.func.id)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
                assert hasattr(names[node.value.id], node.attr), (node.value.id, node.attr)
    assert {"SLSAMTrainer", "SLSAMConfig", "SFTConfig", "LoraConfig", "stdlib_docs", "main"} <= checked


def test_the_export_takes_its_flags(notebook: Any) -> None:
    cell = next(cell for cell in code_cells(notebook) if "main([" in cell.source)
    flags = [
        node.value
        for node in ast.walk(ast.parse(cell.source))
        if isinstance(node, ast.Constant) and str(node.value).startswith("--")
    ]
    parser = Parser("export", export.HELP)
    export.add_arguments(parser)
    assert set(flags) == {"--output", "--merge", "--force", "--base"} <= parser._option_string_actions.keys()


@pytest.mark.slow
@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_it_runs_from_top_to_bottom(
    notebook: Any, load_in_4bit: bool, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a kernel of its own, with a tiny model on the CPU, offline, through the parameters cell alone."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    changed = {"model_name": str(tiny_model), "load_in_4bit": load_in_4bit, "device": "cpu"}
    changed |= {"rows": 4, "test_rows": 2, "label_noise": 0.5, "batch_size": 2, "steps": 3, "plain_rate": 1e-2}
    cell = parameters(notebook)
    assert changed.keys() <= assigned(cell.source).keys()
    cell.source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in changed.items())

    work = tmp_path / "work"
    work.mkdir()
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(work)}}).execute()

    # Both were trained and told apart, and what was exported loads.
    compared = next(c for c in code_cells(notebook) if c.source.startswith('print(f"before'))
    printed = "".join(output.text for output in compared.outputs if output.get("name") == "stdout").splitlines()
    losses = [float(line.partition("held-out loss ")[2].partition(",")[0]) for line in printed[:3]]
    assert [line.partition(":")[0] for line in printed[:3]] == ["before", "plain LoRA", "SL-SAM"]
    assert len(set(losses)) == 3
    for part in ("Question: ", "Documentation: ", "plain LoRA: ", "SL-SAM: "):
        assert any(line.startswith(part) for line in printed[3:])
    AutoPeftModelForCausalLM.from_pretrained(work / "slsam-adapter")
    AutoModelForCausalLM.from_pretrained(work / "slsam-adapter-merged")
