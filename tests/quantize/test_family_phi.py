"""Phi-3 and Phi-4: fused matrices, LongRoPE, and a vocabulary whose added tokens three files name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.errors import CheckpointError, TokenizerError
from app.llama.model import VocabularyModel
from quantize.pipeline import prepare, quantize
from tests.quantize.checkpoints import sentencepiece_files, vocabulary_size
from tests.quantize.family_files import (
    VOCABULARY,
    changed_config,
    check_against_llama_cpp,
    floats,
    logits_of,
    random_weights,
    write_checkpoint,
)

HIDDEN, WIDTH, HEADS, KEY_HEADS, HEAD, LAYERS = 256, 288, 8, 2, 32, 2
PAIRS = 12  # three quarters of a head
CONFIG: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
}
LONG: dict[str, Any] = {
    "max_position_embeddings": 131072,
    "partial_rotary_factor": 0.75,
    "rope_scaling": {
        "type": "longrope",
        "long_factor": [1.0 + 3.3 * pair for pair in range(PAIRS)],
        "short_factor": [1] * PAIRS,
    },
}
NAMES = {  # in the GGUF → in the checkpoint, with its shape
    "attn_norm": ("input_layernorm", (HIDDEN,)),
    "attn_qkv": ("self_attn.qkv_proj", ((HEADS + 2 * KEY_HEADS) * HEAD, HIDDEN)),
    "attn_output": ("self_attn.o_proj", (HIDDEN, HIDDEN)),
    "ffn_norm": ("post_attention_layernorm", (HIDDEN,)),
    "ffn_up": ("mlp.gate_up_proj", (2 * WIDTH, HIDDEN)),
    "ffn_down": ("mlp.down_proj", (HIDDEN, WIDTH)),
}


def shapes(vocabulary: int = VOCABULARY) -> dict[str, tuple[int, ...]]:
    """Return every stored tensor's shape."""
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (vocabulary, HIDDEN),
    }
    for layer in range(LAYERS):
        found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in NAMES.values()}
    return found


def make(folder: Path, **fields: Any) -> Path:
    """Write a checkpoint with a byte-level vocabulary, as Phi-4 has."""
    return changed_config(write_checkpoint(folder / "Tiny-Phi", CONFIG, random_weights(shapes())), **fields)


def test_fused_matrices_stay_whole(tmp_path: Path) -> None:
    header = check_against_llama_cpp(make(tmp_path, sliding_window=2047), tmp_path, ["q8_0", "q4_k_m"])
    keys, weights, arrays = header.metadata, random_weights(shapes()), floats(header)
    assert keys["phi3.attention.sliding_window"] == 2047
    assert keys["phi3.rope.dimension_count"] == HEAD
    assert keys["phi3.rope.scaling.original_context_length"] == keys["phi3.context_length"] == 4096
    assert "phi3.rope.scaling.attn_factor" not in keys
    for target, (source, _) in NAMES.items():
        assert np.array_equal(arrays[f"blk.1.{target}.weight"], weights[f"model.layers.1.{source}.weight"]), target
    assert np.array_equal(arrays["output.weight"], weights["lm_head.weight"])
    assert not [name for name in arrays if name.startswith("rope_factors")]
    assert np.isfinite(logits_of(tmp_path / "ours.gguf")).all()


def test_longrope(tmp_path: Path) -> None:
    header = check_against_llama_cpp(make(tmp_path, **LONG), tmp_path, ["q8_0", "q4_0"])
    keys, arrays = header.metadata, floats(header)
    assert keys["phi3.rope.dimension_count"] == 2 * PAIRS
    assert keys["phi3.attention.sliding_window"] == 0
    assert keys["phi3.rope.scaling.attn_factor"] == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)), 1e-6)
    assert list(keys)[:2] == ["general.architecture", "phi3.rope.scaling.attn_factor"]  # where upstream has it
    assert np.array_equal(arrays["rope_factors_long.weight"], np.array(LONG["rope_scaling"]["long_factor"], np.float32))
    assert np.array_equal(arrays["rope_factors_short.weight"], np.ones(PAIRS, np.float32))
    assert np.isfinite(logits_of(tmp_path / "ours.gguf")).all()


def test_no_attention_factor_within_the_trained_context(tmp_path: Path) -> None:
    source = make(tmp_path, **{**LONG, "original_max_position_embeddings": 131072})
    header = check_against_llama_cpp(source, tmp_path, [])
    assert header.metadata["phi3.rope.scaling.attn_factor"] == 1.0


# ---- the vocabulary of Phi-3


