"""Qwen3.5, dense and with experts."""

from __future__ import annotations

import json
from collections.abc import Callable
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

HIDDEN, WIDTH, HEADS, KEY_HEADS, HEAD, EXPERTS = 256, 64, 4, 2, 64, 6
KINDS = ["linear_attention", "full_attention", "linear_attention"]
KEYS, VALUES, SIZE, KERNEL = 2, 6, 32, 4  # of linear attention
KEY_ROWS, VALUE_ROWS = KEYS * SIZE, VALUES * SIZE
ROWS = 2 * KEY_ROWS + VALUE_ROWS
ORDER = [0, 3, 1, 4, 2, 5]  # of heads of values: first those that come first for each head of keys
TEXT: dict[str, Any] = {
    "model_type": "qwen3_5_text",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": len(KINDS),
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "head_dim": HEAD,
    "layer_types": KINDS,
    "linear_conv_kernel_dim": KERNEL,
    "linear_key_head_dim": SIZE,
    "linear_value_head_dim": SIZE,
    "linear_num_key_heads": KEYS,
    "linear_num_value_heads": VALUES,
    "max_position_embeddings": 512,
    "mtp_num_hidden_layers": 1,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 1e7, "rope_type": "default", "partial_rotary_factor": 0.5},
    "tie_word_embeddings": True,
    "vocab_size": VOCABULARY,
}
DENSE = {**TEXT, "architectures": ["Qwen3_5ForCausalLM"]}
MIXTURE = {
    **{name: value for name, value in TEXT.items() if name != "intermediate_size"},
    "architectures": ["Qwen3_5MoeForCausalLM"],
    "model_type": "qwen3_5_moe_text",
    "moe_intermediate_size": WIDTH,
    "shared_expert_intermediate_size": 128,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}


