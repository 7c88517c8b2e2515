"""A small tokenizer.json of Gemma's kind: merges over text whose spaces are written out, and bytes for the rest."""

from __future__ import annotations

from typing import Any

SPACE = "\u2581"
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|channel>", "<|image|>"]
MERGES = [("t", "h"), (SPACE, "th"), ("h", "e"), ("th", "e"), ("\n", "\n"), (SPACE, SPACE)]
TOKENS = [
    *SPECIAL,
    *(f"<0x{byte:02X}>" for byte in range(256)),
    *dict.fromkeys(part for merge in MERGES for part in (*merge, "".join(merge))),
    *"acdfg",
]
FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}


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
        "model_specific_special_tokens": {"soc_token": "<|channel>"},
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}
