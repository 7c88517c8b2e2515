"""BERT: embedding models and classifiers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from app.errors import CheckpointError, TokenizerError
from app.models.gguf import read_header
from quantize.pipeline import prepare, quantize
from tests.quantize.encoder_files import (
    TEXTS,
    TOKENS,
    changed_json,
    pooling_files,
    tokens_of,
    wordpiece_files,
    write_encoder,
)
from tests.quantize.family_files import (
    Arrays,
    changed_config,
    check_against_llama_cpp,
    floats,
    random_weights,
    write_checkpoint,
)

HIDDEN, WIDTH, LAYERS, POSITIONS = 256, 320, 2, 64
CONFIG: dict[str, Any] = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "vocab_size": len(TOKENS),
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}
POOLING = pooling_files({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True})
MATRICES = {
    "attention.self.query": ("attn_q", (HIDDEN, HIDDEN)),
    "attention.self.key": ("attn_k", (HIDDEN, HIDDEN)),
    "attention.self.value": ("attn_v", (HIDDEN, HIDDEN)),
    "attention.output.dense": ("attn_output", (HIDDEN, HIDDEN)),
    "intermediate.dense": ("ffn_up", (WIDTH, HIDDEN)),
    "output.dense": ("ffn_down", (HIDDEN, WIDTH)),
}
NORMS = {"attention.output.LayerNorm": "attn_output_norm", "output.LayerNorm": "layer_output_norm"}


def names() -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return stored name → name in the GGUF and shape, of all that an encoder has."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {
        "embeddings.word_embeddings.weight": ("token_embd.weight", (len(TOKENS), HIDDEN)),
        "embeddings.position_embeddings.weight": ("position_embd.weight", (POSITIONS, HIDDEN)),
        "embeddings.token_type_embeddings.weight": ("token_types.weight", (2, HIDDEN)),
        "embeddings.LayerNorm.weight": ("token_embd_norm.weight", (HIDDEN,)),
        "embeddings.LayerNorm.bias": ("token_embd_norm.bias", (HIDDEN,)),
    }
    for layer in range(LAYERS):
        for name, (target, shape) in MATRICES.items():
            found[f"encoder.layer.{layer}.{name}.weight"] = (f"blk.{layer}.{target}.weight", shape)
            found[f"encoder.layer.{layer}.{name}.bias"] = (f"blk.{layer}.{target}.bias", shape[:1])
        for name, target in NORMS.items():
            for part in ("weight", "bias"):
                found[f"encoder.layer.{layer}.{name}.{part}"] = (f"blk.{layer}.{target}.{part}", (HIDDEN,))
    return found


def weights_of(prefix: str = "", **more: tuple[int, ...]) -> Arrays:
    shapes = {f"{prefix}{name}": shape for name, (_, shape) in names().items()}
    return random_weights(shapes | {name.replace("__", "."): shape for name, shape in more.items()})


def make(folder: Path, weights: Arrays | None = None, **fields: Any) -> Path:
    return write_encoder(folder, CONFIG | fields, weights or weights_of(), wordpiece_files() | POOLING)


def metadata(source: Path, folder: Path) -> dict[str, Any]:
    quantize(source, "bf16", folder / "keys.gguf")
    return read_header(folder / "keys.gguf").metadata


def test_every_byte_is_llama_cpps_and_no_weight_is_changed(tmp_path: Path) -> None:
    weights = weights_of(pooler__dense__weight=(HIDDEN, HIDDEN), pooler__dense__bias=(HIDDEN,))
    source = make(tmp_path / "Model", weights)
    header = check_against_llama_cpp(source, tmp_path, ["q8_0", "q4_k_m", "q4_0"])
    found = floats(header)
    assert set(found) == {target for target, _ in names().values()}
    for name, (target, _) in names().items():
        np.testing.assert_array_equal(found[target], weights[name])
    types = {tensor.name: tensor.type_name for tensor in header.tensors}
    assert types["position_embd.weight"] == types["token_types.weight"] == "f32"
    assert types["token_embd.weight"] == "bf16"


def test_the_keys(tmp_path: Path) -> None:
    keys = metadata(make(tmp_path / "Model"), tmp_path)
    assert keys["general.architecture"] == "bert"
    assert keys["bert.context_length"] == POSITIONS
    assert keys["bert.attention.causal"] is False
    assert keys["bert.pooling_type"] == 1
    assert keys["bert.attention.layer_norm_epsilon"] == pytest.approx(1e-12)  # the config class's own
    assert keys["tokenizer.ggml.token_type_count"] == 2
    assert keys["tokenizer.ggml.model"] == "bert"
    assert keys["tokenizer.ggml.tokens"][:7] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "▁[unused0]", "▁the"]
    assert keys["tokenizer.ggml.tokens"][9] == "believ"
    assert keys["tokenizer.ggml.normalizer.lowercase"] is True
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]) == (2, 3)
    assert "bert.classifier.output_labels" not in keys


def test_llama_cpp_tokenizes_as_the_checkpoint_does(tmp_path: Path) -> None:
    source = make(tmp_path / "Model")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    quantize(source, "q8_0", tmp_path / "out.gguf")
    assert tokens_of(tmp_path / "out.gguf") == [tokenizer.encode(text).ids for text in TEXTS]


def test_padding_and_truncation_in_the_file_do_not_count(tmp_path: Path) -> None:
    source = make(tmp_path / "Model")
    padding = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    changed_json(
        source / "tokenizer.json",
        padding={**padding, "pad_type_id": 0, "pad_token": "[PAD]"},
        truncation={"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
    )
    assert Tokenizer.from_file(str(source / "tokenizer.json")).encode("the cat").ids[-1] == 0
    prepare(source, "q8_0").prove()


def test_a_cased_vocabulary_keeps_its_capitals(tmp_path: Path) -> None:
    source = make(tmp_path / "Model")
    normalizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))["normalizer"]
    changed_json(source / "tokenizer.json", normalizer={**normalizer, "lowercase": False, "strip_accents": False})
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    quantize(source, "q8_0", tmp_path / "out.gguf")
    assert tokens_of(tmp_path / "out.gguf") == [tokenizer.encode(text).ids for text in TEXTS]


def test_heads_of_the_training_and_old_names_of_norms(tmp_path: Path) -> None:
    plain = make(tmp_path / "Plain")
    old_names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {}
    for name, values in weights_of().items():
        for new, before in old_names.items():
            name = name.replace(new, before)
        renamed[f"bert.{name}"] = values
    renamed |= random_weights(
        {"cls.predictions.bias": (len(TOKENS),), "cls.predictions.transform.dense.weight": (HIDDEN, HIDDEN)}
    )
    old = make(tmp_path / "Old", renamed, architectures=["BertForMaskedLM"])
    for source in (plain, old):
        quantize(source, "bf16", source.with_suffix(".gguf"))
    ours, theirs = (floats(read_header(source.with_suffix(".gguf"))) for source in (plain, old))
    assert list(ours) == list(theirs)
    for name, values in ours.items():
        np.testing.assert_array_equal(values, theirs[name])


def test_a_classifier_has_its_head_and_the_names_of_its_classes(tmp_path: Path) -> None:
    weights = weights_of("bert.", classifier__weight=(3, HIDDEN), classifier__bias=(3,))
    labels = {"10": "late", "0": "no", "2": "yes"}
    fields = {"architectures": ["BertForSequenceClassification"], "id2label": labels}
    source = make(tmp_path / "Model", weights, **fields)
    header = check_against_llama_cpp(source, tmp_path, ["q8_0"])
    assert header.metadata["bert.classifier.output_labels"] == ["no", "yes", "late"]
    np.testing.assert_array_equal(floats(header)["cls.output.weight"], weights["classifier.weight"])
    assert tokens_of(tmp_path / "ours.gguf")[0][0] == TOKENS.index("[CLS]")
    changed_config(source, id2label=None)
    with pytest.raises(CheckpointError, match="id2label"):
        prepare(source, "q8_0")


@pytest.mark.parametrize(
    ("pooling", "number"),
    [
        ({"pooling_mode_cls_token": True}, 2),
        ({"pooling_mode_lasttoken": True}, 3),
        ({"pooling_mode": "mean"}, 1),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, 1),
    ],
)
def test_the_pooling(pooling: dict[str, Any], number: int, tmp_path: Path) -> None:
    source = make(tmp_path / "Model")
    (source / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    assert metadata(source, tmp_path)["bert.pooling_type"] == number


def test_without_modules_there_is_no_pooling(tmp_path: Path) -> None:
    source = make(tmp_path / "Model")
    (source / "modules.json").unlink()
    assert "bert.pooling_type" not in metadata(source, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"),
        ("1_Pooling/config.json", {}, "none"),
        ("modules.json", [{"type": "x.Pooling", "path": "../other"}], "not a folder inside"),
        ("modules.json", [{"type": "x.Pooling", "path": "3_Pooling"}], "missing"),
        ("modules.json", [{"path": "1_Pooling"}], "not a list of modules"),
        ("modules.json", 5, "not a list of modules"),
    ],
)
def test_a_pooling_that_cannot_be_carried_over(name: str, content: Any, complaint: str, tmp_path: Path) -> None:
    source = make(tmp_path / "Model")
    (source / name).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=complaint):
        prepare(source, "q8_0")


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"num_attention_heads": 7}, "num_attention_heads is 7"),
        ({"num_hidden_layers": 9}, "tensors are missing"),
        ({"num_hidden_layers": 10**9}, "1000000000 layers"),
        ({"max_position_embeddings": 128}, "position_embeddings"),
        ({"id2label": {"a": "b"}}, "id2label"),
        ({"id2label": [7, 8]}, "id2label"),
        ({"id2label": {"0": 1, "1": 2, "2": 3}}, "id2label"),
    ],
)
def test_a_config_that_does_not_fit(fields: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        prepare(make(tmp_path / "Model", **fields), "q8_0")


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"normalizer": None},
        {"normalizer": {"type": "BertNormalizer", "handle_chinese_chars": False, "lowercase": True}},
        {"model": {"type": "WordLevel", "vocab": {"a": 0}}},
        {"model": None},
    ],
)
def test_a_tokenizer_that_llama_cpp_cannot_follow(change: dict[str, Any], tmp_path: Path) -> None:
    source = make(tmp_path / "Model")
    changed_json(source / "tokenizer.json", **change)
    with pytest.raises(TokenizerError, match="found"):
        prepare(source, "q8_0")


def test_a_vocabulary_without_tokenizer_json_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "Model", CONFIG, weights_of())
    (source / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        prepare(source, "q8_0")
