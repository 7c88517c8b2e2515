"""A run that is planned to the byte: what goes in, what comes out, and what is under way beside it."""

from __future__ import annotations

import dataclasses

from quantize import native
from quantize.checkpoint import Checkpoint
from quantize.importance import ImportanceMatrix
from quantize.mxfp4 import BLOCK_BYTES, BLOCK_WEIGHTS
from quantize.plan import Plan
from quantize.proof import Proof
from quantize.recipe import NO_OVERRIDES, Overrides, Recipe
from quantize.slabs import Slab
from quantize.source import Source
from quantize.tensors import Part


@dataclasses.dataclass(frozen=True)
class Output:
    """One file that a run makes."""

    recipe: Recipe
    plan: Plan


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run that is planned to the byte and has read no weight yet."""

    source: Source
    checkpoint: Checkpoint
    outputs: tuple[Output, ...]
    notes: tuple[str, ...] = ()
    """What people should know: what is left out, and what the family found."""
    through_bf16: bool = True
    """Whether quantized files are made of numbers rounded to bf16, as upstream's two steps do."""
    importance: ImportanceMatrix | None = None
    overrides: Overrides = NO_OVERRIDES
    allow_requantize: bool = False

    proof: Proof | None = None
    """That llama.cpp will read text rightly, under way."""

    @property
    def plan(self) -> Plan:
        """The plan of the first file, in whose order the source is read."""
        return self.outputs[0].plan

    @property
    def source_bytes(self) -> int:
        """The bytes of the weights that will be read."""
        return sum(self.bytes_read(part, part.rows) for part in self.parts)

    @property
    def parts(self) -> list[Part]:
        """Everything that will be read."""
        return [part for tensor in self.plan.tensors for part in tensor.spec.parts]

    def prove(self) -> tuple[str, ...]:
        """Wait for the proof of the tokenizer and return what people should know. Raises `TokenizerError`."""
        return () if self.proof is None else self.proof.wait()

    def kernel_notes(self) -> list[str]:
        """Tell which of the types that are made have no kernel of our own that gives ggml's bytes here, and why."""
        names = {tensor.type_name for output in self.outputs for tensor in output.plan.tensors}
        return native.notes(names, weighted=self.importance is not None)

    def close(self) -> None:
        """End what is under way, if the run does not come to it."""
        if self.proof is not None:
            self.proof.close()

    def bytes_of(self, slab: Slab) -> int:
        """Return the bytes of the source that a slab takes: differences, so that rounded sizes add up."""
        if slab.part is None:
            return 0
        return self.bytes_read(slab.part, slab.first_row + slab.rows) - self.bytes_read(slab.part, slab.first_row)

    def bytes_read(self, part: Part, rows: int) -> int:
        """Return the bytes of the source that so many rows of a part take; a group of rows is shared by its takers."""
        stored, weights = self.checkpoint.tensors, rows * part.width
        if part.scales is not None:
            return weights // BLOCK_WEIGHTS * BLOCK_BYTES
        return stored[part.source].stored_bytes(weights)
