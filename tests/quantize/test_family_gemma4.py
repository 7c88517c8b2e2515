"""Gemma 4's text model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.errors import BadInputError, CheckpointError, TokenizerError
from app.llama.model import VocabularyModel
from quantize.pipeline import prepare
from tests.quantize.checkpoints import sentencepiece_model
from tests.quantize.family_files import (
    Arrays,
    changed_config,
    check_against_llama_cpp,
    floats,
    logits_of,
    random_weights,
    write_checkpoint,
)
from tests.quantize.gemma_files import FLAGS, SPACE, TOKENS, tokenizer_files

HIDDEN, HEADS, HEAD, FULL_HEAD, INNER, EXPERTS = 256, 4, 64, 128, 16, 3
VOCABULARY = len(TOKENS)

ROPE = {
    "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
    "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
}
DENSE: dict[str, Any] = {
    "architectures": ["Gemma4ForConditionalGeneration"],
    "model_type": "gemma4",
    "text_config": {
        "vocab_size": VOCABULARY,
        "attention_k_eq_v": False,
        "enable_moe_block": False,
        "final_logit_softcapping": 30.0,
        "global_head_dim": FULL_HEAD,
        "head_dim": HEAD,
        "hidden_size": HIDDEN,
        "hidden_size_per_layer_input": INNER,
        "intermediate_size": 288,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "max_position_embeddings": 4096,
        "moe_intermediate_size": None,
        "num_attention_heads": HEADS,
        "num_experts": None,
        "num_global_key_value_heads": None,
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": ROPE,
        "sliding_window": 64,
        "use_double_wide_mlp": True,
    },
}
MIXTURE: dict[str, Any] = {
    **DENSE["text_config"],
    "architectures": ["Gemma4ForCausalLM"],
    "model_type": "gemma4_text",
    "attention_k_eq_v": True,
    "enable_moe_block": True,
    "hidden_size_per_layer_input": 0,
    "layer_types": ["sliding_attention", "full_attention"],
    "moe_intermediate_size": 256,
    "num_experts": EXPERTS,
    "num_global_key_value_heads": 1,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_kv_shared_layers": 0,
    "top_k_experts": 2,
    "use_double_wide_mlp": False,
}


def weights_of(config: dict[str, Any]) -> Arrays:
    """Return a model's weights, those of the towers too."""
    text = {**config, **config.get("text_config", {})}
    prefix = "model.language_model." if "text_config" in config else "model."
    inner, blocks, experts = text["hidden_size_per_layer_input"], text["num_hidden_layers"], text["num_experts"]
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}embed_tokens.weight": (VOCABULARY, HIDDEN),
        f"{prefix}norm.weight": (HIDDEN,),
    }
    if "text_config" in config:
        shapes["model.vision_tower.encoder.layers.0.norm.weight"] = (8,)
        shapes["model.embed_audio.embedding_projection.weight"] = (HIDDEN, 8)
    if inner:
        shapes[f"{prefix}embed_tokens_per_layer.weight"] = (VOCABULARY, inner * blocks)
        shapes[f"{prefix}per_layer_model_projection.weight"] = (inner * blocks, HIDDEN)
        shapes[f"{prefix}per_layer_projection_norm.weight"] = (inner,)
    for layer, kind in enumerate(text["layer_types"]):
        full, shared = kind == "full_attention", layer >= blocks - text["num_kv_shared_layers"]
        head = FULL_HEAD if full else HEAD
        keys = head * (text["num_global_key_value_heads"] if experts and full else text["num_key_value_heads"])
        width = text["intermediate_size"] * (2 if shared else 1)
        norms = ["input", "post_attention", "pre_feedforward", "post_feedforward"]
        found: dict[str, tuple[int, ...]] = {f"{norm}_layernorm.weight": (HIDDEN,) for norm in norms}
        found |= {"layer_scalar": (1,), "self_attn.q_norm.weight": (head,)}
        found |= {"self_attn.q_proj.weight": (HEADS * head, HIDDEN), "self_attn.o_proj.weight": (HIDDEN, HEADS * head)}
        found |= {"mlp.gate_proj.weight": (width, HIDDEN), "mlp.up_proj.weight": (width, HIDDEN)}
        found["mlp.down_proj.weight"] = (HIDDEN, width)
        if not shared:
            found |= {"self_attn.k_proj.weight": (keys, HIDDEN), "self_attn.k_norm.weight": (head,)}
            found |= {} if experts and full else {"self_attn.v_proj.weight": (keys, HIDDEN)}
        if inner:
            found |= {"per_layer_input_gate.weight": (inner, HIDDEN), "per_layer_projection.weight": (HIDDEN, inner)}
            found["post_per_layer_input_norm.weight"] = (HIDDEN,)
        if experts:
            found |= {"router.proj.weight": (EXPERTS, HIDDEN), "router.scale": (HIDDEN,)}
            found |= {"experts.gate_up_proj": (EXPERTS, 512, HIDDEN), "experts.down_proj": (EXPERTS, HIDDEN, 256)}
            found["router.per_expert_scale"] = (EXPERTS,)
            more = ("pre_feedforward_layernorm_2", "post_feedforward_layernorm_1", "post_feedforward_layernorm_2")
            found |= {f"{norm}.weight": (HIDDEN,) for norm in more}
        shapes |= {f"{prefix}layers.{layer}.{name}": shape for name, shape in found.items()}
    return random_weights(shapes)


