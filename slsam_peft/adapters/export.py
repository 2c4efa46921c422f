"""Hands an adapter on: as a plain PEFT folder, or merged into its base, shard by shard."""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors import TensorSpec, serialize_file
from safetensors.torch import save_file
from transformers import GenerationConfig

from slsam_peft.adapters.arms import SETTINGS, WEIGHTS
from slsam_peft.adapters.base_files import INDEX, SINGLE, BaseFiles
from slsam_peft.adapters.load import Adapter, adapter_tokenizer, plain_config, raw_tensors
from slsam_peft.adapters.merge import Merge
from slsam_peft.adapters.requantize import NF4, check_quantization, dequantized
from slsam_peft.config import RECORD_NAME
from slsam_peft.errors import UserError
from slsam_peft.models.fetched import hub_name_of
from slsam_peft.models.load import Tell
from slsam_peft.saving.atomic import replaced_folder
from slsam_peft.saving.card import tags_of

ORIGINAL = "original"
DEQUANTIZED = "dequantized"
WAYS = {
    ORIGINAL: "the original 16-bit weights",
    DEQUANTIZED: "the dequantized weights it was trained on",
}
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Merging:
    """How to merge.

    Args:
        dtype (`torch.dtype` or `None`): Dtype of the merged weights; `None` keeps that of the base's files.
        shard_bytes (`int`): Size of a file, at most, unless a single tensor is larger.
    """

    dtype: torch.dtype | None = None
    shard_bytes: int = SHARD_BYTES


@contextmanager
def new_folder(out: Path, force: bool) -> Iterator[Path]:
    """Yield a scratch folder that becomes `out` when the block ends well, and vanishes when it does not.

    Args:
        out (`Path`): Where the result goes.
        force (`bool`): Replace an earlier export.

    Raises:
        UserError: see `check_out`, or the disk cannot be written.
    """
    check_out(out, force)
    try:
        with replaced_folder(out) as new:
            yield new
    except OSError as error:
        raise UserError(
            f"{out} could not be written: {error.strerror or error}. Free some space, or name another."
        ) from error


def check_out(out: Path, force: bool) -> None:
    """Check that an export may be written to `out`.

    Raises:
        UserError: it exists and `force` is not set, or it holds anything but an export.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise UserError(f"--output={out} is a file; name a folder.")
    if not force:
        raise UserError(
            f"--output={out} is not empty. Name another folder, or add --force to replace the export in it."
        )
    if not any((out / name).is_file() for name in (SETTINGS, "config.json")):
        raise UserError(
            f"--output={out} holds no model, and --force replaces earlier exports only. Name another folder."
        )


def copy_adapter(adapter: Adapter, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write an adapter as plain PEFT loads it, without what a checkpoint has beside it.

    Args:
        adapter (`Adapter`): The adapter.
        folder (`Path`): An empty folder.
        dtype (`torch.dtype`, *optional*): Dtype of its tensors, which stay as they are without it.
    """
    if dtype is None:
        shutil.copyfile(adapter.folder / WEIGHTS, folder / WEIGHTS)
    else:
        tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in raw_tensors(adapter).items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    for name in (SETTINGS, RECORD_NAME, "README.md"):
        if (adapter.folder / name).is_file():
            shutil.copyfile(adapter.folder / name, folder / name)
    if (adapter.folder / "tokenizer_config.json").is_file():
        adapter_tokenizer(adapter).save_pretrained(folder)


