"""Local data files: which rows are taken, and what is said about bad ones."""

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slsam_peft.data.files import check_file
from slsam_peft.data.held_out import eval_place, load_eval_split
from slsam_peft.data.load import load_split
from slsam_peft.data.parts import without_parts
from slsam_peft.data.places import place_of
from slsam_peft.data.rows import RowError, kind_of
from slsam_peft.errors import UserError
from tests.tiny import tokenizer

TURNS = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
SHAREGPT = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]
CALL = [{"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}]
TEXT = '{"text": "a"}\n'


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"text": "a"}, "text"),
        ({"text": ""}, "text"),
        ({"messages": TURNS}, "messages"),
        ({"messages": CALL}, "messages"),
        ({"messages": TURNS, "text": "ignored", "id": 3}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, "messages"),
        ({"prompt": "a", "completion": "b"}, "prompt-completion"),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, "conversational prompt-completion"),
        ({"input_ids": [1, 2], "text": None}, "tokenized"),
    ],
)
def test_kinds_of_rows(row: dict, kind: str) -> None:
    assert kind_of(row) == kind


def test_text_column_may_have_another_name() -> None:
    assert kind_of({"body": "a"}, text_field="body") == "text"
    with pytest.raises(RowError, match="'body'"):
        kind_of({"text": "a"}, text_field="body")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({}, "the columns are none"),
        ({"message": TURNS}, "Did you mean 'messages'"),
        ({"instruction": "a", "response": "b"}, "the columns are 'instruction', 'response'"),
        ({"input": "a", "label": "b"}, "the columns are 'input', 'label'; a row needs"),  # and no hint at input_ids
        ({"text": None}, "'text' is null"),
        ({"text": 3}, "'text' must be a text, not a number"),
        ({"prompt": "a"}, "'prompt' without 'completion'"),
        ({"completion": "a"}, "'completion' without 'prompt'"),
        ({"prompt": "a", "completion": TURNS}, "both be texts, or both lists of messages"),
        ({"prompt": [], "completion": TURNS}, "'prompt' must be a list of one or more messages, not an empty list"),
        ({"messages": "a"}, "'messages' must be a list of one or more messages, not a text"),
        ({"messages": []}, "not an empty list"),
        ({"messages": ["a"]}, "'messages', message 1 must be an object, not a text"),
        ({"messages": [*TURNS, {"content": "a"}]}, "'messages', message 3 needs a 'role'"),
        ({"messages": [{"role": "user"}]}, "needs a 'content' that is a text or a list of parts, not null"),
        ({"messages": [{"role": "user", "content": 4}]}, "not a number"),
        ({"messages": [{"role": "narrator", "content": "a"}]}, "has the role 'narrator'; roles are system, user"),
        ({"messages": [{"role": "user", "content": "a", "weight": 0}]}, "the weight 0, and training does not weigh"),
        ({"messages": [{"role": "assistant", "content": "", "function_call": {"name": "f"}}]}, "as 'tool_calls'"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "one is a text instead of an object"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 7}]}]}, "whose 'text' is a number"),
        ({"messages": TURNS, "chat_template_kwargs": "thinking"}, "'chat_template_kwargs' must be an object"),
        ({"input_ids": [1, -2]}, "'input_ids' holds -2"),
        ({"input_ids": [1, 2], "labels": [1]}, "'labels' must be a list of 2 integers"),
        ({"input_ids": []}, "'input_ids' must be a list of one or more integers"),
        ({"input_ids": [True]}, "'input_ids' must be a list of one or more integers"),
    ],
)
def test_rows_of_no_kind(row: dict, expected: str) -> None:
    with pytest.raises(RowError) as caught:
        kind_of(row)
    assert expected in str(caught.value)


