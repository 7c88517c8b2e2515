"""What a quantization costs: perplexity, divergence from the source's predictions, and speed, over a text.

The numbers mean what those of llama-perplexity mean: the text is cut into chunks, the second half of each is judged,
and each prediction has at least half a chunk of context. Divergence compares whole distributions, in nats, and shows a
loss long before perplexity does.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from app.errors import BadInputError
from app.llama.batch import Batch
from app.llama.context import Context
from app.llama.model import Model

CHUNK_TOKENS = 512
_DECODED_TOKENS, _DECODING_SECONDS = 48, 10.0
Floats = NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Quality:
    """One model against the reference: divergences in nats, `same_top` a share, speeds in tokens a second.

    Errors are standard errors of the mean. `prompt_speed` is that of chunks, `decode_speed` of one token after another.
    """

    path: Path
    bytes: int
    parameters: int
    tokens: int
    perplexity: float
    perplexity_error: float
    kld_mean: float
    kld_error: float
    kld_99: float
    kld_max: float
    same_top: float
    prompt_speed: float
    decode_speed: float

    @property
    def bits_per_weight(self) -> float:
        """The file's bits for each of the model's weights."""
        return self.bytes * 8 / self.parameters


class _Subject:
    """A loaded model and what has been seen of it."""

    def __init__(self, path: Path, chunk: int, threads: int) -> None:
        self.path = path
        self.model = Model(path, device="cpu")
        self.chunk = chunk
        self.context = Context(
            self.model, slots=1, context_length=chunk, batch_size=chunk, threads=threads, logits_rows=chunk
        )
        self.batch = Batch(chunk)
        self.surprises: list[Floats] = []
        self.divergences: list[Floats] = []
        self.agreements: list[NDArray[np.bool_]] = []
        self.seconds = 0.0
        self.decode_speed = 0.0

    def predict(self, tokens: NDArray[np.int32]) -> Floats:
        """Return log-probabilities after each token of the chunk's second half but the last, (tokens, vocabulary)."""
        began = time.perf_counter()
        self.context.memory.clear_all()
        self.batch.clear()
        self.batch.add(0, 0, tokens, wants_logits=True)
        self.batch.want_logits_from(self.chunk // 2)
        logits = self.context.decode(self.batch)[:-1]
        self.seconds += time.perf_counter() - began
        return log_softmax(logits)

    def take(self, predicted: Floats, reference: Floats, following: NDArray[np.int32]) -> None:
        self.surprises.append(-predicted[np.arange(len(following)), following])
        self.divergences.append(divergence(reference, predicted))
        self.agreements.append(reference.argmax(axis=1) == predicted.argmax(axis=1))

    def time_decoding(self, tokens: NDArray[np.int32]) -> None:
        """Decode the last tokens of a chunk one by one, as an answer is."""
        steps = min(_DECODED_TOKENS, len(tokens) // 2)
        first = len(tokens) - steps
        self.context.memory.clear_all()
        self.batch.clear()
        self.batch.add(0, 0, tokens[:first], wants_logits=True)
        self.context.decode(self.batch)
        times = []
        for place in range(first, len(tokens)):
            began = time.perf_counter()
            self.batch.clear()
            self.batch.add(0, place, tokens[place : place + 1], wants_logits=True)
            self.context.decode(self.batch)
            times.append(time.perf_counter() - began)
            if sum(times) > _DECODING_SECONDS and len(times) >= 3:
                break  # a large model, or a machine that is far too busy
        self.decode_speed = 1 / float(np.median(times))  # the median: a busy machine delays some of them

    def quality(self) -> Quality:
        surprise = np.concatenate(self.surprises).astype(np.float64)
        kld = np.concatenate(self.divergences).astype(np.float64)
        perplexity = math.exp(surprise.mean())
        error = perplexity * surprise.std(ddof=1) / math.sqrt(len(surprise))
        return Quality(
            path=self.path,
            bytes=self.path.stat().st_size,
            parameters=self.model.parameter_count,
            tokens=len(surprise),
            perplexity=perplexity,
            perplexity_error=float(error),
            kld_mean=float(kld.mean()),
            kld_error=float(kld.std(ddof=1) / math.sqrt(len(kld))),
            kld_99=float(np.percentile(kld, 99)),
            kld_max=float(kld.max()),
            same_top=float(np.concatenate(self.agreements).mean()),
            prompt_speed=len(self.surprises) * self.chunk / self.seconds,
            decode_speed=self.decode_speed,
        )

    def close(self) -> None:
        self.context.close()
        self.model.close()


def log_softmax(logits: Floats) -> Floats:
    """Return the logarithms of the probabilities of each row."""
    shifted: Floats = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return shifted


def divergence(reference: Floats, other: Floats) -> Floats:
    """Return the Kullback-Leibler divergence of each row of log-probabilities from the reference's, in nats."""
    difference: Floats = np.exp(reference) * (reference - other)
    total: Floats = difference.sum(axis=1, dtype=np.float64).astype(np.float32)
    return np.maximum(total, 0)  # less is rounding


def measure(
    reference: Path,
    others: Sequence[Path],
    text: str,
    *,
    threads: int,
    chunk: int = CHUNK_TOKENS,
    most_chunks: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Quality]:
    """Judge the reference and the other models over a text; the reference comes first, and diverges by nothing.

    Raises BadInputError when the text is shorter than two chunks or the vocabularies differ, and what loading raises.
    """
    subjects: list[_Subject] = []
    try:
        for path in (reference, *others):
            subjects.append(_Subject(path, chunk, threads))
            _check_vocabulary(subjects[0], subjects[-1])
        chunks = cut(subjects[0].model, text, chunk)[:most_chunks]
        for number, tokens in enumerate(chunks):
            following = tokens[chunk // 2 + 1 :]
            judged = subjects[0].predict(tokens)
            subjects[0].take(judged, judged, following)
            for subject in subjects[1:]:
                subject.take(subject.predict(tokens), judged, following)
            if progress is not None:
                progress(number + 1, len(chunks))
        for subject in subjects:
            subject.time_decoding(chunks[0])
        return [subject.quality() for subject in subjects]
    finally:
        for subject in subjects:
            subject.close()


def _check_vocabulary(reference: _Subject, other: _Subject) -> None:
    sizes = reference.model.vocabulary.size, other.model.vocabulary.size
    if sizes[0] != sizes[1] or reference.model.vocabulary.pieces != other.model.vocabulary.pieces:
        raise BadInputError(f"{other.path}: its vocabulary ({sizes[1]} tokens) is not that of {reference.path}")


def cut(model: Model, text: str, chunk: int = CHUNK_TOKENS) -> list[NDArray[np.int32]]:
    """Return a text's chunks of so many tokens; what is left at the end is dropped.

    Raises BadInputError for a text shorter than two chunks.
    """
    tokens = model.vocabulary.tokenize(text, add_special=True)
    starts = range(0, len(tokens) - chunk + 1, chunk)
    if len(starts) < 2:
        raise BadInputError(f"the text has {len(tokens)} tokens; at least {2 * chunk} are needed")
    first = model.vocabulary.bos if model.vocabulary.adds_bos else None
    chunks = [tokens[start : start + chunk].copy() for start in starts]
    for piece in chunks:
        if first is not None:
            piece[0] = first  # every chunk begins as a text does
    return chunks
