"""The pure parts: order, recipes, names, general metadata, progress."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from app.errors import CheckpointError, UsageError
from app.models.gguf import read_header
from quantize.encoding import available_cpus
from quantize.families.mapping import Want
from quantize.header import KeyTable
from quantize.model_names import NameParts, size_label, split_name, title
from quantize.pipeline import quantize
from quantize.plan import llama_cpp_order, make_plan
from quantize.recipe import RECIPES, find
from quantize.reporting import HumanReporter, size
from quantize.slabs import SLAB_WEIGHTS, slabs_of
from quantize.tensors import TensorSpec, rope_pairs
from tests.quantize.checkpoints import Shape, make_checkpoint


def test_llama_cpps_order() -> None:
    names = ["blk.10.a", "blk.2.b", "token_embd.weight", "blk.2.a", "output.weight", "blk.0.z", "rope_freqs.weight"]
    assert sorted(names, key=llama_cpp_order) == [
        "output.weight", "rope_freqs.weight", "token_embd.weight", "blk.0.z", "blk.2.a", "blk.2.b", "blk.10.a",
    ]  # fmt: skip


def test_recipes_are_found_in_any_case() -> None:
    assert find("Q4_K_M") is RECIPES["q4_k_m"]
    with pytest.raises(UsageError):
        find("")


def test_a_row_must_fit_its_blocks() -> None:
    with pytest.raises(CheckpointError, match="'t' of shape \\(2, 33\\) cannot be q8_0"):
        make_plan(KeyTable(), [TensorSpec("t", (2, 33))], {"t": "q8_0"})


@pytest.mark.parametrize(
    ("shape", "heads"), [((7,), None), ((1000, 4096), None), ((4096, 4096), 32), ((3, 1 << 20), None), ((96,), 3)]
)
def test_slabs_cover_every_row_once(shape: tuple[int, ...], heads: int | None) -> None:
    order = {} if heads is None else {"group": shape[0] // heads, "take": rope_pairs(shape[0] // heads)}
    spec = Want("t", "stored", shape, **order).spec()
    slabs = list(slabs_of(make_plan(KeyTable(), [spec], {"t": "f32"}).tensors[0]))
    place = 0
    for slab in slabs:
        assert (slab.first_weight, slab.offset) == (place, 4 * place)
        place += slab.weights
        assert slab.first_row % (shape[0] // heads if heads else 1) == 0
        assert slab.weights <= max(SLAB_WEIGHTS, spec.row_weights * (shape[0] // heads if heads else 1))
        assert slab.is_last == (place == spec.weights)
    assert place == spec.weights


@pytest.mark.parametrize(
    ("name", "weights", "parts"),
    [
        (
            "SmolLM2-135M-Instruct",
            134_515_008,
            NameParts("SmolLM2-135M-Instruct", None, "SmolLM2", "Instruct", None, "135M"),
        ),
        (
            "mistralai/Mistral-7B-Instruct-v0.3",
            7_248_000_000,
            NameParts("Mistral-7B-Instruct-v0.3", "mistralai", "Mistral", "Instruct", "v0.3", "7B"),
        ),
        ("Llama-3.2-1B", 1_235_814_400, NameParts("Llama-3.2-1B", None, "Llama-3.2", None, None, "1B")),
        ("bloom-7b1", 7_100_000_000, NameParts("bloom-7b1", None, "bloom", None, None, "7.1B")),
        ("Phi-3-mini-4k", 3_800_000_000, NameParts("Phi-3-mini-4k", None, "Phi-3", "4k", None, "mini")),
        ("model", 1000, NameParts("model")),
        ("My best model", 1000, NameParts("My best model")),
    ],
)  # fmt: skip
def test_names_are_taken_apart(name: str, weights: int, parts: NameParts) -> None:
    assert split_name(name, weights) == parts


def test_titles_and_sizes() -> None:
    assert title("my-model-v1.2-instruct-7B") == "My Model v1.2 Instruct 7B"
    labels = [size_label(count) for count in (1_500, 134_515_008, 1_235_814_400, 8_030_261_248)]
    assert labels == ["1.5K", "135M", "1.2B", "8.0B"]


def test_the_model_card_becomes_general_keys(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "Tiny-1M", Shape(layers=1, hidden=64, heads=2, key_heads=1, feed_forward=96))
    card = """---
license: apache-2.0
language:
- en
- no
tags: [small, test]
pipeline_tag: text-generation
base_model: someone/Base-Model-7B-v2
datasets: [someone/words, "https://example.org/data"]
model_name: A name
---
# Text
"""
    (source / "README.md").write_text(card)
    (source / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_k": 40, "top_p": 0.9}))
    quantize(source, "bf16", tmp_path / "out.gguf")
    keys = read_header(tmp_path / "out.gguf").metadata
    general = {name.removeprefix("general."): value for name, value in keys.items() if name.startswith("general.")}
    expected: dict[str, Any] = {
        "name": "A name",
        "license": "apache-2.0",
        "languages": ["en", "no"],
        "tags": ["small", "test", "text-generation"],
        "base_model.count": 1,
        "base_model.0.name": "Base Model 7B v2",
        "base_model.0.organization": "Someone",
        "base_model.0.version": "v2",
        "base_model.0.repo_url": "https://huggingface.co/someone/Base-Model-7B-v2",
        "dataset.count": 2,
        "dataset.1.repo_url": "https://example.org/data",
        "sampling.top_k": 40,
    }
    assert {name: general.get(name) for name in expected} == expected
    assert general["sampling.temp"] == pytest.approx(0.6)


def test_the_folder_names_a_model_without_a_card(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "tiny-model", Shape(layers=1, hidden=64, heads=2, key_heads=1, feed_forward=96))
    quantize(source, "bf16", tmp_path / "out.gguf")
    header = read_header(tmp_path / "out.gguf")
    assert header.name == "Tiny Model"
    assert header.text("general.size_label") == "66K"


def test_processors() -> None:
    assert available_cpus() >= 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    err = Terminal()
    reporter = HumanReporter(io.StringIO(), err)
    reporter.progress(0, 4_000_000)
    now = 2.0
    reporter.progress(1_000_000, 4_000_000)
    assert err.getvalue().endswith(" 25%  1 MB of 4 MB  500 KB/s  6 s left")
    reporter.progress(4_000_000, 4_000_000)
    assert "100%" in err.getvalue()


def test_sizes_as_people_read_them() -> None:
    assert [size(count) for count in (7, 1500, 2_345_678, 3e9, 4e12)] == ["7 B", "1.5 KB", "2.35 MB", "3 GB", "4 TB"]
