"""State and trace files: what is read is what was written, and damage of any kind is told, never loaded."""

import json
import re
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn

from slsam_peft import SLSAM, SLSAMConfig, arms_of
from slsam_peft.algorithm.ascents import Part
from slsam_peft.algorithm.radius import Length
from slsam_peft.errors import UserError
from slsam_peft.saving import checkpoint, trace_data
from slsam_peft.saving import trace_file as tracing
from slsam_peft.saving.checkpoint import StateMismatchError, load_state, save_state
from slsam_peft.saving.checksum import BLANK, DamagedError, add_checksum, verified_metadata

# The folder is the same in every example: each writes the file before it reads it.
IN_ONE_FOLDER = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

CHECKSUMMED = add_checksum(
    save({"w": torch.arange(3)}, metadata={"schema": "1", "note": 'a "sha256":"quoted"', **BLANK})
)


def flipped(content: bytes, bit: int) -> bytes:
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def test_what_has_a_checksum_is_read() -> None:
    assert verified_metadata(CHECKSUMMED)["note"] == 'a "sha256":"quoted"'
    assert add_checksum(CHECKSUMMED) == CHECKSUMMED


def test_any_one_bit_and_any_cut_are_seen() -> None:
    damaged = [flipped(CHECKSUMMED, bit) for bit in range(8 * len(CHECKSUMMED))]
    damaged += [CHECKSUMMED[:end] for end in range(len(CHECKSUMMED))]
    damaged += [CHECKSUMMED + b"\0", b"\xff" * 64, save({"w": torch.arange(3)})]
    for content in damaged:
        with pytest.raises(DamagedError):
            verified_metadata(content)


@given(st.lists(st.integers(0, 8 * len(CHECKSUMMED) - 1), min_size=1, max_size=20, unique=True))
def test_any_bits_are_seen(bits: list[int]) -> None:
    content = CHECKSUMMED
    for bit in bits:
        content = flipped(content, bit)
    with pytest.raises(DamagedError):
        verified_metadata(content)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(4)))


def trained(steps: int, seed: int = 0) -> SLSAM:
    """A sampler of four arms after some steps; `"remembered"` keeps gradients in its state."""
    model = network()
    config = SLSAMConfig(active_fraction=0.5, ascent="remembered", seed=seed)
    slsam = SLSAM(arms_of(model, "module"), config)

    def closure() -> torch.Tensor:
        loss = model(torch.ones(2, 3)).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        slsam.update(closure)
    return slsam


