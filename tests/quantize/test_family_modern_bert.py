"""ModernBERT."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from app.errors import CheckpointError, TokenizerError
from app.models.gguf import read_header
from quantize.pipeline import prepare, quantize
from tests.quantize.checkpoints import bpe_files
from tests.quantize.encoder_files import TEXTS, changed_json, pooling_files, template, tokens_of, write_encoder
from tests.quantize.family_files import Arrays, changed_config, check_against_llama_cpp, floats, random_weights

HIDDEN, WIDTH, LAYERS = 256, 160, 3
SPECIAL = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
MATRICES = {
    "attn.Wqkv": ("attn_qkv", (3 * HIDDEN, HIDDEN)),
    "attn.Wo": ("attn_output", (HIDDEN, HIDDEN)),
    "mlp.Wi": ("ffn_up", (2 * WIDTH, HIDDEN)),
    "mlp.Wo": ("ffn_down", (HIDDEN, WIDTH)),
}


def tokenizer_files() -> dict[str, Any]:
    """Return a byte-level BPE with the special tokens of BERT."""
    files = copy.deepcopy(bpe_files(BYTE_LEVEL))
    tokenizer = files["tokenizer.json"]
    tokenizer["normalizer"] = {"type": "NFC"}
    first = len(tokenizer["model"]["vocab"])
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    tokenizer["added_tokens"] = [{"id": first + place, "content": text, **flags} for place, text in enumerate(SPECIAL)]
    surrounded = template("[CLS]", "[SEP]")
    for entry in surrounded["special_tokens"].values():
        entry["ids"] = [first + SPECIAL.index(entry["id"])]
    tokenizer["post_processor"] = surrounded
    roles = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": {**roles, "mask_token": "[MASK]"}}


FILES = tokenizer_files()
VOCABULARY = len(FILES["tokenizer.json"]["model"]["vocab"]) + len(SPECIAL)
CONFIG: dict[str, Any] = {
    "architectures": ["ModernBertModel"],
    "model_type": "modernbert",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "local_attention": 64,
    "layer_norm_eps": 1e-5,
}


def names(prefix: str = "") -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return stored name → name in the GGUF and shape."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {
        "embeddings.tok_embeddings.weight": ("token_embd.weight", (VOCABULARY, HIDDEN)),
        "embeddings.norm.weight": ("token_embd_norm.weight", (HIDDEN,)),
        "final_norm.weight": ("output_norm.weight", (HIDDEN,)),
    }
    for layer in range(LAYERS):
        if layer:  # the first layer's input is a norm's output already
            found[f"layers.{layer}.attn_norm.weight"] = (f"blk.{layer}.attn_norm.weight", (HIDDEN,))
        found[f"layers.{layer}.mlp_norm.weight"] = (f"blk.{layer}.ffn_norm.weight", (HIDDEN,))
        for name, (target, shape) in MATRICES.items():
            found[f"layers.{layer}.{name}.weight"] = (f"blk.{layer}.{target}.weight", shape)
    return {prefix + name: target for name, target in found.items()}


def make(folder: Path, weights: Arrays | None = None, **fields: Any) -> Path:
    weights = weights or random_weights({name: shape for name, (_, shape) in names().items()})
    return write_encoder(folder, CONFIG | fields, weights, FILES | pooling_files({"pooling_mode_cls_token": True}))


def test_every_byte_is_llama_cpps_and_no_weight_is_changed(tmp_path: Path) -> None:
    weights = random_weights({name: shape for name, (_, shape) in names().items()})
    header = check_against_llama_cpp(make(tmp_path / "Model", weights), tmp_path, ["q8_0", "q4_k_m", "q4_0"])
    found = floats(header)
    assert set(found) == {target for target, _ in names().values()}
    for name, (target, _) in names().items():
        np.testing.assert_array_equal(found[target], weights[name])


def test_the_keys_and_the_tokens(tmp_path: Path) -> None:
    source = make(tmp_path / "Model")
    keys = check_against_llama_cpp(source, tmp_path, ["q8_0"]).metadata
    assert keys["general.architecture"] == "modern-bert"
    expected = {
        "context_length": 8192,  # from here on: the config class's own
        "rope.freq_base": 160000.0,
        "rope.freq_base_swa": 10000.0,
        "attention.sliding_window_pattern": 3,
        "classifier.pooling_type": 2,
        "hidden_activation": "gelu",
        "attention.sliding_window": 64,
        "attention.causal": False,
        "pooling_type": 2,
        "rope.scaling.type": "none",
        "vocab_size": VOCABULARY,
    }
    assert {name: keys[f"modern-bert.{name}"] for name in expected} == expected
    assert keys["tokenizer.ggml.pre"] == "modern-bert"
    assert keys["tokenizer.ggml.add_eos_token"] is True
    assert keys["tokenizer.ggml.add_sep_token"] is False  # one separator follows the first of two texts
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    assert tokens_of(tmp_path / "ours.gguf") == [tokenizer.encode(text).ids for text in TEXTS]


def test_a_masked_language_model_and_a_classifier(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {name: shape for name, (_, shape) in names("model.").items()}
    shapes |= {"head.dense.weight": (HIDDEN, HIDDEN), "head.norm.weight": (HIDDEN,)}
    masked = random_weights(shapes | {"decoder.bias": (VOCABULARY,)})
    source = make(tmp_path / "Masked", masked, architectures=["ModernBertForMaskedLM"])
    found = floats(check_against_llama_cpp(source, tmp_path, ["q8_0"]))
    np.testing.assert_array_equal(found["cls.weight"], masked["head.dense.weight"])
    np.testing.assert_array_equal(found["cls.norm.weight"], masked["head.norm.weight"])
    assert tokens_of(tmp_path / "ours.gguf")
    classifier = random_weights(shapes | {"classifier.weight": (1, HIDDEN), "classifier.bias": (1,)})
    architecture = ["ModernBertForSequenceClassification"]
    source = make(tmp_path / "Classifier", classifier, architectures=architecture, num_labels=1)
    header = check_against_llama_cpp(source, tmp_path, ["q8_0"])
    assert header.metadata["modern-bert.classifier.output_labels"] == ["LABEL_0"]
    np.testing.assert_array_equal(floats(header)["cls.output.weight"], classifier["classifier.weight"])
    assert tokens_of(tmp_path / "ours.gguf")
    with pytest.raises(CheckpointError, match="id2label"):
        prepare(changed_config(source, num_labels=2), "q8_0")


def test_a_config_that_names_the_epsilon_once_and_one_base_only(tmp_path: Path) -> None:
    source = make(tmp_path / "Model", norm_eps=1e-4, local_rope_theta=None)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    del config["layer_norm_eps"]
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    quantize(source, "q8_0", tmp_path / "out.gguf")
    keys = read_header(tmp_path / "out.gguf").metadata
    assert keys["modern-bert.attention.layer_norm_epsilon"] == pytest.approx(1e-4)
    assert "modern-bert.rope.freq_base_swa" not in keys  # a null: local layers turn as the others do
    assert tokens_of(tmp_path / "out.gguf")


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"hidden_activation": "relu"}, "hidden_activation is 'relu'"),
        ({"num_attention_heads": 5}, "num_attention_heads is 5"),
        ({"classifier_pooling": "max"}, "classifier_pooling is 'max'"),
        ({"local_attention": 0}, "local_attention is 0"),
        ({"intermediate_size": 128}, "mlp.Wi.weight"),
        ({"num_hidden_layers": 4}, "tensors are missing"),
    ],
)
def test_a_config_that_does_not_fit(fields: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        prepare(make(tmp_path / "Model", **fields), "q8_0")


def test_biases_that_llama_cpp_does_not_have(tmp_path: Path) -> None:
    shapes = {name: shape for name, (_, shape) in names().items()}
    weights = random_weights(shapes | {"layers.0.mlp.Wi.bias": (2 * WIDTH,)})
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.Wi\.bias"):
        prepare(make(tmp_path / "Model", weights), "q8_0")


def test_another_splitter_is_refused(tmp_path: Path) -> None:
    source = make(tmp_path / "Model")
    changed_json(source / "tokenizer.json", pre_tokenizer={"type": "BertPreTokenizer"})
    with pytest.raises(TokenizerError, match="no splitter"):
        prepare(source, "q8_0")