BAD_FILES = {
    "empty": ("a.jsonl", b"", ["a.jsonl is empty", "'messages'"]),
    "blank lines": ("a.jsonl", b"\n  \n", ["is empty"]),
    "empty list": ("a.json", b"[ ]", ["is empty"]),
    "malformed line": ("a.jsonl", b'{"text": "a"}\n{"text": \n', ["a.jsonl, line 2", "not valid JSON"]),
    "blank line before": ("a.jsonl", b'\n{"text": "a"}\nx\n', ["line 3", "at column 1"]),
    "two objects a line": ("a.jsonl", b'{"text": "a"} {"text": "b"}\n', ["line 1", "extra data"]),
    "pretty-printed object": ("a.json", b'{\n  "text": "a"\n}\n', ["line 1", "one JSON object per line"]),
    "malformed in list": ("a.json", b'[{"text": "a"},\n {"text": }\n]', ["a.json, line 2", "not valid JSON"]),
    "no comma in list": ("a.json", b'[\n{"text": "a"}\n{"text": "b"}]', ["line 3", "',' or ']' expected"]),
    "unclosed list": ("a.json", b'[{"text": "a"},\n{"text": "b"}\n', ["line 3", "',' or ']' expected"]),
    "text after list": ("a.json", b'[{"text": "a"}]\n\nmore', ["line 3", "after the end of the list"]),
    "row is no object": ("a.jsonl", TEXT.encode() + b'"b"\n', ["line 2", "must be a JSON object, not a text"]),
    "row in list is no object": ("a.json", b'[{"text": "a"},\n3]', ["line 2", "not a number"]),
    "columns missing": ("a.jsonl", TEXT.encode() + b'{"txt": "b"}\n', ["line 2", "'txt'", "Did you mean 'text'?"]),
    "mixed kinds": (
        "a.jsonl",
        TEXT.encode() + json.dumps({"messages": TURNS}).encode(),
        ["line 2", "line 1 is a text"],
    ),
    "not UTF-8": ("a.jsonl", TEXT.encode() + '{"text": "é"}\n'.encode("latin-1"), ["line 2", "not UTF-8", "0xe9"]),
    "not UTF-8 in list": ("a.json", b'[{"text": "a"},\n{"text": "\xe9"}]', ["line 2", "not UTF-8"]),
    "UTF-16": ("a.jsonl", TEXT.encode("utf-16"), ["line 1", "not UTF-8", "0xff"]),
    "a key twice": (
        "a.jsonl",
        TEXT.encode() + b'{"text": "b", "text": "c"}\n',
        ["line 2: the key 'text' comes twice in one object", "leave one out"],
    ),
    "a key twice, deeper": (
        "a.jsonl",
        b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}\n',
        ["line 1: the key 'content' comes twice"],
    ),
    "a key twice in list": ("a.json", b'[{"text": "a"},\n{"text": "b", "text": "b"}]', ["line 2: the key 'text'"]),
    "tools that are no JSON": (
        "a.jsonl",
        TEXT.encode() + b'{"text": "b", "tools": "{bad"}\n',  # TRL reads them beside a text too
        ["line 2: 'tools' is a text that is no JSON: expecting property name"],
    ),
    "deep nesting": ("a.jsonl", b'{"text": ' + b"[" * 100_000, ["line 1", "nested too deeply"]),
    "unknown extension": ("a.csv", b"text\na\n", ["'.csv' is not known", ".json, .jsonl, .parquet"]),
    "no Parquet": ("a.parquet", b"PAR1 but not really", ["a.parquet cannot be read as Parquet"]),
    "empty Parquet file": ("a.parquet", b"", ["a.parquet cannot be read as Parquet"]),
}


@pytest.mark.parametrize(("name", "content", "expected"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_named_with_their_line(tmp_path: Path, name: str, content: bytes, expected: list[str]) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_split(str(path))
    assert all(part in str(caught.value) for part in [name, *expected]), str(caught.value)


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.csv", "./gone", "a/b/gone"])
def test_missing_files_are_not_looked_up_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the Hub"))
    with pytest.raises(UserError, match="does not exist"):
        load_split(name)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"text": []}, "is empty"),
        ({"txt": ["a"]}, "row 1: the columns are 'txt'; a row needs"),
        ({"text": ["a", None]}, "row 2: 'text' is null"),
        ({"text": [1, 2]}, "row 1: 'text' must be a text"),
        ({"text": ["a", None], "messages": [None, TURNS]}, "row 2: a messages row, but row 1 is a text row"),
    ],
)
def test_bad_parquet_rows(tmp_path: Path, table: dict, expected: str) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(table), path)
    with pytest.raises(UserError) as caught:
        check_file(path)
    assert expected in str(caught.value)


def test_rows_after_the_first_batch_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [*["a"] * 3000, None], "other": list(range(3001))}), path)
    with pytest.raises(UserError, match="row 3001: 'text' is null"):
        check_file(path)


