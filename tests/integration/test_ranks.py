"""Two ranks under torchrun (gloo): the same arms, the same adapters, and only active gradients on the wire."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import sharded
from tests.rank_worker import (
    AGAINST_ONE,
    STEPS,
    UNDER_FSDP2,
    WHOLE,
    adapters,
    loss_rise,
    own_loop,
    train_against_one,
)
from tests.tolerances import EXACT_FLOAT64, FLOAT32_NORMS, FUSED_HEAD, TRAJECTORY

pytestmark = pytest.mark.ranks

WORKER = Path(__file__).parents[1] / "rank_worker.py"
LOSSES = 3 * 4  # bytes: what the ranks must agree on besides the gradients
START_SECONDS = 900  # a start imports everything twice, on a machine that may be busy
DEATH_SECONDS = 60  # from the death of a rank to the end of all

# Scenarios that run with `-m slow` alone; the others show each way to shard and each engine once.
SLOW = {
    "bar",
    "bi_lora",
    "flat_lora",
    "obar",
    "asam",
    "neuron",
    "fsdp2, a part",
    "fsdp2, resumed",
    *(f"sharded, {name}" for name in sharded.SHARDED),
}
SLOW -= {"sharded, two passes", "sharded, a part"}


def launch(folder, *scenarios, timeout=START_SECONDS):
    """Run scenarios on two ranks and return the finished process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(WORKER.parents[1]), "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [*command, str(WORKER), str(folder), *scenarios],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="module")
def seen(tmp_path_factory, request):
    """Return a function from a scenario to what each rank reported: `(report, tensors)` twice."""
    folder = tmp_path_factory.mktemp("ranks")
    names = [
        "long",
        *AGAINST_ONE,
        "wire",
        "nan loss",
        "nan gradient",
        "budget",
        "resumed",
        "own loop",
        "loss rise",
        "rides",
        "rides, sampa",
        "uneven",
        *(f"sharded, {name}" for name in sharded.SHARDED),
        *UNDER_FSDP2,
        "fsdp2, resumed",
        "refused",
    ]
    ours = [item for item in request.session.items if item.path == request.path]
    slow = any(item.get_closest_marker("slow") for item in ours)
    done = launch(folder, *(name for name in names if slow or name not in SLOW))
    assert done.returncode == 0, done.stderr[-4000:]

    def read(name):
        return [
            (json.loads((folder / name / f"{r}.json").read_text()), load_file(folder / name / f"{r}.safetensors"))
            for r in range(2)
        ]

    read.folder = folder
    return read


def assert_ranks_agree(ranks):
    """Same active sets, bandit feedback, probabilities and decisions, and adapters equal bit for bit."""
    (one, weights), (two, others) = ranks
    for key in ("masks", "norms", "probabilities", "skipped"):
        assert one[key] == two[key], key
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, others[name]), name


def test_ranks_stay_together(seen):
    ranks = seen("long")
    assert_ranks_agree(ranks)
    report = ranks[0][0]
    assert len(report["masks"]) == STEPS
    assert len({tuple(mask) for mask in report["masks"]}) > 5
    assert report["probabilities"][0] != report["probabilities"][-1]


def test_what_is_logged_is_the_mean_over_ranks(seen):
    """Each rank has a loss of its own; sharpness is that of the whole batch."""
    (one, _), (two, _) = seen("long")
    assert len(one["sharpness"]) == STEPS
    assert one["sharpness"] == two["sharpness"]


def scenarios(names, prefix=""):
    """Parameters of a test, those of slow scenarios marked."""
    return [pytest.param(n, marks=pytest.mark.slow) if prefix + n in SLOW else n for n in names]


