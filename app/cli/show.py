"""`pestle show`: what a GGUF is, and its card. Reads the header only: no library, no weights."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from app.errors import ModelFileError, UsageError
from app.models.card import Card, card_path
from app.models.card_words import card_rows, worst_tensors
from app.models.embedded_card import embedded_card, find_card
from app.models.facts import Facts, facts_of, open_header

if TYPE_CHECKING:
    from app.cli.quantize import Commands

_WORST = 5
_TEXTS = ("path", "architecture", "name", "tokenizer", "pre_tokenizer")


class Shown(msgspec.Struct, frozen=True):
    """A file, its card and where that is; `problem` says why the card is not to be believed."""

    file: Facts
    card: Card | None = None
    card_from: str | None = None
    problem: str | None = None


def add_command(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("show", help="say what a GGUF is, and what its quantization cost")
    parser.add_argument("file", type=Path, metavar="FILE", help="a GGUF")
    parser.add_argument("--format", choices=("human", "json"), default="human", help="json: one object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print; returns the exit code. Raises what reading the header raises."""
    path = arguments.file.expanduser()
    if not path.is_file():
        raise UsageError(f"{path}: no such file", param="file")
    shown = look_at(path)
    if arguments.format == "json":
        print(_printable(msgspec.json.encode(_encodable(shown)).decode()))
    else:
        print(_printable("\n".join(lines(shown))))
    return 0


def look_at(path: Path) -> Shown:
    """Read a file's header and its card. Raises `ModelFileError` or `StorageError` for the file itself."""
    header = open_header(path)
    facts = facts_of(header)
    try:
        found = find_card(header)
        inside = embedded_card(header) is not None
    except ModelFileError as error:
        return Shown(facts, problem=error.message)
    if found is None:
        return Shown(facts)
    return Shown(facts, found[0], "the file itself" if inside else card_path(path).name, found[1])


def lines(shown: Shown) -> Iterator[str]:
    """Yield what people read."""
    file, card = shown.file, shown.card
    yield file.path
    yield from _table(
        ("architecture", file.architecture or "not said"),
        ("name", file.name or "not said"),
        ("size", f"{file.bytes:,} bytes, {file.weights:,} weights, {file.bits_per_weight:.2f} bits a weight"),
        ("types", ", ".join(f"{name} ({share.tensors})" for name, share in file.types.items())),
        ("context", f"{file.context:,} tokens" if file.context else "not said"),
        ("tokenizer", _tokenizer(file)),
        ("chat template", "yes" if file.chat_template else "no"),
    )
    if card is None:
        yield f"no usable card: {shown.problem}" if shown.problem else "no card"
        return
    yield f"card, from {shown.card_from}"
    if shown.problem:
        yield f"  NOT THIS FILE'S: {shown.problem}"
    yield from _table(*card_rows(card))
    if errors := worst_tensors(card, _WORST):
        yield f"  largest relative errors of {len(card.tensors)} tensors"
        yield from (f"    {error:8.3%}  {tensor.name} ({tensor.type})" for error, tensor in errors)


def _tokenizer(file: Facts) -> str:
    if file.tokenizer is None:
        return "none"
    return f"{file.tokenizer}{f' ({file.pre_tokenizer})' if file.pre_tokenizer else ''}, {file.tokens:,} tokens"


def _table(*rows: tuple[str, str]) -> Iterator[str]:
    return (f"  {name:<14}{value}" for name, value in rows)


def _printable(text: str) -> str:
    # names inside a file may hold what moves the cursor, and the surrogates of bytes that are not UTF-8
    readable = text.encode(errors="replace").decode()
    return "".join(
        letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in readable
    )


def _encodable(shown: Shown) -> Shown:
    file = shown.file
    texts = {name: value for name in _TEXTS if (value := getattr(file, name)) is not None}
    readable = {name: os.fsencode(value).decode(errors="replace") for name, value in texts.items()}
    return msgspec.structs.replace(shown, file=msgspec.structs.replace(file, **readable))
