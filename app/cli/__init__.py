"""The command line: `pestle`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from app.cli import compare, doctor, imatrix, quantize, serve, show, verify
from app.errors import InterruptedByUserError, PestleError

_EXAMPLES = """\
examples:
  pestle serve model.gguf                          chat at http://127.0.0.1:8080/
  pestle serve ./SmolLM2-135M-Instruct             quantizes the folder once, then serves it
  pestle quantize ./SmolLM2-135M-Instruct --type q4_k_m --out small.gguf
  pestle imatrix ./SmolLM2-135M-Instruct           what matters to its weights, for quantize --imatrix

exit codes: 0 done, 2 usage, 3 bad input, 4 disk or permission, 5 verification failed, 130 interrupted
"""


class _ShowVersion(argparse.Action):
    """Looks the version up when it is asked for, which takes longer than a short run's other preparations."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version  # noqa: PLC0415

        print(f"pestle {version('pestle')}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of every command."""
    parser = argparse.ArgumentParser(
        prog="pestle",
        description="Grinds safetensors into small GGUF files and serves them behind OpenAI-compatible routes.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and leave")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (serve, quantize, imatrix, compare, show, verify, doctor):
        module.add_command(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    namespace = build_parser().parse_args(arguments)
    try:
        exit_code: int = namespace.run(namespace)
    except PestleError as error:
        print(f"pestle: {error.message}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("pestle: interrupted", file=sys.stderr)
        return InterruptedByUserError.exit_code
    return exit_code
