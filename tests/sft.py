"""Short trainings of a tiny Llama through TRL."""

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig

WORDS = 400


def tokenizer():
    """Return a tokenizer of numbered words."""
    words = ["<unk>", "<pad>", "<eos>", *(f"w{i}" for i in range(WORDS))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")


def rows(count=40):
    """Return texts of unequal length."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 20, (count,), generator=generator).tolist()
    texts = [torch.randint(WORDS, (n,), generator=generator).tolist() for n in lengths]
    return Dataset.from_list([{"text": " ".join(f"w{i}" for i in text)} for text in texts])


def llama(dtype=torch.float32):
    """Return a Llama of five small blocks."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS + 3,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(dtype)


def train(cls, folder, config=None, *, double=False, dropout=0.1, steps=3, **settings):
    """Train three steps and return the trainer; `settings` are `SFTConfig`'s."""
    arguments = {
        "per_device_train_batch_size": 2,
        "max_steps": steps,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "shuffle_dataset": False,
    }
    trainer = cls(
        llama(torch.float64 if double else torch.float32),
        args=SFTConfig(str(folder), **{**arguments, **settings}),
        train_dataset=rows(),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout),
        **({} if config is None else {"slsam_config": config}),
    )
    trainer.train()
    return trainer
