"""Qwen2 MoE and Qwen3 MoE, their experts stored one by one or in stacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.errors import CheckpointError
from app.models.gguf import read_header
from quantize.pipeline import prepare, quantize
from tests.quantize.checkpoints import encode, write_safetensors
from tests.quantize.family_files import (
    Arrays,
    attention_shapes,
    changed_config,
    check_against_llama_cpp,
    floats,
    gated_shapes,
    logits_of,
    outer_shapes,
    random_weights,
    write_checkpoint,
)

HIDDEN, WIDTH, SHARED, HEADS, KEY_HEADS, LAYERS, EXPERTS = 256, 64, 128, 8, 2, 2, 11
QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "hidden_size": HIDDEN,
    "moe_intermediate_size": WIDTH,
    "shared_expert_intermediate_size": SHARED,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 3,
    "tie_word_embeddings": False,
}
QWEN3 = {
    **{name: value for name, value in QWEN2.items() if not name.startswith("shared")},
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 64,
}


def shapes(config: dict[str, Any], *, fused: bool = False) -> dict[str, tuple[int, ...]]:
    """Return every stored tensor's shape."""
    qwen3 = config["model_type"] == "qwen3_moe"
    head = config.get("head_dim", HIDDEN // HEADS)
    found = outer_shapes(HIDDEN, tied=config["tie_word_embeddings"])
    queries, keys = HEADS * head, KEY_HEADS * head
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        found |= {f"{block}.{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
        found |= attention_shapes(block, HIDDEN, queries, keys)
        found[f"{block}.mlp.gate.weight"] = (EXPERTS, HIDDEN)
        if qwen3:
            found |= {f"{block}.self_attn.{letter}_norm.weight": (head,) for letter in "qk"}
        else:
            rows = (("q", queries), ("k", keys), ("v", keys))
            found |= {f"{block}.self_attn.{letter}_proj.bias": (count,) for letter, count in rows}
            found[f"{block}.mlp.shared_expert_gate.weight"] = (1, HIDDEN)
            found |= gated_shapes(f"{block}.mlp.shared_expert", HIDDEN, SHARED)
        if fused:
            found[f"{block}.mlp.experts.gate_up_proj"] = (EXPERTS, 2 * WIDTH, HIDDEN)
            found[f"{block}.mlp.experts.down_proj"] = (EXPERTS, HIDDEN, WIDTH)
        else:
            for expert in range(EXPERTS):
                found |= gated_shapes(f"{block}.mlp.experts.{expert}", HIDDEN, WIDTH)
    return found


def stack(weights: Arrays, layer: int, name: str) -> np.ndarray[Any, Any]:
    """Return a layer's experts as one array."""
    block = f"model.layers.{layer}.mlp.experts"
    return np.stack([weights[f"{block}.{expert}.{name}_proj.weight"] for expert in range(EXPERTS)])


def fuse(weights: Arrays) -> Arrays:
    """Return the same weights with the experts in stacks."""
    fused = {name: values for name, values in weights.items() if ".mlp.experts." not in name}
    for layer in range(LAYERS):
        gates, ups = (stack(weights, layer, name) for name in ("gate", "up"))
        fused[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = np.concatenate([gates, ups], axis=1)
        fused[f"model.layers.{layer}.mlp.experts.down_proj"] = stack(weights, layer, "down")
    return fused


def make(folder: Path, config: dict[str, Any], **fields: Any) -> tuple[Path, Arrays]:
    """Write a checkpoint; return its folder and its weights."""
    weights = random_weights(shapes(config))
    return changed_config(write_checkpoint(folder / "Tiny-Mixture", config, weights), **fields), weights


@pytest.mark.parametrize("config", [QWEN2, QWEN3, {**QWEN3, "tie_word_embeddings": True}])
def test_every_byte_is_llama_cpps(config: dict[str, Any], tmp_path: Path) -> None:
    source, weights = make(tmp_path, config)
    header = check_against_llama_cpp(source, tmp_path, ["q8_0", "q4_k_m"])
    arrays, keys, architecture = floats(header), header.metadata, header.metadata["general.architecture"]
    assert architecture == ("qwen2moe" if config is QWEN2 else "qwen3moe")
    assert keys[f"{architecture}.expert_count"] == EXPERTS
    assert keys[f"{architecture}.expert_feed_forward_length"] == WIDTH
    assert keys.get(f"{architecture}.expert_shared_feed_forward_length") == (SHARED if config is QWEN2 else None)
    assert keys["general.size_label"].startswith(f"{EXPERTS}x")
    assert ("output.weight" in arrays) is not config["tie_word_embeddings"]
    for layer in range(LAYERS):
        for name in ("gate", "up", "down"):
            assert np.array_equal(arrays[f"blk.{layer}.ffn_{name}_exps.weight"], stack(weights, layer, name))
    routers = {tensor.type_name for tensor in header.tensors if "ffn_gate_inp" in tensor.name}
    assert routers == {"f32"}
    if config is QWEN2:
        shared = weights["model.layers.1.mlp.shared_expert.down_proj.weight"]
        assert np.array_equal(arrays["blk.1.ffn_down_shexp.weight"], shared)
        assert arrays["blk.1.ffn_gate_inp_shexp.weight"].shape == (1, HIDDEN)
    assert np.isfinite(logits_of(tmp_path / "ours.gguf")).all()


@pytest.mark.parametrize("config", [QWEN2, QWEN3])
def test_both_layouts_make_the_same_file(config: dict[str, Any], tmp_path: Path) -> None:
    source, weights = make(tmp_path / "separate", config)
    fused = write_checkpoint(tmp_path / "fused" / source.name, config, fuse(weights))
    for name, folder in (("separate", source), ("fused", fused)):
        quantize(folder, "q4_0", tmp_path / f"{name}.gguf", threads=2)
    assert (tmp_path / "separate.gguf").read_bytes() == (tmp_path / "fused.gguf").read_bytes()
    prepared = prepare(fused, "q4_0")
    assert prepared.source_bytes == sum(2 * values.size for values in weights.values())  # each weight is read once


def test_a_stack_is_written_after_the_last_of_the_layers_experts(tmp_path: Path) -> None:
    source, weights = make(tmp_path, QWEN3)
    last = f"model.layers.0.mlp.experts.{EXPERTS - 1}.gate_proj.weight"
    shards = {"model-00001-of-00002.safetensors": set(weights) - {last}, "model-00002-of-00002.safetensors": {last}}
    (source / "model.safetensors").unlink()
    for shard, names in shards.items():
        tensors = {name: ("BF16", weights[name].shape, encode(weights[name], "BF16")) for name in sorted(names)}
        write_safetensors(source / shard, tensors)
    index = {"weight_map": {name: shard for shard, names in shards.items() for name in names}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    quantize(source, "bf16", tmp_path / "out.gguf")
    order = [tensor.name for tensor in read_header(tmp_path / "out.gguf").tensors]
    assert order[-3:] == [f"blk.0.ffn_{name}_exps.weight" for name in ("down", "gate", "up")]


@pytest.mark.parametrize(
    ("config", "fields", "said"),
    [
        (QWEN2, {"tie_word_embeddings": True}, "tie_word_embeddings is true; llama.cpp's qwen2moe needs a head"),
        (QWEN2, {"mlp_only_layers": [0]}, r"mlp_only_layers \[0\]"),
        (QWEN3, {"decoder_sparse_step": 2}, "decoder_sparse_step 2"),
        (QWEN2, {"num_experts": 12}, "missing: model.layers.0.mlp.experts.11.down_proj.weight"),
        (QWEN3, {"num_experts": 1 << 20}, "num_experts is 1048576; llama.cpp takes at most 1024"),
        (QWEN3, {"num_experts_per_tok": 12}, "experts that cannot be: num_experts 11, num_experts_per_tok 12"),
        (QWEN3, {"moe_intermediate_size": 128}, "config.json asks for"),
        (QWEN2, {"shared_expert_intermediate_size": None}, r"shared_expert.gate_proj.weight' has shape \(128, 256\)"),
        (QWEN2, {"qkv_bias": "yes", "num_attention_heads": 4, "num_key_value_heads": 4}, "k_proj.weight' has shape"),
    ],
)
def test_what_is_wrong_is_named(config: dict[str, Any], fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    source, _ = make(tmp_path, config, **fields)
    with pytest.raises(CheckpointError, match=said):
        prepare(source, "q8_0")


def test_stacks_of_another_shape_are_refused(tmp_path: Path) -> None:
    weights = fuse(random_weights(shapes(QWEN3)))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    weights[name] = weights[name][:, :-1]
    source = write_checkpoint(tmp_path / "Tiny-Mixture", QWEN3, weights)
    with pytest.raises(CheckpointError, match=rf"{name}' has shape \(11, 127, 256\); config.json asks for \(11, 128"):
        prepare(source, "q8_0")
