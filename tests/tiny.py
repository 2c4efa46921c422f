"""Tiny models, tokenizers and data sets built from configs, and short trainings of them."""

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import SFTConfig

WORDS = 200
BLOCKS = 5
_MARKS = ["<unk>", "<pad>", "<eos>", "<user>", "<assistant>"]

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
<assistant> {% generation %}{{ message['content'] }} <eos> {% endgeneration %}
{%- else -%}
<user> {{ message['content'] }} {% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<assistant> {% endif -%}"""


def tokenizer():
    """Return a tokenizer of numbered words whose chat template marks what the assistant says."""
    words = [*_MARKS, *(f"w{i}" for i in range(WORDS))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")
    made.chat_template = CHAT_TEMPLATE
    return made


def llama(cls=LlamaForCausalLM, **settings):
    """Return a Llama of five blocks, 32 wide; the same weights in every call."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": WORDS + len(_MARKS),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 2,
    }
    return cls(LlamaConfig(**{**shape, **settings}))


def reward_model():
    """Return the same body with a head that scores a sequence."""
    return llama(LlamaForSequenceClassification, num_labels=1)


def _sentences(count, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 16, (count,), generator=generator).tolist()
    return [" ".join(f"w{i}" for i in torch.randint(WORDS, (n,), generator=generator).tolist()) for n in lengths]


def texts(count=24, seed=0):
    """Return rows of plain text, of unequal length."""
    return Dataset.from_list([{"text": s} for s in _sentences(count, seed)])


def completions(count=24, seed=0):
    """Return rows of a prompt and its completion."""
    pairs = zip(_sentences(count, seed), _sentences(count, seed + 1), strict=True)
    return Dataset.from_list([{"prompt": p, "completion": f" {c}"} for p, c in pairs])


def conversations(count=24, seed=0):
    """Return rows of a question and an answer as messages."""
    pairs = zip(_sentences(count, seed), _sentences(count, seed + 1), strict=True)
    return Dataset.from_list(
        [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]
    )


def preferences(count=24, seed=0):
    """Return rows of a prompt with a chosen and a rejected completion."""
    rows = zip(*(_sentences(count, seed + i) for i in range(3)), strict=True)
    return Dataset.from_list([{"prompt": p, "chosen": f" {c}", "rejected": f" {r}"} for p, c, r in rows])


def lora(**settings):
    """Return the LoRA settings of the suite: every linear layer, rank 4."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.0, **settings})


def sft_args(folder, *, config_class=SFTConfig, **settings):
    """Return the arguments of a short CPU training; `settings` are `SFTConfig`'s, or `config_class`'s."""
    arguments = {
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return config_class(str(folder), **{**arguments, **settings})


def build(cls, folder, config=None, *, model=None, data=None, peft_config="lora", parts=None, **settings):
    """Return a trainer that has not trained yet.

    Args:
        cls: The trainer's class.
        folder: Its output folder.
        config: `SLSAMConfig`; `None` passes none.
        model: Defaults to `llama()`.
        data: Training set; defaults to `texts()`.
        peft_config: Defaults to `lora()`; `None` for a model that carries its adapter.
        parts: More arguments of the trainer.
        settings: `SFTConfig`'s.
    """
    return cls(
        llama() if model is None else model,
        args=sft_args(folder, **settings),
        train_dataset=texts() if data is None else data,
        processing_class=tokenizer(),
        peft_config=lora() if peft_config == "lora" else peft_config,
        **(parts or {}),
        **({} if config is None else {"slsam_config": config}),
    )


def train(cls, folder, config=None, **settings):
    """Build a trainer as `build` does, train it and return it."""
    trainer = build(cls, folder, config, **settings)
    trainer.train()
    return trainer
