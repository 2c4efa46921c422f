"""Cuts the images of a batch by what the model itself counts: tokens that stand for them in the text."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from slsam_peft.trainer.documents import read


class CannotCutError(ValueError):
    """A batch cannot be cut by sequences. The message is a clause that says why, without a full stop."""


class ImageCounts(NamedTuple):
    """What a model's config says about images in a text.

    Args:
        image_token (`int` or `None`): Id of the token that stands for a part of an image.
        video_token (`int` or `None`): Id of the token that stands for a part of a video.
        merge (`int`): Patches that are merged into one token, along each side.
        patch (`int` or `None`): Pixels along a patch's side.
    """

    image_token: int | None = None
    video_token: int | None = None
    merge: int = 1
    patch: int | None = None

    @classmethod
    def of(cls, config: Any) -> "ImageCounts | None":
        """Return what a config says; `None` where it names no token for images or videos.

        Args:
            config (`PreTrainedConfig`): The model's.
        """
        image = _first_set(config, "image_token_id", "image_token_index")
        video = _first_set(config, "video_token_id", "video_token_index")
        if image is None and video is None:
            return None
        vision = getattr(config, "vision_config", None)
        merge = _first_set(vision, "spatial_merge_size") or _first_set(config, "spatial_merge_size") or 1
        return cls(image, video, int(merge), _first_set(vision, "patch_size"))


class _Kind(NamedTuple):
    """Images or videos: which values of a batch hold them."""

    name: str
    pixels: str
    grid: str
    others: tuple[str, ...]  # starts of the names of what else holds one entry per image

    def names(self, inputs: Mapping[str, Any]) -> list[str]:
        """Return the names of this kind's values in a batch."""
        return [k for k, v in inputs.items() if v is not None and (k == self.pixels or k.startswith(self.others))]


VIDEOS = _Kind("videos", "pixel_values_videos", "video_grid_thw", ("video_", "pixel_values_videos", "second_per_grid"))
IMAGES = _Kind("images", "pixel_values", "image_grid_thw", ("image_", "pixel_attention_mask", "spatial_shapes"))


def by_rows(inputs: Mapping[str, Any], rows: int) -> bool:
    """Whether a batch holds its images row by row: `(batch, images of a row, ...)`, as Idefics and Mllama have it.

    LLaVA-NeXT's are `(images, patches, channels, height, width)`; it passes the images' sizes as well.
    """
    pixels: Any = inputs.get(IMAGES.pixels)
    stacked = isinstance(pixels, torch.Tensor) and pixels.dim() >= 5 and len(pixels) == rows
    return stacked and "image_sizes" not in inputs


def cut_images(
    inputs: Mapping[str, Any],
    parts: Sequence[torch.Tensor],
    spans: Sequence[tuple[int, int]],
    counts: ImageCounts | None,
) -> tuple[dict[str, Any], set[str]]:
    """Return the images and videos of some parts of a text, and the names of everything that was theirs.

    The host reads the numbers of tokens once for each kind that the batch holds.

    Args:
        inputs (`Mapping`): A batch.
        parts (`Sequence[torch.Tensor]`): Token ids of the text's parts, in order; together the whole text.
        spans (`Sequence[tuple[int, int]]`): Which parts are taken: first one, and the one behind the last.
        counts (`ImageCounts` or `None`): What the model's config says.

    Returns:
        `tuple[dict, set]`: The cut values; a kind of which nothing is left has none. Names of the uncut values.

    Raises:
        CannotCutError: the images cannot be told apart.
    """
    cut: dict[str, Any] = {}
    names: set[str] = set()
    for kind, token in ((IMAGES, counts and counts.image_token), (VIDEOS, counts and counts.video_token)):
        own = kind.names(inputs)
        if kind.pixels not in own:
            continue
        if counts is None or token is None:
            raise CannotCutError(f"it holds {kind.name}, and the model's config names no token that stands for them")
        if not parts:
            raise CannotCutError(f"it holds {kind.name} and no token ids that would tell whose they are")
        names.update(own)
        cut.update(_cut_kind(kind, {name: inputs[name] for name in own}, parts, spans, counts, token))
    return cut, names


