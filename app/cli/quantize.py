"""`pestle quantize`: the quantizer's own arguments under our command."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001 - argparse has no public name for it


def add_command(commands: Commands) -> None:
    """Add the command to the parser."""
    from quantize.cli import add_arguments, run  # noqa: PLC0415 - the other commands start without numpy

    parser = commands.add_parser("quantize", help="grind a folder of safetensors into one GGUF")
    add_arguments(parser)
    parser.set_defaults(run=run)
