"""Makes a file's bytes again from its source, without writing them, and compares them with what the file holds."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from app.errors import StorageError
from app.models.gguf import Header, TensorInfo, read_header_bytes
from quantize.encoding import available_cpus, encoded
from quantize.plan import Plan
from quantize.prepared import Prepared
from quantize.slabs import Slab
from quantize.verdict import HEADER, TENSOR, Difference

SOURCE = "source"
OUR_KEYS = "pestle."
_SHOWN = 60


def source_differences(
    header: Header, prepared: Prepared, *, threads: int | None, progress: Callable[[int, int], None] | None
) -> list[Difference]:
    """Carry the plan of one file out in memory; return how its header differs, and each tensor that does.

    `header` is that of the file, with all its arrays. Memory is bounded as in a run. Raises `StorageError`.
    """
    plan = prepared.plan
    wanted = read_header_bytes(plan.header, header.path, plan.file_size)
    found = list(_header_differences(header, wanted))
    same = _same_tensors(header, wanted)
    damaged: dict[str, str] = {}
    done, total = 0, prepared.source_bytes
    with contextlib.ExitStack() as stack:
        stack.enter_context(prepared.checkpoint)
        if prepared.importance is not None:
            stack.enter_context(prepared.importance)
        file = stack.enter_context(_opened(header.path))
        pieces_of_slabs = encoded(
            [plan],
            prepared.checkpoint,
            threads or available_cpus(),
            through_bf16=[prepared.through_bf16 and prepared.outputs[0].recipe.quantized],
            importance=prepared.importance,
        )
        for (slab,), (data,) in stack.enter_context(contextlib.closing(pieces_of_slabs)):
            name = slab.tensor.spec.name
            if name in same and name not in damaged:
                place = header.data_offset + same[name].offset + slab.offset
                if (byte := _first_difference(file, place, data)) is not None:
                    damaged[name] = _described(slab, byte)
            done += prepared.bytes_of(slab)
            if progress is not None:
                progress(done, total)
    found += [Difference(SOURCE, TENSOR, damaged[name], name) for name in _order(plan) if name in damaged]
    return found + list(_padding_differences(header))


def _header_differences(header: Header, wanted: Header) -> Iterator[Difference]:
    for key in [*wanted.metadata, *(key for key in header.metadata if key not in wanted.metadata)]:
        if key.startswith(OUR_KEYS):
            continue
        here, there = (one.metadata.get(key, _ABSENT) for one in (header, wanted))
        types = [(one.types.get(key), one.item_types.get(key)) for one in (header, wanted)]
        if here != there or types[0] != types[1]:
            message = f"the key {key} is {_short(here)}; the source gives {_short(there)}"
            yield Difference(SOURCE, HEADER, message, key)
    places = [[(tensor.name, tensor.type, tensor.dims) for tensor in one.tensors] for one in (header, wanted)]
    for here_, there_ in zip(*places, strict=False):
        if here_ != there_:
            yield Difference(SOURCE, HEADER, f"the tensor {here_} is where the source gives {there_}", here_[0])
            return
    if len(places[0]) != len(places[1]):
        yield Difference(SOURCE, HEADER, f"{len(places[0])} tensors; the source gives {len(places[1])}")
    elif list(header.metadata) != list(wanted.metadata) and header.metadata.keys() == wanted.metadata.keys():
        yield Difference(SOURCE, HEADER, "the keys are in another order than the source gives")


class _Absent:
    def __repr__(self) -> str:
        return "not there"


_ABSENT = _Absent()


def _short(content: object) -> str:
    text = repr(content)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _same_tensors(header: Header, wanted: Header) -> dict[str, TensorInfo]:
    kinds = {tensor.name: (tensor.type, tensor.dims) for tensor in wanted.tensors}
    return {tensor.name: tensor for tensor in header.tensors if kinds.get(tensor.name) == (tensor.type, tensor.dims)}


def _order(plan: Plan) -> list[str]:
    return [tensor.spec.name for tensor in plan.tensors]


def _first_difference(file: int, place: int, data: memoryview) -> int | None:
    """Return the place in the file of the first byte that is another one, None if all are the same."""
    found = os.pread(file, len(data), place)
    if found == data:
        return None
    if len(found) < len(data):
        return place + len(found)
    differs = np.frombuffer(found, dtype=np.uint8) != np.frombuffer(data, dtype=np.uint8)
    return place + int(differs.argmax())


def _described(slab: Slab, byte: int) -> str:
    name, type_name = slab.tensor.spec.name, slab.tensor.type_name
    return f"{name} ({type_name}) is not what the source gives, from byte {byte} of the file on"


def _padding_differences(header: Header) -> Iterator[Difference]:
    """Yield tensors behind which there is something else than zeros up to where the next begins."""
    ends = [header.data_offset + tensor.offset for tensor in header.tensors[1:]]
    with _opened(header.path) as file:
        for tensor, end in zip(header.tensors, [*ends, header.file_size], strict=True):
            start = header.data_offset + tensor.offset + tensor.nbytes
            if end - start > header.alignment or any(os.pread(file, end - start, start)):
                message = f"bytes {start} to {end}, behind {tensor.name}, are not the zeros that belong there"
                yield Difference(SOURCE, TENSOR, message, tensor.name)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield file
        finally:
            os.close(file)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error
