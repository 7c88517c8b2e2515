"""The engine of models that embed or rerank: one thread that computes batches of texts, one `llama_decode` each.

`submit` may be called from any thread; everything else belongs to the thread that calls `run`.
"""

from __future__ import annotations

import queue
import time
from typing import TYPE_CHECKING

import numpy as np

from app.errors import DecodeError, EngineError, RequestError
from app.llama.batch import Batch
from app.messages import Accepted, Cancel, Load, Piece, Refused, Step, Timings
from app.worker.embedding_queue import EmbeddingQueue
from app.worker.embedding_request import EmbeddingModel, new_job

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from app.llama.embedding_context import EmbeddingContext
    from app.messages import Embed, FinishReason, Generate
    from app.worker.embedding_queue import EmbeddingInput, EmbeddingJob

_COMPUTE_FAILED = -3
_FAILURES_IN_A_ROW = 3


class EmbeddingEngine:
    """One context's queue and step loop."""

    def __init__(
        self,
        context: EmbeddingContext,
        model: EmbeddingModel,
        publish: Callable[[Accepted | Refused | Step], None],
        *,
        batch_tokens: int,
        deterministic: bool = False,
    ) -> None:
        """Serve `context`; `publish` is called from the engine's thread and from those that submit.

        A batch has up to `batch_tokens` tokens; a longer text is one by itself. `deterministic`: every text is.
        """
        self._context = context
        self._model = model
        self._publish = publish
        self._batch = Batch(context.batch_tokens)
        self._queue = EmbeddingQueue(batch_tokens, 1 if deterministic else context.sequences)
        self._commands: queue.SimpleQueue[EmbeddingJob | Cancel] = queue.SimpleQueue()
        self._pieces: list[Piece] = []
        self._failures = 0  # in a row
        self._fatal: DecodeError | None = None

    def warm_up(self) -> None:
        """Compute one token, so that the first request doesn't pay for what is allocated late. Raises DecodeError."""
        self._batch.clear()
        self._batch.add(0, 0, np.zeros(1, np.int32), wants_logits=1)
        self._context.embed(self._batch, 1)

    def submit(self, command: Embed | Generate | Cancel) -> None:
        """Take a command; answer a request at once with Accepted, or with Refused and the reason."""
        if isinstance(command, Cancel):
            self._commands.put(command)
            return
        try:
            job = new_job(command, self._model, self._context.context_length, time.perf_counter())
        except RequestError as error:
            self._publish(Refused(command.request, type(error).__name__, error.message, error.param))
            return
        self._publish(Accepted(command.request))
        self._commands.put(job)

    def run(self) -> None:
        """Step for ever; sleeps when there is nothing to do. Raises EngineError when the context is beyond repair."""
        while True:
            self.step()

    def step(self) -> None:
        """Drain commands, put a batch together, compute it, publish one frame."""
        self._drain_commands()
        started = time.perf_counter()
        batch = self._queue.next_batch()
        if batch:
            self._compute(batch, started)
        self._publish_step(batch, started)

    def _drain_commands(self) -> None:
        idle = not self._queue.jobs
        while idle or not self._commands.empty():
            command = self._commands.get()
            idle = False
            if not isinstance(command, Cancel):
                self._queue.add(command)
            elif job := self._queue.remove(command.request):
                self._end(job, "cancelled")

    def _compute(self, batch: list[EmbeddingInput], started: float) -> None:
        self._batch.clear()
        for sequence, taken in enumerate(batch):
            taken.job.started = taken.job.started or started
            self._batch.add(sequence, 0, taken.tokens, wants_logits=len(taken.tokens))
        try:
            vectors = self._context.embed(self._batch, len(batch))
        except DecodeError as error:
            self._on_failure(batch, error)
            return
        self._failures = 0
        for taken, vector in zip(batch, vectors, strict=True):
            self._take(taken, vector)

    def _take(self, taken: EmbeddingInput, vector: npt.NDArray[np.float32]) -> None:
        job = taken.job
        if not np.isfinite(vector).all():
            self._fail(job, f"the model's answer to input {taken.index} holds numbers that are not finite")
            return
        job.vectors[taken.index] = self._model.finished(vector, job)
        job.done += 1
        if job.complete and self._queue.remove(job.request):
            self._end(job, "stop", job.vectors.astype("<f4", copy=False).tobytes())

    def _on_failure(self, batch: list[EmbeddingInput], error: DecodeError) -> None:
        """Fail the text that was alone; of several, try each alone: one's trouble is not another's."""
        self._failures += 1
        if self._context.last_code == _COMPUTE_FAILED or self._failures >= _FAILURES_IN_A_ROW:
            self._fatal = error
        if len(batch) > 1 and self._fatal is None:
            self._queue.repeat_alone(batch)
            return
        for taken in batch:
            self._fail(taken.job, error.message)

    def _fail(self, job: EmbeddingJob, error: str) -> None:
        if self._queue.remove(job.request):
            self._end(job, "error", error=error)

    def _end(
        self, job: EmbeddingJob, reason: FinishReason, vectors: bytes | None = None, error: str | None = None
    ) -> None:
        now = time.perf_counter()
        started = job.started or now
        timings = Timings(started - job.arrived, now - started, 0.0)
        self._pieces.append(Piece(job.request, "", 0, reason, error=error, timings=timings, vectors=vectors))

    def _publish_step(self, batch: list[EmbeddingInput], started: float) -> None:
        pieces, self._pieces = self._pieces, []
        jobs = self._queue.jobs
        running = sum(job.started > 0 for job in jobs)
        load = Load(
            running=running,
            waiting=len(jobs) - running,
            kv_tokens=0,
            kv_capacity=0,
            prompt_tokens_computed=len(self._batch) if batch else 0,
            tokens_generated=0,
            preemptions=0,
            step_seconds=time.perf_counter() - started,
            inputs_embedded=len(batch),
        )
        if batch or pieces:
            self._publish(Step(pieces, load))
        if self._fatal is not None:
            raise EngineError(f"llama.cpp's context is beyond repair: {self._fatal.message}") from self._fatal
