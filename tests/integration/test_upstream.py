"""What this package relies on inside TRL, transformers, PEFT, accelerate, bitsandbytes and torch.

Each entry names one internal, says what would break here if a release moved it, and tries it on its own. Run with
torch 2.13.0, transformers 5.24.0, trl 1.16.0, peft 0.21.2, accelerate 1.15.0, bitsandbytes 0.50.2.
"""

import inspect
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slsam_peft.trainer.muting import forward_only
from tests.tiny import build, llama, lora, sft_args

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use_reentrant.*"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),
]

Check = Callable[..., None]
INTERNALS: dict[str, tuple[str, Check]] = {}


def relied_on(name: str, breaks: str) -> Callable[[Check], Check]:
    """Enter a check into the table."""

    def enter(check: Check) -> Check:
        assert name not in INTERNALS
        INTERNALS[name] = breaks, check
        return check

    return enter


class Run:
    """A plain SFT run of two steps of two micro-batches, with a checkpoint after the second, and what happened."""

    def __init__(self, folder: Path) -> None:
        from transformers import TrainerCallback
        from trl import SFTTrainer

        events: list[str] = []
        self.events = events
        self.counts: list[tuple[int, Any]] = []
        self.seen: dict[str, Any] = {}
        self.epochs: list[int] = []
        run = self

        class Watched(SFTTrainer):
            def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
                events.append("training_step")
                run.counts.append((self.current_gradient_accumulation_steps, num_items_in_batch))
                before = {key: len(value) for key, value in self._metrics["train"].items()}
                tokens = self._total_train_tokens
                loss = super().training_step(model, inputs, num_items_in_batch)
                run.seen["tokens"] = (self._total_train_tokens - tokens, int(inputs["attention_mask"].sum()))
                run.seen["metrics"] = {k: len(v) - before.get(k, 0) for k, v in self._metrics["train"].items()}
                return loss

            def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
                run.epochs.append(self.state.global_step)
                super()._run_epoch(*args, **kwargs)

            def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
                run.seen["adapter"] = args[0]
                super()._load_from_checkpoint(*args, **kwargs)

            def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
                events.append(f"load {checkpoint}")
                super()._load_optimizer_and_scheduler(checkpoint)

            def _save_checkpoint(self, model: Any, trial: Any) -> None:
                run.seen["output_dir"] = self._get_output_dir(trial)
                super()._save_checkpoint(model, trial)
                events.append("checkpoint saved")

            def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
                events.append(f"save optimizer, state there: {Path(output_dir, 'trainer_state.json').exists()}")
                super()._save_optimizer_and_scheduler(output_dir)

            def _save_rng_state(self, output_dir: str) -> None:
                super()._save_rng_state(output_dir)
                events.append(f"save random state, state there: {Path(output_dir, 'trainer_state.json').exists()}")

        class Callback(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                run.seen.setdefault("begin", (run.trainer.optimizer is not None, state.global_step, state.max_steps))
                events.append("train begins")

            def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
                events.append("optimizer step")

        settings = {"max_steps": 2, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2}
        self.trainer = build(Watched, folder, parts={"callbacks": [Callback()]}, **settings)
        frozen = next(p for p in self.trainer.model.parameters() if p.requires_grad)
        frozen.requires_grad_(False)
        self.trainer.train()
        held = {id(p) for group in self.trainer.optimizer.param_groups for p in group["params"]}
        self.seen["frozen is optimised"] = id(frozen) in held
        self.folder = folder
        self.first = list(events)
        self.trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        self.resumed = events[len(self.first) :]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("run"))


# TRL


@relied_on("trl: _metrics", "the numbers of SL-SAM would miss the log, and second passes would count in TRL's own")
def _(run: Run) -> None:
    assert run.seen["metrics"]["entropy"] == run.seen["metrics"]["mean_token_accuracy"] == 1
    assert isinstance(run.trainer._metrics["train"]["new name"], list)


@relied_on("trl: _total_train_tokens", "num_tokens would count every token twice")
def _(run: Run) -> None:
    assert run.seen["tokens"][0] == run.seen["tokens"][1] > 0


@relied_on("trl: compute_loss gathers through the accelerator", "second passes would wait for the device")
def _(run: Run) -> None:
    from trl import SFTTrainer

    assert "self.accelerator.gather_for_metrics(" in inspect.getsource(SFTTrainer)


