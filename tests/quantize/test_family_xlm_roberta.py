"""XLM-RoBERTa."""

from __future__ import annotations

import base64
import functools
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer

from app.errors import CheckpointError, TokenizerError
from app.models.gguf import read_header
from quantize import vocab_unigram
from quantize.pipeline import prepare, quantize
from tests.quantize.encoder_files import changed_json, pooling_files, tokens_of, write_encoder
from tests.quantize.family_files import Arrays, changed_config, check_against_llama_cpp, floats, random_weights
from tests.quantize.test_family_bert import MATRICES, NORMS

HIDDEN, WIDTH, LAYERS, POSITIONS = 256, 320, 1, 66
FIRST = ["<s>", "<pad>", "</s>", "<unk>"]
TEXTS = ["The cats", "the  cat\tsits", "\u00c0 la \ufb01n", "", "un\u3000believable ", "2\u00b2 zzz"]


@functools.cache
def unigram_model() -> bytes:
    """Train a small unigram model, whose normalizer is that of XLM-RoBERTa."""
    words = ["the cat sits on the mat", "The cats are unbelievable", "\u00e0 la fin 22 zzz", "hello there world fin"]
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(words * 20), model_writer=model, vocab_size=60, model_type="unigram",
        normalization_rule_name="nmt_nfkc", hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return model.getvalue()


@functools.cache
def characters() -> bytes:
    """Return the normalizer's map of characters."""
    normalizer = dict(vocab_unigram._fields(dict(vocab_unigram._fields(unigram_model()))[3]))
    assert isinstance(normalizer[2], bytes)
    return normalizer[2]


@functools.cache
def words() -> list[tuple[str, float]]:
    """Return the vocabulary as transformers' tokenizer.json has it."""
    pieces = SentencePieceProcessor(model_proto=unigram_model())
    found = [(text, 0.0) for text in FIRST]
    found += [(pieces.IdToPiece(token), pieces.GetScore(token)) for token in range(3, pieces.vocab_size())]
    return [*found, ("<mask>", 0.0)]


def tokenizer_files() -> dict[str, Any]:
    vocabulary = [list(pair) for pair in words()]
    special = [(token, text) for token, (text, _) in enumerate(words()) if text in {*FIRST, "<mask>"}]
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always"}
    cls, sep = ({"SpecialToken": {"id": text, "type_id": 0}} for text in ("<s>", "</s>"))
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": token, "content": text, **flags} for token, text in special],
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(characters()).decode()},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [cls, first, sep],
            "pair": [cls, first, sep, sep, second, sep],
            "special_tokens": {
                text: {"id": text, "ids": [FIRST.index(text)], "tokens": [text]} for text in ("<s>", "</s>")
            },
        },
        "decoder": metaspace,
        "model": {"type": "Unigram", "unk_id": 3, "vocab": vocabulary},
    }
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>", "cls_token": "<s>"}
    settings |= {"pad_token": "<pad>", "mask_token": "<mask>"}
    switches = {"add_prefix_space": True, "clean_up_tokenization_spaces": True}
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": settings | switches}


def config() -> dict[str, Any]:
    return {
        "architectures": ["XLMRobertaModel"],
        "model_type": "xlm-roberta",
        "vocab_size": len(words()),
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "type_vocab_size": 1,
    }


def weights_of(prefix: str = "", **more: tuple[int, ...]) -> Arrays:
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (len(words()), HIDDEN),
        "embeddings.position_embeddings.weight": (POSITIONS, HIDDEN),
        "embeddings.token_type_embeddings.weight": (1, HIDDEN),
        "embeddings.LayerNorm.weight": (HIDDEN,),
        "embeddings.LayerNorm.bias": (HIDDEN,),
    }
    for layer in range(LAYERS):
        for name, (_, shape) in MATRICES.items():
            shapes[f"encoder.layer.{layer}.{name}.weight"] = shape
            shapes[f"encoder.layer.{layer}.{name}.bias"] = shape[:1]
        for name in NORMS:
            shapes |= {f"encoder.layer.{layer}.{name}.{part}": (HIDDEN,) for part in ("weight", "bias")}
    shapes = {prefix + name: shape for name, shape in shapes.items()}
    return random_weights(shapes | {name.replace("__", "."): shape for name, shape in more.items()})


def make(folder: Path, weights: Arrays | None = None, *, pieces: bool = True, **fields: Any) -> Path:
    files = tokenizer_files() | pooling_files({"pooling_mode_cls_token": True})
    write_encoder(folder, config() | fields, weights or weights_of(), files)
    if pieces:
        (folder / "sentencepiece.bpe.model").write_bytes(unigram_model())
    return folder


def test_every_byte_is_llama_cpps_and_the_position_table_is_cut(tmp_path: Path) -> None:
    weights = weights_of()
    header = check_against_llama_cpp(make(tmp_path / "Model", weights), tmp_path, ["q8_0", "q4_k_m"])
    found = floats(header)
    np.testing.assert_array_equal(found["position_embd.weight"], weights["embeddings.position_embeddings.weight"][2:])
    np.testing.assert_array_equal(found["token_embd.weight"], weights["embeddings.word_embeddings.weight"])
    np.testing.assert_array_equal(found["blk.0.ffn_down.bias"], weights["encoder.layer.0.output.dense.bias"])
    assert header.metadata["bert.context_length"] == POSITIONS - 2
    assert len(found) == len(weights)


