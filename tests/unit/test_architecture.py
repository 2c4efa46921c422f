"""The import contracts hold, the algorithm needs torch only, and calls that lose data are absent.

Who may import whom stands in pyproject.toml, for import-linter. Here is what it cannot say.
"""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import slsam_peft

PACKAGE = Path(slsam_peft.__file__).parent
ROOT = Path(__file__).parents[2]
LEAVES = ("config", "described", "errors", "extras", "names", "presets")  # the standard library only
PURE = ("algorithm", "cost", "sharpness")  # torch only
FRAMEWORKS = {"accelerate", "bitsandbytes", "datasets", "huggingface_hub", "peft", "torch", "transformers", "trl"}

# `x.data = ...` rebinds a storage that an optimizer or a saved copy may still point at.
REBINDING = {
    "trainer/precision.py: restore_float32": "the dtype changes, before there is an optimizer",
    "trainer/precision.py: same_dtypes": "the dtype changes, of parameters that PEFT has just made anew",
    "models/shapes.py: meta_model": "the dtype changes, and there is no storage on the meta device",
}


@dataclass(frozen=True)
class Import:
    """One name that a module imports."""

    target: str  # dotted
    at_top: bool  # runs when the module is imported
    line: int


def path_of(module: str) -> Path:
    folder = PACKAGE.joinpath(*module.split("."))
    return folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")


@cache
def modules() -> tuple[str, ...]:
    """Every module below the package, by its dotted name without the package's."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return tuple(name for name in found if name)


def core() -> list[str]:
    return [name for name in modules() if name.split(".")[0] in PURE]


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(path_of(module).read_text(encoding="utf-8"), str(path_of(module)))


def statements(nodes: list[ast.stmt], at_top: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Import statements that can run; those under `if TYPE_CHECKING` never do."""
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, at_top
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from statements(node.orelse, at_top)
        else:
            in_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for child in ast.iter_child_nodes(node):
                below = [child] if isinstance(child, ast.stmt) else getattr(child, "body", [])
                yield from statements(below if isinstance(below, list) else [], at_top and not in_function)


@cache
def imports(module: str) -> tuple[Import, ...]:
    found = []
    for node, at_top in statements(tree_of(module).body, at_top=True):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            assert node.level == 0, f"{module}, line {node.lineno}: a relative import"
            # `from package import name` may import a module of that name.
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        found += [Import(target, at_top, node.lineno) for target in targets]
    return tuple(found)


def test_the_import_contracts_hold() -> None:
    """In a process of its own: import-linter sets up logging, which disables every logger that is there."""
    code = "from importlinter.cli import lint_imports; import sys; sys.exit(lint_imports(no_cache=True, no_logo=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("module", LEAVES)
def test_leaves_need_the_standard_library_only(module: str) -> None:
    assert {i.target.split(".")[0] for i in imports(module)} <= {*sys.stdlib_module_names, "slsam_peft"}


@pytest.mark.parametrize("module", core())
def test_the_algorithm_needs_torch_only(module: str) -> None:
    allowed = {*sys.stdlib_module_names, "slsam_peft", "torch"}
    foreign = [f"line {i.line}: {i.target}" for i in imports(module) if i.target.split(".")[0] not in allowed]
    assert not foreign


@pytest.mark.parametrize("module", [m for m in modules() if m.split(".")[0] == "cli"])
def test_subcommands_import_frameworks_late(module: str) -> None:
    heavy = [
        f"line {i.line}: {i.target}" for i in imports(module) if i.at_top and i.target.split(".")[0] in FRAMEWORKS
    ]
    assert not heavy


def test_help_needs_no_framework() -> None:
    from slsam_peft.cli.main import SUBCOMMANDS

    names = [f"slsam_peft.cli.{name}" for name in ("main", *SUBCOMMANDS)]
    code = (
        f"import importlib, sys; [importlib.import_module(n) for n in {names!r}]; "
        f"sys.exit(', '.join({FRAMEWORKS!r} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names_are_sorted_and_there() -> None:
    assert list(slsam_peft.__all__) == sorted(slsam_peft.__all__)
    assert set(slsam_peft.__all__) <= set(dir(slsam_peft))
    for name in slsam_peft.__all__:
        assert getattr(slsam_peft, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'slsam_trainer'"):
        _ = slsam_peft.slsam_trainer
    assert (PACKAGE / "py.typed").is_file()


def forbidden(module: str) -> Iterator[str]:
    """What a module does that no module may do."""
    name = str(path_of(module).relative_to(PACKAGE))
    for function, node in walk(tree_of(module)):
        where = f"{name}, line {getattr(node, 'lineno', '?')}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called == "print":
                yield f"{where}: print()"
            if called.startswith(("np.random.", "numpy.random.")) or called in ("random.seed", "random.choice"):
                yield f"{where}: {called} draws from a generator that everyone shares"
        if isinstance(node, ast.Assign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            rebinds = any(isinstance(t, ast.Attribute) and t.attr == "data" for t in targets)
            if rebinds and f"{name}: {function}" not in REBINDING:
                yield f"{where}: rebinds .data; use copy_"


def walk(node: ast.AST, function: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Every node, with the function it stands in."""
    for child in ast.iter_child_nodes(node):
        inside = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
        yield inside, child
        yield from walk(child, inside)


@pytest.mark.parametrize("module", modules())
def test_nothing_forbidden(module: str) -> None:
    assert not list(forbidden(module))


def test_forbidden_things_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "print(1)",
        "np.random.seed(0)",
        "p.data = other",
        "p.data -= e",
    ]
    (tmp_path / "bad.py").write_text("\n".join(lines))
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    for cached in (modules, tree_of):
        monkeypatch.setattr(sys.modules[__name__], cached.__name__, cached.__wrapped__)
    assert len(list(forbidden("bad"))) == len(lines)


def test_modules_can_be_imported_alone() -> None:
    for module in core():
        importlib.import_module(f"slsam_peft.{module}")