@relied_on(
    "trl: KTO's loss is made of what is gathered",
    "if not, muting it could be had there too; if so, it must stay",
)
def _() -> None:
    from trl import KTOTrainer

    assert "self.accelerator.gather_for_metrics(" in inspect.getsource(KTOTrainer)


@relied_on("trl: _tag_names", "model cards in checkpoints would not name SL-SAM and its settings")
def _(run: Run) -> None:
    assert "sft" in run.trainer._tag_names
    assert "self._tag_names" in inspect.getsource(type(run.trainer).create_model_card)


@relied_on("trl: _name and _paper", "model cards in checkpoints would not name SL-SAM's paper")
def _(run: Run) -> None:
    assert (run.trainer._name, run.trainer._paper) == ("SFT", {})
    written = inspect.getsource(type(run.trainer).create_model_card)
    assert all(f'self._paper.get("{key}")' in written for key in ("title", "id", "citation"))


@relied_on("trl: _generate_and_score_completions", "trainers that generate in a step would be run twice, not refused")
def _() -> None:
    from trl import GRPOTrainer, RLOOTrainer

    assert hasattr(GRPOTrainer, "_generate_and_score_completions")
    assert hasattr(RLOOTrainer, "_generate_and_score_completions")


@relied_on("trl: tile of the fused head", "predicted memory would be off by the size of the logits")
def _() -> None:
    from trl.trainer import utils

    from slsam_peft.cost.memory import HEAD_WORDS

    assert utils._CHUNKED_LOGPROB_CHUNK_SIZE == HEAD_WORDS


