"""Quantized checkpoints are read as the numbers that they stand for, to the last bit; what cannot be read says why."""

from __future__ import annotations

import concurrent.futures
import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.models.gguf import read_header
from quantize import dequantize
from quantize.checkpoint import Checkpoint, DecodedTensor
from quantize.dequantize import gptq
from quantize.dequantize.scaled import scaled
from quantize.dequantize.values import table_of
from quantize.pipeline import prepare, quantize, run
from quantize.source import open_source
from tests.quantize.checkpoints import write_safetensors
from tests.quantize.quantized import E4M3, E5M2, FINITE_E4M3, METHODS, Array, Make, set_settings


class Counting(Checkpoint):
    """A checkpoint that counts the bytes that are read."""

    read = 0

    def read_into(self, tensor: Any, offset: int, buffer: memoryview) -> None:
        if not isinstance(tensor, DecodedTensor):
            self.read += len(buffer)
        super().read_into(tensor, offset, buffer)


def opened(folder: Path) -> Counting:
    checkpoint = Counting.open(folder)
    dequantize.decode(checkpoint, open_source(folder))
    assert isinstance(checkpoint, Counting)
    return checkpoint


def bits_of(checkpoint: Checkpoint, name: str) -> Array:
    """Return a whole tensor's F32 bits."""
    tensor = checkpoint.tensors[name]
    out = np.empty(tensor.shape, dtype=np.float32)
    checkpoint.read_into(tensor, 0, out.reshape(-1).view(np.uint8).data)
    return out.view(np.uint32)


@pytest.mark.parametrize("method", METHODS)
def test_every_number_is_the_exact_product_rounded_once(method: str, made: Make) -> None:
    folder, weights = made(method)
    with opened(folder) as checkpoint:
        assert set(checkpoint.tensors) == set(Checkpoint.open(folder.parent / "plain" / "Tiny").tensors)
        for name, exact in weights.items():
            assert checkpoint.tensors[name].dtype == "F32"
            assert checkpoint.tensors[name].shape == exact.shape
            assert np.array_equal(bits_of(checkpoint, name), exact.astype(np.float32).view(np.uint32)), name


@pytest.mark.parametrize("method", METHODS)
def test_any_piece_on_any_thread(method: str, made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "_BAND_BYTES", 1 << 12)
    folder, weights = made(method)
    random = np.random.default_rng(0)
    pieces = []
    for name in list(weights)[:7]:
        size = weights[name].size
        cuts = sorted({0, size, *random.integers(0, size, 7).tolist(), weights[name].shape[1]})
        pieces += [(name, first, last) for first, last in itertools.pairwise(cuts)]
    random.shuffle(pieces)

    def read(piece: tuple[str, int, int]) -> Array:
        out = np.empty(piece[2] - piece[1], dtype=np.float32)
        checkpoint.read_into(checkpoint.tensors[piece[0]], 4 * piece[1], out.view(np.uint8).data)
        return out

    with opened(folder) as checkpoint, concurrent.futures.ThreadPoolExecutor(8) as pool:
        for (name, first, last), found in zip(pieces, pool.map(read, pieces), strict=True):
            expected = weights[name].astype(np.float32).ravel()[first:last]
            assert np.array_equal(found.view(np.uint32), expected.view(np.uint32)), (name, first, last)


@pytest.mark.parametrize("method", METHODS)
def test_the_file_is_that_of_the_plain_checkpoint(method: str, made: Make, tmp_path: Path) -> None:
    folder, _ = made(method)
    quantize(folder, "q8_0", tmp_path / "ours.gguf", threads=3)
    quantize(folder.parent / "plain" / "Tiny", "q8_0", tmp_path / "plain.gguf", threads=3)
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


@pytest.mark.parametrize("method", ["fp8 blocks", "packed int4", "gptq 4"])
def test_from_f32_is_nearer_to_the_exact_weights(method: str, made: Make, tmp_path: Path) -> None:
    folder, weights = made(method)
    quantize(folder, "q8_0", tmp_path / "through bf16.gguf")
    quantize(folder, "f32", tmp_path / "f32.gguf")
    quantize(tmp_path / "f32.gguf", "q8_0", tmp_path / "from f32.gguf")
    exact = weights["model.layers.0.mlp.up_proj.weight"]
    errors = [
        float(np.linalg.norm(q8_0(tmp_path / f"{route}.gguf", "blk.0.ffn_up.weight") - exact) / np.linalg.norm(exact))
        for route in ("from f32", "through bf16")
    ]
    assert errors[0] < 0.99 * errors[1] < 0.01


def q8_0(path: Path, name: str) -> Array:
    """Return the weights of a tensor in blocks of an f16 and 32 int8."""
    header = read_header(path)
    tensor = next(tensor for tensor in header.tensors if tensor.name == name)
    assert tensor.type_name == "q8_0"
    start = header.data_offset + tensor.offset
    blocks = np.frombuffer(path.read_bytes()[start : start + tensor.nbytes], np.uint8).reshape(-1, 34)
    scales = blocks[:, :2].copy().view(np.float16).astype(float)
    return (blocks[:, 2:].copy().view(np.int8) * scales).reshape(tensor.shape)


