"""The pages hold together: no link is dead, every room has its page, and the README is short."""

import re
import tomllib
from pathlib import Path

import pytest

import slsam_peft
from tests.pages import PACKAGE, PAGES, README, ROOMS, ROOT, in_a_checkout, name_of, prose

MOST_WORDS = 1_000
MOST_WORDS_ON_THE_FIRST_SCREEN = 120

pytestmark = in_a_checkout

each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)
each_room = pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def leads_somewhere(page: Path, target: str) -> bool:
    path, _, anchor = target.partition("#")
    found = page if not path else (page.parent / path).resolve()
    if not found.exists() or ROOT not in (found, *found.parents):
        return False
    return not anchor or (found.suffix == ".md" and anchor in anchors(found))


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    local = [target for target in links(page) if not target.startswith("https://")]
    assert [target for target in local if not leads_somewhere(page, target)] == []


@each_page
def test_named_tests_exist(page: Path) -> None:
    named = re.findall(r"\[`(test_\w+)`\]\(([\w/.]+\.py)\)", page.read_text(encoding="utf-8"))
    missing = [test for test, path in named if f"def {test}(" not in (page.parent / path).read_text()]
    assert missing == []
    if page.parent.name in ("trainer", "saving"):
        assert len(named) > 10


@each_page
def test_named_modules_exist(page: Path) -> None:
    """A file that a room's page names without a link lies in the room."""
    named = re.findall(r"`(\w+\.py)`", prose(page)) if page.parent in ROOMS else []
    assert [name for name in named if not (page.parent / name).is_file()] == []


@each_room
def test_every_room_has_a_page_that_opens_with_its_data_flow(room: Path) -> None:
    text = (room / "README.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {room.name}: ")
    opening = text.partition("\n## ")[0]
    steps = re.findall(r"^(\d)\. ", opening, re.MULTILINE)
    assert steps == ["1", "2", "3", "4", "5"]


@each_room
def test_the_readme_leads_to_every_room(room: Path) -> None:
    assert f"slsam_peft/{room.name}/README.md" in links(README)


def test_pages_of_recipes_are_linked() -> None:
    pages = {name_of(page) for page in ROOT.glob("recipes/**/README.md")}
    assert pages <= set(links(README))


def test_the_readme_is_short() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.split()) <= MOST_WORDS
    first_screen = text.partition("\n## ")[0]
    assert len(first_screen.split()) <= MOST_WORDS_ON_THE_FIRST_SCREEN
    for part in ("**Use it if**", "**Do not if**", "**Status:**", "](.assets/"):
        assert part in first_screen


def test_every_picture_is_shown() -> None:
    shown = {(page.parent / target).resolve() for page in PAGES for target in links(page) if target.endswith(".svg")}
    assert set((ROOT / ".assets").glob("*.svg")) <= shown


def test_public_names_are_documented() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in slsam_peft.__all__ if f"{name}" not in text] == []


def test_the_method_card_leads_to_the_code() -> None:
    core = {f"{name}.py" for name in ("bandit", "sampling", "perturbation", "arms", "horizon", "passes", "slsam")}
    assert core <= set(links(PACKAGE / "algorithm" / "README.md"))


def test_the_paper_is_credited() -> None:
    for page in (README, PACKAGE / "algorithm" / "README.md"):
        assert "https://arxiv.org/abs/2602.09395" in links(page)
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence
    assert "Version 2.0" in licence
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"] == "Apache-2.0"


def test_changelog_has_the_present_version_or_is_unreleased() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] in ("Unreleased", slsam_peft.__version__)
