"""The parts of a comparison on one's own data that need no model: rows, grid, timing, advice, the file for `sft`."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, PreTrainedConfig

from slsam_peft.cli.compare_own import FLAGS, check_files
from slsam_peft.cli.compare_work import duration, span, state
from slsam_peft.data import own_rows
from slsam_peft.data.own_rows import hold_out, split_own
from slsam_peft.errors import UserError
from slsam_peft.runs.compare import own_data
from slsam_peft.runs.compare.advice import advise, is_own
from slsam_peft.runs.compare.grid import LEAST_SEEDS, METHODS, rates_around, spend
from slsam_peft.runs.compare.jobs import Plan
from slsam_peft.runs.compare.methods import Candidate
from slsam_peft.runs.compare.reading import parse_settings
from slsam_peft.runs.compare.report import build_report
from slsam_peft.runs.compare.settings import CompareSettings
from slsam_peft.runs.compare.sft_recipe import sft_recipe
from slsam_peft.runs.compare.store import RowStore
from slsam_peft.runs.compare.timing import Pace, Sample, estimate, probe, samples_of, seconds_per_step
from slsam_peft.runs.compare.wishes import Wishes, epochs_of, name_of
from slsam_peft.runs.compare.worker import next_row
from tests.tiny import tokenizer

COSTS = {"plain": 1.0, "auto": 1.25}


def settings(**changes: Any) -> CompareSettings:
    """A comparison as `compare --data` makes it."""
    task = {"source": "own_data", "file": "/data/my.jsonl", "rows": 40, "validation_rows": 8, "test_rows": 16}
    return parse_settings(
        {
            "training": {"steps": 30, "batch_size": 4},
            "tasks": {"my": {**task, "digest": "0"}},
            "methods": {
                "plain": {"learning_rates": [1e-4, 3e-4, 9e-4]},
                "auto": {"learning_rates": [3e-4, 9e-4, 2.7e-3], "slsam": {"method": "auto"}},
            },
            "seeds": [0, 1, 2, 3],
            "tuning_seed": 100,
            "match": ["epochs"],
            **changes,
        }
    )


def finished(folder: Path, auto: list[float], count: int | None = None, **more: Any) -> tuple[Plan, dict[str, Any]]:
    """A plan and its rows: losses of plain LoRA are 1 on each seed, those of auto differ by `auto`."""

    def run(job: Mapping[str, Any], report: Any) -> dict[str, Any]:
        seed = job["seed"]
        loss = 1.0 if job["slsam"] is None else 1.0 + (auto[seed] if seed < len(auto) else 0.0)
        if seed == 100:
            loss = abs(job["learning_rate"] - more.get("best", 9e-4))
        if (job["slsam"] is not None, seed) in more.get("failing", ()):
            return {"error": "NaN"}
        cost = 1.0 if job["slsam"] is None else 1.25
        return {"loss": loss, "accuracy": 0.5, "exact": 0.5, "cost": cost, "seconds": 30.0 * cost, "data": "same"}

    plan, store = Plan(settings(), COSTS), RowStore(folder / "rows.jsonl")
    while (count is None or len(store.read()) < count) and next_row(plan, store, lambda *_: None, run) is not None:
        pass
    return plan, store.read()


# Rows


def lines(folder: Path, rows: list[dict[str, Any]], name: str = "my.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def asked(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"{i}?", "completion": str(i)} for i in range(start, start + count)]


@given(st.lists(st.integers(0, 12), max_size=60), st.integers(0, 20), st.integers(0, 20))
def test_parts_share_no_question_and_lose_no_row(questions: list[int], first: int, second: int) -> None:
    pairs = [(f"Q {q}" if i % 2 else f"q  {q} ", str(i)) for i, q in enumerate(questions)]
    parts = hold_out(pairs, first, second)
    assert sorted(pair for part in parts for pair in part) == sorted(pairs)
    assert len(parts[0]) <= first
    assert len(parts[1]) <= second
    asked = [{int(question.split()[1]) for question, _ in part} for part in parts]  # spelled in two ways
    assert sum(map(len, asked)) == len(set().union(*asked))
    assert parts[2] == [pair for pair in pairs if pair in parts[2]]
    if len(set(questions)) == len(questions):  # nothing keeps a part from being full
        assert (len(parts[0]), len(parts[1])) == (min(first, len(pairs)), min(second, max(0, len(pairs) - first)))


def test_the_split_is_that_of_the_questions_alone(tmp_path: Path) -> None:
    """The order of the rows, and rows that are added, move few questions from one part to another."""
    rows = asked(100)
    one, two = split_own(lines(tmp_path, rows)), split_own(lines(tmp_path, rows[::-1], "other.jsonl"))
    assert (len(one.train), len(one.validation), len(one.test)) == (70, 10, 20)
    assert sorted(one.test) == sorted(two.test)
    assert one.digest != two.digest  # the order of training rows decides as well
    assert not one.whole
    more = split_own(lines(tmp_path, asked(110), "more.jsonl"))
    assert len({*one.test} - {*more.test, *more.validation}) < 5


def test_held_out_rows_that_are_trained_on_are_left_out(tmp_path: Path) -> None:
    made = split_own(lines(tmp_path, asked(24)), lines(tmp_path, asked(40, start=20), "held.jsonl"))
    assert (len(made.train), len(made.validation), len(made.test), made.shared) == (24, 12, 24, 4)
    assert not {*made.train} & {*made.validation, *made.test}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"prompt": "a", "completion": "b"}, {"text": "c"}],
            r"row 2 has no prompt, and the rows before it have: .*Write",
        ),
        ([{"text": "c"}, {"prompt": "a", "completion": "b"}], r"row 2 has a prompt, and not the rows before it: "),
    ],
)
def test_rows_with_and_without_a_prompt_are_refused_whichever_comes_last(
    rows: list[dict[str, str]], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are refused while they are read; other tables may have both, and one setting tells what counts."""
    monkeypatch.setattr(own_rows, "load_split", lambda name: rows)
    with pytest.raises(UserError, match=message):
        own_rows.read_own("somebody/rows")


