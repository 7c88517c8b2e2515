"""SmolLM3."""

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
    changed_config,
    check_against_llama_cpp,
    floats,
    llama_shapes,
    logits_of,
    outer_shapes,
    random_weights,
    write_checkpoint,
)

HIDDEN, WIDTH, HEADS, KEY_HEADS, HEAD, LAYERS = 256, 288, 8, 2, 32, 4
CONFIG: dict[str, Any] = {
    "architectures": ["SmolLM3ForCausalLM"],
    "model_type": "smollm3",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "no_rope_layers": [1, 1, 1, 0],
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Return every stored tensor's shape; the embeddings are tied."""
    found = outer_shapes(HIDDEN, tied=True)
    for layer in range(LAYERS):
        found |= llama_shapes(f"model.layers.{layer}", HIDDEN, WIDTH, HEADS * HEAD, KEY_HEADS * HEAD)
    return found


def make(folder: Path, **fields: Any) -> Path:
    """Write a checkpoint."""
    return changed_config(write_checkpoint(folder / "Tiny-SmolLM3", CONFIG, random_weights(shapes())), **fields)


def test_every_byte_is_llama_cpps(tmp_path: Path) -> None:
    header = check_against_llama_cpp(make(tmp_path), tmp_path, ["q8_0", "q4_k_m"])
    keys, weights, arrays = header.metadata, random_weights(shapes()), floats(header)
    assert keys["general.architecture"] == "smollm3"
    assert keys["smollm3.rope.freq_base"] == 2000000.0
    assert keys["smollm3.context_length"] == 32768
    assert keys["smollm3.rope.dimension_count"] == HEAD
    assert "output.weight" not in arrays
    for target, source in {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "blk.3.attn_v.weight": "model.layers.3.self_attn.v_proj.weight",
        "blk.1.attn_output.weight": "model.layers.1.self_attn.o_proj.weight",
        "blk.2.ffn_norm.weight": "model.layers.2.post_attention_layernorm.weight",
        "blk.2.ffn_down.weight": "model.layers.2.mlp.down_proj.weight",
    }.items():
        assert np.array_equal(arrays[target], weights[source]), target
    for letter, heads in (("q", HEADS), ("k", KEY_HEADS)):  # pairs side by side, also where there are no positions
        halves = weights[f"model.layers.3.self_attn.{letter}_proj.weight"].reshape(heads, 2, HEAD // 2, HIDDEN)
        assert np.array_equal(arrays[f"blk.3.attn_{letter}.weight"], halves.swapaxes(1, 2).reshape(-1, HIDDEN))
    assert np.isfinite(logits_of(tmp_path / "ours.gguf")).all()


def test_the_interval_may_stand_for_the_list(tmp_path: Path) -> None:
    stated = prepare(make(tmp_path / "list"), "q8_0").plan
    derived = prepare(make(tmp_path / "interval", no_rope_layers=None, no_rope_layer_interval=4), "q8_0").plan
    assert stated.header == derived.header


def test_an_output_matrix_of_its_own(tmp_path: Path) -> None:
    weights = random_weights(shapes() | {"lm_head.weight": (VOCABULARY, HIDDEN)})
    source = write_checkpoint(tmp_path / "Tiny", {**CONFIG, "tie_word_embeddings": False}, weights)
    quantize(source, "bf16", tmp_path / "out.gguf")
    assert np.array_equal(floats(read_header(tmp_path / "out.gguf"))["output.weight"], weights["lm_head.weight"])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"no_rope_layers": [1, 1, 0, 1]}, "no_rope_layers"),
        ({"no_rope_layers": "1110"}, "no_rope_layers"),
        ({"no_rope_layers": None, "no_rope_layer_interval": 2}, "no_rope_layer_interval"),
        ({"layer_types": ["sliding_attention"] * LAYERS}, "layer_types"),
        ({"layer_types": 4}, "layer_types"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 1e300}}, "impossible rope_scaling"),
        ({"num_hidden_layers": 10**9, "no_rope_layers": None}, "1000000000 layers"),
        ({"tie_word_embeddings": False}, "lm_head.weight"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"intermediate_size": 2 * WIDTH}, "gate_proj.weight"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said):
        prepare(make(tmp_path, **fields), "q8_0")
