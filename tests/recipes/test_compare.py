"""`slsam-peft compare` on a tiny model: every method runs, a second start repeats nothing, the results are written."""

import hashlib
import importlib.metadata
import json
import math
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GPT2Config, TrainerCallback

from slsam_peft.data.scoring import Tokens, score, tokenize
from slsam_peft.errors import UserError
from slsam_peft.models.shapes import BUILT_IN
from slsam_peft.runs.compare import run as run_module
from slsam_peft.runs.compare.checks import _check_rows
from slsam_peft.runs.compare.jobs import Plan, row_settings
from slsam_peft.runs.compare.methods import Candidate
from slsam_peft.runs.compare.reading import parse_settings, read_settings
from slsam_peft.runs.compare.recorded import RecordedPlan
from slsam_peft.runs.compare.report import build_report
from slsam_peft.runs.compare.run import build_trainer, expected_costs, load_model, row_order
from slsam_peft.runs.compare.settings import QUANTIZATIONS, TrainingSettings
from slsam_peft.runs.compare.store import RowStore
from slsam_peft.runs.compare.tasks import TaskData, load_task
from slsam_peft.runs.compare.worker import next_row
from tests.recipes import evidence, first_screen
from tests.recipes.commands import compare, compare_words

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes" / "compare").glob("*.yaml"))
BEGUN = [path for path in RECIPES if (path.parent / "rows" / f"{path.stem}.jsonl").exists()]
# Comparisons whose rows name a method; they grow. The names are beginnings.
GROWING = (
    "amazon",
    "auto",
    "backdoor",
    "fresh",
    "gemma",
    "instructions",
    "larger",
    "nf4",
    "raters",
    "rivals",
    "tweets",
)


RANDOM = "[/random] $x_{"  # a name that rich and matplotlib would take for markup


def comparison(model: Path, data: Path, **changes: object) -> dict:
    """A comparison of four methods on a file."""
    return {
        "model": str(model),
        "training": {"steps": 3, "batch_size": 2, "max_length": 48, "lora_r": 2},
        "tasks": {"sums": {"source": "jsonl", "file": str(data), "rows": 6, "validation_rows": 2, "test_rows": 4}},
        "methods": {
            "plain": {"learning_rates": [1e-2, 2e-2]},
            "sam": {"learning_rates": [1e-2, 2e-2], "slsam": {"rho": 0.05, "active_fraction": 1.0}},
            "depth": {"learning_rates": [1e-2, 2e-2], "slsam": {"rho": 0.05, "design": "depth", "cost_budget": 1.0}},
            RANDOM: {"learning_rates": [1e-2, 2e-2], "random_rho": 0.05},
        },
        "seeds": [0, 1],
        "tuning_seed": 7,
        "match": ["steps", "cost"],
        **changes,
    }


