"""The command `pestle quantize`, also `python -P -m quantize`."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.errors import InterruptedByUserError, PestleError, StorageError, UsageError
from quantize.recipe import RECIPES, Overrides, Recipe, find, override, tensor_type

FORMATS = ("human", "json", "quiet")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to a parser."""
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="folder with config.json and safetensors, or a GGUF"
    )
    parser.add_argument(
        "--type", required=True, metavar="T[,T...]",
        help=f"one or several of {', '.join(RECIPES)}; several are made in one read of the source",
    )  # fmt: skip
    parser.add_argument(
        "--tensor-type", action="append", default=[], metavar="PATTERN=T",
        help="type of the tensors whose names have this in them (a regular expression, as in llama-quantize), such as "
        "ffn_down=q6_k; may be given again, and the first that fits counts",
    )  # fmt: skip
    parser.add_argument("--imatrix", metavar="FILE", help="importance matrix of llama-imatrix, which says what matters")
    parser.add_argument("--output-tensor-type", metavar="T", help="type of the output matrix")
    parser.add_argument("--token-embedding-type", metavar="T", help="type of the token embeddings")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: <folder>-<TYPE>.gguf, here; for several types a folder"
    )
    parser.add_argument("--allow-requantize", action="store_true", help="take a GGUF that is quantized already")
    parser.add_argument("--threads", type=int, metavar="N", help="default: all processors")
    parser.add_argument("--dry-run", action="store_true", help="print every type and the exact size; write nothing")
    parser.add_argument("--format", choices=FORMATS, default="human", help="json: one object a line, for scripts")


def run(arguments: argparse.Namespace) -> int:
    """Quantize as the arguments say; errors are reported, and their exit code returned."""
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
    except OSError as error:
        failure = StorageError(f"{error.filename or arguments.source}: {error.strerror or error}")
        reporter.error(failure)
        return failure.exit_code
    return 0


def _run(arguments: argparse.Namespace, reporter: Any) -> None:
    from quantize import pipeline  # noqa: PLC0415 - keeps numpy out of `pestle --help`

    chosen = [find(name.strip()) for name in arguments.type.split(",")]
    source = arguments.source.expanduser()
    if arguments.threads is not None and arguments.threads < 1:
        raise UsageError(f"--threads is {arguments.threads}; at least 1 is needed", param="threads")
    name = source.stem if source.suffix == ".gguf" else source.absolute().name
    folder, outs = _targets(arguments.out, name, chosen)
    prepared = pipeline.prepare(
        source,
        [recipe.name for recipe in chosen],
        _overrides(arguments),
        allow_requantize=arguments.allow_requantize,
        importance=arguments.imatrix,
    )
    reporter.notes(prepared.notes)
    if arguments.dry_run:
        reporter.notes(prepared.prove())
        for output, out in zip(prepared.outputs, outs, strict=True):
            reporter.plan(output, out)
        return
    with _made(folder):
        results = pipeline.run_all(prepared, outs, threads=arguments.threads, progress=reporter.progress)
    reporter.notes(prepared.prove())
    for result in results:
        reporter.done(result)


def _targets(out: Path | None, name: str, chosen: list[Recipe]) -> tuple[Path | None, list[Path]]:
    """Return the folder that is to be there, if one was given, and each type's file."""
    names = [Path(f"{name}-{recipe.label}.gguf") for recipe in chosen]
    if out is None:
        return None, names
    out = out.expanduser()
    if len(chosen) == 1:
        return None, [out]
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file; for several types, --out names a folder", param="out")
    return out, [out / name for name in names]


@contextlib.contextmanager
def _made(folder: Path | None) -> Iterator[None]:
    """Make a folder, and take it away again if nothing came into it because of an error."""
    made: list[Path] = []
    try:
        if folder is not None:
            missing = [path for path in (folder.absolute(), *folder.absolute().parents) if not path.exists()]
            for path in reversed(missing):
                path.mkdir()
                made.append(path)
        yield
    except BaseException:
        for path in reversed(made):
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _overrides(arguments: argparse.Namespace) -> Overrides:
    output, embedding = arguments.output_tensor_type, arguments.token_embedding_type
    return Overrides(
        tuple(override(text) for text in arguments.tensor_type),
        tensor_type(output, "output-tensor-type") if output else None,
        tensor_type(embedding, "token-embedding-type") if embedding else None,
    )


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Make SIGTERM and SIGHUP end the block as Ctrl-C does: by KeyboardInterrupt, so that it can clean up."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def end(_number: int, _frame: Any) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)  # the clean-up that begins now is not to be interrupted again
        raise KeyboardInterrupt

    try:
        previous = {number: signal.signal(number, end) for number in numbers}
    except ValueError:  # not the main thread: the signals are someone else's
        yield
        return
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def main(argv: list[str] | None = None) -> int:
    """Run the command with these arguments, or the process's own. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="quantize", description="Turn safetensors into a quantized GGUF, in one pass."
    )
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
