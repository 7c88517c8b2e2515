"""Sequences on their way through the worker: frames to generations, and what a worker's death means for each."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from app.errors import EngineCrashedError, PestleError
from app.messages import Accepted, Cancel, Embed, Generate, Hello, Piece, Refused, Step
from app.observability.logging import get_logger
from app.pool.refusal import named_error, refusal_error

if TYPE_CHECKING:
    from app.observability.metrics import ModelMetrics
    from app.pool.admission import Pace
    from app.pool.generation import Generation
    from app.pool.text_client import Sender

log = get_logger(__name__)

_RETRY_AFTER_CRASH_SECONDS = 2.0


class Sequence:
    """One choice of a generation, as the worker knows it."""

    __slots__ = ("accepted", "admitted", "first", "generation", "index", "last", "message", "runs", "tokens")

    def __init__(self, generation: Generation, index: int, message: Generate | Embed, admitted: float) -> None:
        self.generation = generation
        self.index = index
        self.message = message
        self.admitted = admitted  # monotonic seconds, as the others
        self.first = 0.0
        self.last = 0.0
        self.tokens = 0
        self.runs = 0  # workers that were given it
        self.accepted = False


class WorkerClient:
    """Sends sequences to the worker and its pieces to their generations."""

    def __init__(self, metrics: ModelMetrics, pace: Pace, restart_wait: float) -> None:
        self.supervisor: Sender | None = None
        self._metrics = metrics
        self._pace = pace
        self._restart_wait = restart_wait  # seconds that sequences wait for a fresh worker
        self._sequences: dict[int, Sequence] = {}  # by request number
        self._unfinished: dict[Generation, set[int]] = {}  # request numbers
        self._up = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def running(self) -> int:
        """Sequences that are not finished."""
        return len(self._sequences)

    def start(self, sequence: Sequence) -> None:
        """Give a sequence to the worker, or to the next one when this one just died."""
        self._sequences[sequence.message.request] = sequence
        self._unfinished.setdefault(sequence.generation, set()).add(sequence.message.request)
        if self._up:
            self._send(sequence)

    def drop(self, generation: Generation) -> int:
        """Cancel what still runs of a generation and forget it; return how many sequences that were."""
        mine = self._unfinished.pop(generation, set())
        for request in mine:
            del self._sequences[request]
            if self._up and self.supervisor is not None:
                self.supervisor.send(Cancel(request))
        if mine:
            self._idle()
        return len(mine)

    def fail(self, generation: Generation, error: PestleError) -> None:
        """End a generation with an error; what still runs of it is cancelled."""
        if generation.fail(error):
            self._metrics.failure(error.code or error.type)
        self.drop(generation)

    def fail_all(self, error: PestleError) -> None:
        """End every generation that has something in the worker."""
        for generation in list(self._unfinished):
            self.fail(generation, error)

    def on_ready(self, hello: Hello) -> None:
        """Send everything that waits to the fresh worker."""
        self._up = True
        self._disarm()
        self._metrics.load_seconds.set(hello.load_seconds)
        for sequence in self._sequences.values():
            self._send(sequence)

    def on_message(self, message: Any) -> None:
        """Take a frame of the worker; steps come hundreds of times a second."""
        if type(message) is Step:
            now = time.monotonic()
            for piece in message.pieces:
                self._on_piece(piece, now)
            load = message.load
            if load.inputs_embedded:
                self._pace.step(load.prompt_tokens_computed, load.step_seconds)
            else:
                self._pace.step(load.tokens_generated, load.step_seconds, load.prompt_tokens_computed)
            self._metrics.observe_load(load)
            self._idle()
        elif isinstance(message, Accepted):
            sequence = self._sequences.get(message.request)
            if sequence is not None and not sequence.accepted:
                sequence.accepted = True
                sequence.generation.accept()
        elif isinstance(message, Refused):
            sequence = self._sequences.get(message.request)
            if sequence is not None:
                self._forget(sequence)
                self.fail(sequence.generation, refusal_error(message))

    def on_down(self) -> bool:
        """Keep what nobody has read anything of for the next worker, once; the rest gets its error now."""
        self._up = False
        self._metrics.worker_gone()
        for generation, requests in list(self._unfinished.items()):
            ran_twice = any(self._sequences[request].runs > 1 for request in requests)
            if generation.delivered or ran_twice:
                self.fail(generation, _crashed())
        for sequence in self._sequences.values():
            sequence.tokens = 0
            sequence.generation.restart(sequence.index)
        if self._sequences:
            log.warning("sequences wait for a fresh worker", extra={"sequences": len(self._sequences)})
        self._disarm()
        self._timer = asyncio.get_running_loop().call_later(self._restart_wait, self._waited_too_long)
        return False  # which sequence was to blame is not known

    def _on_piece(self, piece: Piece, now: float) -> None:
        sequence = self._sequences.get(piece.request)
        if sequence is None:  # cancelled a moment ago
            return
        drawn = piece.completion_tokens - sequence.tokens
        if drawn:
            if sequence.tokens:
                self._metrics.observe_token((now - sequence.last) / drawn)
            elif not sequence.first:
                sequence.first = now
                self._metrics.time_to_first_token.observe(now - sequence.admitted)
            sequence.tokens = piece.completion_tokens
            sequence.last = now
        if piece.finish_reason == "error":
            self._forget(sequence)
            message = piece.error or "the engine failed on this sequence"
            self.fail(sequence.generation, named_error(piece.error_name, message))
            return
        sequence.generation.push(sequence.index, piece)
        if piece.finish_reason is not None:
            self._forget(sequence)
            self._finish(sequence, piece, now)

    def _forget(self, sequence: Sequence) -> None:
        request = sequence.message.request
        del self._sequences[request]
        others = self._unfinished[sequence.generation]
        others.discard(request)
        if not others:
            del self._unfinished[sequence.generation]

    def _finish(self, sequence: Sequence, piece: Piece, now: float) -> None:
        metrics = self._metrics
        metrics.success(piece.finish_reason or "")
        metrics.e2e_latency.observe(now - sequence.admitted)
        generated = isinstance(sequence.message, Generate)
        if isinstance(sequence.message, Generate):
            metrics.prefix_queries.inc(len(sequence.message.prompt) // 4)
            metrics.prefix_hits.inc(piece.cached_tokens)
        if sequence.tokens > 1:
            metrics.time_per_output_token.observe((sequence.last - sequence.first) / (sequence.tokens - 1))
        if piece.timings is not None:
            metrics.queue_time.observe(piece.timings.queued)
            metrics.prefill_time.observe(piece.timings.prefill)
            metrics.decode_time.observe(piece.timings.decode)
        self._pace.answer(sequence.tokens if generated else sequence.generation.prompt_tokens)

    def _send(self, sequence: Sequence) -> None:
        assert self.supervisor is not None  # noqa: S101 - the pool wires it before anything runs
        sequence.runs += 1
        self.supervisor.send(sequence.message)

    def _idle(self) -> None:
        if not self._sequences:
            self._metrics.idle()

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _waited_too_long(self) -> None:
        self.fail_all(_crashed())


def _crashed() -> EngineCrashedError:
    return EngineCrashedError(
        "the model's worker process died under this request and is being restarted; try again",
        retry_after=_RETRY_AFTER_CRASH_SECONDS,
    )
