"""Sums the squares of what goes into each weight matrix, as llama-imatrix does: column by column, expert by expert."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from app.errors import BadInputError
from app.llama.activations import Multiplication

_FEWEST_ROWS = 16  # llama-imatrix leaves smaller products aside
_OUTPUT = "output.weight"


@dataclasses.dataclass
class ColumnSums:
    """A tensor's sums of squares, shape (matrices, columns), and what they are divided by: one count, or one each."""

    sums: NDArray[np.float64]
    counts: NDArray[np.int64]

    @property
    def unseen(self) -> int:
        """How many experts no token was sent to."""
        return int((self.counts == 0).sum())


class ActivationSums:
    """Takes multiplications and keeps their inputs' sums of squares, by the weight's name.

    Collected are the blocks' matrices and all experts, and with `output` also the matrix of the logits, if it is not
    the embeddings' own.
    """

    def __init__(self, *, output: bool = False) -> None:
        self.tensors: dict[str, ColumnSums] = {}
        self._output = output

    def wants(self, weight: str, rows: int) -> bool:
        """Tell whether the product of a matrix with so many rows of input is to be taken."""
        return rows >= _FEWEST_ROWS and (weight.startswith("blk.") or (self._output and weight == _OUTPUT))

    def take(self, seen: Multiplication) -> None:
        """Add a multiplication. Raises BadInputError for numbers that are not finite: the model is broken."""
        with np.errstate(over="ignore", invalid="ignore"):  # told below, with the tensor's name
            sums = self._take_plain(seen) if seen.experts is None else self._take_experts(seen, seen.experts)
        if not np.isfinite(sums).all():
            raise BadInputError(
                f"{seen.weight}: what goes into it is not finite; the model's weights are broken, or their type is too "
                "narrow for it (try a bf16 file)"
            )

    def chunks(self, tokens: int) -> int:
        """Return how many chunks of so many tokens the largest count covers, which is what the file says."""
        return max((int(entry.counts.max()) for entry in self.tensors.values()), default=0) // tokens

    def _take_plain(self, seen: Multiplication) -> NDArray[np.float64]:
        outer, inner = seen.stack
        entry = self._entry(seen, outer * inner, counts=1)
        for i, stacks in enumerate(seen.inputs):
            for j, rows in enumerate(stacks):
                entry.sums[i % outer * inner + j % inner] += _squares(rows)
        entry.counts += seen.inputs[..., 0].size // (outer * inner)
        return entry.sums

    def _take_experts(self, seen: Multiplication, experts: NDArray[np.int32]) -> NDArray[np.float64]:
        _, count = seen.stack
        entry = self._entry(seen, count, counts=count)
        inputs = seen.inputs[0]
        used = np.bincount(experts.ravel(), minlength=count)
        for expert in np.flatnonzero(used):
            tokens, uses = np.nonzero(experts == expert)
            entry.sums[expert] += _squares(inputs[tokens, uses % inputs.shape[1]])
        entry.counts += used
        return entry.sums

    def _entry(self, seen: Multiplication, matrices: int, *, counts: int) -> ColumnSums:
        columns = seen.inputs.shape[-1]
        entry = self.tensors.get(seen.weight)
        if entry is None:
            entry = ColumnSums(np.zeros((matrices, columns)), np.zeros(counts, np.int64))
            self.tensors[seen.weight] = entry
        if counts > entry.counts.size == 1:  # multiplied as a whole before it was by experts
            entry.counts = np.repeat(entry.counts, counts)
        return entry


def _squares(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    sums: NDArray[np.float32] = np.einsum("ij,ij->j", rows, rows)
    return sums