def rows_of(folder: Path) -> list[dict]:
    """The rows written so far."""
    return [json.loads(line) for line in (folder / "rows" / "small.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, chats: Path) -> Path:
    """A folder in which a comparison has been stopped after three runs and taken up again."""
    folder = tmp_path_factory.mktemp("comparison")
    values = comparison(tiny_model, chats)
    assert compare(folder, values, "--limit", "3") == 0
    assert len(rows_of(folder)) == 3
    assert compare(folder, values, "--table", str(folder / "t.md"), "--plot", str(folder / "p.png")) == 0
    return folder


def test_each_run_has_one_row(done: Path) -> None:
    rows = rows_of(done)
    assert len({row["key"] for row in rows}) == len(rows)
    # A step of dense SAM costs two plain ones (3 / 2 is rounded): no other method gets another number at equal cost.
    assert sorted(row["method"] for row in rows) == sorted(["plain", "depth", RANDOM] * 4 + ["sam"] * 8)
    assert {row["settings"]["updates"] for row in rows if row["method"] == "sam"} == {3, 2}


def test_costs_are_counted(done: Path) -> None:
    costs = {row["method"]: row["cost"] for row in rows_of(done)}
    assert costs["plain"] == costs[RANDOM] == 1.0
    assert costs["sam"] == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize("quantize", QUANTIZATIONS)
def test_methods_start_from_the_same_adapter_and_batches(
    quantize: str, tmp_path: Path, tiny_model: Path, chats: Path
) -> None:
    values = comparison(tiny_model, chats)
    values["training"]["quantize"] = quantize
    settings = parse_settings(values)
    plan = Plan(settings, dict.fromkeys(settings.methods, 1.0))
    seen = []
    for method in settings.methods:
        job = plan.job("sums", method, "steps", Candidate(1e-2), 3)
        model, tokenizer = load_model(settings.model, settings.training)
        pairs = load_task(settings.tasks["sums"], 3).train
        rows = [tokenize(tokenizer, pair, 48) for pair in pairs]
        trainer = build_trainer(model, tokenizer, rows, job.settings, str(tmp_path), lambda *_: None)
        adapter = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        batches = [{k: v.clone() for k, v in batch.items()} for batch in trainer.get_train_dataloader()]
        seen.append((adapter, batches))
    adapter, batches = seen[0]
    assert {weight.dtype for weight in adapter.values()} == {torch.float32}
    assert len(batches) == 3
    assert [b["input_ids"][0, :4].tolist() for b in batches] == [rows[i].ids[:4] for i in (0, 2, 4)]
    for other_adapter, other_batches in seen[1:]:
        torch.testing.assert_close(other_adapter, adapter, rtol=0, atol=0)
        torch.testing.assert_close(other_batches, batches, rtol=0, atol=0)


def test_scores_are_those_of_the_model_and_of_greedy_decoding(tiny_model: Path) -> None:
    """The loss is the model's own on each row by itself, and an exact answer is one that greedy decoding gives."""
    model, tokenizer = load_model(str(tiny_model), TrainingSettings(steps=1))
    prompts = [[{"role": "user", "content": text}] for text in ("a", "bcd", "efghijk", "l m")]
    rows = [tokenize(tokenizer, (prompt, "xyz"), 64) for prompt in prompts]
    starts = [row.ids[: row.prompt] for row in rows]
    answers = [model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)[0].tolist() for ids in starts]
    rows[1], rows[2] = (Tokens(answers[i], len(starts[i])) for i in (1, 2))
    total = count = 0.0
    for row in rows:
        labels = torch.tensor([[-100] * row.prompt + row.ids[row.prompt :]])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([row.ids]), labels=labels).loss
        total += float(loss) * (len(row.ids) - row.prompt)
        count += len(row.ids) - row.prompt
    result = score(model, rows)
    assert result.loss == pytest.approx(total / count, rel=1e-5)
    assert (result.tokens, result.exact) == (count, 0.5)


def test_cut_answers_keep_the_prompt_apart(tiny_model: Path) -> None:
    _, tokenizer = load_model(str(tiny_model), TrainingSettings(steps=1))
    row = tokenize(tokenizer, ("abc", "xyz"), 5)
    assert row.columns()["completion_mask"] == [0, 0, 0, 1, 1]
    formatted = tokenize(tokenizer, ([{"role": "user", "content": "abc"}], "xyz"), 64, "Q: {} A: ")
    assert tokenizer.decode(formatted.ids) == "Q: abc A: xyz<eos>"


