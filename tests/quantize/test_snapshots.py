"""The planned types against llama.cpp's snapshots of its own choice, and the script that compares them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MORE_BITS = [0, 3, 6, 7]  # of eight blocks: the first and last eighth, and each third between
SNAPSHOT = [
    "# n_embd=1024, n_ff=17408, n_vocab=100, n_layer=8, n_head=16, n_head_kv=8",
    "[Q4_K_M] q4_K",
    "output.weight q6_K",
    *(f"blk.{block}.{name}.weight q6_K" for block in MORE_BITS for name in ("attn_v", "ffn_down")),
    "[Q2_K] q2_K",
    "output.weight q6_K",
    *(f"blk.{block}.{name}.weight q3_K" for block in range(8) for name in ("attn_v", "ffn_down")),
]


def run_script(source: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the comparison with this folder as llama.cpp's source."""
    command = [sys.executable, "scripts/oracle_snapshots.py", *arguments]
    environment = {**os.environ, "PESTLE_LLAMA_CPP": str(source)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False)


def test_a_snapshot_by_hand(tmp_path: Path) -> None:
    (tmp_path / "tests" / "snapshots").mkdir(parents=True)
    (tmp_path / "include").mkdir()
    (tmp_path / "convert_hf_to_gguf.py").write_text("")
    header = "    LLAMA_FTYPE_MOSTLY_Q2_K = 10,\n    LLAMA_FTYPE_MOSTLY_Q4_K_M = 15,\n"
    (tmp_path / "include" / "llama.h").write_text(header)
    path = tmp_path / "tests" / "snapshots" / "qwen3-14b.schema"
    path.write_text("\n".join(SNAPSHOT))
    finished = run_script(tmp_path, "qwen3-14b")
    assert (finished.returncode, finished.stdout) == (0, "qwen3-14b: 17 tensors in 2 types: equal\n"), finished.stderr
    path.write_text("\n".join(SNAPSHOT).replace("blk.3.attn_v.weight q6_K", "blk.3.attn_v.weight q5_K"))
    finished = run_script(tmp_path, "qwen3-14b")
    assert finished.returncode == 1
    assert "Q4_K_M blk.3.attn_v.weight: q6_K; llama.cpp: q5_K" in finished.stdout


@pytest.mark.skipif("PESTLE_LLAMA_CPP" not in os.environ, reason="needs llama.cpp's source: see make oracle")
def test_llama_cpps_snapshots() -> None:
    finished = run_script(Path(os.environ["PESTLE_LLAMA_CPP"]))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.count(": equal\n") == 12
