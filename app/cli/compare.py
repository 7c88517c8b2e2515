"""`pestle compare`: in a process of its own, since it loads what may be damaged models."""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import TYPE_CHECKING

from quantize.compare import FLAGS, add_arguments

if TYPE_CHECKING:
    from app.cli.quantize import Commands


def add_command(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("compare", help="judge quantizations of a model: size, divergence, perplexity, speed")
    add_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the comparison; returns its exit code, 3 when llama.cpp ended it."""
    command = [sys.executable, "-P", "-m", "quantize.compare", str(arguments.reference), *map(str, arguments.files)]
    for flag in FLAGS:
        if getattr(arguments, flag) is not None:
            command += [f"--{flag}", str(getattr(arguments, flag))]
    exit_code = subprocess.run(command, check=False).returncode  # noqa: S603 - our own module, no shell
    if exit_code < 0:
        print(f"pestle: llama.cpp ended with signal {-exit_code}: one of the files is damaged", file=sys.stderr)
        return 3
    return exit_code
