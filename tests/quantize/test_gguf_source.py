"""A GGUF as a source: every byte of the result is llama-quantize's; quantizing again is refused without a flag."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.errors import CheckpointError, ModelFileError, PestleError, UsageError
from app.llama import quantizer
from app.models.gguf import read_header
from app.models.gguf_types import ValueType
from quantize.cli import main
from quantize.gguf_source import open_gguf
from quantize.header import TensorEntry, Value, encode_header
from quantize.pipeline import prepare, quantize, run, run_all
from quantize.recipe import RECIPES

Make = Callable[[str, str], Path]
TYPES = ("q8_0", "q4_k_m", "f16", "f32")


@pytest.fixture(scope="session")
def gguf_of(checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Return a function from a shape and a type to its GGUF, made once. Tests don't change these."""
    folder = tmp_path_factory.mktemp("ggufs")

    def get(shape: str, type_name: str) -> Path:
        path = folder / f"{shape}-{type_name}.gguf"
        if not path.exists():
            quantize(checkpoint_of(shape), type_name, path, threads=2)
        return path

    return get


def upstream(source: Path, type_name: str, folder: Path, *, allow: bool = False) -> bytes:
    """Return what llama.cpp's own quantizer makes of the file."""
    out = folder / "theirs.gguf"
    quantizer.quantize_file(source, out, RECIPES[type_name].file_type, threads=2, allow_requantize=allow)
    return out.read_bytes()


@pytest.mark.parametrize(("shape", "stored"), [("llama3", "bf16"), ("smollm", "f16"), ("smollm", "f32")])
def test_every_byte_is_llama_quantizes(shape: str, stored: str, gguf_of: Make, tmp_path: Path) -> None:
    source = gguf_of(shape, stored)
    for type_name in TYPES:
        quantize(source, type_name, tmp_path / "ours.gguf", threads=2)
        assert (tmp_path / "ours.gguf").read_bytes() == upstream(source, type_name, tmp_path), type_name


@pytest.mark.parametrize("stored", ["q8_0", "q4_k_m", "q5_1"])
def test_quantized_again(stored: str, gguf_of: Make, tmp_path: Path) -> None:
    source = gguf_of("llama3", stored)
    outs = [tmp_path / f"{name}.gguf" for name in TYPES]
    run_all(prepare(source, TYPES, allow_requantize=True), outs, threads=2)
    for name, out in zip(TYPES, outs, strict=True):
        assert out.read_bytes() == upstream(source, name, tmp_path, allow=True), name


def test_what_would_be_quantized_again_is_refused(gguf_of: Make, tmp_path: Path) -> None:
    source = gguf_of("llama3", "q4_k_m")
    with pytest.raises(ModelFileError, match="requantizing from type"):
        upstream(source, "q8_0", tmp_path)
    with pytest.raises(UsageError, match=r"output.weight is q6_K already; .* --allow-requantize does it") as caught:
        prepare(source, ["f32", "q8_0"])
    assert caught.value.exit_code == 2
    same = gguf_of("llama3", "q8_0")
    quantize(same, "q8_0", tmp_path / "copy.gguf")
    assert (tmp_path / "copy.gguf").read_bytes() == upstream(same, "q8_0", tmp_path) == same.read_bytes()


def rewritten(source: Path, out: Path, extra: dict[str, Value], *, gone: tuple[str, ...] = ()) -> Path:
    """Write the file with other keys: `extra` first."""
    header, keys = read_header(source), open_gguf(source).keys
    keys.values = {**extra, **{key: value for key, value in keys.values.items() if key not in gone}}
    entries = [TensorEntry(each.name, each.shape, each.type_name, each.offset) for each in header.tensors]
    out.write_bytes(encode_header(keys, entries) + source.read_bytes()[header.data_offset :])
    return out


