"""The command `pestle verify`: says whether a file is still what was made, and what its source gives."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from app.errors import (
    BadInputError,
    InterruptedByUserError,
    ModelFileError,
    PestleError,
    StorageError,
    UsageError,
    VerificationError,
)
from app.models.card import Card, card_path, read_card
from app.models.embedded_card import CARD_KEY, find_card
from app.models.gguf import MAGIC, Header, read_header
from quantize.cli import FORMATS, add_recipe_arguments, ended_by_signals, overrides_of, told
from quantize.recipe import RECIPES, Overrides
from quantize.verdict import FILE, HEADER, Difference, Verdict

STRUCTURE = "structure"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to a parser."""
    parser.add_argument("file", type=Path, metavar="FILE", help="a GGUF; its card is FILE.card.json")
    parser.add_argument(
        "source",
        type=Path,
        nargs="?",
        metavar="SOURCE",
        help="what it was made of: its bytes are made again and compared",
    )
    parser.add_argument("--type", metavar="T", help="default: what the card or the file says")
    add_recipe_arguments(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="default: all processors")
    parser.add_argument("--format", choices=FORMATS, default="human", help="json: one object a line, for scripts")


def run(arguments: argparse.Namespace) -> int:
    """Verify as the arguments say; returns the exit code: 5 if the file is not what it should be."""
    from quantize.reporting import open_reporter  # noqa: PLC0415 - keeps numpy out of `pestle --help`

    reporter = open_reporter(arguments.format)
    try:
        with ended_by_signals():
            verdict = _verdict(arguments, reporter)
    except PestleError as error:
        return told(reporter, error)
    except KeyboardInterrupt:
        return told(reporter, InterruptedByUserError("interrupted"))
    except BrokenPipeError:
        return StorageError.exit_code  # nobody is left to be told
    reporter.verified(verdict)
    return VerificationError.exit_code if verdict.differences else 0


def _verdict(arguments: argparse.Namespace, reporter: Any) -> Verdict:
    from quantize.card_check import card_differences, hash_file  # noqa: PLC0415

    path: Path = arguments.file.expanduser()
    if not path.is_file():
        raise BadInputError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    header = _header(path)
    if isinstance(header, Verdict):
        return header
    try:
        card, problem = find_card(header) or (None, None)
        sha256, through = hash_file(header, reporter.progress)
    except ModelFileError as error:
        if CARD_KEY not in header.metadata:
            raise
        return Verdict(path, header.file_size, (STRUCTURE,), (_of_header(path, error),))
    judges, differences = [STRUCTURE], list(_behind_the_tensors(header))
    if card is not None:
        judges.append("card")
        differences += card_differences(header, card, problem, sha256, through)
    if arguments.source is not None:
        judges.append("source")
        differences += _against_source(arguments, header, card, reporter)
    return Verdict(path, header.file_size, tuple(judges), tuple(differences), sha256)


def _header(path: Path) -> Header | Verdict:
    """Return the header, or a verdict if it is damaged in a file that once was a GGUF. Raises `ModelFileError` else."""
    try:
        return read_header(path)
    except ModelFileError as error:
        with path.open("rb") as file:
            is_gguf = file.read(len(MAGIC)) == MAGIC
        if not is_gguf and read_card(path) is None:
            raise
        return Verdict(path, path.stat().st_size, (STRUCTURE,), (_of_header(path, error),))


def _of_header(path: Path, error: ModelFileError) -> Difference:
    return Difference(STRUCTURE, HEADER, error.message.removeprefix(f"{path}: "))


def _behind_the_tensors(header: Header) -> list[Difference]:
    end = max((header.data_offset + tensor.offset + tensor.nbytes for tensor in header.tensors), default=0)
    padded = -(-end // header.alignment) * header.alignment
    if header.tensors and header.file_size > padded:
        return [Difference(STRUCTURE, FILE, f"{header.file_size - padded} bytes behind the last tensor belong to none")]
    return []


def _against_source(
    arguments: argparse.Namespace, header: Header, card: Card | None, reporter: Any
) -> list[Difference]:
    from quantize import pipeline  # noqa: PLC0415 - imports numpy
    from quantize.rederive import source_differences  # noqa: PLC0415

    overrides, requantize = overrides_of(arguments), arguments.allow_requantize
    if card is not None:
        recipe = card.recipe
        overrides = overrides or Overrides(tuple(recipe.overrides), recipe.output, recipe.embedding)
        requantize = requantize or recipe.allow_requantize
        if recipe.imatrix is not None and arguments.imatrix is None:
            raise UsageError(
                f"{card_path(header.path)}: the file was made with the importance matrix {recipe.imatrix.name}: give "
                "it with --imatrix, under the same name",
                param="imatrix",
            )
    prepared = pipeline.prepare(
        arguments.source.expanduser(),
        arguments.type or _type_of(header, card),
        overrides,
        importance=arguments.imatrix,
        allow_requantize=requantize,
    )
    if prepared.proof is not None:
        prepared.proof.close()  # the file's bytes are asked for, not how llama.cpp reads its vocabulary
        prepared = dataclasses.replace(prepared, proof=None)
    return source_differences(header, prepared, threads=arguments.threads, progress=reporter.progress)


def _type_of(header: Header, card: Card | None) -> str:
    if card is not None:
        return card.type
    for recipe in RECIPES.values():
        if recipe.file_type == header.file_type:
            return recipe.name
    raise UsageError(
        f"{header.path}: its general.file_type is {header.file_type}; say with --type what it is", param="type"
    )