def make_sentencepiece(folder: Path) -> tuple[Path, int]:
    """Write a checkpoint whose vocabulary is SentencePiece, with three more tokens that its files add."""
    files = sentencepiece_files(as_json=False)
    size = vocabulary_size(files)
    weights = random_weights(shapes(size + 5))
    source = write_checkpoint(folder / "Tiny-Phi", {**CONFIG, "vocab_size": size + 5}, weights)
    (source / "tokenizer.model").write_bytes(files["tokenizer.model"])
    (source / "added_tokens.json").write_text(json.dumps({"<first>": size, "<|second|>": size + 1}))
    decoder = {str(size + 1): {"content": "<|second|>", "special": False}, "2": {"content": "</s>", "special": False}}
    settings = {**files["tokenizer_config.json"], "added_tokens_decoder": decoder}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    added = [{"id": size + 2, "content": "<|third|>", "special": True}, {"id": size, "content": "<1st>"}]
    (source / "tokenizer.json").write_text(json.dumps({"added_tokens": added, "model": {"type": "BPE"}}))
    return source, size


def test_added_tokens_are_taken_literally(tmp_path: Path) -> None:
    source, size = make_sentencepiece(tmp_path)
    keys = check_against_llama_cpp(source, tmp_path, ["q8_0"]).metadata
    assert keys["tokenizer.ggml.model"] == "llama"
    assert keys["tokenizer.ggml.tokens"][size:] == ["<1st>", "<|second|>", "<|third|>", "[PAD323]", "[PAD324]"]
    assert keys["tokenizer.ggml.token_type"][size:] == [4, 4, 3, 5, 5]
    assert keys["tokenizer.ggml.token_type"][:3] == [2, 3, 4]
    assert keys["tokenizer.ggml.scores"][size:] == [-1000.0] * 3 + [-10000.0] * 2
    assert "tokenizer.ggml.merges" not in keys
    with VocabularyModel(tmp_path / "ours.gguf") as model:
        assert model.tokenize("<|third|>", parse_special=True).tolist()[-1] == size + 2


def test_the_class_names_a_byte_level_vocabulary(tmp_path: Path) -> None:
    source = make(tmp_path)
    (source / "tokenizer.model").write_bytes(b"not read")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "GPT2Tokenizer"}))
    keys = check_against_llama_cpp(source, tmp_path, []).metadata
    assert keys["tokenizer.ggml.model"] == "gpt2"


def test_a_sentencepiece_vocabulary_needs_its_file(tmp_path: Path) -> None:
    source, _ = make_sentencepiece(tmp_path)
    (source / "tokenizer.model").unlink()
    tokenizer = {"model": {"type": "BPE", "byte_fallback": True}, "decoder": {"type": "Sequence"}}
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(TokenizerError, match=r"no tokenizer\.model"):
        prepare(source, "q8_0")


def test_damaged_added_tokens(tmp_path: Path) -> None:
    source, _ = make_sentencepiece(tmp_path)
    (source / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 5}]}))
    with pytest.raises(TokenizerError, match="damaged"):
        quantize(source, "q8_0", tmp_path / "out.gguf")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear' without a long_factor"),
        ({"rope_scaling": {**LONG["rope_scaling"], "type": "llama3"}, "partial_rotary_factor": 0.75}, "llama3"),
        ({"rope_scaling": LONG["rope_scaling"]}, "list of 16 numbers"),
        ({**LONG, "rope_scaling": {**LONG["rope_scaling"], "short_factor": None}}, "short_factor"),
        ({**LONG, "rope_scaling": {**LONG["rope_scaling"], "short_factor": ["1"] * PAIRS}}, "short_factor"),
        ({**LONG, "rope_scaling": {**LONG["rope_scaling"], "short_factor": [1e300] * PAIRS}}, "short_factor"),
        ({**LONG, "rope_scaling": {**LONG["rope_scaling"], "long_factor": [0.0] * PAIRS}}, "long_factor"),
        ({**LONG, "original_max_position_embeddings": 1}, "original_max_position_embeddings"),
        ({"original_max_position_embeddings": 4096.5}, "original_max_position_embeddings"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ({"partial_rotary_factor": -1}, "partial_rotary_factor"),
        ({"head_dim": 16}, "head_dim"),
        ({"num_attention_heads": 7}, "num_attention_heads"),
        ({"num_hidden_layers": 10**9}, "1000000000 layers"),
        ({"sliding_window": "wide"}, "sliding_window"),
        ({"num_key_value_heads": 4}, "qkv_proj.weight"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said):
        prepare(make(tmp_path, **fields), "q8_0")
