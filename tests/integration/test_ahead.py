"""Look-ahead ascents through SFTTrainer: sequences of the next batch ride along in this one's pass."""

import logging

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback, XLNetConfig, XLNetLMHeadModel
from trl import SFTTrainer

from slsam_peft import SLSAMConfig, SLSAMTrainer, arms_of
from slsam_peft.trainer.joining import join
from slsam_peft.trainer.riding import lora_pairs
from tests.integration import test_preference_trainers as other_trainers
from tests.look_ahead import exact_norms, first_rows
from tests.tiny import WORDS, build, llama, lora, texts
from tests.tolerances import FIRST_ORDER, REMEMBERED

RATE = 0.05
NAMES = ("input_ids", "attention_mask", "labels")


class Recording(SLSAMTrainer):
    """Keeps every batch of the trainer, how many rows each backward pass had, and what each step drew."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.start = {n: p.detach().clone() for n, p in self.model.state_dict().items()}
        self.batches, self.rows, self.draws = [], [], []

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.batches.append({k: inputs[k].clone() for k in NAMES if k in inputs})
        self.rows.append([])
        loss = super().training_step(model, inputs, num_items_in_batch)
        upcoming = self.slsam.sampler.upcoming
        self.draws.append((self.slsam.active.clone(), None if upcoming is None else upcoming.mask.clone()))
        return loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        if torch.is_grad_enabled():
            self.rows[-1].append(len(inputs["input_ids"]))
        return super().compute_loss(model, inputs, *args, **kwargs)


def recorded(folder, config=None, **settings):
    """Train two epochs of ten sequences, three per batch: the last batch of an epoch has a single one."""
    settings = {
        "per_device_train_batch_size": 3,
        "max_steps": -1,
        "num_train_epochs": 2,
        "data": texts(10),
        **settings,
    }
    trainer = build(Recording, folder, config, **settings)
    trainer.train()
    return trainer


@pytest.mark.parametrize("wanted", [1, 2])
def test_each_step_is_one_pass_over_its_batch_and_sequences_of_the_next(wanted, tmp_path):
    """An epoch's first step makes its ascent in a small pass of its own, and nothing looks into the next epoch."""
    trainer = recorded(tmp_path / "ours", SLSAMConfig(ascent_sequences=wanted))
    epoch = [[wanted, 3 + wanted], [3 + wanted], [3 + 1], [1]]
    assert trainer.rows == [*epoch, *epoch]
    assert trainer.slsam.steps == 8
    assert trainer._slsam_batches is None, "no batch and no worker process outlives the epoch"
    settings = {"per_device_train_batch_size": 3, "max_steps": -1, "num_train_epochs": 2, "data": texts(10)}
    plain = build(SFTTrainer, tmp_path / "plain", **settings)
    plain.train()
    tokens = [[log["num_tokens"] for log in t.state.log_history if "num_tokens" in log] for t in (trainer, plain)]
    assert tokens[0] == tokens[1]
    assert all(log["slsam/loss_is_at_w_plus_e"] == 1 for log in trainer.state.log_history if "loss" in log)


