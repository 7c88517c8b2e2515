"""Runs in upstream's environment: imports torch and the converter once, then does every task in a process of its own.

    python upstream_worker.py LLAMA_CPP

Reads a task a line from standard input, as JSON, and answers each with a line. `convert` does upstream's first step,
`save` makes the model of a config.json. A task is done in a fork, so that none sees what another left behind.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def convert(jobs: list[list[str]], pre_tokenizer: str | None) -> dict[str, str]:
    """Convert each (checkpoint, type, out); returns what went wrong, by out.

    The converter is told the pre-tokenizer's name where its hash of one string cannot know it (a truncated vocabulary).
    """
    import convert_hf_to_gguf  # type: ignore[import-not-found]  # noqa: PLC0415 - upstream's, found by main()
    from conversion.base import TextModel  # type: ignore[import-not-found]  # noqa: PLC0415

    if pre_tokenizer:
        TextModel.get_vocab_base_pre = lambda _self, _tokenizer: pre_tokenizer
    failures = {}
    for checkpoint, kind, out in jobs:
        sys.argv = ["convert_hf_to_gguf.py", checkpoint, "--outtype", kind, "--outfile", out]
        try:
            convert_hf_to_gguf.main()
        except BaseException as error:
            failures[out] = f"{type(error).__name__}: {error}"
    return failures


def save(folder: str, dtype: str) -> dict[str, str]:
    """Make the model of a folder's config.json, fill it with random numbers and save it in place."""
    import torch  # type: ignore[import-not-found]  # noqa: PLC0415
    import transformers  # type: ignore[import-not-found]  # noqa: PLC0415

    config = transformers.AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    model = getattr(transformers, config.architectures[0])._from_config(config)  # noqa: SLF001 - the public ways load weights
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.1)
            else:
                parameter.normal_(0.0, 0.02 if "embed" in name else parameter.shape[-1] ** -0.5)
    model.to(getattr(torch, dtype)).save_pretrained(folder, safe_serialization=True)
    return {}


TASKS: dict[str, Callable[..., dict[str, str]]] = {"convert": convert, "save": save}


def done_in_a_fork(task: dict[str, Any]) -> dict[str, Any]:
    """Return the task's `failures`, or an `error`."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.dup2(2, 1)  # answers alone go to standard output
            answer: dict[str, Any] = {"failures": TASKS[task.pop("do")](**task)}
        except BaseException as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        with os.fdopen(writer, "w") as out:
            json.dump(answer, out)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as lines:
        said = lines.read()
    _, status = os.waitpid(child, 0)
    found: dict[str, Any] = json.loads(said) if said else {"error": f"ended with {os.waitstatus_to_exitcode(status)}"}
    return found


def main() -> None:
    """Do tasks until standard input ends."""
    vendor = Path(sys.argv[1])
    sys.path[:0] = [str(vendor), str(vendor / "gguf-py")]
    import convert_hf_to_gguf  # noqa: F401, PLC0415 - what takes long is imported before the forks
    import transformers.modeling_utils  # type: ignore[import-not-found]  # noqa: F401, PLC0415

    for line in sys.stdin:
        print(json.dumps(done_in_a_fork(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