def make(folder: Path, config: dict[str, Any], weights: Arrays | None = None) -> Path:
    """Write a checkpoint."""
    source = write_checkpoint(folder / "Tiny-Gemma-4", config, weights_of(config) if weights is None else weights)
    for name, content in tokenizer_files().items():
        (source / name).write_text(json.dumps(content), encoding="utf-8")
    return source


def changed_text(config: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Return a multimodal config with other fields in its text_config."""
    return {**config, "text_config": {**config["text_config"], **fields}}


def test_dense(tmp_path: Path) -> None:
    source = make(tmp_path, DENSE)
    header = check_against_llama_cpp(source, tmp_path, ["q8_0", "q4_k_m"])
    keys, weights, arrays = header.metadata, weights_of(DENSE), floats(header)
    assert keys["gemma4.attention.sliding_window_pattern"] == [True, False, True, False]
    assert keys["gemma4.attention.shared_kv_layers"] == 2
    assert keys["gemma4.feed_forward_length"] == [288, 288, 576, 576]
    assert keys["gemma4.attention.head_count_kv"] == 1
    assert (keys["gemma4.attention.key_length"], keys["gemma4.attention.key_length_swa"]) == (FULL_HEAD, HEAD)
    assert (keys["gemma4.rope.dimension_count"], keys["gemma4.rope.dimension_count_swa"]) == (FULL_HEAD, HEAD)
    assert (keys["gemma4.rope.freq_base"], keys["gemma4.rope.freq_base_swa"]) == (1000000.0, 10000.0)
    prefix = "model.language_model"
    for target, name in {
        "token_embd.weight": "embed_tokens.weight",
        "per_layer_token_embd.weight": "embed_tokens_per_layer.weight",
        "per_layer_model_proj.weight": "per_layer_model_projection.weight",
        "per_layer_proj_norm.weight": "per_layer_projection_norm.weight",
        "blk.1.attn_norm.weight": "layers.1.input_layernorm.weight",
        "blk.1.post_ffw_norm.weight": "layers.1.post_feedforward_layernorm.weight",
        "blk.1.attn_k_norm.weight": "layers.1.self_attn.k_norm.weight",
        "blk.1.attn_v.weight": "layers.1.self_attn.v_proj.weight",
        "blk.1.layer_output_scale.weight": "layers.1.layer_scalar",
        "blk.3.ffn_down.weight": "layers.3.mlp.down_proj.weight",
        "blk.3.inp_gate.weight": "layers.3.per_layer_input_gate.weight",
        "blk.3.proj.weight": "layers.3.per_layer_projection.weight",
        "blk.3.post_norm.weight": "layers.3.post_per_layer_input_norm.weight",
    }.items():
        assert np.array_equal(arrays[target], weights[f"{prefix}.{name}"]), target
    assert "blk.2.attn_k.weight" not in arrays
    factors = arrays["rope_freqs.weight"]
    assert np.array_equal(factors, np.array([1.0] * 16 + [1e30] * 48, np.float32))
    assert np.abs(logits_of(tmp_path / "ours.gguf")).max() <= 30
    assert prepare(source, "q8_0").notes == (
        f"left out: embed_audio (1 tensor, {HIDDEN * 8 * 2:,} bytes)",
        "left out: vision_tower (1 tensor, 16 bytes)",
    )


def test_mixture(tmp_path: Path) -> None:
    header = check_against_llama_cpp(make(tmp_path, MIXTURE), tmp_path, ["q8_0", "q4_k_m"])
    keys, weights, arrays = header.metadata, weights_of(MIXTURE), floats(header)
    assert keys["gemma4.expert_count"] == EXPERTS
    assert keys["gemma4.expert_used_count"] == 2
    assert keys["gemma4.expert_feed_forward_length"] == 256
    assert keys["gemma4.attention.head_count_kv"] == [2, 1]
    assert keys["gemma4.embedding_length_per_layer_input"] == 0
    for target, name in {
        "ffn_gate_up_exps.weight": "experts.gate_up_proj",
        "ffn_down_exps.weight": "experts.down_proj",
        "ffn_down_exps.scale": "router.per_expert_scale",
        "ffn_gate_inp.weight": "router.proj.weight",
        "ffn_gate_inp.scale": "router.scale",
        "pre_ffw_norm_2.weight": "pre_feedforward_layernorm_2.weight",
        "post_ffw_norm_1.weight": "post_feedforward_layernorm_1.weight",
        "post_ffw_norm_2.weight": "post_feedforward_layernorm_2.weight",
    }.items():
        assert np.array_equal(arrays[f"blk.1.{target}"], weights[f"model.layers.1.{name}"]), target
    types = {tensor.name: tensor.type_name for tensor in header.tensors}
    assert types["blk.1.ffn_gate_inp.weight"] == types["blk.1.ffn_down_exps.scale"] == "f32"
    assert "blk.0.attn_v.weight" in arrays
    assert "blk.1.attn_v.weight" not in arrays  # its keys are its values
    assert np.isfinite(logits_of(tmp_path / "ours.gguf")).all()


def test_layers_of_their_own_size_may_be_said_one_by_one(tmp_path: Path) -> None:
    layers = {"1": {"head_dim": FULL_HEAD, "num_key_value_heads": 1}, "0": {"head_dim": HEAD}}
    config = {**MIXTURE, "global_head_dim": None, "num_global_key_value_heads": None}
    make(tmp_path / "one", MIXTURE)
    make(tmp_path / "other", {**config, "per_layer_config": layers}, weights_of(MIXTURE))
    one, other = (prepare(tmp_path / name / "Tiny-Gemma-4", "bf16").plan for name in ("one", "other"))
    assert one.header == other.header


def test_vocabulary(tmp_path: Path) -> None:
    source = make(tmp_path, MIXTURE)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    for text in ("<tool_a>", "<tool_b>", "<unused7>"):
        entry = {"id": TOKENS.index(text), "content": text, "special": text == "<tool_a>", **FLAGS}
        tokenizer["added_tokens"].append(entry)
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    header = check_against_llama_cpp(source, tmp_path, [])
    assert "does not name: 2;" in prepare(source, "q8_0").notes[0]
    keys = header.metadata
    types = dict(zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"], strict=True))
    assert keys["tokenizer.ggml.model"] == "gemma4"
    assert "tokenizer.ggml.pre" not in keys
    kinds = {"<bos>": 3, "<turn|>": 3, "<|channel>": 4, "<|image|>": 3, "the": 1, "<0x41>": 6}
    kinds |= {"<tool_a>": 3, "<tool_b>": 4, "<unused7>": 1}
    assert {text: types[text] for text in kinds} == kinds
    assert keys["tokenizer.ggml.merges"][1] == f"{SPACE} th"
    assert keys["tokenizer.ggml.add_space_prefix"] is False
    with VocabularyModel(tmp_path / "bf16.gguf") as model:
        found = model.vocabulary.tokenize("the  the\n\né")
    pieces = ["the", SPACE, f"{SPACE}th", "e", "\n\n", "<0xC3>", "<0xA9>"]  # the merges' order decides
    assert [TOKENS[token] for token in found] == pieces


def test_suppressed_tokens(tmp_path: Path) -> None:
    source = make(tmp_path, {**DENSE, "architectures": ["Gemma4UnifiedForConditionalGeneration"]})
    (source / "generation_config.json").write_text('{"suppress_tokens": [5, 7]}')
    header = check_against_llama_cpp(source, tmp_path, ["q8_0"])
    assert header.metadata["tokenizer.ggml.suppress_tokens"] == [5, 7]
    (source / "generation_config.json").write_text('{"suppress_tokens": ["<pad>"]}')
    with pytest.raises(CheckpointError, match="suppress_tokens"):
        prepare(source, "q8_0")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_types": None}, "layer_types is missing"),
        ({"layer_types": ["sliding_attention"] * 4}, "no layer has full attention"),
        ({"global_head_dim": None}, "global_head_dim is missing"),
        ({"global_head_dim": 64}, "has shape"),
        ({"num_kv_shared_layers": 4}, "num_kv_shared_layers is 4 of 4"),
        ({"num_kv_shared_layers": -1}, "num_kv_shared_layers is -1"),
        ({"num_kv_shared_layers": 1}, "tensors are missing"),
        ({"num_key_value_heads": 3}, "no multiple of 3 key heads"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ({"rope_parameters": ROPE["sliding_attention"]}, "rope_type is proportional"),
        ({"rope_parameters": {**ROPE, "full_attention": 5}}, "rope of full_attention is 5"),
        ({"rope_parameters": {**ROPE, "sliding_attention": ["x"]}}, "rope of sliding_attention"),
        ({"rope_parameters": {**ROPE, "full_attention": {"rope_type": "proportional"}}}, "partial_rotary_factor"),
        ({"per_layer_config": {"1": 5}}, "per_layer_config"),
        ({"per_layer_config": {"1": {"head_dim": "x"}}}, "head_dim of layer 1"),
        ({"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}, "moe_intermediate_size is missing"),
    ],
)
def test_bad_config(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = make(tmp_path, DENSE)
    changed_config(source, text_config=changed_text(DENSE, **fields)["text_config"])
    with pytest.raises(CheckpointError, match=message):
        prepare(source, "q8_0")


def test_rotary_factor_beyond_the_head(tmp_path: Path) -> None:
    rope = {**ROPE, "full_attention": {**ROPE["full_attention"], "partial_rotary_factor": 1.5}}
    with pytest.raises(CheckpointError, match="partial_rotary_factor"):
        prepare(make(tmp_path, changed_text(DENSE, rope_parameters=rope)), "q8_0")


def test_another_kind_of_tokenizer_is_refused(tmp_path: Path) -> None:
    source = make(tmp_path, MIXTURE)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["model"]["byte_fallback"] = False
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(TokenizerError, match="byte_fallback"):
        prepare(source, "q8_0")
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.model").write_bytes(sentencepiece_model())
    with pytest.raises(BadInputError, match=r"tokenizer\.json"):
        prepare(source, "q8_0")