@relied_on("trl: chosen rows lie above rejected ones", "partial ascents of DPO and reward models would split pairs")
def _(tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    from tests.tiny import preferences, tokenizer

    args = sft_args(tmp_path, config_class=DPOConfig)
    trainer = DPOTrainer(
        llama(), args=args, train_dataset=preferences(4), processing_class=tokenizer(), peft_config=lora()
    )
    rows = [trainer.train_dataset[i] for i in range(2)]
    batch = trainer.data_collator([dict(row) for row in rows])
    for place, row in enumerate(rows):
        for offset, key in ((0, "chosen_ids"), (2, "rejected_ids")):
            ids = row["prompt_ids"] + row[key]
            assert batch["input_ids"][place + offset, : len(ids)].tolist() == ids


@relied_on("trl: parser's actions and dataclass_types", "values in YAML files would reach the trainer unchecked")
def _() -> None:
    from slsam_peft.cli.arguments import build_parser

    parser = build_parser()
    actions = {action.dest: action for action in parser._actions}
    assert {getattr(actions[name].type, "__name__", "") for name in ("rho", "max_length", "use_peft")} == {
        "float", "int", "string_to_bool",
    }  # fmt: skip
    assert len(list(parser.dataclass_types)) == 4


# transformers: the training loop


@relied_on("transformers: order of a step", "the descent passes would run at the wrong micro-batch, or unclipped")
def _(run: Run) -> None:
    step = ["training_step", "training_step", "optimizer step"]
    begin = run.first.index("train begins")
    assert run.first[begin + 1 : begin + 7] == step * 2


@relied_on("transformers: current_gradient_accumulation_steps", "the last micro-batch of a step would not be known")
def _(run: Run) -> None:
    assert [count for count, _ in run.counts[:4]] == [2] * 4


@relied_on("transformers: num_items_in_batch comes with each micro-batch", "both passes could be scaled differently")
def _(run: Run) -> None:
    items = [int(number) for _, number in run.counts]
    assert items[0] == items[1] > 0
    assert items[2] == items[3] > 0


@relied_on("transformers: on_train_begin", "arms would be built before it is settled what is trained, or no optimizer")
def _(run: Run) -> None:
    assert run.seen["begin"] == (True, 0, 2)


@relied_on("transformers: create_optimizer", "arms switched off too early would never be trained, and nobody be told")
def _(run: Run) -> None:
    assert run.seen["frozen is optimised"] is False


@relied_on("transformers: order of a save", "a checkpoint that was cut short could pass for whole")
def _(run: Run) -> None:
    save = ["save optimizer, state there: False", "save random state, state there: False", "checkpoint saved"]
    assert run.first[-3:] == save
    assert (run.folder / "checkpoint-2" / "trainer_state.json").is_file()


@relied_on("transformers: _load_optimizer_and_scheduler", "resumed runs would start with a fresh sampler")
def _(run: Run) -> None:
    assert run.resumed[:2] == [f"load {run.folder / 'checkpoint-2'}", "train begins"]
    assert not any(event.startswith("load") for event in run.first)


@relied_on("transformers: _run_epoch", "resumed behind its last step, a run would make one more")
def _(run: Run) -> None:
    assert run.epochs == [0, 2], "once for the run, once for the resumed one, which has no step left to make"
    assert "training_step" in run.resumed, "the trainer sees to it by itself: the override can go"


@relied_on("transformers: _load_from_checkpoint", "16-bit adapters would be float32 in a resumed run")
def _(run: Run) -> None:
    assert run.seen["adapter"] == str(run.folder / "checkpoint-2")


@relied_on("transformers: _load_best_model", "the best adapter would be widened, and come without its sampler")
def _() -> None:
    from transformers import Trainer

    assert "self._load_best_model()" in inspect.getsource(Trainer)
    assert list(inspect.signature(Trainer._load_best_model).parameters) == ["self"]


@relied_on("transformers: what tells of other engines", "DeepSpeed, FSDP and DataParallel would not be refused")
def _(run: Run) -> None:
    trainer = run.trainer
    assert (trainer.is_deepspeed_enabled, trainer.is_fsdp_enabled, trainer.args.n_gpu) == (False, False, 0)
    assert hasattr(trainer.args, "fsdp")
    assert hasattr(trainer.args, "torch_compile")


@relied_on("transformers: _get_output_dir", "an old trainer_state.json would vouch for an unfinished save")
def _(run: Run) -> None:
    assert Path(run.seen["output_dir"]) == run.folder


@relied_on("transformers: names of a checkpoint's files", "whole checkpoints would be taken for damaged ones")
def _(run: Run) -> None:
    from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
    from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

    names = {path.name for path in (run.folder / "checkpoint-2").iterdir()}
    assert {OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, "rng_state.pth"} <= names
    assert {ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME} <= names


@relied_on("transformers: mark of an unfinished save", "a checkpoint that a signal cut short could pass for whole")
def _() -> None:
    import transformers.trainer_jit_checkpoint as saving

    from slsam_peft.saving.resume import _UNFINISHED

    assert _UNFINISHED in inspect.getsource(saving)


# transformers: models


@contextmanager
def counted(module: nn.Module, kind: str):
    calls: list[int] = []
    handle = getattr(module, f"register_{kind}")(lambda *_: calls.append(1))
    yield calls
    handle.remove()


def checkpointed(reentrant: bool) -> nn.Module:
    model = llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


@relied_on(
    "transformers: hooks of a checkpointed block run once", "hidden states would be kept and cut in recomputations"
)
def _() -> None:
    for reentrant in (False, True):
        model = checkpointed(reentrant)
        block = model.model.layers[2]
        with counted(block, "forward_pre_hook") as before, counted(block, "forward_hook") as after:
            model(input_ids=torch.arange(6)[None]).logits.sum().backward()
        assert (len(before), len(after)) == (1, 1)


@relied_on(
    "transformers: hooks inside a checkpointed block run again",
    "the additive branch could end before backward",
)
def _() -> None:
    model = checkpointed(reentrant=False)
    with counted(model.model.layers[2].mlp.up_proj, "forward_hook") as calls:
        loss = model(input_ids=torch.arange(6)[None]).logits.sum()
        assert len(calls) == 1
        loss.backward()
    assert len(calls) == 2


@relied_on(
    "transformers: _gradient_checkpointing_func",
    "reentrant checkpointing would not be told from the other kind",
)
def _() -> None:
    from transformers.modeling_layers import GradientCheckpointingLayer

    from slsam_peft.algorithm.entering import _is_reentrant

    block = llama().model.layers[0]
    assert isinstance(block, GradientCheckpointingLayer)
    assert not _is_reentrant(block)
    for reentrant in (False, True):
        assert _is_reentrant(checkpointed(reentrant).model.layers[0]) is reentrant


@relied_on(
    "transformers: blocks take the hidden state first",
    "passes would run whole instead of from the lowest active block",
)
def _() -> None:
    model, taken = llama(), []
    model.model.layers[1].register_forward_pre_hook(lambda _, args: taken.append(args[0].shape))
    model(input_ids=torch.arange(6)[None])
    assert taken == [torch.Size([1, 6, 32])]


# PEFT


def adapted(**settings: Any) -> nn.Module:
    from peft import get_peft_model

    return get_peft_model(llama(), lora(target_modules=["q_proj"], **settings))


@relied_on("peft: BaseTunerLayer", "adapters would not be found where their precision is settled")
def _() -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in adapted().modules() if isinstance(m, BaseTunerLayer)]
    assert len(layers) == 5
    assert all(hasattr(layer, "base_layer") for layer in layers)