def shapes(config: dict[str, Any], prefix: str = "model.") -> dict[str, tuple[int, ...]]:
    """Return every stored tensor's shape, those of the MTP layer included."""
    found: dict[str, tuple[int, ...]] = {
        f"{prefix}embed_tokens.weight": (VOCABULARY, HIDDEN),
        f"{prefix}norm.weight": (HIDDEN,),
        "mtp.fc.weight": (HIDDEN, 2 * HIDDEN),
    }
    found |= {f"mtp.{name}.weight": (HIDDEN,) for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (VOCABULARY, HIDDEN)
    layers = [(f"{prefix}layers.{layer}", kind) for layer, kind in enumerate(KINDS)]
    for name, kind in [*layers, ("mtp.layers.0", "full_attention")]:
        parts = linear() if kind == "linear_attention" else full()
        parts |= {f"{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
        if config["model_type"] == "qwen3_5_text":
            parts |= gated("mlp", WIDTH)
        else:
            parts["mlp.gate.weight"] = (EXPERTS, HIDDEN)
            parts["mlp.experts.gate_up_proj"] = (EXPERTS, 2 * WIDTH, HIDDEN)
            parts["mlp.experts.down_proj"] = (EXPERTS, HIDDEN, WIDTH)
            parts["mlp.shared_expert_gate.weight"] = (1, HIDDEN)
            parts |= gated("mlp.shared_expert", 128)
        found |= {f"{name}.{part}": shape for part, shape in parts.items()}
    return found


def linear() -> dict[str, tuple[int, ...]]:
    """Return the shapes of linear attention."""
    matrices = {"in_proj_qkv": ROWS, "in_proj_z": VALUE_ROWS, "in_proj_a": VALUES, "in_proj_b": VALUES}
    return {
        **{f"linear_attn.{name}.weight": (rows, HIDDEN) for name, rows in matrices.items()},
        "linear_attn.A_log": (VALUES,),
        "linear_attn.dt_bias": (VALUES,),
        "linear_attn.conv1d.weight": (ROWS, 1, KERNEL),
        "linear_attn.norm.weight": (SIZE,),
        "linear_attn.out_proj.weight": (HIDDEN, VALUE_ROWS),
    }


def full() -> dict[str, tuple[int, ...]]:
    """Return the shapes of full attention, whose queries come with gates."""
    rows = {"q": 2 * HEADS * HEAD, "k": KEY_HEADS * HEAD, "v": KEY_HEADS * HEAD}
    return {
        **{f"self_attn.{letter}_proj.weight": (count, HIDDEN) for letter, count in rows.items()},
        **{f"self_attn.{letter}_norm.weight": (HEAD,) for letter in "qk"},
        "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD),
    }


def gated(name: str, width: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a gated feed-forward network."""
    wide = {f"{name}.{part}_proj.weight": (width, HIDDEN) for part in ("gate", "up")}
    return {**wide, f"{name}.down_proj.weight": (HIDDEN, width)}


def make(folder: Path, config: dict[str, Any] = DENSE, **fields: Any) -> tuple[Path, Arrays]:
    """Write a checkpoint; return its folder and its weights."""
    weights = random_weights(shapes(config))
    return changed_config(write_checkpoint(folder / "Tiny-Qwen3.5", config, weights), **fields), weights


def reordered(values: NDArray[Any], size: int = SIZE) -> NDArray[Any]:
    """Put heads of values, along the first dimension, into ggml's order."""
    return values.reshape(VALUES, size, -1)[ORDER].reshape(values.shape)


def check_layers(arrays: Arrays, weights: Arrays, prefix: str) -> None:
    """Compare what is changed on its way into the GGUF."""
    stored = {name.removeprefix(f"{prefix}layers.2.linear_attn."): values for name, values in weights.items()}
    qkv, convolution = stored["in_proj_qkv.weight"], stored["conv1d.weight"].reshape(ROWS, KERNEL)
    for name, expected in {
        "attn_qkv.weight": np.concatenate([qkv[: 2 * KEY_ROWS], reordered(qkv[2 * KEY_ROWS :])]),
        "attn_gate.weight": reordered(stored["in_proj_z.weight"]),
        "ssm_alpha.weight": reordered(stored["in_proj_a.weight"], 1),
        "ssm_beta.weight": reordered(stored["in_proj_b.weight"], 1),
        "ssm_conv1d.weight": np.concatenate([convolution[: 2 * KEY_ROWS], reordered(convolution[2 * KEY_ROWS :])]),
        "ssm_out.weight": reordered(stored["out_proj.weight"].T).T,
        "ssm_a": -np.exp(reordered(stored["A_log"], 1).astype(np.float64)).astype(np.float32),
        "ssm_dt.bias": reordered(stored["dt_bias"], 1),
        "ssm_norm.weight": stored["norm.weight"],
    }.items():
        assert np.array_equal(arrays[f"blk.2.{name}"], expected), name
    mtp = f"blk.{len(KINDS)}"
    for name, source in {
        "output_norm.weight": f"{prefix}norm.weight",
        "blk.1.attn_q_norm.weight": f"{prefix}layers.1.self_attn.q_norm.weight",
        "blk.0.post_attention_norm.weight": f"{prefix}layers.0.post_attention_layernorm.weight",
        f"{mtp}.attn_norm.weight": "mtp.layers.0.input_layernorm.weight",
        f"{mtp}.nextn.enorm.weight": "mtp.pre_fc_norm_embedding.weight",
        f"{mtp}.nextn.hnorm.weight": "mtp.pre_fc_norm_hidden.weight",
        f"{mtp}.nextn.shared_head_norm.weight": "mtp.norm.weight",
    }.items():
        assert np.array_equal(arrays[name], weights[source] + 1), name
    assert np.array_equal(arrays[f"{mtp}.nextn.eh_proj.weight"], weights["mtp.fc.weight"])


def test_dense(tmp_path: Path) -> None:
    source, weights = make(tmp_path)
    header = check_against_llama_cpp(source, tmp_path, ["q8_0", "q4_k_m"])
    arrays, keys = floats(header), header.metadata
    check_layers(arrays, weights, "model.")
    assert len(arrays) == len(weights)
    assert (keys["qwen35.block_count"], keys["qwen35.nextn_predict_layers"]) == (4, 1)
    assert keys["qwen35.attention.recurrent_layers"] == [True, False, True, False]
    assert keys["qwen35.rope.dimension_count"] == HEAD // 2
    assert keys["qwen35.rope.dimension_sections"] == [11, 11, 10, 0]
    types = {tensor.name: tensor.type_name for tensor in header.tensors}
    assert [types[f"blk.0.{name}"] for name in ("ssm_conv1d.weight", "ssm_a", "ssm_dt.bias")] == ["f32"] * 3
    assert np.isfinite(logits_of(tmp_path / "ours.gguf")).all()


def test_mixture(tmp_path: Path) -> None:
    source, weights = make(tmp_path, MIXTURE)
    header = check_against_llama_cpp(source, tmp_path, ["q8_0", "q4_k_m"])
    arrays, keys = floats(header), header.metadata
    check_layers(arrays, weights, "model.")
    assert keys["qwen35moe.expert_shared_feed_forward_length"] == 128
    for target, source_name in (("blk.1", "model.layers.1"), ("blk.3", "mtp.layers.0")):
        both = weights[f"{source_name}.mlp.experts.gate_up_proj"]
        assert np.array_equal(arrays[f"{target}.ffn_gate_exps.weight"], both[:, :WIDTH])
        assert np.array_equal(arrays[f"{target}.ffn_up_exps.weight"], both[:, WIDTH:])
    assert np.isfinite(logits_of(tmp_path / "ours.gguf")).all()


def test_of_a_multimodal_checkpoint_the_text_part_converts(tmp_path: Path) -> None:
    prefix = "model.language_model."
    weights = random_weights({**shapes(DENSE, prefix), "model.visual.blocks.0.attn.qkv.weight": (96, 32)})
    config = {"architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": TEXT, "tie_word_embeddings": True}
    source = write_checkpoint(tmp_path / "Tiny-Qwen3.5", config, weights)
    check_layers(floats(check_against_llama_cpp(source, tmp_path, ["q4_0"])), weights, prefix)
    assert any("visual (1 tensor, 6,144 bytes)" in note for note in prepare(source, "q8_0").notes)


def test_as_many_heads_of_values_as_of_keys_keep_their_order(tmp_path: Path) -> None:
    fields = {"linear_num_key_heads": 4, "linear_num_value_heads": 2 * KEYS}
    weights = random_weights(shapes(DENSE))
    for name in list(weights):
        if "linear_attn" in name:
            del weights[name]
    rows = {"in_proj_qkv": 12 * SIZE, "in_proj_z": 4 * SIZE, "in_proj_a": 4, "in_proj_b": 4}
    for layer in (0, 2):
        block = f"model.layers.{layer}.linear_attn"
        changed: dict[str, tuple[int, ...]] = {f"{block}.{name}.weight": (n, HIDDEN) for name, n in rows.items()}
        changed |= {f"{block}.{name}": (4,) for name in ("A_log", "dt_bias")}
        changed |= {f"{block}.conv1d.weight": (12 * SIZE, 1, KERNEL), f"{block}.norm.weight": (SIZE,)}
        weights |= random_weights({**changed, f"{block}.out_proj.weight": (HIDDEN, 4 * SIZE)}, layer)
    source = write_checkpoint(tmp_path / "Tiny-Qwen3.5", {**DENSE, **fields}, weights)
    arrays = floats(check_against_llama_cpp(source, tmp_path, ["q8_0"]))
    for target, name in (("attn_qkv", "in_proj_qkv"), ("attn_gate", "in_proj_z"), ("ssm_out", "out_proj")):
        stored = weights[f"model.layers.0.linear_attn.{name}.weight"]
        assert np.array_equal(arrays[f"blk.0.{target}.weight"], stored), name


def test_layers_that_predict_more_are_only_announced_if_they_are_there(tmp_path: Path) -> None:
    weights = {name: values for name, values in random_weights(shapes(DENSE)).items() if not name.startswith("mtp.")}
    source = write_checkpoint(tmp_path / "Tiny-Qwen3.5", DENSE, weights)
    header = check_against_llama_cpp(source, tmp_path, ["q8_0"])
    assert header.metadata["qwen35.block_count"] == len(KINDS)
    assert "qwen35.nextn_predict_layers" not in header.metadata
    assert any("mtp_num_hidden_layers" in note for note in prepare(source, "q8_0").notes)
    assert np.isfinite(logits_of(tmp_path / "ours.gguf")).all()


def test_they_are_counted_if_config_json_does_not_say(tmp_path: Path) -> None:
    headers = []
    for name, fields in (("stated", {}), ("silent", {"mtp_num_hidden_layers": None})):
        source, _ = make(tmp_path / name, **fields)
        headers.append(check_against_llama_cpp(source, tmp_path / name, []))
    assert headers[0].path.read_bytes() == headers[1].path.read_bytes()


def field(**fields: Any) -> Callable[[Path], Any]:
    return lambda source: changed_config(source, **fields)


def a_far_layer(source: Path) -> None:
    changed_config(source, mtp_num_hidden_layers=None)
    shard = source / "model.safetensors"
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = "mtp.layers.999999999.input_layernorm.weight"
    header = {name if old == "mtp.layers.0.input_layernorm.weight" else old: entry for old, entry in header.items()}
    text = json.dumps(header).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


@pytest.mark.parametrize(
    ("config", "change", "said"),
    [
        (DENSE, field(linear_num_value_heads=5), "linear_num_value_heads .5. is no multiple"),
        (DENSE, field(linear_value_head_dim=64), "llama.cpp needs them equal"),
        (DENSE, field(linear_num_value_heads=1 << 30), "more than 1048576 rows"),
        (DENSE, field(linear_conv_kernel_dim=None), "linear_conv_kernel_dim is missing"),
        (DENSE, field(linear_conv_kernel_dim=3), r"conv1d.weight' has shape \(320, 1, 4\)"),
        (DENSE, field(layer_types=KINDS[:2]), "layer_types must say"),
        (DENSE, field(layer_types=[*KINDS[:2], "mamba"]), "layer_types must say"),
        (DENSE, field(layer_types=[*KINDS[:2], ["x"]]), "layer_types must say"),
        (DENSE, field(mtp_num_hidden_layers=2), "missing: mtp.layers.1.input_layernorm.weight"),
        (DENSE, field(mtp_num_hidden_layers="one"), "mtp_num_hidden_layers is 'one'"),
        (DENSE, field(num_hidden_layers=1 << 30, layer_types=None), "1073741824 layers"),
        (DENSE, a_far_layer, "1000000000 that predict more tokens"),
        (DENSE, field(head_dim=32), "q_proj.weight' has shape"),
        (DENSE, field(rope_parameters={"partial_rotary_factor": 2}), "partial_rotary_factor is 2"),
        (MIXTURE, field(num_experts=5), r"gate.weight' has shape \(6, 256\); config.json asks for \(5, 256\)"),
        (MIXTURE, field(moe_intermediate_size=None), "moe_intermediate_size is missing"),
        (MIXTURE, field(tie_word_embeddings=False, vocab_size=VOCABULARY + 1), "config.json asks for"),
    ],
)
def test_what_is_wrong_is_named(
    config: dict[str, Any], change: Callable[[Path], Any], said: str, tmp_path: Path
) -> None:
    source, _ = make(tmp_path, config)
    change(source)
    with pytest.raises(CheckpointError, match=said):
        prepare(source, "q8_0")
