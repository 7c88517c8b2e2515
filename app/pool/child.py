"""One child process: its start, its link, its last words, its end."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from app.messages import LoadModel, encode_frame
from app.observability.logging import get_logger
from app.pool.link import Link

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import msgspec

log = get_logger(__name__)

_KEPT_LINES = 40
_READ_BYTES = 65536
_LONGEST_LINE = 2000
_POLL_SECONDS = 0.005
_GRACE_AFTER_KILL_SECONDS = 10.0
_PASSED_NAMES = frozenset({"PATH", "HOME", "LANG", "LLAMA_CPP_LIB_PATH", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH"})
_PASSED_PREFIXES = ("OMP_", "GOMP_", "GGML_")
_SET = {
    "GGML_NO_BACKTRACE": "1",  # with a backtrace an abort forks a debugger and waits for it
    "OPENBLAS_NUM_THREADS": "1",  # no matrices are multiplied in numpy, whose threads for that spin after their start
}


def clean_environment() -> dict[str, str]:
    """Return what a child may see of our environment: no keys, no tokens, no Python settings."""
    passed = {k: v for k, v in os.environ.items() if k in _PASSED_NAMES or k.startswith(_PASSED_PREFIXES)}
    return {**passed, **_SET}


class ChildProcess:
    """A running child. Creating one starts it and sends it the model to load; nothing here needs an event loop yet."""

    def __init__(self, name: str, command: Sequence[str], load: LoadModel) -> None:
        self.name = name
        self.link: Link | None = None
        self._lines: collections.deque[str] = collections.deque(maxlen=_KEPT_LINES)
        self._partial_line = b""
        self._socket, theirs = socket.socketpair()
        self._output, their_output = os.pipe()
        os.set_blocking(self._output, False)
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [*command, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=their_output,
                stderr=subprocess.STDOUT,
                env=clean_environment(),
            )
        except OSError:
            self._socket.close()
            os.close(self._output)
            raise
        finally:
            theirs.close()
            os.close(their_output)
        with contextlib.suppress(BrokenPipeError):  # it died already: the link's end tells
            self._socket.sendall(encode_frame(load))

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    async def attach(self, decoder: msgspec.msgpack.Decoder[Any], on_message: Callable[[Any], None]) -> Link:
        """Let the running event loop read what the child sends and writes."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._output, self._read_output)
        link = Link(decoder, on_message)
        await loop.create_unix_connection(lambda: link, sock=self._socket)
        self.link = link
        return link

    def kill(self) -> None:
        """End the process at once; its link's end follows."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def reap(self, grace: float) -> str:
        """Cut the link, give the child `grace` seconds to leave, kill it else; return how it ended."""
        if self.link is not None:
            self.link.abort()
        else:
            self._socket.close()
        try:
            if not await self._has_ended(grace):
                self.kill()
                await self._has_ended(_GRACE_AFTER_KILL_SECONDS)  # a large process may take long to be torn down
        finally:
            self.kill()
            self._close_output()
        return self._ending()

    async def _has_ended(self, grace: float) -> bool:
        deadline = time.monotonic() + grace
        while self._process.poll() is None and time.monotonic() < deadline:  # noqa: ASYNC110 - nothing wakes us
            await asyncio.sleep(_POLL_SECONDS)
        return self._process.poll() is not None

    def last_lines(self) -> str:
        """Return the last lines that the child wrote, for an error message; empty when it wrote none."""
        return "\n".join(self._lines)

    def _ending(self) -> str:
        code = self._process.poll()
        if code is None:
            return "killed, and still not gone"
        if code >= 0:
            return f"exit status {code}"
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"

    def _read_output(self) -> None:
        try:
            data = os.read(self._output, _READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            asyncio.get_running_loop().remove_reader(self._output)
        *lines, self._partial_line = (self._partial_line + data).split(b"\n")
        if len(self._partial_line) > _LONGEST_LINE or (not data and self._partial_line):
            lines.append(self._partial_line)
            self._partial_line = b""
        for line in lines:
            text = line.decode("utf-8", "replace").rstrip()[:_LONGEST_LINE]
            self._lines.append(text)
            log.info("%s", text, extra={"child": self.name})

    def _close_output(self) -> None:
        if self._output >= 0:
            self._read_output()
            asyncio.get_running_loop().remove_reader(self._output)
            os.close(self._output)
            self._output = -1


def python_module(module: str) -> list[str]:
    """Return the command that starts a module of ours; `-P` keeps the current folder off the path."""
    return [sys.executable, "-P", "-m", module]
