"""Files that subcommands write at their end are there whole or not at all."""

import pytest
from matplotlib.figure import Figure

from slsam_peft.cli.outputs import write_figure
from slsam_peft.errors import UserError


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_a_figure_is_written_in_the_format_of_its_name(suffix, start, tmp_path):
    target = tmp_path / f"picture{suffix}"
    target.write_text("earlier")
    write_figure(target, Figure())
    assert target.read_bytes().startswith(start)
    assert list(tmp_path.iterdir()) == [target]


def test_a_figure_that_cannot_be_written_leaves_nothing(tmp_path):
    target = tmp_path / "gone" / "picture.png"
    with pytest.raises(UserError, match=r"picture\.png cannot be written"):
        write_figure(target, Figure())
    assert not list(tmp_path.iterdir())