def test_keys_of_every_type_are_carried_over(gguf_of: Make, tmp_path: Path) -> None:
    numbers: dict[ValueType, Any] = {kind: 7 for kind in ValueType if kind not in {ValueType.STRING, ValueType.ARRAY}}
    numbers |= {ValueType.BOOL: True, ValueType.FLOAT32: 0.1, ValueType.FLOAT64: 0.1, ValueType.INT64: -(1 << 40)}
    extra = {f"test.{kind.name}": Value(kind, content) for kind, content in numbers.items()}
    extra |= {
        f"test.many.{kind.name}": Value(ValueType.ARRAY, [content] * 3, kind) for kind, content in numbers.items()
    }
    extra |= {
        "test.text": Value(ValueType.STRING, "before\0after"),
        "test.empty": Value(ValueType.STRING, ""),
        "test.texts": Value(ValueType.ARRAY, ["a", "", "b\0c", b"\xff\xfe", "ü"], ValueType.STRING),
        "test.no.texts": Value(ValueType.ARRAY, [], ValueType.STRING),
        "test.no.numbers": Value(ValueType.ARRAY, [], ValueType.INT16),
        "split.no": Value(ValueType.UINT16, 0),
        "split.count": Value(ValueType.UINT16, 1),
        "split.tensors.count": Value(ValueType.INT32, 1),
        "general.alignment": Value(ValueType.UINT32, 32),
    }
    source = rewritten(gguf_of("smollm", "bf16"), tmp_path / "in.gguf", extra)
    quantize(source, "q8_0", tmp_path / "ours.gguf")
    assert (tmp_path / "ours.gguf").read_bytes() == upstream(source, "q8_0", tmp_path)
    header = read_header(tmp_path / "ours.gguf")
    assert header.item_types["test.no.numbers"] is ValueType.INT16
    assert header.metadata["test.texts"] == ["a", "", "b", "\udcff\udcfe", "ü"]
    assert "split.count" not in header.metadata


def with_keys(extra: dict[str, Value]) -> Callable[[Path, Path], Path]:
    return lambda source, out: rewritten(source, out, extra)


def cut(source: Path, out: Path) -> None:
    out.write_bytes(source.read_bytes()[:-64])


def no_tensors(source: Path, out: Path) -> None:
    out.write_bytes(encode_header(open_gguf(source).keys, []))


def infinite(source: Path, out: Path) -> None:
    header, content = read_header(source), bytearray(source.read_bytes())
    tensor = next(each for each in header.tensors if each.name == "blk.1.ffn_up.weight")
    start = header.data_offset + tensor.offset
    content[start : start + 2] = b"\x80\x7f" if tensor.type_name == "bf16" else b"\0\x7c"  # q8_0 begins with an f16
    out.write_bytes(content)


def in_parts(source: Path, folder: Path, count: int = 3, *, name: str = "m") -> Path:
    """Write a GGUF in parts, the first without tensors as llama-gguf-split can do it. Returns the first."""
    header, content = read_header(source), source.read_bytes()
    each = -(-len(header.tensors) // (count - 1))
    for number in range(count):
        tensors = header.tensors[each * (number - 1) : each * number] if number else []
        keys = open_gguf(source).keys
        if number:
            keys.values.clear()
        keys.values |= {
            "split.no": Value(ValueType.UINT16, number),
            "split.count": Value(ValueType.UINT16, count),
            "split.tensors.count": Value(ValueType.INT32, len(header.tensors)),
        }
        entries, data = [], b""
        for tensor in tensors:
            entries.append(TensorEntry(tensor.name, tensor.shape, tensor.type_name, len(data)))
            start = header.data_offset + tensor.offset
            data += content[start : start + tensor.nbytes] + bytes(-tensor.nbytes % 32)
        (folder / f"{name}-{number + 1:05}-of-{count:05}.gguf").write_bytes(encode_header(keys, entries) + data)
    return folder / f"{name}-00001-of-{count:05}.gguf"


@pytest.mark.parametrize("stored", ["bf16", "q8_0"])
def test_parts_are_read_as_one(stored: str, gguf_of: Make, tmp_path: Path) -> None:
    first = in_parts(gguf_of("llama3", stored), tmp_path)
    quantize(first, "q4_0", tmp_path / "ours.gguf", allow_requantize=True)
    assert (tmp_path / "ours.gguf").read_bytes() == upstream(first, "q4_0", tmp_path, allow=True)
    with pytest.raises(UsageError, match="is a file of the model itself"):
        quantize(first, "q4_0", tmp_path / "m-00003-of-00003.gguf", allow_requantize=True)


def lose(first: Path) -> Path:
    (first.parent / "m-00002-of-00003.gguf").unlink()
    return first


def mix(first: Path) -> Path:
    third = first.with_name("m-00003-of-00003.gguf")
    third.write_bytes(first.with_name("m-00002-of-00003.gguf").read_bytes())
    return first


BAD_PARTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "not the first": (lambda first: first.with_name("m-00002-of-00003.gguf"), "part 2 of 3; give the first, m-00001"),
    "missing": (lose, "missing beside it: m-00002-of-00003.gguf"),
    "other part": (mix, r"m-00003-of-00003.gguf: split.no.* must be \[2, 3"),
    "renamed": (lambda first: first.rename(first.with_name("first.gguf")), "is called NAME-00001-of-00003.gguf"),
}


