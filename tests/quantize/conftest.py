"""Fixtures of the quantizer's tests."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from quantize import proof_memory
from tests.quantize.checkpoints import SHAPES, make_checkpoint
from tests.quantize.quantized import Array, Make, make_quantized

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def nothing_is_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let each test prove its vocabularies itself, at least within this process."""
    monkeypatch.setattr(proof_memory, "_folder", lambda: tmp_path_factory.getbasetemp() / "no proofs" / "here")
    monkeypatch.setattr(proof_memory, "keep", lambda *_: None)


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from the name of a shape to its checkpoint, made once. Tests don't change these."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("checkpoints") / f"Tiny-{name.replace(' ', '-')}-1M-Instruct"
            made[name] = make_checkpoint(folder, SHAPES[name])
        return made[name]

    return get


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Return a function from a method to a quantized checkpoint and its exact weights. Tests don't change these."""
    return functools.cache(lambda method: _quantized(tmp_path_factory.mktemp("quantized") / "Tiny", method))


def _quantized(folder: Path, method: str) -> tuple[Path, dict[str, Array]]:
    return folder, make_quantized(folder, method)


@pytest.fixture
def quantize_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs `python -P -m quantize` with its arguments."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "quantize", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)

    return run
