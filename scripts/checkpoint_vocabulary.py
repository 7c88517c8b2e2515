"""Rebuild a checkpoint's tokenizer files from the vocabulary that a GGUF carries.

Byte-level BPE vocabularies become `tokenizer.json`; SentencePiece vocabularies become `tokenizer.model`. The files are
what the original checkpoints have, as far as the GGUF still tells: same tokens, merges, scores and kinds of token.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from checkpoint_writer import write_json
from splitters import SPLITTERS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
SPECIAL_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


@dataclass(frozen=True)
class Vocabulary:
    """A GGUF's vocabulary: `model` is gpt2 (byte-level BPE) or llama (SentencePiece); `special` maps roles to ids."""

    model: str
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str]
    scores: Sequence[float]
    special: Mapping[str, int]
    add_bos: bool
    chat_template: str | None
    characters: bytes = b""  # of a unigram vocabulary: the precompiled map of its normalizer

    @classmethod
    def from_gguf(cls, values: Mapping[str, Any]) -> Vocabulary:
        """Take it from a GGUF's key-value pairs."""
        special = {
            role: int(values[key])
            for role, key in ((r, f"tokenizer.ggml.{n}_token_id") for r, n in SPECIAL_ROLES.items())
            if key in values
        }
        model, pre = values["tokenizer.ggml.model"], values.get("tokenizer.ggml.pre", "default")
        return cls(
            model=model,
            pre=pre,
            tokens=values["tokenizer.ggml.tokens"],
            types=_types(values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]),
            merges=values.get("tokenizer.ggml.merges", []),
            scores=[float(score) for score in values.get("tokenizer.ggml.scores", [])],
            special=special,
            add_bos=bool(values.get("tokenizer.ggml.add_bos_token", model == "llama" or "llama" in pre)),
            chat_template=values.get("tokenizer.chat_template"),
            characters=bytes(values.get("tokenizer.ggml.precompiled_charsmap", b"")),
        )

    def truncated(self, size: int) -> Vocabulary:
        """Keep the first `size` ordinary tokens, all special ones, and the merges that still make sense.

        Byte-level BPE only, where a token's number follows from its merge's rank, so that a prefix is closed.
        """
        keep = [i for i, kind in enumerate(self.types) if i < size or kind != NORMAL]
        tokens = [self.tokens[i] for i in keep]
        known = set(tokens)
        merges = [m for m in self.merges if set(m.split(" ")) <= known and m.replace(" ", "") in known]
        special = {role: keep.index(token) for role, token in self.special.items()}
        types = [self.types[i] for i in keep]
        return Vocabulary(self.model, self.pre, tokens, types, merges, [], special, self.add_bos, self.chat_template)


def write_tokenizer(folder: Path, vocabulary: Vocabulary, *, context_length: int, dummy_prefix: bool = True) -> None:
    """Write tokenizer.json or tokenizer.model, tokenizer_config.json and special_tokens_map.json.

    `dummy_prefix` is for SentencePiece: whether a text begins as if a space were before it.
    """
    if vocabulary.model == "llama":
        count = _piece_count(vocabulary)
        (folder / "tokenizer.model").write_bytes(_sentencepiece_model(vocabulary, count, dummy_prefix=dummy_prefix))
        added = {text: i for i, text in enumerate(vocabulary.tokens) if i >= count and vocabulary.types[i] != UNUSED}
        if added:
            write_json(folder / "added_tokens.json", added)
    else:
        write_json(folder / "tokenizer.json", _byte_level_bpe(vocabulary))
    special = {role: vocabulary.tokens[token] for role, token in vocabulary.special.items()}
    write_json(folder / "special_tokens_map.json", {role: _added_token(text) for role, text in special.items()})
    config: dict[str, Any] = {
        "added_tokens_decoder": {
            str(i): {**_added_token(vocabulary.tokens[i]), "special": kind != USER_DEFINED}
            for i, kind in enumerate(vocabulary.types)
            if kind in {UNKNOWN, CONTROL, USER_DEFINED} and vocabulary.tokens[i] != f"[PAD{i}]"
        },
        "clean_up_tokenization_spaces": False,
        **special,
        "model_max_length": context_length,
        **_class_settings(vocabulary),
    }
    if vocabulary.chat_template is not None:
        config["chat_template"] = vocabulary.chat_template
    write_json(folder / "tokenizer_config.json", dict(sorted(config.items())))


