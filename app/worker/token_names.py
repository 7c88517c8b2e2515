"""Tokens of an answer as clients see them beside their log probabilities."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from app.messages import TokenLogprob

if TYPE_CHECKING:
    from app.llama.vocab import Vocabulary
    from app.worker.sampling.logprobs import RowLogprobs

_LEAST_LOGPROB = -9999.0  # JSON knows no infinity


class TokenNames:
    """The bytes of every token, also of those that have none in an answer."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._pieces = vocabulary.pieces

    @functools.lru_cache(maxsize=16)  # noqa: B019 - it lives as long as the process
    def shown(self, texts: tuple[str, ...]) -> dict[int, bytes]:
        """Return the control tokens in these texts, with the bytes that an answer shows of them."""
        tokens = {token for text in texts for token in self._vocabulary.tokenize(text, parse_special=True).tolist()}
        return {token: self.name(token) for token in tokens if not self._pieces[token]}

    def logprob(self, token: int, detail: RowLogprobs) -> TokenLogprob:
        """Return a drawn token's entry."""
        best = [(other, self.name(other), max(logprob, _LEAST_LOGPROB)) for other, logprob in detail.top]
        return TokenLogprob(token, self.name(token), max(detail.of(token), _LEAST_LOGPROB), best)

    def name(self, token: int) -> bytes:
        """Return a token's bytes; of a control token, what it is written as."""
        return self._pieces[token] or self._vocabulary.token_to_piece(token, special=True)
