"""The parts of a comparison that need no model: settings, jobs, rows on disk, statistics, report."""

import datetime
import json
import math
import multiprocessing
import os
import subprocess
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from rich.console import Console
from scipy import stats

from slsam_peft.cli.compare_report import markdown, tables
from slsam_peft.cli.compare_work import run_name
from slsam_peft.cli.forest_plot import build as forest_plot
from slsam_peft.cli.forest_plot import by_effect, draw
from slsam_peft.config import SLSAMConfig
from slsam_peft.errors import UserError
from slsam_peft.runs.compare.jobs import IN_EVERY_ROW, Plan, in_row, row_settings
from slsam_peft.runs.compare.methods import Candidate, slsam_config
from slsam_peft.runs.compare.reading import parse_settings, read_settings
from slsam_peft.runs.compare.recorded import RecordedPlan
from slsam_peft.runs.compare.report import build_report
from slsam_peft.runs.compare.settings import (
    SEED_STRIDE,
    CompareSettings,
    TaskSettings,
    TrainingSettings,
    plain_values,
)
from slsam_peft.runs.compare.statistics import holm, paired_difference, t_interval
from slsam_peft.runs.compare.store import RowStore
from slsam_peft.runs.compare.tasks import load_task, swap_answers
from slsam_peft.runs.compare.worker import next_row

COSTS = {"plain": 1.0, "sam": 2.0, "cheap": 0.75}


def values(**changes: Any) -> dict[str, Any]:
    """A comparison of three methods with two learning rates each."""
    return {
        "training": {"steps": 12},
        "tasks": {"docs": {"source": "stdlib_docs", "rows": 8}},
        "methods": {
            "plain": {"learning_rates": [1e-4, 2e-4]},
            "sam": {"learning_rates": [1e-3, 2e-3], "slsam": {"rho": 0.5, "active_fraction": 1.0}},
            "cheap": {"learning_rates": [1e-3, 2e-3], "slsam": {"design": "depth", "cost_budget": 0.75}},
        },
        "seeds": [0, 1, 2],
        "tuning_seed": 9,
        **changes,
    }


def settings(**changes: Any) -> CompareSettings:
    return parse_settings(values(**changes))


def scored(job_settings: dict[str, Any], report: Any = None) -> dict[str, Any]:
    """A made-up result: best at the larger learning rate, SAM 0.1 better, seeds apart."""
    loss = 3.0 + 0.01 * job_settings["seed"] - job_settings["learning_rate"]
    if job_settings["slsam"] is not None:
        loss -= 0.1 + 0.001 * (job_settings["seed"] % 3)
    return {"loss": loss, "accuracy": 0.5, "exact": 0.25, "cost": 1.0, "seconds": 1.0, "data": "same"}


def finished(plan: Plan, folder: Path) -> RowStore:
    """All rows of a plan."""
    store = RowStore(folder / "rows.jsonl")
    while next_row(plan, store, lambda *_: None, scored) is not None:
        pass
    return store


# Settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": {"plain": {"learning_rate": [1e-3]}}}, "Did you mean 'learning_rates'"),
        ({"tasks": {"d": {"source": "stdlib_doc", "rows": 8}}}, "Did you mean 'stdlib_docs'"),
        ({"tasks": {"d": {"source": "stdlib_docs"}}}, "tasks.d.rows is missing"),
        ({"tasks": {"d": {"source": "reasoning_gym", "rows": 8}}}, "puzzle=None"),
        ({"tasks": {"d": {"source": "stdlib_docs", "rows": 8, "label_noise": 1.5}}}, "label_noise=1.5"),
        ({"methods": {"plain": {"learning_rates": []}}}, "learning_rates"),
        ({"methods": {"plain": {"learning_rates": ["fast"]}}}, "'fast'"),
        ({"methods": {"sam": {"learning_rates": [1e-3], "slsam": {}, "rhos": 0.5}}}, "rhos=0.5 must be a list"),
        ({"methods": {"sam": {"learning_rates": [1e-3], "slsam": {}, "rhos": "0.5"}}}, "rhos='0.5' must be a list"),
        ({"methods": {"sam": {"learning_rates": [1e-3], "slsam": {}, "rhos": 0}}}, "rhos=0 must be a list"),
        ({"methods": {"sam": {"learning_rates": [1e-3], "slsam": {}, "rhos": []}}}, "rhos=[] must be a list"),
        (
            {"methods": {"sam": {"learning_rates": [1e-3], "slsam": {"rho": 0}, "rhos": [0.5]}}},
            "methods.sam.rhos and slsam.rho are both set",
        ),
        (
            {
                "methods": {
                    "a": {"learning_rates": [1e-3], "slsam": {"method": "auto", "loss_rise": 1}, "loss_rises": [0.5]}
                }
            },
            "methods.a.loss_rises and rhos or slsam.loss_rise are both set",
        ),
        ({"methods": {"a": {"learning_rates": [1e-3], "loss_rises": [0.5]}}}, "only SL-SAM has this radius"),
        (
            {"methods": {"a": {"learning_rates": [1e-3], "slsam": {"rho": 0.1}, "loss_rises": [0.5]}}},
            "rho=0.1 and loss_rise=0.5",
        ),
        (
            {"methods": {"a": {"learning_rates": [1e-3], "slsam": {}, "loss_rises": [-1]}}},
            "loss_rises: -1 is not allowed",
        ),
        ({"methods": {"a": {"learning_rates": [1e-3], "slsam": {"method": "automatic"}}}}, "Did you mean 'auto'"),
        (
            {
                "methods": {
                    "plain": {"learning_rates": [1e-3]},
                    "a": {"learning_rates": [1e-3], "slsam": {"method": "auto", "ascent_sequences": 5}},
                }
            },
            "methods.a: ascent_sequences=5 is more than the 4 sequences of a step",
        ),
        (
            {
                "methods": {
                    "plain": {"learning_rates": [1e-3]},
                    "a": {"learning_rates": [1e-3], "batch_size": 1, "slsam": {"method": "auto", "ascent": "partial"}},
                }
            },
            "methods.a: ascent='partial' takes a part of a step's sequences",
        ),
        ({"training": {"steps": 3, "lora_dropout": 1.5}}, "training.lora_dropout=1.5 is not allowed"),
        ({"training": {"steps": 3, "lora_dropout": 1}}, "share in [0, 1)"),
        ({"methods": {"plain": {"learning_rates": [1e-3], "slsam": {"roh": 0.1}}}}, "Did you mean 'rho'"),
        ({"methods": {"plain": {"learning_rates": [1e-3], "slsam": {"design": "deep"}}}}, "Did you mean 'depth'"),
        ({"reference": "plane"}, "Did you mean 'plain'"),
        ({"tuning_task": "doc"}, "Did you mean 'docs'"),
        ({"match": ["costs"]}, "Did you mean 'cost'"),
        ({"match": []}, "match=[] must be one or more different names"),
        ({"match": ["cost", "cost"]}, "match=['cost', 'cost'] must be one or more different names"),
        ({"methods": {"plain": {"learning_rates": [1e-3, 1e-3]}}}, "learning_rates=[0.001, 0.001] has a number twice"),
        ({"methods": {"plain": {"learning_rates": [True]}}}, "learning_rates: True is not allowed"),
        ({"methods": {"plain": {"learning_rates": [1e-3], "steps_share": 5}}}, "steps_share=5.0 is not allowed"),
        ({"methods": {"plain": {"learning_rates": [1e-3], "slsam": 3}}}, "methods.plain.slsam=3 is not allowed"),
        ({"methods": {1: {"learning_rates": [1e-3]}, "1": {"learning_rates": [1e-3]}}}, "two entries have the same"),
        ({"seeds": [2**32]}, "4294967296 is not allowed"),
        ({"seeds": [datetime.date(2026, 1, 1)]}, "quote dates"),
        (
            {"training": {"steps": 3, "prompt_format": 5}},
            "prompt_format=5 is not allowed; it must be a text",
        ),
        ({"training": {"steps": 3, "gradient_checkpointing": "yes"}}, "it must be true or false"),
        ({"tasks": {"d": {"source": "stdlib_docs", "rows": 8, "puzzle_options": None}}}, "must be a mapping"),
        ({"tasks": {"d": {"source": "stdlib_docs", "rows": 8, "test_file": "a"}}}, "belongs to source='jsonl'"),
        ({"tasks": {"d": {"source": "jsonl", "rows": 8, "file": ["a"]}}}, "tasks.d.file=['a'] is not allowed"),
        ({"seeds": [0, 9]}, "not reported"),
        ({"seeds": [0, 0]}, "different"),
        ({"training": {"steps": 0}}, "steps=0"),
        ({"training": {"steps": 3, "prompt_format": "no place"}}, "prompt_format"),
        ({"tasks": {}}, "tasks is empty"),
        ({"sedes": [1]}, "Did you mean 'seeds'"),
    ],
)
def test_bad_settings_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        settings(**change)
    assert message in str(caught.value)


