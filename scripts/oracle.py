"""Compare what Pestle quantizes, byte for byte, with what upstream's two steps make of the same checkpoints.

    python scripts/oracle.py [--checkpoint NAME ...] [--type T ...] [--write docs/oracle.md] [--work DIR]

Upstream: convert_hf_to_gguf.py --outtype bf16 in its own environment (made on first use, see upstream.py), then
llama_model_quantize of the installed library; for bf16 and f16 the converter alone. Pestle: `python -P -m quantize`,
one pass. Prints a matrix and every difference. Exit codes: 0 equal but for the differences explained here, 1 not equal,
3 a side failed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from family_checkpoint import FAMILIES, write_family
from gguf_compare import LAST_PLACE, Comparison, compare
from oracle_report import matrix, report
from quantized_checkpoint import METHODS, quantize_checkpoint
from rebuild_default_checkpoint import default_folder
from upstream import CONVERTED_TYPES, FILE_TYPES, MATRIX_TYPES, Upstream, UpstreamError, find_upstream

if TYPE_CHECKING:
    from collections.abc import Iterator

SCRIPTS = Path(__file__).parent
DEFAULT = "SmolLM2-135M-Instruct"
THREADS = 2

# Tensors that may differ in the last bit of an f32, with the reason.
EXPLAINED = {
    re.compile(r"blk\.\d+\.ssm_a"): "upstream takes torch's exp, whose last bit depends on the kind of processor; "
    "Pestle rounds the true value",
}


def explain(what: str, difference: str) -> str | None:
    """Return the reason of a difference, if there is a good one."""
    if not difference.endswith(LAST_PLACE):
        return None
    return next((reason for pattern, reason in EXPLAINED.items() if pattern.fullmatch(what)), None)


@dataclass(frozen=True)
class Case:
    """A checkpoint to compare: how it is made, and the pre-tokenizer's name if upstream needs it.

    A `shape` of random_checkpoint.py, or a `family` of checkpoint_families; `quantized` by a method of
    quantized_checkpoint.py. `types` are those that upstream can make of it, if not all.
    """

    what: str
    shape: str = ""
    family: str = ""
    vocabulary: str | None = None
    flags: tuple[str, ...] = ()
    pre_tokenizer: str | None = None
    quantized: str = ""
    types: tuple[str, ...] = ()


CASES = {
    DEFAULT: Case("the rebuilt default, bf16, tied embeddings, byte-level BPE", shape=""),
    "tiny-llama3": Case(
        "Llama 3: rope scaling, grouped queries, untied, its vocabulary", "tiny-llama3", vocabulary="llama-bpe"
    ),
    "tiny-llama3-instruct": Case(
        "Llama 3 Instruct: chat template in a file of its own, list of EOS tokens, no head_dim",
        "tiny-llama3-instruct", vocabulary="llama-bpe",
    ),
    "tiny-llama3-sharded": Case("the same shape in three shards", "tiny-llama3", flags=("--shards", "3")),
    "tiny-llama3-f16": Case("f16 source", "tiny-llama3", flags=("--dtype", "f16")),
    "tiny-llama3-f32": Case(
        "f32 source; truncated vocabulary, whose pre-tokenizer upstream must be told", "tiny-llama3",
        flags=("--dtype", "f32", "--truncate-vocab", "4000"), pre_tokenizer="smollm",
    ),
    "tiny-mistral": Case(
        "Mistral: heads wider than hidden / heads, SentencePiece", "tiny-mistral", vocabulary="llama-spm"
    ),
    "tiny-llama-spm": Case(
        "Llama 2: every head has its own key, SentencePiece", "tiny-llama-spm", vocabulary="llama-spm"
    ),
}  # fmt: skip


def _family_case(name: str) -> Case:
    family = importlib.import_module(f"checkpoint_families.{name}")
    return Case(family.WHAT, family=name, pre_tokenizer=family.PRE, types=getattr(family, "TYPES", ()))


CASES |= {f"tiny-{name}": _family_case(name) for name in FAMILIES}


def _quantized_case(method: str) -> Case:
    if "fp8" in method:  # blocks at the edges are smaller
        base = Case("", "tiny-llama3", flags=("--truncate-vocab", "4000"), pre_tokenizer="smollm")
    else:  # rows are multiples of a group
        base = Case("", "tiny-llama-spm", vocabulary="llama-spm")
    return replace(base, what=f"quantized already: {method}", quantized=method)


CASES |= {f"tiny-llama-{method}": _quantized_case(method) for method in METHODS}


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--checkpoint", action="append", choices=list(CASES), metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--type", action="append", choices=list(FILE_TYPES), metavar="T", help=", ".join(FILE_TYPES))
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the results as Markdown")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="keep checkpoints and files here; default: a temporary folder"
    )
    arguments = parser.parse_args()
    names, types = arguments.checkpoint or list(CASES), arguments.type or list(MATRIX_TYPES)
    try:
        upstream = find_upstream()
        with tempfile.TemporaryDirectory(prefix="pestle-oracle-") as temporary:
            work: Path = arguments.work or Path(temporary)
            work.mkdir(parents=True, exist_ok=True)
            results = dict(compare_all(upstream, names, types, work))
    except (UpstreamError, subprocess.CalledProcessError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else ""
        print(f"error: {error}\n{said or ''}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        return 130
    print("\n".join(matrix(results, types)))
    bad = print_differences(results)
    if arguments.write:
        descriptions = {name: CASES[name].what for name in names}
        arguments.write.write_text(report(results, types, descriptions, explain, upstream), encoding="utf-8")
    return 1 if bad else 0


def compare_all(
    upstream: Upstream, names: list[str], types: list[str], work: Path
) -> Iterator[tuple[tuple[str, str], Comparison]]:
    """Yield ((checkpoint, type), comparison), one checkpoint after the other."""
    for name in names:
        case = CASES[name]
        checkpoint = make_checkpoint(name, case, upstream, work)
        started = time.monotonic()
        intermediate = work / f"{name}.upstream.intermediate.gguf"
        if set(types) - set(CONVERTED_TYPES):
            upstream.run(upstream.convert_command(checkpoint, intermediate, pre_tokenizer=case.pre_tokenizer))
        for type_name in [name for name in types if not case.types or name in case.types]:
            theirs, ours = (work / f"{name}.{side}.{type_name}.gguf" for side in ("upstream", "pestle"))
            if type_name in CONVERTED_TYPES:
                command = upstream.convert_command(
                    checkpoint, theirs, out_type=type_name, pre_tokenizer=case.pre_tokenizer
                )
            else:
                command = upstream.quantize_command(intermediate, theirs, type_name, THREADS)
            upstream.run(command)
            ours.unlink(missing_ok=True)
            command = [sys.executable, "-P", "-m", "quantize", str(checkpoint), "--type", type_name, "--out", str(ours)]
            subprocess.run([*command, "--no-measure", "--format", "quiet"], check=True, capture_output=True, text=True)
            yield (name, type_name), compare(ours, theirs)
            theirs.unlink()
            ours.unlink()
        intermediate.unlink(missing_ok=True)
        print(f"{name}: compared in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def make_checkpoint(name: str, case: Case, upstream: Upstream, work: Path) -> Path:
    """Make the checkpoint's folder, or find it; returns its path. Upstream takes the model's name from the folder's."""
    if name == DEFAULT:
        _script("rebuild_default_checkpoint.py")
        return default_folder()
    folder = work / "checkpoints" / name
    if case.quantized and not folder.exists():
        plain = make_checkpoint(f"{case.shape}-plain", replace(case, quantized=""), upstream, work)
        quantize_checkpoint(plain, folder, case.quantized)
    if case.family and not folder.exists():
        write_family(folder, case.family, upstream)
    if not folder.exists():
        if case.vocabulary:
            vocabulary = ["--vocab", str(upstream.llama_cpp / "models" / f"ggml-vocab-{case.vocabulary}.gguf")]
        else:
            vocabulary = ["--vocab-from", str(make_checkpoint(DEFAULT, CASES[DEFAULT], upstream, work))]
        _script("random_checkpoint.py", "--shape", case.shape, "--out", str(folder), *vocabulary, *case.flags)
    return folder


def _script(name: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(SCRIPTS / name), *arguments], check=True, capture_output=True, text=True)


def print_differences(results: dict[tuple[str, str], Comparison]) -> int:
    """Print every difference with its reason, if it has one; returns the number of those without."""
    bad = 0
    for (name, type_name), result in results.items():
        for kind, lines in (("key", result.keys), ("tensor", result.tensors)):
            for what, difference in lines.items():
                reason = explain(what, difference)
                bad += reason is None
                print(f"{name} {type_name}: {kind} {what}: {difference} [{reason or 'NOT EXPLAINED'}]")
        for difference in result.layout:
            bad += 1
            print(f"{name} {type_name}: {difference} [NOT EXPLAINED]")
    return bad


if __name__ == "__main__":
    sys.exit(main())