def at(model, inputs, offsets):
    """Return mean loss, mean entropy, accuracy and the gradients of a batch at w + e; w is put back."""
    saved = {p: p.detach().clone() for p in offsets}
    model.zero_grad()
    with torch.no_grad():
        for p, e in offsets.items():
            p.add_(e)
    arguments = {k: v for k, v in inputs.items() if k != "labels"}
    log_probs = model(**arguments, use_cache=False).logits[:, :-1].log_softmax(-1)
    labels = inputs["labels"][:, 1:]
    seen = labels != -100
    loss = -log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0][seen].mean()
    loss.backward()
    with torch.no_grad():
        for p, w in saved.items():
            p.copy_(w)
    entropy = torch.special.entr(log_probs.detach().exp()).sum(-1)[seen].mean()
    accuracy = (log_probs.argmax(-1) == labels)[seen].double().mean()
    numbers = {"loss": float(loss.detach()), "entropy": float(entropy), "mean_token_accuracy": float(accuracy)}
    return numbers, {p: p.grad.clone() for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
@pytest.mark.parametrize(
    "config", [None, SLSAMConfig(method="auto", rho=0.2, active_fraction=1.0)], ids=["default", "length"]
)
def test_training_follows_a_plain_reference(config, reentrant, tmp_path):
    """Unequal lengths, plain SGD, two epochs: weights, and the logs of own tokens at w + e."""
    trainer = recorded(
        tmp_path,
        config,
        model=exact_norms(llama().double()),
        activation_checkpointing=reentrant is not None,
        activation_checkpointing_kwargs=None if reentrant is None else {"use_reentrant": reentrant},
        optim="sgd",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
    )
    model = exact_norms(get_peft_model(llama().double(), lora(task_type="CAUSAL_LM")).double())
    model.load_state_dict(trainer.start)
    settings = trainer.slsam.config
    arms = arms_of(model)
    memory, expected, radii = {}, [], []
    for step, (own, (active, upcoming)) in enumerate(zip(trainer.batches, trainer.draws, strict=True)):
        drawn = [p for arm, on in zip(arms, active.tolist(), strict=True) if on for p in arm.parameters]
        gradients = memory if step % 4 else at(model, first_rows(own, 1), {})[1]
        ascent = {p: gradients[p] for p in drawn}
        norm = torch.stack([g.norm() for g in ascent.values()]).norm()
        rho = settings.rho if settings.loss_rise is None else min(settings.loss_rise / float(norm), settings.rho_max)
        radii.append(rho)
        memory = {}
        if step % 4 < 3:
            riding = at(model, join(own, trainer.batches[step + 1], 1).riding, {})[1]
            following = [p for arm, on in zip(arms, upcoming.tolist(), strict=True) if on for p in arm.parameters]
            memory = {p: riding[p].bfloat16().double() for p in following}
        numbers, descent = at(model, own, {p: rho * g / (norm + 1e-12) for p, g in ascent.items()})
        expected.append(numbers)
        with torch.no_grad():
            for p, g in descent.items():
                p.sub_(RATE * g)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    for log, numbers in zip(logs, expected, strict=True):
        assert {k: log[k] for k in numbers} == pytest.approx(numbers, rel=REMEMBERED)
    assert [log["slsam/rho"] for log in logs] == pytest.approx(radii, rel=REMEMBERED)
    for (name, p), q in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=REMEMBERED, atol=REMEMBERED, msg=lambda m, n=name: f"{n}: {m}")


PACKED = {
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 16},
    "bfd": {"packing": True, "packing_strategy": "bfd", "max_length": 24},
    "padding-free": {"padding_free": True, "max_length": None},
}


@pytest.mark.parametrize("layout", PACKED)
def test_packed_batches_ride_too(layout, tmp_path, caplog):
    """What rides along is found to be separate, and tokens are counted once."""
    data, settings = texts(24), {"per_device_train_batch_size": 2, "max_steps": 4, **PACKED[layout]}
    with caplog.at_level(logging.WARNING, logger="slsam_peft"):
        ours = build(SLSAMTrainer, tmp_path / "ours", SLSAMConfig(), data=data, **settings)
        ours.train()
    assert not [r.message for r in caplog.records if "rides along" in r.message]
    assert ours.slsam.runner.pairs
    assert ours.slsam.memory.gradients or layout == "bfd"
    plain = build(SFTTrainer, tmp_path / "plain", data=data, **settings)
    plain.train()
    tokens = [[log["num_tokens"] for log in t.state.log_history if "num_tokens" in log] for t in (ours, plain)]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("cut", [2, 4], ids=["within an epoch", "between epochs"])
def test_resumed_training_goes_on_bit_for_bit(cut, tmp_path):
    """Four steps per epoch, shuffled, with dropout: what rode along and the draw that stands are in the checkpoint."""
    settings = {
        "per_device_train_batch_size": 3,
        "max_steps": 7,
        "data": texts(12),
        "save_strategy": "steps",
        "save_steps": cut,
        "peft_config": lora(lora_dropout=0.2),
    }
    whole = build(SLSAMTrainer, tmp_path / "whole", **settings)
    whole.train()
    parted = build(SLSAMTrainer, tmp_path / "parted", **settings)
    parted.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{cut}"))
    assert whole.slsam.steps == parted.slsam.steps == 7
    assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), parted.model.parameters(), strict=True))
    kept = [t.slsam.memory.gradients for t in (whole, parted)]
    assert kept[0]
    assert kept[0].keys() == kept[1].keys()
    assert all(torch.equal(kept[0][i], kept[1][i]) for i in kept[0])
    assert torch.equal(whole.slsam.sampler.upcoming.mask, parted.slsam.sampler.upcoming.mask)
    assert torch.equal(whole.slsam.probabilities, parted.slsam.probabilities)


