"""Importance matrices in use: what llama-quantize makes with the same file, and what cannot be used."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from app.errors import ModelFileError, UsageError
from app.llama import quantizer
from app.llama.quantizer import Choices
from app.models.gguf import read_header
from app.models.gguf_types import TENSOR_TYPE_NUMBERS, ValueType
from quantize.cli import main
from quantize.header import KeyTable, TensorEntry, aligned, encode_header
from quantize.importance import ImportanceMatrix
from quantize.pipeline import prepare, quantize, run_all
from quantize.recipe import NEEDS_IMPORTANCE, RECIPES, Overrides, override
from tests.quantize.checkpoints import Shape, make_checkpoint
from tests.quantize.test_family_granite import HYBRID
from tests.quantize.test_family_granite import make as make_granite

Sums = dict[str, tuple[NDArray[np.float32], list[float]]]
"""Tensor name → sums of squares (experts × columns), and how often each expert was seen."""

DENSE = Shape(layers=1, hidden=256, heads=4, key_heads=1, feed_forward=256)
DEEP = Shape(layers=8, hidden=64, heads=2, key_heads=1, feed_forward=64)
TYPES = ["q4_0", "q5_1", "q4_k_m", "q5_k_s", "q6_k", "q3_k_m", "q2_k", "iq4_xs"]
DATASET = "a text of mine.txt"


def write_gguf(path: Path, sums: Sums, **keys: Any) -> Path:
    """Write a matrix as llama-imatrix does; `keys` change its three keys, None leaves one out."""
    table = KeyTable()
    table.text("general.type", "imatrix")
    if (datasets := keys.get("datasets", [DATASET, "another"])) is not None:
        table.array("imatrix.datasets", ValueType.STRING, datasets)
    for name, number in (("chunk_count", 7), ("chunk_size", 512)):
        if (value := keys.get(name, number)) is not None:
            table.u32(f"imatrix.{name}", value)
    arrays: dict[str, NDArray[np.float32]] = {}
    for name, (values, counts) in sums.items():
        arrays[f"{name}.in_sum2"] = values
        arrays[f"{name}.counts"] = np.array(counts, np.float32).reshape(-1, 1)
    entries, data = [], b""
    for name, array in arrays.items():
        entries.append(TensorEntry(name, array.shape, "f32", len(data)))
        data += array.tobytes()
        data += bytes(aligned(len(data)) - len(data))
    path.write_bytes(encode_header(table, entries) + data)
    return path


def write_legacy(path: Path, sums: Sums, calls: int = 3, *, end: bool = True) -> Path:
    """Write a matrix in the older format."""
    data = struct.pack("<i", len(sums))
    for name, (values, _) in sums.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, values.size)
        data += values.tobytes()
    if end:
        data += struct.pack("<ii", 9, len(DATASET)) + DATASET.encode()
    path.write_bytes(data)
    return path


def sums_of(bf16: Path, *, without: tuple[str, ...] = ("token_embd.weight",)) -> Sums:
    """Return random sums for each matrix of a GGUF; of a stack, the last expert was never seen."""
    random = np.random.default_rng(1)
    sums: Sums = {}
    for tensor in read_header(bf16).tensors:
        if tensor.type_name == "bf16" and tensor.name not in without:
            experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
            values = random.random((experts, tensor.shape[-1]), dtype=np.float32) ** 4 * 100
            sums[tensor.name] = values, [*(100.0 + expert for expert in range(experts - 1)), 0 if experts > 1 else 77]
    return sums


def means(sums: Sums) -> dict[str, NDArray[np.float32]]:
    """Return what llama-quantize makes of sums in the GGUF format."""
    return {
        name: np.stack([row / np.float32(n) if n else np.ones_like(row) for row, n in zip(values, counts, strict=True)])
        for name, (values, counts) in sums.items()
    }


def keys_of(path: Path, entries: int, chunks: int) -> dict[str, int | bytes]:
    """Return the keys that llama-quantize sets."""
    return {
        "quantize.imatrix.file": str(path).encode()[:127],
        "quantize.imatrix.dataset": DATASET.encode(),
        "quantize.imatrix.entries_count": entries,
        "quantize.imatrix.chunks_count": chunks,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the checkpoints `dense`, `deep` and `moe`, their bf16 files, and a matrix for each."""
    folder = tmp_path_factory.mktemp("importance")
    make_checkpoint(folder / "dense", DENSE)
    make_checkpoint(folder / "deep", DEEP)
    make_granite(folder, HYBRID).rename(folder / "moe")
    for name in ("dense", "deep", "moe"):
        quantize(folder / name, "bf16", folder / f"{name}.gguf")
        write_gguf(folder / f"{name}.imatrix", sums_of(folder / f"{name}.gguf"))
    return folder


