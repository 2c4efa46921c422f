"""`ascent="ahead"` through SFTTrainer: one pass per step, in which a sequence of the next batch makes its ascent."""

import copy
import math

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from trl import SFTTrainer

from slsam_peft import SLSAMConfig, SLSAMTrainer, arms_of
from slsam_peft.trainer.batches import join
from tests.integration import test_preference_trainers as other_trainers
from tests.integration.test_accumulation import summed_loss
from tests.sft import llama, train
from tests.tiny import build, lora, texts
from tests.tolerances import REMEMBERED

RATE, RHO = 0.05, 0.1
CONFIG = SLSAMConfig(rho=RHO, ascent="ahead", ascent_fraction=0.3, active_fraction=1.0)


class Recording(SLSAMTrainer):
    """Keeps every batch of the trainer, and what each pass ran on."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.start = copy.deepcopy(self.model.state_dict())
        self.batches, self.passes = [], []

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.batches.append({k: v.clone() for k, v in inputs.items()})
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.passes.append({k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)})
        return super().compute_loss(model, inputs, *args, **kwargs)


def unpadded(batch, row):
    return batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()


def test_each_step_is_one_pass_over_its_batch_and_a_sequence_of_the_next(tmp_path):
    """Ten sequences are four batches of at most three per epoch; nothing looks ahead into the next epoch."""
    settings = {"per_device_train_batch_size": 3, "max_steps": -1, "num_train_epochs": 2, "data": texts(10)}
    trainer = build(Recording, tmp_path / "ours", CONFIG, **settings)
    trainer.train()
    assert len(trainer.passes) == trainer.slsam.steps == 8
    coming = [*trainer.batches[1:], None]
    for step, (own, following, both) in enumerate(zip(trainer.batches, coming, trainer.passes, strict=True)):
        rows = len(own["input_ids"])
        last = step % 4 == 3
        assert len(both["input_ids"]) == rows + (not last)
        for row in range(rows):
            assert unpadded(both, row) == unpadded(own, row)
        assert torch.equal(both["labels"][:rows, : own["labels"].shape[1]], own["labels"])
        if not last:
            ahead = unpadded(following, 0)
            assert unpadded(both, rows) == ahead
            assert both["input_ids"].shape[1] == max(own["input_ids"].shape[1], len(ahead)), "no needless padding"
            assert bool((both["labels"][rows, len(ahead) :] == -100).all())
    plain = build(SFTTrainer, tmp_path / "plain", **settings)
    plain.train()
    tokens = [[log["num_tokens"] for log in t.state.log_history if "num_tokens" in log] for t in (trainer, plain)]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
def test_training_follows_a_plain_reference(reentrant, tmp_path):
    """Unequal lengths, plain SGD: e from a sequence's gradient one step earlier, g' from the batch at w + e."""
    trainer = train(
        Recording,
        tmp_path,
        CONFIG,
        double=True,
        dropout=0.0,
        steps=6,
        per_device_train_batch_size=3,
        activation_checkpointing=reentrant is not None,
        activation_checkpointing_kwargs=None if reentrant is None else {"use_reentrant": reentrant},
        optim="sgd",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
    )
    model = get_peft_model(llama(torch.float64), LoraConfig(r=4, target_modules="all-linear")).double()
    model.load_state_dict(trainer.start)
    parameters = [p for arm in arms_of(model) for p in arm.parameters]
    ascent, expected = [], []
    for own, both in zip(trainer.batches, trainer.passes, strict=True):
        rows = len(own["input_ids"])
        ahead = {k: v[rows:] for k, v in both.items()}
        gradient = gradient_at(model, parameters, [], ahead)[1]
        loss, descent = gradient_at(model, parameters, ascent, own)
        beside = gradient_at(model, parameters, [], ahead)[0]
        weights = [int((part["labels"][:, 1:] != -100).sum()) for part in (own, ahead)]
        expected.append((loss * weights[0] + beside * weights[1]) / sum(weights))
        ascent = [g.bfloat16().double() for g in gradient]
        with torch.no_grad():
            for p, g in zip(parameters, descent, strict=True):
                p.sub_(RATE * g)
    logged = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert logged == pytest.approx(expected, rel=REMEMBERED)
    for (name, p), q in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=REMEMBERED, atol=REMEMBERED, msg=lambda m, n=name: f"{n}: {m}")


def gradient_at(model, parameters, ascent, batch):
    """Return loss and gradient of a batch at w + e, e along `ascent`, or at w where there is none; w is put back."""
    saved = [p.detach().clone() for p in parameters]
    norm = torch.stack([g.norm() for g in ascent]).norm() if ascent else 1.0
    with torch.no_grad():
        for p, g in zip(parameters, ascent or [], strict=bool(ascent)):
            p.add_(RHO * g / (norm + 1e-12))
    model.zero_grad()
    loss = summed_loss(model, [batch])
    loss.backward()
    gradients = [p.grad.clone() for p in parameters]
    with torch.no_grad():
        for p, w in zip(parameters, saved, strict=True):
            p.copy_(w)
    return float(loss.detach()), gradients


@pytest.mark.parametrize("cut", [2, 4], ids=["within an epoch", "between epochs"])
def test_resumed_training_goes_on_bit_for_bit(cut, tmp_path):
    """Four steps per epoch, shuffled, with dropout: the look-ahead gradients at the checkpoint are in it."""
    settings = {
        "per_device_train_batch_size": 3,
        "max_steps": 7,
        "data": texts(12),
        "save_strategy": "steps",
        "save_steps": cut,
        "peft_config": lora(lora_dropout=0.2),
    }
    whole = build(SLSAMTrainer, tmp_path / "whole", CONFIG, **settings)
    whole.train()
    parted = build(SLSAMTrainer, tmp_path / "parted", CONFIG, **settings)
    parted.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{cut}"))
    assert whole.slsam.steps == parted.slsam.steps == 7
    assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), parted.model.parameters(), strict=True))
    kept = [t.slsam.memory.gradients for t in (whole, parted)]
    assert kept[0]
    assert kept[0].keys() == kept[1].keys()
    assert all(torch.equal(kept[0][i], kept[1][i]) for i in kept[0])


class Faulty(SLSAMTrainer):
    """Makes the loss NaN in one pass, counted from 1."""

    bad = 2
    calls = 0

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.calls += 1
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * math.nan if self.calls == self.bad else loss


def test_a_bad_pass_is_skipped_and_nothing_of_it_kept(tmp_path):
    trainer = build(Faulty, tmp_path, CONFIG, per_device_train_batch_size=3, max_steps=2, data=texts(12))
    trainer.train()
    assert trainer.slsam.skipped == 1
    assert trainer.slsam.memory.gradients == {}
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_a_pass_that_is_interrupted_leaves_the_model_as_it_was(tmp_path):
    class Interrupted(SLSAMTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            if self.slsam.steps == 2:
                raise KeyboardInterrupt
            return loss

    trainer = build(Interrupted, tmp_path, CONFIG, per_device_train_batch_size=3, max_steps=4, data=texts(12))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.slsam.memory.gradients, "the look-ahead gradients for this step are still there"
    assert not any("forward" in vars(linear) for linear in trainer.slsam.runner.linears)
    assert all(p.grad is None and p.requires_grad for arm in trainer.slsam.arms for p in arm.parameters)


REFUSED = {
    "accumulation": ({"gradient_accumulation_steps": 2}, r"one micro-batch per step.*=2; use ascent='partial': one"),
    "packing": ({"packing": True, "max_length": 32}, r"packing or padding_free .* use ascent='partial' with gradient"),
    "padding-free": ({"padding_free": True, "max_length": None}, "packing or padding_free"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_do_is_refused_before_training(case, tmp_path):
    settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        build(SLSAMTrainer, tmp_path, CONFIG, **settings)


@pytest.mark.filterwarnings("ignore:.compute_loss_func. is deprecated:FutureWarning")
def test_a_loss_of_ones_own_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs TRL's own loss"):
        build(SLSAMTrainer, tmp_path, CONFIG, parts={"compute_loss_func": lambda *args, **kwargs: None})


def test_padding_before_the_text_is_kept_and_needless_padding_cut():
    own = {"input_ids": torch.tensor([[0, 5, 6]]), "attention_mask": torch.tensor([[0, 1, 1]])}
    own["labels"] = torch.where(own["attention_mask"] == 1, own["input_ids"], -100)
    coming = {"input_ids": torch.tensor([[0, 0, 7, 8, 0], [1, 2, 3, 4, 5]])}
    coming["attention_mask"] = torch.tensor([[0, 0, 1, 1, 0], [1] * 5])
    coming["labels"] = torch.where(coming["attention_mask"] == 1, coming["input_ids"], -100)
    joined = join(own, coming, 0.5)
    assert joined.sequences == (1, 1)
    assert joined.tokens == 2
    assert joined.inputs["input_ids"].tolist() == [[0, 5, 6, 0], [0, 0, 7, 8]]
    assert joined.inputs["attention_mask"].tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]
    assert joined.inputs["labels"].tolist() == [[-100, 5, 6, -100], [-100, -100, 7, 8]]
    assert float(joined.own_share) == 0.5
    nothing = {**joined.inputs, "labels": torch.full((2, 4), -100)}
    assert float(joined._replace(inputs=nothing).own_share) == 0, "not 0 / 0"


@pytest.mark.parametrize("change", [{"shift_labels": torch.zeros(1, 3)}, {"labels": None}, {"labels": torch.zeros(1)}])
def test_batches_of_something_else_are_refused_by_name(change):
    batch = {name: torch.ones(1, 3, dtype=torch.long) for name in ("input_ids", "attention_mask", "labels")}
    strange = {name: value for name, value in {**batch, **change}.items() if value is not None}
    for pair in ((strange, batch), (batch, strange)):
        with pytest.raises(
            ValueError, match=rf"joins batches of .*'{next(iter(change))}' is missing or something else"
        ):
            join(*pair, 0.5)


def test_an_epoch_of_one_batch_is_told(tmp_path, caplog):
    trainer = build(SLSAMTrainer, tmp_path, CONFIG, per_device_train_batch_size=4, max_steps=3, data=texts(4))
    trainer.train()
    assert sum("no sequences come after it" in record.message for record in caplog.records) == 1
    assert trainer._slsam_batches is None, "no batch and no worker process outlives the epoch"


def test_what_ran_ahead_of_another_batch_is_not_used(tmp_path):
    """A checkpoint's ascent belongs to the batch that would have come; `ignore_data_skip` starts with another."""
    settings = {"per_device_train_batch_size": 3, "max_steps": 4, "data": texts(12), "save_strategy": "steps"}
    build(SLSAMTrainer, tmp_path / "whole", CONFIG, save_steps=2, **settings).train()

    class Watching(SLSAMTrainer):
        known = None

        def training_step(self, *args, **kwargs):
            if self.known is None:
                self.known = len(self.slsam.memory.gradients)
            return super().training_step(*args, **kwargs)

    for skip, expected in ((False, True), (True, False)):
        trainer = build(Watching, tmp_path / str(skip), CONFIG, ignore_data_skip=skip, **settings)
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
        assert bool(trainer.known) is expected


def test_other_trainers_and_adapters_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"joins batches of texts, and SLSAMDPOTrainer makes others; use"):
        other_trainers.build(other_trainers.OTHERS["DPO"], tmp_path, CONFIG)
    trainer = build(SLSAMTrainer, tmp_path, CONFIG, peft_config=lora(use_dora=True))
    with pytest.raises(ValueError, match=r"only linear modules can, and .*lora_.* is no weight of one"):
        trainer.train()
    trainer = build(SLSAMTrainer, tmp_path, CONFIG)
    add_hook_to_module(trainer.slsam_arms[0].linears[0], ModelHook())
    with pytest.raises(ValueError, match="its forward has been replaced"):
        trainer.train()
