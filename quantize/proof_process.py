"""The process in which llama.cpp tries a vocabulary: its start, what it is told, what it says, its end.

It is started ahead of the work, imports what it needs meanwhile, and then waits for the model's folder and the header.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Self

SECONDS = 120.0
"""Of processor time, after which a proof counts as hanging; the largest vocabularies take a few."""

_PASSED = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "LLAMA_CPP_LIB_PATH")
_SET = {
    "GGML_NO_BACKTRACE": "1",
    "OPENBLAS_NUM_THREADS": "1",  # no matrices are multiplied here, and its threads spin for a while after their start
}
_KEPT_BYTES = 4000


class ProofProcess:
    """A started process. It ends when it has proven something, after its time, when closed, or when we end."""

    def __init__(self, seconds: float = SECONDS) -> None:
        """Start it; `seconds` are its time from being told of a folder. Raises OSError."""
        passed = {name: os.environ[name] for name in _PASSED if name in os.environ}
        with contextlib.ExitStack() as files:
            self._complaints = files.enter_context(tempfile.TemporaryFile())
            self._header = files.enter_context(_header_file())
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [sys.executable, "-P", "-m", "quantize.proof_child", f"{seconds}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                env=passed | _SET,
                text=True,
                pass_fds=(self._header.fileno(),),
            )
            files.pop_all()  # they are closed when the process has ended
        self._folder: Path | None = None
        self._is_heard = False

    def __enter__(self) -> Self:
        """Close it at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it, if it still runs."""
        self.close()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def read(self, folder: Path) -> None:
        """Let it read the tokenizer of a model's folder, the first time that it is told."""
        if self._folder is None:
            self._folder = folder
            self._tell(folder=str(folder))

    def prove(
        self,
        header: bytes,
        ends: list[int],
        *,
        sentencepiece: bool,
        said: Callable[[dict[str, Any]], None],
        ended: Callable[[int, str], None],
    ) -> None:
        """Let it prove a header against the folder's tokenizer.

        `said` is called with each event, then `ended` with the exit code and the last words, on a thread. Raises
        OSError when the header finds no room.
        """
        name = self._header.name
        path = name if isinstance(name, str) else f"/proc/self/fd/{self._header.fileno()}"
        self._header.write(header)
        self._header.flush()
        self._tell(header=path, ends=ends, sentencepiece=sentencepiece)
        self._is_heard = True
        threading.Thread(target=self._listen, args=(said, ended), name="proof", daemon=True).start()

    def close(self) -> None:
        """End it, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        if not self._is_heard:
            self._process.wait()
            self._close_files()

    def _tell(self, **message: Any) -> None:
        assert self._process.stdin is not None  # noqa: S101 - it was asked for
        with contextlib.suppress(BrokenPipeError):  # it has ended, and the thread that listens says how
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _listen(self, said: Callable[[dict[str, Any]], None], ended: Callable[[int, str], None]) -> None:
        assert self._process.stdout is not None  # noqa: S101 - it was asked for
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):  # a line that was cut off by the end of the process
                said(json.loads(line))
        code = self._process.wait()
        self._complaints.seek(0)
        words = self._complaints.read()[-_KEPT_BYTES:].decode(errors="replace")
        self._close_files()
        ended(code, words)

    def _close_files(self) -> None:
        for file in (self._process.stdin, self._process.stdout, self._complaints, self._header):
            if file is not None:
                with contextlib.suppress(OSError):  # what was not written yet is not wanted
                    file.close()


def how_it_ended(code: int) -> str:
    """Put an exit code into words."""
    return f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"


def _header_file() -> IO[bytes]:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("pestle-header", os.MFD_CLOEXEC), "wb")
    return tempfile.NamedTemporaryFile(prefix="pestle-header-")