def assert_same(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(value, two[key]) if isinstance(value, torch.Tensor) else value == two[key], key


@cache
def state_file(folder: Path) -> bytes:
    return save_state(trained(5), folder).read_bytes()


@IN_ONE_FOLDER
@given(steps=st.integers(0, 6), seed=st.integers(0, 2**31 - 1))
def test_states_come_back_bit_for_bit(tmp_path: Path, steps: int, seed: int) -> None:
    slsam, other = trained(steps, seed), trained(0, seed)
    save_state(slsam, tmp_path)
    load_state(other, tmp_path)
    assert_same(slsam.state_dict(), other.state_dict())


@IN_ONE_FOLDER
@given(data=st.data())
def test_a_damaged_state_is_told_and_changes_nothing(tmp_path: Path, data: st.DataObject) -> None:
    content = state_file(tmp_path)
    if data.draw(st.booleans(), "cut"):
        damaged = content[: data.draw(st.integers(0, len(content) - 1), "bytes left")]
    else:
        damaged = flipped(content, data.draw(st.integers(0, 8 * len(content) - 1), "bit"))
    (tmp_path / checkpoint.FILE_NAME).write_bytes(damaged)
    slsam = trained(2)
    before = slsam.state_dict()
    with pytest.raises(StateMismatchError, match=r"slsam\.safetensors is damaged \(.*resume from an older checkpoint"):
        load_state(slsam, tmp_path)
    assert_same(before, slsam.state_dict())


def mean_of(probabilities: torch.Tensor, mask: torch.Tensor, norms: torch.Tensor, _: object, pull: float):
    return probabilities + pull * (probabilities.mean() - probabilities)


RULES = {
    "an ascent's share": ("ascent", lambda x: Part(fraction=x), "Part(sequences=None, fraction=0.25)"),
    "a radius's length": ("radius", Length, "Length(rho=0.25)"),
    "a bandit's keyword": ("bandit", lambda x: partial(mean_of, pull=x), "mean_of(pull=0.25)"),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_state_of_the_same_rule_with_another_strength_is_refused(rule: str, tmp_path: Path) -> None:
    """The one that it was made with goes on, as another object."""
    field, make, said = RULES[rule]

    def made(strength: float) -> SLSAM:
        config: dict[str, Any] = {"active_fraction": 0.5, field: make(strength)}
        return SLSAM(arms_of(network(), "module"), SLSAMConfig(**config))

    save_state(made(0.25), tmp_path)
    load_state(made(0.25), tmp_path)
    other = said.replace("0.25", "0.5")
    with pytest.raises(StateMismatchError, match=rf"{field}=.*{re.escape(said)}' there, .*{re.escape(other)}' here"):
        load_state(made(0.5), tmp_path)


def test_a_state_of_another_schema_is_not_called_damaged(tmp_path: Path) -> None:
    path = save_state(trained(1), tmp_path)
    for schema in ("2", "9"):  # 2: its settings have the names of earlier versions
        written = path.read_bytes().replace(b'"schema":"4"', f'"schema":"{schema}"'.encode())
        path.write_bytes(add_checksum(written))
        with pytest.raises(
            StateMismatchError, match=rf"has schema {schema}; this version reads schema 4\. Use the version"
        ):
            load_state(trained(0), tmp_path)
        save_state(trained(1), tmp_path)


def test_a_state_without_checksum_is_told_why(tmp_path: Path) -> None:
    """As versions before schema 2 wrote it."""
    (tmp_path / checkpoint.FILE_NAME).write_bytes(save({"w": torch.zeros(1)}, metadata={"schema": "1", "state": "{}"}))
    with pytest.raises(StateMismatchError, match="holds no checksum, as every such file of schema 2 and later does"):
        load_state(trained(0), tmp_path)


@cache
def trace_file(folder: Path) -> bytes:
    slsam = trained(0)
    file = tracing.TraceFile(slsam, folder, 3)
    model = [arm.parameters[0] for arm in slsam.arms]

    def closure() -> torch.Tensor:
        loss = torch.stack([p.square().mean() for p in model]).sum()
        loss.backward()
        return loss

    for step in (1, 2, 3):
        slsam.update(closure)
        file.see(step, slsam)
    file.finish()
    return (folder / trace_data.FILE_NAME).read_bytes()


@IN_ONE_FOLDER
@given(data=st.data())
def test_a_damaged_trace_is_told_and_never_gone_on_with(tmp_path: Path, data: st.DataObject) -> None:
    content, path = trace_file(tmp_path), tmp_path / trace_data.FILE_NAME
    path.write_bytes(content)
    assert trace_data.read_trace(path).step.tolist() == [1, 2, 3]
    assert tracing.recorded_until(tmp_path, trained(0), 3) is not None
    path.write_bytes(flipped(content, data.draw(st.integers(0, 8 * len(content) - 1), "bit")))
    with pytest.raises(UserError, match=r"slsam_trace\.safetensors is not a trace of SL-SAM, or is damaged"):
        trace_data.read_trace(path)
    assert tracing.recorded_until(tmp_path, trained(0), 3) is None


def test_a_trace_of_an_earlier_schema_is_refused_by_name(tmp_path: Path) -> None:
    """Schema 2 called the lowest active block `floor`, and steps `updates`."""
    trace_file.__wrapped__(tmp_path)
    path = tmp_path / trace_data.FILE_NAME
    content = path.read_bytes()
    metadata = verified_metadata(content)
    values = load(content)
    values["floor"] = values.pop("lowest_active_block")
    plain = json.loads(metadata["trace"])
    plain["updates"] = plain.pop("steps")
    older = {"schema": "2", "trace": json.dumps(plain), **BLANK}
    path.write_bytes(add_checksum(save(values, metadata=older)))
    with pytest.raises(UserError, match=r"has schema 2; this version reads schema 3\. Use the version of slsam-peft"):
        trace_data.read_trace(path)
    assert tracing.recorded_until(tmp_path, trained(0), 3) is None


def test_traces_are_read_without_torch_as_with_it(tmp_path: Path) -> None:
    trace_file.__wrapped__(tmp_path)
    read = trace_data.read_trace(tmp_path / trace_data.FILE_NAME)
    again = tracing.recorded_until(tmp_path, trained(0), 3)
    assert again is not None
    for name, value in again.tensors().items():
        np.testing.assert_array_equal(read.values[name], value.numpy(), strict=True)
