"""What the tests of the BERT line share: a small WordPiece vocabulary, and the folders of sentence-transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from app.llama.model import Model, VocabularyModel
from tests.quantize.family_files import Arrays, write_checkpoint

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["the", "cat", "un", "##believ", "##able", "##s", "a", "##b", "!", "'", "t", "2", "##0", "\u4e2d", "\u6587"]
TOKENS = [*SPECIAL, "[unused0]", *WORDS]
TEXTS = ["The cats", "unbelievable!", "Abs, isn't \u00c0b", "\u4e2d\u6587 200 cat\tthe", "", "xyz the", "[MASK]"]


def template(first: str, last: str) -> dict[str, Any]:
    """Return the post-processor of an encoder: a token before the text and one after it."""
    ids = {text: TOKENS.index(text) for text in (first, last)}
    cls, sep = ({"SpecialToken": {"id": text, "type_id": 0}} for text in (first, last))
    single: list[Any] = [cls, {"Sequence": {"id": "A", "type_id": 0}}, sep]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}, {"SpecialToken": {"id": last, "type_id": 1}}],
        "special_tokens": {text: {"id": text, "ids": [number], "tokens": [text]} for text, number in ids.items()},
    }


def wordpiece_files() -> dict[str, Any]:
    """Return tokenizer.json and tokenizer_config.json of a WordPiece vocabulary that lowers its letters."""
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": number, "content": text, **flags} for number, text in enumerate(SPECIAL)],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": template("[CLS]", "[SEP]"),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {text: number for number, text in enumerate(TOKENS)},
        },
    }
    roles = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]"}
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": {**roles, "mask_token": "[MASK]"}}


def pooling_files(pooling: Mapping[str, Any]) -> dict[str, Any]:
    """Return the files with which sentence-transformers says how embeddings are pooled."""
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (path, kind) in enumerate(kinds.items())
    ]
    return {"modules.json": modules, "1_Pooling/config.json": dict(pooling)}


def write_encoder(folder: Path, config: Mapping[str, Any], weights: Arrays, files: Mapping[str, Any]) -> Path:
    """Write a checkpoint with these JSON files in place of the usual tokenizer's."""
    write_checkpoint(folder, config, weights)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def changed_json(path: Path, **fields: Any) -> None:
    """Set fields at the top of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **fields}), encoding="utf-8")


def tokens_of(path: Path, texts: Sequence[str] = TEXTS) -> list[list[int]]:
    """Load the whole file, then return what llama.cpp makes of the texts."""
    with Model(path, device="cpu", gpu_layers=0) as model:
        assert model.tensor_bytes > 0
    with VocabularyModel(path) as vocabulary:
        return [vocabulary.tokenize(text, add_special=True, parse_special=True).tolist() for text in texts]
