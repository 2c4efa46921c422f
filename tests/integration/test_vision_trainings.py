"""Vision-language models through TRL's trainers: steps against a slow reference, and batches that use no image.

The batches are laid out by hand, as transformers' processors lay them out; adapters lie in the vision tower and in the
language model alike.
"""

import logging
import re

import pytest
import torch
from datasets import Dataset
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    TrainerCallback,
)
from trl import DPOConfig, SFTConfig

from slsam_peft import SLSAMConfig, SLSAMTrainer
from slsam_peft.saving.recorded import fallbacks_in, read_record
from slsam_peft.trainer.cutting import ImageCounts, first_sequences
from slsam_peft.trainer.muting import muted
from tests.integration.test_cutting_images import DECODER, IMAGE, MODELS, START, VIDEO, batch_of
from tests.integration.test_preference_trainers import SLSAMDPOTrainer
from tests.reference import assert_gradients_are
from tests.tiny import lora, preferences, sft_args, tokenizer
from tests.tolerances import FUSED_HEAD

ROWS = 4
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START}


def qwen2_5_vl():
    vision = {"depth": 2, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 24}
    vision |= {"patch_size": 4, "window_size": 8, "fullatt_block_indexes": [1]}
    text = {**DECODER, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **TOKENS))


def qwen3_vl():
    vision = {"depth": 3, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 24}
    vision |= {"patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4, "mrope_interleaved": True}
    text = {**DECODER, "rope_parameters": rope}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **TOKENS))