def test_a_folder_whose_files_have_changed_is_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    lines(folder, asked(60), "a.jsonl")
    before = split_own(str(folder))
    assert split_own(str(folder)) is before
    lines(folder, asked(90), "a.jsonl")
    after = split_own(str(folder))
    assert sum(map(len, (after.train, after.validation, after.test))) == 90


def test_every_spelling_is_read_and_says_what_counts(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    conversation = own_rows.read_own(lines(tmp_path, [{"conversations": turns}], "a.jsonl"))
    assert conversation.pairs == [([{"role": "user", "content": "a"}], "b")]
    assert conversation.whole
    alpaca = own_rows.read_own(lines(tmp_path, [{"instruction": "a", "input": "b", "output": "c"}], "b.jsonl"))
    assert alpaca.pairs == [([{"role": "user", "content": "a\nb"}], "c")]
    assert not alpaca.whole
    text = own_rows.read_own(lines(tmp_path, [{"text": "007"}], "c.jsonl"))
    assert text == own_rows.OwnRows([("", "007")], True)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a"}], r"my\.jsonl, line 1: 'prompt' without 'completion'"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "row 1: it needs a prompt and one answer"),
        ([*asked(60), {"prompt": "a", "completion": ""}], "row 61: it needs a prompt and one answer.* not empty"),
        ([{"text": "a"}, {"text": ""}], "row 2: the text is empty, and there is nothing to predict"),
        (
            [{"prompt": "a", "completion": "b", "tools": [{"name": "t"}]}],
            "row 1 has 'tools', which a comparison cannot",
        ),
        (
            asked(47),
            "47 rows are too few. A comparison needs 48 with different questions: 24 to train on, 8 to choose",
        ),
        (
            [{"prompt": "a", "completion": str(i)} for i in range(90)],
            "90 rows are too few.*48 with different questions",
        ),
    ],
)
def test_rows_that_cannot_be_compared_on_are_named(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        split_own(lines(tmp_path, rows))
    assert len(split_own(lines(tmp_path, asked(48))).train) == 24


def test_too_few_held_out_rows_are_named(tmp_path: Path) -> None:
    data = lines(tmp_path, asked(24))
    with pytest.raises(UserError, match=r"held\.jsonl: 23 rows are too few, without 4 .* needs 24 with different"):
        split_own(data, lines(tmp_path, asked(27, start=20), "held.jsonl"))
    with pytest.raises(UserError, match=r"one\.jsonl: 1 row is too few\. .* or leave --eval_data out: a part of"):
        split_own(data, lines(tmp_path, asked(1, start=90), "one.jsonl"))
    with pytest.raises(UserError, match="23 rows are too few; a comparison needs 24 to train on"):
        split_own(lines(tmp_path, asked(23), "few.jsonl"), lines(tmp_path, asked(40, start=30), "held.jsonl"))


def test_rows_that_are_repeated_are_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question with another answer is another row."""
    model(tmp_path, monkeypatch)
    rows = [*asked(48), *asked(12), {"prompt": "0?", "completion": "nought"}]
    made = own_data.own_comparison(Wishes(data=lines(tmp_path, rows), model="m"))
    assert made.said == [
        "12 of 61 rows say what another one says, and count as often as they are there; those that are alike are in "
        "the same part."
    ]


def test_a_folder_of_the_name_of_a_split_is_not_scored_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs read the same held-out rows as the one that begins a comparison, from whatever folder."""
    data = tmp_path / "data"
    for folder in (data, tmp_path / "test"):
        folder.mkdir()
    lines(data, asked(24), "train.jsonl")
    lines(data, asked(24, start=30), "test.jsonl")
    monkeypatch.chdir(tmp_path)
    model(tmp_path, monkeypatch)
    for eval_data, expected in (("test", "test"), ("./data/test.jsonl", str(data / "test.jsonl"))):
        check_files(Wishes(data="data", eval_data=eval_data), tmp_path / "out")
        made = own_data.own_comparison(Wishes(data="data", eval_data=eval_data, model="m"))
        assert made.values["tasks"]["data"]["test_file"] == expected


def test_more_tokens_than_the_model_has_positions_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = lines(tmp_path, asked(48))
    model(tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"max_length=65 is more than the 64 positions of m .*use --max_length 64"):
        own_data.own_comparison(Wishes(data=data, model="m", max_length=65))
    assert own_data.own_comparison(Wishes(data=data, model="m", max_length=64)).settings.training.max_length == 64
    monkeypatch.setattr(own_data, "load_config", lambda source: PreTrainedConfig())  # one that does not say
    assert own_data.own_comparison(Wishes(data=data, model="m", max_length=65)).settings.training.max_length == 65


def model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a tokenizer and a configuration of 64 positions where a comparison looks for those of `m`."""
    monkeypatch.setattr(own_data, "find_model", lambda name: name)
    monkeypatch.setattr(own_data, "load_tokenizer", lambda source: tokenizer())
    monkeypatch.setattr(own_data, "load_config", lambda source: GPT2Config(n_positions=64))


# Wishes


@given(st.integers(6, 200))
def test_trainings_are_spent_alike_on_both_methods(runs: int) -> None:
    rates, seeds = spend(runs)
    tuning = METHODS * rates if rates > 1 else 0
    assert seeds >= LEAST_SEEDS
    assert runs - METHODS < tuning + METHODS * seeds <= runs
    made = settings(
        methods={
            "plain": {"learning_rates": rates_around(3e-4, rates)},
            "auto": {"learning_rates": rates_around(9e-4, rates), "slsam": {"method": "auto"}},
        },
        seeds=list(range(seeds)),
    )
    assert Plan(made, COSTS).counts({}) == (0, tuning + METHODS * seeds)


def test_what_twelve_trainings_and_others_are() -> None:
    assert [spend(runs) for runs in (6, 9, 10, 12, 16, 24)] == [(1, 3), (1, 4), (2, 3), (2, 4), (3, 5), (4, 8)]
    assert rates_around(3e-4, 1) == [3e-4]
    assert rates_around(3e-4, 2) == [1.7e-4, 5.2e-4]
    assert rates_around(3e-4, 3) == [1e-4, 3e-4, 9e-4]
    assert [epochs_of(rows) for rows in (24, 50, 100, 134, 1999, 2000)] == [8, 8, 4, 3, 3, 1]
    assert [name_of(text) for text in ("a/my.train.jsonl", "a/folder/", "user/set", ".x")] == [
        "my",
        "folder",
        "set",
        "x",
    ]


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"runs": 5}, "--runs=5 is not allowed; it must be an integer >= 6"),
        ({"epochs": 0.0}, "epochs: 0.0 is not allowed"),
        ({"epochs": 1.0, "steps": 5}, "epochs=1.0 and steps=5 are both set"),
        ({"lora_r": 0}, "lora_r=0 is not allowed"),
        ({"learning_rate": -1.0}, "learning_rate: -1.0 is not allowed"),
        ({"dtype": "float8"}, "dtype='float8' is not known"),
    ],
)
def test_wishes_that_cannot_be_had_are_named(wish: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, UserError), match=message):
        Wishes(data="my.jsonl", **wish)


def test_every_wish_has_its_flag() -> None:
    assert [name for name, *_ in FLAGS] == [name for name in Wishes.__dataclass_fields__ if name != "data"]


# Time


def test_a_step_takes_what_the_nearest_runs_took() -> None:
    """The same method and task before others, those in proportion to their costs."""
    task = {"source": "stdlib_docs", "rows": 8}
    plan = Plan(settings(tasks={"a": task, "b": task}), COSTS)
    of_plain = Sample("a", "plain", 10, 20.0)
    assert seconds_per_step(plan, [], "a", "plain") is None
    assert seconds_per_step(plan, [of_plain], "a", "plain") == 2.0
    assert seconds_per_step(plan, [of_plain], "b", "auto") == 2.5
    of_auto, other = Sample("b", "auto", 10, 30.0), Sample("b", "plain", 10, 80.0)
    assert seconds_per_step(plan, [of_plain, other, of_auto], "a", "auto") == 3.0
    assert seconds_per_step(plan, [of_plain, other], "b", "auto") == 10.0
    assert seconds_per_step(plan, [of_plain, Sample("a", "plain", 30, 20.0)], "a", "plain") == 1.0


def test_time_is_left_for_every_run_without_a_row(tmp_path: Path) -> None:
    """A run of plain LoRA takes 30 s and one of SL-SAM 37.5 s, whatever of a comparison is done."""
    for count in range(1, 15):
        folder = tmp_path / str(count)
        folder.mkdir()
        plan, rows = finished(folder, [0.0] * 4, count)
        missing = plan.remaining(rows)
        done, total = plan.counts(rows)
        assert (done, len(missing), total) == (count, 14 - count, 14)
        expected = sum(30.0 * COSTS[method] for _, method, _ in missing)
        assert Pace(plan, rows).left() == pytest.approx(expected)
        said = state(Pace(plan, rows))
        assert said == f"{done} of 14 runs done" + (f", about {duration(expected)} left" if missing else "")
    assert state(Pace(plan, {})) == "0 of 14 runs done"  # nothing says how long they take


def test_the_last_runs_tell_how_busy_a_machine_is(tmp_path: Path) -> None:
    plan, rows = finished(tmp_path, [0.0] * 4)
    for row in list(rows.values())[:6]:
        row["seconds"] = 1e6
    assert {s.seconds for s in samples_of(plan, rows) if s.method == "plain"} == {30.0}
    del next(iter(rows.values()))["seconds"]  # rows need not have it
    samples_of(plan, {**rows, "foreign": {"seconds": "?"}})


def test_a_run_in_progress_and_what_runs_take_besides_count(tmp_path: Path) -> None:
    now = 0.0
    plan, _ = finished(tmp_path, [0.0] * 4, 0)
    job = next(iter(plan.pending({})))
    pace = Pace(plan, {}, clock=lambda: now)
    pace.begin({})
    for step in range(1, 12):  # 5 s until the first step has ended, 2 s for each other one
        now = 5.0 + 2.0 * (step - 1)
        pace.step(job, step)
    whole = 7 * 30 * 2.0 + 7 * 30 * 2.5
    assert pace.left() == pytest.approx(whole - 11 * 2.0)
    now = 75.0
    row = {"seconds": 60.0, "loss": 1.0}
    pace.end(row, {job.key: row})
    assert pace.left() == pytest.approx(6 * 60.0 + 7 * 75.0 + 13 * 15.0)


def test_the_estimate_is_a_range_of_what_was_timed() -> None:
    now, plan = 0.0, Plan(settings(), COSTS)

    def run(job: Mapping[str, Any], report: Any) -> dict[str, Any]:
        nonlocal now
        assert job["steps"] == 5
        for step, seconds in enumerate((7.0, 1.0, 2.0, 1.0, 4.0), 1):  # the first one sets things up
            now += seconds * (1 if job["slsam"] is None else 3)
            report(step, 5)
        now += 10.0
        return {}

    probes = [probe(plan, "my", method, run, clock=lambda: now) for method in COSTS]
    assert [p.steps for p in probes] == [[1.0, 2.0, 1.0, 4.0], [3.0, 6.0, 3.0, 12.0]]
    assert [p.beside for p in probes] == [17.0, 31.0]
    low, high = estimate(plan, {}, probes) or (0.0, 0.0)
    assert low == pytest.approx(7 * 30 * (1.0 + 3.0) + 14 * 17.0)
    assert high == pytest.approx(7 * 30 * (4.0 + 12.0) + 14 * 31.0)
    job = next(iter(plan.pending({})))  # a run that is done says more of its method than what was timed
    low, high = estimate(plan, {job.key: {"seconds": 60.0, "loss": 1.0}}, probes) or (0.0, 0.0)
    assert high == pytest.approx(6 * 60.0 + 7 * 30 * 12.0 + 13 * 31.0)
    assert estimate(plan, {}, []) is None


def test_times_are_said_as_people_say_them() -> None:
    said = [duration(s) for s in (0.0, 1.4, 119.4, 119.6, 7140.0, 7199.0, 7201.0, 9000.0)]
    assert said == ["1 s", "1 s", "119 s", "2 min", "119 min", "2 h", "2 h", "2 h 30 min"]
    assert (span(61, 61.2), span(61, 400)) == ("about 61 s", "61 s to 7 min")


# Advice


def said(folder: Path, auto: list[float], count: int | None = None, **more: Any) -> Any:
    plan, rows = finished(folder, auto, count, **more)
    assert is_own(plan.settings)
    return advise(plan, rows, build_report(plan, rows))


def test_a_lower_loss_that_is_sure_is_advised(tmp_path: Path) -> None:
    advice = said(tmp_path, [-0.11, -0.1, -0.12, -0.1])
    assert (advice.method, advice.chosen) == ("auto", Candidate(9e-4))
    assert advice.sentence.startswith(
        "Use SL-SAM (method: auto) with learning rate 0.0009: its held-out loss is 0.1075 nats below plain LoRA's "
        "(SL-SAM minus plain: 95% t interval -0.1227 to -0.0923, p = "
    )
    assert advice.sentence.endswith("; 4 seeds, 16 held-out rows).")
    assert advice.notes[0] == "A step of SL-SAM costs 1.25 plain ones, by count."


@pytest.mark.parametrize(
    ("auto", "reason"),
    [
        (
            [-0.3, 0.2, -0.2, 0.1],
            "it is cheaper, and there is no difference that these runs can tell (SL-SAM's held-out",
        ),
        ([0.0] * 4, "it is cheaper, and there is no difference that these runs can tell"),
        ([0.11, 0.1, 0.12, 0.1], "its held-out loss is 0.1075 nats below SL-SAM's"),
    ],
)
def test_plain_lora_is_advised_wherever_sl_sam_is_not_surely_better(
    auto: list[float], reason: str, tmp_path: Path
) -> None:
    advice = said(tmp_path, auto)
    assert (advice.method, advice.chosen) == ("plain", Candidate(9e-4))
    assert advice.sentence.startswith(f"Use plain LoRA with learning rate 0.0009: {reason}")


def test_advice_says_how_far_a_comparison_is(tmp_path: Path) -> None:
    """At every moment, and never SL-SAM before there is an interval."""
    for count in range(15):
        folder = tmp_path / str(count)
        folder.mkdir()
        advice = said(folder, [-0.11, -0.1, -0.12, -0.1], count)
        if count < 8:  # six choose learning rates
            assert advice.sentence == (
                f"Nothing can be said yet, after {count} of 14 runs: no seed is done with both methods."
            )
            assert (advice.method, advice.chosen) == (None, None)
        elif count < 14:
            assert advice.sentence.startswith(f"So far, after {count} of 14 runs, use ")
        assert count < 8 or advice.method == ("plain" if count < 12 else "auto")


def test_methods_that_diverge_are_not_advised(tmp_path: Path) -> None:
    better = [-0.11, -0.1, -0.12, -0.1]
    for i, (failing, method, reason) in enumerate(
        [
            ([(True, 2)], "plain", "SL-SAM (method: auto) has diverged in 1 of 4 runs."),
            ([(False, 1), (False, 2), (False, 3)], "auto", "plain LoRA has diverged in 3 of 4 runs."),
            ([(False, 1), (False, 2), (False, 3), (True, 0), (True, 2)], "auto", "in 3 of 4 runs."),
            ([(True, 100)], "plain", "SL-SAM (method: auto) has diverged in every run."),
            ([(True, seed) for seed in range(4)], "plain", "SL-SAM (method: auto) has diverged in every run."),
            ([(False, 100), (True, 100)], None, "Both methods have diverged in every run; use lower learning rates."),
        ]
    ):
        folder = tmp_path / str(i)
        folder.mkdir()
        advice = said(folder, better, failing=failing)
        assert advice.method == method
        assert advice.sentence.endswith(reason)


@pytest.mark.parametrize(("auto", "method"), [([-0.11, -0.1, -0.12, -0.1], "auto"), ([0.11, 0.1, 0.12, 0.1], "plain")])
def test_a_run_of_plain_lora_that_diverges_decides_nothing(auto: list[float], method: str, tmp_path: Path) -> None:
    """The losses of the other seeds do, and the run is named."""
    advice = said(tmp_path, auto, failing=[(False, 2)])
    assert advice.method == method
    assert "its held-out loss is 0.10" in advice.sentence
    assert (
        "Runs that diverged: 1 of plain LoRA's 4, 0 of SL-SAM's 4; the losses are those of the others." in advice.notes
    )


def test_fewer_steps_are_named_where_they_were_not_tried(tmp_path: Path) -> None:
    better, worse = [-0.11, -0.1, -0.12, -0.1], [0.0] * 4
    for name, losses, named in (("better", better, True), ("worse", worse, False)):
        (tmp_path / name).mkdir()
        assert any("Fewer steps of plain LoRA" in note for note in said(tmp_path / name, losses).notes) == named


@pytest.mark.parametrize(
    "change",
    [
        {"training": {"warmup_steps": 3}},
        {"training": {"prompt_format": "{}"}},
        {"task": {"label_noise": 0.5}},
        {"task": {"steps": 7}},
        {"method": {"batch_size": 2}},
        {"method": {"steps_share": 0.5}},
        {"settings": {"match": ("epochs", "cost")}},
    ],
)
def test_a_comparison_that_was_changed_is_not_advised_on(change: dict[str, Any]) -> None:
    """`sft.yaml` would leave out what was changed."""
    own = settings()
    assert is_own(own)
    [(name, task)] = own.tasks.items()
    changed = replace(
        own,
        training=replace(own.training, **change.get("training", {})),
        tasks={name: replace(task, **change.get("task", {}))},
        methods={**own.methods, "auto": replace(own.methods["auto"], **change.get("method", {}))},
        **change.get("settings", {}),
    )
    assert not is_own(changed)


def test_a_learning_rate_at_the_end_of_the_grid_is_noted(tmp_path: Path) -> None:
    (tmp_path / "middle").mkdir()
    notes = [said(tmp_path / "middle", [0.0] * 4, best=3e-4).notes, said(tmp_path, [0.0] * 4).notes]
    assert [[note for note in of if "of those tried" in note] for of in notes] == [
        [
            "The learning rate of SL-SAM (method: auto) is the smallest of those tried; a further one may be better: "
            "--slsam_learning_rate 0.0001."
        ],
        [
            "The learning rate of plain LoRA is the largest of those tried; a further one may be better: "
            "--learning_rate 0.0027."
        ],
    ]


# The file for sft


def test_the_file_for_sft_has_what_the_runs_had(tmp_path: Path) -> None:
    plan, rows = finished(tmp_path, [-0.11, -0.1, -0.12, -0.1])
    advice = advise(plan, rows, build_report(plan, rows))
    text = sft_recipe(advice, plan.settings, "c/sft.yaml", "c/adapter", gpu=False)
    assert text.startswith(
        "# slsam-peft sft --config c/sft.yaml\n#\n# Use SL-SAM (method: auto) with learning rate 0.0009"
    )
    assert max(map(len, text.splitlines())) <= 120
    made = yaml.safe_load(text)
    assert made == {
        "model_name_or_path": "smollm2",
        "dtype": "float32",
        "use_peft": True,
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "lora_target_modules": "all-linear",
        "dataset_name": "/data/my.jsonl",
        "eval_strategy": "no",
        "max_length": 256,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 9e-4,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.0,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "method": "auto",
        "output_dir": "c/adapter",
        "save_total_limit": 2,
        "report_to": "none",
    }


def test_the_file_for_sft_says_plain_lora_held_out_data_and_bits(tmp_path: Path) -> None:
    plan, rows = finished(tmp_path, [0.0] * 4)
    advice = advise(plan, rows, build_report(plan, rows))
    task = {"source": "own_data", "file": "user/set", "test_file": "test", "rows": 41, "digest": "0"}
    training = {"steps": 30, "dtype": "bfloat16", "quantize": "nf4"}
    changed = settings(tasks={"my": task}, training=training)
    made = yaml.safe_load(sft_recipe(advice, changed, "c/sft.yaml", "c/adapter", gpu=True))
    told = {name: made[name] for name in ("dataset_test_split", "eval_strategy", "load_in_4bit", "bf16", "rho")}
    assert told == {
        "dataset_test_split": "test",
        "eval_strategy": "epoch",
        "load_in_4bit": True,
        "bf16": True,
        "rho": 0.0,
    }
    assert made["num_train_epochs"] == 2.927  # 30 steps of 4 are no whole number of epochs of 41 rows
    assert not {"method", "use_cpu"} & {*made}
