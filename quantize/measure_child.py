"""The process that judges finished files against their reference: what llama.cpp does to it, it does to no one else.

    python -P -m quantize.measure_child TASK

It writes JSON lines: `progress`, then `quality` for each file, or `error` with a message. It ends when its standard
input does, and so with whoever started it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from app.errors import PestleError
from quantize.quality import measure
from quantize.text_file import open_text


def main(task: dict[str, Any]) -> int:
    """Judge the files that the task names; returns the exit code."""
    threading.Thread(target=_end_with_input, daemon=True).start()
    files = [Path(name) for name in task["files"]]
    text = open_text(Path(task["text"]) if task["text"] else None).content
    try:
        found = measure(
            Path(task["reference"]), files, text, threads=task["threads"], most_chunks=task["chunks"],
            progress=lambda done, total: _say("progress", done=done, total=total),
        )  # fmt: skip
    except PestleError as error:
        _say("error", message=error.message)
        return error.exit_code
    for quality in found:
        _say("quality", **{**dataclasses.asdict(quality), "path": str(quality.path)})
    return 0


def _end_with_input() -> None:
    while os.read(sys.stdin.fileno(), 4096):  # not sys.stdin, whose lock an ending interpreter waits for
        pass
    os._exit(1)


def _say(event: str, **content: Any) -> None:
    print(json.dumps({"event": event, **content}), flush=True)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
