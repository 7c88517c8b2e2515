"""Tells people and programs how a run goes: a bar on a terminal, lines elsewhere, JSON lines for scripts."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

import msgspec

from app.errors import PestleError
from app.models.card import Card, Quality, card_path
from quantize.choice import Candidate
from quantize.pipeline import Result
from quantize.prepared import Output
from quantize.verdict import Verdict

FORMATS = ("human", "json", "quiet")

_BAR_SECONDS = 0.1
_LINE_SECONDS = 5.0
_JSON_SECONDS = 0.5
_BAR_CELLS = 24
_MOST_LETTERS = 4000


class Reporter(Protocol):
    """Is told everything that happens in a run."""

    def progress(self, done: int, total: int) -> None:
        """Hear how many bytes of the source are done."""

    def notes(self, lines: Sequence[str]) -> None:
        """Hear what people should know before the work begins."""

    def plan(self, output: Output, out: Path) -> None:
        """Hear what file would be made."""

    def done(self, result: Result) -> None:
        """Hear that the file is there."""

    def card(self, path: Path, card: Card, *, embedded: bool) -> None:
        """Hear what is known of a file that is there."""

    def choice(self, candidates: Sequence[Candidate], chosen: Candidate | None, why: str) -> None:
        """Hear which of several types was chosen, if any was."""

    def warning(self, message: str) -> None:
        """Hear what went wrong without harm to the files."""

    def verified(self, verdict: Verdict) -> None:
        """Hear what was found of a file that was there already."""

    def error(self, error: PestleError) -> None:
        """Hear why the run failed."""


def open_reporter(name: str) -> Reporter:
    """Return the reporter of a format."""
    if name == "json":
        return JsonReporter(sys.stdout)
    return HumanReporter(sys.stdout, sys.stderr, quiet=name == "quiet")


def size(count: float) -> str:
    """Return bytes as people read them: `1.24 GB`."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def quality_line(quality: Quality) -> str:
    """Return in one line what a file costs and how fast it is."""
    return (
        f"KLD {quality.kld_mean:.4f} ± {quality.kld_error:.4f}, same top {quality.same_top:.1%}, perplexity "
        f"{quality.perplexity:.2f} ({quality.reference_perplexity:.2f} before), {quality.prompt_speed:.0f} t/s in, "
        f"{quality.decode_speed:.1f} out"
    )


def _printable(text: str) -> str:
    """Escape what moves a terminal's cursor or cannot be written: names in files may hold anything."""
    return "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in _cut(text))


def _cut(text: str) -> str:
    """Leave out the middle of a message in which a file speaks for too long."""
    if len(text) <= _MOST_LETTERS:
        return text
    return f"{text[: _MOST_LETTERS // 2]} [… {len(text) - _MOST_LETTERS} letters …] {text[-_MOST_LETTERS // 2 :]}"


