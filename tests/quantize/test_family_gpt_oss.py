"""gpt-oss: experts in MXFP4, whose bits are moved, and in plain numbers, whose rows are stored as columns."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from app.errors import CheckpointError, UsageError
from app.llama import quantizer
from app.models.gguf import read_header
from quantize import slabs
from quantize.checkpoint import Checkpoint, StoredTensor
from quantize.pipeline import prepare, quantize, run_all
from quantize.recipe import RECIPES
from tests.quantize.family_files import (
    VOCABULARY,
    Arrays,
    changed_config,
    check_against_llama_cpp,
    floats,
    logits_of,
    random_weights,
    tensor_bytes,
    write_checkpoint,
)

HIDDEN, WIDE, EXPERTS, HEADS, KEY_HEADS, HEAD, LAYERS = 128, 96, 3, 4, 2, 32, 2
QUERIES, KEYS = HEADS * HEAD, KEY_HEADS * HEAD
CONFIG: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": LAYERS,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "head_dim": HEAD,
    "sliding_window": 128,
}
# what a 4-bit code stands for
CODES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def without_experts() -> dict[str, tuple[int, ...]]:
    """Return the shapes of what is stored alike in both kinds of checkpoints."""
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        found |= {
            f"{prefix}.input_layernorm.weight": (HIDDEN,),
            f"{prefix}.post_attention_layernorm.weight": (HIDDEN,),
            f"{prefix}.self_attn.sinks": (HEADS,),
            f"{prefix}.mlp.router.weight": (EXPERTS, HIDDEN),
            f"{prefix}.mlp.router.bias": (EXPERTS,),
            f"{prefix}.mlp.experts.gate_up_proj_bias": (EXPERTS, 2 * WIDE),
            f"{prefix}.mlp.experts.down_proj_bias": (EXPERTS, HIDDEN),
        }
        rows = {"q": (QUERIES, HIDDEN), "k": (KEYS, HIDDEN), "v": (KEYS, HIDDEN), "o": (HIDDEN, QUERIES)}
        found |= {f"{prefix}.self_attn.{letter}_proj.weight": shape for letter, shape in rows.items()}
        found |= {f"{prefix}.self_attn.{letter}_proj.bias": shape[:1] for letter, shape in rows.items()}
    return found


def plain_weights() -> Arrays:
    """Return the weights of a checkpoint with experts in plain numbers."""
    found = without_experts()
    for layer in range(LAYERS):
        found[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = (EXPERTS, HIDDEN, 2 * WIDE)
        found[f"model.layers.{layer}.mlp.experts.down_proj"] = (EXPERTS, WIDE, HIDDEN)
    return random_weights(found)


def packed_weights() -> Arrays:
    """Return the weights of a checkpoint with experts in MXFP4."""
    weights = random_weights(without_experts())
    random = np.random.default_rng(1)
    for layer in range(LAYERS):
        for name, shape in (("gate_up_proj", (2 * WIDE, HIDDEN // 32)), ("down_proj", (HIDDEN, WIDE // 32))):
            prefix = f"model.layers.{layer}.mlp.experts.{name}"
            weights[f"{prefix}_blocks"] = random.integers(0, 256, (EXPERTS, *shape, 16), np.uint8)
            weights[f"{prefix}_scales"] = random.integers(118, 124, (EXPERTS, *shape), np.uint8)
    return weights


def packed(folder: Path, weights: Arrays | None = None, **fields: Any) -> Path:
    """Write a checkpoint whose experts are MXFP4."""
    config = {**CONFIG, "quantization_config": {"quant_method": "mxfp4"}}
    return changed_config(write_checkpoint(folder / "Tiny-OSS", config, weights or packed_weights()), **fields)


def stored_numbers(weights: Arrays, name: str) -> NDArray[np.float32]:
    """Return what experts of a checkpoint stand for: two weights in a byte, the first in its low half."""
    codes, scales = weights[f"{name}_blocks"], weights[f"{name}_scales"]
    pairs = np.stack((codes & 15, codes >> 4), axis=-1).reshape(*scales.shape, 32)
    values: NDArray[np.float32] = CODES[pairs] * np.exp2(scales.astype(np.float32) - 127)[..., None]
    return values.reshape(*scales.shape[:2], -1)


def ggml_numbers(raw: bytes, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return what ggml's MXFP4 stands for: a byte of scale, then 16 bytes with weights that are 16 apart."""
    blocks = np.frombuffer(raw, np.uint8).reshape(-1, 17)
    codes = np.concatenate((blocks[:, 1:] & 15, blocks[:, 1:] >> 4), axis=1)
    values: NDArray[np.float32] = CODES[codes] * np.exp2(blocks[:, :1].astype(np.float32) - 127)
    return values.reshape(shape)


@pytest.mark.parametrize("slab", [1 << 17, 1000])
def test_bits_of_mxfp4_are_moved(slab: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "SLAB_WEIGHTS", slab)
    weights = packed_weights()
    header = check_against_llama_cpp(packed(tmp_path), tmp_path, ["mxfp4_moe"])
    assert header.metadata["general.file_type"] == 38
    raw = tensor_bytes(header)
    for layer in range(LAYERS):
        both = stored_numbers(weights, f"model.layers.{layer}.mlp.experts.gate_up_proj")
        down = stored_numbers(weights, f"model.layers.{layer}.mlp.experts.down_proj")
        for name, expected in (("gate", both[:, 0::2]), ("up", both[:, 1::2]), ("down", down)):
            target = f"blk.{layer}.ffn_{name}_exps.weight"
            assert np.array_equal(ggml_numbers(raw[target], expected.shape), expected), target
    assert {t.type_name for t in header.tensors if "_exps.weight" in t.name} == {"mxfp4"}
    assert all(t.type_name == "mxfp4" for t in header.tensors[: 3 * LAYERS])  # first, as upstream writes them
    assert np.isfinite(logits_of(tmp_path / "ours.gguf")).all()


