"""`pestle compare`: in a process of its own, since it loads what may be damaged models."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from app.cli.module import run_native
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
    flags = [str(arguments.reference), *map(str, arguments.files)]
    for flag in FLAGS:
        if getattr(arguments, flag) is not None:
            flags += [f"--{flag}", str(getattr(arguments, flag))]
    return run_native("quantize.compare", *flags)
