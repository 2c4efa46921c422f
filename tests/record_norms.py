# python -m tests.record_norms tests/unit/data/block_norms.safetensors
"""Records each block's gradient norm in every step of a short real training, for tests of the bandit.

The task is that of recipes/compare/epochs.yaml: few sums, a quarter of the answers wrong, seen several times. A
quarter of the blocks is perturbed by half of the batch's sequences and every block is trained. About two minutes on
one CPU core; the model is fetched once.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from transformers import TrainerCallback

from slsam_peft import arms_of
from slsam_peft.data.scoring import answered
from slsam_peft.runs.compare import run
from slsam_peft.runs.compare.settings import TaskSettings, TrainingSettings
from slsam_peft.runs.compare.tasks import load_task

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "compare" / "epochs.yaml"
STEPS, BATCH_SIZE = 128, 2
SLSAM = {"ascent": "partial", "ascent_fraction": 0.5, "active_fraction": 0.25, "descent": "all", "rho": 0.5}
SETTINGS = {"steps": STEPS, "learning_rate": 5e-4, "seed": 100, "slsam": SLSAM, "random_rho": None}


class Recorder(TrainerCallback):
    """Notes the norm of each arm's gradient before every optimizer step; needs a trainer that clips no gradient."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.arms = arms_of(model)
        self.norms: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Note this step's norms, shape `(L,)`."""
        squares = [sum(p.grad.double().square().sum() for p in arm.parameters) for arm in self.arms]
        self.norms.append(torch.stack(squares).sqrt())


def record() -> torch.Tensor:
    """Return the norms, shape `(STEPS, L)`."""
    recipe = yaml.safe_load(RECIPE.read_text())
    task = TaskSettings(**next(iter(recipe["tasks"].values())))
    settings = {**SETTINGS, "training": {**recipe["training"], "batch_size": BATCH_SIZE}}
    training = TrainingSettings(**settings["training"])
    model, tokenizer = run.load_model(recipe["model"], training)
    rows = answered(tokenizer, load_task(task, settings["seed"]).train, training.max_length, training.prompt_format)
    order = run.row_order(len(rows), STEPS * BATCH_SIZE, settings["seed"])
    with tempfile.TemporaryDirectory() as scratch:
        trainer = run.build_trainer(
            model, tokenizer, [rows[i] for i in order], settings, scratch, lambda done, total: None
        )
        trainer.args.max_grad_norm = 0.0
        recorder = Recorder(trainer.model)
        trainer.add_callback(recorder)
        trainer.train()
    return torch.stack(recorder.norms)


def main(target: str) -> None:
    """Write the norms and where they come from."""
    torch.set_num_threads(1)
    source = {"model": "SmolLM2-135M-Instruct", "adapters": "LoRA r=8 on all linear layers", "task": RECIPE.name}
    source |= {"batch_size": BATCH_SIZE, **SETTINGS}
    norms = record().to(torch.float32)
    save_file({"norms": norms}, target, metadata={"source": json.dumps(source, sort_keys=True)})


if __name__ == "__main__":
    main(sys.argv[1])