@pytest.mark.parametrize("name", scenarios(AGAINST_ONE))
def test_two_ranks_equal_one_process_with_twice_the_batch(name, seen, tmp_path):
    ranks = seen(name)
    assert_ranks_agree(ranks)
    one = train_against_one(name, tmp_path, per_device_train_batch_size=4)
    (report, weights), _ = ranks
    assert report["masks"] == one.seen.masks
    for ours, expected in zip(report["norms"], one.seen.norms, strict=True):
        assert ours == pytest.approx(expected, rel=FUSED_HEAD)
    expected = adapters(one)
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=FUSED_HEAD, atol=FUSED_HEAD, msg=name)
    logged = [log["loss"] for log in one.state.log_history if "loss" in log]
    assert report["losses"] == pytest.approx(logged, rel=FUSED_HEAD)


def test_an_own_loop_equals_one_process_to_rounding(seen):
    """`SLSAM.update` in float64: the first gradient, and eight steps that carry on its rounding."""
    (report, tensors), (other_report, other) = seen("own loop")
    one, expected = own_loop()
    assert report == other_report
    assert report["metrics"] == pytest.approx(one["metrics"], rel=TRAJECTORY)
    assert tensors.keys() == expected.keys() == other.keys()
    for name, value in tensors.items():
        assert torch.equal(value, other[name]), name
        tolerance = EXACT_FLOAT64 if name.startswith("gradient") else TRAJECTORY
        torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance, msg=name)


def test_a_loss_rise_is_that_of_all_ranks_ascent_sequences(seen):
    """Unequal numbers of them on the ranks: one mean over all, one radius, one e."""
    (report, tensors), (other_report, other) = seen("loss rise")
    one, expected = loss_rise()
    assert report == other_report
    assert report["metrics"]["rho"] < 2.0, "the case shows nothing at the longest radius"
    for name in ("rho", "grad_norm_ascent"):
        assert report["metrics"][name] == pytest.approx(one["metrics"][name], rel=TRAJECTORY)
    assert tensors.keys() == expected.keys()
    for name, value in tensors.items():
        assert torch.equal(value, other[name]), name
        torch.testing.assert_close(value, expected[name], rtol=TRAJECTORY, atol=TRAJECTORY, msg=name)


@pytest.mark.parametrize("name", ["rides", "rides, sampa"])
def test_ranks_stay_together_where_one_of_them_stops_riding(name, seen):
    """The next ascent, and SAMPa's second term, are then means over the ranks on which something has ridden along."""
    (one, weights), (two, others) = seen(name)
    assert one["radii"] == two["radii"]
    assert all(0 < rho < 2 for rho in one["radii"][1:]), "the case shows nothing at the longest radius"
    assert one["pairs"] > two["pairs"] == 0
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())
    assert all(one["ahead"] + two["ahead"]), "both look a batch ahead, in the second epoch too"


@pytest.mark.parametrize("name", ["rides", "rides, sampa"])
def test_tokens_that_ride_along_are_counted_in_their_own_step_alone(name, seen):
    """Those of both ranks, and of a step whose look ahead has reached the last rows of the epoch."""
    for report, _ in seen(name):
        lengths = torch.tensor(report["lengths"])
        steps = [lengths[4 * i : 4 * i + 4].sum() for i in range(3)]
        assert report["tokens"][:3] == torch.stack(steps).cumsum(0).tolist()
        assert report["tokens"][4] - report["tokens"][3] == steps[0], "the second epoch begins with the same rows"


def test_ranks_make_e_together_whatever_their_micro_batches_hold(seen):
    """What they exchange between two of these finds both at the same place, and changes nothing."""
    ranks = seen("uneven")
    for counts in ("False", "True"):
        assert_ranks_agree(
            [(report[counts], {n: w for n, w in weights.items() if n.startswith(counts)}) for report, weights in ranks]
        )
    (report, weights), (other, _) = ranks
    assert report["True"]["rho"] == report["False"]["rho"] == other["True"]["rho"]
    assert all(0 < rho < 2 for rho in report["True"]["rho"]), "the case shows nothing at the longest radius"
    assert (report["False"]["seen"], report["True"]["seen"], other["True"]["seen"]) == (0, 2 * 96, 2 * 96)
    for n in [n.removeprefix("True.") for n in weights if n.startswith("True.")]:
        assert torch.equal(weights[f"True.{n}"], weights[f"False.{n}"]), n