@relied_on(
    "peft: factors are plain linear modules that are called",
    "no sequence would ride along in the pass of another batch",
)
def _() -> None:
    from slsam_peft import arms_of
    from slsam_peft.trainer.riding import lora_pairs

    model = adapted()
    arms = arms_of(model)
    assert all(sites for arm in arms for sites in arm.sites)
    assert {w for pair in lora_pairs(model) for w in pair.weights} == {p for arm in arms for p in arm.parameters}
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with counted(layer.lora_A["default"], "forward_hook") as a, counted(layer.lora_B["default"], "forward_hook") as b:
        model(input_ids=torch.arange(6)[None])
    assert (len(a), len(b)) == (1, 1)


@relied_on("peft: adapters that are not active do not require grad", "arms would be made of adapters that do nothing")
def _() -> None:
    model = adapted()
    model.add_adapter("other", lora(target_modules=["q_proj"]))
    model.set_adapter("other")
    assert {".other." in n for n, p in model.named_parameters() if p.requires_grad} == {True}


@relied_on("peft: load_adapter widens 16 bits", "nothing: what casts them back after loading can go")
def _(tmp_path: Path) -> None:
    from peft import get_peft_model

    model = get_peft_model(llama().bfloat16(), lora(target_modules=["q_proj"]), autocast_adapter_dtype=False)
    names = [name for name, p in model.named_parameters() if p.dtype == torch.bfloat16 and ".lora_" in name]
    model.save_pretrained(tmp_path)
    model.load_adapter(str(tmp_path), "default", is_trainable=True)
    parameters = dict(model.named_parameters())
    assert {parameters[name].dtype for name in names} == {torch.float32}


@relied_on("peft: wrappers", "export, check and the record beside an adapter would not know base from adapter")
def _() -> None:
    from peft.tuners.lora.layer import ParamWrapper
    from peft.utils.integrations import dequantize_module_weight
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
    from peft.utils.save_and_load import get_peft_model_state_dict

    model = adapted(modules_to_save=["lm_head"])
    head = model.base_model.model.lm_head
    assert isinstance(head, ModulesToSaveWrapper)
    assert isinstance(head, AuxiliaryTrainingWrapper)
    assert hasattr(head, "original_module")
    assert any("lm_head" in name for name in get_peft_model_state_dict(model))
    assert callable(dequantize_module_weight)
    assert isinstance(ParamWrapper, type)


# accelerate


@relied_on(
    "accelerate: backward is looked up on the accelerator",
    "the check of the hidden-state cache would leave gradients behind",
)
def _(run: Run) -> None:
    trainer = run.trainer
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.model.zero_grad()
    with forward_only(trainer):
        type(trainer).__mro__[1].training_step(trainer, trainer.model, inputs, None)
    assert all(p.grad is None for p in trainer.model.parameters())


@relied_on(
    "accelerate: device hooks shadow forward in the instance",
    "the hidden-state cache would drop an offloaded block's hook",
)
def _() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    block = add_hook_to_module(nn.Linear(2, 2), ModelHook())
    assert "forward" in block.__dict__


