"""Fewer steps of plain LoRA as a third method on one's own data: when, at what price, and what is advised of three."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config

from slsam_peft.errors import UserError
from slsam_peft.runs.compare import own_data
from slsam_peft.runs.compare.advice import Advice, advise, is_own
from slsam_peft.runs.compare.begun import otherwise
from slsam_peft.runs.compare.grid import LEAST_OF_THREE, LEAST_SEEDS, spend
from slsam_peft.runs.compare.jobs import Plan
from slsam_peft.runs.compare.methods import Candidate
from slsam_peft.runs.compare.own_methods import FEWER, HALF, THIRD, fewer_steps
from slsam_peft.runs.compare.reading import parse_settings
from slsam_peft.runs.compare.report import build_report
from slsam_peft.runs.compare.settings import CompareSettings
from slsam_peft.runs.compare.sft_recipe import sft_recipe
from slsam_peft.runs.compare.store import RowStore
from slsam_peft.runs.compare.timing import Pace, Sample, estimate, probe, seconds_per_step
from slsam_peft.runs.compare.wishes import Wishes
from slsam_peft.runs.compare.worker import next_row
from tests.tiny import tokenizer

COSTS = {"plain": 1.0, "auto": 1.25, THIRD.name: 1.0}
RATES = {"plain": 3e-4, "auto": 9e-4, THIRD.name: 1.2e-3}  # those that are best in `finished`


def settings(**changes: Any) -> CompareSettings:
    """A comparison of three methods, as `compare --data` makes it."""
    task = {"source": "own_data", "file": "/data/my.jsonl", "rows": 40, "validation_rows": 8, "test_rows": 16}
    return parse_settings(
        {
            "training": {"steps": 60, "batch_size": 4},
            "tasks": {"my": {**task, "digest": "0"}},
            "methods": {
                "plain": {"learning_rates": [1e-4, 3e-4, 9e-4]},
                "auto": {"learning_rates": [3e-4, 9e-4, 2.7e-3], "slsam": {"method": "auto"}},
                THIRD.name: {"learning_rates": [4e-4, 1.2e-3, 3.6e-3], "steps_share": THIRD.share},
            },
            "seeds": [0, 1, 2, 3],
            "tuning_seed": 100,
            "match": ["epochs"],
            **changes,
        }
    )


def method_of(job: Mapping[str, Any]) -> str:
    return "auto" if job["slsam"] is not None else "plain" if job["steps"] == 60 else THIRD.name


def finished(
    folder: Path, auto: list[float], fewer: list[float], count: int | None = None, **more: Any
) -> tuple[Plan, dict[str, Any]]:
    """A plan and its rows: losses of plain LoRA are 1 on each seed, those of the others differ by what is given."""
    losses = {"plain": [0.0] * 4, "auto": auto, THIRD.name: fewer}

    def run(job: Mapping[str, Any], report: Any) -> dict[str, Any]:
        method, seed = method_of(job), job["seed"]
        if (method, seed) in more.get("failing", ()):
            return {"error": "NaN"}
        best = {**RATES, **more.get("best", {})}[method]
        loss = abs(job["learning_rate"] - best) if seed == 100 else 1.0 + losses[method][seed]
        seconds = job["steps"] * COSTS[method]
        return {"loss": loss, "accuracy": 0.5, "exact": 0.5, "cost": COSTS[method], "seconds": seconds, "data": "same"}

    plan, store = Plan(settings(), COSTS), RowStore(folder / "rows.jsonl")
    while (count is None or len(store.read()) < count) and next_row(plan, store, lambda *_: None, run) is not None:
        pass
    return plan, store.read()


# Trainings


@given(st.integers(LEAST_OF_THREE, 300))
def test_trainings_are_spent_alike_on_three_methods(runs: int) -> None:
    """No method tries more learning rates than another, all of them try some, and few trainings are left over."""
    rates, seeds = spend(runs, 3)
    assert rates > 1
    assert seeds >= LEAST_SEEDS
    assert runs - 3 < 3 * rates + 3 * seeds <= runs


def test_each_of_three_methods_gets_what_each_of_two_gets_of_two_thirds_as_many() -> None:
    assert [spend(runs, 3) for runs in (15, 18, 24, 36)] == [(2, 3), (2, 4), (3, 5), (4, 8)]
    for runs in range(15, 300, 3):
        assert spend(runs, 3) == spend(runs * 2 // 3)


# Where fewer steps are tried


@given(st.integers(24, 3000), st.integers(1, 24), st.floats(0.2, 12.0))
def test_fewer_steps_still_see_every_row(rows: int, batch_size: int, epochs: float) -> None:
    steps = max(1, round(epochs * rows / batch_size))
    fewer = fewer_steps(steps, batch_size, rows)
    if fewer is not None:
        assert round(fewer.share * steps) * batch_size > rows - batch_size  # the last of them may be cut off
    else:
        assert steps * batch_size < 3 * rows


def test_the_share_is_the_one_that_did_best_in_steps_of_that_size() -> None:
    assert [fewer_steps(96, size, 32) for size in (1, 4, 8, 9, 16)] == [THIRD, THIRD, THIRD, HALF, HALF]
    assert [fewer_steps(steps, 4, 32) for steps in (8, 23, 24)] == [None, None, THIRD]
    assert [fewer_steps(steps, 16, 32) for steps in (2, 3, 4)] == [None, None, HALF]
    assert all(round(1 / fewer.share) == fewer.parts and fewer.short in fewer.name for fewer in FEWER.values())


def made(folder: Path, **wishes: Any) -> own_data.OwnComparison:
    """The comparison on 48 rows, of which 24 are trained on."""
    data = folder / "my.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}?", "completion": str(i)}) + "\n" for i in range(48)))
    return own_data.own_comparison(Wishes(data=str(data), model="m", **wishes))


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer and a configuration of 64 positions are where a comparison looks for those of `m`."""
    monkeypatch.setattr(own_data, "find_model", lambda name: name)
    monkeypatch.setattr(own_data, "load_tokenizer", lambda source: tokenizer())
    monkeypatch.setattr(own_data, "load_config", lambda source: GPT2Config(n_positions=64))