def test_only_gradients_of_active_arms_travel(seen):
    """Ascent and descent gradients of the active arms and three losses; DDP's own reducer sends nothing. Everything
    else (parameters at construction, buffers, TRL's counts) is at most what plain training sends.
    """
    for report, _ in seen("wire"):
        plain, ours = report["plain"], report["ours"]
        assert plain["allreduce_"] >= 3 * 4 * report["all"], "a plain step sends every gradient"
        assert ours["allreduce_"] == sum(2 * 4 * size + LOSSES for size in report["active"])
        assert max(report["active"]) < report["all"]
        assert ours.keys() == plain.keys()
        assert ours.pop("barrier") <= 2 * plain.pop("barrier"), "rows are made into sequences, and then cut"
        assert all(ours[kind] <= sent for kind, sent in plain.items() if kind != "allreduce_")


@pytest.mark.parametrize("name", ["nan loss", "nan gradient"])
def test_what_is_not_finite_on_one_rank_skips_the_step_on_all(name, seen):
    """Also where only the loss of one rank is NaN or infinite and every gradient is finite."""
    ranks = seen(name)
    for bad in ("3", "4"):  # passes: the ascent and the descent of the second step
        assert_ranks_agree(
            [(report[bad], {n: w for n, w in weights.items() if n[0] == bad}) for report, weights in ranks]
        )
        for report, _ in ranks:
            assert report[bad]["skipped"] == [0, 1, 1]
            assert report[bad]["kept"]
            assert report[bad]["probabilities"][0] == report[bad]["probabilities"][1]


def test_a_cost_budget_is_solved_once_for_all_ranks(seen):
    ranks = seen("budget")
    assert_ranks_agree(ranks)
    assert ranks[0][0]["budget"] == ranks[1][0]["budget"]


def test_ranks_go_on_bit_for_bit(seen):
    """Each from its own random state; the first rank records the hashes of all their files."""
    for report, weights in seen("resumed"):
        whole, parted = report["whole"], report["parted"]
        assert all(parted[key] == whole[key][-2:] for key in ("masks", "probabilities", "norms", "skipped"))
        assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"} <= set(report["recorded"])
        for name in [n.removeprefix("whole.") for n in weights if n.startswith("whole.")]:
            assert torch.equal(weights[f"whole.{name}"], weights[f"parted.{name}"]), name


@pytest.mark.parametrize("name", scenarios([n for n in sharded.SHARDED if n != "a part"], "sharded, "))
def test_sharded_parameters_train_as_in_one_process(name, seen):
    """FSDP2: draws, norms, losses, gradients and weights of three steps; float64, or float32 on an NF4 base."""
    (report, tensors), (other_report, other) = seen(f"sharded, {name}")
    one, expected = sharded.train(name)
    assert report == other_report
    assert report["masks"] == one["masks"]
    later, first = (FLOAT32_NORMS, FLOAT32_NORMS) if name == "nf4" else (TRAJECTORY, EXACT_FLOAT64)
    for key in ("probabilities", "norms", "losses", "rho"):
        torch.testing.assert_close(torch.tensor(report[key]), torch.tensor(one[key]), rtol=later, atol=later)
    assert tensors.keys() == expected.keys() == other.keys()
    largest = max(float(t.abs().max()) for n, t in expected.items() if n.startswith("0.gradient"))
    for n, tensor in tensors.items():
        assert torch.equal(tensor, other[n]), n
        tolerance = first * largest if n.startswith("0.gradient") else later
        torch.testing.assert_close(tensor, expected[n], rtol=0, atol=tolerance, msg=n)


def test_ranks_with_sharded_parameters_give_as_many_sequences_each(seen):
    """Their first micro-batches have two and one; both run as many passes, and the ascent is the mean over all."""
    (report, tensors), (other_report, _) = seen("sharded, a part")
    assert report == other_report
    names, gradients = sharded.expected_parts(report["masks"])
    for step, found in enumerate(gradients):
        largest = max(float(g.abs().max()) for g in found)
        for name, gradient in zip(names, found, strict=True):
            got = tensors[f"{step}.gradient.{name}"]
            torch.testing.assert_close(got, gradient, rtol=0, atol=EXACT_FLOAT64 * largest, msg=name)