@relied_on("accelerate: no_sync", "DDP would average the gradients of every arm in every pass")
def _(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    model, entered = nn.Linear(2, 2), []

    @contextmanager
    def no_sync():
        entered.append(1)
        yield

    model.no_sync = no_sync
    monkeypatch.setattr(Accelerator, "use_distributed", True)
    with run.trainer.accelerator.no_sync(model):
        assert entered == [1]


@relied_on("accelerate: scaler", "the bandit would see scaled norms")
def _(run: Run) -> None:
    from accelerate import Accelerator

    assert run.trainer.accelerator.scaler is None
    assert "self.scaler.scale(loss).backward(" in inspect.getsource(Accelerator.backward)


@relied_on("accelerate: broadcast_object_list", "ranks would solve a budget for different batches and draw other arms")
def _() -> None:
    from accelerate.utils import broadcast_object_list

    assert "object_list" in inspect.signature(broadcast_object_list).parameters


# bitsandbytes


@relied_on(
    "bitsandbytes: support_avx512bf16_for_cpu",
    "after an evaluation on a CPU, gradients would skip 4-bit layers",
)
def _() -> None:
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    layer = modules.Linear4bit(64, 64)
    assert hasattr(layer, "support_avx512bf16_for_cpu")
    source = inspect.getsource(modules.Linear4bit.forward)
    assert "self.support_avx512bf16_for_cpu" in source
    assert '"packing_format_for_cpu"' in source


@relied_on("bitsandbytes: quantise and back", "merges into a dequantised base would be of other weights")
def _() -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    weight = torch.linspace(-1, 1, 4096).reshape(64, 64)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4")
    assert packed.dtype == torch.uint8
    assert (bnb.dequantize_4bit(packed, state) - weight).abs().max() < 0.2


# torch


@relied_on("torch: _foreach_*", "perturbing, restoring and norms would fail or need a loop")
def _() -> None:
    values = [torch.ones(2), torch.full((3,), 2.0)]
    assert [float(n) for n in torch._foreach_norm(values, 2, dtype=torch.float64)] == [2**0.5, 12**0.5]
    doubled = torch._foreach_mul(values, torch.tensor(2.0))
    torch._foreach_add_(doubled, values)
    torch._foreach_copy_(values, list(doubled))
    assert [v[0].item() for v in values] == [3.0, 6.0]


@relied_on("torch: _flatten_dense_tensors", "ranks could not send the active gradients in one message")
def _() -> None:
    from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

    values = [torch.ones(2, 2), torch.zeros(3)]
    flat = _flatten_dense_tensors(values)
    assert flat.shape == (7,)
    assert all(torch.equal(a, b) for a, b in zip(values, _unflatten_dense_tensors(flat, values), strict=True))


@relied_on("torch: graph nodes", "a cut that drops part of the gradient would not be seen")
def _() -> None:
    from torch.utils.checkpoint import checkpoint

    from slsam_peft.algorithm.leaks import REENTRANT

    layer = nn.Linear(2, 2)
    x = torch.ones(1, 2, requires_grad=True)
    leaves = {getattr(node, "variable", None) for node, _ in layer(x).grad_fn.next_functions if node is not None}
    assert any(leaf is layer.bias for leaf in leaves)
    assert checkpoint(layer, x, use_reentrant=True).grad_fn.name() == REENTRANT


@relied_on("torch: marks of compiled modules", "compiled models would be compiled again in every step, not refused")
def _() -> None:
    layer = nn.Linear(2, 2)
    assert layer._compiled_call_impl is None
    assert "_orig_mod" in torch.compile(layer, backend="eager")._modules
    layer.compile(backend="eager")
    assert layer._compiled_call_impl is not None


@relied_on("torch: forward in an instance shadows the class's", "blocks below the cut would run again in pass two")
def _() -> None:
    layer = nn.Linear(2, 2)
    layer.__dict__["forward"] = lambda x: "ours"
    assert layer(torch.ones(1, 2)) == "ours"


@relied_on(
    "torch: GradScaler._scale",
    "the bandit would see scaled norms, or reading the scale would wait for the device",
)
def _() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    assert isinstance(scaler._scale, torch.Tensor)
    assert float(scaler._scale) == 8.0


@relied_on("torch: identity of a storage", "predicted activations would count a tensor twice that two operations keep")
def _() -> None:
    value = torch.ones(4)
    assert value.untyped_storage()._cdata == value[1:].untyped_storage()._cdata
    assert value.untyped_storage()._cdata != torch.ones(4).untyped_storage()._cdata


@pytest.mark.parametrize("name", INTERNALS)
def test_it_is_where_it_was(name: str, request: pytest.FixtureRequest) -> None:
    breaks, check = INTERNALS[name]
    wanted = {word: request.getfixturevalue(word) for word in inspect.signature(check).parameters}
    try:
        check(**wanted)
    except Exception as error:
        error.add_note(f"{name} has moved. What breaks here: {breaks}.")
        raise
