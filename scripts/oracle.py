"""Compare what Pestle quantizes, byte for byte, with what upstream's two steps make of the same checkpoints.

    python scripts/oracle.py [--checkpoint NAME ...] [--type T ...] [--jobs N] [--write docs/oracle.md] [--work DIR]

Upstream: convert_hf_to_gguf.py in its own environment (made on first use, see upstream.py; upstream_worker.py imports
torch once and forks) to bf16, which is what the column bf16 compares; of that file llama_model_quantize of the
installed library; for f16 the converter alone.
Pestle: `python -P -m quantize`, all types in one read of the source; and, for one type of each checkpoint in turn, a
run of that type alone with all threads, which must give the same file. Prints a matrix and every difference.
Exit codes: 0 equal but for the differences explained here, 1 not equal, 3 upstream cannot be set up, 130 interrupted.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from explained_differences import differences
from gguf_compare import Comparison, compare
from oracle_cases import CASES, DEFAULT, Case, make_checkpoint
from oracle_report import Results, matrix, report
from source_error import source_errors
from upstream import CONVERTED_TYPES, FILE_TYPES, MATRIX_TYPES, Upstream, UpstreamError, find_upstream

from quantize.recipe import find

if TYPE_CHECKING:
    from collections.abc import Mapping

# Checkpoints that are measured against what they decode to, without the rounding to bf16 in between.
MEASURED = ("tiny-llama3-f32", "tiny-llama-fp8-block", "tiny-llama-gptq-4", "tiny-llama-ct-int4")


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--checkpoint", action="append", choices=list(CASES), metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--type", action="append", choices=list(FILE_TYPES), metavar="T", help=", ".join(FILE_TYPES))
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="checkpoints side by side, a thread each")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the results as Markdown")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="keep the checkpoints here; default: a temporary folder"
    )
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error("--jobs must be at least 1")
    names, types = arguments.checkpoint or list(CASES), arguments.type or list(MATRIX_TYPES)
    started = time.monotonic()
    try:
        upstream = find_upstream()
        with tempfile.TemporaryDirectory(prefix="pestle-oracle-") as temporary:
            work: Path = arguments.work or Path(temporary)
            make_checkpoint(DEFAULT, CASES[DEFAULT], upstream, work)  # whose vocabulary many others have
            results = compare_all(upstream, names, types, work, arguments.jobs)
            for name in MEASURED if arguments.write else ():
                results.exactness[name] = source_errors(make_checkpoint(name, CASES[name], upstream, work))
    except UpstreamError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        return 130
    cases = {name: CASES[name] for name in names}
    print("\n".join(matrix(results.together, types, cases)))
    bad = print_differences(results.together) + print_differences(results.alone, " alone")
    for how, comparisons in (("", results.together), (" made alone", results.alone)):
        print(f"{sum(result.identical for result in comparisons.values())} of {len(comparisons)} files{how} identical")
    if arguments.write:
        page = report(results, types, cases, upstream, (time.monotonic() - started) / 60)
        arguments.write.write_text(page, encoding="utf-8")
    return 1 if bad else 0


def compare_all(upstream: Upstream, names: list[str], types: list[str], work: Path, jobs: int) -> Results:
    """Compare every type of every checkpoint, `jobs` checkpoints at a time."""

    def one(number: int, name: str) -> Results:
        started = time.monotonic()
        try:
            found = compare_checkpoint(upstream, name, types, types[number % len(types)], work)
        except (subprocess.CalledProcessError, UpstreamError) as error:
            said = error.stderr if isinstance(error, subprocess.CalledProcessError) else ""
            failed = Comparison(failed=f"no checkpoint: {error} {said}")
            found = Results({(name, kind): failed for kind in types})
        equal = sum(result.identical for result in found.together.values())
        seconds = time.monotonic() - started
        print(f"{name}: {equal} of {len(types)} identical, {seconds:.0f} s", file=sys.stderr, flush=True)
        return found

    results = Results()
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(one, number, name) for number, name in enumerate(names)]
        try:
            for future in waiting:
                found = future.result()
                results.together |= found.together
                results.alone |= found.alone
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results


def compare_checkpoint(upstream: Upstream, name: str, types: list[str], type_alone: str, work: Path) -> Results:
    """Make a checkpoint and all files of it, on both sides, and compare them."""
    case = CASES[name]
    checkpoint = make_checkpoint(name, case, upstream, work)
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=work) as temporary:
        folders = {side: Path(temporary) / side for side in ("upstream", "pestle", "alone")}
        for folder in folders.values():
            folder.mkdir()
        theirs = make_upstream(upstream, case, checkpoint, types, folders["upstream"])
        ours = make_pestle(case, checkpoint, types, folders["pestle"], threads=1)
        alone = make_pestle(case, checkpoint, [type_alone], folders["alone"])
        return Results(
            {(name, kind): compare_files(ours[kind], theirs[kind]) for kind in types},
            {(name, type_alone): compare_files(alone[type_alone], theirs[type_alone])},
        )


def compare_files(ours: Path | str, theirs: Path | str) -> Comparison:
    """Compare two files; text in place of one says why it was not made."""
    if isinstance(theirs, str):
        return Comparison(failed=f"upstream: {theirs}" + (f"; Pestle: {ours}" if isinstance(ours, str) else ""))
    if isinstance(ours, str):
        return Comparison(failed=f"Pestle: {ours}")
    return compare(ours, theirs)


def make_upstream(
    upstream: Upstream, case: Case, checkpoint: Path, types: list[str], folder: Path
) -> dict[str, Path | str]:
    """Do upstream's two steps. Returns for each type its file, or why there is none."""
    outs = {kind: folder / f"{kind}.gguf" for kind in dict.fromkeys(["bf16", *types])}
    jobs = [(checkpoint, kind, out) for kind, out in outs.items() if kind in CONVERTED_TYPES]
    failures = upstream.convert(jobs, case.pre_tokenizer)
    quantized = {kind: out for kind, out in outs.items() if kind not in CONVERTED_TYPES}
    if outs["bf16"] in failures:
        failures |= dict.fromkeys(quantized.values(), failures[outs["bf16"]])
    elif quantized:
        failures |= upstream.quantize(outs["bf16"], quantized, threads=1, requantize=case.requantize)
    return {kind: failures.get(out, out) for kind, out in outs.items()}


