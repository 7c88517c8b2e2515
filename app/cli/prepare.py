"""From what the user named to a GGUF on disk: quantized once, kept in the cache folder, found again."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from app.cli.module import run_module
from app.errors import BadInputError, PestleError, StorageError, UsageError
from app.models import hub
from quantize import recipe


class QuantizeFailedError(PestleError):
    """The quantizer's process ended with an error that it has shown already."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("the model could not be quantized: see the message above")
        self.exit_code = exit_code


def prepare_model(named: str, quantization: str, cache: Path) -> Path:
    """Return the GGUF to serve: the file itself, or the folder's quantization from the cache, made now if needed.

    Raises UsageError when nothing is there or the type is unknown, BadInputError for what is neither a GGUF nor a
    checkpoint, StorageError for an unusable cache.
    """
    try:
        named.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the model's path {named!r} is not UTF-8: rename it", param="model_path") from error
    label = recipe.find(quantization).label
    path = Path(named).expanduser()
    if path.is_file():
        return path.absolute()
    if path.is_dir():
        folder = path.resolve()
        return _quantized(folder, str(folder), folder.name, label, cache)
    if model := hub.parse(named):
        folder = hub.fetch(model)
        return _quantized(folder, f"{model.repo}@{folder.name}", model.name, label, cache)
    raise UsageError(
        f"no model at {named!r}: give a GGUF file, a folder of safetensors or org/name[@revision] on the Hub",
        param="model_path",
    )


def _quantized(folder: Path, source: str, name: str, label: str, cache: Path) -> Path:
    target = cache / "models" / _fingerprint(folder, name) / f"{name}-{label}.gguf"
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_suffix(".lock")):
            if not target.is_file():
                print(
                    f"Quantizing {source} to {label.lower()} (once; kept in {target.parent})",
                    file=sys.stderr,
                    flush=True,
                )
                run_quantizer(source, label.lower(), target)
    except OSError as error:
        raise StorageError(
            f"cannot keep the quantized model in {error.filename or cache}: {error.strerror}; "
            "set LLM_CACHE_DIR to a folder that can be written"
        ) from error
    return target


def _fingerprint(folder: Path, name: str) -> str:
    """Return a name that changes when any file of the checkpoint does."""
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise BadInputError(f"{folder} has no .safetensors file: give a checkpoint's folder or a GGUF file")
    digest = hashlib.sha256(str(folder).encode())
    for file in [
        *weights,
        *sorted(folder.glob("*.json")),
        *sorted(folder.glob("*.model")),
        *sorted(folder.glob("*.jinja")),
    ]:
        status = file.stat()
        digest.update(f"\n{file.name} {status.st_size} {status.st_mtime_ns}".encode())
    return f"{name}-{digest.hexdigest()[:12]}"


def run_quantizer(source: str, quantization: str, target: Path, *flags: str, silent: bool = False) -> None:
    """Quantize in a process of its own, which shows its errors. Raises QuantizeFailedError with its exit code."""
    arguments = [source, "--type", quantization, "--out", str(target), "--no-measure", *flags]
    exit_code = run_module("quantize", *arguments, silent=silent)
    if exit_code:
        raise QuantizeFailedError(exit_code if exit_code > 0 else 1)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock; the file stays, because deleting a lock file lets two holders in."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
