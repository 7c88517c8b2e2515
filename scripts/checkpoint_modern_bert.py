"""Write the tokenizer files of ModernBERT, whose vocabulary is that of GPT-NeoX with other special tokens."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from checkpoint_vocabulary import CONTROL, USER_DEFINED, write_tokenizer
from checkpoint_wordpiece import ROLES, surrounded
from checkpoint_writer import write_json

if TYPE_CHECKING:
    from pathlib import Path

    from checkpoint_vocabulary import Vocabulary

SIZE = 50368
FIRST_OWN = 50277  # before it: GPT-NeoX's own
SPECIAL = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]


def write_modern_bert(folder: Path, vocabulary: Vocabulary, *, context_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json from GPT-NeoX's vocabulary."""
    own = ["|||EMAIL_ADDRESS|||", "|||PHONE_NUMBER|||", "<|endoftext|>", *SPECIAL]
    own += [f"[unused{number}]" for number in range(SIZE - FIRST_OWN - len(own))]
    control = {"<|endoftext|>", *SPECIAL}
    tokens = ["|||IP_ADDRESS|||", *vocabulary.tokens[1:FIRST_OWN], *own]
    types = [USER_DEFINED, *vocabulary.types[1:FIRST_OWN]]
    types += [CONTROL if token in control else USER_DEFINED for token in own]
    special = {role: tokens.index(text) for role, text in ROLES.items()}
    words = dataclasses.replace(vocabulary, pre="modern-bert", tokens=tokens, types=types, special=special)
    write_tokenizer(folder, words, context_length=context_length)
    tokenizer: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["post_processor"] = surrounded({text: tokens.index(text) for text in SPECIAL}, "[CLS]", "[SEP]")
    for entry in tokenizer["added_tokens"]:
        entry |= {"normalized": not entry["special"], "lstrip": entry["content"] == "[MASK]"}
    write_json(folder / "tokenizer.json", tokenizer)
    config: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["added_tokens_decoder"] = {
        str(entry["id"]): {name: value for name, value in entry.items() if name != "id"}
        for entry in tokenizer["added_tokens"]
    }
    write_json(folder / "tokenizer_config.json", {**config, "clean_up_tokenization_spaces": True})