@pytest.mark.parametrize("name", scenarios(UNDER_FSDP2))
def test_what_accelerate_shards_trains_as_under_ddp(name, seen):
    """FSDP2 through the trainer, wrapped by accelerate; it is said to run on accelerators, and runs on CPUs here."""
    (report, tensors), (other_report, other) = seen(name)
    assert report == other_report
    ours, ddp = report["fsdp2"], report["ddp"]
    assert ours["masks"] == ddp["masks"]
    for key in ("norms", "probabilities"):
        for got, expected in zip(ours[key], ddp[key], strict=True):
            assert got == pytest.approx(expected, rel=FUSED_HEAD), key
    assert ours["losses"] == pytest.approx(ddp["losses"], rel=FUSED_HEAD)
    names = [n.removeprefix("ddp.") for n in tensors if n.startswith("ddp.")]
    assert names
    for n in names:
        assert torch.equal(tensors[f"fsdp2.{n}"], other[f"fsdp2.{n}"]), n
        torch.testing.assert_close(tensors[f"fsdp2.{n}"], tensors[f"ddp.{n}"], rtol=FUSED_HEAD, atol=FUSED_HEAD, msg=n)


@pytest.mark.slow
def test_sharded_parameters_go_on_bit_for_bit(seen):
    """FSDP2 by accelerate, from a checkpoint of pieces: with every arm trained each has moments to load."""
    for report, weights in seen("fsdp2, resumed"):
        whole, parted = report["whole"], report["parted"]
        assert all(parted[key] == whole[key][-2:] for key in ("masks", "probabilities", "norms", "skipped"))
        names = [n.removeprefix("whole.") for n in weights if n.startswith("whole.")]
        assert names
        for name in names:
            assert torch.equal(weights[f"whole.{name}"], weights[f"parted.{name}"]), name


def test_sharded_adapters_are_saved_whole(seen):
    _, tensors = seen("fsdp2")[0]
    saved = seen.folder / "fsdp2" / "saved"
    written = load_file(saved / "adapter_model.safetensors")
    assert len(written) == sum(n.startswith("fsdp2.") for n in tensors)
    for n, tensor in written.items():
        path, _, kind = n.rpartition(".")
        assert torch.equal(tensor, tensors[f"fsdp2.{path}.default.{kind}"]), n
    assert json.loads((saved / "slsam.json").read_text())["probe"] is None, "one rank alone cannot run the model"


def test_sharded_parameters_are_refused(seen):
    for report, _ in seen("refused"):
        assert "FSDP is not supported" in report["arguments"]
        assert "Use DDP" in report["arguments"]
        assert "DTensor" in report["sharded model"]
        assert "Use DDP" in report["sharded model"]


def test_rules_that_may_need_whole_weights_are_refused_over_sharded_ones(seen):
    for report, _ in seen("refused"):
        said = [report.get(f"rule {place}", "") for place in range(len(WHOLE))]
        for (field, rule), message in zip(WHOLE, said, strict=True):
            assert message.startswith(f"{field}={rule!r}" if isinstance(rule, str) else f"{field}=<"), rule
            assert "are not sharded" in message if rule == "sampa" else "may need whole weights" in message, rule
            assert "se ascent='auto'" in message, rule


@pytest.mark.slow
def test_a_rank_that_dies_ends_training(tmp_path):
    """Killed in the middle of a step: the other rank waits for its gradients, and ends with an error."""
    began = time.monotonic()
    done = launch(tmp_path, "dying")
    ended = time.time()
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr, done.stderr[-4000:]
    died = (tmp_path / "dying" / "died").stat().st_mtime
    assert ended - died < DEATH_SECONDS
    assert time.monotonic() - began < START_SECONDS
    assert not (tmp_path / "dying" / "0.json").exists(), "the first rank went on alone"
