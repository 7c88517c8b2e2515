"""Measure `pestle quantize` against upstream's two steps, on this machine, in one run, alternating.

    python scripts/bench_quantize.py [--model default|llama-1b|DIR ...] [--type T ...] [--runs N] [--threads N]
        [--write docs/benchmarks.md]

For each model and type, N times: convert_hf_to_gguf.py to BF16, then llama-quantize; and `pestle quantize`; the order
changes from run to run. Then `pestle quantize` makes three of the types from one read, N times, against the sums of
upstream's runs for them. Medians of wall time; peak anonymous memory of the process and its children (sampled from
/proc); bytes that the kernel was given to write. The files must be the same. Upstream's environment is that of
scripts/oracle.py; LLAMA_QUANTIZE names upstream's binary, else the installed library does its second step.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from gguf_compare import file_sha256
from measured_process import Measurement, run_measured
from oracle_report import processor
from rebuild_default_checkpoint import default_folder
from upstream import Upstream, UpstreamError, find_upstream

from app.llama.library import build_name

if TYPE_CHECKING:
    from collections.abc import Sequence

SCRIPTS = Path(__file__).parent
TYPES = ("q8_0", "q4_0", "q4_k_m", "q5_k_m", "q6_k")
TOGETHER = ("q8_0", "q4_0", "q4_k_m")  # these are also made from one read of the source
HEADING = "## Quantization"
MIB = 1 << 20
BYTECODE_IS_KEPT = {"PYTHONDONTWRITEBYTECODE": ""}  # as is usual; else every run compiles each module anew


@dataclass(frozen=True)
class Row:
    """All runs of one model and type."""

    model: str
    type_name: str
    convert: list[Measurement]
    quantize: list[Measurement]
    pestle: list[Measurement]
    digest: str  # of upstream's file
    identical: bool

    @property
    def ratios(self) -> list[float]:
        """Pestle's time over upstream's, run by run."""
        pairs = zip(self.pestle, self.convert, self.quantize, strict=True)
        return [ours.seconds / (first.seconds + second.seconds) for ours, first, second in pairs]

    def cells(self) -> list[str]:
        """Return the cells of its line in the table."""
        upstream = median(c.seconds + q.seconds for c, q in zip(self.convert, self.quantize, strict=True))
        convert, quantize = (median(m.seconds for m in runs) for runs in (self.convert, self.quantize))
        peak = max(m.peak_anonymous for m in [*self.convert, *self.quantize]) / MIB
        written = median(c.written + q.written for c, q in zip(self.convert, self.quantize, strict=True)) / 1e6
        return [
            self.model,
            self.type_name,
            f"{upstream:.2f} ({convert:.2f} + {quantize:.2f})",
            f"{median(m.seconds for m in self.pestle):.2f}",
            f"**{median(self.ratios):.2f}** ({min(self.ratios):.2f}–{max(self.ratios):.2f})",
            f"{peak:.0f}",
            f"{max(m.peak_anonymous for m in self.pestle) / MIB:.0f}",
            f"{written:.0f}",
            f"{median(m.written for m in self.pestle) / 1e6:.0f}",
            "yes" if self.identical else "NO",
        ]


COLUMNS = (
    "model", "type", "upstream, s", "Pestle, s", "ratio (spread)", "upstream peak, MiB", "Pestle peak, MiB",
    "upstream wrote, MB", "Pestle wrote, MB", "same file",
)  # fmt: skip

PAGE = """{heading}

Wall time from the command to its end, warm page cache, medians; the ratio is Pestle's time over the sum of upstream's
two steps, run by run. Peak: anonymous memory (what the page cache cannot take back) of the process and its children.
Wrote: what the kernel was given to write; upstream's sum has the BF16 file in between.

{table}

