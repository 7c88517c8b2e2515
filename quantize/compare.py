"""Several quantizations of a model side by side, judged against the first: `python -P -m quantize.compare`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from app.errors import InterruptedByUserError, PestleError, StorageError, UsageError

if TYPE_CHECKING:
    from quantize.quality import Quality

FLAGS = ("text", "chunks", "threads", "plot", "format")
_HEADINGS = (
    "file",
    "MB",
    "bits/weight",
    "perplexity",
    "KLD mean",
    "KLD 99%",
    "KLD max",
    "same top",
    "prompt t/s",
    "decode t/s",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to a parser."""
    parser.add_argument("reference", type=Path, metavar="REFERENCE", help="the GGUF that the others are judged against")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="GGUFs of the same model")
    parser.add_argument("--text", type=Path, metavar="FILE", help="text to judge over (default: the one that we bring)")
    parser.add_argument("--chunks", type=int, metavar="N", help="chunks of 512 tokens to use (default: all)")
    parser.add_argument("--threads", type=int, metavar="N", help="default: all processors")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw divergence against size, and speed")
    parser.add_argument("--format", choices=("human", "json"), default="human", help="json: one object a line")


def run(arguments: argparse.Namespace) -> int:
    """Judge, and print; errors are reported, and their exit code returned."""
    try:
        _run(arguments)
    except PestleError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return int(error.exit_code)
    except KeyboardInterrupt:
        return InterruptedByUserError.exit_code
    return 0


def _run(arguments: argparse.Namespace) -> None:
    from quantize.encoding import available_cpus  # noqa: PLC0415 - keeps numpy out of `pestle --help`
    from quantize.plot import Point, scatter  # noqa: PLC0415
    from quantize.quality import measure  # noqa: PLC0415
    from quantize.text_file import open_text  # noqa: PLC0415

    for name in ("chunks", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} is {value}; at least 1 is needed", param=name)
    files = [arguments.reference, *arguments.files]
    for path in files:
        if not path.is_file():
            raise UsageError(f"{path}: no such file", param="files")
    text = open_text(arguments.text)
    human = arguments.format == "human"
    found = measure(
        files[0], files[1:], text.content, threads=arguments.threads or available_cpus(), most_chunks=arguments.chunks,
        progress=_show if human and sys.stderr.isatty() else None,
    )  # fmt: skip
    if human:
        print("\n".join(table(found)))
        print(f"over {found[0].tokens} predictions in {text.name}; divergence (KLD, nats) from {files[0].name}")
    else:
        for quality in found:
            print(json.dumps(as_json(quality) | {"reference": str(files[0]), "text": text.name}))
    if arguments.plot:
        points = [Point(q.path.name, q.bytes / 1e6, q.kld_mean, q.decode_speed, "tokens/s") for q in found[1:]]
        _write(arguments.plot, scatter(points, "MB", "KLD, nats"))


def _write(path: Path, content: str) -> None:
    try:
        path.write_text(content, "utf-8")
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error


def _show(done: int, total: int) -> None:
    print(f"\r{done} of {total} chunks", end="" if done < total else "\n", file=sys.stderr, flush=True)


def as_json(quality: Quality) -> dict[str, object]:
    """Return the numbers under their names."""
    return {**dataclasses.asdict(quality), "path": str(quality.path), "bits_per_weight": quality.bits_per_weight}


def table(found: list[Quality]) -> list[str]:
    """Lay the results out as lines of text, a file a line."""
    rows = [_HEADINGS, *(_row(quality) for quality in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    return ["  ".join(_aligned(row, widths)).rstrip() for row in rows]


def _row(quality: Quality) -> tuple[str, ...]:
    return (
        quality.path.name,
        f"{quality.bytes / 1e6:.1f}",
        f"{quality.bits_per_weight:.2f}",
        f"{quality.perplexity:.3f} ± {quality.perplexity_error:.3f}",
        f"{quality.kld_mean:.4f}",
        f"{quality.kld_99:.4f}",
        f"{quality.kld_max:.4f}",
        f"{quality.same_top:.2%}",
        f"{quality.prompt_speed:.0f}",
        f"{quality.decode_speed:.1f}",
    )


def _aligned(row: tuple[str, ...], widths: list[int]) -> list[str]:
    return [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]


def main() -> int:
    """Run the command with the process's own arguments. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="compare", description="Judge quantizations of a model against each other.")
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
