"""Makes TRL's model cards name the method and cite its paper, and those of other papers' rules."""

import textwrap
from typing import Any

from slsam_peft.config import SLSAMConfig, rule_name
from slsam_peft.presets import ONE_PASS


def _paper(key: str, title: str, year: int, arxiv: str) -> dict[str, str]:
    citation = f"""\
        @misc{{{key},
            title         = {{{{{title}}}}},
            year          = {year},
            eprint        = {{{arxiv}}},
            archivePrefix = {{arXiv}},
            primaryClass  = {{cs.LG}},
            url           = {{https://arxiv.org/abs/{arxiv}}},
        }}"""
    return {"title": title, "id": arxiv, "citation": textwrap.dedent(citation)}


PAPER = _paper("slsam2026", "Sparse Layer Sharpness-Aware Minimization for Efficient Fine-Tuning", 2026, "2602.09395")

_BAR = _paper(
    "bar2024",
    "Implicit Regularization of Sharpness-Aware Minimization for Scale-Invariant Problems",
    2024,
    "2410.14802",
)
# By the name that the settings have for a rule, which its objects know, too: its own name, and its paper.
_RULES = {
    "asam": (
        "ASAM",
        _paper(
            "asam2021",
            "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural Networks",
            2021,
            "2102.11600",
        ),
    ),
    "neuron": (
        "FT-SAM",
        _paper(
            "ftsam2023",
            "Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization",
            2023,
            "2304.11823",
        ),
    ),
    "zeroth_order": (
        "ZO-SAM",
        _paper(
            "zosam2026",
            "ZO-SAM: Zero-Order Sharpness-Aware Minimization for Efficient Sparse Training",
            2026,
            "2603.13115",
        ),
    ),
    "sampa": ("SAMPa", _paper("sampa2024", "SAMPa: Sharpness-aware Minimization Parallelized", 2024, "2410.10683")),
    "bar": ("BAR", _BAR),
    "obar": ("oBAR", _BAR),
    "bi_lora": (
        "Bi-LoRA",
        _paper(
            "bilora2025",
            "Bi-LoRA: Efficient Sharpness-Aware Minimization for Fine-Tuning Large-Scale Models",
            2025,
            "2508.19564",
        ),
    ),
    "flat_lora": (
        "Flat-LoRA",
        _paper("flatlora2024", "Flat-LoRA: Low-Rank Adaptation over a Flat Loss Landscape", 2024, "2409.14396"),
    ),
}


def name_on_cards(trainer: Any, config: SLSAMConfig) -> None:
    """Let a TRL trainer's model cards say "DPO and SL-SAM", link SL-SAM's paper and cite the papers of all methods.

    A rule of another paper is named and cited, too: "DPO and SL-SAM with ASAM"; and where a method is that rule alone,
    on every layer, its paper is the one that a card links: "DPO and BAR". Where the trainer's own method has a paper,
    that stays in the citation, before all others. Trainers of transformers have no such cards and are left as they
    are.

    Args:
        trainer (`Trainer`): A trainer, whose attributes are set for this instance alone.
        config (`SLSAMConfig`): Its settings.
    """
    if not hasattr(trainer, "_paper"):
        return
    config = config.resolved
    rules = _rules_of(config) if config.is_perturbed else []
    name = "SL-SAM" + (f" with {' and '.join(rule for rule, _ in rules)}" if rules else "")
    linked, papers = PAPER, [PAPER, *(paper for _, paper in rules)]
    if rules and config.method in ONE_PASS and config.active_fraction == 1:
        (name, linked), *_ = rules
    own = trainer._paper.get("citation")
    trainer._name = f"{trainer._name} and {name}"
    trainer._paper = {**linked, "citation": "\n\n".join(filter(None, (own, *(p["citation"] for p in papers))))}


def _rules_of(config: SLSAMConfig) -> list[tuple[str, dict[str, str]]]:
    """Return the names and papers of the rules of other papers among resolved settings."""
    names = [rule_name(given) for given in (config.ascent, config.radius)]
    return [_RULES[name] for name in names if name in _RULES]
