"""LFM2 and LFM2 MoE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.errors import CheckpointError
from quantize.pipeline import prepare
from tests.quantize.family_files import (
    VOCABULARY,
    changed_config,
    check_against_llama_cpp,
    floats,
    logits_of,
    random_weights,
    write_checkpoint,
)

HIDDEN, KEYS, HEAD, KERNEL, EXPERTS = 256, 64, 32, 3, 3
KINDS = ["conv", "full_attention", "conv"]
DENSE: dict[str, Any] = {
    "architectures": ["Lfm2ForCausalLM"],
    "model_type": "lfm2",
    "hidden_size": HIDDEN,
    "num_hidden_layers": len(KINDS),
    "num_attention_heads": HIDDEN // HEAD,
    "num_key_value_heads": KEYS // HEAD,
    "layer_types": KINDS,
    "conv_L_cache": KERNEL,
    "max_position_embeddings": 512,
    "intermediate_size": 500,  # the feed-forward layers are two thirds of it, rounded up to a multiple of 128
    "block_multiple_of": 128,
}
WIDTH = 384
MIXTURE: dict[str, Any] = {
    **DENSE,
    "architectures": ["Lfm2MoeForCausalLM"],
    "model_type": "lfm2_moe",
    "intermediate_size": WIDTH,
    "moe_intermediate_size": 256,
    "num_dense_layers": 1,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "norm_eps": 1e-5,
}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return every stored tensor's shape."""
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.embedding_norm.weight": (HIDDEN,),
    }
    for layer, kind in enumerate(KINDS):
        prefix = f"model.layers.{layer}"
        found |= {f"{prefix}.{norm}.weight": (HIDDEN,) for norm in ("operator_norm", "ffn_norm")}
        if kind == "conv":
            found[f"{prefix}.conv.conv.weight"] = (HIDDEN, 1, KERNEL)
            found[f"{prefix}.conv.in_proj.weight"] = (3 * HIDDEN, HIDDEN)
            found[f"{prefix}.conv.out_proj.weight"] = (HIDDEN, HIDDEN)
        else:
            rows = {"q_proj": HIDDEN, "k_proj": KEYS, "v_proj": KEYS, "out_proj": HIDDEN}
            found |= {f"{prefix}.self_attn.{name}.weight": (count, HIDDEN) for name, count in rows.items()}
            found |= {f"{prefix}.self_attn.{letter}_layernorm.weight": (HEAD,) for letter in "qk"}
        experts = [f"experts.{number}." for number in range(EXPERTS)]
        if config is DENSE or layer == 0:
            experts, width = [""], WIDTH
        else:
            width = 256
            found[f"{prefix}.feed_forward.gate.weight"] = (EXPERTS, HIDDEN)
            found[f"{prefix}.feed_forward.expert_bias"] = (EXPERTS,)
        for expert in experts:
            found[f"{prefix}.feed_forward.{expert}w1.weight"] = (width, HIDDEN)
            found[f"{prefix}.feed_forward.{expert}w2.weight"] = (HIDDEN, width)
            found[f"{prefix}.feed_forward.{expert}w3.weight"] = (width, HIDDEN)
    return found


def make(folder: Path, config: dict[str, Any] = DENSE, **fields: Any) -> Path:
    """Write a checkpoint."""
    return changed_config(write_checkpoint(folder / "Tiny-LFM2", config, random_weights(shapes(config))), **fields)


