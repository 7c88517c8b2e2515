"""Write a small random checkpoint of a model family: scripts/checkpoint_families says what it looks like.

    python scripts/family_checkpoint.py FAMILY --out DIR

transformers itself makes the model, in upstream's environment (see upstream.py), so that names, shapes and config.json
are those of the real thing; families that it does not know are written with the names and shapes that their file gives.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from checkpoint_vocabulary import write_tokenizer
from checkpoint_writer import TORCH_DTYPES, Tensor, whole_folder, write_json, write_shards
from random_checkpoint import random_values, vocabulary_of_checkpoint, vocabulary_of_gguf
from rebuild_default_checkpoint import default_folder
from upstream import Upstream, UpstreamError, find_upstream

if TYPE_CHECKING:
    from checkpoint_vocabulary import Vocabulary

FAMILIES = tuple(sorted(path.stem for path in (Path(__file__).parent / "checkpoint_families").glob("[a-z]*.py")))
CONTEXT_LENGTH = 4096
DTYPES = {name: stored for stored, name in TORCH_DTYPES.items()}


def write_family(out: Path, name: str, upstream: Upstream) -> None:
    """Write the whole folder of a family's checkpoint. Raises UpstreamError when transformers fails."""
    family = importlib.import_module(f"checkpoint_families.{name}")
    if hasattr(family, "write_checkpoint"):
        with whole_folder(out) as folder:
            family.write_checkpoint(folder)
        return
    vocabulary, dtype = _vocabulary(family.VOCABULARY, upstream), getattr(family, "DTYPE", "bfloat16")
    roles = {f"{role}_id": token for role, token in vocabulary.special.items() if role in {"bos_token", "eos_token"}}
    sizes = {"vocab_size": len(vocabulary.tokens), **roles}
    config: dict[str, Any] = {"dtype": dtype, **family.CONFIG}
    if "text_config" in config:
        config["text_config"] = {**sizes, **config["text_config"]}
    else:
        config = {**sizes, **config}
    with whole_folder(out) as folder:
        write_json(folder / "config.json", config)
        if hasattr(family, "tensors"):
            shapes = family.tensors(config)
            ranges = getattr(family, "BYTES", {})
            tensors = [_tensor(tensor, shape, ranges) for tensor, shape in shapes.items()]
            for _ in write_shards(folder, sorted(tensors, key=lambda tensor: tensor.name), DTYPES[dtype], 1):
                pass
        else:
            upstream.save_model(folder, dtype)
        getattr(family, "write_tokenizer", write_tokenizer)(folder, vocabulary, context_length=CONTEXT_LENGTH)
        for path, content in getattr(family, "FILES", {}).items():
            (folder / path).parent.mkdir(exist_ok=True)
            write_json(folder / path, content)


def _tensor(name: str, shape: tuple[int, ...], ranges: dict[str, tuple[int, int]]) -> Tensor:
    limits = next((limits for suffix, limits in ranges.items() if name.endswith(suffix)), None)
    if limits is None:
        return Tensor(name, shape, random_values(name, shape, 0))
    random = np.random.default_rng([*name.encode()])
    return Tensor(name, shape, lambda: random.integers(*limits, shape, dtype=np.uint8, endpoint=True), "U8")


def _vocabulary(name: str | None, upstream: Upstream) -> Vocabulary:
    if name is None:
        return vocabulary_of_checkpoint(default_folder())
    return vocabulary_of_gguf(upstream.llama_cpp / "models" / f"ggml-vocab-{name}.gguf")


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args()
    try:
        write_family(arguments.out, arguments.family, find_upstream())
    except UpstreamError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    print(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
