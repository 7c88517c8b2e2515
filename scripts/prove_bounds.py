"""Prove the bounds of `pestle quantize`: memory and bytes read, on checkpoints with tensors of over 2 GB in f32.

    python scripts/prove_bounds.py [--case NAME ...] [--type T] [--threads N] [--folder DIR]

Each checkpoint (a dense model with a large embedding, a mixture with its experts in one stack, gpt-oss in MXFP4) is
written with random weights, a pattern of 8 MiB over and over, and quantized in a control group of its own with a limit
of 1 GiB for all memory, the cache of files included. Printed are the peak of anonymous memory of the whole process
tree, against 600 MiB + 64 MiB a thread, and the bytes that were read, against 1.05 times the source. Where there is no
control group to be had, the limit is RLIMIT_DATA, which the line before the table says. Needs 8 GB of disk.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import sys
import tempfile
from dataclasses import dataclass
from importlib import import_module
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from checkpoint_writer import DTYPE_BYTES, write_json
from measured_process import run_measured
from rebuild_default_checkpoint import default_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
LIMIT = 1 << 30
MOST_ANONYMOUS = (600 * MIB, 64 * MIB)  # and that for each thread
MOST_READ = 1.05
PATTERN_BYTES = 8 * MIB
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
CGROUPS = (  # where the kernel shows them, the file with the limit, that with the peak
    (Path("/sys/fs/cgroup"), "memory.max", "memory.peak"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
)


@dataclass(frozen=True)
class Case:
    """A checkpoint to make: the module of scripts/checkpoint_families, what to change in its config, and a type."""

    family: str | None
    config: dict[str, Any]
    type_name: str = "q8_0"
    plain: bool = False  # experts in bf16 instead of MXFP4, stored the other way round


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5,
    "vocab_size": 262144, "tie_word_embeddings": True, "max_position_embeddings": 8192, "rope_theta": 1e6,
}  # fmt: skip
GPT_OSS = {"hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 36}
CASES = {
    "dense": Case(None, LLAMA),
    "mixture": Case(
        "qwen3_moe_fused",
        {"hidden_size": 2048, "moe_intermediate_size": 2048, "num_experts": 64, "num_hidden_layers": 1},
    ),
    "gpt-oss": Case("gpt_oss_mxfp4", {**GPT_OSS, "num_hidden_layers": 2}, "mxfp4_moe"),
    "gpt-oss in bf16": Case("gpt_oss_mxfp4", {**GPT_OSS, "num_hidden_layers": 1}, plain=True),
}


def main() -> int:
    """Make the checkpoints, run, print. Returns 1 if a bound does not hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--case", action="append", choices=CASES, help="default: all")
    parser.add_argument("--type", help="default: q8_0, for gpt-oss in MXFP4 mxfp4_moe")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to work, default: a temporary folder")
    arguments = parser.parse_args()
    within = True
    with _limited() as (wrapper, how, peak_file):
        print(f"limit: {how}, {arguments.threads} threads")
        print(
            f"{'checkpoint':<16}{'type':<10}{'largest, f32':>13}{'source':>10}{'read':>8}{'anonymous':>12}{'all':>10}"
        )
        for name in arguments.case or CASES:
            with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
                folder = Path(temporary) / "Random-Bounds"
                largest, weights = make(folder, CASES[name])
                kind = arguments.type or CASES[name].type_name
                command = [*wrapper, sys.executable, "-P", "-m", "quantize", str(folder), "--type", kind]
                command += ["--out", str(folder / "out.gguf"), "--threads", str(arguments.threads), "--format", "quiet"]
                measured = run_measured(command, os.environ)
            ratio = measured.read / weights
            most = MOST_ANONYMOUS[0] + MOST_ANONYMOUS[1] * arguments.threads
            within &= ratio <= MOST_READ and measured.peak_anonymous <= most
            peak = f"{int(peak_file.read_text()) / MIB:6.0f} MiB" if peak_file and peak_file.exists() else ""
            print(
                f"{name:<16}{kind:<10}{largest / 1e9:10.2f} GB{weights / 1e9:7.2f} GB{ratio:7.3f}×"
                f"{measured.peak_anonymous / MIB:8.0f} MiB{peak:>10}",
                flush=True,
            )
    print(
        f"bounds: read at most {MOST_READ}×, anonymous at most {most / MIB:.0f} MiB: {'hold' if within else 'BROKEN'}"
    )
    return 0 if within else 1


