"""Judges the files of a run against their source, in a process of its own (see `measure_child`).

What they are judged against is the source as a file in its own type: a GGUF is its own reference; for safetensors the
pass writes one file more, into the cache folder, from the weights that it reads anyway. llama.cpp can also be given
weights without a file (`llama_model_init_from_user`), but then makes up every optional tensor that the model does not
have, and leaves out those that are fused: another model than the file's (docs/adr/0003).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import msgspec

from app.config import ServeSettings, cache_folder
from app.errors import PestleError, StorageError
from app.models.card import Quality
from quantize.checkpoint import DecodedTensor, StoredTensor
from quantize.quality import CHUNK_TOKENS
from quantize.tensors import TensorSpec
from quantize.text_file import NamedText

SMALL_SOURCE_BYTES = 1_000_000_000
"""Sources with no more bytes of weights are measured without being asked: some 30 s on two cores."""

_PASSED = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "LLAMA_CPP_LIB_PATH")
_TYPES = {"BF16": "bf16", "F16": "f16"}
_BITS = {"bf16": 16, "f16": 16, "f32": 32}
_ROOM = 1 << 24  # for header and norms


class NotMeasuredError(PestleError):
    """The files could not be judged; they are whole nevertheless."""


@dataclasses.dataclass(frozen=True, slots=True)
class Subjects:
    """What is judged: files against a reference; `passed` are open files that the reference's path speaks of."""

    reference: Path
    description: str
    files: Sequence[Path]
    passed: tuple[int, ...] = ()


def reference_type(specs: Sequence[TensorSpec], tensors: Mapping[str, StoredTensor]) -> str:
    """Return the type that loses nothing of a checkpoint: that of its weights, or f32."""
    stored = [tensors[part.source] for spec in specs if not spec.keep_f32 for part in spec.parts if not part.scales]
    types = {"F32" if isinstance(tensor, DecodedTensor) else tensor.dtype for tensor in stored}
    return _TYPES.get(types.pop(), "f32") if len(types) == 1 else "f32"


def reference_folder() -> Path:
    """Return where references are kept while they are needed."""
    return cache_folder(ServeSettings(cache_dir=os.environ.get("LLM_CACHE_DIR", ""))) / "measuring"


def lack_of_room(specs: Sequence[TensorSpec], type_name: str) -> str | None:
    """Tell that the reference does not fit onto the cache folder's disk; None if it does."""
    needed = sum(spec.weights for spec in specs) * _BITS[type_name] // 8 + _ROOM
    folder = reference_folder()
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if needed <= free:
        return None
    return (
        f"measuring needs {needed} bytes in {folder} for a while, {free} are free; set LLM_CACHE_DIR to another "
        "folder, or give --no-measure"
    )


class TemporaryReference:
    """A context manager: a file for the time of a run. Nobody finds it, from `hide` on, and its end frees its room."""

    def __init__(self) -> None:
        self.path = reference_folder() / f"{secrets.token_hex(8)}.gguf"
        self._file = -1

    def __enter__(self) -> Self:
        """Make the folder, and take away what killed runs have left there. Raises `StorageError`."""
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.iterdir():
                _remove_if_unused(left)
        except OSError as error:
            raise StorageError(f"{folder}: cannot be used for measuring: {error.strerror or error}") from error
        return self

    def hide(self) -> tuple[Path, tuple[int, ...]]:
        """Open the file and, where the system lets it be found without a name, take its name away.

        Returns the path by which a child finds it and the open files that it must be given for that. Raises
        `NotMeasuredError`.
        """
        try:
            self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(self._file, fcntl.LOCK_SH)
            if sys.platform != "linux":
                return self.path, ()
            self.path.unlink()
        except OSError as error:
            raise NotMeasuredError(f"{self.path}: {error.strerror or error}") from error
        return Path(f"/proc/self/fd/{self._file}"), (self._file,)

    def __exit__(self, *_: object) -> None:
        """Remove it."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
        if self._file >= 0:
            os.close(self._file)


def _remove_if_unused(path: Path) -> None:
    with contextlib.suppress(OSError):
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its process lives
            path.unlink()
        finally:
            os.close(file)


def judge(
    subjects: Subjects,
    text: NamedText,
    text_path: Path | None,
    *,
    threads: int,
    chunks: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Quality]:
    """Return the quality of each file. Raises `NotMeasuredError` that says what ended the process, or what it said."""
    task = {
        "reference": str(subjects.reference),
        "files": [str(path) for path in subjects.files],
        "text": None if text_path is None else str(text_path.absolute()),
        "threads": threads,
        "chunks": chunks,
    }
    found: list[dict[str, Any]] = []
    with _child(task, subjects.passed) as (process, complaints):
        assert process.stdout is not None  # noqa: S101 - it was asked for
        for line in process.stdout:
            event = msgspec.json.decode(line)
            if event["event"] == "error":
                raise NotMeasuredError(event["message"])
            if event["event"] == "quality":
                found.append(event)
            elif progress is not None:
                progress(event["done"], event["total"])
        code = process.wait()
        if code or len(found) != 1 + len(subjects.files):
            raise NotMeasuredError(_what_ended_it(code, complaints))
    reference = found[0]
    judged = found[1:] or found
    return [_quality(one, reference, subjects.description, text, threads) for one in judged]


@contextlib.contextmanager
def _child(task: dict[str, Any], passed: tuple[int, ...]) -> Iterator[tuple[subprocess.Popen[bytes], Any]]:
    environment = {name: os.environ[name] for name in _PASSED if name in os.environ} | {"GGML_NO_BACKTRACE": "1"}
    with tempfile.TemporaryFile() as complaints:
        try:
            process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [sys.executable, "-P", "-m", "quantize.measure_child", json.dumps(task)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, env=environment, pass_fds=passed,
            )  # fmt: skip
        except OSError as error:
            raise NotMeasuredError(f"the process cannot be started: {error}") from error
        with process:
            try:
                yield process, complaints
            finally:
                process.kill()


def _what_ended_it(code: int, complaints: Any) -> str:
    complaints.seek(0)
    said = complaints.read()[-4000:].decode(errors="replace")
    last = " ".join([line for line in said.splitlines() if line.strip()][-3:])
    how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
    return f"the process in which llama.cpp runs the files ended with {how}. Its last words: {last[-600:] or 'none'}"


def _quality(
    one: Mapping[str, Any], reference: Mapping[str, Any], description: str, text: NamedText, threads: int
) -> Quality:
    predictions = CHUNK_TOKENS - CHUNK_TOKENS // 2 - 1
    return Quality(
        reference=description,
        text=text.name,
        text_sha256=text.sha256,
        chunks=one["tokens"] // predictions,
        chunk_tokens=CHUNK_TOKENS,
        predictions=one["tokens"],
        perplexity=one["perplexity"],
        perplexity_error=one["perplexity_error"],
        reference_perplexity=reference["perplexity"],
        kld_mean=one["kld_mean"],
        kld_error=one["kld_error"],
        kld_99=one["kld_99"],
        kld_max=one["kld_max"],
        same_top=one["same_top"],
        prompt_speed=one["prompt_speed"],
        decode_speed=one["decode_speed"],
        machine=machine(),
        threads=threads,
    )


def machine() -> str:
    """Return the processor's name and how many threads it has."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {os.cpu_count()} processors, {platform.system()}"
