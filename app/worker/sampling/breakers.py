"""DRY's sequence breakers: texts across which no repetition counts, as the tokens that hold or begin them.

As in llama.cpp: a token that holds the whole text is a breaker alone; one that ends with the text's beginning is one
together with the tokens of the text's rest.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy.typing as npt

    Ids = npt.NDArray[np.intp]
    Tokens = npt.NDArray[np.int32]
    Tails = tuple[tuple[int, ...], ...]

LONGEST_TAIL = 20  # tokens of a breaker after its first, as in llama.cpp
_KEPT_TEXTS = 64


class Breakers(NamedTuple):
    """What breaks a repetition: tokens with the tails that must follow them, longest first; () for none."""

    tails: Mapping[int, Tails]
    singles: frozenset[int]  # the tokens that need no tail

    def end_of(self, history: Tokens, head: int) -> int | None:
        """Return the index after the longest breaker that begins at the index `head`, or None."""
        for tail in self.tails.get(int(history[head]), ()):
            end = head + 1 + len(tail)
            if end <= len(history) and tuple(history[head + 1 : end].tolist()) == tail:
                return end
        return None


NO_BREAKERS = Breakers({}, frozenset())


class BreakerTable:
    """Finds the breakers of texts in a vocabulary; remembers the last ones. For one thread at a time."""

    def __init__(self, words: Callable[[], Sequence[bytes]], tokenize: Callable[[bytes], Tokens]) -> None:
        """Take the vocabulary's tokens as bytes, called for when first needed, and its tokenizer."""
        self._words_of = words
        self._tokenize = tokenize
        self._text: npt.NDArray[np.uint8] | None = None  # all words, one after the other
        self._ends = np.empty(0, np.intp)
        self._known: OrderedDict[bytes, dict[int, set[tuple[int, ...]]]] = OrderedDict()

    def find(self, texts: Sequence[str]) -> Breakers:
        """Return what breaks a repetition for these texts, none of them empty."""
        together: dict[int, set[tuple[int, ...]]] = {}
        for text in texts:
            for token, tails in self._of(text.encode()).items():
                together.setdefault(token, set()).update(tails)
        ordered = {token: tuple(sorted(tails, key=len, reverse=True)) for token, tails in together.items()}
        return Breakers(ordered, frozenset(token for token, tails in together.items() if () in tails))

    def _of(self, text: bytes) -> dict[int, set[tuple[int, ...]]]:
        if text in self._known:
            self._known.move_to_end(text)
            return self._known[text]
        found: dict[int, set[tuple[int, ...]]] = {token: {()} for token in self._holding(text).tolist()}
        whole = frozenset(found)
        for size in range(1, len(text)):
            tokens = self._ending_with(text[:size])
            if len(tokens):
                tail = tuple(self._tokenize(text[size:])[:LONGEST_TAIL].tolist())
                for token in tokens.tolist():
                    if token not in whole:
                        found.setdefault(token, set()).add(tail)
        self._known[text] = found
        if len(self._known) > _KEPT_TEXTS:
            self._known.popitem(last=False)
        return found

    def _holding(self, text: bytes) -> Ids:
        letters = self._letters()
        places = np.flatnonzero(letters[: max(len(letters) - len(text) + 1, 0)] == text[0])
        for offset, letter in enumerate(text[1:], 1):
            places = places[letters[places + offset] == letter]
        words = self._ends.searchsorted(places, "right")
        return np.unique(words[places + len(text) <= self._ends[words]])

    def _ending_with(self, text: bytes) -> Ids:
        letters = self._letters()
        words = np.flatnonzero(np.diff(self._ends, prepend=0) >= len(text))
        for offset, letter in enumerate(reversed(text), 1):
            words = words[letters[self._ends[words] - offset] == letter]
        return words

    def _letters(self) -> npt.NDArray[np.uint8]:
        if self._text is None:
            words = self._words_of()
            self._ends = np.cumsum([len(word) for word in words])
            self._text = np.frombuffer(b"".join(words), np.uint8)
        return self._text
