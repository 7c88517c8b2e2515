"""Texts that wait for their embedding, and which of them the next batch takes. Pure: no model, no clock of its own."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from app.worker.fair_shares import FairShares

if TYPE_CHECKING:
    import numpy.typing as npt

    Tokens = npt.NDArray[np.int32]
    Vectors = npt.NDArray[np.float32]


@dataclasses.dataclass(slots=True, eq=False)
class EmbeddingJob:
    """One request: its inputs, and the vectors that are there already, shape (inputs, size)."""

    request: int
    inputs: list[Tokens]
    vectors: Vectors
    client: str
    arrived: float  # seconds of the engine's clock
    activation: bool = True
    started: float = 0.0  # when its first batch was put together; 0 until then
    taken: int = 0  # inputs that batches have had; those before it are taken in order
    done: int = 0

    @property
    def complete(self) -> bool:
        """Whether every input has its vector."""
        return self.done == len(self.inputs)


@dataclasses.dataclass(frozen=True, slots=True)
class EmbeddingInput:
    """One text of a batch."""

    job: EmbeddingJob
    index: int

    @property
    def tokens(self) -> Tokens:
        """Its token ids."""
        return self.job.inputs[self.index]


class EmbeddingQueue:
    """Jobs in the order of their arrival. Clients get fair shares of the tokens."""

    def __init__(self, batch_tokens: int, sequences: int) -> None:
        self._batch_tokens = batch_tokens
        self._sequences = sequences
        self._jobs: dict[int, EmbeddingJob] = {}
        self._shares = FairShares(batch_tokens)
        self._alone: list[EmbeddingInput] = []  # from a batch that failed

    @property
    def jobs(self) -> list[EmbeddingJob]:
        """Those that are not complete."""
        return list(self._jobs.values())

    def add(self, job: EmbeddingJob) -> None:
        """Take a job."""
        self._jobs[job.request] = job
        self._shares.join(job.client)

    def remove(self, request: int) -> EmbeddingJob | None:
        """Forget a job that is complete, cancelled or failed; None when it is not here any more."""
        job = self._jobs.pop(request, None)
        if job is not None:
            self._shares.leave(job.client)
            self._alone = [waiting for waiting in self._alone if waiting.job is not job]
        return job

    def next_batch(self) -> list[EmbeddingInput]:
        """Take the inputs that are computed next: as many as fit, those of clients that had little first.

        An input that is longer than a usual batch is one by itself.
        """
        if self._alone:
            return [self._alone.pop(0)]
        batch: list[EmbeddingInput] = []
        left = self._batch_tokens
        for job in sorted(self._jobs.values(), key=lambda job: self._shares.rank(job.client)):
            while job.taken < len(job.inputs) and len(batch) < self._sequences:
                count = len(job.inputs[job.taken])
                if count > left and batch:
                    break
                batch.append(EmbeddingInput(job, job.taken))
                job.taken += 1
                left -= count
        for taken in batch:
            self._shares.charge(taken.job.client, len(taken.tokens))
        return batch

    def repeat_alone(self, batch: list[EmbeddingInput]) -> None:
        """Put the inputs of a batch that failed back, each to be computed by itself."""
        self._alone.extend(batch)