def way_of(adapter: Adapter, config: Any, base: str | None) -> str:
    """Return what to merge into: `"original"` or `"dequantized"`.

    Args:
        adapter (`Adapter`): The adapter.
        config (`PreTrainedConfig`): Its base's.
        base (`str` or `None`): What the user chose.

    Raises:
        UserError: the base was quantised in training and nothing was chosen, was not and something was, or its
            files hold quantised weights.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"the files of {adapter.base} hold quantised weights, and a merge needs 16-bit ones: name the model "
            "they were made from with --model."
        )
    quantization = adapter.quantization
    if quantization is not None and base is None:
        ways = "\n".join(f"  --base {name:11} {what}" for name, what in WAYS.items())
        raise UserError(
            f"{adapter.folder} was trained on a quantised base, and there are two ways to merge it. Choose one; both "
            f"are measured before one is written:\n{ways}"
        )
    if quantization is None and adapter.record is not None and base is not None:
        raise UserError(f"--base={base}: {adapter.folder} was trained on a base that was not quantised; leave it out.")
    if base == DEQUANTIZED:
        check_quantization(quantization or NF4)
    return base or ORIGINAL


def build_merge(adapter: Adapter, config: Any, way: str) -> Merge:
    """Return the merge of an adapter into its base, or into what quantisation makes of it.

    Raises:
        UserError: it cannot be merged tensor by tensor, or the base's files cannot be read.
    """
    files = BaseFiles(adapter.base)
    if way == ORIGINAL:
        return Merge(adapter, config, files)
    quantization = adapter.quantization or NF4
    base = adapter.record["base"] if adapter.record is not None else {"dtype": "bfloat16", "unquantized": ["lm_head"]}
    dtype, kept = getattr(torch, base["dtype"]), {f"{name}.weight" for name in base["unquantized"]}
    merge: Merge

    def transform(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return dequantized(tensor, quantization, dtype) if name in merge.linears - kept else tensor

    merge = Merge(adapter, config, files, transform)
    return merge


def write_merged(merge: Merge, adapter: Adapter, config: Any, folder: Path, merging: Merging, tell: Tell) -> None:
    """Write a merged model: shards, index, config, generation config, tokenizer.

    One shard is in memory at a time.

    Args:
        merge (`Merge`): The weights.
        adapter (`Adapter`): For the tokenizer.
        config (`PreTrainedConfig`): The base's.
        folder (`Path`): An empty folder.
        merging (`Merging`): Dtype and size of the shards.
        tell (callable): Is told of every shard.
    """
    dtypes = write_shards(merge, folder, merging, tell)
    new = plain_config(config)
    new.dtype = dtypes.pop() if len(dtypes) == 1 else config.dtype
    if merge.untied:
        new.tie_word_embeddings = False
    new.save_pretrained(folder)
    if (Path(merge.folder) / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(merge.folder).save_pretrained(folder)
    adapter_tokenizer(adapter).save_pretrained(folder)


def write_shards(merge: Merge, folder: Path, merging: Merging, tell: Tell) -> set[torch.dtype]:
    """Write the merged weights, and an index where there are several files; return the dtypes written."""
    plans = shards(merge, merging)
    # All shards are put together in one buffer: what is freed and allocated anew piles up beside itself.
    buffer = torch.empty(max(_end(plan) for plan in plans), dtype=torch.uint8)
    weight_map: dict[str, str] = {}
    for number, plan in enumerate(plans, 1):
        file = SINGLE if len(plans) == 1 else f"model-{number:05}-of-{len(plans):05}.safetensors"
        tell(f"Merging: shard {number} of {len(plans)}")
        entries = {place.name: _merged_into(buffer, place, merge) for place in plan}
        serialize_file(entries, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(entries, file)
    places = [place for plan in plans for place in plan]
    if len(plans) > 1:
        index = {"metadata": {"total_size": sum(p.size for p in places)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return {p.dtype for p in places if p.dtype.is_floating_point}


def _merged_into(buffer: torch.Tensor, place: "Place", merge: Merge) -> TensorSpec:
    """Put a merged tensor into its place in the buffer, and return what safetensors writes it from."""
    view = buffer[place.start : place.start + place.size].view(place.dtype).view(place.shape)
    view.copy_(merge.tensor(place.name))
    dtype = str(place.dtype).removeprefix("torch.")
    return TensorSpec(dtype=dtype, shape=place.shape, data_ptr=view.data_ptr(), data_len=place.size)


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in its shard: `size` bytes from `start`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    size: int


def shards(merge: Merge, merging: Merging) -> list[list[Place]]:
    """Return the tensors of each file, in order."""
    plans: list[list[Place]] = [[]]
    for name in merge:
        shape, dtype = merge.shape(name), merge.dtype(name)
        if dtype.is_floating_point and merging.dtype is not None:
            dtype = merging.dtype
        size = math.prod(shape) * dtype.itemsize
        if plans[-1] and _end(plans[-1]) + size > merging.shard_bytes:
            plans.append([])
        plans[-1].append(Place(name, shape, dtype, _end(plans[-1]), size))
    return plans


def _end(plan: list[Place]) -> int:
    """Return where the next tensor may start, aligned for every dtype."""
    return -(-(plan[-1].start + plan[-1].size) // 8) * 8 if plan else 0


def write_card(folder: Path, adapter: Adapter, way: str, dtype: str) -> None:
    """Write the model card of a merged model."""
    # A card is read elsewhere, where the folder of a local base means nothing.
    base: str | None = adapter.base
    if Path(adapter.base).is_dir():
        base = hub_name_of(adapter.base)
    tags, trained = [], "It was trained by another trainer than this package's."
    if adapter.record is not None:
        tags = tags_of(adapter.record["method"])
        settings = ", ".join(tag.removeprefix("sl-sam:") for tag in tags[1:])
        training = adapter.record["training"]
        trained = (
            "It was trained with SL-SAM (sparse-layer sharpness-aware minimisation, arXiv 2602.09395) by slsam_peft: "
            f"{settings}; {training['steps']} steps, learning rate {training['learning_rate']}."
        )
    header = ModelCardData(base_model=base, library_name="transformers", pipeline_tag="text-generation", tags=tags)
    kind = adapter.config.peft_type.value
    into = "its base" if adapter.quantization is None else WAYS[way]
    title = f"# {base or 'A base model'} with a merged adapter"
    text = f"{title}\n\nA {kind} adapter merged into {into}, in {dtype}. {trained}\n"
    ModelCard(f"---\n{header}\n---\n\n{text}").save(folder / "README.md")