{date}, {machine}, load average {load}; {threads} threads, {runs} runs, alternating.
Upstream: {upstream}. Library: {build}.
Again: `python scripts/bench_quantize.py --runs {runs} --threads {threads} --write docs/benchmarks.md`; with the kernels
and the chart, `make bench-quantize`.
"""


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--model", action="append", metavar="NAME|DIR", help="default, llama-1b, or a checkpoint's folder"
    )
    parser.add_argument("--type", action="append", choices=TYPES, metavar="T", help=", ".join(TYPES))
    parser.add_argument("--runs", type=int, default=3, metavar="N")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--write", type=Path, metavar="FILE", help=f"replace the section {HEADING!r} of this page")
    arguments = parser.parse_args()
    if arguments.runs < 1 or arguments.threads < 1:
        parser.error("--runs and --threads must be at least 1")
    rows = []
    try:
        upstream = find_upstream()
        load = os.getloadavg()[0]
        for name in arguments.model or ["default", "llama-1b"]:
            checkpoint = checkpoint_folder(name)
            warm(checkpoint)
            for type_name in arguments.type or TYPES:
                rows.append(measure(upstream, checkpoint, type_name, arguments.runs, arguments.threads))
                print(" | ".join(rows[-1].cells()), flush=True)
            singles = [row for row in rows if row.model == checkpoint.name and row.type_name in TOGETHER]
            if len(singles) == len(TOGETHER):
                rows.append(measure_together(checkpoint, singles, arguments.runs, arguments.threads))
                print(" | ".join(rows[-1].cells()), flush=True)
    except (UpstreamError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        return 130
    text = section(rows, upstream, arguments.runs, arguments.threads, load)
    print(text)
    if arguments.write:
        replace_section(arguments.write, text)
    return 0 if all(row.identical for row in rows) else 1


def checkpoint_folder(name: str) -> Path:
    """Return the folder of a model; the default and llama-1b are made in the cache folder if they are not there."""
    if name not in {"default", "llama-1b"}:
        return Path(name)
    subprocess.run([sys.executable, str(SCRIPTS / "rebuild_default_checkpoint.py")], check=True, stdout=subprocess.PIPE)
    if name == "default":
        return default_folder()
    folder = default_folder().with_name("llama-1b-random")
    if not folder.exists():
        command = [sys.executable, str(SCRIPTS / "random_checkpoint.py"), "--shape", "llama-1b", "--out", str(folder)]
        subprocess.run([*command, "--vocab-from", str(default_folder())], check=True, stdout=subprocess.PIPE)
    return folder


def warm(checkpoint: Path) -> None:
    """Read the weights once, so that both sides find them in the page cache."""
    for path in checkpoint.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def measure(upstream: Upstream, checkpoint: Path, type_name: str, runs: int, threads: int) -> Row:
    """Run both sides `runs` times."""
    row = Row(checkpoint.name, type_name, [], [], [], digest="", identical=True)
    digests = set()
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=checkpoint.parent) as folder:
        theirs, ours, converted = (Path(folder) / f"{name}.gguf" for name in ("upstream", "pestle", "converted"))

        def run_upstream() -> None:
            environment = upstream.environment() | BYTECODE_IS_KEPT
            row.convert.append(run_measured(upstream.convert_command(checkpoint, converted), environment))
            command = quantize_command(upstream, converted, theirs, type_name, threads)
            row.quantize.append(run_measured(command, environment))
            converted.unlink()

        def run_pestle() -> None:
            command = pestle_command(checkpoint, type_name, ours, threads)
            row.pestle.append(run_measured(command, dict(os.environ) | BYTECODE_IS_KEPT))

        for number in range(runs):
            for side in (run_upstream, run_pestle) if number % 2 == 0 else (run_pestle, run_upstream):
                os.sync()  # what one side left to be written must not slow the other's
                side()
            digest = file_sha256(theirs)
            digests |= {digest, file_sha256(ours)}
            theirs.unlink()
            ours.unlink()
    return replace(row, digest=digest, identical=len(digests) == 1)


def measure_together(checkpoint: Path, singles: Sequence[Row], runs: int, threads: int) -> Row:
    """Make the types of `singles` from one read, `runs` times; upstream's side is the sum of its runs for them."""
    names = [row.type_name for row in singles]
    ours, same = [], True
    for _ in range(runs):
        with tempfile.TemporaryDirectory(prefix=".bench-", dir=checkpoint.parent) as folder:
            out = Path(folder) / "all"
            os.sync()
            command = pestle_command(checkpoint, ",".join(names), out, threads)
            ours.append(run_measured(command, dict(os.environ) | BYTECODE_IS_KEPT))
            same = same and {file_sha256(path) for path in out.glob("*.gguf")} == {row.digest for row in singles}
    convert = [added(each) for each in zip(*(row.convert for row in singles), strict=True)]
    quantize = [added(each) for each in zip(*(row.quantize for row in singles), strict=True)]
    return Row(checkpoint.name, f"{', '.join(names)} from one read", convert, quantize, ours, digest="", identical=same)


def added(runs: Sequence[Measurement]) -> Measurement:
    """Return what some runs cost one after the other."""
    return Measurement(
        seconds=sum(run.seconds for run in runs),
        peak_anonymous=max(run.peak_anonymous for run in runs),
        written=sum(run.written for run in runs),
        read=sum(run.read for run in runs),
        cpu_seconds=sum(run.cpu_seconds for run in runs),
    )


def pestle_command(checkpoint: Path, types: str, out: Path, threads: int) -> list[str]:
    """Return our side's command; of several types, `out` is a folder."""
    command = [str(Path(sys.executable).with_name("pestle")), "quantize", str(checkpoint), "--type", types]
    return [*command, "--out", str(out), "--threads", str(threads), "--no-measure", "--format", "quiet"]


def quantize_command(upstream: Upstream, source: Path, out: Path, type_name: str, threads: int) -> list[str]:
    """Return upstream's second step: its own binary if there is one."""
    if binary := os.environ.get("LLAMA_QUANTIZE"):
        return [binary, str(source), str(out), type_name.upper(), str(threads)]
    return upstream.quantize_command(source, {type_name: out}, threads)


def section(rows: Sequence[Row], upstream: Upstream, runs: int, threads: int, load: float) -> str:
    """Return the page's section as Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in upstream.versions().items())
    second = "the llama-quantize binary" if os.environ.get("LLAMA_QUANTIZE") else "llama_model_quantize"
    table = [COLUMNS, ["---"] * len(COLUMNS), *(row.cells() for row in rows)]
    return PAGE.format(
        heading=HEADING,
        table="\n".join(f"| {' | '.join(cells)} |" for cells in table),
        date=f"{datetime.now(UTC):%Y-%m-%d}",
        machine=f"{platform.system()}, {processor()}, {os.cpu_count()} cores",
        load=f"{load:.1f} before and {os.getloadavg()[0]:.1f} after",
        threads=threads,
        runs=runs,
        upstream=f"{second}, {versions}",
        build=build_name(),
    )


def replace_section(page: Path, text: str, heading: str = HEADING) -> None:
    """Put the section in the place of the one with the same heading, or at the end of the page."""
    before = page.read_text(encoding="utf-8") if page.exists() else "# Benchmarks\n"
    head, found, rest = before.partition(f"{heading}\n")
    following = rest.find("\n## ")
    tail = rest[following + 1 :] if found and following >= 0 else ""
    page.write_text(f"{head.rstrip()}\n\n{text}{chr(10) + tail if tail else ''}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
