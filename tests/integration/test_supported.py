"""Features of the trainers around SL-SAM that work or are refused, and other trainers by the mixin."""

import pytest
import torch
from trl.models import activation_offloading

from slsam_peft import SLSAM, SLSAMConfig, SLSAMTrainer
from tests.tiny import build, conversations, lora, texts
from tests.tiny import tokenizer as make_tokenizer
from tests.watch import Watch, check

CONFIG = SLSAMConfig(rho=0.05, active_fraction=0.4)


def watched(trainer, **settings):
    watch = Watch(**settings)
    trainer.add_callback(watch)
    trainer.train()
    check(trainer, watch)
    return trainer


def same_weights(first, second):
    return all(torch.equal(p, q) for p, q in zip(first.model.parameters(), second.model.parameters(), strict=True))


@pytest.mark.parametrize("hidden_state_cache_limit_mib", [0, 256])
def test_neftune_noise_is_that_of_the_first_pass(hidden_state_cache_limit_mib, tmp_path):
    """At a tiny radius both passes have the same loss, unless they drew different noise."""
    config = SLSAMConfig(rho=1e-6, active_fraction=0.5, hidden_state_cache_limit_mib=hidden_state_cache_limit_mib)
    settings = {"neftune_noise_alpha": 50.0}
    trainer = build(SLSAMTrainer, tmp_path / "a", config, **settings)
    trainer.train()
    plain = build(SLSAMTrainer, tmp_path / "b", config)
    plain.train()
    assert not same_weights(trainer, plain), "the noise did nothing"
    logs = [log for log in trainer.state.log_history if "slsam/sharpness" in log]
    assert len(logs) == 3
    for log in logs:
        assert abs(log["slsam/sharpness"]) < 1e-5


def test_neftune(tmp_path):
    watched(build(SLSAMTrainer, tmp_path, CONFIG, neftune_noise_alpha=5.0))


@pytest.mark.parametrize("config", [CONFIG, SLSAMConfig(ascent="remembered")], ids=["two_pass", "remembered"])
def test_auto_find_batch_size_ends_like_the_size_it_finds(config, tmp_path):
    """The first size raises an out-of-memory error in the first step; training starts anew with a smaller one."""
    trainer = build(SLSAMTrainer, tmp_path / "a", config, auto_find_batch_size=True, per_device_train_batch_size=4)
    embed = trainer.model.get_input_embeddings()
    sizes = []

    def small_memory(module, args):
        sizes.append(args[0].shape[0])
        if args[0].shape[0] > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    embed.register_forward_pre_hook(small_memory)
    trainer.train()
    assert sizes[0] == 4
    assert trainer.state.global_step == trainer.slsam.steps == 3
    found = trainer._train_batch_size
    assert found <= 2
    direct = build(SLSAMTrainer, tmp_path / "b", config, per_device_train_batch_size=found)
    direct.train()
    assert torch.equal(trainer.slsam.probabilities, direct.slsam.probabilities)
    assert same_weights(trainer, direct)


def test_streaming_data_set_trains_like_the_same_rows(tmp_path):
    settings = {"gradient_accumulation_steps": 3, "max_steps": 3}
    stream = build(SLSAMTrainer, tmp_path / "a", CONFIG, data=texts().to_iterable_dataset(), **settings)
    watched(stream)
    rows = build(SLSAMTrainer, tmp_path / "b", CONFIG, train_sampling_strategy="sequential", **settings)
    rows.train()
    assert same_weights(stream, rows)


def test_streaming_data_set_with_a_short_last_group(tmp_path, monkeypatch):
    """Ten rows are groups of three and two micro-batches of two. transformers makes no optimizer step for a stream's
    short group; it is a step of its own here, and its gradient is not mixed into the next one.
    """
    data = texts(10).to_iterable_dataset()
    trainer = build(SLSAMTrainer, tmp_path, CONFIG, data=data, gradient_accumulation_steps=3, max_steps=3)
    counts = []
    accumulate = SLSAM.accumulate

    def counting(slsam, passes, index=0, count=1):
        counts.append((index, count))
        return accumulate(slsam, passes, index, count)

    monkeypatch.setattr(SLSAM, "accumulate", counting)
    trainer.train()
    three, two = [(0, 3), (1, 3), (2, 3)], [(0, 2), (1, 2)]
    assert counts == [*three, *two, *three, *two, *three]
    assert trainer.state.global_step == 3
    assert trainer.slsam.steps == 5


def test_added_chat_tokens_are_arms_at_the_bottom(tmp_path):
    """TRL then trains rows of the embeddings and the head; a step that draws the embeddings runs to the bottom."""
    chatty = make_tokenizer()
    chatty.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|over|>"]})
    chatty.chat_template = chatty.chat_template.replace("<user>", "<|turn|>").replace("<eos>", "<|over|>")
    chatty.eos_token = "<|over|>"
    chatty.save_pretrained(tmp_path / "chatty")
    trainer = build(
        SLSAMTrainer,
        tmp_path / "out",
        SLSAMConfig(rho=0.05, active_fraction=0.5),
        data=conversations(),
        chat_template_path=str(tmp_path / "chatty"),
    )
    watched(trainer)
    depths = [arm.depth for arm in trainer.slsam.arms]
    assert depths == [-1, 0, 1, 2, 3, 4, 5]
    assert "embed_tokens" in trainer.slsam.arms[0].name
    assert "lm_head" in trainer.slsam.arms[-1].name


def test_adapter_on_the_head_is_refused_by_trl(tmp_path):
    """Its fused loss reads the head's weight itself and would never train the adapter."""
    with pytest.raises(ValueError, match="PEFT adapter to `lm_head` is not supported"):
        build(SLSAMTrainer, tmp_path, CONFIG, peft_config=lora(target_modules=["q_proj", "lm_head"]))


@pytest.mark.parametrize("checkpointing", [True, False])
def test_activation_offloading(checkpointing, tmp_path, monkeypatch):
    """TRL's context needs an accelerator to offload from; without one the CPU stands in and copies are made all the
    same. Training is that without offloading.
    """
    kept = []
    if torch.accelerator.current_accelerator() is None:
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cpu"))
        monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)
    make = activation_offloading.OffloadActivations.__init__

    def made(self, *args, **kwargs):
        make(self, **{**kwargs, "use_streams": False, "use_pin_memory": False})
        pack = self.pack_hook
        self.pack_hook = lambda tensor: kept.append(tensor.shape) or pack(tensor)

    monkeypatch.setattr(activation_offloading.OffloadActivations, "__init__", made)
    settings = {"activation_checkpointing": checkpointing}
    offloaded = watched(build(SLSAMTrainer, tmp_path / "a", CONFIG, activation_offloading=True, **settings))
    plain = watched(build(SLSAMTrainer, tmp_path / "b", CONFIG, **settings))
    assert isinstance(offloaded.maybe_activation_offload_context, activation_offloading.OffloadActivations)
    assert same_weights(offloaded, plain)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="Liger's kernels are Triton kernels; SLSAM_TEST_GPU=1 shows a GPU"
)
@pytest.mark.filterwarnings("ignore:.use_liger_kernel=True. is deprecated:FutureWarning")
def test_liger_kernels(tmp_path):
    pytest.importorskip("liger_kernel")
    watched(build(SLSAMTrainer, tmp_path, CONFIG, use_liger_kernel=True, use_cpu=False))