@pytest.mark.parametrize(("name", "types"), [("dense", TYPES), ("deep", ["q4_0"]), ("moe", ["q5_k_s"])])
def test_every_byte_is_llama_quantizes(name: str, types: list[str], folder: Path, tmp_path: Path) -> None:
    matrix, bf16 = folder / f"{name}.imatrix", folder / f"{name}.gguf"
    outs = [tmp_path / f"{recipe}.gguf" for recipe in types]
    run_all(prepare(folder / name, types, importance=matrix), outs, threads=2)
    sums = sums_of(bf16)
    for recipe, out in zip(types, outs, strict=True):
        quantizer.quantize_file(
            bf16, tmp_path / "theirs.gguf", RECIPES[recipe].file_type, importance=means(sums),
            keys=keys_of(matrix, len(sums), 7), threads=2,
        )  # fmt: skip
        ours, theirs = read_header(out), read_header(tmp_path / "theirs.gguf")
        assert list(ours.metadata.items()) == list(theirs.metadata.items())
        assert [(t.name, t.type_name) for t in ours.tensors] == [(t.name, t.type_name) for t in theirs.tensors]
        assert out.read_bytes() == theirs.path.read_bytes(), recipe


def test_the_matrix_changes_types_and_weights(folder: Path, tmp_path: Path) -> None:
    plain, weighed = prepare(folder / "deep", "q4_0"), prepare(
        folder / "deep", "q4_0", importance=folder / "deep.imatrix"
    )  # fmt: skip
    changed = [
        (ours.spec.name, ours.type_name, theirs.type_name)
        for ours, theirs in zip(weighed.plan.tensors, plain.plan.tensors, strict=True)
        if ours.type_name != theirs.type_name
    ]
    assert changed == [("blk.0.ffn_down.weight", "q4_1", "q4_0")]
    run_all(plain, [tmp_path / "plain"])
    run_all(weighed, [tmp_path / "weighed"])
    assert (tmp_path / "plain").read_bytes()[-2000:] != (tmp_path / "weighed").read_bytes()[-2000:]


@pytest.mark.parametrize(("calls", "end"), [(3, True), (0, True), (5, False)])
def test_the_older_format(calls: int, end: bool, folder: Path, tmp_path: Path) -> None:
    bf16 = folder / "dense.gguf"
    sums = sums_of(bf16)
    matrix = write_legacy(tmp_path / "old.dat", sums, calls, end=end)
    command = [str(folder / "dense"), "--type", "q4_0", "--imatrix", str(matrix), "--out", str(tmp_path / "ours.gguf")]
    assert main([*command, "--format", "quiet", "--no-measure"]) == 0
    keys = keys_of(matrix, len(sums), 9)
    if not end:
        del keys["quantize.imatrix.dataset"], keys["quantize.imatrix.chunks_count"]
    quantizer.quantize_file(
        bf16, tmp_path / "theirs.gguf", RECIPES["q4_0"].file_type, keys=keys,
        importance={name: values / np.float32(calls or 1) for name, (values, _) in sums.items()},
    )  # fmt: skip
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


@pytest.mark.parametrize("name", sorted(NEEDS_IMPORTANCE))
def test_types_that_need_a_matrix(name: str, folder: Path) -> None:
    chosen = Overrides((override(f"blk.0.attn_v={name}"),))
    with pytest.raises(UsageError, match=f"blk.0.attn_v.weight needs an importance matrix to be {name}: --imatrix is"):
        prepare(folder / "dense", "q8_0", chosen)
    types = prepare(folder / "dense", "q8_0", chosen, importance=folder / "dense.imatrix").plan.by_type()
    assert types[name][0] == 1


def test_a_type_with_the_matrix_that_it_needs(folder: Path, tmp_path: Path) -> None:
    matrix, sums = folder / "dense.imatrix", sums_of(folder / "dense.gguf")
    chosen = Overrides((override("blk.0.attn_v=iq3_xxs"),))
    quantize(folder / "dense", "q8_0", tmp_path / "ours.gguf", overrides=chosen, importance=matrix)
    choices = Choices((("blk.0.attn_v", TENSOR_TYPE_NUMBERS["iq3_xxs"]),))
    quantizer.quantize_file(
        folder / "dense.gguf", tmp_path / "theirs.gguf", RECIPES["q8_0"].file_type, choices, importance=means(sums),
        keys=keys_of(matrix, len(sums), 7),
    )  # fmt: skip
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_an_embedding_of_another_size_is_left_aside(folder: Path, tmp_path: Path) -> None:
    bf16 = folder / "dense.gguf"
    sums = sums_of(bf16) | {"token_embd.weight": (np.ones((1, 64), np.float32), [1.0])}
    matrix = write_gguf(tmp_path / "m.gguf", sums)
    quantize(folder / "dense", "q4_k_m", tmp_path / "ours.gguf", importance=matrix)
    quantizer.quantize_file(
        bf16, tmp_path / "theirs.gguf", RECIPES["q4_k_m"].file_type, importance=means(sums),
        keys=keys_of(matrix, len(sums), 7),
    )  # fmt: skip
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_a_matrix_of_another_model(folder: Path, tmp_path: Path) -> None:
    sums = sums_of(folder / "dense.gguf")
    sums["blk.0.ffn_down.weight"] = np.ones((1, 512), np.float32), [1.0]
    matrix = write_gguf(tmp_path / "m.gguf", sums)
    with pytest.raises(
        ModelFileError, match=r"m.gguf: 512 numbers for blk.0.ffn_down.weight, which needs 256: it is an"
    ):
        prepare(folder / "dense", "q4_0", importance=matrix)
    matrix = write_gguf(tmp_path / "m.gguf", {"blk.77.ffn_up.weight": sums["blk.0.ffn_up.weight"]})
    with pytest.raises(ModelFileError, match="holds nothing for this model's tensors"):
        prepare(folder / "dense", "q4_0", importance=matrix)
    del sums["blk.0.ffn_down.weight"]
    matrix = write_gguf(tmp_path / "m.gguf", sums)
    with pytest.raises(UsageError, match=r"blk.0.ffn_down.weight needs .* to be iq2_xs: .*m.gguf has none"):
        prepare(folder / "dense", "q4_0", Overrides((override("ffn_down=iq2_xs"),)), importance=matrix)