@pytest.mark.parametrize(
    "content",
    [
        b'{"text": "a"}\n{"text": "b"}\n',
        b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}',
        b'[{"text": "a"}, {"text": "b"}]',
        b'\n[\n  {"text": "a"},\n  {"text": "b"}\n]\n',
    ],
    ids=["lines", "BOM and CRLF", "list", "pretty list"],
)
def test_json_forms_load_alike(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    assert load_split(str(path))["text"] == ["a", "b"]


def test_parquet_loads(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"messages": [TURNS, TURNS]}), path)
    assert load_split(str(path))[1]["messages"] == TURNS


def test_parts_of_a_file_serve_as_splits(tmp_path: Path) -> None:
    path = str(jsonl(tmp_path / "a.jsonl", *({"text": str(i)} for i in range(10))))
    train, held_out = load_split(path, "train[:80%]"), load_eval_split(path, "train[80%:]")
    assert (train["text"], held_out["text"]) == ([str(i) for i in range(8)], ["8", "9"])


def test_a_held_out_file_serves_as_the_evaluation_split(tmp_path: Path) -> None:
    train = str(jsonl(tmp_path / "a.jsonl", {"text": "a"}))
    held_out = str(jsonl(tmp_path / "b.jsonl", {"text": "b"}))
    assert load_eval_split(train, held_out)["text"] == ["b"]


