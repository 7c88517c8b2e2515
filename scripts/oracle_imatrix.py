"""Compare importance matrices with llama-imatrix's, and what llama-quantize makes of ours with what Pestle makes.

    LLAMA_TOOLS=DIR python scripts/oracle_imatrix.py [--chunks N] [--quality] [--work DIR]

LLAMA_TOOLS is a folder with llama-imatrix and llama-quantize of the same llama.cpp. For SmolLM2 and small mixtures of
experts (made in upstream's environment, see upstream.py), over Pestle's calibration text: every column's sum against
llama-imatrix's, which computes a chunk at a time as Pestle does (-b 512: it leaves the small rests of larger batches
aside); llama-imatrix reads ours and writes the same again; and files quantized with ours and with theirs are the same
bytes from both programs. --quality adds what the matrix does to the divergence of SmolLM2's types, over another text.
Exit codes: 0 all hold, 1 not, 3 a side failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from family_checkpoint import write_family
from gguf_source import Weights
from rebuild_default_checkpoint import default_folder
from upstream import UpstreamError, find_upstream

from app.models.gguf import read_header
from quantize.text_file import CALIBRATION_TEXT

TEXT = Path(__file__).parents[1] / "quantize" / "texts" / CALIBRATION_TEXT
MIXTURES = ("qwen3_moe", "qwen2_moe")
TYPES = ("q4_k_m", "q4_0", "q3_k_m", "iq4_xs")
JUDGED_TYPES = ("q4_k_m", "q4_0", "q3_k_m")
LIMIT = 1e-4
THREADS = "2"
PESTLE = [sys.executable, "-P", "-m", "app.cli"]


class Tools:
    """Upstream's programs in a folder."""

    def __init__(self, folder: Path) -> None:
        for name in ("llama-imatrix", "llama-quantize"):
            if not (folder / name).is_file():
                raise UpstreamError(f"LLAMA_TOOLS: no {name} in {folder}")
        self._folder = folder

    def run(self, name: str, *arguments: str | Path) -> None:
        """Run one to its end."""
        run([str(self._folder / name), *map(str, arguments)])