FAMILIES = {**MODELS, "qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl}
LAYOUTS = {"qwen2_5_vl": "qwen2_vl", "qwen3_vl": "qwen2_vl"}  # the others are laid out in their own way
DRAWS = {
    "half": lambda arms: [i % 2 for i in range(len(arms))],
    "vision": lambda arms: [_sees(arm) for arm in arms],
    "language": lambda arms: [not _sees(arm) for arm in arms],
}


def _sees(arm):
    return "visual" in arm.name or "vision" in arm.name


class Noting(TrainerCallback):
    """Keeps the gradients that the optimizer steps on."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def collate(layout, pairs):
    """Return a collator of rows that say how many images they hold; of pairs, chosen rows above rejected ones."""

    def collated(rows):
        images = [row["count"] for row in rows] * (2 if pairs else 1)
        batch = batch_of(layout, images, seed=rows[0]["seed"])
        if not any(images):  # processors of texts alone return nothing of images
            batch = {name: value for name, value in batch.items() if not name.startswith(("pixel_", "image_"))}
        if pairs:
            batch["completion_mask"] = (batch.pop("labels") != -100).long()
            batch["completion_mask"][:, :2] = 0
        return batch

    return collated


def vision_trainer(family, config, folder, images, *, pairs=False, **settings):
    """Return a trainer of one batch a step whose rows hold so many images; it moves no weight.

    Args:
        family: A key of `FAMILIES`.
        config: `SLSAMConfig`.
        folder: Its output folder.
        images: For each step, for each row, how many images it holds.
        pairs: Whether rows are preference pairs, for DPO.
        settings: More arguments.
    """
    torch.manual_seed(0)
    rows = [{"count": n, "seed": i} for i, step in enumerate(images) for n in step]
    options = {"per_device_train_batch_size": len(images[0]), "max_steps": len(images), "learning_rate": 0.0}
    options |= {"max_grad_norm": 0.0, "remove_unused_columns": False, "optim": "sgd", "dataloader_num_workers": 0}
    options |= {"train_sampling_strategy": "sequential", **settings}
    if pairs:
        cls, options = SLSAMDPOTrainer, {"config_class": DPOConfig, **options}
    else:
        cls, options = SLSAMTrainer, {"dataset_kwargs": {"skip_prepare_dataset": True}, **options}
    model = FAMILIES[family]().double()
    trainer = cls(
        model,
        args=sft_args(folder, **{"config_class": SFTConfig, **options}),
        train_dataset=preferences() if pairs else Dataset.from_list(rows),
        data_collator=collate(LAYOUTS.get(family, family), pairs),
        processing_class=tokenizer(),
        peft_config=lora(target_modules="all-linear", exclude_modules=".*lm_head.*"),
        slsam_config=config,
    )
    trainer.train_dataset = Dataset.from_list(rows)  # DPO would tokenize them, had it been given them
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.double()
                parameter.add_(0.05 * torch.randn_like(parameter))
    return trainer


def drawing(trainer, draw):
    """Let a trainer draw the same arms in each step; return the mask."""
    return torch.tensor(draw(trainer.slsam_arms)) > 0


def slow_step(trainer, mask, batch, part, rho):
    """Return the gradients of the slow two-pass step in which `part` of a batch makes the ascent."""
    model = trainer.model
    arms = trainer.slsam.arms
    parameters = [p for arm in arms for p in arm.parameters]
    perturbed = [p for arm, on in zip(arms, mask.tolist(), strict=True) if on for p in arm.parameters]

    def gradients(inputs):
        model.zero_grad(set_to_none=True)
        items = None if "labels" not in inputs else (inputs["labels"][:, 1:] != -100).sum()
        with muted(trainer):
            trainer.compute_loss(model, dict(inputs), num_items_in_batch=items).backward()
        return [None if p.grad is None else p.grad.clone() for p in parameters]

    found = dict(zip(parameters, gradients(part), strict=True))
    moves = [(p, found[p]) for p in perturbed if found[p] is not None]
    norm = sum(float((g**2).sum()) for _, g in moves) ** 0.5
    before = [p.detach().clone() for p, _ in moves]
    with torch.no_grad():
        for p, g in moves:
            p.add_(rho * g / (norm + 1e-12))
    try:
        return parameters, gradients(batch)
    finally:
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for (p, _), w in zip(moves, before, strict=True):
                p.copy_(w)


def assert_a_step_is_that_of_the_slow_reference(family, draw, folder, *, pairs, ascent, images, **settings):
    mask = []
    config = SLSAMConfig(
        method="auto", ascent=ascent, rho=0.2, active_fraction=0.5, design=lambda p, g: mask[0], trace=False
    )
    trainer = vision_trainer(family, config, folder, [images], pairs=pairs, **settings)
    mask.append(drawing(trainer, DRAWS[draw]))
    noting = Noting()
    trainer.add_callback(noting)
    trainer.train()
    trainer.model.train()
    batch = trainer.data_collator(list(trainer.train_dataset))
    part = batch
    if ascent == "partial":
        part = first_sequences(batch, 1, 2 if pairs else 1, ImageCounts.of(trainer.model.config)).inputs
        assert len(part["input_ids"]) < len(batch["input_ids"])
    parameters, expected = slow_step(trainer, mask[0], batch, part, 0.2)
    names = {p: n for n, p in trainer.model.named_parameters()}
    for p in parameters:
        p.grad = noting.gradients[0].get(names[p])
    assert trainer.slsam.skipped == 0
    assert_gradients_are(expected, parameters, FUSED_HEAD)


CASES = [
    ("half", "one each", False),
    ("half", "several", True),
    ("vision", "several", False),
    ("language", "several", True),
]
IMAGES = {"one each": (1, 1, 1, 1), "several": (2, 0, 1, 3)}


def test_a_step_of_supervised_training(tmp_path):
    options = {"pairs": False, "ascent": "partial", "images": IMAGES["several"], "activation_checkpointing": False}
    assert_a_step_is_that_of_the_slow_reference("llava", "half", tmp_path, **options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_(en|dis)able. is deprecated:FutureWarning")
@pytest.mark.parametrize("ascent", ["two_pass", "partial"])
@pytest.mark.parametrize(("draw", "images", "checkpointing"), CASES)
@pytest.mark.parametrize("pairs", [False, True], ids=["SFT", "DPO"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_step_is_that_of_the_slow_reference(family, pairs, draw, images, checkpointing, ascent, tmp_path):
    options = {"pairs": pairs, "ascent": ascent, "images": IMAGES[images], "activation_checkpointing": checkpointing}
    assert_a_step_is_that_of_the_slow_reference(family, draw, tmp_path, **options)


def assert_a_step_without_images_is_skipped(family, folder, caplog, *, pairs, ascent):
    """Of three steps the middle one has texts alone, and each draws the arms of the vision tower alone."""
    mask = []
    config = SLSAMConfig(rho=0.05, active_fraction=0.5, design=lambda p, g: mask[0], ascent=ascent, descent="active")
    steps = [(1, 1), (0, 0), (1, 1)]
    trainer = vision_trainer(family, config, folder, steps, pairs=pairs, activation_checkpointing=False)
    mask.append(drawing(trainer, DRAWS["vision"]))
    noting = Noting()
    trainer.add_callback(noting)
    with caplog.at_level(logging.WARNING, logger="slsam_peft"):
        trainer.train()
    assert [bool(g) for g in noting.gradients] == [True, False, True]
    assert trainer.slsam.skipped == 1
    assert trainer.slsam.skipped_in_a_row == 0
    assert trainer.state.global_step == 3
    assert sum("none of the drawn arms takes part in the loss" in r.message for r in caplog.records) == 1
    logs = [log["slsam/skipped"] for log in trainer.state.log_history if "slsam/skipped" in log]
    assert logs == [0, 1, 1]


def test_a_batch_of_texts_whose_vision_arms_are_drawn_is_skipped(tmp_path, caplog):
    assert_a_step_without_images_is_skipped("llava", tmp_path, caplog, pairs=False, ascent="two_pass")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_(en|dis)able. is deprecated:FutureWarning")
@pytest.mark.parametrize("ascent", ["two_pass", "partial", "remembered"])
@pytest.mark.parametrize("pairs", [False, True], ids=["SFT", "DPO"])
@pytest.mark.parametrize("family", FAMILIES)
def test_batches_of_texts_whose_vision_arms_are_drawn_are_skipped(family, pairs, ascent, tmp_path, caplog):
    assert_a_step_without_images_is_skipped(family, tmp_path, caplog, pairs=pairs, ascent=ascent)


@pytest.mark.parametrize("descent", ["active", pytest.param("all", marks=pytest.mark.slow)])
def test_the_last_vision_layer_of_llava_takes_no_part(descent, tmp_path):
    """Its features come from the layer before; drawn alone it makes no gradient, and the others' is the plain one."""
    mask = []
    config = SLSAMConfig(rho=0.05, active_fraction=0.5, design=lambda p, g: mask[0], descent=descent)
    trainer = vision_trainer("llava", config, tmp_path, [(1, 1), (1, 1)], activation_checkpointing=False)
    seeing = [i for i, arm in enumerate(trainer.slsam_arms) if _sees(arm) and arm.depth is not None]
    last = max(i for i in seeing if "layers" in trainer.slsam_arms[i].name)
    mask.append(torch.arange(len(trainer.slsam_arms)) == last)
    noting = Noting()
    trainer.add_callback(noting)
    trainer.train()
    assert trainer.state.global_step == 2
    assert not any(name in step for step in noting.gradients for name in trainer.slsam_arms[last].parameter_names)
    if descent == "active":
        assert trainer.slsam.skipped == 2
        assert not any(noting.gradients)
    else:
        assert trainer.slsam.skipped == 0
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
        trainer.model.train()
        parameters, expected = slow_step(trainer, mask[0], batch, batch, 0.05)
        names = {p: n for n, p in trainer.model.named_parameters()}
        for p in parameters:
            p.grad = noting.gradients[0].get(names[p])
        assert_gradients_are(expected, parameters, FUSED_HEAD)


def test_the_cost_of_a_model_of_several_stacks_is_said_to_be_an_estimate(tmp_path, caplog):
    """The language model's blocks are counted; the patches that the tower sees are known to the batches alone."""
    trainer = vision_trainer("llava", SLSAMConfig(), tmp_path, [[1, 1]])
    trainer.train()
    trainer.save_model(str(tmp_path))
    estimates = [f for f in trainer.slsam_fallbacks if f.what == "costs are an estimate"]
    assert len(estimates) == 1
    assert re.search(
        r"count the blocks of \S*language_model\S* alone.*has \S*vision_tower\S* beside", estimates[0].why
    )
    assert sum("costs are an estimate" in r.message for r in caplog.records) == 1
    assert fallbacks_in(read_record(tmp_path)) == list(trainer.slsam_fallbacks)
    assert trainer.slsam.metrics["cost"] > 1
