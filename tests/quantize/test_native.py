"""The kernels give ggml's bytes, or are not used."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from app.llama import quantizer
from app.models.gguf_types import TENSOR_TYPE_NUMBERS
from quantize import native
from quantize.native import encoder, hard_inputs, self_check
from quantize.native.library import Library, open_libraries

ROOT = Path(__file__).parents[2]
LIBRARIES = open_libraries()
BEST = LIBRARIES[-1] if LIBRARIES else None
needs_library = pytest.mark.skipif(not LIBRARIES, reason="installed without a C compiler, or on another processor")
kernels = pytest.mark.parametrize("name", encoder.KERNELS)
kernels_and_weighting = pytest.mark.parametrize(
    ("name", "weighted"),
    [(name, weighted) for name in encoder.KERNELS for weighted in (False, True)
     if encoder.has_kernel(TENSOR_TYPE_NUMBERS[name], weighted=weighted)],
)  # fmt: skip
SHORT_BLOCKS = ("q8_0", "q4_0", "iq4_nl")
libraries = pytest.mark.parametrize("library", LIBRARIES, ids=[library.name for library in LIBRARIES])


@pytest.fixture(autouse=True)
def unjudged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be known of any kernel, neither in this process nor on disk."""
    monkeypatch.setattr(encoder, "_verdicts", {})
    monkeypatch.setenv("LLM_CACHE_DIR", str(tmp_path / "cache"))


def skip_if_for_another_ggml(library: Library, number: int, *, weighted: bool) -> None:
    """On arm64 there are kernels for several builds of ggml; on x86-64 each of them must give its bytes."""
    if platform.machine() in {"arm64", "aarch64"} and self_check.compare(library, number, weighted=weighted):
        pytest.skip("for a ggml that was compiled otherwise")


def by_ggml(name: str, rows: hard_inputs.Weights, columns: hard_inputs.Weights | None = None) -> NDArray[np.uint8]:
    number = TENSOR_TYPE_NUMBERS[name]
    out = np.zeros(len(rows) * quantizer.row_bytes(number, rows.shape[1]), np.uint8)
    quantizer.encode_rows(number, rows, out, columns)
    return out


class Liar(Library):
    """A library with one wrong byte now and then."""

    def encode_rows(self, *arguments: NDArray[np.uint8], **named: NDArray[np.uint8]) -> int:  # type: ignore[override]
        asked = super().encode_rows(*arguments, **named)  # type: ignore[arg-type]
        arguments[2][-1] ^= 1
        return asked


@needs_library
@libraries
@kernels_and_weighting
def test_every_byte_is_ggmls(name: str, weighted: bool, library: Library) -> None:
    number = TENSOR_TYPE_NUMBERS[name]
    skip_if_for_another_ggml(library, number, weighted=weighted)
    for seed, width in enumerate((32, 96, 416) if name in SHORT_BLOCKS else (256, 768, 2048)):
        columns = hard_inputs.importance(seed, width) if weighted else None
        for generator, piece in hard_inputs.pieces(seed, 7 * width):
            rows = piece.reshape(7, width)
            expected = by_ggml(name, rows, columns)
            out = ~expected
            library.encode_rows(number, rows, out, columns)
            assert np.array_equal(out, expected), f"{generator}, seed {seed}, width {width}"


@needs_library
@libraries
@kernels_and_weighting
def test_nothing_is_written_beside_the_rows(name: str, weighted: bool, library: Library) -> None:
    number = TENSOR_TYPE_NUMBERS[name]
    skip_if_for_another_ggml(library, number, weighted=weighted)
    for count in (1, 2, 3):
        (_, piece), = hard_inputs.pieces(count, count * 256, (hard_inputs.bf16,))  # fmt: skip
        rows = np.empty(piece.size + 1, np.float32)[1:].reshape(count, 256)
        rows[:] = piece.reshape(count, 256)
        columns = hard_inputs.importance(count, 256) if weighted else None
        expected = by_ggml(name, rows, columns)
        frame = np.full(expected.size + 62, 0xA5, np.uint8)
        library.encode_rows(number, rows, frame[31:-31], columns)
        assert np.array_equal(frame[31:-31], expected)
        assert {*frame[:31].tolist(), *frame[-31:].tolist()} == {0xA5}


@needs_library
@kernels
def test_ordinary_weights_are_not_left_to_ggml(name: str) -> None:
    assert BEST is not None
    for generator, piece in hard_inputs.pieces(5, 64 * 256, (hard_inputs.bf16, hard_inputs.zeros)):
        rows = piece.reshape(-1, 256)
        out = np.zeros_like(by_ggml(name, rows))
        assert BEST.encode_rows(TENSOR_TYPE_NUMBERS[name], rows, out) == 0, generator


@needs_library
def test_a_type_without_a_kernel_is_refused() -> None:
    assert BEST is not None
    rows, number = np.zeros((1, 256), np.float32), TENSOR_TYPE_NUMBERS["iq1_s"]
    with pytest.raises(ValueError, match="no kernel"):
        BEST.encode_rows(number, rows, np.zeros(quantizer.row_bytes(number, 256), np.uint8))


