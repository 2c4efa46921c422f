"""Makes TRL's model cards name the method and cite its paper."""

import textwrap
from typing import Any

PAPER = {
    "title": "Sparse Layer Sharpness-Aware Minimization for Efficient Fine-Tuning",
    "id": "2602.09395",
    "citation": textwrap.dedent("""\
        @misc{slsam2026,
            title         = {{Sparse Layer Sharpness-Aware Minimization for Efficient Fine-Tuning}},
            year          = 2026,
            eprint        = {2602.09395},
            archivePrefix = {arXiv},
            primaryClass  = {cs.LG},
            url           = {https://arxiv.org/abs/2602.09395},
        }"""),
}


def name_on_cards(trainer: Any) -> None:
    """Let a TRL trainer's model cards say "DPO and SL-SAM", link SL-SAM's paper and cite both methods' papers.

    A card links one paper. Where the trainer's own method has one, that paper stays in the citation, before SL-SAM's.
    Trainers of transformers have no such cards and are left as they are.

    Args:
        trainer (`Trainer`): A trainer, whose attributes are set for this instance alone.
    """
    if not hasattr(trainer, "_paper"):
        return
    own = trainer._paper.get("citation")
    trainer._name = f"{trainer._name} and SL-SAM"
    trainer._paper = {**PAPER, "citation": "\n\n".join(filter(None, (own, PAPER["citation"])))}
