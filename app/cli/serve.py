"""`pestle serve`: quantize if needed, start the children, then serve."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from typing import TYPE_CHECKING

import msgspec

from app.cli.prepare import prepare_model
from app.config import ServeSettings, add_flags, cache_folder, resolve
from app.errors import UsageError
from app.models.gguf import read_header
from app.observability import logging
from app.observability.metrics import Metrics
from app.pool.pool import Pool

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
    settings = _settings(arguments)
    signal.signal(signal.SIGTERM, _leave)
    logging.configure(settings.log_format, settings.log_level)
    model_file = prepare_model(settings.model_path, settings.quantization, cache_folder(settings))
    read_header(model_file, largest_array=0)  # truncated or hostile files end here, before any library sees them
    model_id = model_file.name.removesuffix(".gguf")
    metrics = Metrics()
    pool = Pool(settings, model_file, model_id, metrics)
    asked_to_end: list[int] = []  # imports can swallow what a signal's handler raises: while they run, it is noted
    signal.signal(signal.SIGTERM, lambda number, _frame: asked_to_end.append(number))
    pool.spawn()  # the children load while the web framework is being imported
    from app.server.run import run as run_server  # noqa: PLC0415

    signal.signal(signal.SIGTERM, _leave)  # until the server drains on it
    if asked_to_end:
        return 0
    return run_server(pool, settings, metrics, on_ready=lambda url: _announce(url, model_id))


def _leave(_number: int, _frame: object) -> None:
    sys.exit(0)


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


def _announce(url: str, model_id: str) -> None:
    body = json.dumps({"model": model_id, "messages": [{"role": "user", "content": "Hello!"}], "stream": True})
    lines = [
        f"\n  Chat page   {url}/",
        f"  OpenAI API  {url}/v1   (model: {model_id})",
        f"  Try it      curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}",
        "  Stop        Ctrl-C\n",
    ]
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:  # whoever read our output has left; clients of the API have not
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
