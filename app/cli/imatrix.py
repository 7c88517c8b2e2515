"""`pestle imatrix`: in a process of its own, since it loads what may be a damaged model."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from app.cli.module import run_native
from app.cli.prepare import run_quantizer
from app.errors import StorageError, UsageError
from app.models import hub
from quantize.cli import ended_by_signals
from quantize.imatrix import FLAGS, add_arguments, check

if TYPE_CHECKING:
    from app.cli.quantize import Commands


def add_command(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("imatrix", help="measure what matters to a model's weights, for quantize --imatrix")
    add_arguments(parser, model="a GGUF, a folder of safetensors, or org/name[@revision] on the Hub")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure; returns the exit code, 3 when llama.cpp ended it."""
    path = Path(arguments.model).expanduser()
    model = None if path.is_file() or path.is_dir() else hub.parse(arguments.model)
    if model is None and not path.exists():
        raise UsageError(
            f"no model at {arguments.model!r}: give a GGUF, a folder of safetensors or org/name[@revision] on the Hub",
            param="model",
        )
    name = model.name if model else path.stem if path.is_file() else path.absolute().name
    out = (arguments.out or Path(f"{name}.imatrix.gguf")).expanduser()
    flags = [f"--{flag}={getattr(arguments, flag)}" for flag in FLAGS if getattr(arguments, flag) is not None]
    flags.append(f"--out={out}")
    if arguments.process_output:
        flags.append("--process-output")
    with ended_by_signals():
        if path.is_file():
            return run_native("quantize.imatrix", str(path), *flags)
        check(arguments, out)  # before the checkpoint is quantized
        with _as_gguf(arguments.model if model else str(path), name, out, style=arguments.format) as made:
            return run_native("quantize.imatrix", str(made), *flags)


@contextlib.contextmanager
def _as_gguf(source: str, name: str, out: Path, *, style: str) -> Iterator[Path]:
    """Make a GGUF of a checkpoint in a folder beside `out`, which is removed in the end."""
    try:
        with tempfile.TemporaryDirectory(prefix=".pestle-imatrix-", dir=out.absolute().parent) as folder:
            made = Path(folder) / f"{name}-BF16.gguf"
            if style != "quiet":
                print(f"Quantizing {source} to bf16 for this run (removed in the end: {made})", file=sys.stderr)
            run_quantizer(source, "bf16", made, "--format", "human" if style == "human" else "quiet", silent=True)
            yield made
    except OSError as error:
        raise StorageError(f"{error.filename or out}: {error.strerror or error}; choose another --out") from error
