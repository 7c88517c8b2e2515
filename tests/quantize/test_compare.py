"""Divergence, perplexity, and the command that prints them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from app.cli import main
from app.errors import BadInputError
from quantize.pipeline import quantize
from quantize.plot import Point, scatter
from quantize.quality import Quality, divergence, log_softmax, measure
from tests.quantize.checkpoints import Shape, make_checkpoint

TEXT = "the quick brown fox jumps over the lazy dog and thinks in 12 other languages, is it not? " * 30


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("compare")
    source = make_checkpoint(folder / "Tiny", Shape())
    for name in ("bf16", "q8_0", "q4_0"):
        quantize(source, name, folder / f"{name}.gguf")
    return {name: folder / f"{name}.gguf" for name in ("bf16", "q8_0", "q4_0")}


def test_the_arithmetic_is_that_of_float64() -> None:
    random = np.random.default_rng(0)
    one, other = (random.standard_normal((5, 300)).astype(np.float32) * 4 for _ in range(2))
    exact = [
        rows.astype(np.float64) - np.log(np.exp(rows.astype(np.float64)).sum(1, keepdims=True)) for rows in (one, other)
    ]
    assert np.allclose(log_softmax(one), exact[0], atol=1e-5)
    expected = (np.exp(exact[0]) * (exact[0] - exact[1])).sum(1)
    assert np.allclose(divergence(log_softmax(one), log_softmax(other)), expected, rtol=1e-4)
    assert divergence(log_softmax(one), log_softmax(one)).max() == 0


def test_fewer_bits_diverge_more(files: dict[str, Path]) -> None:
    reference, eight, four = measure(
        files["bf16"], [files["q8_0"], files["q4_0"]], TEXT, threads=1, chunk=128, most_chunks=4
    )
    assert (reference.kld_mean, reference.kld_max, reference.same_top) == (0, 0, 1)
    assert 0 < eight.kld_mean < four.kld_mean <= four.kld_99 <= four.kld_max
    assert eight.same_top > four.same_top
    assert reference.tokens == four.tokens == 4 * 63
    assert four.bits_per_weight < eight.bits_per_weight < reference.bits_per_weight
    assert abs(eight.perplexity / reference.perplexity - 1) < 0.01


def test_perplexity_is_that_of_the_tokens(files: dict[str, Path]) -> None:
    """A model of random weights is about as surprised as one that knows nothing."""
    found: Quality = measure(files["bf16"], [], TEXT, threads=1, chunk=64, most_chunks=8)[0]
    assert 150 < found.perplexity < 800  # 284 tokens


def test_a_short_text_and_other_vocabularies_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="at least 1024 are needed"):
        measure(files["bf16"], [], "hello", threads=1)
    other = make_checkpoint(tmp_path / "Other", Shape(vocabulary="spm"))
    quantize(other, "q8_0", tmp_path / "other.gguf")
    with pytest.raises(BadInputError, match="its vocabulary"):
        measure(files["bf16"], [tmp_path / "other.gguf"], TEXT, threads=1)


def test_the_command(files: dict[str, Path], tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-P",
        "-m",
        "app.cli",
        "compare",
        *map(str, files.values()),
        "--chunks",
        "2",
        "--threads",
        "1",
    ]
    human = subprocess.run([*command, "--plot", str(tmp_path / "p.svg")], capture_output=True, text=True, check=True)
    lines = human.stdout.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["file", "bf16.gguf", "q8_0.gguf", "q4_0.gguf"]
    assert "everyday.txt" in lines[-1]
    texts = [element.text for element in ET.parse(tmp_path / "p.svg").iter() if element.tag.endswith("text")]
    assert {"q8_0.gguf", "q4_0.gguf", "MB", "KLD, nats"} <= set(texts)
    assert sum((text or "").endswith(" tokens/s") for text in texts) == 2
    assert lines[0].split()[-4:] == ["prompt", "t/s", "decode", "t/s"]
    answer = subprocess.run([*command, "--format", "json"], capture_output=True, text=True, check=True).stdout
    found = [json.loads(line) for line in answer.splitlines()]
    assert [Path(entry["path"]).name for entry in found] == ["bf16.gguf", "q8_0.gguf", "q4_0.gguf"]
    assert found[0]["kld_mean"] == 0 < found[2]["kld_mean"]


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [(["missing.gguf"], 2), (["--chunks", "0"], 2), (["--text", "missing.txt"], 4), (["damaged.gguf"], 3)],
)
def test_bad_input(arguments: list[str], exit_code: int, files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "damaged.gguf").write_bytes(files["q4_0"].read_bytes()[:5000])
    arguments = [str(tmp_path / text) if text == "damaged.gguf" else text for text in arguments]
    assert main(["compare", str(files["bf16"]), str(files["q8_0"]), *arguments]) == exit_code


def test_a_plot_of_nothing_lost() -> None:
    assert "NaN" not in scatter([Point("same", 0.0, 0.0)], "MB", "KLD")
