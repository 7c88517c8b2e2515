"""Mixtral."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.errors import CheckpointError
from quantize.pipeline import prepare
from quantize.tensors import rope_pairs
from tests.quantize.family_files import (
    Arrays,
    attention_shapes,
    changed_config,
    check_against_llama_cpp,
    floats,
    logits_of,
    outer_shapes,
    random_weights,
    write_checkpoint,
)

HIDDEN, WIDTH, HEADS, HEAD, KEY_HEADS, LAYERS, EXPERTS = 256, 64, 8, 32, 2, 2, 11
CONFIG: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 3,
    "tie_word_embeddings": False,
}
STACKS = {"gate": ("w1", (WIDTH, HIDDEN)), "down": ("w2", (HIDDEN, WIDTH)), "up": ("w3", (WIDTH, HIDDEN))}


def shapes() -> dict[str, tuple[int, ...]]:
    """Return every stored tensor's shape."""
    found = outer_shapes(HIDDEN, tied=False)
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        found |= {f"{block}.{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
        found |= attention_shapes(block, HIDDEN, HIDDEN, KEY_HEADS * HEAD)
        found[f"{block}.block_sparse_moe.gate.weight"] = (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            for name, shape in STACKS.values():
                found[f"{block}.block_sparse_moe.experts.{expert}.{name}.weight"] = shape
    return found


def make(folder: Path, **fields: Any) -> tuple[Path, Arrays]:
    """Write a checkpoint; return its folder and its weights."""
    weights = random_weights(shapes())
    return changed_config(write_checkpoint(folder / "Tiny-Mixtral", CONFIG, weights), **fields), weights


def test_every_byte_is_llama_cpps(tmp_path: Path) -> None:
    source, weights = make(tmp_path)
    header = check_against_llama_cpp(source, tmp_path, ["q4_0", "q4_k_m"])
    arrays, keys = floats(header), header.metadata
    assert keys["general.architecture"] == "llama"
    assert (keys["llama.expert_count"], keys["llama.expert_used_count"]) == (EXPERTS, 3)
    with_one = sum(array.size // (EXPERTS if "_exps." in name else 1) for name, array in arrays.items())
    assert keys["general.size_label"] == f"{EXPERTS}x{with_one / 1000:.0f}K"
    for stack, (name, _) in STACKS.items():
        for layer in range(LAYERS):
            mixture = f"model.layers.{layer}.block_sparse_moe.experts"
            experts = [weights[f"{mixture}.{expert}.{name}.weight"] for expert in range(EXPERTS)]
            assert np.array_equal(arrays[f"blk.{layer}.ffn_{stack}_exps.weight"], np.stack(experts))
    router = next(tensor for tensor in header.tensors if tensor.name == "blk.1.ffn_gate_inp.weight")
    assert router.type_name == "f32"
    queries = weights["model.layers.0.self_attn.q_proj.weight"].reshape(HEADS, HEAD, HIDDEN)[:, rope_pairs(HEAD)]
    assert np.array_equal(arrays["blk.0.attn_q.weight"], queries.reshape(HIDDEN, HIDDEN))
    assert np.isfinite(logits_of(tmp_path / "ours.gguf")).all()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_local_experts": 12}, "missing: model.layers.0.block_sparse_moe.experts.11.w1.weight"),
        ({"num_local_experts": 10}, "does not have: model.layers.0.block_sparse_moe.experts.10.w1.weight"),
        ({"num_local_experts": 1 << 30}, "num_local_experts is 1073741824; llama.cpp takes at most 1024"),
        ({"num_local_experts": 0}, "num_local_experts is 0"),
        ({"num_experts_per_tok": 12}, "experts that cannot be: num_local_experts 11, num_experts_per_tok 12"),
        ({"num_experts_per_tok": 0}, "experts that cannot be"),
        ({"n_group": 11}, "experts that cannot be: .*n_group 11"),
        ({"n_group": 2, "topk_group": 1}, "experts that cannot be: .*n_group 2"),
        ({"intermediate_size": 512}, r"w1.weight' has shape \(64, 256\); config.json asks for \(512, 256\)"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    source, _ = make(tmp_path, **fields)
    with pytest.raises(CheckpointError, match=said):
        prepare(source, "q8_0")
