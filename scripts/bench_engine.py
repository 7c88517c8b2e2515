"""Measure Pestle against llama-server under the loads that tell engines apart, and print one table with the ratios.

    LLAMA_SERVER=.../llama-server python scripts/bench_engine.py [--device cpu|cuda|cuda-8b] [--load NAME ...]
        [--runs N] [--model FILE.gguf] [--write docs/benchmarks.md]

Each load is a run of bench_serving.py --peer: same file, threads, slots and prompts, both servers up, runs in pairs.
The floors are what Pestle means to reach; a figure beyond its floor is marked. Exit codes: 0 all reached, 1 some not,
3 a server failed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench_quantize import replace_section
from oracle_report import processor

SCRIPTS = Path(__file__).parent
RATE, FIRST_95, GAP_99, LONGEST_GAP = "tokens/s out", "TTFT p95 ms", "ITL p99 ms", "ITL max ms"


@dataclass(frozen=True)
class Load:
    """What clients ask for, and the floors: figure → the least ratio of a rate, or the greatest of a time.

    `greatest` are limits of Pestle's own figures.
    """

    what: str
    arguments: str
    floors: dict[str, float]
    pestle: str = ""
    greatest: dict[str, float] | None = None
    file: str = ""
    """The type of the default model that it wants, if not the usual one."""


# An array that 64 tokens do not complete. No blanks: the arguments are split there.
_SCHEMA = json.dumps(
    {
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "name": "people",
                "schema": {
                    "type": "array",
                    "minItems": 100,
                    "items": {
                        "type": "object",
                        "properties": {
                            "name": {"type": "string"},
                            "age": {"type": "integer", "minimum": 0, "maximum": 150},
                            "kind": {"enum": ["person", "place", "thing"]},
                        },
                        "required": ["name", "age", "kind"],
                        "additionalProperties": False,
                    },
                },
            },
        }
    },
    separators=(",", ":"),
)
CPU = {
    "1-stream": Load("1 stream, prompts of 128, answers of 128", "--clients 1 --max-tokens 128", {RATE: 1}),
    "8-streams": Load("8 streams, prompts of 128, answers of 64", "--clients 8 --requests 48", {RATE: 1}),
    "16-over-8": Load("16 streams over 8 slots", "--clients 16 --slots 8 --requests 48", {RATE: 1}),
    "shared-prefix": Load(
        "16 requests over 8 streams, 700 shared tokens, answers of 32, cold",
        "--clients 8 --requests 16 --workload shared-prefix --prefix-tokens 700 --prompt-tokens 45 --max-tokens 32",
        {RATE: 2.5, FIRST_95: 0.35},
    ),
    "long-prompts": Load(
        "5 streams, prompts of 900, answers of 96", "--clients 5 --requests 20 --prompt-tokens 900 --max-tokens 96",
        {RATE: 0.9, GAP_99: 0.1, LONGEST_GAP: 0.1},
    ),
    "itl-target": Load(
        "the same, Q4_0, --itl-target 100ms", "--clients 5 --requests 20 --prompt-tokens 900 --max-tokens 96", {},
        pestle="--itl-target 100ms", greatest={GAP_99: 150}, file="q4_0",
    ),
    "json-schema": Load(
        "8 streams, json_schema, answers of 64", f"--clients 8 --requests 48 --fields {_SCHEMA}", {RATE: 1},
    ),
    "mixed": Load(
        "8 streams, prompts of 64 to 1,024, answers of 24 to 96",
        "--clients 8 --requests 24 --workload mixed --prompt-tokens 64 --prompt-tokens-max 1024 --max-tokens 96",
        {RATE: 1},
    ),
}  # fmt: skip
_SAMPLED = "--temperature 0.8 --top-k 40 --top-p 0.95"
_32 = "--clients 32 --requests 96 --max-tokens 128"
_SHARED = "--clients 64 --requests 64 --workload shared-prefix --prefix-tokens 2000 --prompt-tokens 32 --max-tokens 64"
CUDA = {
    "1-stream": Load("1 stream, greedy", "--clients 1 --requests 6 --max-tokens 128", {RATE: 1}),
    "32-greedy": Load("32 streams, greedy", _32, {RATE: 2.5}),
    "32-sampled": Load("32 streams, temperature 0.8, top-k 40, top-p 0.95", f"{_32} {_SAMPLED}", {RATE: 1.8}),
    "64-shared": Load("64 streams, 2,000 shared tokens", f"{_SHARED} --ctx 2560", {RATE: 4}),
}
# An 8B leaves less of a step to what surrounds llama_decode.
CUDA_8B = CUDA | {
    "32-greedy": replace(CUDA["32-greedy"], floors={RATE: 2.0}),
    "32-sampled": replace(CUDA["32-sampled"], floors={RATE: 1.6}),
}
_ON_CUDA = ("--device cuda --flash-attn on --batch-size 2048", "-ngl 99 -fa on")
DEVICES = {"cpu": (CPU, "", ""), "cuda": (CUDA, *_ON_CUDA), "cuda-8b": (CUDA_8B, *_ON_CUDA)}
USUAL_TYPE = "q4_1"  # of the embedded model: as it came
COLUMNS = ("load", "figure", "Pestle", "llama-server", "ratio", "spread", "floor")


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--device", choices=list(DEVICES), default="cpu")
    parser.add_argument("--load", action="append", metavar="NAME", help=", ".join({**CPU, **CUDA}))
    parser.add_argument("--model", type=Path, metavar="FILE", help="default: the embedded model")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="pairs for each load; medians are shown")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--pestle", metavar="FILE", help="the pestle command (default: beside this Python)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the section of this page")
    arguments = parser.parse_args()
    loads = DEVICES[arguments.device][0]
    names = arguments.load or list(loads)
    if unknown := set(names) - set(loads):
        parser.error(f"--load: {', '.join(unknown)}: unknown here; known are {', '.join(loads)}")
    rows: list[list[str]] = []
    missed = 0
    try:
        for name in names:
            cells, missing = measured(loads[name], arguments)
            rows += cells
            missed += missing
            print("\n".join(" | ".join(row) for row in cells), flush=True)
    except subprocess.CalledProcessError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        return 130
    text = section(rows, arguments)
    print(text)
    if arguments.write:
        replace_section(arguments.write, text, heading(arguments))
    return 1 if missed else 0


def measured(load: Load, arguments: argparse.Namespace) -> tuple[list[list[str]], int]:
    """Run one load; return its lines of the table, and how many floors it missed."""
    _, ours, theirs = DEVICES[arguments.device]
    command = [sys.executable, str(SCRIPTS / "bench_serving.py"), "--peer", "--ignore-eos", "--json"]
    command += ["--runs", str(arguments.runs), "--threads", str(arguments.threads), *load.arguments.split()]
    command += [f"--pestle-args={ours} {load.pestle}", f"--llama-args={theirs}"]
    if arguments.pestle:
        command += ["--pestle", arguments.pestle]
    command += ["--model", str(file_of(load, arguments))]
    result = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found = {row["figure"]: row for row in json.loads(result.stdout)["comparison"]}
    lines: list[list[str]] = []
    missed = 0
    for figure in dict.fromkeys([RATE, *load.floors, *(load.greatest or {})]):
        cells, reached = line(found[figure], load, figure)
        lines.append([load.what if not lines else "", figure, *cells])
        missed += not reached
    return lines, missed


def line(row: dict[str, Any], load: Load, figure: str) -> tuple[list[str], bool]:
    """Return the cells of a figure, and whether it keeps its floor."""
    ratio, own = row["ratio_of_medians"], row["pestle"]
    floor, greatest = load.floors.get(figure), (load.greatest or {}).get(figure)
    reached = (floor is None or (ratio >= floor if figure == RATE else ratio <= floor)) and (
        greatest is None or own <= greatest
    )
    wanted = "" if floor is None else f"{'≥' if figure == RATE else '≤'} {floor:g}"
    wanted = wanted if greatest is None else f"≤ {greatest:g} ms"
    return [
        f"{own:.1f}",
        f"{row['llama-server']:.1f}",
        f"**{ratio:.2f}**",
        f"{row['least_paired_ratio']:.2f}–{row['greatest_paired_ratio']:.2f}",
        wanted + ("" if reached else " MISSED"),
    ], reached


def file_of(load: Load, arguments: argparse.Namespace) -> Path:
    """Return the GGUF that a load is run with, the embedded model's if none is given; it is made if need be."""
    given: Path | None = arguments.model
    if given and not load.file:
        return given
    name = load.file or USUAL_TYPE
    rebuilt = subprocess.run(
        [sys.executable, str(SCRIPTS / "rebuild_default_checkpoint.py")], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()
    out = Path(rebuilt).parent / f"{Path(rebuilt).name}-{name.upper()}.gguf"
    if not out.exists():
        command = [sys.executable, "-P", "-m", "quantize", rebuilt, "--type", name, "--out", str(out)]
        subprocess.run([*command, "--no-measure", "--format", "quiet"], check=True)
    return out


def heading(arguments: argparse.Namespace) -> str:
    """Return the heading of the page's section."""
    return {"cpu": "## Engine, CPU", "cuda": "## Engine, GPU, 1B", "cuda-8b": "## Engine, GPU, 8B"}[arguments.device]


def section(rows: list[list[str]], arguments: argparse.Namespace) -> str:
    """Return the page's section as Markdown."""
    _, ours, theirs = DEVICES[arguments.device]
    table = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    model = arguments.model.name if arguments.model else f"SmolLM2-135M-Instruct, {USUAL_TYPE.upper()}"
    extra = f"; Pestle with `{ours}`, llama-server with `{theirs}`" if ours else ""
    lines = [heading(arguments), "", *(f"| {' | '.join(cells)} |" for cells in table), ""]
    lines.append(
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.system()}, {processor()}, {device_name(arguments)}, "
        f"{arguments.threads} threads; {model}{extra}; medians of {arguments.runs} pairs."
    )
    lines.append(f"Again: `python scripts/bench_engine.py --device {arguments.device} --runs {arguments.runs}`.")
    return "\n".join(lines) + "\n"


def device_name(arguments: argparse.Namespace) -> str:
    """Name the card, or count the cores."""
    if arguments.device != "cpu":
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout.strip() or "a GPU"
    return f"{os.cpu_count()} cores"


if __name__ == "__main__":
    sys.exit(main())
