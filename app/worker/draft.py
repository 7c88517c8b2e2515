"""A second, smaller model that guesses what the first will draw. Belongs to the engine's thread.

It has a KV cache of its own, one slot for each of the model's, which follows the streams that it guesses for: what was
accepted stays, the rest is cut, and what is missing is computed before it guesses.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from app.errors import DecodeError, ModelLoadError
from app.llama.batch import Batch
from app.llama.context import Context
from app.llama.device import thread_count
from app.llama.model import Model
from app.worker.kv import common_prefix

if TYPE_CHECKING:
    import numpy.typing as npt

    from app.messages import LoadModel
    from app.worker.scheduler import Chunk, Schedule

_BATCH = 256  # tokens that it may read of prompts before a step
_AS_USUAL = 32  # tokens to catch up with; more are a prompt, whose time says nothing about guesses


class _Held(NamedTuple):
    tokens: npt.NDArray[np.int32]  # room for a whole slot
    length: int


class DraftModel:
    """Guesses greedily, for all streams at once, one token after the other."""

    def __init__(self, model: Model, context: Context) -> None:
        """Own both: `close` frees them."""
        self.tensor_bytes = model.tensor_bytes
        self._model = model
        self._context = context
        self._batch = Batch(context.batch_size)
        self._held = [_Held(np.empty(context.context_length, np.int32), 0) for _ in range(context.slots)]

    def write(self, schedule: Schedule) -> float:
        """Write the guesses of the chunks that have some; return the seconds it took.

        A chunk whose tokens have not all been read yet loses its guesses.
        """
        started = time.perf_counter()
        wanted = [chunk for chunk in schedule.chunks if chunk.guesses]
        caught_up: list[Chunk] = []
        try:
            caught_up, read = self._catch_up(wanted)
            if read > _AS_USUAL:
                started = time.perf_counter()
            self._guess(caught_up)
        except DecodeError:
            self._forget_all()
            caught_up = []
        ready = {chunk.slot.index for chunk in caught_up}
        for chunk in wanted:
            if chunk.slot.index not in ready:
                schedule.guesses -= chunk.guesses
                chunk.count -= chunk.guesses
                chunk.guesses = 0
        return time.perf_counter() - started if caught_up else 0.0

    def close(self) -> None:
        """Free the model."""
        self._context.close()
        self._model.close()

    def _catch_up(self, chunks: list[Chunk]) -> tuple[list[Chunk], int]:
        """Compute known tokens that are missing, and each stream's next token; return whose, and how many were read."""
        self._batch.clear()
        caught_up = []
        room = self._batch.capacity
        for chunk in chunks:
            slot, known = chunk.slot.index, chunk.sequence.tokens[: chunk.sequence.n_tokens]
            tokens, length = self._held[slot]
            common = min(common_prefix(tokens[:length], known), len(known) - 1)
            if common < length:
                self._context.memory.rewind(slot, common)
            missing = known[common : common + room]
            complete = common + len(missing) == len(known)
            self._hold(slot, common, missing)
            if len(missing):
                self._batch.add(slot, common, missing, wants_logits=complete)
                room -= len(missing)
            if complete:
                caught_up.append(chunk)
        self._draw(caught_up, 0)
        return caught_up, self._batch.capacity - room

    def _guess(self, chunks: list[Chunk]) -> None:
        """Compute guess after guess; the first ones are there."""
        for depth in range(1, max((chunk.guesses for chunk in chunks), default=0)):
            self._batch.clear()
            for chunk in chunks:
                sequence, slot = chunk.sequence, chunk.slot.index
                position = sequence.n_tokens + depth - 1
                token = sequence.tokens[position : position + 1]
                self._hold(slot, position, token)
                self._batch.add(slot, position, token, wants_logits=1)
            self._draw(chunks, depth)

    def _draw(self, chunks: list[Chunk], depth: int) -> None:
        if not len(self._batch):
            return
        logits = self._context.decode(self._batch)
        for chunk, row in zip(chunks, logits, strict=True):
            chunk.sequence.tokens[chunk.sequence.n_tokens + depth] = int(row.argmax())

    def _hold(self, slot: int, start: int, tokens: npt.NDArray[np.int32]) -> None:
        held = self._held[slot].tokens
        held[start : start + len(tokens)] = tokens
        self._held[slot] = _Held(held, start + len(tokens))

    def _forget_all(self) -> None:
        self._context.memory.clear_all()
        self._held = [_Held(tokens, 0) for tokens, _ in self._held]


def open_draft(command: LoadModel, model: Model, context_length: int) -> DraftModel:
    """Load the draft model that goes with a model. Raises ModelLoadError, also when their vocabularies differ."""
    draft = Model(Path(command.draft_path), device=command.device, gpu_layers=command.gpu_layers)
    try:
        _check(draft, model)
        context = Context(
            draft,
            slots=command.slots,
            context_length=context_length,
            batch_size=max(_BATCH, command.slots),
            threads=thread_count(command.threads),
            flash_attention=command.flash_attention,
        )
    except ModelLoadError:
        draft.close()
        raise
    return DraftModel(draft, context)


def _check(draft: Model, model: Model) -> None:
    if not draft.can_rewind:
        raise ModelLoadError(f"{draft.path} cannot be a draft model: its memory cannot be cut back")
    if difference := vocabulary_difference(model, draft):
        raise ModelLoadError(f"{draft.path} cannot be the draft model of {model.path}: {difference}")


def vocabulary_difference(model: Model, draft: Model) -> str:
    """Say how the draft model's tokens differ from the model's; empty if they are the same."""
    ours, theirs = model.vocabulary, draft.vocabulary
    if ours.size != theirs.size:
        return f"it has {theirs.size} tokens, the model {ours.size}"
    for token, (left, right) in enumerate(zip(ours.pieces, theirs.pieces, strict=True)):
        if left != right:
            return f"token {token} is {right!r} there and {left!r} in the model"
    return ""
