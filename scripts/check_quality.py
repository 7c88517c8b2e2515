"""Compare the quality in a card with what llama-perplexity finds on the same chunks; more than 1% apart is a failure.

    LLAMA_PERPLEXITY=<program of the same llama.cpp> python scripts/check_quality.py [--type q4_0] [--threads N]

The model is the embedded default. Prints a table in Markdown. Exit codes: 0 within 1%, 1 not, 2 usage.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rebuild_default_checkpoint import default_folder, is_complete

from app.models.card import Quality, read_card

ROOT = Path(__file__).parent.parent
TEXT = ROOT / "quantize" / "texts" / "everyday.txt"
CLOSE = 0.01
PATTERNS = {
    "reference_perplexity": r"Mean PPL\(base\)\s*:\s*(\S+)",
    "perplexity": r"Mean PPL\(Q\)\s*:\s*(\S+)",
    "kld_mean": r"Mean\s+KLD:\s*(\S+)",
    "kld_99": r"99\.0%\s+KLD:\s*(\S+)",
    "kld_max": r"Maximum KLD:\s*(\S+)",
    "same_top": r"Same top p:\s*(\S+)",
}


def main() -> int:
    """Run both and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--type", default="q4_0")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    program = os.environ.get("LLAMA_PERPLEXITY", "")
    if not Path(program).is_file() or not is_complete(default_folder()):
        print("LLAMA_PERPLEXITY must name the program, and the default model must be there", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours = quantized(folder, arguments.type, arguments.threads)
        theirs = upstream(program, folder, arguments.type, ours.chunks, arguments.threads)
    print(
        f"| {arguments.type}, {ours.chunks} chunks | the card | llama-perplexity | apart |\n| --- | --- | --- | --- |"
    )
    worst = 0.0
    for key, found in theirs.items():
        value = getattr(ours, key)
        apart = abs(value - found) / found
        worst = max(worst, apart)
        print(f"| {key} | {value:.6g} | {found:.6g} | {apart:.3%} |")
    return int(worst > CLOSE)


def quantized(folder: Path, type_name: str, threads: int) -> Quality:
    """Make bf16 and the type with our command, and return what the type's card says."""
    command = [sys.executable, "-P", "-m", "quantize", str(default_folder()), "--type", f"bf16,{type_name}"]
    command += ["--measure", "--threads", str(threads), "--out", str(folder / "files"), "--format", "quiet"]
    subprocess.run(command, check=True, cwd=ROOT)
    card = read_card(file_of(folder, type_name))
    if card is None or card.quality is None:
        raise SystemExit("the run has not measured")
    return card.quality


def file_of(folder: Path, type_name: str) -> Path:
    """Return the file of a type."""
    return next((folder / "files").glob(f"*-{type_name.upper()}.gguf"))


def upstream(program: str, folder: Path, type_name: str, chunks: int, threads: int) -> dict[str, float]:
    """Return what llama-perplexity says of the type's file against the bf16 one."""
    base = folder / "base.kld"
    common = [program, "-c", "512", "-b", "512", "-t", str(threads)]
    first = [
        "-m",
        str(file_of(folder, "bf16")),
        "-f",
        str(TEXT),
        "--chunks",
        str(chunks),
        "--save-all-logits",
        str(base),
    ]
    second = ["-m", str(file_of(folder, type_name)), "--kl-divergence-base", str(base), "--kl-divergence"]
    subprocess.run([*common, *first], check=True, capture_output=True)
    done = subprocess.run([*common, *second], check=True, capture_output=True, text=True)
    said = done.stdout + done.stderr
    found = {key: float(match[1]) for key, pattern in PATTERNS.items() if (match := re.search(pattern, said))}
    if set(found) != set(PATTERNS):
        raise SystemExit(f"llama-perplexity did not say {', '.join(set(PATTERNS) - set(found))}:\n{said[-2000:]}")
    return found | {"same_top": found["same_top"] / 100}


if __name__ == "__main__":
    sys.exit(main())