def test_random_perturbation_has_its_norm_and_leaves_weights(tmp_path: Path, tiny_model: Path, chats: Path) -> None:
    settings = parse_settings(comparison(tiny_model, chats))
    job = Plan(settings, dict.fromkeys(settings.methods, 1.0)).job("sums", RANDOM, "steps", Candidate(1e-2), 3)
    model, tokenizer = load_model(settings.model, settings.training)
    rows = [tokenize(tokenizer, pair, 48) for pair in load_task(settings.tasks["sums"], 3).train]
    trainer = build_trainer(model, tokenizer, rows, job.settings, str(tmp_path), lambda *_: None)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    inside, after = [], []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *_: object, **__: object) -> None:
            after.append([p.detach().clone() for p in trained])

    trainer.add_callback(Watch())
    trainer.model.register_forward_pre_hook(lambda *_: inside.append([p.detach().clone() for p in trained]))
    trainer.train()
    norm = sum(float((s - b).square().sum()) for s, b in zip(inside[0], before, strict=True)) ** 0.5
    assert norm == pytest.approx(settings.methods[RANDOM].random_rho, rel=1e-4)
    torch.testing.assert_close(after[0], before, rtol=0, atol=0)


def test_outputs_are_written(done: Path) -> None:
    text = (done / "t.md").read_text()
    assert text.count("| sam |") == 2
    assert "sums, equal cost" in text
    assert (done / "p.png").read_bytes().startswith(b"\x89PNG")


