"""The digest of a file that is written in any order."""

from __future__ import annotations

import hashlib
import random

import pytest

from quantize.digest import RunningDigest
from quantize.plan import Plan, PlannedTensor
from quantize.tensors import TensorSpec

HEADER = b"h" * 96
ROWS, ROW_BYTES, TENSORS = 300, 64, 4
TENSOR_BYTES = ROWS * ROW_BYTES


class Written:
    """A file in memory that counts what is read back."""

    def __init__(self, size: int) -> None:
        self.content = bytearray(size)
        self.read = 0

    def read_back(self, offset: int, length: int) -> bytes:
        """Give a few bytes at a time, as `pread` may."""
        data = bytes(self.content[offset : offset + min(length, 5000)])
        self.read += len(data)
        return data


def digests(order: list[tuple[int, int]], kept_bytes: int, written_before: int = 0) -> int:
    """Write ranges in an order, compare every digest with hashlib's, and return how much was read back."""
    plan = Plan(HEADER, [tensor(number) for number in range(TENSORS)], len(HEADER) + TENSORS * TENSOR_BYTES)
    whole = HEADER + random.Random(1).randbytes(plan.file_size - len(HEADER))
    file = Written(plan.file_size)
    digest = RunningDigest(plan, file.read_back, kept_bytes)
    file.content[:written_before] = whole[:written_before]
    digest.take_written([(0, written_before)] if written_before else [])
    for start, end in order:
        file.content[start:end] = whole[start:end]
        buffer = bytearray(whole[start:end])
        digest.take(start, memoryview(buffer))
        buffer[:] = bytes(len(buffer))  # the caller uses it again
    found = digest.finish()
    assert found.sha256 == hashlib.sha256(whole).hexdigest()
    assert found.header == hashlib.sha256(HEADER).hexdigest()
    ends = [len(HEADER) + (number + 1) * TENSOR_BYTES for number in range(TENSORS)]
    assert list(found.through) == [hashlib.sha256(whole[:end]).hexdigest() for end in ends]
    return file.read


def tensor(number: int) -> PlannedTensor:
    """Return one of the tensors, which follow each other without padding."""
    spec = TensorSpec(f"blk.{number}", (ROWS, 16), ())
    return PlannedTensor(spec, "f32", number * TENSOR_BYTES, ROW_BYTES)


def ranges_of(number: int, count: int = 10) -> list[tuple[int, int]]:
    """Cut a tensor into ranges."""
    size = TENSOR_BYTES // count
    first = len(HEADER) + number * TENSOR_BYTES
    return [(first + piece * size, first + (piece + 1) * size) for piece in range(count)]


def by_turns() -> list[tuple[int, int]]:
    """Write the second and third tensor by turns, as gates and ups are."""
    turns = [piece for pair in zip(ranges_of(1), ranges_of(2), strict=True) for piece in pair]
    return [(0, len(HEADER)), *ranges_of(0), *turns, *ranges_of(3)]


def test_in_order_nothing_is_read() -> None:
    order = [(0, len(HEADER)), *(piece for number in range(TENSORS) for piece in ranges_of(number))]
    assert digests(order, kept_bytes=0) == 0


def test_by_turns_nothing_is_read_if_there_is_room() -> None:
    assert digests(by_turns(), kept_bytes=TENSOR_BYTES) == 0


@pytest.mark.parametrize("room", [0, TENSOR_BYTES // 10, TENSOR_BYTES // 2])
def test_by_turns_only_what_does_not_fit_is_read(room: int) -> None:
    in_place = TENSOR_BYTES // 10  # the third tensor's last range comes when the second tensor is complete
    assert digests(by_turns(), kept_bytes=room) == TENSOR_BYTES - in_place - room


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("room", [0, 5000, 1 << 20])
def test_any_order(seed: int, room: int) -> None:
    order = [(0, len(HEADER)), *(piece for number in range(TENSORS) for piece in ranges_of(number))]
    random.Random(seed).shuffle(order)
    read = digests(order, kept_bytes=room)
    assert (read == 0) == (room == 1 << 20)


@pytest.mark.parametrize("written", [10, len(HEADER), len(HEADER) + TENSOR_BYTES + 7])
def test_what_an_earlier_run_wrote_is_read_once(written: int) -> None:
    end = len(HEADER) + TENSORS * TENSOR_BYTES
    assert digests([(written, end)], kept_bytes=0, written_before=written) == written