class Spoiled(Recording):
    """What rides along in the third step makes the loss NaN."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        rides = len(inputs["input_ids"]) > 3
        return loss * float("nan") if rides and self.slsam.steps == 2 and torch.is_grad_enabled() else loss


def test_a_bad_riding_sequence_is_left_out(tmp_path):
    """The step is done again without it and skips nothing; the next one makes its own ascent."""
    settings = {"per_device_train_batch_size": 3, "max_steps": 4, "data": texts(15)}
    trainer = build(Spoiled, tmp_path, SLSAMConfig(), **settings)
    trainer.train()
    assert trainer.rows == [[1, 4], [4], [4, 3], [1, 4]]
    assert trainer.slsam.skipped == 0
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert all(log["loss"] == log["loss"] and log["slsam/rho"] > 0 for log in logs)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_a_pass_that_is_interrupted_leaves_the_model_as_it_was(tmp_path):
    class Interrupted(SLSAMTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            if self.slsam.steps == 2:
                raise KeyboardInterrupt
            return loss

    trainer = build(Interrupted, tmp_path, per_device_train_batch_size=3, max_steps=4, data=texts(12))
    parameters = list(trainer.model.named_parameters())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.slsam.memory.gradients, "the look-ahead gradients for this step are still there"
    assert all(p is q for (_, p), (_, q) in zip(parameters, trainer.model.named_parameters(), strict=True))
    assert all(p.grad is None and p.requires_grad for arm in trainer.slsam.arms for p in arm.parameters)


NOT_RIDING = {
    "accumulation": ({"gradient_accumulation_steps": 2}, r"one micro-batch per step.*=2"),
    "DoRA": ({"peft_config": lora(use_dora=True)}, "only pairs of LoRA factors can"),
    "biases": ({"peft_config": lora(lora_bias=True)}, "only pairs of LoRA factors can"),
    "NEFTune": ({"neftune_noise_alpha": 5.0}, "NEFTune's noise depends on the length of a batch"),
    "label smoothing": ({"label_smoothing_factor": 0.1}, "label smoothing makes another one"),
}


@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed", "ignore:.label_smoothing_factor. is deprecated")
@pytest.mark.parametrize("case", NOT_RIDING)
def test_where_nothing_can_ride_the_ascent_is_a_pass_of_its_own(case, tmp_path):
    """By default without a word; by name it is refused before training."""
    settings, message = NOT_RIDING[case]
    settings = {"per_device_train_batch_size": 3, "max_steps": 2, **settings}
    trainer = build(Recording, tmp_path, SLSAMConfig(), **settings)
    trainer.train()
    assert not trainer.slsam.runner.pairs
    assert trainer.rows[0] == [1, 3]
    assert all(log["slsam/rho"] > 0 for log in trainer.state.log_history if "loss" in log)
    with pytest.raises(ValueError, match=message):
        build(SLSAMTrainer, tmp_path, SLSAMConfig(ascent="ahead", descent="all"), **settings).train()


@pytest.mark.parametrize("rope", ["dynamic", "longrope", "default"])
def test_nothing_rides_where_positions_depend_on_the_longest_sequence(rope, tmp_path):
    factors = {"long_factor": [2.0] * 4, "short_factor": [1.0] * 4, "original_max_position_embeddings": 64}
    settings = {"default": {}, "dynamic": {"factor": 2.0}, "longrope": {"factor": 2.0, **factors}}[rope]
    model = llama(rope_parameters={"rope_type": rope, "rope_theta": 1e4, **settings})
    trainer = build(SLSAMTrainer, tmp_path, model=model, per_device_train_batch_size=3, max_steps=1)
    trainer.train()
    assert trainer.slsam.ascent.rides == (rope == "default")


@pytest.mark.filterwarnings("ignore:.compute_loss_func. is deprecated:FutureWarning")
def test_a_loss_of_ones_own_cannot_ride(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        return outputs.logits.float().square().mean()

    with pytest.raises(ValueError, match=r"needs TRL's own loss.*Use ascent='auto', or 'partial'"):
        build(SLSAMTrainer, tmp_path, SLSAMConfig(ascent="ahead", descent="all"), parts={"compute_loss_func": loss})
    trainer = build(SLSAMTrainer, tmp_path, parts={"compute_loss_func": loss}, max_steps=2)
    trainer.train()
    assert not trainer.slsam.ascent.rides


def test_what_ran_ahead_of_another_batch_is_not_used(tmp_path):
    """A checkpoint's ascent belongs to the batch that would have come; `ignore_data_skip` starts with another."""
    settings = {"per_device_train_batch_size": 3, "max_steps": 4, "data": texts(12), "save_strategy": "steps"}
    build(SLSAMTrainer, tmp_path / "whole", save_steps=2, **settings).train()

    class Watching(SLSAMTrainer):
        known = None

        def training_step(self, *args, **kwargs):
            if self.known is None:
                self.known = len(self.slsam.memory.gradients)
            return super().training_step(*args, **kwargs)

    for skip, expected in ((False, True), (True, False)):
        trainer = build(Watching, tmp_path / str(skip), ignore_data_skip=skip, **settings)
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
        assert bool(trainer.known) is expected


