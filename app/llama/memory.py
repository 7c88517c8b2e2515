"""What a context remembers of each sequence: the KV cache, or a recurrent state."""

from __future__ import annotations

from typing import Any

from app.llama.library import load


class Memory:
    """A view of the memory that belongs to a context; use it only while that context is open."""

    def __init__(self, pointer: Any) -> None:
        """View the `llama_memory_t` behind the pointer."""
        self._llama = load()
        self._pointer = pointer

    def length(self, sequence: int) -> int:
        """Return how many positions the sequence has reached (its largest position plus one)."""
        return int(self._llama.llama_memory_seq_pos_max(self._pointer, sequence)) + 1

    def rewind(self, sequence: int, length: int) -> bool:
        """Keep the first `length` positions of a sequence; False when this kind of memory can't cut there."""
        return bool(self._llama.llama_memory_seq_rm(self._pointer, sequence, length, -1))

    def copy(self, source: int, target: int) -> None:
        """Make a sequence the copy of another one, whatever it held before."""
        self.clear(target)
        self._llama.llama_memory_seq_cp(self._pointer, source, target, -1, -1)

    def clear(self, sequence: int) -> None:
        """Forget a whole sequence; that never fails."""
        self._llama.llama_memory_seq_rm(self._pointer, sequence, -1, -1)

    def clear_all(self) -> None:
        """Forget every sequence."""
        self._llama.llama_memory_clear(self._pointer, False)
