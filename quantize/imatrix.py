"""Measures an importance matrix over a text: `python -P -m quantize.imatrix`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.errors import InterruptedByUserError, PestleError, StorageError, UsageError
from quantize.cli import FORMATS, ended_by_signals
from quantize.text_file import CALIBRATION_TEXT, open_text

if TYPE_CHECKING:
    from quantize.calibration import Calibration, Progress

FLAGS = ("text", "chunks", "threads", "format")


def add_arguments(parser: argparse.ArgumentParser, *, model: str = "a GGUF") -> None:
    """Add the command's arguments to a parser; `model` says what can be given as one."""
    parser.add_argument("model", metavar="MODEL", help=model)
    parser.add_argument("--text", type=Path, metavar="FILE", help="text to run over (default: the one that we bring)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: <model>.imatrix.gguf, here")
    parser.add_argument("--chunks", type=int, metavar="N", help="chunks of 512 tokens to use (default: all)")
    parser.add_argument("--threads", type=int, metavar="N", help="default: all processors")
    parser.add_argument("--process-output", action="store_true", help="take in output.weight, as llama-imatrix does so")
    parser.add_argument("--format", choices=FORMATS, default="human", help="json: one object a line, for scripts")


def run(arguments: argparse.Namespace) -> int:
    """Measure, and write the file; errors are reported, and their exit code returned."""
    from quantize.reporting import open_reporter  # noqa: PLC0415 - keeps numpy out of `pestle --help`

    reporter = open_reporter(arguments.format)
    try:
        with ended_by_signals():
            _run(arguments, reporter)
    except PestleError as error:
        reporter.error(error)
        return int(error.exit_code)
    except KeyboardInterrupt:
        interrupted = InterruptedByUserError("interrupted; nothing was left behind")
        reporter.error(interrupted)
        return interrupted.exit_code
    except BrokenPipeError:
        return StorageError.exit_code  # nobody is left to be told
    return 0


def _run(arguments: argparse.Namespace, reporter: Any) -> None:
    from quantize.calibration import calibrate  # noqa: PLC0415 - keeps numpy out of `pestle --help`
    from quantize.encoding import available_cpus  # noqa: PLC0415
    from quantize.importance_writer import write_importance  # noqa: PLC0415

    began = time.monotonic()
    model = Path(arguments.model).expanduser()
    out = (arguments.out or Path(f"{model.stem}.imatrix.gguf")).expanduser()
    check(arguments, out)
    if not model.is_file():
        raise UsageError(f"{model}: no such file", param="model")
    text = open_text(arguments.text, CALIBRATION_TEXT)
    text_name = text.name if arguments.text is None else str(arguments.text)
    found = calibrate(
        model, text.content, threads=arguments.threads or available_cpus(), most_chunks=arguments.chunks,
        output=arguments.process_output, progress=_progress(arguments.format),
    )  # fmt: skip
    write_importance(
        out, found.sums.tensors, dataset=text_name, chunks=found.sums.chunks(found.chunk_tokens),
        chunk_tokens=found.chunk_tokens,
    )  # fmt: skip
    reporter.notes(_notes(found))
    _done(arguments.format, found, out, text_name, time.monotonic() - began)


def check(arguments: argparse.Namespace, out: Path) -> None:
    """Tell what cannot end well before any work is done. Raises UsageError or StorageError."""
    from quantize.writer import AtomicFile  # noqa: PLC0415 - only this command needs it

    for name in ("chunks", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} is {value}; at least 1 is needed", param=name)
    open_text(arguments.text, CALIBRATION_TEXT)
    if out.is_dir():
        raise UsageError(f"{out}: a folder; --out names the file to write", param="out")
    inputs = [path for path in (Path(arguments.model).expanduser(), arguments.text) if path is not None]
    if out.exists() and any(path.exists() and out.samefile(path) for path in inputs):
        raise UsageError(f"{out}: is what is to be read; choose another --out", param="out")
    with AtomicFile(out.absolute(), 0):
        pass  # a folder that can't be written to


def _progress(style: str) -> Progress | None:
    """Return what to do after each chunk."""
    began = time.monotonic()

    def show(done: int, total: int, perplexity: float) -> None:
        left = (time.monotonic() - began) / done * (total - done)
        text = f"\r\x1b[K{done} of {total} chunks, perplexity {perplexity:.2f}, {left:.0f} s left"
        print(text, end="" if done < total else "\n", file=sys.stderr, flush=True)

    def write(done: int, total: int, perplexity: float) -> None:
        _write_event("progress", done=done, total=total, perplexity=round(perplexity, 4))

    if style == "json":
        return write
    return show if style == "human" and sys.stderr.isatty() else None


def _notes(found: Calibration) -> list[str]:
    unseen = [entry.unseen for entry in found.sums.tensors.values() if entry.unseen]
    if not unseen:
        return []
    note = (
        f"in {len(unseen)} stacks of experts, up to {max(unseen)} were sent no token, and all their columns will count "
        "alike: a longer or more varied text reaches more of them"
    )
    return [note]


def _done(style: str, found: Calibration, out: Path, text_name: str, seconds: float) -> None:
    if style == "json":
        _write_event(
            "done", path=str(out), text=text_name, tensors=len(found.sums.tensors), chunks=found.chunks,
            chunk_tokens=found.chunk_tokens, perplexity=found.perplexity, perplexity_error=found.perplexity_error,
            seconds=round(seconds, 3),
        )  # fmt: skip
    elif style == "human":
        print(
            f"{out}: {len(found.sums.tensors)} tensors, over {found.chunks} chunks of {found.chunk_tokens} tokens of "
            f"{text_name} (perplexity {found.perplexity:.3f} ± {found.perplexity_error:.3f}), in {seconds:.1f} s"
        )


def _write_event(event: str, **fields: Any) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


def main() -> int:
    """Run the command with the process's own arguments. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="imatrix", description="Measure what matters to a model's weights.")
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
