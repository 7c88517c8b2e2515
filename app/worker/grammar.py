"""Grammars of running sequences: compiled and followed on threads of their own, beside `llama_decode`.

As soon as a token is drawn, a thread computes which tokens may follow it, while the next decode runs without Python's
lock; so the mask is there before the logits are. A row whose mask is late is set aside, and the others go on.
"""

from __future__ import annotations

import queue
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from app.errors import PestleError

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as AbstractSequence

    import numpy.typing as npt

    from app.guidance import Constraint
    from app.llama.vocab import Vocabulary
    from app.messages import Trigger
    from app.worker.sequence import Sequence

    Logits = npt.NDArray[np.float32]

# Twice the stack of the text child's thread, which has compiled the same grammar.
_STACK_BYTES = 256 * 1024 * 1024
_PATIENCE = 0.002  # seconds that a step waits for masks; one takes 0.1 ms
_IDLE_PATIENCE = 0.05  # when there is nothing else to compute; commands wait as long


class SequenceGrammar:
    """What one sequence's answer is held to, and the mask of its next token."""

    def __init__(self, grammar: str, trigger: Trigger | None = None) -> None:
        """Take a grammar that the text child has compiled. It begins behind the `trigger`, or at once."""
        self.source = grammar
        self.in_force = trigger is None
        self._trigger = trigger
        self._reasons = trigger is not None and trigger.begins_in_reasoning
        self.constraint: Constraint | None = None
        self.failure: str | None = None  # why the sequence cannot go on
        self.ready = threading.Event()  # the mask of the next token is there, or a failure

    def accept(self, token: int) -> bool:
        """Go on by a drawn token; return whether the answer is complete with it."""
        constraint = self.constraint
        if constraint is None or not self.in_force:
            self._look_for_trigger(token)
            return False
        constraint.accept(token)
        self.failure = constraint.error
        return constraint.finished

    def _look_for_trigger(self, token: int) -> None:
        trigger = self._trigger
        if trigger is None:
            return
        if trigger.reasoning is not None and token in trigger.reasoning:
            self._reasons = token == trigger.reasoning[0]
        elif token == trigger.token and not self._reasons:
            self.in_force = True

    def compute(self) -> None:
        """Compute the mask of the next token."""
        try:
            if self.constraint is not None and self.failure is None and self.in_force:
                self.constraint.compute()
                self.failure = self.constraint.error
        except BaseException as error:  # a panic in Rust is none of Exception
            self.failure = f"llguidance failed: {error!r}"
        self.ready.set()

    def is_at_end(self, eog: npt.NDArray[np.int32]) -> bool:
        """Whether nothing may follow but the tokens that end an answer."""
        if self.constraint is None or not self.in_force:
            return False
        allowed = np.flatnonzero(self.constraint.allowed)
        return len(allowed) > 0 and bool(np.isin(allowed, eog).all())

    @property
    def allowed(self) -> npt.NDArray[np.bool_] | None:
        """Which tokens may come next; None where the grammar has failed or not begun: nothing is held to it."""
        is_followed = self.constraint is not None and self.failure is None and self.in_force
        return self.constraint.allowed if self.constraint is not None and is_followed else None


class _SetAside(NamedTuple):
    sequence: Sequence
    logits: Logits  # a copy, shape (1, vocabulary)


