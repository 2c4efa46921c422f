"""One training in a process of its own, for test_resume.py."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig, LlamaForCausalLM, TrainerCallback

from slsam_peft import SLSAMConfig, SLSAMTrainer
from tests.tiny import build, llama, lora

STEPS, CUT = 4, 2
WIDE = 128  # rank at which every factor here has the 4,096 elements from which bitsandbytes keeps 8-bit moments
_TIMES = ("runtime", "per_second", "total_flos", "train_loss", "num_tokens")  # TRL 1.16 counts tokens from 0 again


class Draws(TrainerCallback):
    """Notes what each step drew and where it left the probabilities."""

    def __init__(self):
        self.seen = {}

    def on_step_end(self, args, state, control, **kwargs):
        slsam = self.trainer.slsam
        self.seen[state.global_step] = (slsam.active.tolist(), slsam.probabilities.tolist())


def base(folder, quantized):
    """Return the base model; in NF4 from a folder where it was saved."""
    if not quantized:
        return llama(num_hidden_layers=3)
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    quantization = BitsAndBytesConfig(**settings)
    return LlamaForCausalLM.from_pretrained(
        folder, quantization_config=quantization, device_map="cpu", dtype=torch.float32
    )


def flat(state, name):
    """Return a nested state (bitsandbytes nests what it quantises) as tensors by dotted name."""
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in flat(value, f"{name}.{key}").items()}
    return {name: torch.as_tensor(state).clone()} if isinstance(state, torch.Tensor | int | float) else {}


def train(folder, base_folder, settings, optimizer, quantized, reentrant, resume):
    """Train, from a checkpoint where `resume` names one, and leave `end.safetensors` and `end.json` in the folder."""
    draws = Draws()
    rank = WIDE if "8bit" in optimizer else 4
    trainer = build(
        SLSAMTrainer,
        Path(folder),
        SLSAMConfig(rho=0.1, active_fraction=0.5, **settings),
        model=base(base_folder, quantized),
        peft_config=lora(r=rank, target_modules=["q_proj", "down_proj"], lora_dropout=0.2),
        parts={"callbacks": [draws]},
        max_steps=STEPS,
        gradient_accumulation_steps=3,
        save_strategy="steps",
        save_steps=CUT,
        optim=optimizer,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    draws.trainer = trainer
    trainer.train(resume_from_checkpoint=resume)
    end = {f"weight.{n}": p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    end |= flat(trainer.optimizer.state_dict()["state"], "optimizer")
    plain = {}
    for name, value in trainer.slsam.state_dict().items():
        if isinstance(value, torch.Tensor):
            end[f"slsam.{name}"] = value.clone()
        else:
            plain[name] = value
    save_file({name: value.contiguous() for name, value in end.items()}, Path(folder) / "end.safetensors")
    steps = [log for log in trainer.state.log_history if log["step"] > CUT]
    logs = [{k: v for k, v in log.items() if not any(t in k for t in _TIMES)} for log in steps]
    later = {step: seen for step, seen in draws.seen.items() if step > CUT}
    report = {"state": plain, "draws": later, "logs": logs}
    (Path(folder) / "end.json").write_text(json.dumps(report))