def test_rows_that_are_repeated_get_fewer_steps_as_a_third_method(tmp_path: Path) -> None:
    own = made(tmp_path)
    assert own.said == []
    assert own.settings.training.steps == 48  # eight epochs of 24 rows in steps of four
    assert own.values["methods"] == {
        "plain": {"learning_rates": [1.7e-4, 5.2e-4]},
        "auto": {"learning_rates": [3.5e-4, 1e-3], "slsam": {"method": "auto"}},
        "plain, a third of the steps": {"learning_rates": [6.9e-4, 2.1e-3], "steps_share": 0.3333},
    }
    plan = Plan(own.settings, COSTS)
    assert plan.counts({}) == (0, 18)
    assert [plan.steps("my", method, "epochs") for method in own.settings.methods] == [48, 48, 16]
    assert is_own(own.settings)
    large = made(tmp_path, batch_size=12, learning_rate=1e-3, runs=24)
    assert large.values["methods"][HALF.name] == {"learning_rates": [1.3e-3, 4e-3, 0.012], "steps_share": 0.5}
    assert is_own(large.settings)


@pytest.mark.parametrize("wish", [{"epochs": 1.0}, {"epochs": 2.5}, {"steps": 17}, {"epochs": 1.0, "runs": 30}])
def test_rows_that_a_third_of_the_steps_would_not_see_get_two_methods(wish: dict[str, Any], tmp_path: Path) -> None:
    own = made(tmp_path, **wish)
    assert [*own.values["methods"]] == ["plain", "auto"]
    assert Plan(own.settings, COSTS).counts({}) == (0, wish.get("runs", 12))
    assert not any("steps" in sentence for sentence in own.said)


