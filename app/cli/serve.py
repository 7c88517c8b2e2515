"""`pestle serve`: quantize if needed, start the children, then serve."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import msgspec

from app.config import ServeSettings, add_flags, resolve
from app.errors import UsageError

if TYPE_CHECKING:
    from app.cli.quantize import Commands

_EXAMPLES = """\
examples:
  pestle serve model.gguf --parallel 8 --ctx-size 4096
  pestle serve ./SmolLM2-135M-Instruct --quantization q4_k_m --port 9000
  LLM_MODEL_PATH=model.gguf LLM_PORT=9000 pestle serve
"""


def add_command(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "serve",
        help="serve a model behind OpenAI-compatible routes, with a chat page",
        description="A flag wins over its environment variable, that over the TOML file, and that over the default.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model",
        nargs="?",
        help="a GGUF file, a folder of safetensors, or org/name[@revision] on the Hub; the same as --model-path",
    )
    add_flags(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal ends it; returns the exit code."""
    from app.cli.serving import serve  # noqa: PLC0415 - the other commands need nothing of it

    return serve(_settings(arguments))


def _settings(arguments: argparse.Namespace) -> ServeSettings:
    names = [field.name for field in msgspec.structs.fields(ServeSettings)]
    flags = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    if arguments.model is not None and flags.setdefault("model_path", arguments.model) != arguments.model:
        raise UsageError("the model is given twice, as MODEL and as --model-path: give it once", param="model_path")
    settings = resolve(flags, file=arguments.config).settings
    if not settings.model_path:
        raise UsageError(
            "no model: give a GGUF file or a folder of safetensors, or set LLM_MODEL_PATH", param="model_path"
        )
    return settings
