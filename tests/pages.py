"""The pages of the documentation: the README, the changelog, the rooms' own pages and those of the recipes."""

import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "slsam_peft"
README = ROOT / "README.md"
ROOMS = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))
PAGES = [
    README,
    ROOT / "CHANGELOG.md",
    *sorted(ROOT.glob("recipes/**/README.md")),
    *sorted(PACKAGE.glob("**/README.md")),
]

in_a_checkout = pytest.mark.skipif(not (ROOT / ".ci").is_dir(), reason="the pages' neighbours are not in an sdist")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Code blocks of a page, each with the number of its first line."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(rf"^ *```{language}\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)) + 1, textwrap.dedent(match[1])) for match in found]


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def section(page: Path, heading: str) -> str:
    """What stands below a heading of the second rank, up to the next heading of the first or second."""
    match = re.search(rf"^## {heading}\n(.*?)(?=^##? |\Z)", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert match, f"{name_of(page)} has no section {heading!r}"
    return match[1]
