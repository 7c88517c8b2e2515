"""Looks at a finished file with fresh eyes, and tells whether it is what was planned."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

from app.errors import ModelFileError, VerificationError
from app.models.gguf import read_header
from quantize.plan import Plan

_SAMPLE_BYTES = 1024


class Samples:
    """Checksums of pieces as they were computed, to be compared with what the file holds."""

    def __init__(self) -> None:
        self.checksums: list[tuple[int, int, int]] = []

    def take(self, offset: int, data: memoryview) -> None:
        """Remember the beginning of a piece that goes to `offset` in the file."""
        sample = data[:_SAMPLE_BYTES]
        self.checksums.append((offset, len(sample), zlib.crc32(sample)))


def verify(path: Path, plan: Plan, samples: Samples) -> None:
    """Compare a file's size, header, every tensor's place, and the samples with the plan.

    Raises `VerificationError` that names the first difference.
    """
    try:
        header = read_header(path, largest_array=0)
    except ModelFileError as error:
        raise VerificationError(f"the written file is damaged: {error.message}") from error
    if header.file_size != plan.file_size:
        raise VerificationError(f"{path}: {header.file_size} bytes were written, {plan.file_size} were planned")
    if len(header.tensors) != len(plan.tensors) or header.data_offset != len(plan.header):
        raise VerificationError(f"{path}: {len(header.tensors)} tensors, {len(plan.tensors)} were planned")
    for found, planned in zip(header.tensors, plan.tensors, strict=True):
        place = (found.name, found.shape, found.type_name, found.offset, found.nbytes)
        wanted = (planned.spec.name, planned.spec.shape, planned.type_name, planned.offset, planned.nbytes)
        if place != wanted:
            raise VerificationError(f"{path}: found the tensor {place}, {wanted} was planned")
    with path.open("rb") as file:
        if file.read(len(plan.header)) != plan.header:
            raise VerificationError(f"{path}: the header differs from the one that was written")
        for offset, length, checksum in samples.checksums:
            if zlib.crc32(os.pread(file.fileno(), length, offset)) != checksum:
                raise VerificationError(f"{path}: the bytes at {offset} differ from those that were written")
