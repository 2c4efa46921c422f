"""SIGKILL at any moment, also in the middle of a save: the next life goes on, and ends where no kill would have."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.kill_worker import SAVE_STEPS, STEPS

WORKER = Path(__file__).parents[1] / "kill_worker.py"
KILLS = 20
MOST_LIVES = 200


class Server:
    """Starts lives in a process that has imported everything."""

    def __init__(self):
        environment = {**os.environ, "PYTHONPATH": str(WORKER.parents[1]), "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        assert json.loads(self.process.stdout.readline()) == {"ready": True}

    def live(self, folder, **when):
        self.process.stdin.write(json.dumps({"folder": str(folder), **when}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def server():
    made = Server()
    yield made
    made.close()


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory):
    """What a run without kills ends with, and how long it takes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    life = server.live(folder)
    assert life["code"] == 0, (folder / "log").read_text()
    assert life["resumed"] == 0
    return load_file(folder / "final.safetensors"), life["seconds"]


def newest_intact(folder):
    """Step of the newest checkpoint whose last file is complete, read on its own."""
    steps = [0]
    for path in (folder / "out").glob("checkpoint-*/trainer_state.json"):
        try:
            steps.append(json.loads(path.read_text())["global_step"])
        except ValueError:
            continue
    return max(steps)


def is_cut_short(folder):
    """Whether the newest checkpoint is not intact."""
    return max((int(path.name.split("-")[1]) for path in (folder / "out").glob("checkpoint-*")), default=0) != (
        newest_intact(folder)
    )


def assert_same_end(folder, expected):
    final = load_file(folder / "final.safetensors")
    assert final.keys() == expected.keys()
    for name, value in final.items():
        assert torch.equal(value, expected[name]), name


def live_and_check(server, folder, **when):
    """One life, which must go on from the newest intact checkpoint."""
    intact = newest_intact(folder)
    life = server.live(folder, **when)
    assert life["killed"] or life["code"] == 0, (folder / "log").read_text()[-4000:]
    assert life["resumed"] in (intact, None), "None: killed before the first step"
    return life


@pytest.mark.slow
def test_kills_in_the_middle_of_a_save(server, undisturbed, tmp_path):
    """At its first, a middle and its last file, in the first and in a later one, and while an old one is deleted."""
    for nth, event, cut_short in (
        (1, "open README.md", True),
        (1, "os.rename .slsam.safetensors", True),
        (1, "open trainer_state.json", True),
        (2, "open adapter_config.json", True),
        (1, "os.rmdir checkpoint-", False),
    ):
        assert live_and_check(server, tmp_path, nth=nth, event=event)["killed"]
        assert is_cut_short(tmp_path) is cut_short
    assert not live_and_check(server, tmp_path)["killed"]
    assert_same_end(tmp_path, undisturbed[0])


@pytest.mark.slow
def test_kills_at_random_moments(server, undisturbed, tmp_path):
    """Half of them at a moment in time, half at a file that a save opens, renames or deletes."""
    expected, seconds = undisturbed
    chance = random.Random(0)
    kills = runs = cut_short = 0
    for _ in range(MOST_LIVES):
        folder = tmp_path / str(runs)
        if kills % 2:
            when = {"nth": chance.randint(1, 40)}
        else:
            when = {"after": chance.uniform(0.0, seconds * 6 * SAVE_STEPS / STEPS)}
        killed = live_and_check(server, folder, **when)["killed"]
        kills += killed
        if killed:
            cut_short += is_cut_short(folder)
            continue
        assert_same_end(folder, expected)
        runs += 1
        if kills >= KILLS:
            break
    print(f"{kills} kills in {kills + runs} lives, {cut_short} of them in a save; {runs} runs ended the same")  # noqa: T201
    assert kills >= KILLS
    assert cut_short >= 3
    assert runs >= 1
