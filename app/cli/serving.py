"""What `pestle serve` does with its settings: the model's file first, then the children, then the server."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys

from app.cli.prepare import prepare_model
from app.config import ServeSettings, cache_folder
from app.models.gguf import read_header
from app.observability import logging
from app.observability.metrics import Metrics
from app.pool.pool import Pool


def serve(settings: ServeSettings) -> int:
    """Serve until a signal ends it; returns the exit code."""
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
