"""The GGUF reader: what it reads, and that nothing hostile gets past it."""

from __future__ import annotations

import ctypes
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.errors import ModelFileError, StorageError
from app.llama.library import ggml_base
from app.models.gguf import SkippedArray, read_header
from app.models.gguf_types import TENSOR_TYPES, ValueType
from quantize.header import KeyTable, TensorEntry, aligned, encode_header


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def gguf(
    keys: bytes = b"", tensors: bytes = b"", *, key_count: int = 0, tensor_count: int = 0, version: int = 3
) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensor_count, key_count) + keys + tensors


def key(name: bytes, value_type: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", value_type) + value


def tensor(name: bytes, dims: tuple[int, ...], number: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, number, offset)


def sample() -> bytes:
    """Return a whole small file with a key of every type and two tensors."""
    keys = KeyTable()
    keys.text("general.architecture", "llama")
    keys.text("general.name", "Tiny")
    keys.u32("llama.context_length", 2048)
    keys.u32("general.file_type", 7)
    keys.i32("a.signed", -5)
    keys.f32("a.float", 0.5)
    keys.boolean("a.flag", True)
    keys.array("a.words", ValueType.STRING, ["eins", "zwei", "dr\u00e4i", b"\xff\xfe"])
    keys.array("a.numbers", ValueType.INT32, list(range(100)))
    keys.text("tokenizer.chat_template", "{{ messages }}")
    entries = [TensorEntry("first", (3, 32), "q8_0", 0), TensorEntry("second", (5,), "f32", aligned(102))]
    return encode_header(keys, entries) + bytes(aligned(102) + aligned(20))


def read(content: bytes, folder: Path, **options: Any) -> Any:
    path = folder / "model.gguf"
    path.write_bytes(content)
    return read_header(path, **options)


def test_everything_arrives(tmp_path: Path) -> None:
    header = read(sample(), tmp_path)
    assert (header.architecture, header.name, header.context_length) == ("llama", "Tiny", 2048)
    assert (header.file_type, header.chat_template) == (7, "{{ messages }}")
    assert header.metadata["a.signed"] == -5
    assert header.metadata["a.float"] == 0.5
    assert header.metadata["a.flag"] is True
    assert header.metadata["a.words"][:3] == ["eins", "zwei", "dr\u00e4i"]
    assert header.metadata["a.words"][3].encode(errors="surrogateescape") == b"\xff\xfe"
    assert header.metadata["a.numbers"] == list(range(100))
    first, second = header.tensors
    assert (first.shape, first.dims, first.type_name, first.nbytes) == ((3, 32), (32, 3), "q8_0", 102)
    assert second.offset == 128
    assert header.data_offset % header.alignment == 0


def test_large_arrays_can_be_skipped(tmp_path: Path) -> None:
    header = read(sample(), tmp_path, largest_array=10)
    assert header.metadata["a.numbers"] == SkippedArray(ValueType.INT32, 100)
    assert len(header.metadata["a.words"]) == 4
    assert read(sample(), tmp_path, largest_array=3).metadata["a.words"] == SkippedArray(ValueType.STRING, 4)
    assert header.chat_template == "{{ messages }}"


def test_arrays_across_the_buffers_end(tmp_path: Path) -> None:
    keys = KeyTable()
    words = [f"word {number} " + "x" * (number % 70) for number in range(60_000)]
    keys.array("words", ValueType.STRING, words)
    keys.text("after", "here")
    for largest in (None, 5):
        header = read(encode_header(keys, []), tmp_path, largest_array=largest)
        assert header.metadata["after"] == "here"
    assert read(encode_header(keys, []), tmp_path).metadata["words"] == words


HUGE = 1 << 62
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too short"),
    "other": (b"PK\x03\x04" + bytes(60), "does not begin with GGUF"),
    "short": (b"GGUF\x03\x00", "does not begin|too short"),
    "version": (gguf(version=1) + bytes(8), "version 1"),
    "big-endian": (gguf(version=3 << 24), "big-endian"),
    "many keys": (gguf(key_count=HUGE), "claims 4611686018427387904 keys"),
    "many tensors": (gguf(tensor_count=HUGE), "claims 4611686018427387904 tensors"),
    "49 bytes": (
        gguf(key(b"a", 9, struct.pack("<IQ", 4, HUGE)), key_count=1),
        "the array 'a' claims 4611686018427387904 items",
    ),
    "long key": (gguf(struct.pack("<Q", HUGE) + bytes(40), key_count=1), "a key claims"),
    "long string": (gguf(key(b"a", 8, struct.pack("<Q", 1 << 40)), key_count=1), "the value of 'a' claims"),
    "string in array": (
        gguf(key(b"a", 9, struct.pack("<IQ", 8, 2) + struct.pack("<QQ", 1 << 40, 0)), key_count=1),
        "the array 'a' claims",
    ),
    "nested": (gguf(key(b"a", 9, struct.pack("<IQIQ", 9, 1, 4, 1)), key_count=1), "array of arrays"),
    "value type": (gguf(key(b"a", 77, bytes(8)), key_count=1), "'a' has the unknown value type 77"),
    "twice": (gguf(key(b"a", 4, bytes(4)) * 2, key_count=2), "the key 'a' appears twice"),
    "empty key": (gguf(key(b"", 4, bytes(40)), key_count=1), "a key is empty"),
    "key bytes": (gguf(key(b"\xff", 4, bytes(40)), key_count=1), "a key is not UTF-8"),
    "alignment": (
        gguf(key(b"general.alignment", 4, struct.pack("<I", 48)), key_count=1),
        "general.alignment is 48",
    ),
    "alignment 0": (gguf(key(b"general.alignment", 4, bytes(4)), key_count=1), "general.alignment is 0"),
    "no dimensions": (gguf(tensors=tensor(b"t", ()) + bytes(64), tensor_count=1), "'t' has 0 dimensions"),
    "many dimensions": (gguf(tensors=tensor(b"t", (1,) * 9), tensor_count=1), "'t' has 9 dimensions"),
    "zero": (gguf(tensors=tensor(b"t", (0, 4)) + bytes(64), tensor_count=1), "impossible shape"),
    "overflow": (gguf(tensors=tensor(b"t", (HUGE, HUGE)) + bytes(64), tensor_count=1), "truncated: the tensor 't'"),
    "block": (gguf(tensors=tensor(b"t", (33,), 8) + bytes(64), tensor_count=1), "impossible shape"),
    "type": (gguf(tensors=tensor(b"t", (4,), 4) + bytes(64), tensor_count=1), "unknown type 4"),
    "offset": (gguf(tensors=tensor(b"t", (4,), 0, 32) + bytes(99), tensor_count=1), "at offset 32; 0 was expected"),
    "name": (gguf(tensors=tensor(b"t" * 64, (4,)) + bytes(64), tensor_count=1), "name claims 64 bytes"),
    "same name": (gguf(tensors=tensor(b"t", (4,)) * 2 + bytes(64), tensor_count=2), "'t' appears twice"),
    "no weights": (sample()[:-32], "truncated: the tensors end"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_at_once(case: str, tmp_path: Path) -> None:
    content, message = HOSTILE[case]
    began = time.monotonic()
    with pytest.raises(ModelFileError, match=message):
        read(content, tmp_path)
    assert time.monotonic() - began < 1


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    whole = sample()
    for length in range(len(whole) - 12):  # the last bytes are padding, which nobody misses
        with pytest.raises(ModelFileError):
            read(whole[:length], tmp_path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), min_size=1, max_size=6))
def test_changed_bytes_are_read_or_refused(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    content = bytearray(sample())
    for place, byte in changes:
        content[place % len(content)] = byte
    try:
        read(bytes(content), tmp_path)
    except ModelFileError as error:
        assert "model.gguf" in error.message  # noqa: PT017 - most changes are harmless


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be read"):
        read_header(tmp_path / "none.gguf")


def test_the_table_of_types_is_ggmls() -> None:
    base = ggml_base()
    base.ggml_type_name.restype = ctypes.c_char_p
    base.ggml_type_size.restype = ctypes.c_size_t
    base.ggml_blck_size.restype = ctypes.c_int64
    for number, (name, weights, nbytes) in TENSOR_TYPES.items():
        assert base.ggml_type_name(number).decode() == name
        assert base.ggml_blck_size(number) == weights
        assert base.ggml_type_size(number) == nbytes