@pytest.mark.parametrize("runs", [6, 9, 10, 12, 14])
def test_few_trainings_are_spent_on_two_methods_and_that_is_said(runs: int, tmp_path: Path) -> None:
    own = made(tmp_path, runs=runs)
    rates, seeds = spend(runs)
    assert [len(how["learning_rates"]) for how in own.values["methods"].values()] == [rates, rates]
    assert len(own.values["seeds"]) == seeds
    assert own.said == [
        "Plain LoRA with a third of the steps is not tried: to choose its learning rate as well takes --runs 15 or "
        "more."
    ]
    assert len(made(tmp_path, runs=15).values["methods"]) == 3


@pytest.mark.parametrize("runs", [None, 18])
def test_a_comparison_begun_with_two_methods_goes_on_with_two(runs: int | None, tmp_path: Path) -> None:
    """One of before there was a third one has as many trainings as were asked for, of two methods."""
    three, two = made(tmp_path, runs=runs), made(tmp_path, epochs=1.0, runs=runs)
    begun = parse_settings({**three.values, **{name: two.values[name] for name in ("methods", "seeds")}})
    assert [*begun.methods] == ["plain", "auto"]
    wishes = Wishes(data=str(tmp_path / "my.jsonl"), model="m", runs=runs)
    assert otherwise(begun, wishes, ["model", *(["runs"] if runs else [])]) == {}
    own = own_data.own_begun(wishes, begun)
    assert own.settings == begun
    assert own.said == [
        "This comparison was begun without plain LoRA with a third of the steps, and goes on so; --runs 15 or more "
        "begin one with it in another folder: --output FOLDER."
    ]
    assert own_data.own_begun(wishes, three.settings).said == []


