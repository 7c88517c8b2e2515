"""A run with everything around it: the files, a card beside each, and what they cost measured, if that is wanted."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from app.errors import InterruptedByUserError, StorageError
from app.models.card import Card
from quantize.card import write_card
from quantize.card_embedding import embed_card
from quantize.card_making import SourceFile, describe_source, make_card, source_files
from quantize.checkpoint import StoredTensor
from quantize.encoding import available_cpus
from quantize.measuring import (
    SMALL_SOURCE_BYTES,
    NotMeasuredError,
    Subjects,
    TemporaryReference,
    judge,
    lack_of_room,
    reference_type,
)
from quantize.pipeline import Result, run_all
from quantize.prepared import Prepared
from quantize.reporting import Reporter
from quantize.tensors import TensorSpec
from quantize.text_file import open_text


class Measurement:
    """Whether a run is measured, and over which text.

    `wanted` is the user's word; without one, sources with few bytes of weights are measured.
    """

    def __init__(self, wanted: bool | None, text: Path | None = None, chunks: int | None = None) -> None:
        """Read the text. Raises `UsageError` or `StorageError`."""
        self.text_path, self.chunks = text, chunks
        self.text = open_text(text)
        self.wanted = wanted
        self.notes: list[str] = []

    def reference(self, specs: Sequence[TensorSpec], tensors: Mapping[str, StoredTensor]) -> str | None:
        """Return the type of the file to judge the others against, None if nothing is measured.

        Raises `StorageError` if there is no room for it and the user has asked to measure.
        """
        sources = {part.source: tensors[part.source].nbytes for spec in specs for part in spec.parts}
        if not self.wants(sum(sources.values())):
            return None
        name = reference_type(specs, tensors)
        if complaint := lack_of_room(specs, name):
            if self.wanted:
                raise StorageError(complaint)
            self.notes.append(f"not measured: {complaint}")
            self.wanted = False
            return None
        return name

    def wants(self, source_bytes: int) -> bool:
        """Tell whether to measure a source with so many bytes of weights."""
        return source_bytes <= SMALL_SOURCE_BYTES if self.wanted is None else self.wanted


@dataclasses.dataclass(frozen=True, slots=True)
class Finished:
    """A file that is there, and its card."""

    result: Result
    card: Card


def run_with_cards(
    prepared: Prepared,
    outs: Sequence[Path],
    measurement: Measurement,
    reporter: Reporter,
    *,
    threads: int | None = None,
    embed: bool = False,
    resume: bool = False,
) -> list[Finished]:
    """Make the files and their cards; `prepared` may plan one more file, the reference, after theirs.

    The cards are there before anything is measured, and are written again with what was found. What goes wrong in
    measuring is told and harms nothing. `embed` moves each card into its file at the end. Raises what `run_all` raises,
    and `StorageError` for a card that cannot be written: its file is whole then.
    """
    measured = measurement.wants(prepared.source_bytes)
    files = source_files(prepared)
    with contextlib.ExitStack() as stack:
        temporary = None
        if len(prepared.outputs) > len(outs):
            temporary = stack.enter_context(TemporaryReference())
            reporter.notes([f"measured against {temporary.path}, which goes away at the end"])
        targets = [*outs, temporary.path] if temporary else outs
        results = run_all(
            prepared,
            targets,
            threads=threads,
            progress=reporter.progress,
            proven=reporter.notes,
            with_losses=measured,
            resume=resume,
        )
        reporter.notes(prepared.kernel_notes())
        finished = _with_cards(prepared, results[: len(outs)], files, hashed=measured)
        with _files_stay(each.result.path for each in finished):
            for each in finished:
                reporter.done(each.result)
            if measured:
                finished = _judged(prepared, finished, temporary, measurement, reporter, threads or available_cpus())
    for each in finished:
        if embed:
            with file_is_whole(each.result.path):
                embed_card(each.card, each.result.path)
        reporter.card(each.result.path, each.card, embedded=embed)
    return finished


def _with_cards(
    prepared: Prepared, results: Sequence[Result], files: Sequence[SourceFile], *, hashed: bool
) -> list[Finished]:
    source = describe_source(prepared, files, hashed=hashed)
    finished = []
    for output, result in zip(prepared.outputs, results, strict=False):
        card = make_card(prepared, output, result, source)
        with file_is_whole(result.path):
            write_card(card, result.path)
        finished.append(Finished(result, card))
    return finished


def _judged(
    prepared: Prepared,
    finished: Sequence[Finished],
    temporary: TemporaryReference | None,
    measurement: Measurement,
    reporter: Reporter,
    threads: int,
) -> list[Finished]:
    paths = [each.result.path for each in finished]
    try:
        subjects = _subjects(prepared, paths, temporary)
        qualities = judge(subjects, measurement.text, measurement.text_path, threads=threads, chunks=measurement.chunks)
    except NotMeasuredError as error:
        reporter.warning(f"the quality was not measured: {error.message}")
        return list(finished)
    judged = []
    for each, quality in zip(finished, qualities, strict=True):
        card = msgspec.structs.replace(each.card, quality=quality)
        with file_is_whole(each.result.path):
            write_card(card, each.result.path)
        judged.append(Finished(each.result, card))
    return judged


def _subjects(prepared: Prepared, paths: Sequence[Path], temporary: TemporaryReference | None) -> Subjects:
    if prepared.source.kind == "gguf":
        path = prepared.checkpoint.shards[0]
        return Subjects(path, f"the source itself, {path.name}", paths)
    if temporary is not None:
        path, passed = temporary.hide()
        return Subjects(path, f"the source's weights in {prepared.outputs[-1].recipe.name}", paths, passed)
    place, output = next(
        (place, output) for place, output in enumerate(prepared.outputs) if not output.recipe.quantized
    )
    return Subjects(paths[place], f"the source's weights in {output.recipe.name}", paths)


@contextlib.contextmanager
def _files_stay(paths: Iterable[Path]) -> Iterator[None]:
    """Say of an interrupt that comes now what there is nevertheless."""
    names = ", ".join(map(str, paths))
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedByUserError(f"interrupted while measuring; {names}: whole, the card without quality") from None


@contextlib.contextmanager
def file_is_whole(path: Path) -> Iterator[None]:
    """Say of a card's `StorageError` that its file is there nevertheless."""
    try:
        yield
    except StorageError as error:
        raise StorageError(f"{path} is whole; its card is not as it should be: {error.message}") from error
