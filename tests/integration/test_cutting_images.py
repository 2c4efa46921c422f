"""Batches of texts with images, cut by sequences: a vision-language model's loss on a cut is theirs alone.

The batches are laid out by hand as transformers' processors lay them out.
"""

import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from slsam_peft.trainer.cutting import CannotCutError, ImageCounts, first_sequences
from tests import tolerances
from tests.batches import token_losses

WORDS, IMAGE, VIDEO, START = 80, 70, 71, 72
DECODER = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def qwen2_vl():
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    text = {**DECODER, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    tokens = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **tokens))


def llava():
    vision = {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, **ENCODER, "projection_dim": 16}
    text = {"model_type": "llama", **DECODER}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=4)
    return LlavaForConditionalGeneration(config)


def gemma3():
    vision = {"image_size": 16, "patch_size": 4, **ENCODER}
    text = {**DECODER, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    config = Gemma3Config(vision_config=vision, text_config=text, image_token_index=IMAGE, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config)


def idefics3():
    vision = {"image_size": 16, "patch_size": 4, **ENCODER}
    text = {"model_type": "llama", **DECODER}
    config = Idefics3Config(
        vision_config=vision, text_config=text, image_token_id=IMAGE, scale_factor=2, pad_token_id=0
    )
    return Idefics3ForConditionalGeneration(config)


def text(generator, images):
    """Return tokens of a text with images of so many tokens each."""
    words = lambda n: torch.randint(3, 60, (n,), generator=generator).tolist()  # noqa: E731
    return words(2) + [token for n in images for token in [START, *[IMAGE] * n, *words(2)]] + words(3)


def padded(rows):
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill((mask == 0) | (ids == IMAGE), -100)}


def batch_of(layout, images, seed=0):
    """Return a batch whose rows hold so many images each, as a model's processor lays it out."""
    generator = torch.Generator().manual_seed(seed)
    noise = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    if layout == "qwen2_vl":  # images of unequal size, patches of all of them one behind another
        grids = [[(1, 4, 2 + 2 * (i % 2)) for i in range(n)] for n in images]
        batch = padded([text(generator, [t * h * w // 4 for t, h, w in row]) for row in grids])
        flat = [grid for row in grids for grid in row]
        pixels = noise(sum(t * h * w for t, h, w in flat), 3 * 2 * 4 * 4)
        kinds = (batch["input_ids"] == IMAGE).int()
        return {**batch, "pixel_values": pixels, "image_grid_thw": torch.tensor(flat), "mm_token_type_ids": kinds}
    batch = padded([text(generator, [4] * n) for n in images])
    if layout == "idefics3":  # images row by row, filled up with images of zeros
        most, pixels = max(images), noise(len(images), max(images), 3, 16, 16)
        for row, n in zip(pixels, images, strict=True):
            row[n:] = 0
        return {**batch, "pixel_values": pixels, "pixel_attention_mask": torch.ones(len(images), most, 16, 16).bool()}
    size = 8 if layout == "llava" else 16
    more = {"token_type_ids": (batch["input_ids"] == IMAGE).long()} if layout == "gemma3" else {}
    return {**batch, **more, "pixel_values": noise(sum(images), 3, size, size)}


MODELS = {"qwen2_vl": qwen2_vl, "llava": llava, "gemma3": gemma3, "idefics3": idefics3}


@pytest.fixture(scope="module", params=MODELS)
def family(request):
    torch.manual_seed(0)
    return request.param, MODELS[request.param]().double().eval()


@pytest.mark.parametrize("images", [(1, 1, 1), (2, 0, 1), (0, 1, 2), (1, 2, 1)])
def test_loss_on_a_cut_is_that_of_its_rows(images, family):
    """Each row's loss is the one it has in the whole batch, whatever number of images the rows hold."""
    layout, model = family
    batch = batch_of(layout, images)
    with torch.no_grad():
        whole = token_losses(model, batch)
        for wanted in (1, 2):
            cut = first_sequences(batch, wanted, images=ImageCounts.of(model.config))
            assert cut.taken == wanted
            assert ("pixel_values" in cut.inputs) == (sum(images[:wanted]) > 0)
            torch.testing.assert_close(
                token_losses(model, cut.inputs), whole[:wanted], rtol=0, atol=tolerances.FLOAT32_NORMS
            )


@pytest.mark.parametrize("layout", MODELS)
def test_pairs_keep_their_images(layout):
    """The images of rejected rows come behind those of all chosen ones."""
    torch.manual_seed(0)
    model = MODELS[layout]().double().eval()
    batch = batch_of(layout, (1, 2, 1, 2))
    cut = first_sequences(batch, 1, stacked=2, images=ImageCounts.of(model.config))
    with torch.no_grad():
        whole = token_losses(model, batch)[[0, 2]]
        torch.testing.assert_close(token_losses(model, cut.inputs), whole, rtol=0, atol=tolerances.FLOAT32_NORMS)


def test_videos_are_cut_as_well():
    """A row of an image, a row of a video of two frames, a row of both."""
    rows = [[5, IMAGE, IMAGE, 6], [7, *[VIDEO] * 4, 8], [IMAGE, VIDEO, VIDEO, 9]]
    batch = {
        **padded(rows),
        "pixel_values": torch.arange(12.0)[:, None],
        "image_grid_thw": torch.tensor([[1, 2, 4], [1, 2, 2]]),
        "pixel_values_videos": torch.arange(24.0)[:, None],
        "video_grid_thw": torch.tensor([[2, 2, 4], [2, 2, 2]]),
        "second_per_grid_ts": [0.5, 1.0],
    }
    counts = ImageCounts(IMAGE, VIDEO, merge=2)
    cut = first_sequences(batch, 2, images=counts).inputs
    assert cut["pixel_values"].flatten().tolist() == list(range(8))
    assert cut["pixel_values_videos"].flatten().tolist() == list(range(16))
    assert cut["video_grid_thw"].tolist() == [[2, 2, 4]]
    assert cut["second_per_grid_ts"] == [0.5]
    first = first_sequences(batch, 1, images=counts).inputs
    assert not first.keys() & {"pixel_values_videos", "video_grid_thw", "second_per_grid_ts"}


def test_images_of_unequal_size_are_counted_by_their_sizes():
    """As Pixtral lays them out: padded to one size, with their true heights and widths."""
    rows = [[5, IMAGE, IMAGE, 6, IMAGE, 7], [IMAGE] * 4]
    sizes = torch.tensor([[4, 8], [4, 4], [8, 8]])
    batch = {
        **padded(rows),
        "pixel_values": torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 8, 8),
        "image_sizes": sizes,
    }
    cut = first_sequences(batch, 1, images=ImageCounts(IMAGE, patch=4)).inputs
    assert cut["pixel_values"][:, 0, 0, 0].tolist() == [0, 1]
    assert cut["image_sizes"].tolist() == sizes[:2].tolist()


def test_lists_of_images_are_cut():
    batch = {**padded([[IMAGE, 5], [6, IMAGE, IMAGE], [7]]), "pixel_values": [torch.zeros(1), torch.ones(2)]}
    cut = first_sequences(batch, 1, images=ImageCounts(IMAGE)).inputs
    assert cut["pixel_values"] == [torch.zeros(1)]


def test_documents_in_a_row_keep_their_images():
    ids = torch.tensor([[5, IMAGE, IMAGE, 6, 7, IMAGE, 8, 9]])
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])}
    batch |= {"pixel_values": torch.arange(12.0)[:, None], "image_grid_thw": torch.tensor([[1, 2, 4], [1, 2, 2]])}
    cut = first_sequences(batch, 1, images=ImageCounts(IMAGE, merge=2)).inputs
    assert cut["input_ids"].tolist() == [[5, IMAGE, IMAGE, 6]]
    assert cut["pixel_values"].flatten().tolist() == list(range(8))