@needs_library
@kernels
def test_a_kernel_that_lies_is_turned_off(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    liars = tuple(Liar(library.path, library.level, library.name, library.functions) for library in LIBRARIES)
    monkeypatch.setattr(encoder, "open_libraries", lambda: liars)
    (_, piece), = hard_inputs.pieces(1, 4 * 256, (hard_inputs.bf16,))  # fmt: skip
    rows = piece.reshape(4, 256)
    expected = by_ggml(name, rows)
    out = np.zeros_like(expected)
    native.encode_rows(TENSOR_TYPE_NUMBERS[name], rows, out)
    assert np.array_equal(out, expected)
    assert f"the kernel for {name} gives other bytes" in caplog.text
    (note,) = native.notes([name, "q5_0"], weighted=False)
    assert f"other bytes than this ggml for {name}:" in note


@needs_library
@pytest.mark.skipif(len(LIBRARIES) < 2, reason="one instruction set only")
def test_the_next_kernel_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    first, *_, last = LIBRARIES
    liar = Liar(last.path, last.level, "liar", last.functions)
    monkeypatch.setattr(encoder, "open_libraries", lambda: (first, liar))
    monkeypatch.setattr(self_check, "is_exact", lambda library, *_, **__: library is first)
    assert encoder.chosen(TENSOR_TYPE_NUMBERS["q4_K"], weighted=False) == first.name


@needs_library
@pytest.mark.parametrize("source", ["f16", "bf16"])
def test_all_weights_of_16_bits_are_widened_as_ggml_does(source: str) -> None:
    """Q8_0 says sign, size and scale of a block; every pattern is here, alone among zeros and beside its neighbours."""
    assert BEST is not None
    patterns = np.arange(1 << 16, dtype=np.uint16)
    alone = np.zeros((1 << 16, 32), np.uint16)
    alone[:, 0] = patterns
    widen = quantizer.f16_to_f32 if source == "f16" else quantizer.bf16_to_f32
    for rows in (alone, patterns.reshape(-1, 32), np.resize(patterns, (3, 8192 + 96))):
        wide = np.empty(rows.shape, np.float32)
        widen(rows, wide)
        expected = by_ggml("q8_0", wide)
        out = ~expected
        BEST.encode_rows(TENSOR_TYPE_NUMBERS["q8_0"], rows, out, source=TENSOR_TYPE_NUMBERS[source])
        assert np.array_equal(out, expected)


@needs_library
@kernels_and_weighting
def test_narrow_rows_of_any_length_give_the_same_bytes(name: str, weighted: bool) -> None:
    number, source = TENSOR_TYPE_NUMBERS[name], TENSOR_TYPE_NUMBERS["bf16"]
    if not native.reads(source, number, weighted=weighted):
        pytest.skip("this ggml gives other bytes")
    for count, width in ((37, 256), (5, 768), (2, 4096 + 768)):
        (_, piece), = hard_inputs.pieces(width, count * width, (hard_inputs.bf16,))  # fmt: skip
        rows = piece.reshape(count, width)
        columns = hard_inputs.importance(width, width) if weighted else None
        expected = by_ggml(name, rows, columns)
        out = ~expected
        narrow = (rows.view(np.uint32) >> 16).astype(np.uint16)
        native.encode_rows(number, narrow, out, columns, source)
        assert np.array_equal(out, expected), f"{count} rows of {width}"


def test_what_ggml_cannot_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "open_libraries", lambda: ())
    number, narrow = TENSOR_TYPE_NUMBERS["q8_0"], np.zeros((1, 32), np.uint16)
    assert not native.reads(TENSOR_TYPE_NUMBERS["bf16"], number, weighted=False)
    with pytest.raises(AssertionError, match="f32 only"):
        native.encode_rows(number, narrow, np.zeros(34, np.uint8), source=TENSOR_TYPE_NUMBERS["bf16"])


@needs_library
def test_a_verdict_is_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert BEST is not None
    number = TENSOR_TYPE_NUMBERS["q4_K"]
    assert self_check.is_exact(BEST, number, weighted=False)
    monkeypatch.setattr(self_check, "compare", lambda *_, **__: pytest.fail("compared again"))
    assert self_check.is_exact(BEST, number, weighted=False)
    (kept,) = (tmp_path / "cache" / "kernels").iterdir()
    kept.write_bytes(b"sam")
    monkeypatch.setattr(self_check, "compare", lambda *_, **__: 1)
    assert not self_check.is_exact(BEST, number, weighted=False), "what cannot be read is compared again"
    assert not self_check.is_exact(BEST, number, weighted=False)


@kernels_and_weighting
def test_without_a_library_ggml_does_the_work(name: str, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "open_libraries", lambda: ())
    columns = hard_inputs.importance(1, 768) if weighted else None
    (_, piece), = hard_inputs.pieces(1, 3 * 768, (hard_inputs.bf16,))  # fmt: skip
    rows = piece.reshape(3, 768)
    expected = by_ggml(name, rows, columns)
    out = np.zeros_like(expected)
    native.encode_rows(TENSOR_TYPE_NUMBERS[name], rows, out, columns)
    assert np.array_equal(out, expected)
    assert "not installed" in native.notes([name], weighted=weighted)[0]
    assert native.notes(["q5_0", "f32"], weighted=weighted) == []


def test_a_file_that_is_no_library_is_none(tmp_path: Path) -> None:
    assert open_libraries(tmp_path / "missing.so") == ()
    (tmp_path / "damaged.so").write_bytes(b"\x7fELF, but not really")
    assert open_libraries(tmp_path / "damaged.so") == ()


@pytest.mark.parametrize("settings", [{"CC": "false"}, {"CC": "no-such-compiler"}, {"PESTLE_KERNELS": "off"}])
def test_a_failed_compilation_says_why_and_leaves_nothing(tmp_path: Path, settings: dict[str, str]) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "compile_kernels.py"), str(tmp_path / "kernels.so")]
    environment = {**os.environ, **settings}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert finished.returncode == 1
    assert finished.stderr
    assert list(tmp_path.iterdir()) == []