def test_what_lies_in_the_working_folder_is_no_split_of_a_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A split is one of the data set unless it is spelled as a path; a folder called "test" changes nothing."""
    data, work = tmp_path / "data", tmp_path / "work"
    for folder in (data, work / "test", work / "held"):
        folder.mkdir(parents=True)
    jsonl(data / "train.jsonl", {"text": "a"})
    jsonl(data / "test.jsonl", {"text": "b"})
    monkeypatch.chdir(work)
    (work / "test" / "notes.md").write_text("no data")
    (work / "train").write_text("a file, and no data")
    assert load_eval_split("../data", "test")["text"] == ["b"]
    assert load_eval_split("../data", "train")["text"] == ["a"]
    jsonl(work / "test" / "train.jsonl", {"text": "unrelated"})
    assert load_eval_split("../data", "test")["text"] == ["b"]
    assert load_eval_split("../data", "test[:1]")["text"] == ["b"]
    assert load_eval_split("../data", "./test")["text"] == ["unrelated"]
    jsonl(work / "held" / "a.jsonl", {"text": "c"})
    assert load_eval_split("../data", "held")["text"] == ["c"]  # the data set has no such split
    assert [eval_place("../data", split) for split in ("test", "train", "./test", "held", "a.jsonl")] == [
        None,
        None,
        "./test",
        "held",
        "a.jsonl",
    ]


@pytest.mark.parametrize("saved", [False, True], ids=["files", "saved"])
@pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
def test_the_only_split_of_a_held_out_folder_is_taken(
    tmp_path: Path, saved: bool, streaming: bool, caplog: pytest.LogCaptureFixture
) -> None:
    data, held = jsonl(tmp_path / "a.jsonl", {"text": "a"}), tmp_path / "held"
    if saved:
        datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ["b"]})}).save_to_disk(str(held))
    else:
        held.mkdir()
        jsonl(held / "test.jsonl", {"text": "b"})
    assert [row["text"] for row in load_eval_split(str(data), str(held), streaming=streaming)] == ["b"]
    assert not caplog.messages


def test_of_several_splits_of_a_held_out_folder_the_one_that_is_taken_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    jsonl(tmp_path / "train.jsonl", {"text": "a"})
    jsonl(tmp_path / "test.jsonl", {"text": "b"})
    assert load_eval_split("stdlib_docs", str(tmp_path))["text"] == ["a"]
    assert "has the splits 'test' and 'train'; 'train' is read" in caplog.text


def test_a_folder_has_splits_by_file_name(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", {"text": "a"})
    jsonl(tmp_path / "test.jsonl", {"text": "b"})
    assert load_split(str(tmp_path), "train")["text"] == ["a"]
    assert load_eval_split(str(tmp_path), "test")["text"] == ["b"]


@pytest.mark.parametrize("split", ["test", "validation"])
def test_unknown_splits_are_named(tmp_path: Path, split: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "a"})
    with pytest.raises(UserError) as caught:
        load_split(str(path), split)
    assert all(part in str(caught.value) for part in ("a.jsonl", repr(split), "'train'", "held-out file"))


def test_bad_rows_in_a_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(TEXT + "x\n")
    with pytest.raises(UserError, match=r"train\.jsonl, line 2: not valid JSON"):
        load_split(str(tmp_path))


@pytest.mark.parametrize(("name", "content"), [("notes.md", "# Notes"), ("train.csv", "text\na\n")])
def test_folders_without_usable_files(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=r"\.json, \.jsonl, \.parquet"):
        load_split(str(tmp_path))


def test_an_empty_part_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "a"})
    with pytest.raises(UserError, match="corresponds to no data"):
        load_split(str(path), "train[:0]")


def test_streaming_reads_the_same_rows(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"})
    data = load_split(str(path), streaming=True)
    assert isinstance(data, datasets.IterableDataset)
    assert [row["text"] for row in data] == ["a", "b"]


def test_hub_failures_name_the_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError) as caught:
        load_split("someone/some-data")
    assert all(
        part in str(caught.value) for part in ("'someone/some-data'", "no local file", "Couldn't reach the Hub")
    )


def test_hub_rows_are_checked_by_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    table = datasets.Dataset.from_dict({"question": ["a"], "answer": ["b"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: table)
    with pytest.raises(
        UserError, match=r"'someone/some-data', split 'train', row 1: the columns are 'question', 'answer'"
    ):
        load_split("someone/some-data")


def test_standard_library_documentation_has_two_splits() -> None:
    assert kind_of(load_split("stdlib_docs", "test")[0]) == "conversational prompt-completion"
    with pytest.raises(UserError, match="it has 'train' and 'test'"):
        load_split("stdlib_docs", "validation")


def test_a_part_of_the_built_in_data_can_be_taken():
    whole = load_split("stdlib_docs", "train")
    assert load_split("stdlib_docs", "train[:96]")[:] == whole[:96]
    assert len(load_split("stdlib_docs", "train[:10]+test[:50%]")) == 10 + round(
        len(load_split("stdlib_docs", "test")) / 2
    )
    with pytest.raises(UserError, match=r"no split 'train\[99999:\]'; .* parts of them such as 'train\[:96\]'"):
        load_split("stdlib_docs", "train[99999:]")


def rows_of(path: Path, **options: Any) -> list[dict[str, Any]]:
    return [dict(row) for row in load_split(str(path), **options)]


PARTS = [{"type": "text", "text": "a"}]
JSON_TEXTS = ["hello", PARTS, '{"a": 1}', "1e3", "null", "true", "007", '"quoted"', "[1]", "4", ""]


@pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
@pytest.mark.parametrize("first", range(len(JSON_TEXTS)))
def test_texts_that_are_json_stay_texts(tmp_path: Path, first: int, streaming: bool) -> None:
    contents = [*JSON_TEXTS[first:], *JSON_TEXTS[:first]]
    rows = [{"messages": [{"role": "user", "content": c}], "tag": "007", "other": c} for c in contents]
    assert rows_of(jsonl(tmp_path / "a.jsonl", *rows), streaming=streaming) == rows


@pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
def test_values_of_any_type_stay_as_they_are(tmp_path: Path, streaming: bool) -> None:
    odd = [3, 2.5, "a", None, True, [], [1, "a"], {}, {"x": 1}, {"x": "1", "y": None}, 2**63, -1, [[1], []]]
    rows = [{"text": "a", "odd": value, "same": {"x": i}, "few": [{"a": i}, {}]} for i, value in enumerate(odd)]
    assert rows_of(jsonl(tmp_path / "a.jsonl", *rows), streaming=streaming) == rows


def test_a_column_may_come_late(tmp_path: Path) -> None:
    rows = [{"text": "x" * 2000} for _ in range(6000)] + [{"text": "a", "meta": {"a": 1}}]  # beyond one chunk of 10 MB
    found = rows_of(jsonl(tmp_path / "a.jsonl", *rows))
    assert (found[0], found[-1]) == ({"text": "x" * 2000, "meta": None}, rows[-1])


def test_template_options_in_some_rows_are_empty_in_the_others(tmp_path: Path) -> None:
    rows = [{"messages": TURNS}, {"messages": TURNS, "chat_template_kwargs": {"enable_thinking": False}}]
    rows += [{"messages": TURNS, "chat_template_kwargs": None}]
    found = [row["chat_template_kwargs"] for row in rows_of(jsonl(tmp_path / "a.jsonl", *rows))]
    assert found == [{}, {"enable_thinking": False}, {}]
    pq.write_table(pa.Table.from_pylist([rows[2], *rows[1:]]), tmp_path / "a.parquet")
    assert [row["chat_template_kwargs"] for row in rows_of(tmp_path / "a.parquet")] == found


@pytest.mark.parametrize("suffix", ["jsonl", "json", "ndjson", "jsonl.gz", "parquet"])
def test_brackets_in_a_name_are_no_pattern(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "runs [old]*?"
    folder.mkdir()
    for name, text in (("train[1]", "mine"), ("train1", "other"), ("train[!2]", "other")):
        path = folder / f"{name}.{suffix}"
        if suffix == "parquet":
            pq.write_table(pa.table({"text": [text]}), path)
            continue
        content = json.dumps({"text": text}).encode()
        path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    assert rows_of(folder / f"train[1].{suffix}") == [{"text": "mine"}]
    assert len(rows_of(folder)) == 3


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "one"})
    assert rows_of(path) == [{"text": "one"}]
    jsonl(path, {"text": "two and more"})
    assert rows_of(path) == [{"text": "two and more"}]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved", "stream"])
def test_sharegpt_is_converted_with_one_line(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"system": text, "conversations": SHAREGPT, "id": text} for text in ("Be brief.", "")]
    path = tmp_path / "rows"
    if kind == "parquet":
        path = tmp_path / "a.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    else:
        path = jsonl(tmp_path / "a.jsonl", *rows)
    with caplog.at_level(logging.WARNING, "slsam_peft"):
        found = rows_of(path, streaming=kind == "stream")
    system = {"role": "system", "content": "Be brief."}
    assert found == [{"id": "Be brief.", "messages": [system, *TURNS]}, {"id": "", "messages": TURNS}]
    assert len(caplog.messages) == 1
    assert "ShareGPT's 'from' and 'value' into 'role' and 'content'" in caplog.messages[0]


def test_hub_rows_are_converted_too(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    table = datasets.Dataset.from_list([{"conversations": SHAREGPT, "system": None}] * 2)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: table)
    assert load_split("someone/some-data")[1] == {"messages": TURNS}
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: table.to_iterable_dataset())
    assert list(load_split("someone/some-data", streaming=True)) == [{"messages": TURNS}] * 2
    assert len(caplog.messages) == 2


def test_later_rows_of_the_hub_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    table = datasets.Dataset.from_dict({"text": ["a", None]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: table)
    with pytest.raises(UserError, match=r"'someone/some-data', split 'train', row 2: 'text' is null"):
        load_split("someone/some-data")


def test_texts_that_datasets_has_decoded_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"messages": [{"role": "user", "content": c}]} for c in ("a", PARTS)]
    path = str(jsonl(tmp_path / "a.jsonl", *rows))
    decoded = datasets.load_dataset("json", data_files=path, split="train")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: decoded)
    load_split("someone/some-data")
    assert "datasets has decoded texts of 'messages'" in caplog.text


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["train.jsonl", "extra.jsonl"], "train", ["train.jsonl"]),
        (["a.jsonl", "b.ndjson", "c.jsonl.gz"], "train", ["a.jsonl", "b.ndjson", "c.jsonl.gz"]),
        (["train/0.jsonl", "train/1.jsonl", "dev/0.jsonl"], "train", ["train/0.jsonl", "train/1.jsonl"]),
        (["train/0.jsonl", "dev/0.jsonl"], "validation", ["dev/0.jsonl"]),
        (["my-train-00001-of-2.jsonl", "my-eval.jsonl"], "test", ["my-eval.jsonl"]),
        (["trained.jsonl", "devices.jsonl"], "train", ["devices.jsonl", "trained.jsonl"]),
        (["train.jsonl", "test.jsonl"], "train+test", ["train.jsonl", "test.jsonl"]),
        (["a.jsonl", "a.csv"], "train", ["a.jsonl"]),
    ],
)
def test_files_of_a_folder(
    tmp_path: Path, names: list[str], split: str, expected: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        content = json.dumps({"text": name}).encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert [row["text"] for row in rows_of(tmp_path, split=split)] == expected
    unread = [name for name in names if Path(name).stem in ("extra", "a") and name not in expected]
    assert ("these files are not read" in caplog.text) == bool(unread)
    assert all(name in caplog.text for name in unread)


def test_files_of_a_folder_are_of_one_kind(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", {"text": "a"})
    jsonl(tmp_path / "b.jsonl", {"messages": TURNS})
    with pytest.raises(UserError, match=r"b\.jsonl, line 1: a messages row, but \S+a\.jsonl, line 1 is a text row"):
        load_split(str(tmp_path))
    (tmp_path / "b.jsonl").unlink()
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="holds JSON and Parquet files"):
        load_split(str(tmp_path))


def test_a_folders_card_names_its_files(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: b\n  data_files: b.jsonl\n---\n")
    jsonl(tmp_path / "a.jsonl", {"text": "a"})
    jsonl(tmp_path / "b.jsonl", {"text": "b"})
    assert load_split(str(tmp_path), config="b")["text"] == ["b"]


def test_saved_data_sets_have_their_splits(tmp_path: Path) -> None:
    one, two = (datasets.Dataset.from_dict({"text": [text]}) for text in "ab")
    datasets.DatasetDict({"train": one, "test": two}).save_to_disk(str(tmp_path / "both"))
    assert load_eval_split(str(tmp_path / "both"), "test")["text"] == ["b"]
    with pytest.raises(UserError, match="no split 'dev'; it has 'train' and 'test'"):
        load_split(str(tmp_path / "both"), "dev")
    datasets.Dataset.from_dict({"txt": ["a"]}).save_to_disk(str(tmp_path / "bad"))
    with pytest.raises(UserError, match=r"bad, split 'train', row 1: the columns are 'txt'.* Did you mean 'text'"):
        load_split(str(tmp_path / "bad"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "b \\ud83d"}', r"line 2: 'text' holds \ud83d alone"),
        ('{"text": "b", "meta": {"\\udc00": 1}}', r"line 2: 'meta' holds \udc00 alone"),
        ('{"text": "b", "score": NaN}', "line 2: not valid JSON: NaN is no JSON"),
        ('{"text": "b", "id": 36893488147419103232}', "line 2: 'id' holds 36893488147419103232, an integer of more"),
        ('{"text": "b", "score": Infinity}', "line 2: not valid JSON: Infinity is no JSON"),
    ],
)
def test_values_that_cannot_be_stored_are_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{TEXT}{line}\n")
    with pytest.raises(UserError) as caught:
        load_split(str(path))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"\x1f\x8b cut", gzip.compress(TEXT.encode() * 99)[:-9], b"no gzip"], ids=["no end", "cut", "no gzip"]
)
def test_a_damaged_archive_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.jsonl\.gz cannot be read: "):
        load_split(str(tmp_path / "a.jsonl.gz"))


SILENT = [*TURNS[:1], {"role": "assistant", "content": ""}]
EMPTY: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "text": ({"text": ""}, {"text": "a"}, "text"),
    "completion": ({"prompt": "a", "completion": ""}, {"prompt": "a", "completion": "b"}, "completion"),
    "conversational completion": (
        {"prompt": TURNS[:1], "completion": SILENT[1:]},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        "completion",
    ),
    "messages": ({"messages": SILENT}, {"messages": TURNS}, "messages"),
    "no part": (
        {
            "messages": [
                {"role": "user", "content": PARTS},
                {"role": "assistant", "content": [{**PARTS[0], "text": ""}]},
            ]
        },
        {"messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": PARTS}]},
        "messages",
    ),
}


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
@pytest.mark.parametrize(("empty", "full", "column"), EMPTY.values(), ids=EMPTY)
def test_empty_answers_are_counted_and_refused_where_there_are_no_others(
    tmp_path: Path,
    empty: dict[str, Any],
    full: dict[str, Any],
    column: str,
    kind: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def written(name: str, rows: list[dict[str, Any]]) -> Path:
        path = tmp_path / f"{name}.{kind}"
        if kind == "jsonl":
            return jsonl(path, *rows)
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            datasets.Dataset.from_list(rows).save_to_disk(str(path))
        return path

    path = written("some", [full, empty, full, empty])
    assert rows_of(path) == [full, empty, full, empty]  # they are told, and stay
    place = {"jsonl": f"{path}, line 2", "parquet": f"{path}, row 2", "saved": f"{path}, split 'train', row 2"}[kind]
    assert len(caplog.messages) == 1
    assert f"2 of 4 rows have an empty answer, in '{column}', and teach the model to say nothing; first: {place}." in (
        caplog.text
    )
    with pytest.raises(
        UserError, match=rf"(line|row) 1: there is nothing to learn: .*'{column}', is empty, .* all 2 "
    ):
        load_split(str(written("all", [empty, empty])))


def test_conversations_without_an_answer_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"messages": TURNS}, {"messages": TURNS[:1]}, {"messages": CALL})
    assert len(load_split(str(path))) == 3
    assert len(caplog.messages) == 1
    assert (
        f"1 of 3 rows have no message of the assistant's, so that no answer is learnt from them; first: {path}, "
        in (caplog.text)
    )


def test_of_a_stream_from_the_hub_one_row_says_nothing_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    table = datasets.Dataset.from_dict({"text": ["", "a"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: table.to_iterable_dataset())
    assert len(list(load_split("someone/some-data", streaming=True))) == 2


@pytest.mark.parametrize("tools", ["5", '[{"name": "f"}, 5]', '{"name": "f"}', '[{"name": "f", "name": "g"}]'])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_tools_that_the_template_cannot_take_are_named(tmp_path: Path, tools: str, kind: str) -> None:
    good, bad = ({"messages": TURNS, "tools": text} for text in ('[{"name": "f"}]', tools))
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        jsonl(path, good, bad)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist([good, bad]), path)
    else:
        datasets.Dataset.from_list([good, bad]).save_to_disk(str(path))
    with pytest.raises(UserError, match=r"(line|row) 2: 'tools' "):
        load_split(str(path))


def test_tables_that_hold_columns_as_json_are_read_as_datasets_reads_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    message = {"role": "assistant", "content": "a", "tool_calls": [call]}
    row = {"messages": [message], "tools": [{"name": "f"}], "chat_template_kwargs": {"thinking": False}}
    text, json_value = datasets.Value("string"), datasets.Json()
    messages = datasets.List({"role": text, "content": text, "tool_calls": json_value})
    made = datasets.Features({"messages": messages, "tools": json_value, "chat_template_kwargs": json_value})
    table = datasets.Dataset.from_list([row, row], features=made)
    table.to_parquet(str(tmp_path / "a.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    assert rows_of(tmp_path / "a.parquet") == rows_of(tmp_path / "saved") == [row, row]
    assert not caplog.messages


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", [2, 4, 5]),
        ("train[1:]", [4, 5]),
        ("train[2:]+train[:1]", [5, 2]),
        ("train[:2]+train", [2, 4, 2, 4, 5]),
    ],
)
def test_rows_of_files_keep_their_lines(tmp_path: Path, split: str, expected: list[int]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"\n{TEXT}\n{TEXT}{TEXT}")
    data = load_split(str(path), split)
    assert [place_of(data, i + 1) for i in range(len(data))] == [f"{path}, line {line}" for line in expected]
    assert place_of(datasets.Dataset.from_dict({"text": ["a"]}), 1) == "row 1"


@pytest.mark.parametrize("kind", ["jsonl", "saved"])
def test_a_part_that_the_template_cannot_take_is_named_by_its_place(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    image = {"type": "image", "text": None}
    picture = {"messages": [{"role": "user", "content": [image]}, {"role": "assistant", "content": PARTS}]}
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text(f"\n\n{json.dumps({'messages': TURNS})}\n{json.dumps(picture)}\n")
    else:
        datasets.Dataset.from_list([picture] * 2).save_to_disk(str(path))
    place = rf"{path}, line 4" if kind == "jsonl" else rf"{path}, split 'train', row 1"
    with pytest.raises(UserError, match=rf"{place}: 'messages', message 1 has a part of type 'image'"):
        without_parts(load_split(str(path)), tokenizer())
    assert not caplog.messages  # nothing was converted
