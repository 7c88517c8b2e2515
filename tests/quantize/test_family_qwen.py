"""Qwen2 and Qwen3, and the embedding models and rerankers made of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.errors import CheckpointError, PestleError, TokenizerError
from quantize.pipeline import prepare
from tests.quantize.family_files import (
    FILES,
    Arrays,
    changed_config,
    check_against_llama_cpp,
    floats,
    llama_shapes,
    logits_of,
    outer_shapes,
    random_weights,
    write_checkpoint,
)

HIDDEN, WIDTH, HEADS, KEY_HEADS, LAYERS = 256, 192, 8, 2, 2
QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "tie_word_embeddings": True,
}
QWEN3 = {**QWEN2, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 64}


def shapes(config: dict[str, Any], prefix: str = "model.") -> dict[str, tuple[int, ...]]:
    """Return every stored tensor's shape; the head of an untied model is included."""
    qwen3 = config["model_type"] == "qwen3"
    head = config.get("head_dim", 128 if qwen3 else HIDDEN // HEADS)
    found = outer_shapes(HIDDEN, tied=config["tie_word_embeddings"], prefix=prefix)
    queries, keys = HEADS * head, KEY_HEADS * head
    for layer in range(LAYERS):
        block = f"{prefix}layers.{layer}"
        found |= llama_shapes(block, HIDDEN, WIDTH, queries, keys)
        if qwen3:
            found |= {f"{block}.self_attn.{letter}_norm.weight": (head,) for letter in "qk"}
        else:
            rows = (("q", queries), ("k", keys), ("v", keys))
            found |= {f"{block}.self_attn.{letter}_proj.bias": (count,) for letter, count in rows}
    return found


def make(folder: Path, config: dict[str, Any], **fields: Any) -> tuple[Path, Arrays]:
    """Write a checkpoint; return its folder and its weights."""
    weights = random_weights(shapes(config))
    return changed_config(write_checkpoint(folder / "Tiny-Qwen", config, weights), **fields), weights


@pytest.mark.parametrize("tied", [True, False])
def test_qwen2(tied: bool, tmp_path: Path) -> None:
    source, weights = make(tmp_path, {**QWEN2, "tie_word_embeddings": tied})
    header = check_against_llama_cpp(source, tmp_path, ["q8_0", "q4_k_m"])
    arrays, keys = floats(header), header.metadata
    assert keys["qwen2.context_length"] == 32768  # what the config class fills in
    assert keys["qwen2.rope.freq_base"] == 10000.0
    assert ("output.weight" in arrays) is not tied
    for target, stored in {
        "blk.1.attn_q.weight": "model.layers.1.self_attn.q_proj.weight",
        "blk.1.attn_k.bias": "model.layers.1.self_attn.k_proj.bias",
        "blk.0.attn_output.weight": "model.layers.0.self_attn.o_proj.weight",
        "blk.0.ffn_norm.weight": "model.layers.0.post_attention_layernorm.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
    }.items():
        assert np.array_equal(arrays[target], weights[stored]), target
    assert len(arrays) == len(weights)
    assert np.isfinite(logits_of(tmp_path / "ours.gguf")).all()


@pytest.mark.parametrize("tied", [True, False])
def test_qwen3(tied: bool, tmp_path: Path) -> None:
    source, weights = make(tmp_path, {**QWEN3, "tie_word_embeddings": tied})
    header = check_against_llama_cpp(source, tmp_path, ["q8_0", "q4_k_m"])
    arrays, keys = floats(header), header.metadata
    assert keys["qwen3.attention.key_length"] == keys["qwen3.attention.value_length"] == 64
    assert arrays["blk.0.attn_q.weight"].shape == (HEADS * 64, HIDDEN)
    assert np.array_equal(arrays["blk.1.attn_k_norm.weight"], weights["model.layers.1.self_attn.k_norm.weight"])
    assert len(arrays) == len(weights)
    assert np.isfinite(logits_of(tmp_path / "ours.gguf")).all()


def test_silence_and_null_are_not_the_same_to_the_config_class(tmp_path: Path) -> None:
    silent, _ = make(tmp_path / "silent", {name: value for name, value in QWEN3.items() if name != "head_dim"})
    null, _ = make(tmp_path / "null", {**QWEN3, "head_dim": HIDDEN // HEADS})
    config = json.loads((null / "config.json").read_text()) | {"head_dim": None}
    (null / "config.json").write_text(json.dumps(config))
    headers = [check_against_llama_cpp(source, source.parent, []) for source in (silent, null)]
    assert [header.metadata.get("qwen3.attention.key_length") for header in headers] == [128, None]


def test_yarn(tmp_path: Path) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    source, _ = make(tmp_path, QWEN2, rope_scaling=scaling)
    keys = check_against_llama_cpp(source, tmp_path, ["q8_0"]).metadata
    assert keys["qwen2.rope.scaling.type"] == "yarn"
    assert keys["qwen2.rope.scaling.original_context_length"] == 32768


@pytest.mark.parametrize(("config", "prefix"), [(QWEN2, "model."), (QWEN3, "")])
def test_embedding_models(config: dict[str, Any], prefix: str, tmp_path: Path) -> None:
    weights = random_weights(shapes({**config, "tie_word_embeddings": True}, prefix))
    source = write_checkpoint(tmp_path / "Tiny-Embedding", {**config, "tie_word_embeddings": not prefix}, weights)
    changed_config(source, architectures=["Qwen2Model" if prefix else "Qwen3ForCausalLM"], tie_word_embeddings=True)
    modules = [{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_lasttoken": True}))
    header = check_against_llama_cpp(source, tmp_path, ["q8_0"])
    assert header.metadata[f"{header.metadata['general.architecture']}.pooling_type"] == 3
    assert np.array_equal(floats(header)["output_norm.weight"], weights[f"{prefix}norm.weight"])


@pytest.mark.parametrize("tied", [True, False])
def test_rerankers_keep_two_rows_of_their_head(tied: bool, tmp_path: Path) -> None:
    source, weights = make(tmp_path, {**QWEN3, "tie_word_embeddings": tied})
    tokenizer = json.loads(json.dumps(FILES["tokenizer.json"]))
    words = {"yes": tokenizer["model"]["vocab"].pop("th"), "no": tokenizer["model"]["vocab"].pop("he")}
    tokenizer["model"]["vocab"] |= words
    tokenizer["model"]["merges"] = ["i n"]
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    (source / "README.md").write_text("# Qwen3-Reranker-Tiny\n")
    header = check_against_llama_cpp(source, tmp_path, ["q8_0"])
    arrays, keys = floats(header), header.metadata
    head = weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
    assert np.array_equal(arrays["cls.output.weight"], head[[words["yes"], words["no"]]])
    assert "output.weight" not in arrays
    assert "token_embd.weight" in arrays
    assert keys["qwen3.pooling_type"] == 4
    assert keys["qwen3.classifier.output_labels"] == ["yes", "no"]
    assert "{document}" in keys["tokenizer.chat_template.rerank"]


def no_words(source: Path) -> None:
    (source / "README.md").write_text("# Qwen3-Reranker-Tiny\n")


def field(**fields: Any) -> Callable[[Path], Any]:
    return lambda source: changed_config(source, **fields)


@pytest.mark.parametrize(
    ("config", "change", "kind", "said"),
    [
        (QWEN2, field(num_key_value_heads=3), CheckpointError, "num_key_value_heads"),
        (QWEN2, field(num_attention_heads=6), CheckpointError, "6 heads of 42 do not make up hidden_size"),
        (QWEN2, field(num_hidden_layers=3), CheckpointError, "missing: model.layers.2.input_layernorm.weight"),
        (QWEN2, field(num_hidden_layers=1 << 30), CheckpointError, "1073741824 layers"),
        (QWEN2, field(tie_word_embeddings=False), CheckpointError, "missing: lm_head.weight"),
        (QWEN2, field(rms_norm_eps="small"), CheckpointError, "rms_norm_eps"),
        (QWEN3, field(head_dim=63), CheckpointError, "head size 63 is odd"),
        (QWEN3, field(head_dim=32), CheckpointError, "q_proj.weight' has shape"),
        (QWEN3, field(attention_bias=True), CheckpointError, "missing: model.layers.0.self_attn.q_proj.bias"),
        (QWEN3, field(num_experts_per_tok=2), CheckpointError, "experts that cannot be: num_experts_per_tok 2"),
        (QWEN3, no_words, TokenizerError, "words yes and no"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(
    config: dict[str, Any], change: Callable[[Path], Any], kind: type[PestleError], said: str, tmp_path: Path
) -> None:
    source, _ = make(tmp_path, config)
    change(source)
    with pytest.raises(kind, match=said):
        prepare(source, "q8_0")
