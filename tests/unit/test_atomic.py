"""Files and folders that are there as a whole or not at all."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from slsam_peft.saving.atomic import replaced_folder, write_atomically


@pytest.fixture
def shared_files() -> Iterator[None]:
    """New files may be read by anybody."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_a_file_can_be_read_like_any_other(shared_files: None, tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_replaced_as_a_whole(shared_files: None, tmp_path: Path) -> None:
    target = tmp_path / "made" / "out"
    for name in ("first", "second"):
        with replaced_folder(target) as new:
            (new / name).write_text("content")
            (new / name).chmod(0o600)
            assert name not in (os.listdir(target) if target.exists() else ())
        assert os.listdir(target) == [name]
        assert (target / name).stat().st_mode & 0o777 == 0o644
    assert os.listdir(target.parent) == ["out"]


def test_a_folder_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()

    def fill() -> None:
        with replaced_folder(target) as new:
            (new / "half").touch()
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        fill()
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(target) == ["old"]
