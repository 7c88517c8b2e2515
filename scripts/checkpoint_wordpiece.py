"""Write the tokenizer files of a BERT from the WordPiece vocabulary that a GGUF carries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from checkpoint_vocabulary import CONTROL
from checkpoint_writer import write_json

if TYPE_CHECKING:
    from pathlib import Path

    from checkpoint_vocabulary import Vocabulary

PHANTOM_SPACE = "\u2581"
ROLES = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]"}


def write_wordpiece(folder: Path, vocabulary: Vocabulary, *, context_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and vocab.txt, as BERT's repositories do."""
    tokens = [
        text if kind == CONTROL else _without_phantom_space(text)
        for text, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
    ]
    write_json(folder / "tokenizer.json", _tokenizer(tokens))
    write_json(folder / "special_tokens_map.json", ROLES)
    config: dict[str, Any] = {
        **ROLES,
        "clean_up_tokenization_spaces": True,
        "do_basic_tokenize": True,
        "do_lower_case": True,
        "model_max_length": context_length,
        "strip_accents": None,
        "tokenize_chinese_chars": True,
        "tokenizer_class": "BertTokenizer",
    }
    write_json(folder / "tokenizer_config.json", dict(sorted(config.items())))
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")


def _without_phantom_space(token: str) -> str:
    return token[1:] if token.startswith(PHANTOM_SPACE) else f"##{token}"


def _tokenizer(tokens: list[str]) -> dict[str, Any]:
    ids = {token: number for number, token in enumerate(tokens)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": text, **flags} for number, text in _special(ids)],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": surrounded(ids, "[CLS]", "[SEP]"),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": ids,
        },
    }


def _special(ids: dict[str, int]) -> list[tuple[int, str]]:
    return sorted((ids[text], text) for text in ROLES.values())


def surrounded(ids: dict[str, int], first: str, last: str) -> dict[str, Any]:
    """Return the post-processor that puts a token before a text and one after it, and one more between two texts."""

    def special(text: str, kind: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": text, "type_id": kind}}

    def sequence(name: str, kind: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": kind}}

    single = [special(first, 0), sequence("A", 0), special(last, 0)]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, sequence("B", 1), special(last, 1)],
        "special_tokens": {text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in (first, last)},
    }