def make(folder: Path, case: Case) -> tuple[int, int]:
    """Write a checkpoint; returns the bytes of its largest tensor in f32, and those of all as they are stored."""
    folder.mkdir()
    for name in TOKENIZER_FILES:
        shutil.copy(default_folder() / name, folder)
    family = import_module(f"checkpoint_families.{case.family}") if case.family else None
    shapes_of = family.tensors if family else _llama
    tokens = {"vocab_size": 49152, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16"}
    config = {**tokens, **(family.CONFIG if family else {}), **case.config}
    shapes = shapes_of(config)
    if case.plain:
        config.pop("quantization_config")
        shapes = dict(_plain(shapes))
    write_json(folder / "config.json", config)
    sizes = {name: prod(shape) * DTYPE_BYTES[_dtype(name)] for name, shape in shapes.items()}
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + sizes[name]
        header[name] = {"dtype": _dtype(name), "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    random = np.random.default_rng(0)
    values = random.standard_normal(PATTERN_BYTES // 2, dtype=np.float32) * 0.02
    patterns = {
        "BF16": (values.view(np.uint32) >> 16).astype(np.uint16).tobytes(),
        "U8": random.integers(118, 124, PATTERN_BYTES, np.uint8).tobytes(),
    }
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, size in sizes.items():
            for written in range(0, size, PATTERN_BYTES):
                file.write(patterns[_dtype(name)][: size - written])
        file.flush()
        os.fsync(file.fileno())  # so that writing it back is not counted with the run
    weights = {name: prod(shape) * (2 if name.endswith("_blocks") else 1) for name, shape in shapes.items()}
    return 4 * max(weights.values()), offset


def _dtype(name: str) -> str:
    return "U8" if name.endswith(("_blocks", "_scales")) else "BF16"


def _plain(shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, shape in shapes.items():
        if name.endswith("_blocks"):
            experts, rows, blocks, block_bytes = shape
            yield name.removesuffix("_blocks"), (experts, 2 * blocks * block_bytes, rows)
        elif not name.endswith("_scales"):
            yield name, shape


def _llama(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    keys = config["head_dim"] * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        block = {
            "input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (hidden, hidden), "self_attn.k_proj.weight": (keys, hidden),
            "self_attn.v_proj.weight": (keys, hidden), "self_attn.o_proj.weight": (hidden, hidden),
            "mlp.gate_proj.weight": (wide, hidden), "mlp.up_proj.weight": (wide, hidden),
            "mlp.down_proj.weight": (hidden, wide),
        }  # fmt: skip
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


@contextlib.contextmanager
def _limited() -> Iterator[tuple[list[str], str, Path | None]]:
    """Give the words before a command that limit its memory, how they do it, and the file that tells the peak of it."""
    for root, limit, peak in CGROUPS:
        group = root / f"pestle-bounds-{secrets.token_hex(4)}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if not (group / limit).exists():
                continue  # no control groups here, or none of memory
            (group / limit).write_text(str(LIMIT))
            words = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
            yield words, f"{LIMIT // MIB} MiB, control group ({limit})", group / peak
            return
        finally:
            group.rmdir()
    yield (
        ["sh", "-c", f'ulimit -d {LIMIT // 1024} && exec "$@"', "sh"],
        f"{LIMIT // MIB} MiB of data (RLIMIT_DATA)",
        None,
    )


if __name__ == "__main__":
    sys.exit(main())
