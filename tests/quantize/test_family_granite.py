"""Granite 3 and 4: scales, fused experts, Mamba 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from app.errors import CheckpointError
from quantize.pipeline import prepare
from tests.quantize.family_files import (
    VOCABULARY,
    Arrays,
    changed_config,
    check_against_llama_cpp,
    floats,
    logits_of,
    random_weights,
    write_checkpoint,
)

HIDDEN, WIDTH, SHARED, HEADS, KEY_HEADS, HEAD, EXPERTS = 256, 288, 320, 8, 2, 32, 3
KERNEL, STATE, GROUPS, MAMBA_HEADS, INNER = 4, 32, 2, 8, 512
MIXED = INNER + 2 * GROUPS * STATE  # what the convolution runs over
SCALES = {
    "attention_multiplier": 0.015625,
    "embedding_multiplier": 12,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}
DENSE: dict[str, Any] = {
    "architectures": ["GraniteForCausalLM"],
    "model_type": "granite",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "tie_word_embeddings": True,
    **SCALES,
}
MOE = {
    **DENSE,
    "architectures": ["GraniteMoeForCausalLM"],
    "model_type": "granitemoe",
    "num_local_experts": EXPERTS,
}
HYBRID = {
    **DENSE,
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "model_type": "granitemoehybrid",
    "num_hidden_layers": 3,
    "layer_types": ["mamba", "attention", "mamba"],
    "position_embedding_type": "nope",
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": SHARED,
    "mamba_d_conv": KERNEL,
    "mamba_d_state": STATE,
    "mamba_n_groups": GROUPS,
    "mamba_n_heads": MAMBA_HEADS,
    "mamba_expand": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000,
}
ATTENTION = {**HYBRID, "layer_types": ["attention"] * 3, "position_embedding_type": "rope"}
NO_EXPERTS = {"num_local_experts": 0, "num_experts_per_tok": 0, "intermediate_size": SHARED}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return every stored tensor's shape; the embeddings are tied."""
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    kinds = config.get("layer_types") or ["attention"] * config["num_hidden_layers"]
    for layer, kind in enumerate(kinds):
        prefix = f"model.layers.{layer}"
        found |= {f"{prefix}.{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
        if kind == "mamba":
            mamba = {"conv1d.weight": (MIXED, 1, KERNEL), "conv1d.bias": (MIXED,), "norm.weight": (INNER,)}
            mamba |= {"in_proj.weight": (INNER + MIXED + MAMBA_HEADS, HIDDEN), "out_proj.weight": (HIDDEN, INNER)}
            mamba |= dict.fromkeys(("A_log", "D", "dt_bias"), (MAMBA_HEADS,))
            found |= {f"{prefix}.mamba.{name}": shape for name, shape in mamba.items()}
        else:
            rows = {"q": HEADS * HEAD, "k": KEY_HEADS * HEAD, "v": KEY_HEADS * HEAD, "o": HIDDEN}
            found |= {f"{prefix}.self_attn.{name}_proj.weight": (count, HIDDEN) for name, count in rows.items()}
        if config["model_type"] == "granite":
            found |= {f"{prefix}.mlp.{name}_proj.weight": (WIDTH, HIDDEN) for name in ("gate", "up")}
            found[f"{prefix}.mlp.down_proj.weight"] = (HIDDEN, WIDTH)
        if experts := config.get("num_local_experts"):
            found[f"{prefix}.block_sparse_moe.input_linear.weight"] = (experts, 2 * WIDTH, HIDDEN)
            found[f"{prefix}.block_sparse_moe.output_linear.weight"] = (experts, HIDDEN, WIDTH)
            found[f"{prefix}.block_sparse_moe.router.layer.weight"] = (experts, HIDDEN)
        if shared := config.get("shared_intermediate_size"):
            found[f"{prefix}.shared_mlp.input_linear.weight"] = (2 * shared, HIDDEN)
            found[f"{prefix}.shared_mlp.output_linear.weight"] = (HIDDEN, shared)
    return found


def make(folder: Path, config: dict[str, Any], **fields: Any) -> Path:
    """Write a checkpoint; `fields` contradict the weights."""
    return changed_config(write_checkpoint(folder / "Tiny-Granite", config, random_weights(shapes(config))), **fields)


def pairs_side_by_side(weights: NDArray[Any], heads: int) -> NDArray[Any]:
    """Return q or k as ggml wants it."""
    return weights.reshape(heads, 2, HEAD // 2, HIDDEN).swapaxes(1, 2).reshape(-1, HIDDEN)


def check_experts(arrays: Arrays, weights: Arrays, layer: int) -> None:
    """Check that a layer's fused experts are parted."""
    prefix = f"model.layers.{layer}.block_sparse_moe"
    fused = weights[f"{prefix}.input_linear.weight"]
    assert np.array_equal(arrays[f"blk.{layer}.ffn_gate_exps.weight"], fused[:, :WIDTH])
    assert np.array_equal(arrays[f"blk.{layer}.ffn_up_exps.weight"], fused[:, WIDTH:])
    assert np.array_equal(arrays[f"blk.{layer}.ffn_down_exps.weight"], weights[f"{prefix}.output_linear.weight"])
    assert np.array_equal(arrays[f"blk.{layer}.ffn_gate_inp.weight"], weights[f"{prefix}.router.layer.weight"])


def check_shared(arrays: Arrays, weights: Arrays, layer: int, suffix: str) -> None:
    """Check that a layer's shared expert is parted."""
    fused = weights[f"model.layers.{layer}.shared_mlp.input_linear.weight"]
    down = weights[f"model.layers.{layer}.shared_mlp.output_linear.weight"]
    assert np.array_equal(arrays[f"blk.{layer}.ffn_gate{suffix}.weight"], fused[:SHARED])
    assert np.array_equal(arrays[f"blk.{layer}.ffn_up{suffix}.weight"], fused[SHARED:])
    assert np.array_equal(arrays[f"blk.{layer}.ffn_down{suffix}.weight"], down)


def test_dense(tmp_path: Path) -> None:
    header = check_against_llama_cpp(make(tmp_path, DENSE, head_dim=HEAD), tmp_path, ["q8_0", "q4_k_m"])
    keys, weights, arrays = header.metadata, random_weights(shapes(DENSE)), floats(header)
    assert keys["granite.attention.scale"] == 0.015625
    assert keys["granite.embedding_scale"] == 12
    assert keys["granite.residual_scale"] == pytest.approx(0.22)
    assert keys["granite.logit_scale"] == 8
    assert keys["granite.context_length"] == 2048
    assert "granite.attention.key_length" not in keys
    for letter, heads in (("q", HEADS), ("k", KEY_HEADS)):
        stored = weights[f"model.layers.1.self_attn.{letter}_proj.weight"]
        assert np.array_equal(arrays[f"blk.1.attn_{letter}.weight"], pairs_side_by_side(stored, heads))
    assert np.array_equal(arrays["blk.0.ffn_down.weight"], weights["model.layers.0.mlp.down_proj.weight"])
    assert np.isfinite(logits_of(tmp_path / "ours.gguf")).all()


def test_silent_scales_are_one_and_zero_ones_are_left_out(tmp_path: Path) -> None:
    fields: dict[str, Any] = {**dict.fromkeys(SCALES), "residual_multiplier": 0}
    keys = check_against_llama_cpp(make(tmp_path, DENSE, **fields), tmp_path, []).metadata
    assert keys["granite.logit_scale"] == keys["granite.attention.scale"] == keys["granite.embedding_scale"] == 1
    assert "granite.residual_scale" not in keys


def test_experts(tmp_path: Path) -> None:
    header = check_against_llama_cpp(make(tmp_path, MOE), tmp_path, ["q8_0", "q4_k_m"])
    keys, weights, arrays = header.metadata, random_weights(shapes(MOE)), floats(header)
    assert keys["general.architecture"] == "granitemoe"
    assert keys["granitemoe.expert_count"] == EXPERTS
    assert keys["granitemoe.expert_used_count"] == 2
    assert keys["granitemoe.logit_scale"] == 8
    check_experts(arrays, weights, 1)
    assert not [name for name in arrays if "shexp" in name]
    assert np.isfinite(logits_of(tmp_path / "ours.gguf")).all()


def test_the_source_is_read_once(tmp_path: Path) -> None:
    prepared = prepare(make(tmp_path, MOE), "q8_0")
    assert prepared.source_bytes == sum(tensor.nbytes for tensor in prepared.checkpoint.tensors.values())


def test_a_shared_expert(tmp_path: Path) -> None:
    config = {
        **MOE,
        "architectures": ["GraniteMoeSharedForCausalLM"],
        "model_type": "granitemoeshared",
        "shared_intermediate_size": SHARED,
    }
    header = check_against_llama_cpp(make(tmp_path, config), tmp_path, ["q8_0"])
    assert header.metadata["granitemoe.expert_shared_feed_forward_length"] == SHARED
    check_shared(floats(header), random_weights(shapes(config)), 0, "_shexp")
    assert np.isfinite(logits_of(tmp_path / "ours.gguf")).all()


def test_hybrid(tmp_path: Path) -> None:
    header = check_against_llama_cpp(make(tmp_path, HYBRID), tmp_path, ["q8_0", "q4_k_m"])
    keys, weights, arrays = header.metadata, random_weights(shapes(HYBRID)), floats(header)
    prefix = "granitehybrid"
    assert keys["general.architecture"] == prefix
    assert keys[f"{prefix}.attention.head_count_kv"] == [0, KEY_HEADS, 0]
    assert keys[f"{prefix}.context_length"] == 1 << 20
    assert keys[f"{prefix}.rope.scaling.finetuned"] is False
    sizes = ("conv_kernel", "state_size", "group_count", "inner_size", "time_step_rank")
    assert [keys[f"{prefix}.ssm.{size}"] for size in sizes] == [KERNEL, STATE, GROUPS, INNER, MAMBA_HEADS]
    mamba = {name.rsplit("mamba.")[1]: value for name, value in weights.items() if name.startswith("model.layers.2.m")}
    decay = -np.exp(mamba["A_log"].astype(np.float64))
    assert np.array_equal(arrays["blk.2.ssm_a"], decay.astype(np.float32)[:, np.newaxis])
    assert np.array_equal(arrays["blk.2.ssm_d"], mamba["D"][:, np.newaxis])
    assert np.array_equal(arrays["blk.2.ssm_dt.bias"], mamba["dt_bias"])
    assert np.array_equal(arrays["blk.2.ssm_conv1d.weight"], mamba["conv1d.weight"][:, 0])
    assert np.array_equal(arrays["blk.2.ssm_conv1d.bias"], mamba["conv1d.bias"])
    assert np.array_equal(arrays["blk.2.ssm_norm.weight"], mamba["norm.weight"].reshape(GROUPS, -1))
    assert np.array_equal(arrays["blk.2.ssm_in.weight"], mamba["in_proj.weight"])
    assert np.array_equal(arrays["blk.2.ssm_out.weight"], mamba["out_proj.weight"])
    stored = weights["model.layers.1.self_attn.k_proj.weight"]
    assert np.array_equal(arrays["blk.1.attn_k.weight"], pairs_side_by_side(stored, KEY_HEADS))
    check_experts(arrays, weights, 2)
    check_shared(arrays, weights, 1, "_shexp")
    assert np.isfinite(logits_of(tmp_path / "ours.gguf")).all()


def test_dense_hybrid(tmp_path: Path) -> None:
    config = {**HYBRID, **NO_EXPERTS, "mamba_n_groups": GROUPS}
    header = check_against_llama_cpp(make(tmp_path, config), tmp_path, ["q8_0"])
    assert header.metadata["general.architecture"] == "granitehybrid"
    assert header.metadata["granitehybrid.expert_count"] == 0
    check_shared(floats(header), random_weights(shapes(config)), 2, "")
    assert np.isfinite(logits_of(tmp_path / "ours.gguf")).all()


@pytest.mark.parametrize(("more", "architecture"), [(NO_EXPERTS, "granite"), ({}, "granitemoe")])
def test_only_attention_is_a_granite_3(more: dict[str, Any], architecture: str, tmp_path: Path) -> None:
    header = check_against_llama_cpp(make(tmp_path, {**ATTENTION, **more}), tmp_path, ["q8_0"])
    assert header.metadata["general.architecture"] == architecture
    assert header.metadata[f"{architecture}.attention.head_count_kv"] == [KEY_HEADS] * 3
    assert header.metadata[f"{architecture}.context_length"] == 512
    assert header.metadata[f"{architecture}.rope.scaling.finetuned"] is True
    assert np.isfinite(logits_of(tmp_path / "ours.gguf")).all()


@pytest.mark.parametrize(
    ("config", "fields", "said"),
    [
        (DENSE, {"head_dim": 64}, "hidden_size"),
        (DENSE, {"logits_scaling": "8"}, "logits_scaling"),
        (DENSE, {"tie_word_embeddings": False}, "lm_head.weight"),
        (MOE, {"num_local_experts": 4}, "shape"),
        (MOE, {"num_local_experts": 10**9}, "num_local_experts"),
        (MOE, {"num_local_experts": 0}, "num_local_experts"),
        (MOE, {"intermediate_size": 2 * WIDTH}, "input_linear.weight"),
        (MOE, {"shared_intermediate_size": SHARED}, "shared_mlp"),
        (MOE, {"shared_intermediate_size": [SHARED]}, "shared_intermediate_size"),
        (HYBRID, {"num_local_experts": [EXPERTS]}, "num_local_experts"),
        (HYBRID, {"num_local_experts": 0, "num_experts_per_tok": 0}, "must be the same"),
        (HYBRID, {"layer_types": None}, "layer_types"),
        (HYBRID, {"layer_types": ["mamba"]}, "layer_types"),
        (HYBRID, {"layer_types": ["mamba", "conv", "mamba"]}, "layer_types"),
        (HYBRID, {"position_embedding_type": "rope"}, "position_embedding_type"),
        (ATTENTION, {"position_embedding_type": None}, "position_embedding_type"),
        (HYBRID, {"hidden_act": "gelu"}, "hidden_act"),
        (HYBRID, {"mamba_expand": 4}, "mamba_expand"),
        (HYBRID, {"mamba_conv_bias": False}, "mamba_conv_bias"),
        (HYBRID, {"mamba_n_heads": 7}, "mamba_n_heads"),
        (HYBRID, {"mamba_d_state": None}, "mamba_d_state is missing"),
        (HYBRID, {"mamba_d_conv": 3}, "conv1d.weight"),
        (HYBRID, {"num_hidden_layers": 10**9}, "layer_types"),
    ],
)
def test_bad_fields_are_named(config: dict[str, Any], fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said):
        prepare(make(tmp_path, config, **fields), "q8_0")
