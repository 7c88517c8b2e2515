"""Prefixes that no slot holds any more: their KV states in the host's memory, and on disk if asked. Not thread-safe.

A state is taken when its slot is about to be overwritten, and goes back into a slot when a prompt begins with its
tokens. Within their limits of bytes both tiers keep what was used last. Nothing is shared between scopes.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from app.worker.kv import common_prefix

if TYPE_CHECKING:
    import numpy.typing as npt

    Tokens = npt.NDArray[np.int32]
    State = npt.NDArray[np.uint8]

LEAST_TOKENS = 256  # shorter prefixes are computed as fast as they are kept


@dataclass(slots=True, eq=False)
class StoredPrefix:
    """Tokens and the KV state after them; the state is None while it is only on disk, under `file`."""

    tokens: Tokens
    scope: str
    nbytes: int
    state: State | None = None
    file: str | None = None

    def covers(self, tokens: Tokens, scope: str) -> bool:
        """Whether it begins with these tokens."""
        return (
            self.scope == scope
            and len(self.tokens) >= len(tokens)
            and common_prefix(self.tokens, tokens) == len(tokens)
        )


class PrefixStore:
    """The books of both tiers; what is on disk is written and read by others (see `prefix_files`)."""

    def __init__(self, memory_bytes: int, *, can_rewind: bool = True) -> None:
        """Keep at most so many bytes of states in memory. `can_rewind`: whether a state can be cut to a shorter one."""
        self._limit = memory_bytes
        self._can_rewind = can_rewind
        self._entries: collections.OrderedDict[int, StoredPrefix] = collections.OrderedDict()  # the least recent first
        self.memory_bytes = 0

    def __len__(self) -> int:
        """Return the number of prefixes, of both tiers."""
        return len(self._entries)

    @property
    def keeps_states(self) -> bool:
        """Whether states may stay in memory at all."""
        return self._limit > 0

    def is_wanted(self, tokens: Tokens, scope: str, elsewhere: int = 0) -> bool:
        """Whether keeping these tokens' state would be worth it: enough of them that are kept nowhere else.

        `elsewhere`: leading tokens that a slot holds.
        """
        if len(tokens) - elsewhere < LEAST_TOKENS:
            return False
        for entry in self._entries.values():
            if entry.scope == scope:
                common = common_prefix(entry.tokens, tokens)
                if len(tokens) - common < (LEAST_TOKENS if self._can_rewind else 1):
                    return False
        return True

    def is_on_disk(self, tokens: Tokens, scope: str) -> bool:
        """Whether a file is there that begins with these tokens."""
        return any(entry.file is not None and entry.covers(tokens, scope) for entry in self._entries.values())

    def find(self, known: Tokens, scope: str) -> tuple[StoredPrefix | None, int]:
        """Return the entry with the longest common prefix, and its length; one token is left to compute."""
        best, longest = None, 0
        for entry in self._entries.values():
            if entry.scope == scope:
                common = min(common_prefix(entry.tokens, known), len(known) - 1)
                if not self._can_rewind and common < len(entry.tokens):
                    continue
                if common > longest:
                    best, longest = entry, common
        return best, longest

    def add(self, entry: StoredPrefix) -> None:
        """Keep a prefix; those in memory that it covers, and the least recent over the limit, go."""
        for other in list(self._entries.values()):
            if other.file is None and entry.covers(other.tokens, other.scope):
                self.remove(other)
        self._entries[id(entry)] = entry
        self.memory_bytes += _in_memory(entry)
        self._shrink()

    def remove(self, entry: StoredPrefix) -> None:
        """Forget a prefix, if it is known."""
        if self._entries.pop(id(entry), None) is not None:
            self.memory_bytes -= _in_memory(entry)

    def use(self, entry: StoredPrefix) -> None:
        """Note that a prefix was of use."""
        if id(entry) in self._entries:
            self._entries.move_to_end(id(entry))

    def loaded(self, entry: StoredPrefix, state: State) -> None:
        """Take the state of a prefix that was on disk only."""
        if id(entry) in self._entries and entry.state is None:
            entry.state = state
            self.memory_bytes += _in_memory(entry)
            self.use(entry)
            self._shrink(entry)

    def _shrink(self, spared: StoredPrefix | None = None) -> None:
        for entry in list(self._entries.values()):
            if self.memory_bytes <= self._limit:
                return
            if entry.state is not None and entry is not spared:
                self.memory_bytes -= _in_memory(entry)
                entry.state = None
                if entry.file is None:
                    del self._entries[id(entry)]


def _in_memory(entry: StoredPrefix) -> int:
    return 0 if entry.state is None else entry.nbytes