@pytest.mark.parametrize("slab", [1 << 20, 5000])
def test_plain_experts_are_turned(slab: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "STRIDED_SLAB_WEIGHTS", slab)
    weights = plain_weights()
    source = write_checkpoint(tmp_path / "Tiny-OSS", CONFIG, weights)
    header = check_against_llama_cpp(source, tmp_path, ["q8_0", "mxfp4_moe"])
    assert header.metadata["general.file_type"] == 32
    assert header.metadata["gpt-oss.rope.scaling.factor"] == 32.0
    arrays = floats(header)
    for layer in range(LAYERS):
        experts, target = f"model.layers.{layer}.mlp.experts", f"blk.{layer}"
        both, bias = weights[f"{experts}.gate_up_proj"], weights[f"{experts}.gate_up_proj_bias"]
        for half, name in enumerate(("gate", "up")):
            assert np.array_equal(arrays[f"{target}.ffn_{name}_exps.weight"], both.transpose(0, 2, 1)[:, half::2])
            assert np.array_equal(arrays[f"{target}.ffn_{name}_exps.bias"], bias[:, half::2])
        down = weights[f"{experts}.down_proj"].transpose(0, 2, 1)
        assert np.array_equal(arrays[f"{target}.ffn_down_exps.weight"], down)
        sinks = weights[f"model.layers.{layer}.self_attn.sinks"]
        assert np.array_equal(arrays[f"{target}.attn_sinks.weight"], sinks)
    assert np.isfinite(logits_of(tmp_path / "ours.gguf")).all()


@pytest.mark.parametrize("kind", ["mxfp4", "plain"])
def test_gates_and_ups_are_read_once(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "mxfp4":
        source, types = packed(tmp_path), ["mxfp4_moe", "bf16"]
    else:
        source, types = write_checkpoint(tmp_path / "Tiny-OSS", CONFIG, plain_weights()), ["q8_0", "bf16"]
    read, steps = [0], []
    read_into = Checkpoint.read_into

    def counted(self: Checkpoint, tensor: StoredTensor, offset: int, buffer: memoryview) -> None:
        read[0] += len(buffer)
        read_into(self, tensor, offset, buffer)

    monkeypatch.setattr(Checkpoint, "read_into", counted)
    outs = [tmp_path / f"{name}.gguf" for name in types]
    run_all(prepare(source, types), outs, threads=1, progress=lambda *step: steps.append(step))
    stored = sum(tensor.nbytes for tensor in Checkpoint.open(source).tensors.values())
    assert read[0] == steps[-1][0] == steps[-1][1] == stored


def test_mxfp4_is_not_quantized_again(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"blk\.0\.ffn_(down|gate|up)_exps\.weight.*q8_0.*mxfp4_moe keeps"):
        prepare(packed(tmp_path), "q8_0")


def test_mxfp4_is_quantized_again_if_asked(tmp_path: Path) -> None:
    source = packed(tmp_path)
    quantize(source, "bf16", tmp_path / "bf16.gguf")
    for name in ("q8_0", "q4_k_m"):
        quantize(source, name, tmp_path / "ours.gguf", allow_requantize=True)
        file_type = RECIPES[name].file_type
        quantizer.quantize_file(tmp_path / "bf16.gguf", tmp_path / "theirs.gguf", file_type, allow_requantize=True)
        assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_a_scale_that_is_no_number_is_refused(tmp_path: Path) -> None:
    weights = packed_weights()
    name = "model.layers.1.mlp.experts.down_proj_scales"
    weights[name][1, 2, 0] = 255
    with pytest.raises(CheckpointError, match=re.escape(name)):
        quantize(packed(tmp_path, weights), "mxfp4_moe", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_scales_must_fit(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.down_proj_scales"
    for values, said in ((np.full((EXPERTS, HIDDEN, 2), 120, np.uint8), "shape"), (None, "missing")):
        weights = packed_weights()
        del weights[name]
        if values is not None:
            weights[name] = values
        with pytest.raises(CheckpointError, match=f"{said}.*{re.escape(name)}|{re.escape(name)}.*{said}"):
            prepare(packed(tmp_path / said, weights), "mxfp4_moe")


def test_floats_in_the_place_of_codes_are_refused(tmp_path: Path) -> None:
    weights = packed_weights()
    name = "model.layers.0.mlp.experts.down_proj_blocks"
    weights[name] = weights[name].astype(np.float32)
    with pytest.raises(CheckpointError, match=f"{re.escape(name)}.*BF16.*U8"):
        prepare(packed(tmp_path, weights), "mxfp4_moe")


def test_the_config_class_speaks_where_config_json_is_silent(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "Tiny-OSS", {**CONFIG, "rope_scaling": None}, plain_weights())
    quantize(folder, "bf16", tmp_path / "out.gguf")
    keys = read_header(tmp_path / "out.gguf").metadata
    assert "gpt-oss.rope.scaling.type" not in keys  # null: without scaling
    assert keys["gpt-oss.rope.freq_base"] == 150000.0
    assert keys["gpt-oss.context_length"] == 131072


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": 3}, "layer_types"),
        ({"num_local_experts": 1 << 30}, "num_local_experts"),
        ({"num_hidden_layers": 1 << 30}, "layers"),
        ({"sliding_window": "wide"}, "sliding_window"),
        ({"intermediate_size": 64}, "shape"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said):
        prepare(packed(tmp_path, **fields), "mxfp4_moe")
