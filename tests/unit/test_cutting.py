"""Micro-batches cut by sequences: a model's loss on a cut is that of its sequences alone, in every layout."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from trl import DPOTrainer, KTOTrainer, RewardTrainer, SFTTrainer
from trl.data_utils import pack_dataset

from slsam_peft.trainer.cutting import CannotCutError, count_sequences, coupled, first_sequences, scored_items
from tests import batches, tolerances
from tests.decoders import decoder

ROWS = batches.texts([7, 4, 9, 5])


@pytest.fixture(scope="module")
def model():
    return decoder("qwen2", dropout=0.0)


def assert_loss_is_theirs(model, cut, rows, tolerance=tolerances.EXACT_FLOAT64):
    with torch.no_grad():
        expected = batches.loss_alone(model, rows)
        losses = batches.token_losses(model, cut.inputs)
    torch.testing.assert_close(losses.sum(), expected, rtol=tolerance, atol=0)
    assert int(scored_items(cut.inputs)) == int((losses != 0).sum()) == sum(len(row) - 1 for row in rows)


LAYOUTS = {
    "padded right": batches.padded(ROWS),
    "padded left": batches.padded(ROWS, "left"),
    "padding-free": batches.padding_free(ROWS),
    "padding-free, padded to a multiple": batches.padding_free(ROWS, multiple=16),
    "packed by bfd": batches.packed([ROWS[0] + ROWS[1], ROWS[2] + ROWS[3]], [[7, 4], [9, 5]]),
    "flattened": batches.flattening(ROWS),
    "flattened with boundaries": batches.flattening(ROWS, return_flash_attn_kwargs=True, return_seq_idx=True),
}


@pytest.mark.parametrize("wanted", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_on_a_cut_is_that_of_its_sequences_alone(name, wanted, model):
    layout = LAYOUTS[name]
    before = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in layout.items()}
    cut = first_sequences(layout, wanted)
    assert (cut.taken, cut.sequences) == (min(wanted, 4), 4)
    assert count_sequences(layout) == 4
    tolerance = tolerances.FLOAT32_ANGLES if name == "padded left" else tolerances.EXACT_FLOAT64
    assert_loss_is_theirs(model, cut, ROWS[:wanted], tolerance)
    torch.testing.assert_close(dict(layout), before, rtol=0, atol=0)


@pytest.mark.parametrize("multiple", [None, 16])
def test_boundaries_of_a_cut_are_those_a_collator_makes(multiple):
    """Kernels of variable length get what TRL's collator makes of the same sequences alone."""
    cut = first_sequences(batches.padding_free(ROWS, multiple), 2)
    torch.testing.assert_close(cut.inputs, batches.padding_free(ROWS[:2]), rtol=0, atol=0)
    tensors = {**LAYOUTS["padding-free"], "max_length_q": torch.tensor(9), "max_length_k": torch.tensor(9)}
    assert int(first_sequences(tensors, 2).inputs["max_length_q"]) == 7


@pytest.mark.parametrize(
    ("wanted", "shape"), [(1, (1, 4)), (2, (1, 9)), (3, (1, 12)), (4, (2, 9)), (5, (1, 21)), (6, (3, 9))]
)
def test_documents_in_several_rows(wanted, shape, model):
    """They keep their row where they lie in the first one or fill whole rows, and else make one."""
    documents = batches.texts([4, 5, 3, 6, 3, 6])
    layout = batches.in_rows([documents[:2], documents[2:4], documents[4:]])
    layout["labels"] = layout["input_ids"].clone().masked_fill(layout["position_ids"] == 0, -100)
    layout["labels"][:, 0] = layout["input_ids"][:, 0]  # a row's first label is nobody's target
    assert count_sequences(layout) == 6
    cut = first_sequences(layout, wanted)
    assert (cut.taken, tuple(cut.inputs["input_ids"].shape)) == (wanted, shape)
    assert_loss_is_theirs(model, cut, documents[:wanted])


def test_documents_of_one_token_are_not_counted(model):
    """They predict nothing, and look like padding; what lies between counted ones goes along."""
    rows = [ROWS[0], [5], ROWS[1], ROWS[2], [6], [7]]
    layout = batches.padding_free(rows)
    assert count_sequences(layout) == 3
    cut = first_sequences(layout, 2)
    assert cut.inputs["input_ids"].shape[1] == 12
    assert cut.inputs["cu_seq_lens_q"].tolist() == [0, 7, 8, 12]
    assert_loss_is_theirs(model, cut, [ROWS[0], [5], ROWS[1]])
    lone = batches.padding_free([[5], [6]])
    assert first_sequences(lone, 1) == (lone, 1, 1)


def test_a_packed_row_of_the_wrapped_strategy_is_a_sequence(model):
    texts = batches.texts([6, 6, 6, 6, 6])
    rows = pack_dataset(Dataset.from_dict({"input_ids": texts}), 10, "wrapped")["input_ids"]
    layout = batches.padded([list(row) for row in rows])
    assert count_sequences(layout) == 3
    assert_loss_is_theirs(model, first_sequences(layout, 2), [list(row) for row in rows[:2]])


