"""Measure what the rounding to bf16 costs when a quantized checkpoint is quantized again: see docs/sources.md.

    python scripts/source_error.py CHECKPOINT [--type T ...]

Upstream's two steps, and Pestle by default, round decoded weights to bf16 before they quantize them; by way of an f32
GGUF they are not rounded. Prints for both the relative error (root mean square, over all layers' matrices) against the
decoded weights, in float64.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from app.llama import quantizer
from app.models.gguf import read_header
from quantize.pipeline import quantize

if TYPE_CHECKING:
    from collections.abc import Sequence

TYPES = ("q8_0", "q6_k", "q4_k_m")


def matrices(path: Path) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """Return the numbers of every layer's matrices, flat."""
    header = read_header(path)
    content = np.memmap(path, np.uint8, "r")
    found = {}
    for tensor in header.tensors:
        if not tensor.name.startswith("blk.") or len(tensor.shape) < 2:
            continue
        start = header.data_offset + tensor.offset
        raw = np.array(content[start : start + tensor.nbytes])
        values = np.empty(int(np.prod(tensor.shape)), dtype=np.float32)
        if tensor.type_name == "f32":
            values[:] = raw.view(np.float32)
        elif tensor.type_name == "f16":  # where rows fit into no block
            values[:] = raw.view(np.float16)
        else:
            quantizer.decode_rows(tensor.type, raw, values)
        found[tensor.name] = values.astype(np.float64)
    return found


def error(path: Path, exact: dict[str, np.ndarray[Any, np.dtype[np.float64]]]) -> float:
    """Return the relative error of a file."""
    found = matrices(path)
    wrong = sum(float(np.square(found[name] - values).sum()) for name, values in exact.items())
    return float(np.sqrt(wrong / sum(float(np.square(values).sum()) for values in exact.values())))


@dataclass(frozen=True)
class SourceError:
    """The relative errors of one type, through bf16 and from f32."""

    type_name: str
    through_bf16: float
    from_f32: float

    def row(self) -> str:
        """Return the cells of its line in a table."""
        avoided = 1 - self.from_f32 / self.through_bf16
        return f"{self.type_name} | {self.through_bf16:.3%} | {self.from_f32:.3%} | {avoided:.1%}"


def source_errors(checkpoint: Path, types: Sequence[str] = TYPES) -> list[SourceError]:
    """Quantize a checkpoint to each type in both ways, and measure."""
    with tempfile.TemporaryDirectory(prefix="pestle-error-") as temporary:
        f32, out = Path(temporary) / "f32.gguf", Path(temporary) / "out.gguf"
        quantize(checkpoint, "f32", f32)
        exact = matrices(f32)
        found = []
        for type_name in types:
            errors = []
            for source in (checkpoint, f32):
                quantize(source, type_name, out)
                errors.append(error(out, exact))
            found.append(SourceError(type_name, *errors))
    return found


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--type", action="append", metavar="T", help=f"default: {', '.join(TYPES)}")
    arguments = parser.parse_args()
    print("| type | through bf16 | from f32 | error avoided |\n|---|---|---|---|")
    for measured in source_errors(arguments.checkpoint, arguments.type or TYPES):
        print(f"| {measured.row()} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