NEXT = {"pixel_values": torch.zeros(3, 2, 3, 8, 8), "image_sizes": torch.ones(3, 2)}
GRID = {"pixel_values": torch.zeros(15, 4), "image_grid_thw": torch.tensor([[1, 2, 4], [1, 2, 2], [1, 2, 2]])}
UNKNOWN = {
    "several images of unknown size": (NEXT, "its 3 images cannot be told apart by the 7 tokens that stand for"),
    "patches that are not the grids'": (GRID, "its 3 images cannot be told apart by the 7 tokens that stand for"),
    "another number of sizes": ({**NEXT, "image_sizes": torch.ones(2, 2)}, "'image_sizes' has another number of"),
    "one image beside flags, and two rows that hold some": (
        {"pixel_values": torch.zeros(1, 3, 8, 8), "image_flags": torch.ones(1)},
        "its 1 images cannot be told apart",
    ),
}


@pytest.mark.parametrize(("images", "reason"), UNKNOWN.values(), ids=UNKNOWN.keys())
def test_images_that_cannot_be_told_apart_are_named(images, reason):
    batch = {**padded([[IMAGE] * 5, [IMAGE] * 2, [5, 6]]), **images}
    with pytest.raises(CannotCutError, match=reason):
        first_sequences(batch, 1, images=ImageCounts(IMAGE, merge=2))


def test_an_image_that_two_rows_share_is_named():
    batch = {**padded([[IMAGE] * 3, [IMAGE]]), "pixel_values": torch.zeros(8, 4)}
    batch["image_grid_thw"] = torch.tensor([[1, 2, 4], [1, 2, 4]])
    with pytest.raises(CannotCutError, match="its 2 images cannot be told apart by the 4 tokens"):
        first_sequences(batch, 1, images=ImageCounts(IMAGE, merge=2))
    batch["pixel_values"] = torch.zeros(16, 4)
    with pytest.raises(CannotCutError, match="its images do not end where its sequences do"):
        first_sequences(batch, 1, images=ImageCounts(IMAGE, merge=2))


def test_counts_are_those_of_the_config():
    assert ImageCounts.of(qwen2_vl().config) == ImageCounts(IMAGE, VIDEO, merge=2, patch=4)
    assert ImageCounts.of(llava().config) == ImageCounts(IMAGE, patch=4)
    assert ImageCounts.of(gemma3().config) == ImageCounts(IMAGE, patch=4)
    assert ImageCounts.of(object()) is None
