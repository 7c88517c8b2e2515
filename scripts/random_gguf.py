"""Write a Q4_0 GGUF of a real shape with random weights, in seconds: right for speed, wrong for text.

    python scripts/random_gguf.py --shape tiny|b1|b8 --tokenizer FOLDER OUT.gguf

`b1` and `b8` have the shapes of Llama 3.2 1B (untied) and Llama 3.1 8B. FOLDER is a checkpoint's, of which only
config.json and the tokenizer's files are read (byte-level BPE).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from quantize.header import KeyTable, TensorEntry, aligned, encode_header
from quantize.source import Source
from quantize.vocab import set_bpe_vocabulary

BLOCK_WEIGHTS, BLOCK_BYTES = 32, 18
Q4_0_FILE_TYPE, QUANTIZATION_VERSION = 2, 2
_AT_ONCE = 1 << 20  # blocks; longer tensors repeat them


@dataclass(frozen=True)
class Shape:
    """A Llama's hyper-parameters."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    key_heads: int
    context: int = 8192

    @property
    def key_width(self) -> int:
        """The width of keys and of values."""
        return self.hidden // self.heads * self.key_heads


SHAPES = {
    "tiny": Shape(4, 512, 1408, 8, 4),
    "b1": Shape(16, 2048, 8192, 32, 8),
    "b8": Shape(32, 4096, 14336, 32, 8),
}


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("out", type=Path, metavar="OUT.gguf")
    arguments = parser.parse_args()
    shape, source = SHAPES[arguments.shape], Source(arguments.tokenizer)
    vocabulary: int = source.config["vocab_size"]
    entries = list(tensors(shape, vocabulary))
    with arguments.out.open("wb") as file:
        file.write(encode_header(keys(shape, source, vocabulary, arguments.shape), entries))
        start = file.tell()
        rng = np.random.default_rng(0)
        for entry in entries:
            file.write(bytes(start + entry.offset - file.tell()))
            write_tensor(file, entry, rng)
        file.write(bytes(start + aligned(file.tell() - start) - file.tell()))
    return 0


def keys(shape: Shape, source: Source, vocabulary: int, name: str) -> KeyTable:
    """Return all metadata."""
    table = KeyTable()
    table.text("general.architecture", "llama")
    table.text("general.name", f"random {name}")
    numbers = {
        "block_count": shape.layers,
        "context_length": shape.context,
        "embedding_length": shape.hidden,
        "feed_forward_length": shape.feed_forward,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.key_heads,
        "vocab_size": vocabulary,
        "rope.dimension_count": shape.hidden // shape.heads,
    }
    for key, number in numbers.items():
        table.u32(f"llama.{key}", number)
    table.f32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    table.f32("llama.rope.freq_base", 500000.0)
    table.u32("general.file_type", Q4_0_FILE_TYPE)
    table.u32("general.quantization_version", QUANTIZATION_VERSION)
    set_bpe_vocabulary(table, source, vocabulary)
    return table


def tensors(shape: Shape, vocabulary: int) -> list[TensorEntry]:
    """Return every tensor with its place; norms are F32, all else Q4_0."""
    hidden, feed_forward, keys_ = shape.hidden, shape.feed_forward, shape.key_width
    wanted: list[tuple[str, tuple[int, ...]]] = [("token_embd", (vocabulary, hidden)), ("output_norm", (hidden,))]
    wanted.append(("output", (vocabulary, hidden)))
    for block in range(shape.layers):
        matrices = {
            "attn_norm": (hidden,), "ffn_norm": (hidden,), "attn_q": (hidden, hidden), "attn_k": (keys_, hidden),
            "attn_v": (keys_, hidden), "attn_output": (hidden, hidden), "ffn_gate": (feed_forward, hidden),
            "ffn_up": (feed_forward, hidden), "ffn_down": (hidden, feed_forward),
        }  # fmt: skip
        wanted += [(f"blk.{block}.{name}", size) for name, size in matrices.items()]
    entries, offset = [], 0
    for name, size in wanted:
        entries.append(TensorEntry(f"{name}.weight", size, "f32" if len(size) == 1 else "q4_0", offset))
        offset = aligned(offset + nbytes(size))
    return entries


def nbytes(size: tuple[int, ...]) -> int:
    """Return the bytes of a tensor."""
    return 4 * size[0] if len(size) == 1 else size[0] * size[1] // BLOCK_WEIGHTS * BLOCK_BYTES


def write_tensor(file: BinaryIO, entry: TensorEntry, rng: np.random.Generator) -> None:
    """Write norms of 1, and blocks of random codes whose scale keeps activations in bounds."""
    if len(entry.shape) == 1:
        file.write(np.ones(entry.shape, np.float32).tobytes())
        return
    blocks = nbytes(entry.shape) // BLOCK_BYTES
    content = rng.integers(0, 256, (min(blocks, _AT_ONCE), BLOCK_BYTES), np.uint8)
    content[:, :2] = np.full((len(content), 1), 0.00425, np.float16).view(np.uint8)
    while blocks > 0:
        file.write(content[:blocks].tobytes())
        blocks -= len(content)


if __name__ == "__main__":
    sys.exit(main())
