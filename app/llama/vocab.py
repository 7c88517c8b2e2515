"""A model's vocabulary: text to tokens, tokens to bytes, and the tokens with a meaning of their own."""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from app.errors import EngineError
from app.llama.library import load

if TYPE_CHECKING:
    import numpy.typing as npt

_PIECE_BYTES = 128  # longer pieces are rare, and cost a second call
_TOKENIZE_OVERFLOW = -(2**31)


class Vocabulary:
    """A view of the vocabulary that belongs to a model; use it only while that model is open.

    Tokenizing and reading pieces is thread-safe. Some pre-tokenizers recurse: tokenize long texts on a thread with a
    large stack, in a process whose death can be borne.
    """

    def __init__(self, pointer: Any) -> None:
        """View the `llama_vocab` behind the pointer."""
        self._llama = load()
        self._pointer = pointer
        self.size: int = self._llama.llama_vocab_n_tokens(pointer)
        self.bos = self._token_or_none(self._llama.llama_vocab_bos(pointer))
        self.eos = self._token_or_none(self._llama.llama_vocab_eos(pointer))
        self.sep = self._token_or_none(self._llama.llama_vocab_sep(pointer))
        self.adds_bos: bool = self._llama.llama_vocab_get_add_bos(pointer)
        self.adds_eos: bool = self._llama.llama_vocab_get_add_eos(pointer)
        self.adds_sep: bool = self._llama.llama_vocab_get_add_sep(pointer)
        self.fim_prefix = self._token_or_none(self._llama.llama_vocab_fim_pre(pointer))
        self.fim_suffix = self._token_or_none(self._llama.llama_vocab_fim_suf(pointer))
        self.fim_middle = self._token_or_none(self._llama.llama_vocab_fim_mid(pointer))

    @functools.cached_property
    def eog(self) -> frozenset[int]:
        """Every token that ends a generation: EOS, EOT and the like."""
        is_eog = self._llama.llama_vocab_is_eog
        return frozenset(token for token in range(self.size) if is_eog(self._pointer, token))

    @functools.cached_property
    def pieces(self) -> list[bytes]:
        """The bytes of every token as they appear in an answer; control tokens are empty. Built on first use."""
        read, pointer, buffer = (
            self._llama.llama_token_to_piece,
            self._pointer,
            ctypes.create_string_buffer(_PIECE_BYTES),
        )
        pieces: list[bytes] = []
        for token in range(self.size):
            count = read(pointer, token, buffer, _PIECE_BYTES, 0, False)
            pieces.append(buffer.raw[:count] if count >= 0 else self.token_to_piece(token))
        return pieces

    @functools.cached_property
    def words(self) -> list[bytes]:
        """The bytes of every token as a text of its own, control tokens as they are written. Built on first use.

        They differ from `pieces` where a vocabulary writes a space before its words, which a text does not begin with.
        """
        buffer, token = ctypes.create_string_buffer(_PIECE_BYTES), (ctypes.c_int32 * 1)()
        words: list[bytes] = []
        for token[0] in range(self.size):
            count = self._llama.llama_detokenize(self._pointer, token, 1, buffer, len(buffer), False, True)
            if count < 0:
                buffer = ctypes.create_string_buffer(-count)
                count = self._llama.llama_detokenize(self._pointer, token, 1, buffer, len(buffer), False, True)
            words.append(buffer.raw[:count])
        return words

    def tokenize(
        self, text: str | bytes, *, add_special: bool = False, parse_special: bool = False
    ) -> npt.NDArray[np.int32]:
        """Return the token ids of a text, shape (n,), int32.

        `add_special` adds BOS (and EOS) where the model wants them; `parse_special` reads control tokens written as
        text as these tokens, which must not happen to what users typed.
        """
        data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        tokens = np.empty(len(data) + 16, np.int32)  # more than a token a byte is rare
        count = self._tokenize_into(data, tokens, add_special, parse_special)
        if count < 0 and count != _TOKENIZE_OVERFLOW:
            tokens = np.empty(-count, np.int32)
            count = self._tokenize_into(data, tokens, add_special, parse_special)
        if count < 0:
            raise EngineError(f"llama.cpp cannot tokenize a text of {len(data)} bytes: too many tokens")
        return tokens[:count].copy()

    def _tokenize_into(self, data: bytes, tokens: npt.NDArray[np.int32], add_special: bool, parse_special: bool) -> int:
        buffer = tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        count: int = self._llama.llama_tokenize(
            self._pointer, data, len(data), buffer, len(tokens), add_special, parse_special
        )
        return count

    def token_to_piece(self, token: int, *, special: bool = False) -> bytes:
        """Return the bytes of one token; those of control tokens only with `special`. Raises EngineError."""
        if not 0 <= token < self.size:
            raise EngineError(f"token {token} is outside the vocabulary of {self.size}")
        buffer = ctypes.create_string_buffer(_PIECE_BYTES)
        count = self._llama.llama_token_to_piece(self._pointer, token, buffer, len(buffer), 0, special)
        if count < 0:
            buffer = ctypes.create_string_buffer(-count)
            count = self._llama.llama_token_to_piece(self._pointer, token, buffer, len(buffer), 0, special)
        return buffer.raw[:count]

    def token_text(self, token: int) -> str:
        """Return a token as it is written in the vocabulary, as "<|im_end|>"; empty for an absent one."""
        if not 0 <= token < self.size:
            return ""
        text: bytes | None = self._llama.llama_vocab_get_text(self._pointer, token)
        return (text or b"").decode("utf-8", "replace")

    @staticmethod
    def _token_or_none(token: int) -> int | None:
        return token if token >= 0 else None