def run(command: list[str]) -> str:
    """Run a command and return what it printed. Raises UpstreamError with its last lines."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
        raise UpstreamError(f"{' '.join(command)} ended with {done.returncode}:\n{last}")
    return done.stdout


def farthest(ours: Path, theirs: Path) -> tuple[float, int]:
    """Return the largest relative difference of a column's sum, and how many columns were compared.

    Raises UpstreamError if the files hold different keys, tensors or counts.
    """
    headers = [read_header(path) for path in (ours, theirs)]
    if headers[0].metadata != headers[1].metadata or headers[0].tensors != headers[1].tensors:
        raise UpstreamError(f"{ours} and {theirs} have different keys or tensors")
    one, other = map(Weights, headers)
    worst, columns = 0.0, 0
    for name in one.tensors:
        mine, their = one.values(name).astype(np.float64), other.values(name).astype(np.float64)
        if name.endswith(".counts"):
            if not np.array_equal(mine, their):
                raise UpstreamError(f"{name}: {mine} in {ours}, {their} in {theirs}")
            continue
        worst = max(worst, float((np.abs(mine - their) / np.maximum(their, np.finfo(np.float32).tiny)).max()))
        columns += mine.size
    return worst, columns


def check_sums(tools: Tools, bf16: Path, chunks: int, work: Path) -> dict[str, Path]:
    """Measure with both programs and compare; return both files."""
    files = {name: work / f"{name}.imatrix.gguf" for name in ("ours", "theirs", "again")}
    count = ["--chunks", str(chunks)]
    run([*PESTLE, "imatrix", str(bf16), "--text", str(TEXT), "--out", str(files["ours"]), *count, "--format", "quiet"])
    tools.run(
        "llama-imatrix", "-m", bf16, "-f", TEXT, "-o", files["theirs"], *count, "-b", "512", "-t", THREADS, "--no-ppl"
    )
    worst, columns = farthest(files["ours"], files["theirs"])
    print(f"{bf16.stem}: {columns} columns, {chunks} chunks: sums at most {worst:.1e} apart, counts equal", flush=True)
    if worst > LIMIT:
        raise AssertionError(f"more than {LIMIT:.0e}")
    tools.run("llama-imatrix", "-m", bf16, "--in-file", files["ours"], "-o", files["again"])
    if files["again"].read_bytes() != files["ours"].read_bytes():
        raise AssertionError("llama-imatrix does not write our file again as it is")
    print("  llama-imatrix reads ours and writes the same bytes", flush=True)
    return {name: files[name] for name in ("ours", "theirs")}


def check_quantized(tools: Tools, bf16: Path, matrices: dict[str, Path], work: Path) -> None:
    """Quantize with both programs, with both matrices, and compare."""
    made = {name: work / f"by-{name}.gguf" for name in ("pestle", "llama-quantize")}
    for whose, matrix in matrices.items():
        for type_name in TYPES:
            flags = ["--type", type_name, "--imatrix", str(matrix), "--out", str(made["pestle"]), "--format", "quiet"]
            run([*PESTLE, "quantize", str(bf16), *flags])
            tools.run(
                "llama-quantize", "--imatrix", matrix, bf16, made["llama-quantize"], type_name.upper(), THREADS
            )  # fmt: skip
            if made["pestle"].read_bytes() != made["llama-quantize"].read_bytes():
                raise AssertionError(f"{type_name} with {whose}: the files differ")
        print(f"  with {whose}: {', '.join(TYPES)} are llama-quantize's bytes", flush=True)


def check_quality(checkpoint: Path, bf16: Path, work: Path) -> None:
    """Print what a matrix over the whole calibration text does to the divergence from the source, in nats."""
    from quantize.quality import measure  # noqa: PLC0415 - loads llama.cpp
    from quantize.text_file import open_text  # noqa: PLC0415

    matrix = work / "whole.imatrix.gguf"
    run([*PESTLE, "imatrix", str(bf16), "--out", str(matrix), "--format", "quiet"])
    files = []
    for type_name in JUDGED_TYPES:
        for flags in ([], ["--imatrix", str(matrix)]):
            files.append(work / f"{type_name}{'-imatrix' if flags else ''}.gguf")
            command = [*PESTLE, "quantize", str(checkpoint), "--type", type_name, "--out", str(files[-1]), *flags]
            run([*command, "--format", "quiet"])
    found = measure(bf16, files, open_text(None).content, threads=int(THREADS))[1:]
    for name, plain, weighed in zip(JUDGED_TYPES, found[::2], found[1::2], strict=True):
        print(f"{name}: KLD {plain.kld_mean:.4f} without, {weighed.kld_mean:.4f} with the matrix", flush=True)
        if weighed.kld_mean > plain.kld_mean:
            raise AssertionError(f"{name} is worse with the matrix")


def check_all(tools: Tools, chunks: int, work: Path, *, quality: bool) -> None:
    """Run every comparison; raises AssertionError for the first that does not hold."""
    checkpoints = {default_folder().name: default_folder()}
    for family in MIXTURES:
        checkpoints[family] = work / f"tiny-{family}"
        if not checkpoints[family].is_dir():
            write_family(checkpoints[family], family, find_upstream())
    for name, checkpoint in checkpoints.items():
        bf16 = work / f"{name}.gguf"
        run([*PESTLE, "quantize", str(checkpoint), "--type", "bf16", "--out", str(bf16), "--format", "quiet"])
        check_quantized(tools, bf16, check_sums(tools, bf16, chunks, work), work)
    if quality:
        check_quality(default_folder(), work / f"{default_folder().name}.gguf", work)


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--chunks", type=int, default=4, metavar="N", help="chunks of 512 tokens (default: 4)")
    parser.add_argument("--quality", action="store_true", help="also judge SmolLM2's types with and without the matrix")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the files here")
    arguments = parser.parse_args()
    try:
        tools = Tools(Path(os.environ.get("LLAMA_TOOLS", ".")))
        with tempfile.TemporaryDirectory() as temporary:
            check_all(
                tools, arguments.chunks, (arguments.work or Path(temporary)).absolute(), quality=arguments.quality
            )
    except AssertionError as error:
        print(f"not equal: {error}", file=sys.stderr)
        return 1
    except UpstreamError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
