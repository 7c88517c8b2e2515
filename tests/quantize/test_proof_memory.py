"""What is proven once is not proven again: not in this process, and not in the next."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quantize import proof, proof_memory
from quantize.pipeline import prepare
from tests.quantize.checkpoints import Shape, make_checkpoint

SHAPE = Shape(layers=1, hidden=64, heads=2, key_heads=1, feed_forward=96)
ROOT = Path(__file__).parents[2]


def quantize(source: Path, out: Path, cache: Path) -> tuple[bytes, list[str]]:
    """Run the command with its own cache folder; return the file, and what its processes were started as."""
    trace = out.with_suffix(".trace")
    command = [sys.executable, "-P", "-m", "quantize", str(source), "--type", "q8_0", "--out", str(out), "--no-measure"]
    environment = {**os.environ, "LLM_CACHE_DIR": str(cache)}
    code = (
        "import subprocess, sys, pathlib; from quantize import cli; started = []; popen = subprocess.Popen.__init__\n"
        "def noted(self, *a, **k): started.append(str(a[0])); popen(self, *a, **k)\n"
        "subprocess.Popen.__init__ = noted; code = cli.main(sys.argv[2:])\n"
        "pathlib.Path(sys.argv[1]).write_text(chr(10).join(started)); sys.exit(code)"
    )
    command = [sys.executable, "-P", "-c", code, str(trace), *command[4:], "--format", "quiet"]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=100)
    return out.read_bytes(), [line for line in trace.read_text().splitlines() if "proof_child" in line]


def test_the_next_run_proves_nothing_and_makes_the_same_file(tmp_path: Path) -> None:
    source, cache = make_checkpoint(tmp_path / "Known", SHAPE), tmp_path / "cache"
    first, started = quantize(source, tmp_path / "first.gguf", cache)
    assert len(started) == 1
    again, started = quantize(source, tmp_path / "again.gguf", cache)
    assert (started, again) == ([], first)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    (source / "tokenizer.json").write_text(json.dumps(tokenizer, indent=1))
    changed, started = quantize(source, tmp_path / "changed.gguf", cache)
    assert len(started) == 1, "another tokenizer.json is another vocabulary"
    assert changed == first


def test_what_cannot_be_read_is_proven_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(proof_memory, "_folder", lambda: tmp_path / "proofs")
    monkeypatch.setattr(proof, "_known", {})
    source = make_checkpoint(tmp_path / "Damaged", SHAPE)
    assert prepare(source, "q8_0").prove() == ()
    (kept,) = (path for path in (tmp_path / "proofs").iterdir() if "-" in path.name)
    kept.write_bytes(b"{")
    monkeypatch.setattr(proof, "_known", {})
    prepared = prepare(source, "q8_0")
    assert prepared.proof is not None
    assert prepared.prove() == ()
    end = time.monotonic() + 10
    while kept.read_bytes() == b"{":
        assert time.monotonic() < end, "it was not proven again"
        time.sleep(0.01)
    prepared.close()
