"""Prompt text to tokens, with BOS exactly as often as the model wants it: once or never."""

from __future__ import annotations

import functools
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING

import numpy as np

from app.errors import PromptRefusedError, UnsupportedFieldError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from app.llama.model import VocabularyModel

MAX_PROMPT_BYTES = 1024 * 1024

# Several pre-tokenizers (deepseek-llm, tekken, viking, ...) recurse in std::regex: 430 bytes of stack for each byte
# of a run of one class were measured, so that 26,000 letters in a row end a thread of the usual 8 MiB. What is touched
# of a stack stays resident for its thread's life: long prompts get a thread, and a stack, of their own.
SMALL_STACK_BYTES = 128 * 1024 * 1024
_LARGE_STACK_BYTES = 1024 * 1024 * 1024
_SMALL_PROMPT_BYTES = 64 * 1024

_SPECIAL_TOKEN_KEYS = {
    "unk_token": "unknown",
    "pad_token": "padding",
    "sep_token": "seperator",  # GGUF's own spelling
    "mask_token": "mask",
}


class Tokenizer:
    """Tokenizes prompts as llama-server does: special tokens that are written as text count as such tokens."""

    def __init__(self, model: VocabularyModel) -> None:
        self._model = model
        self._vocabulary = model.vocabulary

    def special_tokens(self) -> dict[str, str]:
        """Return the variables that templates know, as `bos_token`, of the tokens that the model has."""
        found = {"bos_token": self._vocabulary.bos, "eos_token": self._vocabulary.eos}
        for name, key in _SPECIAL_TOKEN_KEYS.items():
            written = self._model.metadata.get(f"tokenizer.ggml.{key}_token_id")
            found[name] = int(written) if written is not None else None
        return {name: self._vocabulary.token_text(token) for name, token in found.items() if token is not None}

    def rendered_chat(self, text: str) -> npt.NDArray[np.int32]:
        """Tokenize what the template gave; BOS is added only when the template did not write it."""
        tokens = self._tokenize(text, add_special=False, param="messages")
        bos = self._vocabulary.bos
        if self._vocabulary.adds_bos and bos is not None and (not len(tokens) or tokens[0] != bos):
            return np.concatenate(([bos], tokens)).astype(np.int32)
        return tokens

    def plain(self, text: str) -> npt.NDArray[np.int32]:
        """Tokenize a prompt as it is; a BOS that the client wrote out takes the place of the one we would add."""
        tokens = self._tokenize(text, add_special=True, param="prompt")
        bos = self._vocabulary.bos
        if self._vocabulary.adds_bos and bos is not None and len(tokens) > 1 and tokens[0] == tokens[1] == bos:
            return tokens[1:]
        return tokens

    def whole(self, text: str, *, param: str) -> npt.NDArray[np.int32]:
        """Tokenize a text for an encoder, with the tokens before and after it that the model wants."""
        return self._tokenize(text, add_special=True, param=param)

    def part(self, text: str, *, param: str) -> npt.NDArray[np.int32]:
        """Tokenize a text that others are put around."""
        return self._tokenize(text, add_special=False, param=param)

    @property
    def fills_in(self) -> bool:
        """Whether the model has tokens for filling in the middle."""
        vocabulary = self._vocabulary
        return None not in (vocabulary.fim_prefix, vocabulary.fim_suffix, vocabulary.fim_middle)

    def infill(self, before: str | npt.NDArray[np.int32], after: str) -> npt.NDArray[np.int32]:
        """Return the prompt whose answer comes between two texts: prefix, suffix, then the middle is the model's.

        Raises UnsupportedFieldError for a model that has no tokens for that.
        """
        vocabulary = self._vocabulary
        if not self.fills_in:
            raise UnsupportedFieldError(
                "'suffix' is not supported by this model: its vocabulary has no tokens for filling in the middle; "
                "leave it out, or serve a model that has them",
                param="suffix",
            )
        if isinstance(before, str):
            before = self._tokenize(before, add_special=False, param="prompt")
        suffix = self._tokenize(after, add_special=False, param="suffix")
        start = [vocabulary.bos] if vocabulary.adds_bos and vocabulary.bos is not None else []
        parts = ([*start, vocabulary.fim_prefix], before, [vocabulary.fim_suffix], suffix, [vocabulary.fim_middle])
        return np.concatenate([np.asarray(part, np.int32) for part in parts])

    def tokens(self, text: str, *, add_special: bool, parse_special: bool) -> npt.NDArray[np.int32]:
        """Return the tokens of any text, as asked."""
        return self._tokenize(text, add_special=add_special, parse_special=parse_special, param="content")

    def piece(self, token: int) -> bytes:
        """Return a token's bytes; of a control token, what it is written as."""
        return self._model.token_to_piece(token, special=True)

    def _tokenize(
        self, text: str, *, add_special: bool, param: str, parse_special: bool = True
    ) -> npt.NDArray[np.int32]:
        data = text.encode("utf-8", "replace")
        if len(data) > MAX_PROMPT_BYTES:
            raise PromptRefusedError(
                f"the prompt is {len(data)} bytes long as text, the limit is {MAX_PROMPT_BYTES}; shorten it",
                param=param,
            )
        tokenize = functools.partial(self._model.tokenize, data, add_special=add_special, parse_special=parse_special)
        return tokenize() if len(data) <= _SMALL_PROMPT_BYTES else _on_large_stack(tokenize)


def _on_large_stack(work: Callable[[], npt.NDArray[np.int32]]) -> npt.NDArray[np.int32]:
    """Run this on a thread that ends with it. Raises what the work raises, MemoryError when no thread can be had."""
    future: Future[npt.NDArray[np.int32]] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.stack_size(_LARGE_STACK_BYTES)
    thread = threading.Thread(target=run, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise MemoryError from error
    thread.join()
    return future.result()
