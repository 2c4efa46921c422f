"""Nothing read from a file, a model or a data set runs as code, and no path in one leads out of its folder.

That downloads are checked by size and hash before they are opened is in tests/integration/test_smollm2.py.
"""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import slsam_peft
from slsam_peft.adapters import inspect as inspecting
from slsam_peft.adapters.base_files import BaseFiles
from slsam_peft.cli.arguments import parse
from slsam_peft.cli.main import main
from slsam_peft.errors import UserError
from tests.bad_input import SFT

ROOT = Path(slsam_peft.__file__).parents[1]
SOURCES = [*sorted((ROOT / "slsam_peft").rglob("*.py")), *sorted((ROOT / "recipes").rglob("*.py"))]

RUN_CODE = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
NEVER = {
    "eval": "runs text as code",
    "exec": "runs text as code",
    "compile": "turns text into code",
    "__import__": "importlib.import_module of names of our own",
    "os.system": "goes through a shell",
    "os.popen": "goes through a shell",
    "subprocess.getoutput": "goes through a shell",
    "tempfile.mktemp": "the name can be taken before it is used",
    "yaml.load": "yaml.safe_load reads data only",
    "yaml.full_load": "yaml.safe_load reads data only",
    "yaml.unsafe_load": "yaml.safe_load reads data only",
    "numpy.load": "may hold pickles; files are safetensors",
    "pandas.read_pickle": "runs code from the file",
    "torch.jit.load": "runs code from the file",
    "torch.serialization.load": "torch.load with weights_only=True reads data only",
    "shutil.unpack_archive": "follows paths in the archive",
    "urllib.request.urlopen": "downloads go through pip and huggingface_hub, and are checked",
}
LOADERS = ("from_pretrained", "from_config")


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((k.value for k in call.keywords if k.arg == name), None)


def is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def imported(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """Line, full name and name here of all that is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name, a.asname or a.name) for a in node.names)
        if isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{a.name}", a.asname or a.name) for a in node.names)


def problems(tree: ast.AST) -> Iterator[str]:
    """What no source may do, with its line."""
    full = {"np": "numpy", "pd": "pandas"}
    for line, name, here in imported(tree):
        full[here] = name
        if name.split(".")[0] in RUN_CODE:
            yield f"line {line}: {name} runs code from files"
        if name in NEVER or name == "torch.load":
            yield f"line {line}: {name} is hidden by importing it; {NEVER.get(name, 'call it by its full name')}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, dot, rest = ast.unparse(node.func).partition(".")
            called = full.get(first, first) + dot + rest
            hidden = not dot and first in full  # seen where it was imported
            found = () if hidden and called in NEVER else problems_of_call(node, called)
            yield from (f"line {node.lineno}: {problem}" for problem in found)


def problems_of_call(call: ast.Call, called: str) -> Iterator[str]:
    last = called.rpartition(".")[2]
    if called in NEVER:
        yield f"{called}: {NEVER[called]}"
    if called == "torch.load" and not is_constant(keyword(call, "weights_only"), True):
        yield "torch.load without weights_only=True runs code from the file"
    if keyword(call, "shell") is not None:
        yield "a shell would read what is in the arguments"
    if last in ("extract", "extractall"):
        yield f"{called} follows paths in the archive; copy the one member that is needed to a name of ours"
    trust = keyword(call, "trust_remote_code")
    if trust is not None and not is_constant(trust, False) and ast.unparse(trust) != "args.trust_remote_code":
        yield "trust_remote_code is the user's to switch on"
    if last in LOADERS and called.startswith("Auto") and trust is None:
        yield f"{called} without trust_remote_code=False asks on the terminal whether to run a model's code"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_foreign_code(path: Path) -> None:
    assert not list(problems(ast.parse(path.read_text(encoding="utf-8"))))


BAD_LINES = [
    "import pickle",
    "from dill import loads",
    "torch.load(file)",
    "torch.load(file, weights_only=False)",
    "eval(text)",
    "exec(text)",
    "os.system(command)",
    "subprocess.run(command, shell=True)",
    "tempfile.mktemp()",
    "yaml.load(text)",
    "archive.extractall(folder)",
    "archive.extract(member, folder)",
    "np.load(file)",
    "numpy.load(file)",
    "import numpy as n; n.load(file)",
    "from numpy import load; load(file)",
    "from torch import load",
    "from torch import load as read; read(file, weights_only=True)",
    "import torch as t; t.load(file)",
    "from os import system; system(command)",
    "from yaml import load",
    "torch.jit.load(file)",
    "pd.read_pickle(file)",
    "AutoTokenizer.from_pretrained(name)",
    "AutoModelForCausalLM.from_config(config)",
    "load(name, trust_remote_code=True)",
    "load(name, trust_remote_code=wanted)",
]


@pytest.mark.parametrize("line", BAD_LINES)
def test_forbidden_calls_are_seen(line: str) -> None:
    assert len(list(problems(ast.parse(line)))) == 1


@pytest.fixture
def coded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder that brings its own code, and an adapter for it; the code leaves a mark where it runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    mark = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    for name in ("coded", "adapter"):
        Path(name).mkdir()
        Path(name, "code.py").write_text(mark)
        classes = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
        content = {"model_type": "coded", "auto_map": {kind: "code.Thing" for kind in classes}}
        Path(name, "config.json").write_text(json.dumps(content))
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "coded", "r": 1}
    settings |= {"target_modules": ["q_proj"], "auto_mapping": {"base_model_class": "Thing", "parent_library": "code"}}
    Path("adapter/adapter_config.json").write_text(json.dumps(settings))
    save_file({"base_model.model.q_proj.lora_A.weight": torch.zeros(1, 2)}, "adapter/adapter_model.safetensors")
    Path("train.jsonl").write_text('{"text": "a"}\n')
    return tmp_path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "arguments",
    [
        [*SFT, "--model_name_or_path", "coded"],
        ["plan", "--model", "coded"],
        ["bench", "--model", "coded"],
        ["inspect", "coded"],
        ["check", "adapter"],
        ["export", "adapter", "--output", "new", "--merge"],
        ["quickstart", "--model", "coded"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_code_that_a_model_brings_is_not_run(
    arguments: list[str], coded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(arguments)
    shown = capsys.readouterr().err
    assert code == 2, shown
    assert "Traceback" not in shown
    assert not (coded / "ran").exists()


def test_remote_code_is_off_unless_asked_for() -> None:
    assert parse(SFT[1:]).training.trust_remote_code is False
    assert parse([*SFT[1:], "--trust_remote_code"]).training.trust_remote_code is True


@pytest.mark.parametrize("name", ["../secret.safetensors", "{outside}/secret.safetensors"])
def test_an_index_leads_to_no_file_outside_its_folder(name: str, tmp_path: Path) -> None:
    """The index of a model in several files names them; a file of that name lies outside only."""
    model = tmp_path / "model"
    model.mkdir()
    save_file({"w": torch.zeros(1)}, tmp_path / "secret.safetensors")
    index = {"weight_map": {"w": name.format(outside=tmp_path)}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model/secret\.safetensors is damaged or missing"):
        BaseFiles(str(model))
    with pytest.raises(UserError, match=r"model/secret\.safetensors is missing"):
        inspecting._model_files(model)


def test_names_in_stored_settings_are_not_looked_up() -> None:
    with pytest.raises(ValueError, match="no code is loaded from stored settings"):
        slsam_peft.SLSAMConfig.from_dict({"design": "os:system"})
