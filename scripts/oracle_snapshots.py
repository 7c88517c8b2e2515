"""Compare the types that Pestle plans with the snapshots that llama.cpp keeps of its own choice for 12 models.

    python scripts/oracle_snapshots.py [MODEL ...]

The snapshots are tests/snapshots/*.schema of llama.cpp's source (PESTLE_LLAMA_CPP, or the release that is installed,
downloaded). For each a header without weights is made of the model's published sizes, and planned for each type.
Exit codes: 0 equal, 1 not equal, 3 no snapshots, 130 interrupted.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from snapshot_models import MODELS, STACKED, SnapshotModel
from upstream import UpstreamError, find_source

from app.models.gguf_types import ValueType
from quantize.header import KeyTable
from quantize.recipe import Recipe
from quantize.selection import decide_types
from quantize.tensors import TensorSpec

if TYPE_CHECKING:
    from pathlib import Path

_ROWS = 32  # of a matrix; they decide over nothing
_HEADS = 128  # of a stack by heads


@dataclass
class Snapshot:
    """What a .schema file says: sizes, and for each type the default and the tensors that differ from it."""

    sizes: dict[str, int] = field(default_factory=dict)
    defaults: dict[str, str] = field(default_factory=dict)
    others: dict[str, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Snapshot:
        """Read a file."""
        snapshot, name = cls(), ""
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("#"):
                snapshot.sizes |= {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", line)}
            elif section := re.fullmatch(r"\[(\w+)\] (\w+)", line):
                name = section[1]
                snapshot.defaults[name] = section[2]
                snapshot.others[name] = {}
            elif line:
                tensor, _, type_name = line.partition(" ")
                snapshot.others[name][tensor] = type_name
        return snapshot

    def tensors(self) -> set[str]:
        """Return all names; of stacks that are never named because they always have the default, their siblings'."""
        names = {name for section in self.others.values() for name in section}
        kinds = {_kind(name) for name in names}
        for sibling, others in (
            ("ffn_down_exps", {"ffn_gate_exps", "ffn_up_exps"} & kinds),
            ("attn_k_b", {"attn_v_b"}),
        ):
            for name in [name for name in names if _kind(name) == sibling]:
                names |= {name.replace(sibling, other) for other in others}
        return names


def _kind(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def header_of(snapshot: Snapshot, model: SnapshotModel) -> tuple[KeyTable, list[TensorSpec]]:
    """Return the keys and tensors of a model."""
    sizes, names = snapshot.sizes, snapshot.tensors()
    specs = []
    for name in sorted(names):
        shape: tuple[int, ...] = (_ROWS, model.rows.get(_kind(name), sizes["n_embd"]))
        if _kind(name) in STACKED:
            shape = (_HEADS if "attn" in name else sizes["n_expert"], *shape)
        specs.append(TensorSpec(name, shape))
    common = {
        "context_length": 4096, "embedding_length": sizes["n_embd"], "block_count": sizes["n_layer"],
        "feed_forward_length": sizes["n_ff"], "attention.head_count": sizes["n_head"],
        "attention.head_count_kv": sizes["n_head_kv"], "attention.layer_norm_rms_epsilon": 1e-6,
    }  # fmt: skip
    if sizes.get("n_expert"):
        common["expert_count"] = sizes["n_expert"]
    keys = KeyTable()
    keys.text("general.architecture", model.architecture)
    for key, value in (common | model.keys).items():
        name = f"{model.architecture}.{key}"
        if isinstance(value, tuple):
            kind, there, absent = value
            has = [f"blk.{block}.{kind}.weight" in names for block in range(sizes["n_layer"])]
            keys.array(name, ValueType.INT32, [there if found else absent for found in has])
        elif isinstance(value, list) and isinstance(value[0], bool):
            pattern = [value[block % len(value)] for block in range(sizes["n_layer"])]
            keys.array(name, ValueType.BOOL, pattern)
        elif isinstance(value, list):
            keys.array(name, ValueType.INT32, value)
        elif isinstance(value, float):
            keys.f32(name, value)
        else:
            keys.u32(name, value)
    return keys, specs


def file_types(source: Path) -> dict[str, int]:
    """Return llama.cpp's numbers of file types, by name: Q4_K_M → 15."""
    text = (source / "include" / "llama.h").read_text(encoding="utf-8")
    found = re.findall(r"^\s*LLAMA_FTYPE_(?:MOSTLY|ALL)_(\w+)\s*=\s*(\d+)", text, re.MULTILINE)
    return {name: int(number) for name, number in found}


def compare(name: str, source: Path) -> tuple[int, int, list[str]]:
    """Plan a model in every type of its snapshot. Returns how many types and tensors there are, and what differs."""
    snapshot = Snapshot.read(source / "tests" / "snapshots" / f"{name}.schema")
    numbers = file_types(source)
    recipes = [Recipe(section, numbers[section], "bf16", quantized=True) for section in snapshot.defaults]
    keys, specs = header_of(snapshot, MODELS[name])
    decided = decide_types(keys, specs, recipes)
    different = []
    for section, default in snapshot.defaults.items():
        for spec in specs:
            expected = snapshot.others[section].get(spec.name, default)
            if decided[section].get(spec.name) != expected:
                different.append(f"{section} {spec.name}: {decided[section].get(spec.name)}; llama.cpp: {expected}")
    return len(recipes), len(specs), different


def names_of(source: Path) -> list[str]:
    """Return the names of all snapshots. Raises `UpstreamError` if they are others than the models that are known."""
    names = sorted(path.stem for path in (source / "tests" / "snapshots").glob("*.schema"))
    if set(names) != set(MODELS):
        raise UpstreamError(f"{source}: other snapshots than expected: {', '.join(sorted(set(names) ^ set(MODELS)))}")
    return names


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("model", nargs="*", metavar="MODEL", help=", ".join(MODELS))
    arguments = parser.parse_args()
    bad = 0
    try:
        source = find_source()
        for name in arguments.model or names_of(source):
            types, tensors, different = compare(name, source)
            print(f"{name}: {tensors} tensors in {types} types: {f'{len(different)} differ' if different else 'equal'}")
            print("".join(f"  {line}\n" for line in different[:20]), end="")
            bad += bool(different)
    except UpstreamError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        return 130
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
