"""`slsam-peft plot`: what is in the pictures, the screen that follows a run, and what is refused."""

import io
import os
import time

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save

from slsam_peft import SLSAMConfig
from slsam_peft.algorithm.radius import Length
from slsam_peft.cli import live, trace_plot
from slsam_peft.cli.main import main
from slsam_peft.saving.checksum import add_checksum
from slsam_peft.saving.trace_data import FILE_NAME, arm_labels, read_runs, read_trace
from tests.traces import PREFIX, blocks, modules, write_trace


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def figure(*runs):
    return trace_plot.build(read_runs(runs))


def panels(made):
    """The figure's axes by title; heat maps have the settings as theirs."""
    return {axis.get_title(loc="left"): axis for axis in made.get_axes() if axis.get_title(loc="left")}


def lines(axis):
    return {line.get_label(): line for line in axis.get_lines() if not line.get_label().startswith("_")}


@pytest.mark.parametrize("suffix", [".png", ".svg"])
@pytest.mark.parametrize(
    ("arms", "steps"), [(blocks(30), 200), (modules(43), 30), (blocks(5), 1)], ids=["30", "301", "1 step"]
)
def test_pictures_of_few_and_of_many_arms(arms, steps, suffix, folder, capsys):
    write_trace(folder / "run", arms, steps)
    assert main(["plot", "run", "--output", f"a{suffix}"]) == 0
    assert capsys.readouterr().out == f"Written: a{suffix}\n"
    content = (folder / f"a{suffix}").read_bytes()
    if suffix == ".png":
        pixels = imread(io.BytesIO(content))
        assert pixels.shape[0] > 800
        assert pixels.shape[1] == trace_plot.WIDTH * trace_plot.DPI
        numbers = np.round(pixels * 255).astype(np.int64) @ 256 ** np.arange(pixels.shape[2])  # one for each colour
        assert len(np.unique(numbers)) > 50
    else:
        assert content.startswith(b"<?xml")
    assert sorted(p.name for p in folder.iterdir()) == [f"a{suffix}", "run"]


def test_a_picture_of_the_same_run_is_the_same_file(folder):
    write_trace(folder / "run", blocks(3), 5)
    for name in ("a", "b"):
        assert main(["plot", "run", "--output", f"{name}.svg"]) == 0
    assert (folder / "a.svg").read_bytes() == (folder / "b.svg").read_bytes()


def test_every_axis_has_title_and_unit(folder):
    write_trace(folder / "one", blocks(5), 100, SLSAMConfig(cost_budget=1.2))
    write_trace(folder / "two", blocks(5), 80)
    made = figure(folder / "one", folder / "two")
    found = panels(made)
    assert len(found) == 6
    units = {
        "Training loss, thick: mean over 6 steps": ("step", "loss (nats)"),
        "Sharpness, thick: mean over 6 steps": ("step", "L(w + e) \N{MINUS SIGN} L(w) (nats)"),
        "Cost of a step": ("step", "cost (plain LoRA steps)"),
        "how often active": ("share of steps (%)\nblack: mean p", ""),
    }
    for title, labels in units.items():
        assert (found[title].get_xlabel(), found[title].get_ylabel()) == labels
    maps = [axis for title, axis in found.items() if "arms" in title]
    assert [axis.get_xlabel() for axis in maps] == ["step"] * 2
    bars = [axis for axis in made.get_axes() if axis.get_ylabel().startswith("probability p")]
    assert len(bars) == 2
    assert made.get_suptitle() == "What the sampler did: 2 runs over 5 arms"


def test_heat_map_and_activity_show_the_trace(folder):
    trace = write_trace(folder / "run", blocks(6), 50)
    made = figure(folder / "run")
    left = next(axis for title, axis in panels(made).items() if "6 arms, 50 steps" in title)
    shown = left.get_images()[0]
    np.testing.assert_allclose(shown.get_array(), trace.tensors()["probabilities"].T)
    assert shown.get_extent() == [0.5, 50.5, -0.5, 5.5]
    assert shown.origin == "lower"
    assert [label.get_text() for label in left.get_yticklabels()] == [f"block {i}" for i in range(6)]
    bars = [patch.get_width() for patch in panels(made)["how often active"].patches]
    assert bars == [count / 50 for count in trace.activity.tolist()]


