"""Sequences of the next batch behind those of this one: own losses and gradients are those of the batch alone."""

import pytest
import torch

from slsam_peft.trainer.cutting import count_sequences, scored_items
from slsam_peft.trainer.joining import CannotJoinError, join
from tests import batches, tolerances
from tests.decoders import decoder

OWN = batches.texts([7, 4, 6])
NEXT = batches.texts([9, 3, 8, 5], seed=1)


@pytest.fixture(scope="module")
def model():
    return decoder("qwen2", dropout=0.0)


def gradients(model, loss):
    """Return a loss and its gradients with respect to everything that is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return loss.detach(), torch.autograd.grad(loss, trained)


def assert_parts_are_those_alone(model, joined, own, riding, tolerance=tolerances.EXACT_FLOAT64):
    """Losses and gradients of own tokens, and of riding ones, are those of the texts alone."""
    mask = joined.own[:, :-1]
    losses = batches.token_losses(model, joined.inputs).detach()
    expected = [gradients(model, batches.loss_alone(model, rows)) for rows in (own, riding)]
    actual = [gradients(model, (batches.token_losses(model, joined.inputs) * part).sum()) for part in (mask, ~mask)]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    scored = [int((losses[part] != 0).sum()) for part in (mask, ~mask)]
    assert int(joined.riding_items) == scored[1]
    assert int(scored_items(joined.inputs)) == sum(scored)
    assert joined.tokens == sum(map(len, riding))
    assert joined.own.dtype == torch.bool
    assert joined.own.shape == joined.inputs["input_ids"].shape
    alone = batches.token_losses(model, joined.riding).sum()
    torch.testing.assert_close(alone.detach(), expected[1][0], rtol=tolerances.EXACT_FLOAT64, atol=0)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("wanted", "riding"), [(1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (9, [0, 1, 2, 3])])
def test_padded_rows_that_lengthen_a_batch_least_ride(wanted, riding, side, model):
    """A row that is longer than the batch lengthens it; of those that do not, the earlier ones come first."""
    joined = join(batches.padded(OWN, side), batches.padded(NEXT), wanted)
    tolerance = tolerances.FLOAT32_ANGLES if side == "left" else tolerances.EXACT_FLOAT64
    assert_parts_are_those_alone(model, joined, OWN, [NEXT[i] for i in riding], tolerance)
    assert joined.inputs["input_ids"].shape[1] == max(7, *(len(NEXT[i]) for i in riding))
    assert joined.own.tolist() == [[True] * joined.own.shape[1]] * 3 + [[False] * joined.own.shape[1]] * len(riding)


def test_padding_that_no_riding_row_uses_is_cut_off(model):
    """Of a batch that is padded to 16, and of a left-padded one, nothing is lost."""
    joined = join(batches.padded(OWN), batches.padded(NEXT, multiple=16), 1)
    assert joined.riding["input_ids"].tolist() == [NEXT[1]]
    left = join(batches.padded(OWN), batches.padded(NEXT, "left"), 2)
    assert left.inputs["input_ids"].shape == (5, 9)
    assert int(left.riding["attention_mask"].sum()) == left.tokens == 9 + 3


def test_the_shortest_rides_where_every_row_is_longer(model):
    joined = join(batches.padded(batches.texts([3, 2])), batches.padded(batches.texts([9, 6, 6, 7])), 2)
    assert joined.riding["input_ids"].tolist() == batches.texts([9, 6, 6, 7])[1:3]
    assert joined.inputs["attention_mask"].sum(1).tolist() == [3, 2, 6, 6]
    assert joined.inputs["labels"][0].tolist()[3:] == [-100] * 3


def test_of_rows_that_do_not_lengthen_the_batch_the_first_ride():
    rows = batches.texts([6, 8, 7, 3])
    joined = join(batches.padded(OWN), batches.padded(rows), 2)
    assert joined.riding["input_ids"].tolist() == [rows[0] + [0], rows[2]]


LAYOUTS = {
    "padding-free": (batches.padding_free, {}),
    "padded to a multiple": (batches.padding_free, {"multiple": 16}),
    "flattened": (batches.flattening, {}),
    "flattened with boundaries": (batches.flattening, {"return_flash_attn_kwargs": True, "return_seq_idx": True}),
}


@pytest.mark.parametrize("wanted", [1, 3, 9])
@pytest.mark.parametrize(("make", "settings"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_documents_ride_in_the_row(make, settings, wanted, model):
    own = make(OWN, **settings)
    joined = join(own, make(NEXT, **settings), wanted)
    taken = min(wanted, 4)
    length = own["input_ids"].shape[1]
    assert count_sequences(joined.riding) == taken
    assert joined.own[0].tolist() == [True] * length + [False] * (joined.own.shape[1] - length)
    if wanted < 4 or "multiple" not in settings:
        assert_parts_are_those_alone(model, joined, OWN, NEXT[:taken])


def test_boundaries_are_those_a_collator_makes():
    for settings in ({}, {"multiple": 5}):  # 17 own tokens
        joined = join(batches.padding_free(OWN, **settings), batches.padding_free(NEXT), 3)
        filler = [[0]] * (-17 % 5 if settings else 0)
        torch.testing.assert_close(joined.inputs, batches.padding_free([*OWN, *filler, *NEXT[:3]]), rtol=0, atol=0)


@pytest.mark.parametrize(("lengths", "wanted", "shape"), [([4, 4], 1, (3, 9)), ([4, 8], 2, (3, 12))])
def test_documents_in_several_rows_get_another_row(lengths, wanted, shape, model):
    """What is shorter is filled up with documents of one token."""
    own, riding = batches.texts([4, 5, 3, 6]), batches.texts(lengths, seed=1)
    joined = join(batches.in_rows([own[:2], own[2:]]), batches.in_rows([riding]), wanted)
    assert count_sequences(joined.riding) == wanted
    assert joined.inputs["input_ids"].shape == shape
    assert joined.own.tolist() == [[True] * shape[1]] * 2 + [[False] * shape[1]]
    assert_parts_are_those_alone(model, joined, own, riding[:wanted])


def test_rows_with_boundaries_make_one_row(model):
    """A kernel of variable length sees them so anyway."""
    own = batches.texts([4, 5, 3, 6])
    rows = batches.in_rows([own[:2], own[2:]])
    rows["labels"][:, 0] = rows["input_ids"][:, 0]  # a row's first label is nobody's target
    flat = batches.padding_free(own)
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    coming = {k: v for k, v in batches.padding_free(NEXT).items() if k != "seq_idx"}
    joined = join({**rows, **{name: flat[name] for name in names}}, coming, 2)
    expected = batches.padding_free([*own, *NEXT[:2]])
    expected.pop("seq_idx")
    torch.testing.assert_close(joined.inputs, expected, rtol=0, atol=0)
    assert joined.own.tolist() == [[True] * 18 + [False] * 12]
    assert_parts_are_those_alone(model, joined, own, NEXT[:2])


def test_a_riding_document_is_not_predicted_from_an_own_one(model):
    """Also where a collator leaves the first label in place."""
    plain = [batches.padding_free(rows[:1]) for rows in (OWN, NEXT)]
    joined = join(*({**batch, "labels": batch["input_ids"]} for batch in plain), 1)
    assert_parts_are_those_alone(model, joined, OWN[:1], NEXT[:1])


PADDED, FLAT = batches.padded(OWN), batches.padding_free(OWN)
BAD = {
    "unknown": (PADDED, {"shift_labels": torch.zeros(3, 7)}, "can be joined; 'shift_labels' is missing or something"),
    "shape": (PADDED, {"labels": torch.zeros(1)}, "can be joined; 'labels' is missing or something else"),
    "missing": (PADDED, {"attention_mask": None}, "can be joined; 'attention_mask' is missing or something else"),
    "images": (PADDED, {"pixel_values": torch.zeros(3, 3, 4, 4)}, "can be joined; 'pixel_values' is missing or"),
    "unknown in documents": (FLAT, {"odd": torch.zeros(1, 17)}, "can be joined; 'odd' is missing or something else"),
    "no labels": (PADDED, {"labels": None}, "can be joined; 'labels' is missing or something else"),
    "no labels in documents": (FLAT, {"labels": None}, "can be joined; 'labels' is missing or something else"),
}


@pytest.mark.parametrize(("batch", "more", "reason"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_joined_is_named(batch, more, reason):
    for pair in ((batch, {**batch, **more}), ({**batch, **more}, batch)):
        with pytest.raises(CannotJoinError, match=reason):
            join(*pair, 1)


def test_other_mistakes_are_named():
    with pytest.raises(CannotJoinError, match="one batch holds several documents in a row, and the next one does not"):
        join(FLAT, PADDED, 1)
    with pytest.raises(CannotJoinError, match="'use_cache' is not the same in a batch and the next one"):
        join({**PADDED, "use_cache": True}, {**PADDED, "use_cache": False}, 1)
    with pytest.raises(CannotJoinError, match="'token_type_ids' is not the same"):
        join(PADDED, {**PADDED, "token_type_ids": torch.zeros(3, 7)}, 1)
    with pytest.raises(ValueError, match="wanted=0 must be at least 1"):
        join(PADDED, PADDED, 0)


@pytest.mark.parametrize("make", [batches.padded, batches.padding_free])
def test_a_setting_may_be_in_one_batch_alone(make):
    """TRL's loss writes one into the batch that it is given."""
    for pair in (({"use_cache": False}, {}), ({}, {"use_cache": False})):
        joined = join({**make(OWN), **pair[0]}, {**make(NEXT), **pair[1]}, 1)
        assert ("use_cache" in joined.inputs) == ("use_cache" in pair[0])


@pytest.mark.parametrize("make", [batches.padded, batches.padding_free])
def test_the_host_reads_once(make, monkeypatch):
    pair = make(OWN), make(NEXT)
    reads = []
    for name in ("tolist", "item", "__bool__", "__int__", "__index__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda x, *a, original=original, name=name: reads.append(name) or original(x, *a)
        )
    join(*pair, 2)
    assert reads == ["tolist"]
