"""Arms cover every trainable parameter once, in depth order, found by structure."""

import pytest
import torch
from torch import nn

from slsam_peft import arms_of
from tests.decoders import FAMILIES, decoder


def covered(arms):
    return [name for arm in arms for name in arm.parameter_names]


def trainable(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("granularity", ["block", "module", "tensor", lambda name: name.rsplit(".", 3)[0]])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_trainable_parameter_is_in_one_arm(family, granularity):
    model = decoder(family)
    arms = arms_of(model, granularity)
    assert sorted(covered(arms)) == sorted(trainable(model))
    parameters = dict(model.named_parameters())
    assert all(parameters[n] is p for arm in arms for n, p in zip(arm.parameter_names, arm.parameters, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_block_arms_are_the_blocks_in_order(family):
    arms = arms_of(decoder(family))
    assert [arm.depth for arm in arms] == list(range(len(arms.blocks)))


def test_module_arms_hold_both_factors_of_an_adapter():
    arms = arms_of(decoder("llama"), "module")
    assert len(arms) == 5 * 7
    assert all(len(arm.parameters) == 2 for arm in arms)
    assert [arm.depth for arm in arms] == [i for i in range(5) for _ in range(7)]
    assert arms[0].name.endswith("layers.0.self_attn.q_proj")


def test_tensor_arms_keep_the_order_of_named_parameters():
    model = decoder("gpt2")
    assert covered(arms_of(model, "tensor")) == trainable(model)


def test_every_parameter_has_the_place_where_its_module_reads_it():
    for settings, count in (({}, 2), ({"use_dora": True}, 3)):
        for arm in arms_of(decoder("llama", **settings), "module"):
            assert len(arm.parameters) == count
            for parameter, sites in zip(arm.parameters, arm.sites, strict=True):
                assert [site.parameter is parameter for site in sites] == [True]
                assert sites[0].module._parameters[sites[0].name] is parameter


def test_the_head_lies_above_and_embeddings_below():
    arms = arms_of(decoder("llama", modules_to_save=["lm_head"]))
    assert arms[-1].depth == 5
    assert "lm_head" in arms[-1].name
    arms = arms_of(decoder("llama", target_modules=["q_proj", "embed_tokens"]))
    assert arms[0].depth == -1
    assert "embed_tokens" in arms[0].name
    assert len(arms) == 6


def test_tied_weights_lie_at_their_lowest_place():
    model = decoder("llama")
    base = model.get_base_model()
    base.lm_head.weight = base.model.embed_tokens.weight
    base.lm_head.weight.requires_grad_(True)
    arms = arms_of(model)
    assert arms[0].depth == -1
    assert covered(arms).count("base_model.model.model.embed_tokens.weight") == 1
    assert {site.module for site in arms[0].sites[0]} == {base.model.embed_tokens, base.lm_head}


def test_only_the_active_adapter_is_an_arm():
    from peft import LoraConfig

    model = decoder("llama")
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"), autocast_adapter_dtype=False)
    assert all(".default." in name for name in covered(arms_of(model, "module")))
    model.set_adapter("other")
    arms = arms_of(model, "module")
    assert all(".other." in name for name in covered(arms))
    assert all(len(arm.parameters) == 2 for arm in arms)


class Patch(nn.Module):
    """An adapter whose names say nothing."""

    def __init__(self, width):
        super().__init__()
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.down, self.up = nn.Linear(width, 2, bias=False), nn.Linear(2, width, bias=False)

    def forward(self, x):
        return self.frozen(x) + self.up(self.down(x))


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.second, self.norm = Patch(width), Patch(width), nn.LayerNorm(width)

    def forward(self, x):
        return x + self.second(self.norm(self.first(x)))


def test_adapters_are_found_by_structure_not_by_name():
    model = nn.Module()
    model.lora_named_but_no_adapter = nn.Linear(4, 4)
    model.stack = nn.ModuleList(Layer(4) for _ in range(3))
    arms = arms_of(model, "module")
    names = [arm.name for arm in arms]
    assert names[:1] == ["lora_named_but_no_adapter"]
    assert [n for n in names if n.startswith("stack.1")] == ["stack.1.first", "stack.1.second", "stack.1.norm"]
    assert [len(a.parameters) for a in arms if a.name.startswith("stack.1")] == [2, 2, 2]
    assert [arm.name for arm in arms_of(model)] == ["lora_named_but_no_adapter", "stack.0", "stack.1", "stack.2"]


def test_errors_say_what_to_do():
    plain = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no trainable parameter; pass a peft_config"):
        arms_of(plain.requires_grad_(False))
    with pytest.raises(ValueError, match="Did you mean 'module'"):
        arms_of(decoder("llama"), "modul")


def test_repr_counts():
    assert "5 blocks" in repr(arms_of(decoder("llama")))
    assert torch.is_tensor(arms_of(decoder("llama"))[0].parameters[0])


@pytest.mark.parametrize("name", [None, 3, ("a", "b")])
def test_a_callable_granularity_must_name_its_arms(name):
    with pytest.raises(ValueError, match=r"the granularity returned .* for '0\.weight'; it must return an arm name"):
        arms_of(nn.Sequential(nn.Linear(2, 2)), lambda _: name)
