"""Compare with upstream's converter on many small checkpoints that differ from each other in one thing.

    python scripts/oracle_variants.py [NAME ...]

Model cards, names of folders, rope scaling, special tokens, chat templates: what decides over the keys of the GGUF. One
process converts them all with upstream's converter (bf16), `quantize` does the same, and whole files are compared.
Exit codes: 0 equal, but for what is explained in the table, 1 not equal, 3 a side failed.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf_compare import compare
from oracle_cases import CASES, DEFAULT, make_checkpoint
from upstream import Upstream, find_upstream
from variant_table import GONE, VARIANTS, Variant

from quantize.cli import main as quantize


@dataclass
class Tally:
    """How many variants came out how."""

    identical: int = 0
    explained: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)


def main() -> int:
    """Run from the command line; returns the exit code."""
    wanted = {name: VARIANTS[name] for name in sys.argv[1:] or VARIANTS}
    upstream = find_upstream()
    with tempfile.TemporaryDirectory(prefix="pestle-variants-") as temporary:
        work = Path(temporary)
        folders = {name: work / name for name in ("checkpoints", "upstream", "pestle", "bases")}
        for folder in folders.values():
            folder.mkdir()
        bases = make_bases(upstream, folders["bases"])
        for name, variant in wanted.items():
            make_variant(folders["checkpoints"] / name, bases[variant.base], variant)
        jobs = [(folders["checkpoints"] / name, "bf16", folders["upstream"] / f"{name}.gguf") for name in wanted]
        for broken in upstream.convert(jobs, "smollm"):
            broken.unlink(missing_ok=True)
        tally = Tally()
        for name, variant in wanted.items():
            difference = compare_variant(name, folders)
            judge(name, variant, difference, tally)
    print(f"{tally.identical} of {len(wanted)} identical, {len(tally.explained)} explained")
    for line in [*tally.explained, *tally.different]:
        print(line)
    return 1 if tally.different else 0


def make_bases(upstream: Upstream, folder: Path) -> dict[str, Path]:
    """Make the checkpoints that the variants start from."""
    default = make_checkpoint(DEFAULT, CASES[DEFAULT], upstream, folder)
    script = Path(__file__).with_name("random_checkpoint.py")
    flags = ["--shape", "tiny-llama3", "--vocab-from", str(default), "--truncate-vocab", "600"]
    subprocess.run([sys.executable, str(script), *flags, "--out", str(folder / "bpe")], check=True, capture_output=True)
    return {"bpe": folder / "bpe", "spm": make_checkpoint("tiny-llama-spm", CASES["tiny-llama-spm"], upstream, folder)}


def make_variant(folder: Path, base: Path, variant: Variant) -> None:
    """Copy the base and make the variant's changes; the weights are linked."""
    folder.mkdir()
    for path in base.iterdir():
        if path.suffix == ".safetensors":
            (folder / path.name).hardlink_to(path)
        elif path.name != "README.md":
            shutil.copy(path, folder)
    for name, change in variant.files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if change is GONE:
            path.unlink()
        elif isinstance(change, str):
            path.write_bytes(change.encode())
        else:
            content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            path.write_text(json.dumps(merged(content, change), ensure_ascii=False), encoding="utf-8")


def merged(content: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """Return the object with the change's keys; GONE takes one away, objects inside are replaced whole."""
    both = {**content, **change}
    return {key: value for key, value in both.items() if value is not GONE}


def compare_variant(name: str, folders: dict[str, Path]) -> str:
    """Convert one with Pestle and compare; returns what differs, or nothing."""
    theirs, ours = folders["upstream"] / f"{name}.gguf", folders["pestle"] / f"{name}.gguf"
    said = io.StringIO()
    arguments = [str(folders["checkpoints"] / name), "--type", "bf16", "--out", str(ours), "--format", "quiet"]
    with contextlib.redirect_stderr(said):
        status = quantize(arguments)
    if status or not theirs.is_file():
        refusal = said.getvalue().strip().partition("\n")[0].replace(str(folders["checkpoints"]), "")
        return f"pestle: {refusal}" if status else "upstream failed"
    result = compare(ours, theirs)
    ours.unlink()
    if result.identical:
        return ""
    return "; ".join([*(f"{key}: {text}" for key, text in {**result.keys, **result.tensors}.items()), *result.layout])


def judge(name: str, variant: Variant, difference: str, tally: Tally) -> None:
    """Count one variant; a difference counts as explained if the table expects it and it is that one."""
    if not difference:
        tally.identical += 1
        if variant.expected:
            tally.different.append(f"{name}: identical, although the table expects {variant.expected!r}")
    elif variant.expected and variant.expected in difference:
        tally.explained.append(f"{name}: {difference} [{variant.reason}]")
    else:
        tally.different.append(f"{name}: {difference} [NOT EXPLAINED]")


if __name__ == "__main__":
    sys.exit(main())