class _Pace:
    """Says when it is time for the next report, and how fast the run goes."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._began = time.monotonic()
        self._next = self._began + seconds

    def due(self, *, last: bool) -> bool:
        now = time.monotonic()
        if now < self._next and not last:
            return False
        self._next = now + self._seconds
        return True

    def rate(self, done: int) -> float:
        return done / max(time.monotonic() - self._began, 1e-6)


class HumanReporter:
    """Writes results to `out` and everything else to `err`."""

    def __init__(self, out: TextIO, err: TextIO, *, quiet: bool = False) -> None:
        self._out, self._err, self._quiet = out, err, quiet
        self._terminal = err.isatty()
        self._pace: _Pace | None = None
        self._drawn = False

    def progress(self, done: int, total: int) -> None:
        """Draw the bar again, or write a line now and then."""
        if self._quiet:
            return
        if self._pace is None:
            self._pace = _Pace(_BAR_SECONDS if self._terminal else _LINE_SECONDS)
        if not self._pace.due(last=done == total and self._terminal):
            return
        rate = self._pace.rate(done)
        left = (total - done) / rate if rate else 0
        text = f"{done / max(total, 1):4.0%}  {size(done)} of {size(total)}  {size(rate)}/s  {left:.0f} s left"
        if self._terminal:
            cells = _BAR_CELLS * done // max(total, 1)
            self._err.write(f"\r\x1b[K{'█' * cells}{'░' * (_BAR_CELLS - cells)} {text}")
            self._drawn = True
        else:
            self._err.write(text.strip() + "\n")
        self._err.flush()

    def notes(self, lines: Sequence[str]) -> None:
        """Print them, a line each."""
        if not self._quiet:
            for line in lines:
                print(f"note: {_printable(line)}", file=self._err)

    def plan(self, output: Output, out: Path) -> None:
        """Print the table of types and the exact size."""
        plan = output.plan
        print(f"{'type':<8}{'tensors':>8}{'weights':>16}{'bytes':>16}", file=self._out)
        for name, (tensors, weights, nbytes) in plan.by_type().items():
            print(f"{name:<8}{tensors:>8}{weights:>16,}{nbytes:>16,}", file=self._out)
        print(f"{out}: {plan.file_size:,} bytes ({size(plan.file_size)}); nothing was written", file=self._out)

    def done(self, result: Result) -> None:
        """Print where the file is."""
        self._end_bar()
        if not self._quiet:
            bits = 8 * result.file_size / result.weights
            taken = "" if result.resumed_bytes is None else f", {size(result.resumed_bytes)} of it from the run before"
            print(
                f"{result.path}: {result.type_name.upper()}, {size(result.file_size)} of {size(result.source_bytes)}, "
                f"{bits:.2f} bits a weight, in {result.seconds:.1f} s{taken}",
                file=self._out,
            )

    def card(self, path: Path, card: Card, *, embedded: bool) -> None:  # noqa: ARG002 - where it is, is known
        """Print what it costs, if that was measured."""
        if card.quality is not None and not self._quiet:
            print(f"{path.name}: {quality_line(card.quality)}", file=self._out)

    def choice(self, candidates: Sequence[Candidate], chosen: Candidate | None, why: str) -> None:
        """Print the table."""
        self._end_bar()
        if self._quiet:
            return
        print(f"{'type':<8}{'MB':>10}{'KLD':>10}{'answer t/s':>12}", file=self._out)
        for one in candidates:
            mark = f"  <- {why}" if one == chosen else ""
            numbers = f"{one.bytes / 1e6:>10.1f}{one.kld:>10.4f}{one.decode_speed:>12.1f}"
            print(f"{one.type_name:<8}{numbers}{mark}", file=self._out)

    def warning(self, message: str) -> None:
        """Print it, also when quiet."""
        self._end_bar()
        print(f"warning: {message}", file=self._err)

    def verified(self, verdict: Verdict) -> None:
        """Print every difference, also when quiet, or what was compared."""
        self._end_bar()
        for difference in verdict.differences:
            print(f"{verdict.path}: damaged, says the {difference.judge}: {difference.message}", file=self._err)
        if self._quiet or verdict.differences:
            return
        if not verdict.content_judged:
            said = "well-formed, but nothing says what its weights should be: it has no card, and no SOURCE was given"
        elif "source" in verdict.judges:
            said = "whole: byte for byte what the source gives" + (", and its card's" * ("card" in verdict.judges))
        else:
            said = "whole: every byte is that of its card"
        print(f"{verdict.path}: {said}", file=self._out)

    def error(self, error: PestleError) -> None:
        """Print what was wrong, also when quiet."""
        self._end_bar()
        print(f"error: {_printable(error.message)}", file=self._err)

    def _end_bar(self) -> None:
        if self._drawn:
            self._err.write("\r\x1b[K")
            self._drawn = False


class JsonReporter:
    """Writes JSON objects, a line each: `note`, `plan`, `progress`, `warning`, `choice`, `done`, `card`, `error`."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._pace = _Pace(_JSON_SECONDS)

    def progress(self, done: int, total: int) -> None:
        """Write a line twice a second, and at the end."""
        if self._pace.due(last=done == total):
            self._write("progress", done=done, total=total, bytes_per_second=round(self._pace.rate(done)))

    def notes(self, lines: Sequence[str]) -> None:
        """Write a line for each."""
        for line in lines:
            self._write("note", message=line)

    def plan(self, output: Output, out: Path) -> None:
        """Write every tensor's type and size, and the file's."""
        tensors = [
            {"name": tensor.spec.name, "type": tensor.type_name, "shape": tensor.spec.shape, "bytes": tensor.nbytes}
            for tensor in output.plan.tensors
        ]
        self._write("plan", path=str(out), type=output.recipe.name, bytes=output.plan.file_size, tensors=tensors)

    def done(self, result: Result) -> None:
        """Write where the file is, its size and the time it took."""
        self._write(
            "done",
            path=str(result.path),
            type=result.type_name,
            bytes=result.file_size,
            source_bytes=result.source_bytes,
            weights=result.weights,
            seconds=round(result.seconds, 3),
            resumed_bytes=result.resumed_bytes,
        )

    def verified(self, verdict: Verdict) -> None:
        """Write what was compared and every difference."""
        self._write(
            "verified",
            path=str(verdict.path),
            bytes=verdict.file_size,
            sha256=verdict.sha256,
            ok=not verdict.differences,
            content_judged=verdict.content_judged,
            judges=verdict.judges,
            differences=[dataclasses.asdict(difference) for difference in verdict.differences],
        )

    def card(self, path: Path, card: Card, *, embedded: bool) -> None:
        """Write the card's place, the digest of the file (without a card in it), and its quality."""
        where = str(path if embedded else card_path(path))
        self._write("card", path=str(path), card=where, sha256=card.file.sha256, quality=card.quality)

    def choice(self, candidates: Sequence[Candidate], chosen: Candidate | None, why: str) -> None:
        """Write all candidates, and which it is."""
        self._write("choice", type=chosen and chosen.type_name, reason=why, candidates=candidates)

    def warning(self, message: str) -> None:
        """Write the message."""
        self._write("warning", message=message)

    def error(self, error: PestleError) -> None:
        """Write what was wrong and the exit code."""
        self._write("error", kind=type(error).__name__, message=_cut(error.message), exit_code=error.exit_code)

    def _write(self, event: str, **fields: Any) -> None:
        # not msgspec's encoder: file names that are not UTF-8 come back from escapes, and never end in an error
        content = msgspec.to_builtins({"event": event, **fields})
        print(json.dumps(content, separators=(",", ":")), file=self._out, flush=True)