def test_progress_counts_what_is_stored(made: Make, tmp_path: Path) -> None:
    folder, _ = made("packed int4 zeros")
    prepared = prepare(folder, "q8_0")
    steps: list[tuple[int, int]] = []
    run(prepared, tmp_path / "out.gguf", progress=lambda *step: steps.append(step))
    stored = sum(tensor.nbytes for tensor in Checkpoint.open(folder).tensors.values())
    assert steps[-1] == (stored, stored)


@pytest.mark.parametrize("method", ["gptq 4", "gptq 4 shuffled", "gptq 2"])
def test_bands_are_read_once(method: str, made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "_BAND_BYTES", 1 << 10)
    folder, _ = made(method)
    with opened(folder) as checkpoint, concurrent.futures.ThreadPoolExecutor(4) as pool:
        for tensor in checkpoint.tensors.values():
            if isinstance(tensor, DecodedTensor):
                before, rows, width = checkpoint.read, *tensor.shape
                spaces = [np.empty(4 * width, dtype=np.uint8) for _ in range(rows)]
                places = (4 * width * row for row in range(rows))
                list(pool.map(checkpoint.read_into, itertools.repeat(tensor), places, (each.data for each in spaces)))
                bands = -(-rows // tensor.decoder.band_rows)  # type: ignore[attr-defined]
                assert bands > 1
                orders = 4 * width * (bands - 1)  # g_idx is read with each band
                assert checkpoint.read - before <= tensor.nbytes + orders


@pytest.mark.parametrize("scale_shape", [(3, 2, 2), (3, 1, 1), (3,), (3, 1, 130), (1,), ()])
def test_stacked_experts(scale_shape: tuple[int, ...], tmp_path: Path) -> None:
    shape, random = (3, 96, 130), np.random.default_rng(1)
    codes = random.choice(FINITE_E4M3, shape)
    scales = random.random(scale_shape, dtype=np.float32)
    stored = {"w": ("F8_E4M3", shape, codes.tobytes()), "s": ("F32", scale_shape, scales.tobytes())}
    write_safetensors(tmp_path / "model.safetensors", stored)
    checkpoint = Checkpoint.open(tmp_path)
    blocks = ((64, 128),) if scale_shape == (3, 2, 2) else (None,)
    checkpoint.tensors["w"] = scaled(checkpoint.tensors["w"], checkpoint.tensors["s"], blocks=blocks)
    if scale_shape == (3, 2, 2):
        scales = scales.repeat(64, 1).repeat(128, 2)[:, :96, :130]
    exact = E4M3[codes] * scales.reshape(*scales.shape, *(1,) * (3 - scales.ndim)).astype(float)
    piece = np.empty(100 * 130 + 7, dtype=np.float32)
    with checkpoint:
        assert np.array_equal(bits_of(checkpoint, "w"), exact.astype(np.float32).view(np.uint32))
        checkpoint.read_into(checkpoint.tensors["w"], 4 * (77 * 130 + 5), piece.view(np.uint8).data)
    assert np.array_equal(piece, exact.astype(np.float32).ravel()[77 * 130 + 5 :][: len(piece)])


def test_kept_bands_are_bounded() -> None:
    band = gptq.Band(*(np.zeros((4, 8), dtype) for dtype in (np.uint32, np.float32, np.float32)), 2)
    bands = gptq.Bands(limit=3 * band.nbytes)
    reads: list[int] = []
    for key in (0, 1, 2, 0, 3, 0, 1):
        bands.get(key, lambda key=key: reads.append(key) or band)  # type: ignore[misc]
    assert reads == [0, 1, 2, 3, 1]  # 1 was used longest ago when 3 came
    with pytest.raises(ZeroDivisionError):
        bands.get(9, lambda: 1 // 0)  # type: ignore[arg-type, return-value]
    assert bands.get(9, lambda: band) is band


def test_tables() -> None:
    codes = np.arange(256)
    for dtype, exact, bad in (("F8_E4M3", E4M3, (codes & 0x7F) == 0x7F), ("F8_E5M2", E5M2, (codes & 0x7C) == 0x7C)):
        found = table_of(dtype)
        assert np.array_equal(found[~bad].view(np.uint32), exact[~bad].astype(np.float32).view(np.uint32))
        assert not np.isfinite(found[bad]).any()
    powers = table_of("F8_E8M0")
    assert [float(powers[code]) for code in (0, 127, 254)] == [2.0**-127, 1.0, 2.0**127]
    assert np.isnan(powers[255])


def test_settings_without_quantized_weights_change_nothing(made: Make, tmp_path: Path) -> None:
    plain = tmp_path / "Tiny"
    shutil.copytree(made("fp8 blocks")[0].parent / "plain" / "Tiny", plain)
    quantize(plain, "q8_0", tmp_path / "before.gguf")
    set_settings(plain, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    quantize(plain, "q8_0", tmp_path / "after.gguf")
    assert (tmp_path / "before.gguf").read_bytes() == (tmp_path / "after.gguf").read_bytes()
