"""`pestle quantize --auto`: tries several types in one read of the source, and keeps the best one's file."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from app.errors import InterruptedByUserError, StorageError, UsageError
from quantize.card import remove_card, write_card
from quantize.card_embedding import embed_card
from quantize.carded import Finished, Measurement, file_is_whole, run_with_cards
from quantize.choice import Candidate, Limits, choose
from quantize.measuring import NotMeasuredError
from quantize.pipeline import check_target
from quantize.prepared import Prepared
from quantize.reporting import Reporter
from quantize.writer import sync_folder

_SUFFIX = ".pestle-auto"


def run_auto(
    prepared: Prepared,
    outs: Sequence[Path],
    limits: Limits,
    measurement: Measurement,
    reporter: Reporter,
    *,
    threads: int | None = None,
    embed: bool = False,
) -> None:
    """Make and measure the files that `prepared` plans, and publish the one that the limits choose.

    `outs` are the paths that they would have. Raises what a run raises, and `UsageError` when nothing keeps the limits.
    """
    prepared, outs = _small_enough(prepared, [out.absolute() for out in outs], limits)
    names = [output.recipe.name for output in prepared.outputs]
    for out in outs:
        check_target(out, prepared)
    with CandidateFolder(outs[0].parent) as folder:
        places = [folder.place(name, out.name) for name, out in zip(names, outs, strict=False)]
        try:
            finished = run_with_cards(prepared, places, measurement, _OnlyProgress(reporter), threads=threads)
        except InterruptedByUserError:
            raise KeyboardInterrupt from None  # what is whole goes away with the folder
        candidates = [_candidate(each) for each in finished]
        try:
            chosen, why = choose(candidates, limits)
        except UsageError as error:
            reporter.choice(candidates, None, error.message)
            raise
        reporter.choice(candidates, chosen, why)
        place = candidates.index(chosen)
        result = dataclasses.replace(finished[place].result, path=outs[place])
        best = Finished(result, finished[place].card)
        _publish(places[place], best)
    reporter.done(result)
    with file_is_whole(result.path):
        (embed_card if embed else write_card)(best.card, result.path)
    reporter.card(result.path, best.card, embedded=embed)


def _small_enough(prepared: Prepared, outs: Sequence[Path], limits: Limits) -> tuple[Prepared, list[Path]]:
    """Leave out what is too large: sizes are known before any weight is read."""
    reference = prepared.outputs[len(outs) :]
    tried = list(zip(prepared.outputs, outs, strict=False))
    small = [pair for pair in tried if limits.bytes is None or pair[0].plan.file_size <= limits.bytes]
    if not small:
        least = min((output for output, _ in tried), key=lambda output: output.plan.file_size)
        raise UsageError(
            f"--max-bytes: no type makes a file of {limits.bytes} bytes or less; {least.recipe.name} comes nearest "
            f"with {least.plan.file_size}",
            param="max-bytes",
        )
    outputs = (*(output for output, _ in small), *reference)
    return dataclasses.replace(prepared, outputs=outputs), [out for _, out in small]


def _candidate(each: Finished) -> Candidate:
    quality = each.card.quality
    if quality is None:
        raise NotMeasuredError("nothing was measured, so that no type can be chosen; name one with --type")
    return Candidate(each.card.type, each.card.file.bytes, quality.kld_mean, quality.decode_speed)


def _publish(place: Path, best: Finished) -> None:
    out = best.result.path
    remove_card(out)
    try:
        place.replace(out)
        sync_folder(out.parent)
    except OSError as error:
        raise StorageError(f"{out}: cannot be written: {error.strerror or error}") from error


class CandidateFolder:
    """A context manager: a hidden folder beside the file to come, where candidates lie while they are compared."""

    def __init__(self, parent: Path) -> None:
        self._parent = parent
        self._path = parent / f".{secrets.token_hex(8)}{_SUFFIX}"
        self._lock = -1

    def __enter__(self) -> Self:
        """Make it, and take away those of killed runs. Raises `StorageError`."""
        try:
            for left in self._parent.glob(f".*{_SUFFIX}"):
                self._remove_if_unused(left)
            self._path.mkdir()
            self._lock = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        except OSError as error:
            raise StorageError(f"{self._parent}: cannot be written to: {error.strerror or error}") from error
        return self

    def place(self, type_name: str, name: str) -> Path:
        """Return where a candidate goes, under its own name."""
        folder = self._path / type_name
        folder.mkdir()
        return folder / name

    def __exit__(self, *_: object) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self._path, ignore_errors=True)
        os.close(self._lock)

    @staticmethod
    def _remove_if_unused(path: Path) -> None:
        with contextlib.suppress(OSError):
            lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its process lives
                shutil.rmtree(path)
            finally:
                os.close(lock)


class _OnlyProgress:
    """A reporter that says nothing of files that will not stay."""

    def __init__(self, reporter: Reporter) -> None:
        self.progress, self.notes, self.warning = reporter.progress, reporter.notes, reporter.warning
        self.plan, self.error, self.choice = reporter.plan, reporter.error, reporter.choice

    def done(self, *_: Any) -> None:
        """Say nothing."""

    def verified(self, *_: Any) -> None:
        """Say nothing."""

    def card(self, *_: Any, **__: Any) -> None:
        """Say nothing."""
