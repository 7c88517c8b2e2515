"""The vocabulary that arrives tokenizes as the one that left."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from app.errors import TokenizerError
from app.llama.model import VocabularyModel
from app.models.gguf import read_header
from quantize.pipeline import prepare, quantize
from quantize.pretokenizers import pre_tokenizer_name
from tests.quantize.checkpoints import LLAMA3_SPLITTER, SMOLLM_SPLITTER, Shape, make_checkpoint, single_pieces

TEXTS = [
    "the thing in the other's hand: 1212 the   end",
    "  the\n\n\tthe 12 12's THE'S\r\n ",
    "Grüße, 東京, привет 🦙 and naïve café",
    "hello there, the quick brown fox",
    "",
]


def metadata(source: Path, out: Path) -> dict[str, Any]:
    """Quantize to bf16 and return the keys."""
    quantize(source, "bf16", out)
    return read_header(out).metadata


@pytest.mark.parametrize("shape", ["llama3", "smollm"])
def test_byte_level_bpe(shape: str, checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    source = checkpoint_of(shape)
    keys = metadata(source, tmp_path / "out.gguf")
    assert keys["tokenizer.ggml.model"] == "gpt2"
    assert keys["tokenizer.ggml.pre"] == {"llama3": "llama-bpe", "smollm": "smollm"}[shape]
    reference = Tokenizer.from_file(str(source / "tokenizer.json"))
    with VocabularyModel(tmp_path / "out.gguf") as model:
        for text in TEXTS:
            assert model.tokenize(text).tolist() == reference.encode(text, add_special_tokens=False).ids, text
        marked = "<|im_start|>the<tool><|im_end|>"
        expected = reference.encode(marked, add_special_tokens=False).ids
        assert model.tokenize(marked, parse_special=True).tolist() == expected


@pytest.mark.parametrize("shape", ["mistral", "llama2"])
def test_sentencepiece(shape: str, checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    keys = metadata(checkpoint_of(shape), tmp_path / "out.gguf")
    assert keys["tokenizer.ggml.model"] == "llama"
    assert keys["tokenizer.ggml.bos_token_id"] == 1
    assert keys["tokenizer.ggml.eos_token_id"] == 2
    assert keys["tokenizer.ggml.add_bos_token"] is True
    reference = SentencePieceProcessor(model_file=str(checkpoint_of("mistral") / "tokenizer.model"))
    pieces = [reference.IdToPiece(token) for token in range(reference.vocab_size())]
    assert keys["tokenizer.ggml.tokens"] == (pieces if shape == "mistral" else single_pieces(reference))
    assert keys["tokenizer.ggml.token_type"].count(6) == 256
    if shape == "mistral":  # the scores, which order the merges, are in tokenizer.model only
        with VocabularyModel(tmp_path / "out.gguf") as model:
            for text in TEXTS[2:]:
                assert model.tokenize(text).tolist() == reference.encode(text), text


def test_special_tokens_flags_and_template(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    keys = metadata(checkpoint_of("smollm"), tmp_path / "out.gguf")
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert tokens[keys["tokenizer.ggml.eos_token_id"]] == "<|im_end|>"
    assert types[tokens.index("<|im_end|>")] == 3
    assert types[tokens.index("<tool>")] == 4
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert keys["tokenizer.chat_template"].startswith("{% for message")


def test_tokenizer_config_has_the_last_word_on_added_tokens(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "Model", Shape())
    settings = json.loads((source / "tokenizer_config.json").read_text())
    added = json.loads((source / "tokenizer.json").read_text())["added_tokens"]
    by_text = {entry["content"]: entry for entry in added}
    settings["added_tokens_decoder"] = {
        str(by_text["<tool>"]["id"]): by_text["<tool>"] | {"special": True},
        str(by_text["<|endoftext|>"]["id"]): by_text["<|endoftext|>"] | {"special": False},
    }
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    types = metadata(source, tmp_path / "out.gguf")["tokenizer.ggml.token_type"]
    assert types[by_text["<tool>"]["id"]] == 3
    assert types[by_text["<|endoftext|>"]["id"]] == 3  # its look says so


def test_unused_rows_are_padded(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "Model", Shape())
    size = json.loads((source / "config.json").read_text())["vocab_size"]
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["added_tokens"].pop()
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    keys = metadata(source, tmp_path / "out.gguf")
    assert len(keys["tokenizer.ggml.tokens"]) == size
    assert keys["tokenizer.ggml.tokens"][-1] == f"[PAD{size - 1}]"
    assert keys["tokenizer.ggml.token_type"][-1] == 5


def test_named_templates_and_a_template_file(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "Model", Shape())
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["chat_template"] = [
        {"name": "default", "template": "plain"},
        {"name": "tool-use", "template": "with tools"},
    ]
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    keys = metadata(source, tmp_path / "out.gguf")
    assert keys["tokenizer.chat_template"] == "plain"
    assert keys["tokenizer.chat_template.tool_use"] == "with tools"
    assert keys["tokenizer.chat_templates"] == ["tool_use"]
    del settings["chat_template"]
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "chat_template.jinja").write_text("from a file")
    assert metadata(source, tmp_path / "out.gguf")["tokenizer.chat_template"] == "from a file"


def test_the_template_processor_says_that_bos_is_added(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "Model", Shape())
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
    }
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert metadata(source, tmp_path / "out.gguf")["tokenizer.ggml.add_bos_token"] is True


@pytest.mark.parametrize(("splitter", "name"), [(SMOLLM_SPLITTER, "smollm"), (LLAMA3_SPLITTER, "llama-bpe")])
def test_known_splitters(splitter: dict[str, Any], name: str) -> None:
    assert pre_tokenizer_name({"normalizer": None, "pre_tokenizer": splitter}) == name


@pytest.mark.parametrize(
    "definition",
    [
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
        {"normalizer": {"type": "NFKC"}, "pre_tokenizer": SMOLLM_SPLITTER},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
    ],
)
def test_an_unknown_splitter_is_quoted(definition: dict[str, Any]) -> None:
    with pytest.raises(TokenizerError, match="no splitter of llama") as caught:
        pre_tokenizer_name(definition)
    assert str((definition["pre_tokenizer"] or {}).get("type", "null")) in caught.value.message


def test_a_tokenizer_larger_than_the_embeddings_is_refused(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "Model", Shape())
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({"id": 5000, "content": "<far>", "special": True})
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(TokenizerError, match="'<far>' with id 5000"):
        prepare(source, "q8_0")


@pytest.mark.parametrize("damage", [{"model": None}, {"model": {"type": "BPE"}}, {"added_tokens": [{"id": 1}]}])
def test_a_damaged_tokenizer_is_an_error_of_the_tokenizer(damage: dict[str, Any], tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "Model", Shape())
    tokenizer = json.loads((source / "tokenizer.json").read_text()) | damage
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(TokenizerError, match="damaged"):
        prepare(source, "q8_0")
