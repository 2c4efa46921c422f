"""The paper's bandit, number for number: traces of the reference rule in float64."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slsam_peft import SLSAMConfig
from slsam_peft.algorithm.bandit import Bandit
from tests.tolerances import ORACLE

FOLDER = Path(__file__).parent / "oracle"
META = json.loads((FOLDER / "meta.json").read_text())


@pytest.mark.parametrize("name", [n for n in META if n.startswith("bandit")])
def test_paper_rule_reproduces_the_trace(name):
    trace, meta = load_file(FOLDER / f"{name}.safetensors"), META[name]
    fraction = meta["budget_fraction"]
    bandit = Bandit(meta["arms"], fraction * meta["arms"], SLSAMConfig(bandit="paper", active_fraction=fraction))
    torch.testing.assert_close(bandit.probabilities, trace["probs"][0], rtol=0, atol=ORACLE)
    masks, norms = trace["masks"].bool(), trace["norms"]
    for mask, norm, expected in zip(masks, norms, trace["probs"][1:], strict=True):
        bandit.update(mask, norm, bandit.probabilities)
        torch.testing.assert_close(bandit.probabilities, expected, rtol=0, atol=ORACLE)
