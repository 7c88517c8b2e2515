"""Kernels of our own for the K-quants, IQ4, Q8_0 and Q4_0: the bytes of ggml's encoder, several times as fast.

The C files here become one shared library when Pestle is installed with a C compiler. Each kernel is compared with the
installed ggml before its first use. Where there is none, or it gives one other byte, ggml does the work.
"""

from __future__ import annotations

from quantize.native.encoder import encode_rows, notes, reads

__all__ = ["encode_rows", "notes", "reads"]
