"""The command `pestle quantize`, also `python -P -m quantize`."""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.errors import InterruptedByUserError, PestleError, StorageError, UsageError
from quantize import proof_memory
from quantize.choice import CANDIDATES, GOOD_KLD, Limits, parse_size
from quantize.proof_process import ProofProcess
from quantize.recipe import RECIPES, Overrides, Recipe, find, override, tensor_type
from quantize.workplace import Workplace, sweep

_GC_THRESHOLD = 100_000  # vocabularies are many objects without cycles: looking for some takes a part of a short run
_FIRST_PART = re.compile(r"-00001-of-\d{5}$")
FORMATS = ("human", "json", "quiet")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to a parser."""
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="folder with config.json and safetensors, org/name[@revision] on the Hub, or a GGUF",
    )
    types = parser.add_mutually_exclusive_group(required=True)
    types.add_argument(
        "--type", metavar="T[,T...]",
        help=f"one or several of {', '.join(RECIPES)}; several are made in one read of the source",
    )  # fmt: skip
    types.add_argument(
        "--auto", action="store_true",
        help=f"try {', '.join(CANDIDATES)}, measure them here, and keep the best one: the fastest with a KLD of "
        f"{GOOD_KLD} or less, or what --max-kld and --max-bytes say",
    )  # fmt: skip
    parser.add_argument(
        "--max-kld", type=float, metavar="X", help="with --auto: the smallest file with this KLD or less"
    )
    parser.add_argument("--max-bytes", metavar="Y", help="with --auto: the least KLD with this size or less (4.5GB)")
    add_recipe_arguments(parser)
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: <folder>-<TYPE>.gguf, here; for several types a folder"
    )
    parser.add_argument(
        "--resume", action="store_true",
        help="go on where a run of the same command was killed, and keep what is done when this one is interrupted",
    )  # fmt: skip
    parser.add_argument(
        "--no-cache", action="store_true", help="stream a model on the Hub shard by shard: the disk holds one at a time"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="default: all processors")
    measure = parser.add_argument_group("the card, FILE.card.json, which says what the file is and costs")
    measure.add_argument(
        "--measure", action=argparse.BooleanOptionalAction,
        help="find each tensor's error, divergence and perplexity over a text, and speed; the default for sources with "
        "at most 1 GB of weights",
    )  # fmt: skip
    measure.add_argument("--text", type=Path, metavar="FILE", help="text to measure over (default: one that we bring)")
    measure.add_argument("--chunks", type=int, metavar="N", help="chunks of 512 tokens to measure over (default: all)")
    measure.add_argument("--embed-card", action="store_true", help="write the card into the file, not beside it")
    parser.add_argument("--dry-run", action="store_true", help="print every type and the exact size; write nothing")
    parser.add_argument("--format", choices=FORMATS, default="human", help="json: one object a line, for scripts")


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that change what a type makes of a model."""
    parser.add_argument(
        "--tensor-type", action="append", default=[], metavar="PATTERN=T",
        help="type of the tensors whose names have this in them (a regular expression, as in llama-quantize), such as "
        "ffn_down=q6_k; may be given again, and the first that fits counts",
    )  # fmt: skip
    parser.add_argument("--imatrix", metavar="FILE", help="importance matrix of llama-imatrix, which says what matters")
    parser.add_argument("--output-tensor-type", metavar="T", help="type of the output matrix")
    parser.add_argument("--token-embedding-type", metavar="T", help="type of the token embeddings")
    parser.add_argument("--allow-requantize", action="store_true", help="take a GGUF that is quantized already")