def test_an_attention_mask_makes_rows_of_documents(model):
    """transformers looks at position ids only where no mask is passed: then a row is one sequence."""
    layout = batches.padded(ROWS)
    layout["position_ids"] = (layout["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert count_sequences(layout) == 4
    assert_loss_is_theirs(model, first_sequences(layout, 3), ROWS[:3])


@pytest.mark.parametrize("make", [batches.padded, batches.padding_free])
def test_a_lone_sequence_is_taken_whole(make):
    layout = make(ROWS[:1])
    cut = first_sequences(layout, 1)
    assert (cut.taken, cut.sequences) == (1, 1)
    assert cut.inputs == dict(layout)


def test_pairs_stay_pairs(model):
    """Chosen sequences lie above rejected ones, in the cut as well."""
    chosen, rejected = batches.texts([5, 7, 6], 1), batches.texts([8, 4, 6], 2)
    layout = batches.pairs(chosen, rejected)
    assert count_sequences(layout, stacked=2) == 3
    cut = first_sequences(layout, 2, stacked=2)
    assert (cut.taken, cut.sequences) == (2, 3)
    assert cut.inputs["ref_chosen_logps"].tolist() == [0, 1]
    with torch.no_grad():
        halves = batches.token_losses(model, cut.inputs).chunk(2)
        for half, rows in zip(halves, (chosen[:2], rejected[:2]), strict=True):
            for losses, row in zip(half, rows, strict=True):
                expected = batches.loss_alone(model, [row])
                torch.testing.assert_close(losses.sum(), expected, rtol=tolerances.EXACT_FLOAT64, atol=0)
    assert int(scored_items(cut.inputs)) == 7 + 3 + 4 + 6
    with pytest.raises(CannotCutError, match="its 5 rows are not 2 for each example"):
        first_sequences({"input_ids": layout["input_ids"][:5]}, 1, stacked=2)


def test_whatever_has_an_entry_per_sequence_is_cut():
    ids = torch.arange(12).reshape(6, 2)
    inputs = {"input_ids": ids, "margin": torch.arange(3), "names": list("abc"), "rows": list("uvwxyz")}
    inputs |= {"scale": torch.tensor(2.0), "use_cache": False, "kind": "text", "nothing": None}
    inputs |= {"position_ids": torch.arange(36).reshape(3, 6, 2), "attention_mask": torch.ones_like(ids)}
    cut = first_sequences(inputs, 2, stacked=2)
    assert torch.equal(cut.inputs["input_ids"], ids[[0, 1, 3, 4]])
    assert torch.equal(cut.inputs["position_ids"], inputs["position_ids"][:, [0, 1, 3, 4]])
    assert cut.inputs["margin"].tolist() == [0, 1]
    assert cut.inputs["names"] == ["a", "b"]
    assert cut.inputs["rows"] == ["u", "v", "x", "y"]
    assert {k: cut.inputs[k] for k in ("scale", "use_cache", "kind", "nothing")} == {
        k: inputs[k] for k in ("scale", "use_cache", "kind", "nothing")
    }


BAD = {
    "neither an entry per row": ({"odd": torch.arange(5)}, "'odd' has no entry for each of its 4 sequences"),
    "nested": ({"more": {"a": 1}}, "'more' has no entry for each of its 4 sequences"),
    "sounds": ({"input_features": torch.zeros(4, 2, 2)}, r"sounds \('input_features'\), which cannot be told apart"),
    "images without counts": ({"pixel_values": torch.zeros(4, 3, 2, 2)}, "holds images, and the model's config names"),
    "images of another name": ({"pixel_values_images": torch.zeros(4, 3)}, "images as 'pixel_values_images', and no"),
}


@pytest.mark.parametrize(("more", "reason"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_cut_is_named(more, reason):
    """The same batch is taken whole without an error."""
    layout = {**batches.padded(ROWS), **more}
    with pytest.raises(CannotCutError, match=reason):
        first_sequences(layout, 2)
    assert first_sequences(layout, 4).taken == 4


def test_batches_of_something_else_are_named():
    with pytest.raises(CannotCutError, match="it holds none of input_ids, .*, but prompt, score"):
        count_sequences({"prompt": ["a"], "score": [1.0]})
    with pytest.raises(CannotCutError, match="'odd' is not one entry per token of its 1 rows of 25"):
        first_sequences({**LAYOUTS["padding-free"], "odd": torch.arange(3)}, 1)
    with pytest.raises(ValueError, match="wanted=0 must be at least 1"):
        first_sequences(batches.padded(ROWS), 0)


def test_scored_items_are_what_a_loss_counts(model):
    """Also where a collator leaves a document's first label in place: the loss counts it."""
    layout = batches.padding_free(ROWS)
    assert int(scored_items(layout)) == sum(map(len, ROWS)) - 4
    unmasked = {**layout, "labels": layout["input_ids"]}
    assert int(scored_items(unmasked)) == sum(map(len, ROWS)) - 1
    assert int(scored_items({"shift_labels": torch.tensor([[1, 2, -100]])})) == 2
    assert int(scored_items({"labels": torch.tensor([0, 1, -100])})) == 2, "classes are not shifted"
    with pytest.raises(ValueError, match="a batch of input_ids holds no labels"):
        scored_items({"input_ids": torch.zeros(1, 2)})


def test_nothing_of_rows_is_read_and_documents_once(monkeypatch):
    reads = []
    for name in ("tolist", "item", "__bool__", "__int__", "__index__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda x, *a, original=original, name=name: reads.append(name) or original(x, *a)
        )
    first_sequences(LAYOUTS["padded right"], 2)
    scored_items(LAYOUTS["padding-free"])
    assert not reads
    for do in (count_sequences, lambda layout: first_sequences(layout, 2)):
        do(LAYOUTS["padding-free"])
        assert reads == ["tolist"]
        reads.clear()


def test_losses_that_couple_a_batch():
    def of(cls, **args):
        trainer = cls.__new__(cls)
        trainer.args = SimpleNamespace(**args)
        return coupled(trainer)

    assert "KTO" in of(KTOTrainer)
    assert of(SFTTrainer) is of(RewardTrainer) is of(DPOTrainer, loss_type=["sigmoid", "ipo"]) is None
    for name in ("aot", "aot_unpaired", "sft", "some_new_one"):
        assert f"loss_type '{name}' is no mean of terms" in of(DPOTrainer, loss_type=["sigmoid", name])
