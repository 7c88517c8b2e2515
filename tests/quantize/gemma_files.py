"""Small tokenizers of Gemma's two kinds: tokenizer.model, and tokenizer.json with merges over written-out spaces."""

from __future__ import annotations

import functools
import io
from typing import Any

from sentencepiece import SentencePieceTrainer

SPACE = "\u2581"
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|channel>", "<|image|>"]
MERGES = [("t", "h"), (SPACE, "th"), ("h", "e"), ("th", "e"), ("\n", "\n"), (SPACE, SPACE)]
TOKENS = [
    *SPECIAL,
    *(f"<0x{byte:02X}>" for byte in range(256)),
    *dict.fromkeys(part for merge in MERGES for part in (*merge, "".join(merge))),
    *"acdfg",
    "<tool_a>",
    "<tool_b>",
    "<unused7>",
]
FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}


@functools.cache
def sentencepiece_model() -> bytes:
    """Train a small SentencePiece BPE that takes texts as they are."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox", "jumps over the lazy dog"] * 20), model_writer=model,
        vocab_size=300, model_type="bpe", byte_fallback=True, add_dummy_prefix=False, remove_extra_whitespaces=False,
        normalization_rule_name="identity", hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return model.getvalue()


def sentencepiece_files() -> dict[str, Any]:
    """Return the files of a Gemma 2 or 3."""
    settings = {"tokenizer_class": "GemmaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return {"tokenizer.model": sentencepiece_model(), "tokenizer_config.json": settings | {"add_bos_token": True}}


def tokenizer_files() -> dict[str, Any]:
    """Return Gemma 4's kind of tokenizer.json, and the settings."""
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": token, "content": text, "special": True, **FLAGS} for token, text in enumerate(SPECIAL)
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": split,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "vocab": {text: token for token, text in enumerate(TOKENS)},
            "merges": MERGES,
        },
    }
    settings = {
        "tokenizer_class": "GemmaTokenizer",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "extra_special_tokens": {"sot_token": "<|turn>", "eot_token": {"content": "<turn|>"}},
        "model_specific_special_tokens": {"soc_token": "<|channel>", "image_token": "<|image|>"},
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}
