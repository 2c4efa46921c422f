"""Wheels with a tiny GGUF file, and the pins that fit them."""

import hashlib
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from slsam_peft.packages import Package

if TYPE_CHECKING:
    import gguf


def finish(writer: "gguf.GGUFWriter") -> None:
    """Write a GGUF file that has all its settings and tensors."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_wheel(folder: Path, package: Package, content: bytes) -> Path:
    """Write a package's wheel, with code that must not run and a path that must not be used; return its path."""
    (member,) = package.files
    wheel = folder / package.archive
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{package.name.replace('-', '_')}/__init__.py", "raise SystemExit('never imported')")
        archive.writestr(member, content)
        archive.writestr("../outside.txt", "never extracted")
    return wheel


def pinned(package: Package, wheel: Path, content: bytes) -> Package:
    """Return a package with the hashes of a wheel that `write_wheel` wrote."""
    (member,) = package.files
    used = {member: hashlib.sha256(content).hexdigest()}
    return replace(package, sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(), files=used)


def copying(index: Path) -> Callable[[Package, Path, str | None], Path]:
    """Return what stands in for `packages.download`: a copy out of a folder, which takes no time."""

    def download(package: Package, folder: Path, instead: str | None) -> Path:
        return Path(shutil.copy(index / package.archive, folder))

    return download


def only_index(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pip take packages from a folder, and from nowhere else."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def leftovers(cache: Path) -> list[Path]:
    """Files below a cache folder, and whatever was left half done."""
    return [path for path in cache.rglob("*") if path.is_file() or path.name.startswith(".partial")]