def make_pestle(
    case: Case, checkpoint: Path, types: list[str], folder: Path, threads: int | None = None
) -> dict[str, Path | str]:
    """Run Pestle once. Returns for each type its file, or why there is none."""
    if len(types) == 1:
        outs = {types[0]: folder / "out.gguf"}
    else:
        outs = {kind: folder / f"{checkpoint.name}-{find(kind).label}.gguf" for kind in types}
    command = [sys.executable, "-P", "-m", "quantize", str(checkpoint), "--type", ",".join(types), "--no-measure"]
    command += ["--out", str(folder if len(types) > 1 else outs[types[0]]), "--format", "quiet"]
    command += [*(["--threads", str(threads)] if threads else []), *(["--allow-requantize"] if case.requantize else [])]
    finished = subprocess.run(command, check=False, capture_output=True, text=True)
    if finished.returncode:
        return dict.fromkeys(types, f"exit code {finished.returncode}: {finished.stderr.strip()}")
    return dict(outs)


def print_differences(results: Mapping[tuple[str, str], Comparison], how: str = "") -> int:
    """Print every difference with its reason, if it has one; returns the number of those without."""
    bad = 0
    for (name, kind), result in results.items():
        for line, reason in differences(result):
            bad += reason is None
            print(f"{name} {kind}{how}: {line} [{reason or 'NOT EXPLAINED'}]")
    return bad


if __name__ == "__main__":
    sys.exit(main())