def test_what_is_said_of_rows_is_said_when_a_comparison_goes_on(tmp_path: Path) -> None:
    short = made(tmp_path, max_length=2)
    wishes = Wishes(data=str(tmp_path / "my.jsonl"))  # whatever stands for what was asked for then
    assert short.said
    assert own_data.own_begun(wishes, short.settings).said == short.said
    (tmp_path / "my.jsonl").write_text((tmp_path / "my.jsonl").read_text() + '{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(UserError, match=r"my\.jsonl: the rows are not those that this comparison began with\. Bring"):
        own_data.own_begun(wishes, short.settings)


# Time


def test_a_third_of_the_steps_takes_a_third_of_the_time(tmp_path: Path) -> None:
    """A step is plain LoRA's: what is known of one is known of the other."""
    plan, rows = finished(tmp_path, [0.0] * 4, [0.0] * 4, 1)
    assert plan.remaining({}).count(("my", THIRD.name, 20)) == 7
    assert Pace(plan, rows).left() == pytest.approx(6 * 60 + 7 * 75 + 7 * 20)
    assert seconds_per_step(plan, [Sample("my", "plain", 10, 20.0)], "my", THIRD.name) == 2.0
    known = [Sample("my", "plain", 10, 20.0), Sample("my", "auto", 10, 90.0)]
    assert seconds_per_step(plan, known, "my", THIRD.name) == 2.0
    assert seconds_per_step(plan, [*known, Sample("my", THIRD.name, 10, 30.0)], "my", THIRD.name) == 3.0


def test_the_estimate_needs_no_probe_of_fewer_steps() -> None:
    now, plan = 0.0, Plan(settings(), COSTS)

    def run(job: Mapping[str, Any], report: Any) -> dict[str, Any]:
        nonlocal now
        for step in range(1, 6):
            now += 1.0 if job["slsam"] is None else 2.0
            report(step, 5)
        return {}

    probes = [probe(plan, "my", method, run, clock=lambda: now) for method in ("plain", "auto")]
    low, high = estimate(plan, {}, probes) or (0.0, 0.0)
    steps = 7 * 60 * 1.0 + 7 * 60 * 2.0 + 7 * 20 * 1.0
    assert (low, high) == (pytest.approx(steps + 21 * 1.0), pytest.approx(steps + 21 * 2.0))


# Advice


def said(folder: Path, auto: list[float], fewer: list[float], count: int | None = None, **more: Any) -> Advice:
    plan, rows = finished(folder, auto, fewer, count, **more)
    assert is_own(plan.settings)
    return advise(plan, rows, build_report(plan, rows))


BETTER, BEST, LEVEL, WORSE = [-0.11, -0.1, -0.12, -0.1], [-0.31, -0.3, -0.33, -0.3], [-0.2, 0.2, -0.1, 0.1], [0.3] * 4
SCATTERED = [-0.07, -0.17, -0.07, -0.15]  # below plain LoRA's for sure, and not to be told from `BETTER`


@pytest.mark.parametrize(
    ("auto", "fewer", "method", "reasons"),
    [
        (
            LEVEL,
            LEVEL[::-1],
            "plain",
            [
                "it is cheaper than SL-SAM, and there is no difference that these runs can tell (SL-SAM's held-out ",
                "; and a third of the steps is not surely better (its held-out loss is +0.0000 nats from plain LoRA's",
            ],
        ),
        (BETTER, LEVEL, "auto", ["its held-out loss is 0.1075 nats below plain LoRA's (SL-SAM minus plain: 95% t "]),
        (
            LEVEL,
            BETTER,
            THIRD.name,
            ["its held-out loss is 0.1075 nats below plain LoRA's (a third of the steps minus plain: 95% t interval"],
        ),
        (
            BETTER,
            SCATTERED,
            THIRD.name,
            [
                "its held-out loss is 0.1150 nats below plain LoRA's (a third of the steps minus plain: ",
                "; and it is cheaper than SL-SAM, and there is no difference that these runs can tell (SL-SAM's "
                "held-out loss is +0.0075 nats from that of a third of the steps, 95% t interval",
            ],
        ),
        (
            BEST,
            BETTER,
            "auto",
            [
                "its held-out loss is 0.3100 nats below plain LoRA's (SL-SAM minus plain: ",
                "; and its held-out loss is 0.2025 nats below that of a third of the steps (SL-SAM minus a third of ",
            ],
        ),
        (
            BETTER,
            BEST,
            THIRD.name,
            [
                "its held-out loss is 0.3100 nats below plain LoRA's (a third of the steps minus plain: ",
                "; and its held-out loss is 0.2025 nats below SL-SAM's (SL-SAM minus a third of the steps: ",
            ],
        ),
        (
            [0.31, 0.3, 0.33, 0.3],
            WORSE,
            "plain",
            [
                "its held-out loss is 0.3100 nats below SL-SAM's (SL-SAM minus plain: ",
                "; and a third of the steps is not surely better (its held-out loss is +0.3000 nats from plain "
                "LoRA's, 4 seeds, 16 held-out rows; the same on each)",
            ],
        ),
    ],
)
def test_another_method_than_plain_lora_is_advised_where_it_is_ahead_for_sure(
    auto: list[float], fewer: list[float], method: str, reasons: list[str], tmp_path: Path
) -> None:
    """And SL-SAM beside fewer steps, which are cheaper, where it is ahead of these too."""
    advice = said(tmp_path, auto, fewer)
    assert (advice.method, advice.chosen) == (method, Candidate(RATES[method]))
    name = {
        "plain": "plain LoRA with",
        "auto": "SL-SAM (method: auto) with",
        THIRD.name: "plain LoRA with a third of the steps and",
    }[method]
    assert advice.sentence.startswith(f"Use {name} learning rate {RATES[method]:g}: {reasons[0]}")
    assert all(reason in advice.sentence for reason in reasons)
    assert advice.sentence.count("; and ") == len(reasons) - 1
    assert advice.notes[0] == "A step of SL-SAM costs 1.25 plain ones, by count."
    assert not any("were not tried" in note for note in advice.notes)


def test_what_the_sentence_leaves_out_is_a_note(tmp_path: Path) -> None:
    """How SL-SAM and fewer steps differ, where the sentence names one of them, and what a larger rate may cost."""
    for i, (auto, fewer, expected) in enumerate(
        [
            (BETTER, LEVEL, [True, False]),
            (LEVEL, BETTER, [True, True]),
            (BETTER, SCATTERED, [False, True]),
            (LEVEL, LEVEL, [False, False]),
        ]
    ):
        (tmp_path / str(i)).mkdir()
        notes = said(tmp_path / str(i), auto, fewer).notes
        begins = ("SL-SAM minus a third of the steps: ", "A larger rate can cost the model what it knows beside ")
        assert [any(note.startswith(begin) for note in notes) for begin in begins] == expected
    (note,) = [n for n in said(tmp_path, BETTER, LEVEL).notes if n.startswith("SL-SAM minus a third")]
    assert note.startswith("SL-SAM minus a third of the steps: -0.1075 nats, 95% t interval ")
    assert note.endswith(" These runs cannot tell the two apart, and fewer steps cost less.")


def test_two_chances_to_be_ahead_are_corrected_for_where_that_matters(tmp_path: Path) -> None:
    """An interval that hardly leaves out 0 is that of one method alone."""
    (tmp_path / "sure").mkdir()
    advice = said(tmp_path, [-0.17, -0.03, -0.08, -0.12], LEVEL)
    assert advice.method == "auto"
    assert any(
        note.startswith("2 methods had the chance to be ahead of plain LoRA: corrected for that (Holm), p is 0.0")
        for note in advice.notes
    )
    assert not any("Holm" in note for note in said(tmp_path / "sure", BETTER, LEVEL).notes)


def test_advice_among_three_says_how_far_a_comparison_is(tmp_path: Path) -> None:
    """At every moment, and never another method than plain LoRA before there is an interval."""
    for count in range(22):
        (tmp_path / str(count)).mkdir()
        advice = said(tmp_path / str(count), BETTER, BEST, count)
        if count < 11:  # nine choose learning rates
            begin = f"Nothing can be said yet, after {count} of 21 runs"
            assert advice.sentence == f"{begin}: no seed is done with plain LoRA and another method."
            assert (advice.method, advice.chosen) == (None, None)
        elif count < 21:
            assert advice.sentence.startswith(f"So far, after {count} of 21 runs, use ")
        expected = "plain" if count < 17 else "auto" if count < 18 else THIRD.name
        assert count < 11 or advice.method == expected


EVERY = (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("failing", "method", "reason"),
    [
        ([("auto", 2)], THIRD.name, "its held-out loss is 0.3100 nats below plain LoRA's"),
        ([(THIRD.name, 2)], "auto", "its held-out loss is 0.1075 nats below plain LoRA's"),
        (
            [("auto", 2), (THIRD.name, 1)],
            "plain",
            "SL-SAM (method: auto) has diverged in 1 of 4 runs; and plain LoRA ",
        ),
        ([(THIRD.name, 100)], "auto", "its held-out loss is 0.1075 nats below plain LoRA's"),
        ([("auto", 100), (THIRD.name, 100)], "plain", "SL-SAM (method: auto) has diverged in every run; and plain "),
        ([("plain", 0), ("plain", 1), ("plain", 2)], THIRD.name, "plain LoRA has diverged in 3 of 4 runs; and its "),
        ([("plain", seed) for seed in EVERY], THIRD.name, "plain LoRA has diverged in every run; and its held-out "),
        (
            [("plain", seed) for seed in EVERY] + [(THIRD.name, 0)],
            "auto",
            "plain LoRA has diverged in every run; and plain LoRA with a third of the steps has diverged in 1 of 4",
        ),
        ([("plain", 100), ("auto", 100)], THIRD.name, "plain LoRA has diverged in every run."),
        ([("plain", 100), (THIRD.name, 100)], "auto", "plain LoRA has diverged in every run."),
        (
            [("plain", seed) for seed in EVERY] + [(THIRD.name, 0), (THIRD.name, 1), (THIRD.name, 2)],
            "auto",
            "plain LoRA has diverged in every run; and plain LoRA with a third of the steps has diverged in 3 of 4",
        ),
        ([("plain", 100), ("auto", 100), (THIRD.name, 100)], None, "All methods have diverged in every run; use "),
    ],
)
def test_of_three_methods_those_that_diverge_are_not_advised(
    failing: list[tuple[str, int]], method: str | None, reason: str, tmp_path: Path
) -> None:
    """Fewer steps would be ahead of SL-SAM, and SL-SAM of plain LoRA."""
    advice = said(tmp_path, BETTER, BEST, failing=failing)
    assert advice.method == method
    assert reason in advice.sentence


def test_fewer_steps_that_failed_say_nothing_of_the_others(tmp_path: Path) -> None:
    """Before a seed is done with SL-SAM, nothing speaks for plain LoRA, either."""
    advice = said(tmp_path, BETTER, BEST, 9, failing=[(THIRD.name, 100)])
    assert (advice.method, advice.sentence.partition(":")[0]) == (None, "Nothing can be said yet, after 9 of 17 runs")


def test_runs_that_diverged_are_counted_for_each_method(tmp_path: Path) -> None:
    notes = said(tmp_path, BETTER, BEST, failing=[("plain", 1), (THIRD.name, 1)]).notes
    assert (
        "Runs that diverged: 1 of plain LoRA's 4, 0 of SL-SAM's 4, 1 of 4 with a third of the steps; the losses are "
        "those of the others." in notes
    )


def test_a_learning_rate_of_fewer_steps_at_the_end_of_its_grid_is_noted(tmp_path: Path) -> None:
    notes = said(tmp_path, LEVEL, LEVEL, best={THIRD.name: 3.6e-3}).notes
    assert [note for note in notes if "of those tried" in note] == [
        "The learning rate of plain LoRA with a third of the steps is the largest of those tried; a further one may "
        "be better. Its rates lie around four times --learning_rate."
    ]


@pytest.mark.parametrize("change", [{"steps_share": 0.25}, {"batch_size": 2}, {"slsam": {"method": "auto"}}])
def test_three_methods_one_of_which_was_changed_are_not_advised_on(change: dict[str, Any]) -> None:
    own = settings()
    assert is_own(own)
    methods = {**own.methods, THIRD.name: replace(own.methods[THIRD.name], **change)}
    assert not is_own(replace(own, methods=methods))
    assert not is_own(replace(own, methods={name: own.methods[name] for name in ("plain", THIRD.name)}))
    renamed = {("another" if name == THIRD.name else name): how for name, how in own.methods.items()}
    assert not is_own(replace(own, methods=renamed))


# The file for sft


@pytest.mark.parametrize(
    ("rows", "steps", "epochs"),
    [(40, 60, 2), (40, 80, 2.7), (24, 48, 2.667), (32, 96, 4), (201, 151, 1), (134, 101, 1)],
)
def test_the_file_for_sft_trains_as_many_epochs_as_fewer_steps_are(
    rows: int, steps: int, epochs: float, tmp_path: Path
) -> None:
    plan, done = finished(tmp_path, LEVEL, BETTER)
    advice = advise(plan, done, build_report(plan, done))
    task = {"source": "own_data", "file": "user/set", "rows": rows, "digest": "0"}
    own = settings(tasks={"my": task}, training={"steps": steps, "batch_size": 4})
    text = sft_recipe(advice, own, "c/sft.yaml", "c/adapter", gpu=False)
    assert "# Use plain LoRA with a third of the steps and learning rate 0.0012: its held-out loss" in text
    recipe = yaml.safe_load(text)
    assert (recipe["num_train_epochs"], recipe["learning_rate"], recipe["rho"]) == (epochs, 1.2e-3, 0.0)
    assert "method" not in recipe
