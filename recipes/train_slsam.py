# python recipes/train_slsam.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data train.jsonl --output_dir adapter
"""LoRA with SL-SAM in Python: `SLSAMTrainer` where `SFTTrainer` would be, and a larger learning rate.

`train.jsonl` holds one conversation per line: {"messages": [{"role": "user", "content": "..."}, ...]}.
"""

import argparse
from collections.abc import Sequence

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig

from slsam_peft import SLSAMTrainer


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or a name on the Hub")
    parser.add_argument("--data", required=True, help="a JSONL file")
    parser.add_argument("--output_dir", required=True, help="where the adapter is written")
    parser.add_argument("--max_steps", type=int, default=200)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, save the adapter and show what the sampler has learned."""
    # The trainer takes what SFTTrainer takes; `slsam_config=SLSAMConfig(...)` would change the settings of SL-SAM.
    options = parse(argv)
    on_gpu = torch.cuda.is_available()
    trainer = SLSAMTrainer(
        options.model,
        args=SFTConfig(
            output_dir=options.output_dir,
            max_steps=options.max_steps,
            per_device_train_batch_size=4,
            learning_rate=4e-4,  # twice QLoRA's (arXiv 2305.14314): twice plain LoRA's did best
            model_init_kwargs={"dtype": "bfloat16" if on_gpu else "float32"},
            bf16=on_gpu,
            use_cpu=not on_gpu,
            dataloader_pin_memory=on_gpu,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=options.data, split="train"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),  # TRL's r
    )
    # The adapter is plain PEFT's; what the sampler has learned is of interest for this run alone.
    trainer.train()
    trainer.save_model()
    for arm, probability in zip(trainer.slsam.arms, trainer.slsam.probabilities.tolist(), strict=True):
        trainer.accelerator.print(f"{arm.name}: perturbed with probability {probability:.2f}")
    trainer.accelerator.print(f'Adapter: PeftModel.from_pretrained(base, "{options.output_dir}")')


if __name__ == "__main__":
    main()
