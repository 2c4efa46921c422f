"""Reads a base model's safetensors files tensor by tensor."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from slsam_peft.errors import UserError, brief

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Stored:
    """One tensor in a base model's files: its file, key, shape and dtype."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class BaseFiles:
    """The weights of a base model, none of them in memory.

    Args:
        name (`str`): Folder or Hub name; from the Hub, what is missing in the cache is downloaded.

    Raises:
        UserError: there are no safetensors files, or one is damaged.
    """

    def __init__(self, name: str) -> None:
        self.folder = _folder(name)
        self.tensors: dict[str, Stored] = {}
        for file in self._files():
            try:
                with safe_open(file, framework="pt") as opened:
                    for key in opened.keys():  # noqa: SIM118
                        part = opened.get_slice(key)
                        self.tensors[key] = Stored(file, key, tuple(part.get_shape()), _DTYPES[part.get_dtype()])
            except KeyError as error:
                raise UserError(f"{file} holds weights of type {error}; a merge needs 16- or 32-bit ones.") from error
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{file} is damaged or missing ({brief(error)}); fetch the base model again."
                ) from error

    def _files(self) -> list[Path]:
        index = self.folder / INDEX
        if (self.folder / SINGLE).is_file():
            return [self.folder / SINGLE]
        if not index.is_file():
            raise UserError(
                f"{self.folder} holds no {SINGLE} and no {INDEX}; save the base model as safetensors first."
            )
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return [self.folder / Path(name).name for name in sorted(names)]  # never a path out of the folder
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is damaged ({brief(error)}); fetch the base model again.") from error

    def read(self, stored: Stored) -> torch.Tensor:
        """Return one tensor, mapped from its file.

        The file is opened anew each time: pages of a mapping that stays open would add up to all of the file.
        """
        with safe_open(stored.file, framework="pt") as file:
            return file.get_tensor(stored.key)


def _folder(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(f"the weights of {name} cannot be fetched: {brief(error)}") from error