class Grammars:
    """The grammars of one engine. All methods belong to the engine's thread."""

    def __init__(self, vocabulary: Vocabulary, deliver: Callable[[Sequence], None]) -> None:
        """Start nothing yet. `deliver` takes each sequence whose grammar is compiled, from another thread."""
        self._vocabulary = vocabulary
        self._deliver = deliver
        self._to_compile: queue.SimpleQueue[Sequence] | None = None
        self._to_compute: queue.SimpleQueue[list[SequenceGrammar]] = queue.SimpleQueue()
        self._compiling: dict[int, Sequence] = {}
        self._set_aside: list[_SetAside] = []

    def is_compiled(self, sequence: Sequence) -> bool:
        """Whether a sequence that has arrived can be scheduled; if not, it is delivered again, unless cancelled."""
        grammar = sequence.grammar
        if grammar is None:
            return True
        if grammar.ready.is_set():
            return self._compiling.pop(sequence.request, None) is not None
        if self._to_compile is None:
            self._to_compile = queue.SimpleQueue()
            self._start_threads(self._to_compile)
        self._compiling[sequence.request] = sequence
        self._to_compile.put(sequence)
        return False

    def cancel(self, request: int) -> bool:
        """Forget a sequence whose grammar is being compiled; return whether there was one."""
        return self._compiling.pop(request, None) is not None

    def ready_rows(self, rows: list[Sequence], logits: Logits, *, idle: bool) -> tuple[list[Sequence], Logits]:
        """Return the rows that can be drawn from now: not those without a mask, but those set aside that have one.

        `idle`: there was nothing to compute, so that waiting costs nobody anything.
        """
        if not self._set_aside and not any(sequence.grammar for sequence in rows):
            return rows, logits
        set_aside = [late for late in self._set_aside if late.sequence.slot is not None and not late.sequence.n_pending]
        deadline = time.perf_counter() + (_IDLE_PATIENCE if idle else _PATIENCE)
        kept = [index for index, sequence in enumerate(rows) if _is_ready(sequence, deadline)]
        back = [late for late in set_aside if _is_ready(late.sequence, deadline)]
        self._set_aside = [late for late in set_aside if late not in back]
        if len(kept) == len(rows) and not back:
            return rows, logits
        missing = set(range(len(rows))).difference(kept)
        self._set_aside += [_SetAside(rows[index], logits[index : index + 1].copy()) for index in sorted(missing)]
        together = np.concatenate([logits[kept], *(late.logits for late in back)])
        return [*(rows[index] for index in kept), *(late.sequence for late in back)], together

    def masks(self, rows: AbstractSequence[Sequence]) -> list[npt.NDArray[np.bool_] | None] | None:
        """Return for each row which tokens may be drawn, shape (vocabulary,), None for all; None if all are free."""
        if not any(sequence.grammar for sequence in rows):
            return None
        return [None if sequence.grammar is None else sequence.grammar.allowed for sequence in rows]

    def advance(self, rows: AbstractSequence[Sequence]) -> None:
        """Begin to compute the next masks of those that go on."""
        grammars = [
            sequence.grammar
            for sequence in rows
            if sequence.grammar is not None and sequence.grammar.in_force and sequence.slot is not None
        ]
        if grammars:
            for grammar in grammars:
                grammar.ready.clear()
            self._to_compute.put(grammars)

    def _start_threads(self, to_compile: queue.SimpleQueue[Sequence]) -> None:
        before = threading.stack_size(_STACK_BYTES)
        threading.Thread(target=self._compile, args=(to_compile,), name="grammars", daemon=True).start()
        threading.Thread(target=self._compute, name="masks", daemon=True).start()
        threading.stack_size(before)

    def _compile(self, to_compile: queue.SimpleQueue[Sequence]) -> None:
        from app.guidance import Constraint, GrammarTokenizer  # noqa: PLC0415 - most workers never need it

        tokenizer: GrammarTokenizer | None = None
        while True:
            sequence = to_compile.get()
            grammar = sequence.grammar
            if grammar is None:
                continue
            try:
                tokenizer = tokenizer or GrammarTokenizer(self._vocabulary)
                grammar.constraint = Constraint(tokenizer, grammar.source)
            except PestleError as error:
                grammar.failure = error.message
            except BaseException as error:  # a panic in Rust is none of Exception
                grammar.failure = f"llguidance failed: {error!r}"
            grammar.compute()
            self._deliver(sequence)

    def _compute(self) -> None:
        while True:
            for grammar in self._to_compute.get():
                grammar.compute()


def _is_ready(sequence: Sequence, deadline: float) -> bool:
    grammar = sequence.grammar
    return grammar is None or grammar.ready.is_set() or grammar.ready.wait(max(0.0, deadline - time.perf_counter()))
