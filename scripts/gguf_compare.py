"""Compare two GGUF files: whole, else key by key and tensor by tensor."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from app.models.gguf import read_header

if TYPE_CHECKING:
    from pathlib import Path

    from app.models.gguf import Header

LAST_PLACE = ", by one unit in the last place"


@dataclass
class Comparison:
    """What differs. `keys` and `tensors` have one line for each difference; `layout` has those of order and padding.

    `failed` says why there is nothing to compare.
    """

    sha256: str = ""
    identical: bool = False
    tensor_count: int = 0
    keys: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    layout: list[str] = field(default_factory=list)
    failed: str = ""


def compare(ours: Path, theirs: Path) -> Comparison:
    """Compare `ours` with `theirs`, which is taken to be right."""
    digest, expected = file_sha256(ours), file_sha256(theirs)
    left, right = read_header(ours), read_header(theirs)
    result = Comparison(digest, digest == expected, len(right.tensors))
    if result.identical:
        return result
    _compare_keys(left, right, result)
    _compare_tensors(left, right, result)
    if not result.keys and not result.tensors and not result.layout:
        result.layout.append("bytes between the parts (padding) differ")
    return result


def file_sha256(path: Path) -> str:
    """Return the digest of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _compare_keys(left: Header, right: Header, result: Comparison) -> None:
    for key in [*right.metadata, *(key for key in left.metadata if key not in right.metadata)]:
        if key not in left.metadata:
            result.keys[key] = f"missing; upstream: {_short(right.metadata[key])}"
        elif key not in right.metadata:
            result.keys[key] = f"{_short(left.metadata[key])}; upstream: no such key"
        elif left.types[key] != right.types[key]:
            result.keys[key] = f"type {left.types[key].name}; upstream: {right.types[key].name}"
        elif left.metadata[key] != right.metadata[key]:
            result.keys[key] = _value_difference(left.metadata[key], right.metadata[key])
    if not result.keys and list(left.metadata) != list(right.metadata):
        pairs = zip(left.metadata, right.metadata, strict=True)
        ours, theirs = next((a, b) for a, b in pairs if a != b)
        result.layout.append(f"keys in another order: first {ours}; upstream: {theirs}")


def _value_difference(ours: Any, theirs: Any) -> str:
    if isinstance(ours, list) and isinstance(theirs, list):
        if len(ours) != len(theirs):
            return f"{len(ours)} items; upstream: {len(theirs)}"
        differing = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
        first = differing[0]
        return f"{len(differing)} items, first {first}: {_short(ours[first])}; upstream: {_short(theirs[first])}"
    return f"{_short(ours)}; upstream: {_short(theirs)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _compare_tensors(left: Header, right: Header, result: Comparison) -> None:
    ours = {tensor.name: tensor for tensor in left.tensors}
    theirs = {tensor.name: tensor for tensor in right.tensors}
    left_bytes, right_bytes = (np.memmap(header.path, np.uint8, "r") for header in (left, right))
    for name in [*theirs, *(name for name in ours if name not in theirs)]:
        if name not in ours or name not in theirs:
            result.tensors[name] = "missing" if name in theirs else "upstream: no such tensor"
            continue
        a, b = ours[name], theirs[name]
        if (a.type, a.dims) != (b.type, b.dims):
            result.tensors[name] = f"{a.type_name} {a.dims}; upstream: {b.type_name} {b.dims}"
            continue
        start, expected_start = left.data_offset + a.offset, right.data_offset + b.offset
        same = left_bytes[start : start + a.nbytes] == right_bytes[expected_start : expected_start + b.nbytes]
        if not same.all():
            result.tensors[name] = (
                f"{a.type_name}: {int((~same).sum())} of {a.nbytes} bytes, first at {int(same.argmin())}"
            )
            if a.type_name == "f32":
                raw = left_bytes[start : start + a.nbytes], right_bytes[expected_start : expected_start + b.nbytes]
                units = np.abs(np.subtract(*(np.frombuffer(part.tobytes(), np.int32).astype(np.int64) for part in raw)))
                result.tensors[name] += LAST_PLACE if units.max() == 1 else ""
    if list(ours) != list(theirs) and set(ours) == set(theirs):
        first, expected = next((a, b) for a, b in zip(ours, theirs, strict=True) if a != b)
        result.layout.append(f"tensors in another order: first {first}; upstream: {expected}")
