"""Gemma 2, Gemma 3 and EmbeddingGemma."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from app.errors import BadInputError, CheckpointError, TokenizerError
from app.llama.model import VocabularyModel
from app.models.gguf import Header
from quantize.cli import main
from quantize.pipeline import prepare
from tests.quantize.checkpoints import vocabulary_size
from tests.quantize.family_files import (
    Arrays,
    changed_config,
    check_against_llama_cpp,
    floats,
    logits_of,
    random_weights,
    write_checkpoint,
)
from tests.quantize.gemma_files import FLAGS, SPACE, TOKENS, sentencepiece_files, tokenizer_files

TOKENIZER = sentencepiece_files()
VOCABULARY = vocabulary_size(TOKENIZER)
HIDDEN, WIDTH, HEADS, KEY_HEADS, HEAD = 256, 480, 4, 2, 96
GEMMA2: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "head_dim": HEAD,
    "query_pre_attn_scalar": HEAD,
    "sliding_window": 128,
}
GEMMA3 = {**GEMMA2, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
EMBEDDING = {**GEMMA3, "architectures": ["Gemma3TextModel"], "use_bidirectional_attention": True}
IMAGES = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": {
        name: GEMMA3[name]
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "sliding_window")
    }
    | {"model_type": "gemma3_text", "vocab_size": VOCABULARY, "num_key_value_heads": 1, "eos_token_id": 2},
    "vision_config": {"hidden_size": 32},
}


def weights_of(config: dict[str, Any], prefix: str = "model.") -> Arrays:
    """Return a model's weights."""
    text = {**config, **config.get("text_config", {})}
    head = text.get("head_dim", 256)
    keys, hidden = head * text["num_key_value_heads"], (HIDDEN,)
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}embed_tokens.weight": (VOCABULARY, HIDDEN)}
    shapes[f"{prefix}norm.weight"] = hidden
    for layer in range(text["num_hidden_layers"]):
        name = f"{prefix}layers.{layer}"
        norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
        shapes |= {f"{name}.{norm}_layernorm.weight": hidden for norm in norms}
        shapes |= {f"{name}.self_attn.{letter}_proj.weight": (keys, HIDDEN) for letter in "kv"}
        shapes[f"{name}.self_attn.q_proj.weight"] = (HEADS * head, HIDDEN)
        shapes[f"{name}.self_attn.o_proj.weight"] = (HIDDEN, HEADS * head)
        shapes |= {f"{name}.mlp.{matrix}_proj.weight": (WIDTH, HIDDEN) for matrix in ("gate", "up")}
        shapes[f"{name}.mlp.down_proj.weight"] = (HIDDEN, WIDTH)
        if text["model_type"] != "gemma2":
            shapes |= {f"{name}.self_attn.{letter}_norm.weight": (head,) for letter in "qk"}
    return random_weights(shapes)