def test_differences_to_another_method_are_shown(
    done: Path, tiny_model: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = comparison(tiny_model, chats, primary="sam")
    assert compare(done, values, "--report", "--reference", "sam") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Differences are to 'sam', paired by seed" in out
    assert "uncorrected" not in out  # the primary method is what the others are compared with
    with pytest.raises(UserError, match="--reference: reference='sum' is not"):
        compare(done, values, "--report", "--reference", "sum")
    with pytest.raises(UserError, match="--reference=sam belongs to --config"):
        compare_words(["--data", str(chats), "--report", "--reference", "sam"])


def test_a_score_that_is_not_finite_is_a_failed_run(
    tmp_path: Path, tiny_model: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = parse_settings(comparison(tiny_model, chats, all_scores=True))
    job = Plan(settings, dict.fromkeys(settings.methods, 1.0)).job("sums", "plain", "steps", Candidate(1e-2), 0)
    unrelated = [Tokens([1, 2, 3], 1)]

    def scored(model: Any, rows: Any, *more: Any) -> Any:
        return SimpleNamespace(loss=math.nan) if rows is unrelated else score(model, rows, *more)

    monkeypatch.setattr(run_module, "passages", lambda tokenizer: unrelated)
    monkeypatch.setattr(run_module, "score", scored)
    assert run_module.run(job.settings) == {"error": "forgetting is not finite after training"}


def test_rows_that_are_trained_on_are_not_scored(tmp_path: Path, tiny_model: Path, chats: Path) -> None:
    leaking = tmp_path / "leaking.jsonl"
    rows = chats.read_text().splitlines()
    leaking.write_text("\n".join([*rows, rows[0]]) + "\n")
    values = comparison(tiny_model, leaking)
    with pytest.raises(UserError, match=r"leaking\.jsonl: 1 training rows ask what a held-out row asks"):
        compare(tmp_path, values)


def test_a_validation_row_that_has_changed_is_found_before_the_next_run(
    tmp_path: Path, tiny_model: Path, chats: Path
) -> None:
    """Learning rates are chosen by it, and neither the training rows nor the test rows tell of it."""
    data = tmp_path / "mine.jsonl"
    rows = [json.loads(row) for row in chats.read_text().splitlines()]
    values = comparison(tiny_model, data)
    task = parse_settings(values).tasks["sums"]

    def write() -> TaskData:
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_task(task, 7)

    before = write()
    assert compare(tmp_path, values, "--limit", "1") == 0
    kept = (tmp_path / "rows" / "small.jsonl").read_bytes()
    question = before.validation[0][0][0]["content"]
    [changed] = [row for row in rows if row["messages"][0]["content"] == question]
    changed["messages"][1]["content"] = "changed"
    assert write().fingerprint() == before.fingerprint()
    with pytest.raises(UserError, match=r"tasks\.sums: the data are not those of row .*mine\.jsonl was changed"):
        compare(tmp_path, values)
    assert (tmp_path / "rows" / "small.jsonl").read_bytes() == kept


def test_finished_comparison_trains_nothing(
    done: Path, tiny_model: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a run was repeated")

    monkeypatch.setattr("slsam_peft.runs.compare.run.run", fail)
    assert compare(done, comparison(tiny_model, chats)) == 0


def test_existing_outputs_are_kept(done: Path, tiny_model: Path, chats: Path) -> None:
    before = (done / "t.md").read_bytes()
    with pytest.raises(UserError, match="--force"):
        compare(done, comparison(tiny_model, chats), "--table", str(done / "t.md"))
    assert (done / "t.md").read_bytes() == before
    assert compare(done, comparison(tiny_model, chats), "--report", "--force", "--table", str(done / "t.md")) == 0


def test_too_few_rows_are_refused(tmp_path: Path, tiny_model: Path, chats: Path) -> None:
    values = comparison(tiny_model, chats)
    values["tasks"]["sums"]["rows"] = 100
    with pytest.raises(UserError, match="6 training rows, and 100 are asked for"):
        compare(tmp_path, values)


def test_models_that_cannot_be_used_are_named(tmp_path: Path, tiny_model: Path, chats: Path) -> None:
    """Weights cut short, and a structure whose cost cannot be counted."""
    broken, odd = tmp_path / "broken", tmp_path / "odd"
    shutil.copytree(tiny_model, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match="broken could not be loaded"):
        compare(tmp_path, comparison(broken, chats))
    GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=64, architectures=["GPT2LMHeadModel"]).save_pretrained(odd)
    values = comparison(odd, chats)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slsam_peft.cost.model.decoder_of", _no_decoder)
        with pytest.raises(UserError, match="odd: what its steps cost cannot be counted: no stack"):
            compare(tmp_path, values)


def _no_decoder(*_: object) -> None:
    raise ValueError("no stack")


def test_only_tasks_with_runs_to_do_are_looked_at(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither file exists: a finished task is not missed, the other one is named."""
    values = comparison(tiny_model, tmp_path / "gone.jsonl")
    task = values["tasks"]["sums"]
    values["tasks"] = {"finished": task, "other": {**task, "rows": 5}}
    settings = parse_settings(values)
    plan, store = Plan(settings, expected_costs(settings)), RowStore(tmp_path / "rows" / "small.jsonl")
    result = {"loss": 1.0, "accuracy": 0.5, "exact": 0.5, "cost": 1.0, "seconds": 1.0, "data": "same"}
    while plan.tasks_to_do(store.read()) != ["other"]:
        next_row(plan, store, lambda *_: None, lambda *_: result)
    with pytest.raises(UserError, match=r"tasks\.other: data file .*gone\.jsonl does not exist"):
        compare(tmp_path, values)
    assert compare(tmp_path, values, "--report") == 0
    while next_row(plan, store, lambda *_: None, lambda *_: result) is not None:
        pass
    assert compare(tmp_path, values) == 0
    assert "other, equal cost" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("messages", "prompt_format", "advice"),
    [
        (1, None, "or set training.prompt_format."),
        (2, None, "a single message, as its prompt and set training.prompt_format."),
        (2, "Q: {} A: ", "a single message, as its prompt."),
    ],
)
def test_advice_on_a_missing_template_is_not_what_is_done_already(
    messages: int, prompt_format: str | None, advice: str, tiny_model: Path
) -> None:
    _, tokenizer = load_model(str(tiny_model), TrainingSettings(steps=1))
    tokenizer.chat_template = None
    pairs = [([{"role": "user", "content": "abc"}] * messages, "xyz")]
    with pytest.raises(UserError) as caught:
        _check_rows(TaskData(pairs, [], []), tokenizer, TrainingSettings(steps=1, prompt_format=prompt_format))
    assert str(caught.value).endswith(advice)


def test_order_of_a_shorter_run_is_the_start_of_that_of_a_longer_one() -> None:
    assert row_order(5, 7, seed=3) == row_order(5, 23, seed=3)[:7]
    assert sorted(row_order(5, 10, seed=3)) == sorted([*range(5), *range(5)])
    assert row_order(5, 10, seed=3) != row_order(5, 10, seed=4)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_accepted_and_name_their_command(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first == f"# slsam-peft compare --config recipes/compare/{path.name}"
    settings = read_settings(path)
    assert settings.reference in settings.methods
    for task in settings.tasks.values():
        data = load_task(task, settings.seeds[0])
        assert (len(data.train), len(data.test)) == (task.rows, task.test_rows)


@pytest.mark.parametrize("path", BEGUN, ids=lambda path: path.stem)
def test_committed_rows_belong_to_their_recipe(path: Path) -> None:
    """Every row is a run of the YAML file above it: its key is the one that file gives."""
    settings = read_settings(path)
    plan = Plan(settings, dict.fromkeys(settings.methods, 1.0))
    rows = RowStore(path.parent / "rows" / f"{path.stem}.jsonl").read()
    assert rows
    for row in rows.values():
        run = row["settings"]
        how = settings.methods[row["method"]]
        tried = how.candidate_of(run)
        assert tried.rho in (how.rhos or (None,))
        assert tried.loss_rise in (how.loss_rises or (None,))
        job = plan.job(row["task"], row["method"], "steps", tried, run["seed"])
        job = replace(job, settings={**job.settings, "steps": run["updates"]})
        assert job.key == row["key"]
        assert row_settings(job.settings) == run


def test_keys_of_committed_rows_are_those_they_were_made_with() -> None:
    keys = [
        json.loads(line)["key"]
        for path in BEGUN
        if not path.stem.startswith(GROWING)
        for line in (path.parent / "rows" / f"{path.stem}.jsonl").read_text().splitlines()
    ]
    digest = hashlib.sha256("".join(sorted(keys)).encode()).hexdigest()[:16]
    assert (len(keys), digest) == (557, "6790d53ec55dccfb")


@pytest.fixture(scope="module")
def smollm2_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with SmolLM2-135M's config, without weights."""
    folder = tmp_path_factory.mktemp("smollm2")
    AutoConfig.for_model(**BUILT_IN["smollm2-135m"]).save_pretrained(folder)
    return folder


# Comparisons that are complete, but for one, are in the slow run.
GOING_ON = ("auto", "backdoor", "raters", "rivals", "sums")


@pytest.mark.parametrize(
    "path",
    [p if p.stem.startswith(GOING_ON) else pytest.param(p, marks=pytest.mark.slow) for p in BEGUN],
    ids=lambda path: path.stem,
)
def test_committed_rows_are_found_whatever_a_step_is_expected_to_cost(path: Path, smollm2_config: Path) -> None:
    """A comparison that goes on, and a report from the rows alone, take every committed row for a run of theirs."""
    settings = read_settings(path)
    rows = RowStore(path.parent / "rows" / f"{path.stem}.jsonl").read()
    costs = expected_costs(replace(settings, model=str(smollm2_config)))
    plan, recorded = RecordedPlan(settings, rows, costs), RecordedPlan(settings, rows)
    sampled = {key for key, row in rows.items() if row["settings"]["slsam"] is not None}  # others cost 1 for ever
    for either in (plan, recorded):
        runs = [job for cell in plan.cells() for job in (*either.tuning(*cell), *either.reported(rows, *cell))]
        assert sampled <= {job.key for job in runs}
    assert plan.counts(rows) == recorded.counts(rows)
    for cell in plan.cells():
        assert recorded.steps(*cell) in (plan.steps(*cell), None)  # None: no run of the method has a row yet
    assert build_report(plan, rows) == [
        replace(line, steps=plan.steps(line.task, line.method, line.match))
        for line in evidence.comparison(path.stem).lines
    ]


# The page of results


PAGE = RECIPES[0].parent / "README.md"


def test_every_number_on_the_page_is_in_the_rows() -> None:
    page = PAGE.read_text()
    assert len(evidence.numbers(page)) > 100
    assert not evidence.mismatches(page)


def test_the_tables_at_the_top_of_the_page_are_what_the_rows_make() -> None:
    page = PAGE.read_text()
    for table in first_screen.tables():
        assert table in page


def test_the_first_screen_of_the_readme_says_what_the_rows_say() -> None:
    readme = (PAGE.parents[2] / "README.md").read_text()
    (status,) = re.findall(r"^- \*\*Status:\*\*.*?(?=\n\n)", readme, re.DOTALL | re.MULTILINE)
    numbers = evidence.NUMBER.findall(status)
    assert len(numbers) >= 6
    assert not evidence.mismatches(status)
    for number in numbers:
        assert evidence.mismatches(status.replace(number, number[:-1] + str((int(number[-1]) + 5) % 10))), number


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_a_number_on_the_page_that_is_not_in_the_rows_is_found(every: int) -> None:
    """A number of a difference or of a table, its last digit changed by two, is reported with its line."""
    page = PAGE.read_text()
    for start, end in evidence.numbers(page)[::every]:
        digit = int(page[end - 1])
        changed = page[: end - 1] + str(digit + 2 if digit < 8 else digit - 2) + page[end:]
        line = page.count("\n", 0, start) + 1
        found = evidence.mismatches(changed)
        assert any(text.startswith((f"line {line}:", f"line {line - 1}:")) for text in found), (page[start:end], line)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("1.09 at 1e-4", "1.19 at 1e-4"),
        ("in 2 of 5 seeds", "in 3 of 5 seeds"),
        ("96.1", "97.1"),
        ("1.051 (27 %)", "1.051 (28 %)"),
        ("1.075 (39 %) with a rise of 0.3", "1.075 (39 %) with a rise of 0.5"),
    ],
)
def test_other_numbers_in_the_text_are_looked_at_too(old: str, new: str) -> None:
    page = PAGE.read_text()
    assert page.count(old) == 1
    assert len(evidence.mismatches(page.replace(old, new))) == 1


def test_comparisons_are_on_the_page_once_they_have_rows() -> None:
    page = PAGE.read_text()
    linked = set(re.findall(r"\]\((\w+\.yaml)\)", page))
    assert linked == {path.name for path in BEGUN}
    assert all(path.stem.startswith(GROWING) for path in set(RECIPES) - set(BEGUN))
    plots = re.findall(r"\]\((plots/\w+\.svg)\)", page)
    assert sorted(plots) == sorted(f"plots/{path.name}" for path in (PAGE.parent / "plots").iterdir())


@pytest.mark.parametrize("command", re.findall(r"^slsam-peft (compare .*--plot .*)$", PAGE.read_text(), re.MULTILINE))
def test_plots_on_the_page_are_what_their_commands_draw(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)
    stored = Path(words[words.index("--plot") + 1])
    page = PAGE.read_text()
    assert page.rindex(f"plots/{stored.name})", 0, page.index(command)) > page.rindex("\n## ", 0, page.index(command))
    words[words.index("--plot") + 1] = str(tmp_path / stored.name)
    words[words.index("--config") + 1] = str(PAGE.parents[2] / words[words.index("--config") + 1])
    assert compare_words(words[1:]) == 0
    kept = (PAGE.parents[2] / stored).read_text()
    if f"Matplotlib v{importlib.metadata.version('matplotlib')}," in kept:  # others may place a text differently
        assert (tmp_path / stored.name).read_text() == kept


@pytest.mark.parametrize("path", BEGUN, ids=lambda path: path.stem)
def test_the_runs_of_a_seed_are_of_one_kind_of_machine(path: Path) -> None:
    """Differences are paired by seed: how a GPU rounds must not be one between methods."""
    devices: dict[tuple[str, int], set[str]] = {}
    for line in (path.parent / "rows" / f"{path.stem}.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "device" in row:
            devices.setdefault((row["task"], row["settings"]["seed"]), set()).add(row["device"])
    assert all(len(names) == 1 for names in devices.values())
