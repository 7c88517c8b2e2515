"""The results of the comparison with upstream as a table for people."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from explained_differences import differences

from app.llama.library import build_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gguf_compare import Comparison
    from oracle_cases import Case
    from source_error import SourceError
    from upstream import Upstream

Comparisons = dict[tuple[str, str], "Comparison"]

PAGE = """# The oracle: byte for byte what upstream makes

`make oracle` gives the same checkpoints to upstream's two steps (`convert_hf_to_gguf.py --outtype bf16`, whose file is
what the column bf16 compares, then `llama_model_quantize`; for `f16` the converter alone) and to `pestle quantize`, and
compares whole files by sha256; where these differ, every tensor's bytes, type, shape and place, and every key's type,
value and place.

**{identical} of {count} files are identical.** `identical` means that the sha256 of the whole file is equal.{rest}

Pestle's files of a row are made by one run with one thread, in one read of the source. One type of each row, another
from row to row, is made once more by a run of its own with all threads: {alone_identical} of {alone} are identical.

{matrix}

## The vocabularies

Every vocabulary is a real one. A tokenizer's files are rebuilt from llama.cpp's `models/ggml-vocab-NAME.gguf`; the
column says which. Where llama.cpp has none of a family's, the checkpoint has SmolLM2's; Mistral, Gemma 2 and 3 need
SentencePiece, and have Llama 2's. Upstream knows a pre-tokenizer by a hash of what a text is cut into; where that fails
for a vocabulary ({told}), its converter is told the name, here only.

## The checkpoints

{checkpoints}

The weights are random, with the scale of trained ones, and made by transformers itself where it knows the family;
those of SmolLM2 and all-MiniLM-L6-v2 are trained. SmolLM2's come out of a Q4_1 GGUF: see the README.

## Where one pass could be more exact

Upstream rounds what is not bf16 (f32, and what fp8, GPTQ and others decode to) to bf16 before it quantizes. Pestle does
so too, to make the same file. By way of an f32 GGUF (`--type f32`, then that file as the source) nothing is rounded in
between. The relative error (root mean square, over the layers' matrices), computed in float64, against the f32 numbers,
which are those nearest to the exact products of code and scale (`tests/quantize/test_dequantize.py` shows that):

{exactness}

## Differences

{differences}

`scripts/oracle_variants.py` compares many more checkpoints that differ in one thing each: model cards, folder names,
rope scaling, special tokens, chat templates. On purpose, Pestle refuses an untied checkpoint without `lm_head.weight`
(upstream ties it silently) and a tokenizer whose added tokens llama.cpp would read in another way; it takes a model
card whose tags mix words and numbers and a tokenizer_config.json with tokens as plain objects, where upstream ends
in an exception; and it lists further chat templates in the order of the file, where upstream's order is random.
`scripts/oracle_snapshots.py` compares the types that are planned with llama.cpp's own snapshots of 12 models.

## Versions

- {date}, {system}, {processor}; {minutes:.0f} minutes
- both sides: llama.cpp of llama-cpp-python {llama_cpp_python} (`{build}`)
- upstream's converter: {upstream}
- Pestle: Python {python}, numpy {numpy}

Again: `make oracle`, which writes this page. It makes its own environment (torch, transformers) in the cache folder on
first use; `PESTLE_ORACLE_PYTHON` and `PESTLE_LLAMA_CPP` name one that is there already.

Identity holds for one build of the library on one kind of processor: compilers that fuse multiplication and addition
(arm64, AVX-512 builds) give other bytes on both sides alike.
"""


@dataclass
class Results:
    """Comparisons by (checkpoint, type): of files made together, and of those that were made `alone`."""

    together: Comparisons = field(default_factory=dict)
    alone: Comparisons = field(default_factory=dict)
    exactness: dict[str, Sequence[SourceError]] = field(default_factory=dict)


def verdict(result: Comparison) -> str:
    """Say in a few words how equal two files are."""
    if result.identical:
        return "identical"
    if result.failed:
        return "NOT MADE"
    if all(reason for _, reason in differences(result)):
        return f"equal but for {len(result.tensors)} of {result.tensor_count} tensors"
    if result.tensors:
        return f"{len(result.tensors)} OF {result.tensor_count} TENSORS DIFFER"
    return f"{len(result.keys)} KEYS DIFFER, {len(result.layout)} IN LAYOUT"


def matrix(results: Comparisons, types: Sequence[str], cases: Mapping[str, Case]) -> list[str]:
    """Return the lines of a Markdown table: a row for each checkpoint, a column for each type."""
    lines = [f"| checkpoint | vocabulary | {' | '.join(types)} |", f"|---|---|{'---|' * len(types)}"]
    for name in dict.fromkeys(name for name, _ in results):
        cells = [verdict(results[name, kind]) for kind in types]
        lines.append(f"| {name} | {cases[name].vocabulary_name} | {' | '.join(cells)} |")
    return lines


def report(
    results: Results, types: Sequence[str], cases: Mapping[str, Case], upstream: Upstream, minutes: float
) -> str:
    """Return the whole page."""
    together = results.together.values()
    different = {name for (name, _), result in results.together.items() if not result.identical}
    return PAGE.format(
        identical=sum(result.identical for result in together),
        count=len(together),
        rest=f" The others are those of {_listed(sorted(different))}: see below." if different else "",
        alone_identical=sum(result.identical for result in results.alone.values()),
        alone=len(results.alone),
        matrix="\n".join(matrix(results.together, types, cases)),
        told=_listed([f"`{name}`" for name, case in cases.items() if case.pre_tokenizer and not case.quantized]),
        checkpoints="\n".join(f"- `{name}`: {case.what}." for name, case in cases.items()),
        exactness="\n".join(_exactness(results.exactness)),
        differences="\n".join(_differences(results.together, types) or ["None."]),
        date=f"{datetime.now(UTC):%Y-%m-%d}",
        system=f"{platform.system()} {platform.machine()}",
        processor=processor(),
        minutes=minutes,
        llama_cpp_python=version("llama-cpp-python"),
        build=build_name(),
        upstream=", ".join(f"{name} {number}" for name, number in upstream.versions().items()),
        python=platform.python_version(),
        numpy=version("numpy"),
    )


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _exactness(measured: Mapping[str, Sequence[SourceError]]) -> list[str]:
    lines = [
        "| checkpoint | type | upstream's, and Pestle's by default | from f32 | error avoided |",
        "|---|---|---|---|---|",
    ]
    for name, errors in measured.items():
        lines += [f"| {name} | {error.row()} |" for error in errors]
    return lines


def _differences(results: Comparisons, types: Sequence[str]) -> list[str]:
    """Return a line for each difference, with the types that have it."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for (name, kind), result in results.items():
        for line, reason in differences(result):
            found.setdefault((name, line, reason or "not explained"), []).append(kind)
    return [
        f"- {name}, {'all types' if len(kinds) == len(types) else ', '.join(kinds)}: {line}: {reason}."
        for (name, line, reason), kinds in found.items()
    ]


def processor() -> str:
    """Name this machine's processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
