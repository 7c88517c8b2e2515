"""Falcon-H1: its multipliers become part of the weights, and Mamba's tensors change their shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.errors import CheckpointError
from app.models.gguf import read_header
from quantize.pipeline import prepare, quantize
from tests.quantize.family_files import (
    VOCABULARY,
    Arrays,
    changed_config,
    check_against_llama_cpp,
    floats,
    logits_of,
    random_weights,
    rounded,
    tensor_bytes,
    write_checkpoint,
)

HIDDEN, WIDE, HEADS, KEY_HEADS, HEAD, LAYERS = 128, 256, 2, 1, 64, 2
INNER, MAMBA_HEADS, GROUPS, STATE, KERNEL = 96, 6, 2, 16, 4
MIXED = GROUPS * STATE
RANGES = (INNER, INNER, MIXED, MIXED, MAMBA_HEADS)
CONFIG: dict[str, Any] = {
    "architectures": ["FalconH1ForCausalLM"],
    "model_type": "falcon_h1",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "head_dim": HEAD,
    "rope_theta": 1e11,
    "max_position_embeddings": 512,
    "mamba_d_ssm": INNER,
    "mamba_n_heads": MAMBA_HEADS,
    "mamba_d_head": INNER // MAMBA_HEADS,
    "mamba_n_groups": GROUPS,
    "mamba_d_state": STATE,
    "mamba_d_conv": KERNEL,
    "mamba_norm_before_gate": False,
    "mamba_rms_norm": True,
    "attention_in_multiplier": 0.9,
    "attention_out_multiplier": 0.7,
    "embedding_multiplier": 5.3,
    "key_multiplier": 0.3,
    "lm_head_multiplier": 0.11,
    "mlp_multipliers": [0.8, 0.6],
    "ssm_in_multiplier": 1.3,
    "ssm_multipliers": [0.35, 0.25, 0.45, 0.5, 0.55],
    "ssm_out_multiplier": 0.23,
}


def random_tensors() -> Arrays:
    """Return a checkpoint's weights."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.final_layernorm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (HIDDEN,),
            f"{prefix}.pre_ff_layernorm.weight": (HIDDEN,),
            f"{prefix}.self_attn.q_proj.weight": (HEADS * HEAD, HIDDEN),
            f"{prefix}.self_attn.k_proj.weight": (KEY_HEADS * HEAD, HIDDEN),
            f"{prefix}.self_attn.v_proj.weight": (KEY_HEADS * HEAD, HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD),
            f"{prefix}.feed_forward.gate_proj.weight": (WIDE, HIDDEN),
            f"{prefix}.feed_forward.up_proj.weight": (WIDE, HIDDEN),
            f"{prefix}.feed_forward.down_proj.weight": (HIDDEN, WIDE),
            f"{prefix}.mamba.in_proj.weight": (sum(RANGES), HIDDEN),
            f"{prefix}.mamba.out_proj.weight": (HIDDEN, INNER),
            f"{prefix}.mamba.conv1d.weight": (INNER + 2 * MIXED, 1, KERNEL),
            f"{prefix}.mamba.conv1d.bias": (INNER + 2 * MIXED,),
            f"{prefix}.mamba.dt_bias": (MAMBA_HEADS,),
            f"{prefix}.mamba.A_log": (MAMBA_HEADS,),
            f"{prefix}.mamba.D": (MAMBA_HEADS,),
            f"{prefix}.mamba.norm.weight": (INNER,),
        }
    return random_weights(shapes)


def make(folder: Path, weights: Arrays | None = None, dtype: str = "BF16", **fields: Any) -> Path:
    """Write a checkpoint."""
    folder = write_checkpoint(folder / "Tiny-Falcon", CONFIG, weights or random_tensors(), dtype)
    return changed_config(folder, **fields)


def test_every_multiplier_is_in_the_weights(tmp_path: Path) -> None:
    header = check_against_llama_cpp(make(tmp_path), tmp_path, ["q8_0", "q4_k_m"])
    weights, arrays = random_tensors(), floats(header)
    for target, source, factors in (
        ("token_embd.weight", "model.embed_tokens.weight", (5.3,)),
        ("output.weight", "lm_head.weight", (0.11,)),
        ("blk.1.attn_q.weight", "model.layers.1.self_attn.q_proj.weight", (0.9,)),
        ("blk.1.attn_k.weight", "model.layers.1.self_attn.k_proj.weight", (0.3, 0.9)),
        ("blk.1.attn_v.weight", "model.layers.1.self_attn.v_proj.weight", (0.9,)),
        ("blk.1.attn_output.weight", "model.layers.1.self_attn.o_proj.weight", (0.7,)),
        ("blk.1.ffn_gate.weight", "model.layers.1.feed_forward.gate_proj.weight", (0.8,)),
        ("blk.1.ffn_up.weight", "model.layers.1.feed_forward.up_proj.weight", ()),
        ("blk.1.ffn_down.weight", "model.layers.1.feed_forward.down_proj.weight", (0.6,)),
        ("blk.1.ssm_out.weight", "model.layers.1.mamba.out_proj.weight", (0.23,)),
    ):
        expected = weights[source]
        for factor in factors:
            expected = expected * np.float32(factor)
        assert np.array_equal(arrays[target], rounded(expected)), target
    rows = np.repeat(np.array([0.35, 0.25, 0.45, 0.5, 0.55], np.float32), RANGES)[:, None]
    expected = weights["model.layers.1.mamba.in_proj.weight"] * np.float32(1.3) * rows
    assert np.array_equal(arrays["blk.1.ssm_in.weight"], rounded(expected))
    assert np.isfinite(logits_of(tmp_path / "ours.gguf")).all()