def test_other_trainers_and_adapters_are_refused_by_name(tmp_path):
    by_name = SLSAMConfig(ascent="ahead", descent="all")
    with pytest.raises(ValueError, match=r"joins batches of texts, and SLSAMDPOTrainer makes others. Use"):
        other_trainers.build(other_trainers.OTHERS["DPO"], tmp_path, by_name)
    trainer = build(SLSAMTrainer, tmp_path, by_name)
    add_hook_to_module(lora_pairs(trainer.model)[0].down, ModelHook())
    with pytest.raises(ValueError, match="only pairs of LoRA factors can"):
        trainer.train()


class Mixing(torch.nn.Module):
    """Adds the mean over the batch."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        y = self.inner(x)
        return y + 0.1 * y.mean(0, keepdim=True)


def test_a_model_that_mixes_sequences_is_found_out(tmp_path, caplog):
    """One warning, and from the first step on the training is the one without riding."""

    def trained(name, config):
        model = llama()
        model.model.layers[2].mlp = Mixing(model.model.layers[2].mlp)
        settings = {"per_device_train_batch_size": 3, "max_steps": 4, "data": texts(12)}
        trainer = build(SLSAMTrainer, tmp_path / name, config, model=model, **settings)
        trainer.train()
        return trainer

    with caplog.at_level(logging.WARNING, logger="slsam_peft"):
        ours = trained("auto", SLSAMConfig())
    assert sum("no sequence rides along" in r.message for r in caplog.records) == 1
    small = trained("partial", SLSAMConfig(method="auto", ascent="partial"))
    logs = [[(log["num_tokens"], log["loss"]) for log in t.state.log_history if "loss" in log] for t in (ours, small)]
    assert logs[0][0] == logs[1][0], (
        "the draw of the second step is made one step early, so only the first is the same"
    )
    assert [tokens for tokens, _ in logs[0]] == [tokens for tokens, _ in logs[1]]


def time_first(length=5):
    """Return an XLNet, whose layers see (length, batch), and texts of one length."""
    torch.manual_seed(0)
    shape = {"vocab_size": WORDS + 5, "d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 48, "dropout": 0.0}
    marks = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
    words = torch.randint(WORDS, (12, length - 1)).tolist()
    rows = [{"text": " ".join(f"w{i}" for i in row)} for row in words]
    return XLNetLMHeadModel(XLNetConfig(**shape, **marks)), Dataset.from_list(rows)


@pytest.mark.parametrize("length", [5, 7], ids=["as many sequences as tokens", "another length"])
def test_a_model_that_turns_its_batch_is_found_out(length, tmp_path, caplog):
    """Four own sequences and one that rides along are as many as tokens, so shapes alone show nothing. From the first
    step on the training is the one without riding, bit for bit.
    """

    def trained(ascent):
        model, data = time_first(length)
        options = {"data": data, "peft_config": lora(target_modules=["layer_1", "layer_2"])}
        config = SLSAMConfig(method="auto", ascent=ascent, active_fraction=1.0, rho=0.1)
        settings = {"per_device_train_batch_size": 4, "max_steps": 4, "activation_checkpointing": False}
        trainer = build(SLSAMTrainer, tmp_path / ascent, config, model=model, **options, **settings)
        trainer.train()
        return trainer

    small = trained("partial")
    for ascent in ("auto", "ahead"):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="slsam_peft"):
            ours = trained(ascent)
        assert sum("no sequence rides along" in r.message for r in caplog.records) == 1
        assert all(torch.equal(p, q) for p, q in zip(ours.model.parameters(), small.model.parameters(), strict=True))


@pytest.mark.parametrize("ascent", ["partial", "two_pass", "auto"])
def test_ascents_of_a_model_that_turns_its_batch(ascent, tmp_path):
    """To first order the loss of the ascent's sequences rises by rho |g|, whatever the ascent."""
    model, data = time_first()
    options = {"data": data, "peft_config": lora(target_modules=["layer_1", "layer_2"])}
    config = SLSAMConfig(method="auto", ascent=ascent, rho=0.01)
    settings = {"per_device_train_batch_size": 4, "max_steps": 1, "activation_checkpointing": False}
    trainer = build(SLSAMTrainer, tmp_path, config, model=model, **options, **settings)
    trainer.train()
    assert trainer.slsam.metrics["ascent_gain"] == pytest.approx(1.0, abs=FIRST_ORDER)