def _class_settings(vocabulary: Vocabulary) -> dict[str, Any]:
    if vocabulary.model == "llama":
        return {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": vocabulary.add_bos,
            "add_eos_token": False,
            "legacy": False,
            "sp_model_kwargs": {},
        }
    if vocabulary.pre == "smollm":
        return {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "vocab_size": len(vocabulary.tokens)}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}


def _added_token(content: str) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


def _byte_level_bpe(vocabulary: Vocabulary) -> dict[str, Any]:
    """Build tokenizer.json. Llama 3 and Qwen keep special tokens out of the model's vocabulary, the others in it."""
    if vocabulary.pre not in SPLITTERS:
        raise ValueError(f"pre-tokenizer {vocabulary.pre!r} is not known here: only {', '.join(SPLITTERS)}")
    splitter = SPLITTERS[vocabulary.pre]
    kinds = {i: kind for i, kind in enumerate(vocabulary.types) if vocabulary.tokens[i] != f"[PAD{i}]"}
    added = [i for i, kind in kinds.items() if kind in {UNKNOWN, CONTROL, USER_DEFINED}]
    outside = set(added) if splitter.specials_outside else set()
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, **_added_token(vocabulary.tokens[i]), "special": vocabulary.types[i] != USER_DEFINED}
            for i in added
        ],
        "normalizer": splitter.normalizer,
        "pre_tokenizer": splitter.pre_tokenizer,
        "post_processor": _bos_template(vocabulary) if vocabulary.add_bos else None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": splitter.whole_words,
            "vocab": {vocabulary.tokens[i]: i for i in kinds if i not in outside},
            "merges": list(vocabulary.merges),
        },
    }


def _bos_template(vocabulary: Vocabulary) -> dict[str, Any]:
    bos = vocabulary.tokens[vocabulary.special["bos_token"]]
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            {"SpecialToken": {"id": bos, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": bos, "type_id": 1}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {bos: {"id": bos, "ids": [vocabulary.special["bos_token"]], "tokens": [bos]}},
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    return {"type": "Sequence", "processors": [byte_level, template]}


def _types(tokens: Sequence[str], types: Sequence[int]) -> list[int]:
    # older files call the rows that no token has unknown
    return [
        UNUSED if text == f"[PAD{i}]" else int(kind) for i, (text, kind) in enumerate(zip(tokens, types, strict=True))
    ]


def _piece_count(vocabulary: Vocabulary) -> int:
    """Return how many tokens tokenizer.model has: what comes after the last ordinary one was added later."""
    return max(i for i, kind in enumerate(vocabulary.types) if kind in {NORMAL, BYTE}) + 1


def _sentencepiece_model(vocabulary: Vocabulary, count: int, *, dummy_prefix: bool) -> bytes:
    """Encode a ModelProto (field numbers of sentencepiece_model.proto), as Llama 2's tokenizer.model is one."""
    kinds = [UNKNOWN, CONTROL, CONTROL, *vocabulary.types[3:count]]  # <unk>, <s> and </s>, whatever became of them
    pieces = b"".join(
        proto_piece(text, score, kind)
        for text, score, kind in zip(vocabulary.tokens, vocabulary.scores, kinds, strict=False)
    )
    bpe = 2
    trainer = proto_number(3, bpe) + proto_number(4, count) + proto_number(25, 1) + proto_number(35, 1)
    # spaces are kept
    normalizer = proto_field(1, b"identity") + proto_number(3, int(dummy_prefix)) + proto_number(4, 0)
    return pieces + proto_field(2, trainer) + proto_field(3, normalizer)


def proto_piece(text: str, score: float, kind: int) -> bytes:
    """Encode a piece as a ModelProto has it."""
    piece = proto_field(1, text.encode()) + proto_float(2, score) + (proto_number(3, kind) if kind != NORMAL else b"")
    return proto_field(1, piece)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def proto_number(field: int, value: int) -> bytes:
    """Encode a number as a field of a protocol buffer."""
    return _varint(field << 3) + _varint(value)


def proto_float(field: int, value: float) -> bytes:
    """Encode a float as a field of a protocol buffer."""
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def proto_field(field: int, value: bytes) -> bytes:
    """Encode a message or text as a field of a protocol buffer."""
    return _varint(field << 3 | 2) + _varint(len(value)) + value