def test_it_does_nothing_for_floats(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        str(folder / "dense"),
        "--type",
        "bf16,f32",
        "--imatrix",
        str(folder / "dense.imatrix"),
        "--format",
        "json",
    ]
    assert main(command) == 2
    assert "does nothing for files that are not quantized" in json.loads(capsys.readouterr().out)["message"]


ONE: Sums = {"a": (np.ones((1, 4), np.float32), [1.0])}
BAD_NUMBERS = [np.nan, np.inf, -1.0]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"datasets": None}, "lacks the key imatrix.datasets; llama-imatrix makes one"),
        ({"chunk_count": None}, "lacks the key imatrix.chunk_count"),
        ({"chunk_size": None}, "lacks the key imatrix.chunk_size"),
        *((np.full((1, 4), number, np.float32), "'a' that are negative or no numbers") for number in BAD_NUMBERS),
        *(([number], "counts of 'a' that are no counts") for number in BAD_NUMBERS),
        ([1.0, 1.0, 1.0], "sums (1, 4) and counts (3, 1) of 'a' do not belong together"),
        (b"", "the number of entries needs 4 bytes at 0 of 0"),
        (b"\0\0\0\0", "neither a GGUF nor the older format"),
        (struct.pack("<iiB", 1, 1 << 30, 0), "a name of 1073741824 bytes"),
        (struct.pack("<ii", 1, -1), "a name of -1 bytes"),
        (struct.pack("<iicii", 1, 1, b"a", 1, 1 << 30), "1073741824 numbers for 'a' at byte 17 of 17"),
        (struct.pack("<iicii", 1, 1, b"a", 1, -4), "-4 numbers for 'a'"),
        (struct.pack("<iiciif", 2, 1, b"a", 1, 1, 1.0), "a name's length needs 4 bytes at 21 of 21"),
        (struct.pack("<iiciif", 1, 1, b"a", 1, 1, np.nan), "'a' that are negative or no numbers"),
    ],
)  # fmt: skip
def test_damaged_files(content: Any, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "matrix"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        write_gguf(path, ONE, **content)
    else:
        write_gguf(path, {"a": (content, [1.0]) if isinstance(content, np.ndarray) else (ONE["a"][0], content)})
    with pytest.raises(ModelFileError) as caught:
        ImportanceMatrix.open(path)
    assert complaint in caught.value.message
    assert str(path) in caught.value.message


def test_any_cut_is_told(tmp_path: Path) -> None:
    for write in (write_gguf, write_legacy):
        whole = write(tmp_path / "whole", ONE).read_bytes()
        needed = len(whole) if write is write_gguf else len(whole) - len(DATASET) - 8  # the end may be missing
        for length in range(needed - 31 if write is write_gguf else needed):
            (tmp_path / "cut").write_bytes(whole[:length])
            with pytest.raises(ModelFileError):
                ImportanceMatrix.open(tmp_path / "cut")


def test_sums_without_counts(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m", ONE).read_bytes()
    (tmp_path / "m").write_bytes(whole.replace(b"a.counts", b"b.counts"))
    with pytest.raises(ModelFileError, match="sums without counts, or counts without sums, for 'a'"):
        ImportanceMatrix.open(tmp_path / "m")


def test_no_such_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder / "dense"), "--type", "q8_0", "--imatrix", "/nowhere/m.gguf"]) == 4
    assert "/nowhere/m.gguf: cannot be read: No such file" in capsys.readouterr().err


def test_the_name_is_kept_as_it_was_given(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for name in ("./dense.imatrix", f"{'./' * 80}dense.imatrix"):
        command = ["dense", "--type", "q4_0", "--imatrix", name, "--out", "named.gguf", "--format", "quiet"]
        assert main(command) == 0
        assert read_header(folder / "named.gguf").metadata["quantize.imatrix.file"] == name[:127]
