"""Trainings to be killed, for test_kills.py: a server that has imported everything and forks one process a life.

It reads one JSON object a line, `{"folder": ..., "after": seconds}` or `{"folder": ..., "nth": n, "event": ...}`, and
answers with one: where the life resumed from and whether it was killed. A life goes on from the newest whole
checkpoint.
"""

import contextlib
import json
import os
import select
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from slsam_peft import SLSAMConfig, SLSAMTrainer, last_intact_checkpoint
from tests.tiny import build, llama, lora

STEPS = 16
SAVE_STEPS = 2


class Reports(TrainerCallback):
    """Tells the server when steps begin, and from which one on."""

    def __init__(self, pipe):
        self.pipe = pipe

    def on_train_begin(self, args, state, control, **kwargs):
        os.write(self.pipe, f"{state.global_step}\n".encode())


def die_in_a_save(nth, kind):
    """Kill this process at the n-th event of a kind, such as "open README.md" or "", in a checkpoint's folder."""
    left = [nth]

    def hook(event, args):
        if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") or not args:
            return
        path = os.fsdecode(args[0]) if isinstance(args[0], str | bytes) else ""
        if "checkpoint-" not in path or (event == "open" and "w" not in str(args[1])):
            return
        if f"{event} {Path(path).name}".startswith(kind):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def live(folder, pipe, nth=None, event="", **_):
    """Train to the end, from wherever the last life was killed."""
    config = SLSAMConfig(rho=0.1, active_fraction=0.5, design="depth")
    trainer = build(
        SLSAMTrainer,
        folder / "out",
        config,
        model=llama(num_hidden_layers=3),
        peft_config=lora(target_modules=["q_proj", "down_proj"], lora_dropout=0.2),
        parts={"callbacks": [Reports(pipe)]},
        max_steps=STEPS,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=SAVE_STEPS,
        save_total_limit=3,
        activation_checkpointing=False,
    )
    checkpoint = last_intact_checkpoint(folder / "out")
    if nth is not None:
        die_in_a_save(nth, event)
    trainer.train(resume_from_checkpoint=checkpoint)
    final = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    for key, state in trainer.optimizer.state_dict()["state"].items():
        final |= {f"optimizer.{key}.{name}": torch.as_tensor(value).clone() for name, value in state.items()}
    final["probabilities"] = trainer.slsam.probabilities.clone()
    save_file(final, folder / "final.safetensors")


def serve_one(request):
    """Fork a life, kill it when its time has come, and say how it went."""
    folder = Path(request.pop("folder"))
    folder.mkdir(parents=True, exist_ok=True)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(read)
            with (folder / "log").open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                live(folder, write, **request)
            code = 0
        except BaseException:
            with (folder / "log").open("a") as log:
                traceback.print_exc(file=log)
        os._exit(code)
    os.close(write)
    began = b""
    while not began.endswith(b"\n") and (part := os.read(read, 64)):
        began += part
    start = time.monotonic()
    ended = select.select([read], [], [], request.get("after"))[0]  # a process that ends closes its pipe
    if not ended:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(read)
    return {
        "resumed": int(began) if began else None,
        "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
        "code": os.waitstatus_to_exitcode(status),
        "seconds": time.monotonic() - start,
    }


def main():
    print(json.dumps({"ready": True}), flush=True)  # noqa: T201
    for line in sys.stdin:
        print(json.dumps(serve_one(json.loads(line))), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
