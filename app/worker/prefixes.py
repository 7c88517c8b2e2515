"""Moves prefixes between the context's slots, the host's memory and the disk. Belongs to the engine's thread."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from app.worker.prefix_store import PrefixStore, StoredPrefix

if TYPE_CHECKING:
    from collections.abc import Callable

    from app.llama.context import Context
    from app.worker.kv import Placement, Slot
    from app.worker.prefix_files import PrefixFiles
    from app.worker.prefix_store import State, Tokens
    from app.worker.sequence import Sequence

_WORTH_RESTORING = 64  # tokens beyond what is in the context already
_LEAST_TOKENS_ON_DISK = 512
_SAVED_FOR_ONE_USED = 8  # states that may be saved in vain for one that is of use
_SEEN_AGAIN = 100
_WEIGHT_OF_NEWEST = 0.3


class SavingCost:
    """Whether keeping a state pays: computing its tokens again must take several times as long as saving it.

    On a CPU that is so by far; a GPU computes about as fast as it copies to the host.
    """

    def __init__(self) -> None:
        self._byte_seconds: float | None = None
        self._passed_over = 0

    def observe(self, nbytes: int, seconds: float) -> None:
        """Learn from a state that was saved."""
        newest = seconds / max(nbytes, 1)
        old = self._byte_seconds
        self._byte_seconds = newest if old is None else old + _WEIGHT_OF_NEWEST * (newest - old)

    def pays(self, nbytes: int, compute_seconds: float) -> bool:
        """Tell whether to save so much, given the time to compute it again; now and then in any case, to learn."""
        if self._byte_seconds is None or compute_seconds >= _SAVED_FOR_ONE_USED * self._byte_seconds * nbytes:
            return True
        self._passed_over += 1
        return self._passed_over % _SEEN_AGAIN == 0


class PrefixLoaded(NamedTuple):
    """A prefix's state has come from the disk; None if it could not be read."""

    entry: StoredPrefix
    state: State | None


class Prefixes:
    """The two tiers below the slots."""

    def __init__(
        self,
        context: Context,
        store: PrefixStore,
        files: PrefixFiles | None,
        loaded: Callable[[PrefixLoaded], None],
    ) -> None:
        """Begin with what is on disk. `loaded` is called from another thread; its argument must come to `take`."""
        self._context = context
        self._store = store
        self._files = files
        self._loaded = loaded
        self._cost = SavingCost()
        self._waiting: dict[int, list[Sequence]] = {}  # by entry
        for entry in files.known() if files else ():
            store.add(entry)

    def offer(self, sequence: Sequence, in_slots: int) -> None:
        """Have the longest stored prefix of a sequence read, if it is on disk and longer than what slots hold."""
        entry, common = self._store.find(sequence.tokens[: sequence.n_tokens], sequence.scope)
        if entry is None or self._files is None or entry.state is not None or common < in_slots + _WORTH_RESTORING:
            return
        sequence.awaits_state = entry
        waiting = self._waiting.setdefault(id(entry), [])
        waiting.append(sequence)
        if len(waiting) == 1:
            self._files.read(entry, lambda entry, state: self._loaded(PrefixLoaded(entry, state)))

    def take(self, message: PrefixLoaded) -> None:
        """Take a state that was read, and let go of those who waited for it."""
        entry, state = message
        if state is None:
            self._store.remove(entry)
        else:
            self._store.loaded(entry, state)
        for sequence in self._waiting.pop(id(entry), ()):
            sequence.awaits_state = None

    def rescue(self, placement: Placement, token_seconds: float) -> None:
        """Keep what a slot still holds and is about to lose, if it pays; a prompt's token takes so many seconds."""
        index, tokens, scope = placement.slot.index, placement.evicted, placement.evicted_scope
        if not self._store.keeps_states or not len(tokens):
            return
        if not self._store.is_wanted(tokens, scope, placement.evicted_elsewhere):
            return
        if self._cost.pays(self._context.state_bytes(index), token_seconds * len(tokens)):
            started = time.perf_counter()
            entry, state = self._saved(index, tokens, scope)
            self._cost.observe(len(state), time.perf_counter() - started)
            self._store.add(entry)

    def restore(self, sequence: Sequence, placement: Placement) -> int:
        """Put a stored prefix into the slot if it is worth it; return its tokens there, 0 if the slot is unchanged."""
        entry, common = self._store.find(sequence.tokens[: sequence.n_tokens], sequence.scope)
        if entry is None or entry.state is None or common < placement.cached + _WORTH_RESTORING:
            return 0
        index = placement.slot.index
        if not self._context.restore_sequence(index, entry.state) or not self._context.memory.rewind(index, common):
            self._store.remove(entry)
            return 0
        self._store.use(entry)
        return common

    def keep(self, slot: Slot) -> None:
        """Write to disk what a request leaves in its slot."""
        tokens = slot.tokens[: slot.length]
        if self._files is None or len(tokens) < _LEAST_TOKENS_ON_DISK or self._store.is_on_disk(tokens, slot.scope):
            return
        entry, state = self._saved(slot.index, tokens, slot.scope)
        self._files.write(entry, state)
        self._store.add(entry)

    def _saved(self, index: int, tokens: Tokens, scope: str) -> tuple[StoredPrefix, State]:
        state = self._context.save_sequence(index)
        return StoredPrefix(tokens.copy(), scope, len(state), state), state
