"""The names that the settings take, and what each method sets, with the source of its numbers.

A method is a whole configuration by one name; `SLSAMConfig` fills what is unset from it.
"""

from typing import Any

METHODS = ("auto", "sam", "paper", "depth", "bar", "bi_lora", "flat_lora")
BANDITS = ("paper", "scale_free", "uniform")
DESIGNS = ("bernoulli", "fixed_size", "window", "depth")
ASCENTS = ("auto", "two_pass", "partial", "remembered", "ahead", "sampa", "zeroth_order")
ASCENTS += ("bar", "obar", "bi_lora", "flat_lora")
RIDING = ("ahead", "sampa")  # let sequences of the next batch ride along, wherever they are asked for by name
ONE_PASS = ("bar", "obar", "bi_lora", "flat_lora")  # make no e of an ascent gradient; rho is how strong they are
RADII = ("length", "loss_rise", "asam", "neuron", "weight")
DESCENTS = ("active", "all")
GRANULARITIES = ("block", "module", "tensor")
ADAPTER_DTYPES = ("float32", "keep")

PAPER_FRACTION = 0.2  # s in the paper's LLM experiments (arXiv 2602.09395)
RHO = 0.05  # Foret et al. 2021; the length of the perturbation wherever neither `rho` nor `loss_rise` is set
BALANCING_RHO = 0.5  # mu_0 of BAR, in most of the paper's grids (arXiv 2410.14802, appendix D)
ADAPTIVE_RHO = 0.5  # Kwon et al. 2021, where lengths are in units of the weights
RHO_MAX = 2.0  # measured: 1 to 2
LOSS_RISE = 0.5  # nats; measured: ahead of plain LoRA on fitted rows, and behind on rows still being learnt
ASCENT_FRACTION = 0.25  # Bahri et al., ACL 2022

PARTED = ("bandit", "design", "ascent", "descent")  # fields that are parts of a method and have no other name

# What a method sets where the field itself is unset. `None` is no method: the parts alone were given.
PARTS: dict[str | None, dict[str, Any]] = {
    "auto": {
        "active_fraction": 0.25,  # tried on one seed: more had about the same loss, a tenth a higher one
        "bandit": "scale_free",
        "design": "fixed_size",
        "ascent": "auto",
        "descent": "all",
        "loss_rise": LOSS_RISE,
        "ascent_sequences": 1,
    },
    "sam": {
        "active_fraction": 1.0,
        "bandit": "uniform",
        "design": "bernoulli",
        "ascent": "two_pass",
        "descent": "all",
        "rho": RHO,
    },
    "paper": {
        "active_fraction": PAPER_FRACTION,
        "bandit": "paper",
        "design": "bernoulli",
        "ascent": "two_pass",
        "descent": "active",
        "rho": RHO,
    },
    "depth": {
        "cost_budget": 1.0,
        "bandit": "scale_free",
        "design": "depth",
        "ascent": "two_pass",
        "descent": "active",
        "rho": RHO,
    },
    **{
        name: {
            "active_fraction": 1.0,
            "bandit": "uniform",
            "design": "bernoulli",
            "ascent": name,
            "descent": "all",
            "rho": BALANCING_RHO if name == "bar" else RHO,
        }
        for name in ("bar", "bi_lora", "flat_lora")
    },
    None: {
        "bandit": "scale_free",
        "design": "bernoulli",
        "ascent": "two_pass",
        "ascent_fraction": ASCENT_FRACTION,
        "descent": "active",
        "rho": RHO,
    },
}

PARTLESS = ("two_pass", "remembered", *ONE_PASS)  # ascents that take no part of a batch

# Any of these, set without a method, asks for the parts alone.
ALONE = ("active_fraction", "bandit", "design", "ascent", "ascent_fraction", "descent", "cost_budget")

# Pairs of fields that say the same thing in two ways.
EITHER_OR = (
    ("rho", "loss_rise", "the radius is a length or a rise of the loss"),
    ("ascent_sequences", "ascent_fraction", "both say how many sequences make the ascent"),
    ("cost_budget", "active_fraction", "cost_budget decides how many arms are active"),
)
