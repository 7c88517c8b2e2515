"""What changes logits before the filters see them, in llama.cpp's order: mask, bias, penalties, DRY."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from app.worker.sampling.penalties import penalize

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from app.worker.sampling.sampler import TokenSampler

    Floats = npt.NDArray[np.float32]
    Tokens = npt.NDArray[np.int32]
    Mask = npt.NDArray[np.bool_] | npt.NDArray[np.int32] | npt.NDArray[np.uint8]

_MINUS_INFINITY = np.float32(-np.inf)


def apply_mask(row: Floats, mask: Mask) -> None:
    """Make impossible what the mask does not allow.

    A mask has a bool for each token, or a bit, lowest first, in bytes or little-endian words; True and 1 allow.
    Bits beyond the vocabulary are ignored, tokens beyond the mask are not allowed.
    """
    if mask.dtype != np.bool_:
        mask = np.unpackbits(mask.view(np.uint8), count=min(len(row), mask.nbytes * 8), bitorder="little").view(
            np.bool_
        )
    np.copyto(row[: len(mask)], _MINUS_INFINITY, where=~mask)
    row[len(mask) :] = _MINUS_INFINITY


def edit(
    logits: Floats,
    samplers: Sequence[TokenSampler],
    histories: Sequence[Tokens],
    masks: Sequence[Mask | None] | None = None,
) -> None:
    """Change each row of logits, shape (rows, vocabulary), in place, as its sequence's sampler says.

    `histories` are the tokens so far, prompts included. The penalties of all rows are subtracted at once.
    """
    for index, mask in enumerate(masks or ()):
        if mask is not None:
            apply_mask(logits[index], mask)
    own = [(row, *pair) for row, pair in enumerate(zip(samplers, histories, strict=True)) if pair[0].edits]
    _forbid(logits, own)
    penalized = []
    for row, sampler, history in own:
        if len(sampler.bias_ids):
            logits[row, sampler.bias_ids] += sampler.biases
        if sampler.penalties:
            sampler.penalties.occurred.follow(history)
            penalized.append((row, sampler.penalties))
    if penalized:
        penalize(logits, *zip(*penalized, strict=True))
    for row, sampler, history in own:
        if sampler.dry:
            ids, amounts = sampler.dry.penalties(history)
            logits[row, ids] -= amounts


def _forbid(logits: Floats, own: list[tuple[int, TokenSampler, Tokens]]) -> None:
    """Make impossible what must not be drawn; most rows have the very same list of tokens, and are changed together."""
    rows_of: dict[int, list[int]] = {}
    lists: dict[int, Tokens] = {}
    for row, sampler, history in own:
        for tokens in sampler.forbidden(len(history)):
            lists[id(tokens)] = tokens
            rows_of.setdefault(id(tokens), []).append(row)
    for key, rows in rows_of.items():
        logits[np.array(rows)[:, None], lists[key]] = _MINUS_INFINITY