def make(folder: Path, config: dict[str, Any], weights: Arrays | None = None, **fields: Any) -> Path:
    """Write a checkpoint with a SentencePiece vocabulary."""
    source = write_checkpoint(folder / "Tiny-Gemma", config, weights if weights is not None else weights_of(config))
    (source / "tokenizer.json").unlink()
    for name, content in TOKENIZER.items():
        (source / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return changed_config(source, **fields)


def check_tensors(header: Header, weights: Arrays, prefix: str) -> None:
    """Check names, shapes and values of the tensors of a layer, and of those outside."""
    arrays, layer = floats(header), f"{prefix}layers.1"
    for target, source in {
        "token_embd": f"{prefix}embed_tokens",
        "blk.1.attn_q": f"{layer}.self_attn.q_proj",
        "blk.1.attn_k": f"{layer}.self_attn.k_proj",
        "blk.1.attn_v": f"{layer}.self_attn.v_proj",
        "blk.1.attn_output": f"{layer}.self_attn.o_proj",
        "blk.1.ffn_gate": f"{layer}.mlp.gate_proj",
        "blk.1.ffn_up": f"{layer}.mlp.up_proj",
        "blk.1.ffn_down": f"{layer}.mlp.down_proj",
    }.items():
        assert np.array_equal(arrays.pop(f"{target}.weight"), weights[f"{source}.weight"]), target
    norms = {
        "output_norm": f"{prefix}norm",
        "blk.1.attn_norm": f"{layer}.input_layernorm",
        "blk.1.post_attention_norm": f"{layer}.post_attention_layernorm",
        "blk.1.ffn_norm": f"{layer}.pre_feedforward_layernorm",
        "blk.1.post_ffw_norm": f"{layer}.post_feedforward_layernorm",
        "blk.1.attn_q_norm": f"{layer}.self_attn.q_norm",
        "blk.1.attn_k_norm": f"{layer}.self_attn.k_norm",
    }
    for target, source in norms.items():
        if f"{source}.weight" in weights:
            assert np.array_equal(arrays.pop(f"{target}.weight"), weights[f"{source}.weight"] + np.float32(1)), target
    assert all(name.startswith("blk.0.") for name in arrays)


def test_gemma2(tmp_path: Path) -> None:
    weights = weights_of(GEMMA2)
    source = make(tmp_path, GEMMA2, {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})
    header = check_against_llama_cpp(source, tmp_path, ["q8_0", "q4_k_m"])
    check_tensors(header, weights, "model.")
    keys = header.metadata
    assert keys["gemma2.attn_logit_softcapping"] == 50.0
    assert keys["gemma2.final_logit_softcapping"] == 30.0
    assert keys["gemma2.attention.sliding_window"] == 128
    assert keys["gemma2.attention.key_length"] == HEAD
    assert keys["gemma2.context_length"] == 8192  # transformers' default
    assert keys["tokenizer.ggml.add_space_prefix"] is False
    assert "gemma2.rope.freq_base" not in keys
    assert np.abs(logits_of(tmp_path / "ours.gguf")).max() <= 30
    assert prepare(source, "q8_0").notes == (f"left out: lm_head (1 tensor, {VOCABULARY * HIDDEN * 2:,} bytes)",)


def test_gemma3(tmp_path: Path) -> None:
    source = make(tmp_path, GEMMA3, rope_scaling={"factor": 8.0, "rope_type": "linear"})
    header = check_against_llama_cpp(source, tmp_path, ["q8_0", "q4_k_m"])
    check_tensors(header, weights_of(GEMMA3), "model.")
    keys = header.metadata
    assert keys["gemma3.rope.freq_base"] == 1000000.0
    assert keys["gemma3.rope.freq_base_swa"] == 10000.0
    assert keys["gemma3.rope.scaling.factor"] == 8.0
    assert keys["gemma3.attention.sliding_window"] == 128
    assert "gemma3.attention.sliding_window_pattern" not in keys
    assert np.isfinite(logits_of(tmp_path / "ours.gguf")).all()
    assert prepare(source, "q8_0").notes == ()


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_text_model_of_a_multimodal_one(prefix: str, tmp_path: Path) -> None:
    text = weights_of(IMAGES, prefix)
    other = random_weights(
        {
            "vision_tower.vision_model.encoder.layers.0.layer_norm1.weight": (32,),
            "vision_tower.vision_model.embeddings.position_embedding.weight": (4, 32),
            "multi_modal_projector.mm_input_projection_weight": (32, HIDDEN),
        }
    )
    if prefix == "model.language_model.":
        other = {f"model.{name}": values for name, values in other.items()}
    source = make(tmp_path, IMAGES, text | other)
    assert prepare(source, "q4_0").notes == (
        f"left out: multi_modal_projector (1 tensor, {2 * 32 * HIDDEN:,} bytes)",
        "left out: vision_tower (2 tensors, 320 bytes)",
    )
    header = check_against_llama_cpp(source, tmp_path, ["q4_0"])
    check_tensors(header, text, prefix)
    keys = header.metadata
    assert keys["gemma3.context_length"] == 131072  # text_config is silent about it
    assert keys["gemma3.attention.key_length"] == 256
    assert keys["gemma3.attention.head_count_kv"] == 1
    assert keys["tokenizer.ggml.eos_token_id"] == 2


def test_what_is_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = random_weights({"vision_tower.vision_model.post_layernorm.weight": (32,)})
    source = make(tmp_path, IMAGES, weights_of(IMAGES, "language_model.model.") | other)
    arguments = [str(source), "--type", "q8_0", "--dry-run", "--out", str(tmp_path / "out.gguf")]
    line = "left out: vision_tower (1 tensor, 64 bytes)"
    assert main(arguments) == 0
    assert f"note: {line}\n" in capsys.readouterr().err
    assert main([*arguments, "--format", "json"]) == 0
    assert {"event": "note", "message": line} in map(json.loads, capsys.readouterr().out.splitlines())
    assert main([*arguments, "--format", "quiet", "--no-measure"]) == 0
    assert capsys.readouterr().err == ""


def test_embedding_gemma(tmp_path: Path) -> None:
    source = make(tmp_path, EMBEDDING, weights_of(EMBEDDING, ""))
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    modules = [{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    dense = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (source / "modules.json").write_text(json.dumps([*modules, dense]))
    header = check_against_llama_cpp(source, tmp_path, ["q8_0", "q4_k_m"])
    check_tensors(header, weights_of(EMBEDDING, ""), "")
    keys = header.metadata
    assert keys["general.architecture"] == "gemma-embedding"
    assert keys["gemma-embedding.pooling_type"] == 1
    assert keys["gemma-embedding.attention.sliding_window"] == 128
    assert prepare(source, "q8_0").notes == (
        "left out: 2_Dense (sentence-transformers' layer after the pooling, which upstream leaves out by default)",
    )


def test_other_patterns_of_layers_are_written(tmp_path: Path) -> None:
    source = make(tmp_path, GEMMA3, layer_types=["full_attention", "sliding_attention"])
    header = check_against_llama_cpp(source, tmp_path, ["q8_0"])
    assert header.metadata["gemma3.attention.sliding_window_pattern"] == [False, True]
    assert "upstream's converter leaves out" in prepare(source, "q8_0").notes[0]
    assert np.isfinite(logits_of(tmp_path / "ours.gguf")).all()


def test_without_any_window(tmp_path: Path) -> None:
    prepared = prepare(make(tmp_path, GEMMA3, sliding_window_pattern=1), "q8_0")
    assert b"sliding_window" not in prepared.plan.header
    assert prepared.notes == ()


def test_other_rope_and_scale(tmp_path: Path) -> None:
    source = make(tmp_path, GEMMA2, rope_theta=20000.0, query_pre_attn_scalar=64)
    header = check_against_llama_cpp(source, tmp_path, ["q8_0"])
    assert header.metadata["gemma2.rope.freq_base"] == 20000.0
    theta, scale = prepare(source, "q8_0").notes
    assert "rope_theta is 20000" in theta
    assert "query_pre_attn_scalar is 64" in scale


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (GEMMA2, {"attention_heads": 3, "num_attention_heads": 3}, "num_attention_heads .3. is no multiple"),
        (GEMMA2, {"num_hidden_layers": 3}, "tensors are missing: model.layers.2.input_layernorm"),
        (GEMMA2, {"num_hidden_layers": 600}, "600 layers"),
        (GEMMA2, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope scaling 'yarn'"),
        (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA3, {"layer_types": ["sliding_attention"]}, "layer_types"),
        (GEMMA3, {"layer_types": ["sliding_attention", ["full_attention"]]}, "layer_types"),
        (GEMMA3, {"head_dim": 64}, "has shape"),
        (GEMMA3, {"tie_word_embeddings": False}, "lm_head.weight"),
        (EMBEDDING, {"sliding_window": None}, "sliding_window is missing"),
    ],
)
def test_bad_config(config: dict[str, Any], fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    prefix = "" if config is EMBEDDING else "model."
    with pytest.raises(CheckpointError, match=message):
        prepare(make(tmp_path, config, weights_of(config, prefix), **fields), "q8_0")


def test_explicit_null_is_no_default(tmp_path: Path) -> None:
    source = make(tmp_path, GEMMA2)
    (source / "config.json").write_text(json.dumps({**GEMMA2, "attn_logit_softcapping": None}))
    with pytest.raises(CheckpointError, match="attn_logit_softcapping is null"):
        prepare(source, "q8_0")


@pytest.mark.parametrize("config", [GEMMA2, GEMMA3], ids=["gemma2", "gemma3"])
def test_some_tokenizer_is_needed(config: dict[str, Any], tmp_path: Path) -> None:
    source = make(tmp_path, config)
    (source / "tokenizer.model").unlink()
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        prepare(source, "q8_0")


def test_without_tokenizer_model(tmp_path: Path) -> None:
    source = make(tmp_path, GEMMA3)
    (source / "tokenizer.model").unlink()
    files = tokenizer_files()
    files["tokenizer.json"]["added_tokens"].append({"id": len(TOKENS), "content": "<tool>", "special": False} | FLAGS)
    for name, content in files.items():
        (source / name).write_text(json.dumps(content), encoding="utf-8")
    header = check_against_llama_cpp(source, tmp_path, [])
    keys = header.metadata
    types = dict(zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"], strict=True))
    kinds = {"<bos>": 3, "<|image|>": 3, "<tool>": 4, "the": 1, "<0x41>": 6, f"[PAD{VOCABULARY - 1}]": 5}
    assert {text: types[text] for text in kinds} == kinds
    assert "upstream's converter refuses" in prepare(source, "q8_0").notes[0]
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    with VocabularyModel(tmp_path / "bf16.gguf") as model:
        for text in ("the  the", "a <tool>\n\n the", "é日本🙂", f"{SPACE}the "):
            expected = tokenizer.encode(text, add_special_tokens=False).ids
            assert model.vocabulary.tokenize(text).tolist() == expected, text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": {"type": "NFC"}}, "normalizer turns spaces"),
        ({"added_tokens": [{"id": 9999, "content": "<far>", "special": True}]}, "leaves room for"),
        ({"added_tokens": [7]}, "damaged"),
    ],
)
def test_bad_tokenizer_json(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = make(tmp_path, GEMMA3)
    (source / "tokenizer.model").unlink()
    (source / "tokenizer.json").write_text(json.dumps(tokenizer_files()["tokenizer.json"] | change))
    with pytest.raises(TokenizerError, match=message):
        prepare(source, "q8_0")


def test_byte_level_vocabulary(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "Tiny-Gemma", GEMMA3, weights_of(GEMMA3))
    header = check_against_llama_cpp(source, tmp_path, [])
    assert header.metadata["tokenizer.ggml.model"] == "gpt2"


def test_unknown_tensors_are_not_left_out_silently(tmp_path: Path) -> None:
    weights = weights_of(GEMMA3) | random_weights({"audio_tower.norm.weight": (8,)})
    with pytest.raises(BadInputError, match=r"audio_tower\.norm\.weight"):
        prepare(make(tmp_path, GEMMA3, weights), "q8_0")
