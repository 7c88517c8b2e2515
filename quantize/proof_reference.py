"""The tokenizer that a checkpoint brings, run by the library that it was made for: what llama.cpp must agree with."""

from __future__ import annotations

import dataclasses
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from app.errors import TokenizerError
from quantize.pretokenizers import as_llama_cpp_splits
from quantize.vocab_tokens import looks_special

Ids = list[int]

_SENTENCEPIECE_FILE = "tokenizer.model"

_DROPS_SPACES = "llama.cpp drops spaces behind special tokens of models that are called Phi-3"
_KEEPS_SPACES = "llama.cpp keeps spaces beside special tokens that the model's own tokenizer strips"


@dataclasses.dataclass(frozen=True, slots=True)
class Special:
    """A token that is written as such: its id, its text, and whether it steers the model and is no part of speech.

    `lstrip` and `rstrip` say that it takes the spaces beside it away.
    """

    id: int
    text: str
    control: bool
    lstrip: bool = False
    rstrip: bool = False


class Reference(Protocol):
    """A checkpoint's own tokenizer."""

    specials: list[Special]
    """The tokens that are found in a text before anything else."""

    def encode(self, texts: list[str]) -> list[Ids]:
        """Return each text's token ids, without BOS and EOS."""

    def leeway(self, text: str, expected: Ids, llama_cpp: Callable[[str], Ids]) -> str | None:
        """Say which habit of llama.cpp, that no key of a GGUF can change, explains other ids; None if none does."""


def has_sentencepiece(folder: Path) -> bool:
    """Tell whether a model's folder has a SentencePiece model."""
    return (folder / _SENTENCEPIECE_FILE).is_file()


def open_reference(folder: Path, *, sentencepiece: bool) -> Reference:
    """Open the tokenizer of a model's folder. Raises `TokenizerError` that names the file."""
    if sentencepiece and has_sentencepiece(folder):
        return _SentencePieceReference(folder)
    return _TokenizersReference(folder / "tokenizer.json")


class _TokenizersReference:
    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer  # noqa: PLC0415 - only one kind of reference is needed

        self._path = path
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exceptions
            raise TokenizerError(f"{path}: the tokenizers library cannot read it: {error}") from error
        self._tokenizer.no_padding()  # as sentence-transformers leaves it in the file
        self._tokenizer.no_truncation()
        self._relaxed: Any = None
        steering = _steering_tokens(path.parent)
        self.specials = [
            Special(
                token,
                entry.content,
                entry.special or entry.content in steering or looks_special(entry.content),
                entry.lstrip,
                entry.rstrip,
            )
            for token, entry in self._tokenizer.get_added_tokens_decoder().items()
        ]

    def encode(self, texts: list[str]) -> list[Ids]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def leeway(self, text: str, expected: Ids, llama_cpp: Callable[[str], Ids]) -> str | None:
        found = llama_cpp(text)
        stripped = _without_stripped_spaces(text, self.specials)
        if stripped != text and llama_cpp(stripped) == expected:
            return _KEEPS_SPACES
        normalizer = self._tokenizer.normalizer
        if type(normalizer).__name__ == "BertNormalizer":
            spaced = text.translate({0x0B: " ", 0x0C: " "})
            if found in self.encode([spaced, _as_llama_cpp_prepares(spaced)]):
                return "llama.cpp prepares text for WordPiece in its own way (vowel signs, Korean, \\v and \\f)"
            return None
        if type(self._tokenizer.model).__name__ == "Unigram":
            plain = unicodedata.normalize("NFKC", text.replace("\x85", " "))
            if self.encode([plain])[0] == llama_cpp(plain):
                return "llama.cpp normalizes text as SentencePiece does, and tokenizer.json in part (NFKC, U+0085)"
        if normalizer is not None:
            normal = normalizer.normalize_str(stripped)
            if normal != text and llama_cpp(normal) == expected:
                return "llama.cpp does not bring text into the normal form of tokenizer.json"
        if self._relaxed is None:
            self._relaxed = self._with_llama_cpp_splits() or False
        if self._relaxed and self._relaxed.encode(text, add_special_tokens=False).ids == found:
            return "llama.cpp splits words with capitals or marks outside of ASCII in another way than tokenizer.json"
        return None

    def _with_llama_cpp_splits(self) -> Any:
        from tokenizers import Tokenizer  # noqa: PLC0415

        definition = {**json.loads(self._path.read_bytes()), "padding": None, "truncation": None}
        changed = as_llama_cpp_splits(definition)
        return Tokenizer.from_str(json.dumps(changed)) if changed is not None else None


