"""The results of the comparison with upstream as a table for people."""

from __future__ import annotations

import platform
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from app.llama.library import build_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gguf_compare import Comparison
    from upstream import Upstream

Results = dict[tuple[str, str], "Comparison"]
Explain = Callable[[str, str], str | None]

PAGE = """# The oracle: byte for byte what upstream makes

`make oracle` gives the same checkpoints to upstream's two steps (`convert_hf_to_gguf.py --outtype bf16`, then
`llama_model_quantize`; for `bf16` and `f16` the converter alone) and to `pestle quantize`, and compares whole files by
sha256; where these differ, every tensor's bytes, type, shape and place, and every key's type, value and place.

**{identical} of {count} files are identical.** `identical` means that the sha256 of the whole file is equal.

{matrix}

## The checkpoints

{checkpoints}

The vocabularies are real ones: SmolLM2's, and those of Llama 3 and Llama 2 as llama.cpp's source carries them. The tiny
models' weights are random, with the scale of trained ones.

## Differences

{differences}

`scripts/oracle_variants.py` compares many more checkpoints that differ in one thing each: model cards, folder names,
rope scaling, special tokens, chat templates. On purpose, Pestle refuses an untied checkpoint without `lm_head.weight`
(upstream ties it silently); it takes a model card whose tags mix words and numbers and a tokenizer_config.json with
tokens as plain objects, where upstream ends in an exception; and it lists further chat templates in the order of the
file, where upstream's order is random.

## Versions

- {date}, {system}, {processor}
- both sides: llama.cpp of llama-cpp-python {llama_cpp_python} (`{build}`)
- upstream's converter: {upstream}
- Pestle: Python {python}, numpy {numpy}

Again: `python scripts/oracle.py --write docs/oracle.md`. It makes its own environment (torch, transformers) in the
cache folder on first use; `PESTLE_ORACLE_PYTHON` and `PESTLE_LLAMA_CPP` name one that is there already.

Identity holds for one build of the library on one kind of processor: compilers that fuse multiplication and addition
(arm64, AVX-512 builds) give other bytes on both sides alike.
"""


def verdict(result: Comparison) -> str:
    """Say in a few words how equal two files are."""
    if result.identical:
        return "identical"
    if result.tensors:
        return f"{len(result.tensors)} of {result.tensor_count} tensors differ"
    return f"tensors equal; {len(result.keys)} keys, {len(result.layout)} in layout"


def matrix(results: Results, types: list[str]) -> list[str]:
    """Return the lines of a Markdown table: a row for each checkpoint, a column for each type."""
    names = list(dict.fromkeys(name for name, _ in results))
    lines = [f"| checkpoint | {' | '.join(types)} |", f"|---|{'---|' * len(types)}"]
    for name in names:
        cells = [verdict(results[name, kind]) if (name, kind) in results else "not made" for kind in types]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def report(
    results: Results,
    types: list[str],
    descriptions: Mapping[str, str],
    explain: Explain,
    upstream: Upstream,
) -> str:
    """Return the whole page."""
    return PAGE.format(
        identical=sum(result.identical for result in results.values()),
        count=len(results),
        matrix="\n".join(matrix(results, types)),
        checkpoints="\n".join(f"- `{name}`: {what}." for name, what in descriptions.items()),
        differences="\n".join(_differences(results, explain) or ["None."]),
        date=f"{datetime.now(UTC):%Y-%m-%d}",
        system=f"{platform.system()} {platform.machine()}",
        processor=processor(),
        llama_cpp_python=version("llama-cpp-python"),
        build=build_name(),
        upstream=", ".join(f"{name} {number}" for name, number in upstream.versions().items()),
        python=platform.python_version(),
        numpy=version("numpy"),
    )


def _differences(results: Results, explain: Explain) -> list[str]:
    lines = []
    for (name, type_name), result in results.items():
        for what, difference in {**result.keys, **result.tensors}.items():
            lines.append(
                f"- {name}, {type_name}: `{what}`: {difference}: {explain(what, difference) or 'not explained'}."
            )
        lines += [f"- {name}, {type_name}: {difference}: not explained." for difference in result.layout]
    return lines


def processor() -> str:
    """Name this machine's processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
