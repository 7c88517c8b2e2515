"""From an Embed frame to a job, and from the model's vectors to the answer's."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from app.errors import ContextLengthError, RequestError
from app.messages import Embed
from app.worker.embedding_queue import EmbeddingJob

if TYPE_CHECKING:
    import numpy.typing as npt

    from app.messages import Generate

    Vector = npt.NDArray[np.float32]

_BYTES_PER_TOKEN = 4


@dataclasses.dataclass(frozen=True, slots=True)
class EmbeddingModel:
    """What jobs must fit to, and what becomes of a vector."""

    vocabulary_size: int
    size: int  # numbers of one vector
    reranks: bool = False
    gives_probabilities: bool = False  # a reranker whose scores went through a softmax already

    def finished(self, vector: Vector, job: EmbeddingJob) -> Vector:
        """Return an embedding's first numbers, of length 1 together, or a reranker's one score."""
        if not self.reranks:
            return unit_vector(vector[: job.vectors.shape[1]])
        score = vector[:1].astype(np.float64)
        return _logistic(score) if job.activation and not self.gives_probabilities else score.astype(np.float32)


def unit_vector(vector: Vector) -> Vector:
    """Return the vector divided by its length, as float32; one of zeros stays as it is."""
    exact = vector.astype(np.float64)
    length = np.sqrt(exact @ exact)
    return (exact / length if length else exact).astype(np.float32)


def new_job(command: Embed | Generate, model: EmbeddingModel, context_length: int, now: float) -> EmbeddingJob:
    """Check a request and make its job. Raises ContextLengthError for an input that is too long, else RequestError."""
    if not isinstance(command, Embed):
        raise RequestError("this model gives embeddings or scores and does not continue text", param="model")
    if not command.inputs:
        raise RequestError("there is no input: send at least one", param="input")
    inputs = [_tokens(data, index, model.vocabulary_size, context_length) for index, data in enumerate(command.inputs)]
    size = 1 if model.reranks else model.size
    if not 0 <= command.dimensions <= size:
        raise RequestError(
            f"dimensions is {command.dimensions}, this model's embeddings have {size}", param="dimensions"
        )
    if model.gives_probabilities and not command.activation:
        raise RequestError(
            "this model gives probabilities only: leave 'use_activation' out, or send true", param="use_activation"
        )
    vectors = np.zeros((len(inputs), command.dimensions or size), np.float32)
    return EmbeddingJob(command.request, inputs, vectors, command.client, now, command.activation)


def _tokens(data: bytes, index: int, vocabulary_size: int, context_length: int) -> npt.NDArray[np.int32]:
    param = f"input[{index}]"
    if not data or len(data) % _BYTES_PER_TOKEN:
        raise RequestError(f"{len(data)} bytes are no list of int32 tokens", param=param)
    tokens = np.frombuffer(data, "<i4")
    if len(tokens) > context_length:
        raise ContextLengthError(f"{len(tokens)} tokens, of {context_length} at most", param=param)
    if tokens.min() < 0 or tokens.max() >= vocabulary_size:
        raise RequestError(f"a token is outside the vocabulary of {vocabulary_size}", param=param)
    return tokens


def _logistic(score: npt.NDArray[np.float64]) -> Vector:
    return np.where(
        score >= 0, 1 / (1 + np.exp(-np.abs(score))), np.exp(-np.abs(score)) / (1 + np.exp(-np.abs(score)))
    ).astype(np.float32)
