"""Takes a model's name apart: `Llama-3.2-1B-Instruct` has a base name, a size, a finetune and a version. Pure.

The rules are those of upstream's `gguf.Metadata`, because the keys that come of them must be the same.
"""

from __future__ import annotations

import dataclasses
import re

_VERSION = re.compile(r"(v|iter)?\d+([.]\d+)*", re.IGNORECASE)
_TYPE = re.compile(r"i?q\d(_\w)*|b?fp?(16|32)", re.IGNORECASE)
_SIZE = re.compile(r"(([A]|\d+[x])?\d+([._]\d+)?[KMBT][\d]?|small|mini|medium|large|x?xl)", re.IGNORECASE)
_FINETUNE = re.compile(r"chat|instruct|vision|lora", re.IGNORECASE)
_UNTITLED = re.compile(r"^(v\d+(?:\.\d+)*|\d.*)$")
_SIZE_UNITS = " KMBT"


@dataclasses.dataclass(frozen=True, slots=True)
class NameParts:
    """The parts of a model's name; None where the name says nothing."""

    full_name: str | None = None
    organization: str | None = None
    basename: str | None = None
    finetune: str | None = None
    version: str | None = None
    size_label: str | None = None


def title(name: str) -> str:
    """Return the name in words: `smollm2-135m` → `Smollm2 135m`. Versions and mixed case stay as they are."""
    words = name.strip().replace("-", " ").split()
    return " ".join(word.title() if word.islower() and not _UNTITLED.match(word) else word for word in words)


def split_name(name: str, weights: int) -> NameParts:
    """Take a name apart, which may begin with an organization; `weights` tells sizes from context lengths."""
    if " " in name:
        return NameParts(full_name=name)  # a sentence, not a name of the Hub's kind
    organization, slash, rest = name.partition("/")
    if not slash:
        organization, rest = "", name
    parts = [part for part in rest.split("-") if part]
    kinds: list[set[str]] = []
    for place, part in enumerate(parts):
        parts[place], kind = _classify(part, weights, first=place == 0)
        kinds.append({kind} if kind else set())
    _drop_word_sizes(parts, kinds)
    _mark_basename(parts, kinds)

    def join(kind: str, *, but: str = "") -> str | None:
        chosen = [part for part, has in zip(parts, kinds, strict=True) if kind in has and but not in has]
        return "-".join(dict.fromkeys(chosen) if kind == "size_label" else chosen) or None

    size_label, finetune, version = join("size_label"), join("finetune"), join("version", but="basename")
    telling = size_label is not None or finetune is not None or version is not None
    return NameParts(
        full_name=rest,
        organization=None if not slash or organization.startswith(".") else organization,
        basename=join("basename") if telling else None,
        finetune=finetune,
        version=version,
        size_label=size_label,
    )


def _classify(part: str, weights: int, *, first: bool) -> tuple[str, str | None]:
    if _VERSION.fullmatch(part):
        return part, "version"
    if _TYPE.fullmatch(part):
        return part.upper(), "type"
    if not first and _SIZE.fullmatch(part):
        return _size(part.replace("_", "."), weights)
    if not first and _FINETUNE.fullmatch(part):
        return part, "finetune"
    return part, None


def _size(part: str, weights: int) -> tuple[str, str]:
    if part[-1].isdecimal():  # 7b1 means 7.1b
        part = part[:-2] + "." + part[-1] + part[-2]
    if len(part) > 1 and part[-2].isdecimal() and part[-1] in "kmbt":
        part = part[:-1] + part[-1].upper()
    try:
        stated = float(part[:-1]) * 1000.0 ** _SIZE_UNITS.find(part[-1])
    except ValueError:
        return part, "size_label"
    if weights and abs(stated - weights) > 7 * weights // 8:
        return part[:-1] + part[-1].lower(), "finetune"  # far from the model's size: rather a context length
    return part, "size_label"


def _drop_word_sizes(parts: list[str], kinds: list[set[str]]) -> None:
    sizes = [part for part, has in zip(parts, kinds, strict=True) if "size_label" in has]
    if any(letter.isdecimal() for size in sizes for letter in size):
        for part, has in zip(parts, kinds, strict=True):
            if "size_label" in has and part.isalpha():
                has.remove("size_label")


def _mark_basename(parts: list[str], kinds: list[set[str]]) -> None:
    at_start = True
    for part, has in zip(parts, kinds, strict=True):
        if at_start and ((not has and part[0].isalpha()) or "version" in has):
            has.add("basename")
        else:
            at_start = False
            if not has:
                has.add("finetune")
    for has in reversed(kinds):  # a version at the end of the base name is no part of it
        if "basename" not in has or len(has) == 1:
            break
        has.remove("basename")


def size_label(weights: int) -> str:
    """Return the size as people write it: `135M`, `1.2B`."""
    for unit, scale in (("T", 1e-12), ("B", 1e-9), ("M", 1e-6), ("K", 1e-3)):
        if weights > 1 / scale or unit == "K":
            scaled = weights * scale
            digits = max(2 - len(str(round(scaled)).lstrip("0")), 0)
            return f"{scaled:.{digits}f}{unit}"
    raise AssertionError("unreachable: K takes every size")