class Freezing(TrainerCallback):
    """Freezes, or thaws, the adapters of the lower blocks before the third step."""

    def __init__(self, start, then):
        self.start, self.then = start, then

    def set(self, model, on):
        for name, parameter in model.named_parameters():
            if "lora_" in name and any(f"layers.{i}." in name for i in range(3)):
                parameter.requires_grad_(on)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.set(model, self.start)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            self.set(model, self.then)
            self.before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


CONFIGS = {
    "default": SLSAMConfig(),
    "dense": SLSAMConfig(method="sam"),
    "some arms": SLSAMConfig(active_fraction=0.8, design="fixed_size", seed=1),
    "paper": SLSAMConfig(method="paper", active_fraction=0.6),
    "remembered": SLSAMConfig(active_fraction=1.0, ascent="remembered"),
    "small pass": SLSAMConfig(method="auto", ascent="partial"),
    "no radius": SLSAMConfig(rho=0),
}


ALWAYS = ("default", "paper", "no radius")  # the others in the slow run


@pytest.mark.parametrize("start", [True, False], ids=["frozen", "thawed"])
@pytest.mark.parametrize("name", [n if n in ALWAYS else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS])
def test_what_a_callback_freezes_is_left_alone_and_what_it_thaws_is_trained(name, start, tmp_path):
    call = Freezing(start, not start)
    settings = {"per_device_train_batch_size": 3, "max_steps": 8, "optim": "sgd", "data": texts(12)}
    trainer = build(SLSAMTrainer, tmp_path, CONFIGS[name], parts={"callbacks": [call]}, **settings)
    trainer.train()
    now = dict(trainer.model.named_parameters())
    moved = {n.split("layers.")[1][0] for n, p in call.before.items() if not torch.equal(p, now[n])}
    lower = {"0", "1", "2"}
    assert moved & lower == (set() if start else lower)
    assert {"3", "4"} <= moved
    assert all(
        p.requires_grad is (not start) for n, p in now.items() if "lora_" in n and n.split("layers.")[1][0] in lower
    )
    assert len(trainer.slsam.arms) == 5


def test_what_the_optimizer_does_not_hold_cannot_be_thawed(tmp_path):
    class Head(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                model.get_parameter("base_model.model.lm_head.weight").requires_grad_(True)

    trainer = build(SLSAMTrainer, tmp_path, parts={"callbacks": [Head()]})
    with pytest.raises(ValueError, match=r"lm_head\.weight requires a gradient since training began"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_lora_configs_of_the_suite_ride():
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear"))
    assert {w for pair in lora_pairs(model) for w in pair.weights} == {
        p for p in model.parameters() if p.requires_grad
    }