def test_methods_must_have_the_same_tuning_budget() -> None:
    methods = values()["methods"]
    methods["sam"]["learning_rates"] = [1e-3, 2e-3, 4e-3]
    with pytest.raises(UserError, match=r"as many learning rates .* they are plain: 2, sam: 3"):
        settings(methods=methods)
    methods["sam"]["learning_rates"] = [1e-3]  # chooses nothing
    assert settings(methods=methods).methods["sam"].candidates == (Candidate(1e-3),)


def test_learning_rates_may_be_spelled_as_yaml_reads_texts(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    text = json.dumps(values()).replace("0.0001, 0.0002", "1e-4, 2e-4")
    config.write_text(text)
    assert read_settings(config).methods["plain"].learning_rates == (1e-4, 2e-4)


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.yaml cannot be read"):
        read_settings(tmp_path / "missing.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(UserError, match=r"bad\.yaml is not valid YAML"):
        read_settings(tmp_path / "bad.yaml")
    (tmp_path / "loop.yaml").write_text("tasks: &loop\n  again: *loop\n")
    with pytest.raises(UserError, match=r"loop\.yaml: a value contains itself; an alias"):
        read_settings(tmp_path / "loop.yaml")


# Jobs


def test_steps_are_matched_by_cost() -> None:
    plan = Plan(settings(), COSTS)
    assert [plan.steps("docs", method, "cost") for method in COSTS] == [12, 6, 16]
    assert [plan.steps("docs", method, "steps") for method in COSTS] == [12, 12, 12]


def test_steps_are_matched_by_epochs() -> None:
    """Equal sequences of the optimizer's own batches: what a step costs besides is reported, not paid for."""
    methods = values()["methods"]
    methods["sam"]["batch_size"], methods["cheap"]["batch_size"] = 16, 3
    plan = Plan(settings(methods=methods, match=["epochs", "steps", "cost"]), COSTS)
    assert [plan.steps("docs", method, "epochs") for method in COSTS] == [12, 3, 16]
    assert [plan.steps("docs", method, "steps") for method in COSTS] == [12, 12, 12]
    assert [plan.steps("docs", method, "cost") for method in COSTS] == [12, 2, 21]
    text = markdown(build_report(plan, {}), "loss", plan.settings)
    assert (
        text.index("### docs, equal epochs") < text.index("### docs, equal steps") < text.index("### docs, equal cost")
    )


def test_smaller_batches_cost_in_proportion() -> None:
    methods = values()["methods"]
    methods["sam"]["batch_size"] = 2
    plan = Plan(settings(methods=methods), COSTS)
    assert plan.steps("docs", "sam", "cost") == 12
    assert plan.job("docs", "sam", "cost", Candidate(1e-3), 0).settings["training"]["batch_size"] == 2
    assert plan.job("docs", "plain", "cost", Candidate(1e-4), 0).settings["training"]["batch_size"] == 4
    job = plan.job("docs", "sam", "cost", Candidate(1e-3), 0)
    tuned = {j.key: {"loss": 1.0, "data": "others"} for j in plan.tuning("docs", "sam", "cost")}
    row = {"loss": 1.0, "accuracy": 0.5, "exact": 0.5, "cost": 2.0, "data": "same"}
    line = next(x for x in build_report(plan, {**tuned, job.key: row}) if (x.method, x.match) == ("sam", "cost"))
    assert (line.cost, line.total_cost) == (1.0, 12.0)


def test_runs_of_both_matches_are_shared_where_they_are_equal() -> None:
    plan = Plan(settings(), COSTS)
    assert (
        plan.job("docs", "plain", "cost", Candidate(1e-4), 0).key
        == plan.job("docs", "plain", "steps", Candidate(1e-4), 0).key
    )
    assert (
        plan.job("docs", "sam", "cost", Candidate(1e-4), 0).key
        != plan.job("docs", "sam", "steps", Candidate(1e-4), 0).key
    )


def test_key_depends_on_what_decides_the_result_and_not_on_names() -> None:
    renamed = values()
    renamed["methods"]["sharp"] = renamed["methods"].pop("sam")
    here, there = Plan(settings(), COSTS), Plan(parse_settings(renamed), {**COSTS, "sharp": 2.0})
    key = here.job("docs", "sam", "cost", Candidate(1e-3), 0).key
    assert key == there.job("docs", "sharp", "cost", Candidate(1e-3), 0).key
    longer = Plan(settings(training={"steps": 12, "max_length": 99}), COSTS)
    assert key != longer.job("docs", "sam", "cost", Candidate(1e-3), 0).key


def test_settings_of_a_row_have_the_names_that_keys_are_made_of() -> None:
    options = {"steps": 3, "quantize": 1}  # a puzzle's own names are nobody else's
    task = {"source": "reasoning_gym", "puzzle": "a", "puzzle_options": options, "rows": 8, "label_noise": 0.5}
    plan = Plan(settings(tasks={"sums": task}), COSTS)
    stored = row_settings(plan.job("sums", "cheap", "steps", Candidate(1e-3), 0).settings)
    assert (stored["updates"], stored["training"]["updates"], stored["training"]["quantise"]) == (12, 12, "none")
    assert (stored["task"]["noisy"], stored["task"]["updates"]) == (0.5, None)
    assert stored["task"]["puzzle_options"] == options
    assert stored["slsam"] == {"design": "depth", "cost_budget": 0.75}
    assert not {"steps", "label_noise", "quantize"} & {*stored, *stored["task"], *stored["training"]}


def test_fields_that_come_later_are_in_a_row_only_where_they_are_not_at_their_default() -> None:
    @dataclass(frozen=True)
    class Later(TrainingSettings):
        neftune: float | None = None
        names: tuple[str, ...] = ()
        options: dict[str, int] = field(default_factory=dict)

    always = IN_EVERY_ROW[TrainingSettings]
    assert in_row(plain_values(Later(steps=3)), Later, always) == plain_values(TrainingSettings(steps=3))
    assert in_row(plain_values(Later(steps=3, neftune=5.0)), Later, always)["neftune"] == 5.0
    for kind, names in IN_EVERY_ROW.items():
        assert set(names) <= {f.name for f in fields(kind)}


def test_a_mapping_without_method_means_the_defaults_it_was_made_with() -> None:
    """For ever: neither `SLSAMConfig`'s own default nor a field that changes nothing else may alter it."""
    parts = {"bandit": "scale_free", "design": "bernoulli", "ascent": "two_pass", "descent": "active", "rho": 0.05}
    for values in ({}, {"rho": 0.5}, {"min_probability": 0.2}, {"granularity": "module", "method": None}):
        made = slsam_config(values).resolved
        assert made.method is None
        assert {name: getattr(made, name) for name in parts} == {**parts, "rho": values.get("rho", 0.05)}
        assert (made.fraction, made.ascent_fraction, made.loss_rise) == (0.2, 0.25, None)
    said = slsam_config({"loss_rise": 0.3, "ascent": "partial", "ascent_sequences": 2, "cost_budget": 0.9}).resolved
    assert (said.rho, said.loss_rise, said.ascent_sequences, said.ascent_fraction) == (None, 0.3, 2, None)
    assert (said.active_fraction, said.cost_budget, said.radius) == (None, 0.9, "loss_rise")
    assert slsam_config({"radius": "length"}).resolved.rho == 0.05
    auto = slsam_config({"method": "auto"}, seed=3)
    assert auto == SLSAMConfig(method="auto", seed=3)


def test_the_mapping_of_a_method_is_stored_as_it_was_written() -> None:
    methods = {**values()["methods"], "auto": {"learning_rates": [1e-3, 2e-3], "slsam": {"method": "auto"}}}
    plan = Plan(settings(methods=methods), {**COSTS, "auto": 1.25})
    stored = {
        name: row_settings(plan.job("docs", name, "steps", Candidate(1e-3), 0).settings)["slsam"] for name in methods
    }
    assert stored == {name: how.get("slsam") for name, how in methods.items()}


def test_tuning_comes_first_and_chooses_the_learning_rate(tmp_path: Path) -> None:
    plan = Plan(settings(match=["steps"]), COSTS)
    first = list(plan.pending({}))
    assert {job.settings["seed"] for job in first} == {9}
    assert {job.settings["split"] for job in first} == {"validation"}
    assert plan.counts({}) == (0, 6 + 9)
    rows = finished(plan, tmp_path).read()
    assert plan.best(rows, "docs", "plain", "steps").rate == 2e-4
    assert plan.counts(rows) == (15, 15)
    reported = [row["settings"] for row in rows.values() if row["settings"]["seed"] != 9]
    assert {(s["split"], s["learning_rate"]) for s in reported} == {("test", 2e-4), ("test", 2e-3)}
    assert [s["seed"] for s in reported] == [0] * 3 + [1] * 3 + [2] * 3  # partial results are balanced


def test_radii_are_chosen_with_learning_rates(tmp_path: Path) -> None:
    def best_at_the_smaller_radius(job: dict[str, Any], report: Any) -> dict[str, Any]:
        rho = (job["slsam"] or {}).get("rho", 0.0) + (job["random_rho"] or 0.0)
        return {**scored(job), "loss": 3.0 + rho}

    methods = {
        "plain": {"learning_rates": [1e-4, 2e-4]},
        "sam": {"learning_rates": [1e-3], "rhos": [0.5, 0.1], "slsam": {"active_fraction": 1.0}},
        "random": {"learning_rates": [1e-3], "rhos": [0.5, 0.1], "random_rho": 0.5},
    }
    plan, store = (
        Plan(settings(methods=methods, match=["steps"]), {**COSTS, "random": 1.0}),
        RowStore(tmp_path / "rows"),
    )
    while next_row(plan, store, lambda *_: None, best_at_the_smaller_radius) is not None:
        pass
    chosen = {line.method: line.chosen for line in build_report(plan, store.read())}
    assert chosen == {"plain": Candidate(1e-4), "sam": Candidate(1e-3, 0.1), "random": Candidate(1e-3, 0.1)}
    with pytest.raises(UserError, match="plain LoRA has no radius"):
        settings(methods={"plain": {"learning_rates": [1e-3], "rhos": [0.1]}})


def test_rises_of_the_loss_are_chosen_with_learning_rates(tmp_path: Path) -> None:
    def best_at_the_larger_rise(job: dict[str, Any], report: Any) -> dict[str, Any]:
        return {**scored(job), "loss": 3.0 - (job["slsam"] or {}).get("loss_rise", 0.0)}

    methods = {
        "plain": {"learning_rates": [1e-4, 2e-4]},
        "auto": {"learning_rates": [1e-3], "loss_rises": [0.2, 0.5], "slsam": {"method": "auto"}},
    }
    plan = Plan(settings(methods=methods, match=["epochs"]), {"plain": 1.0, "auto": 1.25})
    rows = rows_by(plan, tmp_path, best_at_the_larger_rise)
    lines = {line.method: line for line in build_report(plan, rows)}
    assert lines["auto"].chosen == Candidate(1e-3, loss_rise=0.5)
    assert "| auto | 0.001, loss rise 0.5 |" in markdown(list(lines.values()), "loss", plan.settings)
    reported = [row["settings"]["slsam"] for row in rows.values() if row["method"] == "auto"][2:]
    assert reported == [{"method": "auto", "loss_rise": 0.5}] * 3


def test_learning_rates_of_all_tasks_can_be_chosen_on_one(tmp_path: Path) -> None:
    tasks = {
        "swapped": {"source": "stdlib_docs", "rows": 8, "label_noise": 0.5},
        "clean": {"source": "stdlib_docs", "rows": 8},
    }
    plan = Plan(settings(tasks=tasks, tuning_task="swapped", match=["steps"]), COSTS)
    rows = finished(plan, tmp_path).read()
    assert {row["task"] for row in rows.values() if row["settings"]["seed"] == 9} == {"swapped"}
    assert plan.best(rows, "clean", "plain", "steps").rate == 2e-4
    assert plan.counts(rows) == (6 + 2 * 9, 6 + 2 * 9)
    assert plan.tasks_to_do(rows) == []
    assert plan.tasks_to_do({}) == ["swapped", "clean"]
    tuned = {key: row for key, row in rows.items() if row["settings"]["seed"] == 9}
    assert plan.tasks_to_do(tuned) == ["swapped", "clean"]
    last = next(job for job in plan.reported(rows, "clean", "sam", "steps") if job.settings["seed"] == 2)
    assert plan.tasks_to_do({key: row for key, row in rows.items() if key != last.key}) == ["clean"]
    diverged = {key: {**row, "error": "NaN"} for key, row in tuned.items()}
    assert plan.tasks_to_do(diverged) == []  # nothing will be scored


def test_runs_are_called_by_what_was_tried() -> None:
    methods = {
        "plain": {"learning_rates": [1e-4, 2e-4]},
        "sam": {"learning_rates": [1e-3], "rhos": [0.1, 0.5], "slsam": {"active_fraction": 1.0}},
        "random": {"learning_rates": [1e-3], "rhos": [0.5, 0.1], "random_rho": 0.2},
        "auto": {"learning_rates": [1e-3], "loss_rises": [0.2, 0.5], "slsam": {"method": "auto"}},
    }
    plan = Plan(settings(methods=methods, match=["steps"]), dict.fromkeys(methods, 1.0))
    assert [run_name(plan, job.task, job.method, job.settings) for job in plan.pending({})] == [
        "docs, plain, learning rate 0.0001, seed 9",
        "docs, plain, learning rate 0.0002, seed 9",
        "docs, sam, learning rate 0.001, rho 0.1, seed 9",
        "docs, sam, learning rate 0.001, rho 0.5, seed 9",
        "docs, random, learning rate 0.001, rho 0.5, seed 9",
        "docs, random, learning rate 0.001, rho 0.1, seed 9",
        "docs, auto, learning rate 0.001, loss rise 0.2, seed 9",
        "docs, auto, learning rate 0.001, loss rise 0.5, seed 9",
    ]


def test_a_single_candidate_needs_no_tuning_run() -> None:
    methods = {
        "plain": {"learning_rates": [1e-4]},
        "sam": {"learning_rates": [1e-3], "rhos": [0.1], "slsam": {"active_fraction": 1.0}},
    }
    plan = Plan(settings(methods=methods, match=["steps"]), dict.fromkeys(methods, 1.0))
    jobs = list(plan.pending({}))
    assert {(job.settings["seed"], job.settings["split"]) for job in jobs} == {
        (s, "test") for s in plan.settings.seeds
    }
    assert plan.best({}, "docs", "sam", "steps") == Candidate(1e-3, 0.1)
    assert plan.counts({}) == (0, len(jobs)) == (0, 2 * len(plan.settings.seeds))
    assert "none was tuned." in markdown(build_report(plan, {}), "loss", plan.settings)


def test_diverged_runs_lose_and_are_not_repeated(tmp_path: Path) -> None:
    def diverges(job: dict[str, Any], report: Any) -> dict[str, Any]:
        return {"error": "NaN"} if job["learning_rate"] in (2e-4, 1e-3, 2e-3) else scored(job)

    plan, store = Plan(settings(match=["steps"]), COSTS), RowStore(tmp_path / "rows.jsonl")
    while next_row(plan, store, lambda *_: None, diverges) is not None:
        pass
    rows = store.read()
    assert plan.best(rows, "docs", "plain", "steps").rate == 1e-4
    assert plan.best(rows, "docs", "sam", "steps") is None
    assert len(rows) == 6 + 3
    lines = {line.method: line for line in build_report(plan, rows)}
    assert lines["sam"].chosen is None
    assert len(lines["plain"].scores["loss"]) == 3


# Rows on disk


COMPLETE = {"loss": 1.0, "accuracy": 0.5, "exact": 0.0, "cost": 1.0, "data": "d"}


def test_rows_survive_a_writer_that_was_killed(tmp_path: Path) -> None:
    store = RowStore(tmp_path / "deep" / "rows.jsonl")
    store.append({"key": "a", **COMPLETE})
    with store.path.open("a") as file:
        file.write('{"key": "b", "lo')
    assert list(store.read()) == ["a"]
    store.append({"key": "c", "error": "it diverged"})
    with store.path.open("a") as file:
        file.write('{"key": ["d"]}\n7\n' + "[" * 100_000 + "\n")
    for broken in ({"loss": "low"}, {"cost": None}, {"data": 7}):
        store.append({"key": "e", **COMPLETE, **broken})
    assert list(store.read()) == ["a", "c"]


def test_claims_exclude_each_other_and_what_is_done(tmp_path: Path) -> None:
    store, other = RowStore(tmp_path / "rows.jsonl"), RowStore(tmp_path / "rows.jsonl")
    with store.claim("a") as ours, other.claim("a") as theirs, other.claim("b") as free:
        assert (ours, theirs, free) == (True, False, True)
    with other.claim("a") as ours:
        assert ours
    store.append({"key": "a", **COMPLETE})
    with other.claim("a") as ours:
        assert not ours


def _work(folder: str) -> None:
    plan, store = Plan(settings(), COSTS), RowStore(Path(folder) / "rows.jsonl")
    while next_row(plan, store, lambda *_: None, scored, wait=0.01) is not None:
        pass


def test_workers_share_the_jobs(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_work, args=(str(tmp_path),)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    keys = [json.loads(line)["key"] for line in lines]
    plan = Plan(settings(), COSTS)
    assert len(keys) == len(set(keys)) == plan.counts(RowStore(tmp_path / "rows.jsonl").read())[1]


# Statistics


@pytest.mark.parametrize(("seeds", "share"), [(12, 0.92), (5, 0.83), (3, 0.70)])
def test_intervals_cover_the_mean_as_often_as_is_said(seeds: int, share: float) -> None:
    """Of 300 samples: bootstrap intervals of few values fall short of 95 %, as the table says; t intervals do not."""
    generator = torch.Generator().manual_seed(1)
    hits = bootstrap_hits = 0
    for _ in range(300):
        sample = dict(enumerate((0.5 + torch.randn(seeds, generator=generator)).tolist()))
        difference = paired_difference(sample, dict.fromkeys(sample, 0.0))
        hits += difference.low <= 0.5 <= difference.high
        bootstrap_hits += difference.bootstrap[0] <= 0.5 <= difference.bootstrap[1]
    assert hits / 300 == pytest.approx(0.95, abs=0.04)
    assert bootstrap_hits / 300 == pytest.approx(share, abs=0.06)


def test_intervals_are_those_of_the_paired_t_test() -> None:
    values = [0.1, -0.2, 0.05, 0.4, 0.3]
    reference = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert t_interval(np.array(values)) == pytest.approx((reference.low, reference.high), rel=1e-9)


def test_difference_is_paired_by_seed() -> None:
    reference = {0: 3.0, 1: 5.0, 2: 9.0, 3: 1.0}
    method = {0: 2.9, 1: 4.88, 2: 8.89, 7: 0.0}
    difference = paired_difference(method, reference)
    assert sorted(difference.values) == [0, 1, 2]
    assert difference.mean == pytest.approx(-0.11)
    assert difference.low <= difference.mean <= difference.high < 0
    assert difference.p < 0.01
    assert paired_difference({5: 1.0}, reference) is None


def test_few_or_equal_seeds_give_no_false_certainty() -> None:
    one = paired_difference({0: 1.0}, {0: 2.0})
    assert math.isnan(one.low)
    assert math.isnan(one.p)
    assert math.isnan(paired_difference({0: 1.0, 1: 1.1}, {0: 2.0, 1: 2.0}).p)
    assert math.isnan(paired_difference(dict.fromkeys(range(5), 1.0), dict.fromkeys(range(5), 2.0)).p)
    equal = paired_difference({0: 1.0, 1: 2.0, 2: 3.0}, {0: 1.0, 1: 2.0, 2: 3.0})
    assert (equal.low, equal.mean, equal.high, equal.p) == (0.0, 0.0, 0.0, 1.0)


def test_the_primary_method_keeps_its_own_p_value(tmp_path: Path) -> None:
    plan = Plan(settings(match=["cost"]), COSTS)
    rows = finished(plan, tmp_path).read()
    for primary, corrected in ((None, {"sam", "cheap"}), ("sam", set())):
        plan = Plan(settings(match=["cost"], primary=primary), COSTS)
        lines = [line for line in build_report(plan, rows) if line.differences]
        raised = {x.method for x in lines if x.corrected["loss"] > x.differences["loss"].p}
        assert raised <= corrected
        assert bool(raised) == bool(corrected)
        assert ("uncorrected that of 'sam'" in markdown(lines, "loss", plan.settings)) == (primary is not None)
    with pytest.raises(ValueError, match="primary='plain'"):
        replace(plan.settings, primary="plain")
    with pytest.raises(ValueError, match="primary='sam': there is no method beside reference='plain'"):
        replace(plan.settings, primary="sam", methods={"plain": plan.settings.methods["plain"]})


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


@given(st.lists(st.floats(0, 1) | st.just(math.nan), max_size=12))
def test_holm_keeps_order_and_never_lowers(p_values: list[float]) -> None:
    corrected = holm(p_values)
    pairs = [(p, c) for p, c in zip(p_values, corrected, strict=True) if not math.isnan(p)]
    assert all(p <= c <= 1.0 for p, c in pairs)
    assert [c for _, c in sorted(pairs)] == sorted(c for _, c in pairs)
    assert all(math.isnan(c) for p, c in zip(p_values, corrected, strict=True) if math.isnan(p))


# Report


def test_report_says_what_the_rows_say(tmp_path: Path) -> None:
    plan = Plan(settings(), COSTS)
    rows = finished(plan, tmp_path).read()
    lines = {(line.method, line.match): line for line in build_report(plan, rows)}
    sam = lines["sam", "cost"]
    assert (sam.chosen.rate, sam.steps, sam.failed) == (2e-3, 6, 0)
    assert sam.differences["loss"].mean == pytest.approx(-0.1 - 0.001 - 2e-3 + 2e-4)
    assert sam.differences["loss"].high < 0
    assert not lines["plain", "cost"].differences
    assert sam.corrected["loss"] >= sam.differences["loss"].p


@pytest.mark.parametrize("name", ["[/a] method " + "with a long name " * 3, "a_method_of_one_word_" * 3])
def test_report_is_complete_on_80_columns(name: str, tmp_path: Path) -> None:
    plan = Plan(settings(), COSTS)
    rows = finished(plan, tmp_path).read()
    lines = [replace(line, method=name, task="[/sums] [b]") for line in build_report(plan, rows)]
    lines[1] = replace(lines[1], scores={metric: {1: 0.5} for metric in lines[1].scores}, failures=frozenset({0}))
    lines[2] = replace(lines[2], chosen=None, cost=None, scores={metric: {} for metric in lines[2].scores})
    sam = next(line for line in lines[3:] if line.differences)
    console = Console(width=80, record=True)
    for table in tables(lines, "loss", replace(plan.settings, tuning_task="docs")):
        console.print(table)
    text = console.export_text()
    assert "…" not in text
    squeezed = "".join(line.split("│")[1].replace(" ", "") for line in text.splitlines() if "│" in line)
    assert squeezed.count(name.replace(" ", "")) == len(lines)
    interval = f"[{sam.differences['loss'].low:+.4f}, {sam.differences['loss'].high:+.4f}]"
    count = len(plan.settings.seeds)
    for part in (f"lr {sam.chosen.rate:g}", "lr open", interval, f"1 of {count} seeds", f"0 of {count}", "1 failed"):
        assert part in text, part
    assert "[/sums] [b], equal" in text
    assert "x -" not in text


def test_report_of_unfinished_rows_has_gaps() -> None:
    plan = Plan(settings(), COSTS)
    text = markdown(build_report(plan, {}), "loss", plan.settings)
    assert text.count("| open |") == 6
    assert "| nan |" not in text
    assert len(tables(build_report(plan, {}), "exact", plan.settings)) == 2


def test_names_do_not_break_the_markdown(tmp_path: Path) -> None:
    plan = Plan(settings(), COSTS)
    lines = build_report(plan, finished(plan, tmp_path).read())
    text = markdown([replace(line, method="a|b\nc", task="d\ne") for line in lines], "loss", plan.settings)
    assert text.count("| a\\|b c |") == len(lines)
    assert "### d e, equal cost" in text


def test_rows_of_different_data_are_not_compared(tmp_path: Path) -> None:
    plan = Plan(settings(), COSTS)
    store = finished(plan, tmp_path)
    job = plan.job("docs", "sam", "cost", Candidate(2e-3), 1)
    store.append({**store.read()[job.key], "data": "other"})
    with pytest.raises(UserError, match="seed 1"):
        build_report(plan, store.read())


# The forest plot


def texts(figure: Any) -> list[Any]:
    """Every text of a figure that is drawn."""
    FigureCanvasAgg(figure).draw()
    return [t for t in figure.findobj(Text) if t.get_text().strip() and t.get_visible()]


def test_plot_has_the_best_methods_on_top_and_a_panel_for_each_task(tmp_path: Path) -> None:
    tasks = {"swapped": {"source": "stdlib_docs", "rows": 8, "label_noise": 0.5}, "clean": values()["tasks"]["docs"]}
    plan = Plan(settings(tasks=tasks, match=["cost"]), COSTS)
    lines = build_report(plan, finished(plan, tmp_path).read())
    cheap = next(line for line in lines if (line.task, line.method) == ("clean", "cheap"))
    worst = paired_difference({0: 9.0, 1: 9.1, 2: 9.3}, {0: 1.0, 1: 1.0, 2: 1.0})
    lines[lines.index(cheap)] = replace(cheap, differences={"loss": worst, "exact": worst})
    panels = [lines[1:3], lines[4:6]]
    assert [[line.method for line in by_effect(panel, "loss")] for panel in panels][1] == ["sam", "cheap"]
    assert by_effect(panels[1], "exact")[0].method == "cheap"  # there more is better
    assert by_effect([replace(lines[1], differences={}), lines[2]], "loss")[1].method == lines[1].method
    figure = forest_plot(lines, "loss", plan.settings)
    assert len(figure.axes) == 2
    assert all(axes.lines[0].get_xdata() == [0.0, 0.0] for axes in figure.axes)
    heights = {t.get_text(): t.get_window_extent().y0 for t in texts(figure) if t.axes is figure.axes[1]}
    assert heights["sam"] > heights["cheap"]
    assert heights["sam"] == pytest.approx(heights["6 x 1.00"], abs=5)
    assert "plain" not in heights


@pytest.mark.parametrize("name", ["sam", "a method with a long name " * 4, "one_long_word_" * 9, "[/random] $x_{"])
def test_texts_of_the_plot_do_not_touch(name: str, tmp_path: Path) -> None:
    plan = Plan(settings(), COSTS)
    lines = [
        replace(line, method=name) if line.method == "sam" else line
        for line in build_report(plan, finished(plan, tmp_path).read())
    ]
    lines[-1] = replace(lines[-1], differences={}, steps=None, cost=None)
    drawn = texts(forest_plot(lines, "loss", plan.settings))
    boxes = [t.get_window_extent() for t in drawn]
    width, height = drawn[0].get_figure().bbox.size
    for i, box in enumerate(boxes):
        assert min(box.x0, box.y0, width - box.x1, height - box.y1) >= 0, drawn[i]
        touching = [drawn[j] for j in range(i) if box.overlaps(boxes[j])]
        assert not touching, (drawn[i], touching)
    assert any(t.get_text().endswith("(1 more without a result yet)") for t in drawn)
    none = [replace(line, differences={}) for line in lines]
    assert "no result yet" in {t.get_text() for t in texts(forest_plot(none, "loss", plan.settings))}


def test_plot_is_the_same_each_time(tmp_path: Path) -> None:
    plan = Plan(settings(), COSTS)
    lines = build_report(plan, finished(plan, tmp_path).read())
    assert draw(lines, "exact", plan.settings, ".svg") == draw(lines, "exact", plan.settings, ".svg")
    assert draw(build_report(plan, {}), "loss", plan.settings, ".png").startswith(b"\x89PNG")


# A report from rows alone


def counted(job: dict[str, Any], report: Any = None) -> dict[str, Any]:
    """A made-up result with a cost that is near the expected one, as drawn blocks give."""
    cost = 1.0 if job["slsam"] is None else 0.75 if "cost_budget" in job["slsam"] else 2.0
    return {**scored(job), "cost": cost * (1 + 0.01 * (job["seed"] % 3 - 1))}


def rows_by(plan: Plan, folder: Path, run: Any = counted) -> dict[str, dict[str, Any]]:
    """All rows of a plan, from a file of their own."""
    store = RowStore(folder / "rows.jsonl")
    while next_row(plan, store, lambda *_: None, run) is not None:
        pass
    return store.read()


def test_rows_alone_give_the_report_that_costs_give(tmp_path: Path) -> None:
    plan = Plan(settings(), COSTS)
    rows = rows_by(plan, tmp_path)
    recorded = RecordedPlan(plan.settings, rows)
    assert [recorded.steps(*cell) for cell in plan.cells()] == [plan.steps(*cell) for cell in plan.cells()]
    assert build_report(recorded, rows) == build_report(plan, rows)
    assert recorded.counts(rows) == plan.counts(rows)


def test_rows_alone_give_the_report_of_a_comparison_in_progress(tmp_path: Path) -> None:
    """At every moment: a line is the same, but for the number of steps of a method without a row."""
    plan = Plan(settings(), COSTS)
    rows = rows_by(plan, tmp_path)
    for count in range(len(rows) + 1):
        some = dict(list(rows.items())[:count])
        for known, line in zip(
            build_report(plan, some), build_report(RecordedPlan(plan.settings, some), some), strict=True
        ):
            assert line == replace(known, steps=line.steps)
            has_rows = any(job.key in some for job in plan.tuning(line.task, line.method, line.match))
            assert line.steps == known.steps or (line.steps is None and not has_rows)
    nothing = build_report(RecordedPlan(plan.settings, {}), {})
    text = markdown(nothing, "loss", plan.settings)
    assert text.count("| open |") == 6
    assert "None" not in text
    assert len(tables(nothing, "loss", plan.settings)) == 2


def test_rows_say_the_steps_where_expected_costs_have_changed(tmp_path: Path) -> None:
    """What a step is expected to cost may change; runs that exist are not done again beside themselves."""
    before, now = {"plain": 1.0, "sam": 2.2, "cheap": 0.72}, COSTS
    old = Plan(settings(), before)
    rows = rows_by(old, tmp_path, lambda job, report: {**counted(job), "cost": 1.0 if job["slsam"] is None else 2.2})
    rows = {key: row for key, row in rows.items() if row["method"] != "cheap"}
    plan = RecordedPlan(settings(), rows, now)
    assert [old.steps("docs", name, "cost") for name in now] == [12, 5, 17]
    assert [plan.steps("docs", name, "cost") for name in now] == [12, 5, 16]  # no row says so: as expected now
    assert plan.counts(rows)[0] == len(rows)
    assert {job.method for job in plan.pending(rows)} == {"cheap"}


def test_a_run_at_equal_steps_is_not_one_at_equal_cost_where_costs_are_known(tmp_path: Path) -> None:
    """However near the numbers are: a comparison that was stopped in between goes on as it began."""
    costs = {**COSTS, "cheap": 0.9}
    rows = rows_by(Plan(settings(match=["steps"]), costs), tmp_path, scored)
    rows = {key: {**row, "cost": costs[row["method"]]} for key, row in rows.items()}
    training = {"steps": 12}
    plan = RecordedPlan(settings(training=training, match=["steps", "cost"]), rows, costs)
    assert plan.steps("docs", "cheap", "cost") == 13


def test_runs_at_equal_steps_are_not_taken_for_those_at_equal_cost(tmp_path: Path) -> None:
    rows = rows_by(Plan(settings(match=["steps"]), COSTS), tmp_path)
    recorded = RecordedPlan(settings(), rows)
    assert [recorded.steps("docs", method, "cost") for method in COSTS] == [12, None, None]
    lines = {(line.method, line.match): line for line in build_report(recorded, rows)}
    assert len(lines["sam", "steps"].scores["loss"]) == 3
    assert (lines["sam", "cost"].scores["loss"], lines["sam", "cost"].chosen) == ({}, None)


def test_methods_that_differ_in_their_share_of_the_steps_keep_their_own_rows(tmp_path: Path) -> None:
    """Only the number of steps tells their rows apart, and names do not count."""
    methods = values()["methods"]
    methods["half"] = {**methods["sam"], "steps_share": 0.5}
    plan = Plan(settings(methods=methods, match=["cost"]), {**COSTS, "half": 2.0})
    rows = {key: {**row, "method": "?", "task": "?"} for key, row in rows_by(plan, tmp_path).items()}
    recorded = RecordedPlan(plan.settings, rows)
    assert [recorded.steps("docs", method, "cost") for method in methods] == [12, 6, 16, 3]
    assert build_report(recorded, rows) == build_report(plan, rows)


def test_rows_alone_are_enough_where_every_run_has_diverged(tmp_path: Path) -> None:
    def diverges(job: dict[str, Any], report: Any) -> dict[str, Any]:
        return counted(job) if job["slsam"] is None else {"error": "NaN"}

    methods = {name: {**how, "learning_rates": [1e-3]} for name, how in values()["methods"].items()}
    for match in (["cost"], ["steps", "cost"]):
        plan = Plan(settings(methods=methods, match=match), COSTS)
        (tmp_path / "-".join(match)).mkdir()
        rows = rows_by(plan, tmp_path / "-".join(match), diverges)
        lines = build_report(RecordedPlan(plan.settings, rows), rows)
        assert lines == build_report(plan, rows)
        assert {line.method: line.failed for line in lines} == {"plain": 0, "sam": 3, "cheap": 3}


def test_rows_of_other_keys_or_shapes_say_nothing_of_steps(tmp_path: Path) -> None:
    plan = Plan(settings(match=["cost"]), COSTS)
    rows = rows_by(plan, tmp_path)
    for change in ({"key": "0"}, {"settings": None}, {"settings": {"updates": 6}}):
        foreign = {f"{i}": {**row, **change} for i, row in enumerate(rows.values())}
        assert RecordedPlan(plan.settings, foreign).steps("docs", "sam", "cost") is None


REPORT_ALONE = """
import importlib.abc, socket, sys, time

class Heavy(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "datasets", "peft", "trl", "huggingface_hub"}:
            raise AssertionError(f"a report imports {name}")

def no_network(*_, **__):
    raise AssertionError("a report opens a connection")

sys.meta_path.insert(0, Heavy())
socket.socket = socket.create_connection = socket.getaddrinfo = no_network
from slsam_peft.cli.main import main
code = main(["compare", "--report", *sys.argv[1:]])
print("CPU seconds:", time.process_time())
sys.exit(code)
"""


def test_a_report_needs_no_model_no_network_and_no_training_library(tmp_path: Path) -> None:
    config = Path(__file__).resolve().parents[2] / "recipes" / "compare" / "sums.yaml"
    home = tmp_path / "home"
    home.mkdir()
    unset = {"HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"}
    done = subprocess.run(
        [sys.executable, "-c", REPORT_ALONE, "--config", str(config), "--table", str(tmp_path / "t.md")],
        env={**{k: v for k, v in os.environ.items() if k not in unset}, "HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not list(home.iterdir())
    assert "| dense SAM | 0.001, rho 0.1 | 2.016 | 48 |" in (tmp_path / "t.md").read_text()
    assert float(done.stdout.rpartition("CPU seconds:")[2]) < 3.0


# Tasks


def test_docs_are_split_and_reproducible() -> None:
    task = settings(tasks={"d": {"source": "stdlib_docs", "rows": 16, "label_noise": 0.25}}).tasks["d"]
    data, again, other = load_task(task, 0), load_task(task, 0), load_task(task, 1)
    assert data == again
    assert data.train != other.train
    assert (data.test, data.validation) == (other.test, other.validation)
    assert (len(data.train), len(data.validation), len(data.test)) == (16, 96, 128)
    texts = [json.dumps(pair) for pair in data.validation + data.test]
    assert len(set(texts)) == len(texts)
    clean = load_task(settings(tasks={"d": {"source": "stdlib_docs", "rows": 16}}).tasks["d"], 0)
    assert sum(a != b for a, b in zip(data.train, clean.train, strict=True)) == 4


def test_puzzles_are_split_and_reproducible() -> None:
    pytest.importorskip("reasoning_gym")
    options = {"source": "reasoning_gym", "puzzle": "chain_sum", "rows": 32, "test_rows": 16, "validation_rows": 8}
    task = settings(tasks={"d": options}).tasks["d"]
    data, other = load_task(task, 0), load_task(task, 1)
    assert data == load_task(task, 0)
    assert (data.test, data.validation) == (other.test, other.validation)
    questions = [pair[0][0]["content"] for pair in data.train + data.validation + data.test]
    assert len(set(questions)) == len(questions) == 56
    assert not {str(pair) for pair in data.train} & {str(pair) for pair in other.train}
    assert all(answer.lstrip("-").isdigit() for _, answer in data.test)


def test_rows_that_were_made_with_shared_puzzles_keep_their_keys() -> None:
    """A stride of 1 is what rows without one had: nearly all puzzles of a seed are those of the next one."""
    pytest.importorskip("reasoning_gym")
    options = {"source": "reasoning_gym", "puzzle": "chain_sum", "rows": 32, "test_rows": 16, "validation_rows": 8}
    shared, own = (settings(tasks={"d": {**options, **more}}) for more in ({"seed_stride": 1}, {}))
    one, two = ({str(pair) for pair in load_task(shared.tasks["d"], seed).train} for seed in (3, 4))
    assert len(one & two) == 31
    rows = [row_settings(Plan(s, COSTS).job("d", "plain", "cost", Candidate(1e-4), 3).settings) for s in (shared, own)]
    assert "seed_stride" not in rows[0]["task"]
    assert rows[1]["task"].pop("seed_stride") == SEED_STRIDE
    assert rows[0] == rows[1]
    with pytest.raises(ValueError, match="seed_stride=1.*reasoning_gym"):
        TaskSettings(source="stdlib_docs", rows=8, seed_stride=1)


@pytest.mark.parametrize(
    ("puzzle", "options", "message"),
    [
        ("chain_summ", {}, "chain_sum"),
        ("chain_sum", {"min_terms": 0}, "min_terms"),
        ("chain_sum", {"no_such_option": 1}, "no_such_option"),
        ("simple_equations", {"operators": ["+", "-"]}, "number of weights"),  # found out by the first puzzle only
        ("coin_flip", {"min_trials": 1, "max_trials": 1}, "different questions"),
    ],
)
def test_puzzles_that_cannot_be_made_are_named(puzzle: str, options: dict[str, Any], message: str) -> None:
    pytest.importorskip("reasoning_gym")
    values = {"source": "reasoning_gym", "puzzle": puzzle, "puzzle_options": options, "rows": 32}
    with pytest.raises(UserError, match=f"{puzzle}.*{message}"):
        load_task(settings(tasks={"d": values}).tasks["d"], 0)


@given(st.integers(2, 40), st.integers(0, 5))
def test_swapped_answers_are_wrong_and_the_same_ones(count: int, seed: int) -> None:
    pairs = [(str(i), str(i)) for i in range(count)]
    swapped = swap_answers(pairs, 1.0, seed)
    assert [question for question, _ in swapped] == [question for question, _ in pairs]
    assert sorted(answer for _, answer in swapped) == sorted(answer for _, answer in pairs)
    assert all(question != answer for question, answer in swapped)
    assert swap_answers(pairs, 0.0, seed) == pairs
