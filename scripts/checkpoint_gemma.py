"""Write the tokenizer files of a Gemma from the vocabulary that a GGUF carries."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from checkpoint_vocabulary import CONTROL, USER_DEFINED, write_tokenizer
from checkpoint_writer import write_json

if TYPE_CHECKING:
    from pathlib import Path

    from checkpoint_vocabulary import Vocabulary

SPACE = "\u2581"
ROLES = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"}
MORE_ROLES = {
    "sot_token": "<|turn>",
    "eot_token": "<turn|>",
    "soc_token": "<|channel>",
    "eoc_token": "<channel|>",
    "think_token": "<|think|>",
    "std_token": "<|tool>",
    "etd_token": "<tool|>",
    "stc_token": "<|tool_call>",
    "etc_token": "<tool_call|>",
    "str_token": "<|tool_response>",
    "etr_token": "<tool_response|>",
    "escape_token": '<|"|>',
    "boi_token": "<|image>",
    "image_token": "<|image|>",
    "eoi_token": "<image|>",
    "boa_token": "<|audio>",
    "audio_token": "<|audio|>",
    "eoa_token": "<audio|>",
    "video_token": "<|video|>",
}
write_gemma = partial(write_tokenizer, dummy_prefix=False)
"""Write the files of a Gemma 2 or 3: SentencePiece, but a text does not begin as if a space were before it."""


def write_gemma4(folder: Path, vocabulary: Vocabulary, *, context_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    write_json(folder / "tokenizer.json", _tokenizer(vocabulary))
    config: dict[str, Any] = {
        **ROLES,
        "extra_special_tokens": MORE_ROLES,
        "model_max_length": context_length,
        "tokenizer_class": "GemmaTokenizer",
    }
    write_json(folder / "tokenizer_config.json", dict(sorted(config.items())))
    if vocabulary.chat_template is not None:
        (folder / "chat_template.jinja").write_text(vocabulary.chat_template, encoding="utf-8")


def _tokenizer(vocabulary: Vocabulary) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    replaced = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token, "content": text, **flags}
            for token, (text, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
            if kind in {CONTROL, USER_DEFINED}
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [replaced, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {text: token for token, text in enumerate(vocabulary.tokens)},
            "merges": [merge.split(" ") for merge in vocabulary.merges],
        },
    }