def test_dense(tmp_path: Path) -> None:
    header = check_against_llama_cpp(make(tmp_path), tmp_path, ["q8_0", "q4_0", "q4_k_m"])
    keys, weights, arrays = header.metadata, random_weights(shapes(DENSE)), floats(header)
    assert keys["lfm2.attention.head_count_kv"] == [0, KEYS // HEAD, 0]
    assert keys["lfm2.feed_forward_length"] == WIDTH
    assert keys["lfm2.shortconv.l_cache"] == KERNEL
    assert keys["lfm2.rope.freq_base"] == 1000000.0
    for target, source in {
        "token_embd.weight": "model.embed_tokens.weight",
        "token_embd_norm.weight": "model.embedding_norm.weight",
        "blk.1.attn_output.weight": "model.layers.1.self_attn.out_proj.weight",
        "blk.1.attn_k_norm.weight": "model.layers.1.self_attn.k_layernorm.weight",
        "blk.2.shortconv.in_proj.weight": "model.layers.2.conv.in_proj.weight",
        "blk.2.ffn_down.weight": "model.layers.2.feed_forward.w2.weight",
    }.items():
        assert np.array_equal(arrays[target], weights[source]), target
    convolution = arrays["blk.0.shortconv.conv.weight"]
    assert np.array_equal(convolution, weights["model.layers.0.conv.conv.weight"].reshape(HIDDEN, KERNEL))
    assert next(t.type_name for t in header.tensors if t.name == "blk.0.shortconv.conv.weight") == "f32"
    assert np.isfinite(logits_of(tmp_path / "ours.gguf")).all()


def test_mixture(tmp_path: Path) -> None:
    header = check_against_llama_cpp(make(tmp_path, MIXTURE), tmp_path, ["q8_0", "q4_k_m"])
    keys, weights, arrays = header.metadata, random_weights(shapes(MIXTURE)), floats(header)
    assert keys["general.architecture"] == "lfm2moe"
    assert keys["lfm2moe.leading_dense_block_count"] == 1
    assert keys["lfm2moe.expert_gating_func"] == 2
    for target, name in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
        experts = [weights[f"model.layers.2.feed_forward.experts.{e}.{name}.weight"] for e in range(EXPERTS)]
        assert np.array_equal(arrays[f"blk.2.ffn_{target}_exps.weight"], np.stack(experts))
    assert np.array_equal(arrays["blk.1.exp_probs_b.bias"], weights["model.layers.1.feed_forward.expert_bias"])
    assert "blk.0.ffn_gate.weight" in arrays
    assert np.isfinite(logits_of(tmp_path / "ours.gguf")).all()


def test_the_text_model_of_lfm2_vl(tmp_path: Path) -> None:
    text = {name: value for name, value in DENSE.items() if name != "model_type"}
    config = {"architectures": ["Lfm2VlForConditionalGeneration"], "model_type": "lfm2_vl", "text_config": text}
    weights = random_weights(shapes(DENSE))
    named = {name.replace("model.", "model.language_model.", 1): values for name, values in weights.items()}
    seen = random_weights({"model.vision_tower.post_layernorm.weight": (8,), "model.multi_modal_projector.a": (2, 2)})
    folder = write_checkpoint(tmp_path / "Tiny-LFM2", config, {**named, **seen})
    prepared = prepare(folder, "q8_0")
    assert prepared.plan.header == prepare(make(tmp_path / "other"), "q8_0").plan.header
    assert any("vision_tower" in note for note in prepared.notes)
    folder = write_checkpoint(tmp_path / "plain" / "Tiny-LFM2", DENSE, {**weights, **seen})
    with pytest.raises(CheckpointError, match="vision_tower"):
        prepare(folder, "q8_0")


def test_early_spelling(tmp_path: Path) -> None:
    folder = make(
        tmp_path, layer_types=None, full_attn_idxs=[1], intermediate_size=None, block_ff_dim=500, theta=5000.0
    )
    plan = prepare(folder, "q8_0").plan
    assert prepare(make(tmp_path / "other", rope_theta=5000.0), "q8_0").plan.header == plan.header


@pytest.mark.parametrize(
    ("config", "fields", "said"),
    [
        (DENSE, {"layer_types": ["conv", "full_attention", "mamba"]}, "layer_types"),
        (DENSE, {"layer_types": KINDS[:2]}, "layer_types"),
        (DENSE, {"layer_types": None, "full_attn_idxs": 3}, "full_attn_idxs"),
        (DENSE, {"num_hidden_layers": 1 << 30}, "num_hidden_layers"),
        (DENSE, {"num_key_value_heads": 3}, "num_key_value_heads"),
        (DENSE, {"conv_L_cache": 4}, "shape"),
        (DENSE, {"tie_word_embeddings": False}, "lm_head.weight"),
        (DENSE, {"block_ffn_dim_multiplier": "wide"}, "block_ffn_dim_multiplier"),
        (MIXTURE, {"num_experts": 1 << 30}, "num_experts"),
        (MIXTURE, {"num_experts": 2}, "experts.2"),
        (MIXTURE, {"routed_scaling_factor": 2.5}, "routed_scaling_factor"),
        (MIXTURE, {"num_dense_layers": [1]}, "num_dense_layers"),
    ],
)
def test_bad_fields_are_named(config: dict[str, Any], fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said):
        prepare(make(tmp_path, config, **fields), "q8_0")
