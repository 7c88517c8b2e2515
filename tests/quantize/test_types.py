"""Every type's file is, byte for byte, what llama.cpp's own quantizer makes of the bf16 file."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.llama import quantizer
from app.models.gguf import read_header
from quantize.pipeline import prepare, quantize
from quantize.recipe import RECIPES
from tests.quantize.checkpoints import Shape, make_checkpoint
from tests.quantize.test_family_mixtral import make as make_mixtral
from tests.quantize.test_identity import tensor_bytes

# eight blocks and four heads to a key: the least that shows every rule of the mixtures
DEEP = Shape(layers=8, hidden=256, heads=4, key_heads=1, feed_forward=256)
ODD = Shape(layers=2, hidden=96, heads=3, key_heads=3, feed_forward=112, dtype="F16")  # rows that fit no large block
QUANTIZED = [name for name, recipe in RECIPES.items() if recipe.quantized]
FLOATS = [name for name, recipe in RECIPES.items() if not recipe.quantized]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return two checkpoints, each followed by its bf16 file."""
    made = []
    for name, shape in (("deep", DEEP), ("odd", ODD)):
        folder = tmp_path_factory.mktemp(name)
        made += [make_checkpoint(folder / "Tiny", shape), folder / "bf16.gguf"]
        quantize(folder / "Tiny", "bf16", folder / "bf16.gguf")
    return made


def test_the_issues_types_are_there() -> None:
    wanted = """f32 f16 bf16 q8_0 q4_0 q4_1 q5_0 q5_1 q4_k_s q4_k_m q5_k_s q5_k_m q6_k q3_k_m q2_k iq4_nl iq4_xs
        mxfp4_moe"""
    assert set(RECIPES) == set(wanted.split())


@pytest.mark.parametrize("name", QUANTIZED)
def test_every_type_is_llama_cpps(name: str, folders: list[Path], tmp_path: Path) -> None:
    for source, bf16 in (folders[:2], folders[2:]):
        quantize(source, name, tmp_path / "ours.gguf", threads=2)
        quantizer.quantize_file(bf16, tmp_path / "theirs.gguf", RECIPES[name].file_type, threads=2)
        ours, theirs = read_header(tmp_path / "ours.gguf"), read_header(tmp_path / "theirs.gguf")
        assert [(t.name, t.type_name) for t in ours.tensors] == [(t.name, t.type_name) for t in theirs.tensors]
        assert ours.path.read_bytes() == theirs.path.read_bytes()
        assert ours.file_type == RECIPES[name].file_type


@pytest.mark.parametrize("name", FLOATS)
def test_floats_are_rounded_as_llama_cpp_rounds(name: str, folders: list[Path], tmp_path: Path) -> None:
    source, bf16 = folders[:2]
    quantize(source, name, tmp_path / "ours.gguf", threads=2)
    quantizer.quantize_file(bf16, tmp_path / "theirs.gguf", RECIPES[name].file_type, threads=2)
    ours, theirs = read_header(tmp_path / "ours.gguf"), read_header(tmp_path / "theirs.gguf")
    assert tensor_bytes(ours) == tensor_bytes(theirs)
    assert ours.metadata == theirs.metadata
    assert {tensor.type_name for tensor in ours.tensors} == {"f32", name}


def test_experts_become_mxfp4(tmp_path: Path) -> None:
    source, _ = make_mixtral(tmp_path)
    quantize(source, "bf16", tmp_path / "bf16.gguf")
    quantize(source, "mxfp4_moe", tmp_path / "ours.gguf", threads=2)
    quantizer.quantize_file(tmp_path / "bf16.gguf", tmp_path / "theirs.gguf", RECIPES["mxfp4_moe"].file_type)
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()
    types = {tensor.type_name for tensor in read_header(tmp_path / "ours.gguf").tensors if "_exps" in tensor.name}
    assert types == {"mxfp4"}


def test_the_mixtures_mix(folders: list[Path]) -> None:
    types = {name: set(prepare(folders[0], name).plan.by_type()) - {"f32"} for name in QUANTIZED}
    assert types["q4_k_m"] == {"q4_K", "q6_K"}
    assert types["q4_k_s"] == {"q4_K", "q5_K", "q6_K"}
    assert types["q3_k_m"] == {"q3_K", "q4_K", "q5_K", "q6_K"}
    assert types["q2_k"] == {"q2_K", "q3_K", "q4_K", "q6_K"}
    assert types["iq4_nl"] == {"iq4_nl", "q5_K", "q6_K"}
    assert types["mxfp4_moe"] == {"q8_0"}  # no experts here
