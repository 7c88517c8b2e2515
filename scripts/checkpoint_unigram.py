"""Write the tokenizer files of XLM-RoBERTa from the unigram vocabulary that a GGUF carries."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

from checkpoint_vocabulary import CONTROL, UNKNOWN, proto_field, proto_number, proto_piece
from checkpoint_wordpiece import surrounded
from checkpoint_writer import write_json

if TYPE_CHECKING:
    from pathlib import Path

    from checkpoint_vocabulary import Vocabulary

SIZE = 250002
FIRST = ["<s>", "<pad>", "</s>", "<unk>"]
MASK = "<mask>"
ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>", "pad_token": "<pad>",
         "cls_token": "<s>", "mask_token": MASK}  # fmt: skip


def write_unigram(folder: Path, vocabulary: Vocabulary, *, context_length: int) -> None:
    """Write sentencepiece.bpe.model, tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    (folder / "sentencepiece.bpe.model").write_bytes(_sentencepiece_model(vocabulary))
    write_unigram_json(folder, vocabulary, context_length=context_length)


def write_unigram_json(folder: Path, vocabulary: Vocabulary, *, context_length: int) -> None:
    """Write them without sentencepiece.bpe.model, as newer repositories have them."""
    write_json(folder / "tokenizer.json", _tokenizer(vocabulary))
    write_json(folder / "special_tokens_map.json", ROLES)
    config: dict[str, Any] = {
        **ROLES,
        "add_prefix_space": True,
        "clean_up_tokenization_spaces": True,
        "model_max_length": context_length,
        "tokenizer_class": "XLMRobertaTokenizer",
    }
    write_json(folder / "tokenizer_config.json", dict(sorted(config.items())))


def _sentencepiece_model(vocabulary: Vocabulary) -> bytes:
    pieces = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    last = SIZE - 1  # the mask token is transformers' own
    pieces += zip(vocabulary.tokens[4:last], vocabulary.scores[4:last], vocabulary.types[4:last], strict=True)
    encoded = b"".join(proto_piece(text, score, kind) for text, score, kind in pieces)
    unigram = 1
    trainer = proto_number(3, unigram) + proto_number(4, len(pieces))
    normalizer = proto_field(1, b"nmt_nfkc") + proto_field(2, vocabulary.characters)
    normalizer += proto_number(3, 1) + proto_number(4, 1)
    return encoded + proto_field(2, trainer) + proto_field(3, normalizer)


def _tokenizer(vocabulary: Vocabulary) -> dict[str, Any]:
    words = [*FIRST, *vocabulary.tokens[4 : SIZE - 1], MASK]
    scores = [0.0] * 4 + [float(score) for score in vocabulary.scores[4 : SIZE - 1]] + [0.0]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [
        (number, text, flags | {"lstrip": text == MASK}) for number, text in enumerate(words) if text in {*FIRST, MASK}
    ]
    metaspace = {"replacement": "\u2581", "add_prefix_space": True, "prepend_scheme": "always"}
    processor = surrounded({text: words.index(text) for text in FIRST}, "<s>", "</s>")
    processor["pair"].insert(3, {"SpecialToken": {"id": "</s>", "type_id": 0}})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": text, **entry} for number, text, entry in added],
        "normalizer": {
            "type": "Precompiled",
            "precompiled_charsmap": base64.b64encode(vocabulary.characters).decode(),
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "WhitespaceSplit"}, {"type": "Metaspace", **metaspace}],
        },
        "post_processor": processor,
        "decoder": {"type": "Metaspace", **metaspace},
        "model": {"type": "Unigram", "unk_id": 3, "vocab": [list(pair) for pair in zip(words, scores, strict=True)]},
    }
