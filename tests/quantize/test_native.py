"""The kernels give ggml's bytes, or are not used."""

from __future__ import annotations

import os
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
from quantize.native.library import LEVELS, Library, open_library

ROOT = Path(__file__).parents[2]
BEST = open_library()
needs_library = pytest.mark.skipif(BEST is None, reason="installed without a C compiler, or not x86-64")
kernels = pytest.mark.parametrize("name", encoder.KERNELS)
kernels_and_weighting = pytest.mark.parametrize(
    ("name", "weighted"),
    [(name, weighted) for name in encoder.KERNELS for weighted in (False, True)
     if encoder.has_kernel(TENSOR_TYPE_NUMBERS[name], weighted=weighted)],
)  # fmt: skip
SHORT_BLOCKS = ("q8_0", "q4_0", "iq4_nl")
levels = pytest.mark.parametrize("level", LEVELS)


@pytest.fixture(autouse=True)
def unjudged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be known of any kernel, neither in this process nor on disk."""
    monkeypatch.setattr(encoder, "_verdicts", {})
    monkeypatch.setenv("LLM_CACHE_DIR", str(tmp_path / "cache"))


def library_for(level: str) -> Library:
    """Return the library with a certain instruction set."""
    library = open_library(level=LEVELS.index(level))
    assert library is not None
    if LEVELS[library.level] != level:
        pytest.skip(f"this processor has no {level}")
    return library


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
@levels
@kernels_and_weighting
def test_every_byte_is_ggmls(name: str, weighted: bool, level: str) -> None:
    library, number = library_for(level), TENSOR_TYPE_NUMBERS[name]
    for seed, width in enumerate((32, 96, 416) if name in SHORT_BLOCKS else (256, 768, 2048)):
        columns = hard_inputs.importance(seed, width) if weighted else None
        for generator, piece in hard_inputs.pieces(seed, 7 * width):
            rows = piece.reshape(7, width)
            expected = by_ggml(name, rows, columns)
            out = ~expected
            library.encode_rows(number, rows, out, columns)
            assert np.array_equal(out, expected), f"{generator}, seed {seed}, width {width}"


@needs_library
@levels
@kernels_and_weighting
def test_nothing_is_written_beside_the_rows(name: str, weighted: bool, level: str) -> None:
    library, number = library_for(level), TENSOR_TYPE_NUMBERS[name]
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
    assert BEST is not None
    liar = Liar(BEST.path, BEST.level, BEST.functions)
    monkeypatch.setattr(encoder, "open_library", lambda: liar)
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
    monkeypatch.setattr(encoder, "open_library", lambda: None)
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
    assert open_library(tmp_path / "missing.so") is None
    (tmp_path / "damaged.so").write_bytes(b"\x7fELF, but not really")
    assert open_library(tmp_path / "damaged.so") is None


@pytest.mark.parametrize("settings", [{"CC": "false"}, {"CC": "no-such-compiler"}, {"PESTLE_KERNELS": "off"}])
def test_a_failed_compilation_says_why_and_leaves_nothing(tmp_path: Path, settings: dict[str, str]) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "compile_kernels.py"), str(tmp_path / "kernels.so")]
    environment = {**os.environ, **settings}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert finished.returncode == 1
    assert finished.stderr
    assert list(tmp_path.iterdir()) == []
