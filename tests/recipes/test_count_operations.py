"""The operations of a step against plain `SFTTrainer`: bars at the recipe's size, what is added at a small one."""

import pytest
import torch

from recipes.count_operations import MODES, Counts, Mode, operations_of

OWN = 60  # operations of a step that no parameter or block adds to; measured 24 to 57
SAMPLER = 60  # the sampler's, on its L numbers
READS = 1  # by the host, beyond plain LoRA's: the step's numbers
LENGTHS = 1  # one more where sequences ride along: how long those of the next batch are


@pytest.fixture(scope="module")
def plain():
    """Return a function from a mode to the counts of plain LoRA on the same sequences, counted once each."""
    seen: dict[tuple, Counts] = {}

    def counts(mode, blocks):
        key = mode.batch, mode.accumulation, blocks
        if key not in seen:
            seen[key] = operations_of(Mode(None, mode.batch, mode.accumulation), blocks=blocks)
        return seen[key]

    return counts


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODES)
def test_no_mode_is_above_its_bar(name, plain):
    mode = MODES[name]
    counts, reference = operations_of(mode), plain(mode, 8)
    assert counts.total <= mode.bar * reference.total
    assert counts.sampler <= SAMPLER


def test_what_one_pass_adds_does_not_grow_with_the_model(plain):
    mode = MODES["remembered"]
    added = [operations_of(mode, blocks=blocks).total - plain(mode, blocks).total for blocks in (1, 3)]
    assert max(added) <= OWN
    assert abs(added[1] - added[0]) <= 1


@pytest.mark.parametrize("name", ["remembered", "look-ahead, 4 + 1"])
def test_the_host_reads_a_steps_numbers_once(name, plain):
    mode = MODES[name]
    allowed = READS + (LENGTHS if "look-ahead" in name else 0)
    counts = operations_of(mode, blocks=1)
    assert counts.reads <= plain(mode, 1).reads + allowed
    assert counts.sampler <= SAMPLER