@pytest.mark.parametrize("pieces", [True, False])
def test_llama_cpp_tokenizes_as_the_checkpoint_does(pieces: bool, tmp_path: Path) -> None:
    source = make(tmp_path / "Model", pieces=pieces)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    quantize(source, "q8_0", tmp_path / "out.gguf")
    keys = read_header(tmp_path / "out.gguf").metadata
    assert keys["tokenizer.ggml.model"] == "t5"
    assert keys["tokenizer.ggml.tokens"][:4] == FIRST
    assert keys["tokenizer.ggml.token_type"][:5] == [3, 3, 3, 2, 1]
    assert bytes(keys["tokenizer.ggml.precompiled_charsmap"]) == characters()
    assert tokens_of(tmp_path / "out.gguf", TEXTS) == [tokenizer.encode(text).ids for text in TEXTS]
    # sentencepiece.bpe.model does not know of the mask token, and upstream leaves it out too
    assert keys["tokenizer.ggml.tokens"][-1] == (f"[PAD{len(words()) - 2}]" if pieces else "<mask>")


def test_the_proof_names_what_upstream_leaves_out_and_finds_another_vocabulary(tmp_path: Path) -> None:
    source = make(tmp_path / "Model")
    assert any("leaves out <mask>" in note for note in prepare(source, "q8_0").prove())
    tokenizer = tokenizer_files()["tokenizer.json"]
    for pair in tokenizer["model"]["vocab"]:
        if len(pair[0]) > 1:
            pair[1] = -100.0
    changed_json(source / "tokenizer.json", **tokenizer)
    with pytest.raises(TokenizerError, match="read text in another way"):
        prepare(source, "q8_0").prove()


def test_a_reranker_has_its_head(tmp_path: Path) -> None:
    head: dict[str, tuple[int, ...]] = {
        "classifier__dense__weight": (HIDDEN, HIDDEN),
        "classifier__dense__bias": (HIDDEN,),
        "classifier__out_proj__weight": (1, HIDDEN),
        "classifier__out_proj__bias": (1,),
    }
    weights = weights_of("roberta.", **head)
    fields = {"architectures": ["XLMRobertaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    header = check_against_llama_cpp(make(tmp_path / "Model", weights, **fields), tmp_path, ["q8_0"])
    found = floats(header)
    np.testing.assert_array_equal(found["cls.weight"], weights["classifier.dense.weight"])
    np.testing.assert_array_equal(found["cls.output.weight"], weights["classifier.out_proj.weight"])
    assert header.metadata["bert.classifier.output_labels"] == ["LABEL_0"]
    assert tokens_of(tmp_path / "ours.gguf")


def test_without_a_padding_token_the_table_is_whole(tmp_path: Path) -> None:
    source = make(tmp_path / "Model")
    changed_json(source / "config.json", pad_token_id=None)
    quantize(source, "bf16", tmp_path / "out.gguf")
    header = read_header(tmp_path / "out.gguf")
    assert header.metadata["bert.context_length"] == POSITIONS
    assert floats(header)["position_embd.weight"].shape == (POSITIONS, HIDDEN)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"pad_token_id": POSITIONS}, "pad_token_id is 66"),
        ({"lora_adaptations": ["a"]}, "lora_adaptations"),
        ({"max_position_embeddings": 70}, "position_embeddings"),
    ],
)
def test_a_config_that_does_not_fit(fields: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    source = changed_config(make(tmp_path / "Model"), **fields)
    with pytest.raises(CheckpointError, match=complaint):
        prepare(source, "q8_0")


def test_a_damaged_or_foreign_vocabulary(tmp_path: Path) -> None:
    source = make(tmp_path / "Model")
    path, whole = source / "sentencepiece.bpe.model", unigram_model()
    path.write_bytes(whole[:1000])
    with pytest.raises(TokenizerError, match=r"sentencepiece\.bpe\.model"):
        prepare(source, "q8_0")
    path.write_bytes(whole)
    (source / "tokenizer.json").rename(source / "kept.json")
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        prepare(source, "q8_0")
    path.unlink()
    tokenizer = json.loads((source / "kept.json").read_text(encoding="utf-8"))
    (source / "tokenizer.json").write_text(json.dumps(tokenizer | {"normalizer": {"type": "NFKC"}}))
    with pytest.raises(TokenizerError, match="Precompiled"):
        prepare(source, "q8_0")
    vocabulary = tokenizer["model"]["vocab"]
    cut = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(characters()[:99]).decode()}
    for damage in (
        {"model": {"type": "Unigram"}},
        {"model": {"type": "Unigram", "vocab": [[5, 0.0], *vocabulary[1:]]}},
        {"normalizer": cut},
    ):
        (source / "tokenizer.json").write_text(json.dumps(tokenizer | damage))
        with pytest.raises(TokenizerError, match="damaged"):
            prepare(source, "q8_0")


@pytest.mark.parametrize("pieces", [True, False])
def test_a_vocabulary_larger_than_the_embeddings(pieces: bool, tmp_path: Path) -> None:
    weights = weights_of()
    weights["embeddings.word_embeddings.weight"] = weights["embeddings.word_embeddings.weight"][:20]
    source = make(tmp_path / "Model", weights, pieces=pieces, vocab_size=20)
    with pytest.raises(TokenizerError, match="leaves room for 20"):
        prepare(source, "q8_0")


@pytest.mark.parametrize("message", [b"\x08", b"\x0a\x05ab", b"\x0b", b"\x08" + b"\xff" * 12, b"\x0d\x00"])
def test_a_message_that_is_cut_off_or_unknown(message: bytes) -> None:
    with pytest.raises(ValueError, match=r"cut off|wire type"):
        list(vocab_unigram._fields(message))
