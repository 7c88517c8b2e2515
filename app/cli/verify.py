"""`pestle verify`: a finished file against its card and its source."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from app.cli.quantize import Commands


def add_command(commands: Commands) -> None:
    """Add the command to the parser."""
    from quantize.verify_command import add_arguments, run  # noqa: PLC0415 - the other commands start without it

    parser = commands.add_parser("verify", help="say whether a GGUF is what its card, and its source, say it is")
    add_arguments(parser)
    parser.set_defaults(run=run)
