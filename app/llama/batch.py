"""The tokens of one `llama_decode`, written through numpy: a token costs nothing beyond its bytes."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

from app.errors import DecodeError
from app.llama.library import load

if TYPE_CHECKING:
    import numpy.typing as npt


class Batch:
    """A `llama_batch` for up to `capacity` tokens, one sequence a token.

    The arrays are numpy's own and the struct points into them, so there is nothing to free.
    """

    def __init__(self, capacity: int) -> None:
        """Allocate the arrays once; they are reused for every step."""
        llama = load()
        self.capacity = capacity
        self.rows = 0  # tokens whose logits were asked for
        self._token = np.zeros(capacity, np.int32)
        self._position = np.zeros(capacity, np.int32)
        self._sequence = np.zeros(capacity, np.int32)
        self._wants_logits = np.zeros(capacity, np.int8)
        self._sequence_count = np.ones(capacity, np.int32)
        first = self._sequence.ctypes.data
        self._sequence_pointers = np.arange(first, first + 4 * capacity, 4, dtype=np.uintp)
        self.structure: Any = llama.llama_batch(
            n_tokens=0,
            token=_pointer(self._token, llama.llama_token),
            pos=_pointer(self._position, llama.llama_pos),
            n_seq_id=_pointer(self._sequence_count, ctypes.c_int32),
            seq_id=_pointer(self._sequence_pointers, ctypes.POINTER(llama.llama_seq_id)),
            logits=_pointer(self._wants_logits, ctypes.c_int8),
        )

    def __len__(self) -> int:
        """Return the number of tokens in the batch."""
        return int(self.structure.n_tokens)

    def clear(self) -> None:
        """Make the batch empty."""
        self.structure.n_tokens = 0
        self.rows = 0

    def add(self, sequence: int, start: int, tokens: npt.NDArray[np.int32], *, wants_logits: int) -> None:
        """Append tokens of one sequence at positions start, start + 1, ...; the last `wants_logits` get logits.

        Raises DecodeError when they don't fit: llama.cpp would abort.
        """
        first = self.structure.n_tokens
        count = len(tokens)
        end = first + count
        if end > self.capacity:
            raise DecodeError(f"{end} tokens do not fit into a batch of {self.capacity}")
        self._token[first:end] = tokens
        self._position[first:end] = start if count == 1 else np.arange(start, start + count, dtype=np.int32)
        self._sequence[first:end] = sequence
        self._wants_logits[first:end] = 0
        if wants_logits:
            self._wants_logits[end - wants_logits : end] = 1
            self.rows += wants_logits
        self.structure.n_tokens = end

    def add_streams(self, sequences: list[int], positions: list[int], tokens: list[int]) -> None:
        """Append one token of each sequence at its position, with logits; as `add`, for all of them at once."""
        first = self.structure.n_tokens
        end = first + len(tokens)
        if end > self.capacity:
            raise DecodeError(f"{end} tokens do not fit into a batch of {self.capacity}")
        self._token[first:end] = tokens
        self._position[first:end] = positions
        self._sequence[first:end] = sequences
        self._wants_logits[first:end] = 1
        self.rows += len(tokens)
        self.structure.n_tokens = end

    def want_logits_from(self, first: int) -> None:
        """Ask for the logits of every token of the batch from index `first` on, and of none before it."""
        count = len(self)
        self._wants_logits[:first] = 0
        self._wants_logits[first:count] = 1
        self.rows = count - first


def _pointer(array: npt.NDArray[Any], kind: Any) -> Any:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))