def run(arguments: argparse.Namespace) -> int:
    """Quantize as the arguments say; errors are reported, and their exit code returned."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # for numpy: no matrices are multiplied here
    gc.set_threshold(_GC_THRESHOLD)
    with _proof_process(arguments.source.expanduser()) as process:
        return _reported(arguments, process)


def _reported(arguments: argparse.Namespace, process: ProofProcess | None) -> int:
    from quantize.reporting import open_reporter  # noqa: PLC0415 - keeps numpy out of `pestle --help`

    reporter = open_reporter(arguments.format)
    try:
        with ended_by_signals():
            _run(arguments, reporter, process)
    except PestleError as error:
        return told(reporter, error)
    except KeyboardInterrupt:
        kept = "what is done is kept: run the same command again to go on"
        return told(
            reporter,
            InterruptedByUserError(f"interrupted; {kept if arguments.resume else 'nothing was left behind'}"),
        )
    except BrokenPipeError:
        return StorageError.exit_code  # nobody is left to be told
    except OSError as error:
        return told(reporter, StorageError(f"{error.filename or arguments.source}: {error.strerror or error}"))
    return 0


def told(reporter: Any, error: PestleError) -> int:
    """Report an error, if the disk or the pipe takes it, and return its exit code."""
    with contextlib.suppress(OSError):
        reporter.error(error)
    return int(error.exit_code)


def _run(arguments: argparse.Namespace, reporter: Any, process: ProofProcess | None) -> None:
    from quantize import auto, carded, pipeline  # noqa: PLC0415 - keeps numpy out of `pestle --help`

    limits, card = _limits(arguments), {"threads": arguments.threads, "embed": arguments.embed_card}
    chosen = [find(name.strip()) for name in (arguments.type.split(",") if arguments.type else CANDIDATES)]
    source = arguments.source.expanduser()
    _check(arguments)
    measurement = carded.Measurement(_is_measured(arguments), arguments.text, arguments.chunks)
    name = _FIRST_PART.sub("", source.stem) if source.suffix == ".gguf" else source.absolute().name
    folder, outs = _targets(arguments.out, name, chosen, one_stays=arguments.auto)
    sweep(outs[0])
    with contextlib.ExitStack() as stack:
        workplace = stack.enter_context(Workplace(outs[0])).folder if arguments.no_cache else None
        prepared = pipeline.prepare(
            source,
            [recipe.name for recipe in chosen],
            overrides_of(arguments),
            allow_requantize=arguments.allow_requantize,
            importance=arguments.imatrix,
            proof_process=process,
            reference=None if arguments.dry_run else measurement.reference,
            workplace=workplace,
        )
        stack.callback(prepared.close)
        reporter.notes([*prepared.notes, *measurement.notes])
        if arguments.dry_run:
            reporter.notes(prepared.prove())
            for output, out in zip(prepared.outputs, outs, strict=True):
                reporter.plan(output, out)
            return
        stack.enter_context(_made(folder))
        if limits is None:
            carded.run_with_cards(prepared, outs, measurement, reporter, resume=arguments.resume, **card)
        else:
            auto.run_auto(prepared, outs, limits, measurement, reporter, **card)


def _check(arguments: argparse.Namespace) -> None:
    """Raise `UsageError` for arguments that make no sense, or none together."""
    for flag in ("threads", "chunks"):
        if (value := getattr(arguments, flag)) is not None and value < 1:
            raise UsageError(f"--{flag} is {value}; at least 1 is needed", param=flag)
    measured = arguments.auto or arguments.measure
    if arguments.no_cache and measured:
        raise UsageError("--no-cache keeps no weights that could be measured against; leave it out", param="no-cache")
    if arguments.resume and measured:
        raise UsageError(
            "--resume goes on with files whose beginning cannot be measured any more; leave it out, or use "
            "pestle compare afterwards",
            param="resume",
        )
    if arguments.resume and arguments.no_cache:
        raise UsageError("--no-cache keeps nothing that --resume could go on with; leave one out", param="resume")


def _is_measured(arguments: argparse.Namespace) -> bool | None:
    """Return whether the quality is measured; None leaves it to the size of the source."""
    return False if arguments.no_cache or arguments.resume else arguments.auto or arguments.measure


def _proof_process(source: Path) -> contextlib.AbstractContextManager[ProofProcess | None]:
    """Start the process that will prove the tokenizer, so that its imports run beside ours."""
    if source.suffix == ".gguf" or (source.is_dir() and proof_memory.is_familiar(source)):
        return contextlib.nullcontext()
    try:
        return ProofProcess()
    except OSError:
        return contextlib.nullcontext()  # it is tried once more, and told, when it is needed


def _limits(arguments: argparse.Namespace) -> Limits | None:
    """Return what `--auto` is to keep, None without it."""
    if not arguments.auto:
        for flag in ("max-kld", "max-bytes"):
            if getattr(arguments, flag.replace("-", "_")) is not None:
                raise UsageError(f"--{flag} is for --auto, which chooses the type", param=flag)
        return None
    if arguments.measure is False:
        raise UsageError("--auto chooses by what it measures; take --no-measure away", param="measure")
    if arguments.max_kld is not None and not arguments.max_kld >= 0:
        raise UsageError(f"--max-kld is {arguments.max_kld}; a number of nats from 0 on is needed", param="max-kld")
    return Limits(arguments.max_kld, parse_size(arguments.max_bytes) if arguments.max_bytes else None)


def _targets(out: Path | None, name: str, chosen: list[Recipe], *, one_stays: bool) -> tuple[Path | None, list[Path]]:
    """Return the folder that is to be there, if one was given, and the file of each type."""
    names = [Path(f"{name}-{recipe.label}.gguf") for recipe in chosen]
    if out is None:
        return None, names
    out = out.expanduser()
    if len(chosen) == 1 or one_stays:
        return None, [out] * len(chosen)
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
                with contextlib.suppress(FileExistsError):  # another run makes the same
                    path.mkdir()
                    made.append(path)
        yield
    except BaseException:
        for path in reversed(made):
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def overrides_of(arguments: argparse.Namespace) -> Overrides:
    """Return what the arguments decide about single tensors. Raises `UsageError`."""
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