@pytest.mark.parametrize("case", BAD_PARTS)
def test_parts_that_do_not_fit(case: str, gguf_of: Make, tmp_path: Path) -> None:
    damage, message = BAD_PARTS[case]
    source = damage(in_parts(gguf_of("smollm", "bf16"), tmp_path))
    with pytest.raises(ModelFileError, match=message):
        prepare(source, "q8_0")


BAD: dict[str, tuple[Callable[[Path, Path], Any], type[PestleError], str]] = {
    "alignment": (
        with_keys({"general.alignment": Value(ValueType.UINT32, 64)}), ModelFileError, "offset|is 64; 32 is read"
    ),
    "truncated": (cut, ModelFileError, "truncated"),
    "no tensors": (no_tensors, ModelFileError, "holds no tensors"),
    "infinite": (infinite, CheckpointError, "'blk.1.ffn_up.weight' holds"),
    "no architecture": (
        lambda source, out: rewritten(source, out, {}, gone=("general.architecture",)), ModelFileError, "cannot quant"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("stored", ["bf16", "q8_0"])
def test_bad_input(case: str, stored: str, gguf_of: Make, tmp_path: Path) -> None:
    damage, error, message = BAD[case]
    source = tmp_path / "in.gguf"
    damage(gguf_of("llama3", stored), source)
    (tmp_path / "out").mkdir()
    for type_name in ("q4_0", "q8_0"):
        with pytest.raises(error, match=message):
            quantize(source, type_name, tmp_path / "out" / "out.gguf", allow_requantize=True)
    assert list((tmp_path / "out").iterdir()) == []


def test_the_command(
    gguf_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "Model.gguf"
    source.write_bytes(gguf_of("llama3", "q8_0").read_bytes())
    assert main(["Model.gguf", "--type", "q4_0"]) == 2
    assert "--allow-requantize" in capsys.readouterr().err
    assert main(["Model.gguf", "--type", "q4_0", "--allow-requantize", "--no-measure"]) == 0
    assert (tmp_path / "Model-Q4_0.gguf").read_bytes() == upstream(source, "q4_0", tmp_path, allow=True)
    before = source.read_bytes()
    assert main(["Model.gguf", "--type", "q4_0", "--allow-requantize", "--out", "Model.gguf"]) == 2
    assert source.read_bytes() == before


def test_progress_counts_what_is_stored(gguf_of: Make, tmp_path: Path) -> None:
    source = gguf_of("llama3", "q4_k_m")
    steps: list[tuple[int, int]] = []
    prepared = prepare(source, "q8_0", allow_requantize=True)
    run(prepared, tmp_path / "out.gguf", progress=lambda *step: steps.append(step))
    stored = sum(each.nbytes for each in read_header(source).tensors)
    assert steps[-1] == (stored, stored)
