"""OLMo 2 and 3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.errors import CheckpointError
from quantize.pipeline import prepare
from tests.quantize.family_files import (
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

HIDDEN, WIDTH, HEADS, KEY_HEADS, HEAD, LAYERS = 256, 288, 8, 2, 32, 4
OLMO3: dict[str, Any] = {
    "architectures": ["Olmo3ForCausalLM"],
    "model_type": "olmo3",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
}
OLMO2 = {**OLMO3, "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192, "attention_factor": 1.2}


def shapes(*, biases: bool = False) -> dict[str, tuple[int, ...]]:
    """Return every stored tensor's shape."""
    keys = KEY_HEADS * HEAD
    found = outer_shapes(HIDDEN, tied=False)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        found |= {f"{prefix}.post_{norm}_layernorm.weight": (HIDDEN,) for norm in ("attention", "feedforward")}
        attention = attention_shapes(prefix, HIDDEN, HIDDEN, keys)
        found |= attention
        if biases:
            found |= {f"{name.removesuffix('weight')}bias": shape[:1] for name, shape in attention.items()}
        found |= {f"{prefix}.self_attn.{name}_norm.weight": (rows,) for name, rows in (("q", HIDDEN), ("k", keys))}
        found |= gated_shapes(f"{prefix}.mlp", HIDDEN, WIDTH)
    return found


def make(folder: Path, config: dict[str, Any] = OLMO3, **fields: Any) -> Path:
    """Write a checkpoint."""
    return changed_config(write_checkpoint(folder / "Tiny-OLMo", config, random_weights(shapes())), **fields)


def test_olmo3(tmp_path: Path) -> None:
    header = check_against_llama_cpp(make(tmp_path, rope_scaling=YARN), tmp_path, ["q8_0", "q4_k_m"])
    keys, weights, arrays = header.metadata, random_weights(shapes()), floats(header)
    assert keys["general.architecture"] == "olmo2"
    assert keys["olmo2.attention.sliding_window"] == 4096
    assert keys["olmo2.attention.sliding_window_pattern"] == [True, True, True, False]
    assert keys["olmo2.rope.scaling.type"] == "yarn"
    assert keys["olmo2.rope.scaling.original_context_length"] == 8192
    assert keys["olmo2.attention.head_count_kv"] == KEY_HEADS
    for target, source in {
        "token_embd.weight": "model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
        "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj.weight",
        "blk.1.attn_k.weight": "model.layers.1.self_attn.k_proj.weight",
        "blk.1.attn_q_norm.weight": "model.layers.1.self_attn.q_norm.weight",
        "blk.2.attn_k_norm.weight": "model.layers.2.self_attn.k_norm.weight",
        "blk.2.post_attention_norm.weight": "model.layers.2.post_attention_layernorm.weight",
        "blk.3.post_ffw_norm.weight": "model.layers.3.post_feedforward_layernorm.weight",
        "blk.3.ffn_down.weight": "model.layers.3.mlp.down_proj.weight",
    }.items():
        assert np.array_equal(arrays[target], weights[source]), target
    assert np.isfinite(logits_of(tmp_path / "ours.gguf")).all()


def test_olmo2_without_window(tmp_path: Path) -> None:
    header = check_against_llama_cpp(make(tmp_path, OLMO2), tmp_path, ["q8_0"])
    assert not [key for key in header.metadata if "sliding_window" in key]
    assert header.metadata["olmo2.rope.freq_base"] == 10000.0
    assert np.isfinite(logits_of(tmp_path / "ours.gguf")).all()


def test_layer_types_say_which_layers_have_a_window(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    header = check_against_llama_cpp(make(tmp_path, layer_types=kinds, sliding_window=64), tmp_path, [])
    assert header.metadata["olmo2.attention.sliding_window_pattern"] == [False, True, False, False]
    assert header.metadata["olmo2.attention.sliding_window"] == 64


def test_biases(tmp_path: Path) -> None:
    weights = random_weights(shapes(biases=True))
    source = write_checkpoint(tmp_path / "Tiny", {**OLMO2, "attention_bias": True}, weights)
    arrays = floats(check_against_llama_cpp(source, tmp_path, []))
    assert np.array_equal(arrays["blk.1.attn_v.bias"], weights["model.layers.1.self_attn.v_proj.bias"])


@pytest.mark.parametrize(
    ("config", "fields", "said"),
    [
        (OLMO3, {"layer_types": ["sliding_attention"]}, "layer_types"),
        (OLMO3, {"layer_types": ["conv"] * LAYERS}, "layer_types"),
        (OLMO2, {"layer_types": ["sliding_attention"] * LAYERS}, "sliding_window is missing"),
        (OLMO3, {"sliding_window": -1}, "sliding_window"),
        (OLMO3, {"num_hidden_layers": 10**9}, "1000000000 layers"),
        (OLMO3, {"head_dim": 16}, "hidden_size"),
        (OLMO3, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3"),
        (OLMO3, {"attention_bias": True}, "q_proj.bias"),
        (OLMO3, {"num_key_value_heads": 4}, "k_proj.weight"),
    ],
)
def test_bad_fields_are_named(config: dict[str, Any], fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said):
        prepare(make(tmp_path, config, **fields), "q8_0")