def test_a_long_run_is_averaged_over_columns_and_counted_exactly(folder):
    trace = write_trace(folder / "run", blocks(3), 10_000)
    assert trace.stride == 4
    made = figure(folder / "run")
    left = next(axis for title, axis in panels(made).items() if "10,000 steps" in title)
    shown = left.get_images()[0]
    width = -(-2500 // trace_plot.MOST_COLUMNS)
    expected = trace.tensors()["probabilities"][:width].mean(0)
    assert shown.get_array().shape[1] == -(-2500 // width)
    np.testing.assert_allclose(shown.get_array()[:, 0], expected, rtol=1e-6)
    assert left.get_xlabel() == "step (every 4th is shown)"
    assert left.get_xlim() == (0.5, 10_000.5)
    bars = [patch.get_width() for patch in panels(made)["how often active"].patches]
    assert bars == [count / 10_000 for count in trace.activity.tolist()]
    assert "mean so far, 1.00 at the end" in lines(panels(made)["Cost of a step"])


def test_budget_runs_and_numbers_that_are_not_known(folder):
    write_trace(folder / "budget", blocks(5), 12, SLSAMConfig(design="depth", cost_budget=1.25))
    write_trace(folder / "partial", blocks(5), 12, SLSAMConfig(ascent="partial"), cost=False)
    both = panels(figure(folder / "budget", folder / "partial"))
    assert list(lines(both["Training loss"])) == ["budget", "partial"]
    assert list(lines(both["Sharpness"])) == ["budget"]
    dashes = [line.get_linestyle() for line in lines(both["Training loss"]).values()]
    assert len(set(dashes)) == 2  # told apart without colour
    cost = lines(both["Cost of a step"])
    assert cost["budget 1.25"].get_ydata()[0] == 1.25
    alone = panels(figure(folder / "partial"))
    for title, words in (("Sharpness", "ascent='two_pass'"), ("Cost of a step", "no cost model")):
        assert words in alone[title].texts[0].get_text()


@pytest.mark.parametrize(
    ("config", "shown"),
    [
        (SLSAMConfig(), "loss_rise 0.5"),
        (SLSAMConfig(rho=0.25), "rho 0.25"),
        (SLSAMConfig(rho=0.0), "rho 0,"),
        (SLSAMConfig(radius=Length(0.1)), "radius slsam_peft.algorithm.radius:Length"),
    ],
)
def test_picture_and_screen_tell_the_radius_as_it_was_set(folder, config, shown):
    write_trace(folder / "run", blocks(3), 5, config)
    trace = read_trace(folder / "run" / FILE_NAME)
    assert shown in f"{trace_plot._subtitle(trace)},"
    assert shown.rstrip(",") in str(live._heading(trace, None))


def test_few_steps_mark_what_was_active(folder):
    trace = write_trace(folder / "run", blocks(4), 6)
    made = figure(folder / "run")
    left = next(axis for title, axis in panels(made).items() if "dots: active" in title)
    marks = list(zip(*left.get_lines()[0].get_data(), strict=True))
    active = trace.tensors()["active"]
    assert sorted(marks) == sorted((row + 1, arm) for row, arm in active.nonzero().tolist())


def test_arms_come_in_depth_order_with_short_names(folder):
    names = [f"{PREFIX}.1", "base_model.model.lm_head", f"{PREFIX}.0", "base_model.model.model.embed_tokens"]
    write_trace(folder / "run", (names, [1, 2, 0, -1]), 5)
    trace = read_trace(folder / "run" / FILE_NAME)
    assert trace.labels == ["model.embed_tokens", "block 0", "block 1", "lm_head"]
    np.testing.assert_array_equal(
        trace.probabilities[-1], np.float32([0.9, 0.1 + 1.6 / 3, 0.1, 0.1 + 0.8 / 3])[[0, 1, 2, 3]]
    )
    assert arm_labels(["m.a.weight", "m.b.weight"], [None, None]) == ["a.weight", "b.weight"]
    assert arm_labels(["only.arm"], [None]) == ["arm"]


def test_two_checkpoints_of_one_run_have_names_of_their_own(folder):
    for name in ("a/checkpoint-5", "b/checkpoint-5"):
        write_trace(folder / name, blocks(3), 5)
    assert [t.label for t in read_runs([folder / "a/checkpoint-5", folder / "b/checkpoint-5"])] == [
        "a/checkpoint-5",
        "b/checkpoint-5",
    ]


def damaged(folder):
    write_trace(folder / "damaged", blocks(3), 5)
    file = folder / "damaged" / FILE_NAME
    file.write_bytes(file.read_bytes()[:-40])


def empty(folder):
    write_trace(folder / "empty", blocks(3), 0)


def foreign(folder):
    from safetensors.numpy import save_file

    (folder / "foreign").mkdir()
    save_file({"weight": np.zeros(3)}, folder / "foreign" / FILE_NAME)


def newer(folder):
    write_trace(folder / "newer", blocks(3), 5)
    file = folder / "newer" / FILE_NAME
    file.write_bytes(add_checksum(file.read_bytes().replace(b'"schema":"3"', b'"schema":"9"')))


def inconsistent(folder):
    write_trace(folder / "inconsistent", blocks(3), 5)
    file = folder / "inconsistent" / FILE_NAME
    file.write_bytes(add_checksum(file.read_bytes().replace(b'\\"last\\"', b'\\"lost\\"')))


@pytest.mark.parametrize(
    ("make", "words", "expected"),
    [
        (None, ["nowhere"], "nowhere does not exist; name the output folder of a training"),
        (None, ["bare"], f"bare holds no {FILE_NAME}. SLSAMTrainer writes one"),
        (None, ["above"], "There are traces in: above/checkpoint-5."),
        (damaged, ["damaged"], "is not a trace of SL-SAM, or is damaged ("),
        (damaged, ["good", "damaged"], "is not a trace of SL-SAM, or is damaged ("),
        (empty, ["empty"], "is empty: no step has been recorded yet"),
        (foreign, ["foreign"], "is not a trace of SL-SAM, or is damaged (it holds no checksum"),
        (newer, ["newer"], "has schema 9; this version reads schema 3"),
        (inconsistent, ["inconsistent"], "or is damaged ('last')"),
        (
            None,
            ["good", "other"],
            "runs of different arms, so they do not fit into one plot: good has 3 arms, other has 4",
        ),
        (None, ["good", "./good"], "is named twice"),
        (None, ["good", "--output", "a.jpg"], "--output=a.jpg: the name must end in .png or .svg."),
        (None, ["good", "--output", "no/a.png"], "--output=no/a.png: name a file in a folder that exists."),
        (
            None,
            ["good", "--output", "old.png"],
            "old.png exists already. Name another file with --output, or pass --force",
        ),
        (None, ["--live", "good", "other"], "--live follows one run, and 2 are named"),
        (None, ["--live", "good", "--output", "a.png"], "--live writes no file"),
        (None, ["--live", "nowhere"], "nowhere does not exist"),
        (damaged, ["--live", "damaged"], "is not a trace of SL-SAM, or is damaged ("),
        (None, [], "the following arguments are required: RUN"),
    ],
)
def test_bad_input(make, words, expected, folder, capsys):
    write_trace(folder / "good", blocks(3), 5)
    write_trace(folder / "other", blocks(4), 5)
    write_trace(folder / "above" / "checkpoint-5", blocks(3), 5)
    (folder / "bare").mkdir()
    (folder / "old.png").write_bytes(b"mine")
    if make:
        make(folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert main(["plot", *words]) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert "Traceback" not in said
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_force_overwrites_and_a_failure_keeps_the_old_picture(folder, monkeypatch, capsys):
    write_trace(folder / "run", blocks(3), 5)
    (folder / "slsam-plot.png").write_bytes(b"old")
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert main(["plot", "run", "--force"]) == 2
    assert "slsam-plot.png cannot be written: No space left on device." in capsys.readouterr().err
    assert (folder / "slsam-plot.png").read_bytes() == b"old"
    assert main(["plot", "run", "--force"]) == 0
    assert (folder / "slsam-plot.png").read_bytes().startswith(b"\x89PNG")


def screen(width=100, height=40):
    return Console(width=width, height=height, file=io.StringIO(), highlight=False)


def shown(trace, age=None, width=100, height=40):
    console = screen(width, height)
    console.print(live.view(trace, width, height, age))
    return console.file.getvalue().splitlines()


def test_the_screen_shows_each_arm_highest_first(folder):
    trace = write_trace(folder / "run", blocks(6), 50, SLSAMConfig(design="depth", cost_budget=1.2), done=False)
    said = shown(read_trace(folder / "run" / FILE_NAME), age=4)
    assert said[0].startswith("run  step 50 of 100 (50%)  written 4 s ago  design depth, bandit scale_free")
    assert [line.split()[0] for line in said[1:4]] == ["loss", "sharpness", "cost"]
    assert f"mean {trace.cost_total / 50:.2f} of 1.2" in said[3]
    rows = said[-6:]
    assert [row[:7] for row in rows] == [f"block {i}" for i in reversed(range(6))]
    assert [row.split()[-1] for row in rows] == [f"{c / 50:.0%}" for c in reversed(trace.activity.tolist())]
    assert "written 3 min ago" in shown(read_trace(folder / "run" / FILE_NAME), age=180)[0]


@pytest.mark.parametrize(("width", "height"), [(60, 12), (80, 24), (200, 60)])
def test_many_arms_share_lines_so_that_the_screen_holds_them(width, height, folder):
    write_trace(folder / "run", modules(43), 30)
    said = shown(read_trace(folder / "run" / FILE_NAME), None, width, height)
    assert len(said) < height
    assert max(map(len, said)) <= width
    assert said[-1].startswith("in block")
    assert "done" in said[0]


def test_following_ends_when_the_run_is_done(folder, monkeypatch):
    """Nothing yet, then a run half-way, then one that is done."""
    run, waited = folder / "run", []
    run.mkdir()

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) == 2:
            write_trace(run, blocks(3), 10, done=False)
        if len(waited) == 4:
            write_trace(run, blocks(3), 20)
        os.utime(run / FILE_NAME, ns=(time.time_ns(), time.time_ns())) if len(waited) in (2, 4) else None

    views = []
    original = live.view
    monkeypatch.setattr(live, "view", lambda trace, *a: views.append(trace.plain["last"]) or original(trace, *a))
    monkeypatch.setattr(live.time, "sleep", sleep)
    console = screen()
    live.follow(run, console)
    assert len(waited) == 4
    assert views == [10, 10, 20, 20]
    assert "step 20 of 20 (100%)  done" in console.file.getvalue()


def test_control_c_ends_the_screen_with_130(folder, monkeypatch, capsys):
    write_trace(folder / "run", blocks(3), 10, done=False)

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(live.time, "sleep", interrupt)
    assert main(["plot", "--live", "run"]) == 130
    assert capsys.readouterr().err == "slsam-peft: interrupted.\n"


def test_numbers_that_are_not_finite_are_drawn_around(folder):
    trace = write_trace(folder / "run", blocks(3), 60)
    trace._scalars[10:20, :2] = float("nan")
    trace._scalars[30, 0] = float("inf")
    file = folder / "run" / FILE_NAME
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    file.write_bytes(add_checksum(save(trace.tensors(), metadata)))
    assert main(["plot", "run"]) == 0
    said = shown(read_trace(file))
    assert said[1].startswith("loss")
