"""Runs a model over a text and collects what matters to its matrices: an importance matrix, and the perplexity."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from app.errors import BadInputError
from app.llama.activations import MultiplicationTap
from app.llama.batch import Batch
from app.llama.context import Context
from app.llama.model import Model
from quantize.activation_sums import ActivationSums
from quantize.quality import CHUNK_TOKENS, cut, log_softmax

Progress = Callable[[int, int, float], None]
"""Called with the chunks that are done, all of them, and the perplexity so far."""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What was collected over `chunks` chunks of `chunk_tokens` tokens; the perplexity is that of second halves."""

    sums: ActivationSums
    chunks: int
    chunk_tokens: int
    perplexity: float
    perplexity_error: float


def calibrate(
    path: Path,
    text: str,
    *,
    threads: int,
    chunk: int = CHUNK_TOKENS,
    most_chunks: int | None = None,
    output: bool = False,
    progress: Progress | None = None,
) -> Calibration:
    """Compute every chunk of the text, all positions of all layers, as llama-imatrix does, on the processors.

    `output` takes in the matrix of the logits. Raises BadInputError for a model for embeddings, a text shorter than two
    chunks or numbers that are not finite, and what loading and computing raise.
    """
    sums = ActivationSums(output=output)
    surprises: list[NDArray[np.float32]] = []
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(Model(path, device="cpu"))
        if model.metadata.get(f"{model.architecture}.attention.causal") == "false":
            raise BadInputError(f"{path}: a model for embeddings; it predicts no text to be measured over")
        chunks = cut(model, text, chunk)[:most_chunks]
        tap = MultiplicationTap(sums.wants, sums.take)
        context = stack.enter_context(
            Context(
                model, slots=1, context_length=chunk, batch_size=chunk, threads=threads, logits_rows=chunk, tap=tap
            )
        )  # fmt: skip
        thread = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1))
        batch = Batch(chunk)
        for number, tokens in enumerate(chunks, 1):
            computed = thread.submit(_surprise, context, batch, tokens)  # not here, where Ctrl-C would be lost
            try:
                surprises.append(computed.result())
            except BaseException:
                tap.stop()
                raise
            if progress is not None:
                progress(number, len(chunks), math.exp(np.concatenate(surprises).mean(dtype=np.float64)))
    surprise = np.concatenate(surprises).astype(np.float64)
    perplexity = math.exp(surprise.mean())
    error = perplexity * float(surprise.std(ddof=1)) / math.sqrt(len(surprise))
    return Calibration(sums, len(chunks), chunk, perplexity, error)


def _surprise(context: Context, batch: Batch, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """Compute a chunk; return how surprising each token of its second half was, in nats."""
    context.memory.clear_all()
    batch.clear()
    batch.add(0, 0, tokens, wants_logits=True)
    batch.want_logits_from(0)  # what asks for no logits is left out of the last layer
    half = len(tokens) // 2
    predicted = log_softmax(context.decode(batch)[half:-1])
    following = tokens[half + 1 :]
    surprise: NDArray[np.float32] = -predicted[np.arange(len(following)), following]
    return surprise
