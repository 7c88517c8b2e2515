"""Mistral 3: the text of a multimodal checkpoint in each of its layouts, and Ministral 3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.errors import CheckpointError
from quantize.pipeline import prepare
from quantize.tensors import rope_pairs
from tests.quantize.family_files import (
    VOCABULARY,
    Arrays,
    check_against_llama_cpp,
    floats,
    llama_shapes,
    logits_of,
    outer_shapes,
    random_weights,
    write_checkpoint,
)

HIDDEN, WIDTH, HEADS, KEY_HEADS, HEAD, LAYERS = 256, 288, 4, 2, 96, 3
TEXT: dict[str, Any] = {
    "model_type": "mistral",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "head_dim": HEAD,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000000.0,
    "tie_word_embeddings": False,
}
YARN = {
    "rope_type": "yarn",
    "factor": 16.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "llama_4_scaling_beta": 0.125,
    "mscale_all_dim": 0.75,
    "original_max_position_embeddings": 16384,
    "rope_theta": 1000000.0,
}
MINISTRAL = {**TEXT, "model_type": "ministral3", "rope_theta": None, "rope_parameters": YARN}
TOWER = {"vision_tower.ln_pre.weight": (32,), "multi_modal_projector.linear_1.weight": (HIDDEN, 32)}


def text_weights() -> Arrays:
    """Return the weights of the text model, by their names in a model of text alone."""
    shapes = outer_shapes(HIDDEN, tied=False)
    for layer in range(LAYERS):
        shapes |= llama_shapes(f"model.layers.{layer}", HIDDEN, WIDTH, HEADS * HEAD, KEY_HEADS * HEAD)
    return random_weights(shapes)


def old_name(name: str) -> str:
    """As Mistral publishes them."""
    return f"language_model.{name}"


def new_name(name: str) -> str:
    """As newer versions of transformers save them."""
    return name if name.startswith("lm_head") else name.replace("model.", "model.language_model.", 1)


def make(folder: Path, text: dict[str, Any] = TEXT, *, new: bool = False) -> Path:
    """Write a multimodal checkpoint."""
    name = new_name if new else old_name
    weights = {name(text_name): values for text_name, values in text_weights().items()}
    tower = random_weights({f"{'model.' * new}{part}": shape for part, shape in TOWER.items()})
    config = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "text_config": text,
        "vision_config": {"model_type": "pixtral"},
    }
    return write_checkpoint(folder / "Tiny-Mistral", config, {**weights, **tower})


@pytest.mark.parametrize("new", [False, True])
def test_the_text_model_converts(new: bool, tmp_path: Path) -> None:
    source = make(tmp_path, new=new)
    assert prepare(source, "q8_0").notes == (
        f"left out: multi_modal_projector (1 tensor, {HIDDEN * 32 * 2:,} bytes)",
        "left out: vision_tower (1 tensor, 64 bytes)",
    )
    header = check_against_llama_cpp(source, tmp_path, ["q8_0", "q4_k_m"])
    keys, arrays, weights = header.metadata, floats(header), text_weights()
    assert keys["general.architecture"] == "mistral3"
    assert keys["mistral3.rope.freq_base"] == 1e9
    assert keys["mistral3.attention.key_length"] == keys["mistral3.rope.dimension_count"] == HEAD
    assert "mistral3.attention.temperature_scale" not in keys
    assert len(arrays) == len(weights)
    for target, name in {
        "token_embd.weight": "model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
        "blk.1.attn_v.weight": "model.layers.1.self_attn.v_proj.weight",
        "blk.2.ffn_down.weight": "model.layers.2.mlp.down_proj.weight",
    }.items():
        assert np.array_equal(arrays[target], weights[name]), target
    queries = weights["model.layers.0.self_attn.q_proj.weight"].reshape(HEADS, HEAD, HIDDEN)[:, rope_pairs(HEAD)]
    assert np.array_equal(arrays["blk.0.attn_q.weight"], queries.reshape(-1, HIDDEN))
    assert np.isfinite(logits_of(tmp_path / "ours.gguf")).all()


def test_ministral(tmp_path: Path) -> None:
    config = {"architectures": ["Ministral3ForCausalLM"], **MINISTRAL}
    header = check_against_llama_cpp(write_checkpoint(tmp_path / "Tiny", config, text_weights()), tmp_path, ["q4_0"])
    keys = header.metadata
    assert keys["mistral3.rope.scaling.type"] == "yarn"
    assert keys["mistral3.rope.scaling.yarn_log_multiplier"] == 0.75
    assert keys["mistral3.attention.temperature_scale"] == 0.125
    assert np.isfinite(logits_of(tmp_path / "ours.gguf")).all()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ({**TEXT, "model_type": "mistral4"}, "mistral4"),
        ({**MINISTRAL, "rope_parameters": {**YARN, "rope_type": "default"}}, "yarn only"),
        ({**MINISTRAL, "rope_parameters": {**YARN, "mscale_all_dim": None}}, "mscale_all_dim"),
        ({**MINISTRAL, "rope_parameters": {**YARN, "llama_4_scaling_beta": "x"}}, "llama_4_scaling_beta"),
        ({**TEXT, "head_dim": 64}, "language_model.model.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_bad_fields_are_named(text: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said):
        prepare(make(tmp_path, text), "q8_0")