class _SentencePieceReference:
    def __init__(self, folder: Path) -> None:
        from sentencepiece import SentencePieceProcessor  # noqa: PLC0415 - only one kind of reference is needed

        path = folder / _SENTENCEPIECE_FILE
        try:
            self._processor = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise TokenizerError(f"{path}: not a SentencePiece model: {error}") from error
        self.specials = list(_added_to_sentencepiece(folder, self._processor))
        written = sorted((re.escape(special.text) for special in self.specials if special.text), key=len, reverse=True)
        self._cut = re.compile("|".join(written)) if written else None

    def encode(self, texts: list[str]) -> list[Ids]:
        return [list(ids) for ids in self._processor.encode(texts)]

    def leeway(self, text: str, expected: Ids, llama_cpp: Callable[[str], Ids]) -> str | None:
        if self._cut and self._cut.search(text):  # the library knows nothing of added tokens
            found = llama_cpp(text)
            if self._in_parts(_without_stripped_spaces(text, self.specials)) == found:
                return ""
            if self._in_parts(text) == found:
                return _KEEPS_SPACES
            hungry = [dataclasses.replace(special, rstrip=True) for special in self.specials]
            return _DROPS_SPACES if self._in_parts(_without_stripped_spaces(text, hungry)) == found else None
        normal = self._processor.normalize(text).replace("\u2581", " ")
        if llama_cpp(normal.removeprefix(" ")) == expected:
            return "llama.cpp does not normalize text as tokenizer.model asks"
        return None

    def _in_parts(self, text: str) -> Ids:
        ids = {special.text: special.id for special in self.specials}
        found: Ids = []
        place = 0
        for match in self._cut.finditer(text) if self._cut else ():
            found += [*self._part(text[place : match.start()]), ids[match[0]]]
            place = match.end()
        return found + self._part(text[place:])

    def _part(self, text: str) -> Ids:
        return list(self._processor.encode(text)) if text else []


def _without_stripped_spaces(text: str, specials: list[Special]) -> str:
    for special in specials:
        if (special.lstrip or special.rstrip) and special.text in text:
            left, right = r"\s*" if special.lstrip else "", r"\s*" if special.rstrip else ""
            text = re.sub(f"{left}({re.escape(special.text)}){right}", r"\1", text)
    return text


def _as_llama_cpp_prepares(text: str) -> str:
    """Do what llama.cpp does before it looks up words of a WordPiece vocabulary, where BERT does otherwise."""
    kept: list[str] = []
    for letter in text:
        parts = unicodedata.normalize("NFD", letter)
        if "\uac00" <= letter <= "\ud7a3":
            kept.append(parts[0])
        else:
            kept += [part for part in parts if not unicodedata.category(part).startswith("M")]
    return "".join(kept)


def _added_to_sentencepiece(folder: Path, processor: Any) -> Iterator[Special]:
    found: dict[str, Special] = {}
    for token in range(processor.vocab_size()):
        if processor.IsControl(token):
            found[processor.IdToPiece(token)] = Special(token, processor.IdToPiece(token), True)
    for entry in _entries(folder):
        text = entry["content"]
        control = bool(entry.get("special")) or looks_special(text)
        found[text] = Special(int(entry["id"]), text, control, bool(entry.get("lstrip")), bool(entry.get("rstrip")))
    yield from found.values()


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    content: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    return content


def _entries(folder: Path) -> Iterable[dict[str, Any]]:
    decoder = _settings(folder).get("added_tokens_decoder") or {}
    return [{**entry, "id": number} for number, entry in decoder.items()]


def _steering_tokens(folder: Path) -> set[str]:
    """Return the tokens that tokenizer_config.json calls special; it overrules tokenizer.json."""
    settings = _settings(folder)
    found = {entry["content"] for entry in _entries(folder) if entry.get("special")}
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value]
        if name.endswith(("_token", "special_tokens")):
            found |= {str(item.get("content")) if isinstance(item, dict) else str(item) for item in values}
    return found