def _cut_kind(
    kind: _Kind,
    values: Mapping[str, Any],
    parts: Sequence[torch.Tensor],
    spans: Sequence[tuple[int, int]],
    counts: ImageCounts,
    token: int,
) -> dict[str, Any]:
    """Return the values of one kind, cut to the spans."""
    held = torch.stack([(part == token).sum() for part in parts])
    tokens, grids = read(held, _patches(values.get(kind.grid), held))
    sizes = _tokens_of_each(kind, values, tokens, grids, counts)
    edges = {edge: i for i, edge in enumerate(accumulate(sizes, initial=0))}
    ends = list(accumulate(tokens, initial=0))
    if any(ends[i] not in edges for span in spans for i in span):
        raise CannotCutError(f"its {kind.name} do not end where its sequences do")
    chosen = [(edges[ends[start]], edges[ends[stop]]) for start, stop in spans]
    if all(start == stop for start, stop in chosen):
        return {}
    pixels = list(accumulate(grids, initial=0)) if grids else range(len(sizes) + 1)
    cut = {name: joined_parts(value, chosen) for name, value in values.items() if name != kind.pixels}
    cut[kind.pixels] = joined_parts(values[kind.pixels], [(pixels[start], pixels[stop]) for start, stop in chosen])
    return cut


def _tokens_of_each(
    kind: _Kind, values: Mapping[str, Any], tokens: Sequence[int], grids: Sequence[int], counts: ImageCounts
) -> list[int]:
    """Return how many tokens stand for each image; the sum is that of `tokens`, the numbers in each part.

    Raises:
        CannotCutError: the numbers cannot be told with certainty.
    """
    pixels, total = values[kind.pixels], sum(tokens)
    images = len(grids) or len(pixels)
    others = [k for k, v in values.items() if k != kind.pixels and _entries(v) != images]
    holding = [n for n in tokens if n]
    if others:
        raise CannotCutError(f"it holds {images} {kind.name}, and {others[0]!r} has another number of entries")
    if grids:
        sizes = [n // counts.merge**2 for n in grids]
        if len(pixels) != sum(grids):
            sizes = []
    elif len(holding) == images:  # each part with tokens holds at least one image, so each holds one
        sizes = holding
    elif len(values) == 1 and isinstance(pixels, torch.Tensor) and pixels.dim() == 4 and total % images == 0:
        sizes = [total // images] * images  # one size, nothing that would tell them apart: one number of tokens
    else:
        sizes = _tokens_of_sizes(values, counts)
    if sum(sizes) != total or 0 in sizes or not sizes:
        raise CannotCutError(
            f"its {images} {kind.name} cannot be told apart by the {total} tokens that stand for them"
        )
    return sizes


def _tokens_of_sizes(values: Mapping[str, Any], counts: ImageCounts) -> list[int]:
    """Return the numbers of tokens by the images' heights and widths, as Pixtral and Mistral 3 count them."""
    sizes: Any = values.get("image_sizes")
    pixels = values[IMAGES.pixels] if IMAGES.pixels in values else None
    if not isinstance(sizes, torch.Tensor) or counts.patch is None or getattr(pixels, "dim", lambda: 0)() != 4:
        return []
    return (sizes // (counts.patch * counts.merge)).prod(1).tolist()


def _patches(grid: Any, like: torch.Tensor) -> torch.Tensor:
    return like.new_zeros(0) if grid is None else grid.prod(-1).to(like)


def _entries(value: Any) -> int | None:
    return len(value) if isinstance(value, list) or (isinstance(value, torch.Tensor) and value.dim() > 0) else None


def _first_set(config: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def joined_parts(value: Any, spans: Sequence[tuple[int, int]]) -> Any:
    """Return the entries of a list or tensor in some spans, one behind another.

    Args:
        value (`list` or `torch.Tensor`): What is cut along its first dimension.
        spans (`Sequence[tuple[int, int]]`): First entry of each span, and the one behind its last.
    """
    pieces = [value[start:stop] for start, stop in spans]
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat(pieces) if isinstance(value, torch.Tensor) else [x for piece in pieces for x in piece]