def test_f16_is_multiplied_in_f16_step_by_step(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weights = {
        name: random.normal(1.0, 0.3, values.shape).astype(np.float16).astype(np.float32)
        for name, values in random_tensors().items()
    }
    quantize(make(tmp_path, weights, "F16"), "f16", tmp_path / "out.gguf")
    stored = weights["model.layers.1.self_attn.k_proj.weight"].astype(np.float16)
    once = (stored.astype(np.float32) * np.float32(0.3)).astype(np.float16)
    twice = (once.astype(np.float32) * np.float32(0.9)).astype(np.float16)
    assert tensor_bytes(read_header(tmp_path / "out.gguf"))["blk.1.attn_k.weight"] == twice.tobytes()
    together = (stored.astype(np.float32) * np.float32(0.3) * np.float32(0.9)).astype(np.float16)
    assert not np.array_equal(twice, together)  # the weights can tell


def test_tensors_of_mamba(tmp_path: Path) -> None:
    header = check_against_llama_cpp(make(tmp_path), tmp_path, [])
    weights, arrays, keys = random_tensors(), floats(header), header.metadata
    source = "model.layers.0.mamba"
    convolution = weights[f"{source}.conv1d.weight"].reshape(-1, KERNEL)
    assert np.array_equal(arrays["blk.0.ssm_conv1d.weight"], convolution)
    assert np.allclose(arrays["blk.0.ssm_a"], -np.exp(weights[f"{source}.A_log"])[:, None], rtol=1e-6)
    assert np.array_equal(arrays["blk.0.ssm_d"], weights[f"{source}.D"][:, None])
    assert np.array_equal(arrays["blk.0.ssm_dt.bias"], weights[f"{source}.dt_bias"])
    assert np.array_equal(arrays["blk.0.ssm_norm.weight"], weights[f"{source}.norm.weight"].reshape(GROUPS, -1))
    types = {tensor.name: tensor.type_name for tensor in header.tensors}
    assert {types[f"blk.0.ssm_{name}"] for name in ("conv1d.weight", "a", "d", "dt.bias", "norm.weight")} == {"f32"}
    assert keys["falcon-h1.ssm.time_step_rank"] == MAMBA_HEADS
    assert keys["falcon-h1.ssm.inner_size"] == INNER
    assert keys["falcon-h1.rope.freq_base"] == np.float32(1e11)


def test_without_norm_and_multipliers(tmp_path: Path) -> None:
    weights = random_tensors()
    for name in [name for name in weights if name.endswith("mamba.norm.weight")]:
        del weights[name]
    factors = dict.fromkeys(name for name in CONFIG if "multiplier" in name)
    source = make(tmp_path, weights, mamba_rms_norm=False, mamba_d_head=None, **factors)
    header = check_against_llama_cpp(source, tmp_path, ["q8_0"])
    assert np.array_equal(floats(header)["blk.0.ssm_in.weight"], weights["model.layers.0.mamba.in_proj.weight"])
    assert not any("ssm_norm" in tensor.name for tensor in header.tensors)
    assert np.isfinite(logits_of(tmp_path / "ours.gguf")).all()


def test_tied_embeddings_are_noted(tmp_path: Path) -> None:
    weights = random_tensors()
    del weights["lm_head.weight"]
    prepared = prepare(make(tmp_path, weights, tie_word_embeddings=True), "q8_0")
    assert any("5.3" in note and "0.11" in note for note in prepared.notes)


def test_multiplied_weights_that_no_type_holds(tmp_path: Path) -> None:
    weights = random_tensors()
    weights["lm_head.weight"][3, 4] = 3e38
    with pytest.raises(CheckpointError, match=r"lm_head\.weight.*too large"):
        quantize(make(tmp_path, weights, "F32", lm_head_multiplier=3.0), "q8_0", tmp_path / "out.gguf")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mlp_multipliers": [0.5]}, "mlp_multipliers"),
        ({"ssm_multipliers": [1, 2, 3, 4, "five"]}, "ssm_multipliers"),
        ({"key_multiplier": "large"}, "key_multiplier"),
        ({"mamba_d_head": 15}, "mamba_d_head"),
        ({"mamba_n_groups": 5}, "mamba_n_groups"),
        ({"mamba_norm_before_gate": True}, "mamba_norm_before_gate"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mamba_conv_bias": False}, "mamba_conv_bias"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope scaling"),
        ({"num_hidden_layers": 1 << 30}, "layers"),
        ({"mamba_d_state": 32}, "shape"),
        ({"rope_theta": "wide"}, "rope_theta"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said):
        prepare(make(tmp_path, **fields), "q8_0")
