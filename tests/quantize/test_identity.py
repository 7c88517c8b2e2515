"""The file is, byte for byte, what llama.cpp's own quantizer makes of the bf16 file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from app.llama import quantizer
from app.models.gguf import Header, read_header
from quantize.pipeline import prepare, quantize
from quantize.recipe import RECIPES
from tests.quantize.checkpoints import SHAPES, Shape, make_checkpoint

QUANTIZED = ("q4_0", "q4_k_m", "q8_0")  # test_types.py has them all, on fewer shapes


def tensor_bytes(header: Header) -> dict[str, bytes]:
    """Return every tensor's bytes, by name."""
    content = header.path.read_bytes()
    start = header.data_offset
    return {tensor.name: content[start + tensor.offset :][: tensor.nbytes] for tensor in header.tensors}


def decoded(header: Header, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Return an f32 or bf16 tensor's numbers in its shape."""
    tensor = next(tensor for tensor in header.tensors if tensor.name == name)
    raw = tensor_bytes(header)[name]
    if tensor.type_name == "f32":
        return np.frombuffer(raw, np.float32).reshape(tensor.shape)
    return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(tensor.shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_byte_is_llama_cpps(shape: str, checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    source = checkpoint_of(shape)
    quantize(source, "bf16", tmp_path / "bf16.gguf")
    for name in QUANTIZED:
        quantize(source, name, tmp_path / "ours.gguf", threads=2)
        quantizer.quantize_file(tmp_path / "bf16.gguf", tmp_path / "theirs.gguf", RECIPES[name].file_type, threads=2)
        ours, theirs = read_header(tmp_path / "ours.gguf"), read_header(tmp_path / "theirs.gguf")
        assert list(ours.metadata.items()) == list(theirs.metadata.items())
        assert ours.tensors == theirs.tensors
        for tensor, data in tensor_bytes(theirs).items():
            assert tensor_bytes(ours)[tensor] == data, (name, tensor)
        assert ours.path.read_bytes() == theirs.path.read_bytes(), name


def test_the_shapes_cover_fallbacks_and_mixtures(checkpoint_of: Callable[[str], Path]) -> None:
    types = {tensor.type_name for shape in SHAPES for tensor in prepare(checkpoint_of(shape), "q4_k_m").plan.tensors}
    assert types >= {"f32", "f16", "q4_K", "q6_K", "q5_0", "q8_0"}


@pytest.mark.parametrize("name", [*QUANTIZED, "f16", "bf16"])
def test_the_plan_is_exact(name: str, checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    source = checkpoint_of("llama3")
    planned = prepare(source, name).plan
    result = quantize(source, name, tmp_path / "out.gguf")
    assert planned.file_size == result.file_size == (tmp_path / "out.gguf").stat().st_size
    found = read_header(tmp_path / "out.gguf").tensors
    assert [(t.spec.name, t.type_name, t.offset, t.nbytes) for t in planned.tensors] == [
        (t.name, t.type_name, t.offset, t.nbytes) for t in found
    ]


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads: int, checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    quantize(checkpoint_of("llama3"), "q4_0", tmp_path / "two.gguf", threads=2)
    quantize(checkpoint_of("llama3"), "q4_0", tmp_path / "other.gguf", threads=threads)
    assert (tmp_path / "two.gguf").read_bytes() == (tmp_path / "other.gguf").read_bytes()


def test_shards_change_only_the_order(tmp_path: Path) -> None:
    for name, shards in (("one", 1), ("many", 3)):
        make_checkpoint(tmp_path / name / "Model", Shape(shards=shards))
        quantize(tmp_path / name / "Model", "q8_0", tmp_path / f"{name}.gguf")
        quantize(tmp_path / name / "Model", "bf16", tmp_path / f"{name}-bf16.gguf")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "many.gguf").read_bytes()
    one, many = (tensor_bytes(read_header(tmp_path / f"{name}-bf16.gguf")) for name in ("one", "many"))
    assert one == many


def test_rotary_pairs_are_put_side_by_side(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    source, shape = checkpoint_of("from f32"), SHAPES["from f32"]
    quantize(source, "bf16", tmp_path / "out.gguf")
    prepared = prepare(source, "bf16")
    head = shape.hidden // shape.heads
    with prepared.checkpoint as checkpoint:
        for name, heads in (("q", shape.heads), ("k", shape.key_heads)):
            stored = checkpoint.tensors[f"model.layers.1.self_attn.{name}_proj.weight"]
            raw = bytearray(stored.nbytes)
            checkpoint.read_into(stored, 0, memoryview(raw))
            source_rows = np.frombuffer(raw, np.float32).reshape(stored.shape)
            rows = decoded(read_header(tmp_path / "out.gguf"), f"blk.1.attn_{name}.weight")
            for place in range(heads * head):
                first, odd = divmod(place % head, 2)
                origin = place // head * head + first + odd * (head // 2)
                assert np.allclose(rows[place], source_rows[origin], rtol=2**-8), (name, place)


def test_llama3_frequencies(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    quantize(checkpoint_of("llama3"), "q8_0", tmp_path / "out.gguf")
    factors = decoded(read_header(tmp_path / "out.gguf"), "rope_freqs.weight")
    wavelengths = 2 * np.pi * 500000.0 ** (np.arange(0, 32, 2) / 32)
    smooth = np.clip((8192 / wavelengths - 1) / 3, 0, 1)
    assert np.allclose(factors, 1 / ((1 - smooth) / 8 + smooth), rtol=1e-5)
    assert factors[0] == 1
    assert factors[-1] == 8


def test_norms_keep_every_bit_of_f32(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    quantize(checkpoint_of("from f32"), "q4_0", tmp_path / "out.gguf")
    header = read_header(tmp_path / "out.gguf")
    norms = {tensor.type_name for tensor in header.tensors if tensor.name.endswith("_norm.weight")}
    assert norms == {"f32"}
    numbers = decoded(header, "output_norm.weight")
    assert np.any(numbers.view(np.uint32) & 0xFFFF)


def test_tied_embeddings_have_no_output_tensor(checkpoint_of: Callable[[str], Path]) -> None:
    names = {
        shape: {tensor.spec.name for tensor in prepare(checkpoint_of(shape), "q8_0").plan.tensors}
        for shape in ("smollm", "llama3")
    }
    assert "output.weight" not in names["smollm"]
    assert "output.weight" in names["llama3"]
