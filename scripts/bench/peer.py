"""The two servers of paired runs: started with the same model, threads and slots, ended by their own process id."""

from __future__ import annotations

import http.client
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import psutil

from app.cli.prepare import prepare_model
from app.config import ServeSettings, cache_folder
from bench.client import Target

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 15.0
LOG_LINES = 25


@dataclass(frozen=True, slots=True)
class ServerShape:
    """What both servers are given. `context` is tokens a slot."""

    model: Path
    threads: int
    slots: int
    context: int


class ServerFailedError(RuntimeError):
    """A server did not come up, or is gone; the message ends with its last lines."""


class Server:
    """One child process with its log."""

    def __init__(self, name: str, command: Sequence[str], port: int, log: IO[bytes]) -> None:
        self.name = name
        self.command = list(command)
        self.target = Target("127.0.0.1", port, tls=False, base_path="")
        self._log = log
        # Its own session: Ctrl-C reaches us alone, and we end it in order. No setting of either server leaks in.
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("LLAMA_ARG_", "LLM_"))}
        try:
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        except OSError as fault:
            raise ServerFailedError(f"{name} does not start: {fault}") from fault

    def wait_ready(self) -> float:
        """Poll /health until it answers 200. Returns the seconds it took. Raises ServerFailedError."""
        started = time.perf_counter()
        while time.perf_counter() - started < START_TIMEOUT_S:
            self.check_alive()
            if _health(self.target) == 200:
                return time.perf_counter() - started
            time.sleep(0.05)
        raise ServerFailedError(f"{self.name} is not ready after {START_TIMEOUT_S:g} s\n{self._last_lines()}")

    def check_alive(self) -> None:
        """Raise ServerFailedError when the process has ended."""
        code = self._process.poll()
        if code is not None:
            raise ServerFailedError(f"{self.name} ended with {code}: {shlex.join(self.command)}\n{self._last_lines()}")

    def cpu_seconds(self) -> float:
        """Sum the CPU time of the process and of its living children."""
        root = psutil.Process(self._process.pid)
        total = 0.0
        for process in [root, *root.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def stop(self) -> None:
        """Ask it to end, by its pid; after a while, make it end."""
        if self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _last_lines(self) -> str:
        self._log.flush()
        lines = Path(self._log.name).read_text(errors="replace").splitlines()
        return "\n".join(f"    {line}" for line in lines[-LOG_LINES:])


def _health(target: Target) -> int:
    connection = http.client.HTTPConnection(target.host, target.port, timeout=5)
    try:
        connection.request("GET", "/health", headers={"Connection": "close"})
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def free_port() -> int:
    """Return a loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def llama_server_command(binary: str, shape: ServerShape, port: int, extra: Sequence[str]) -> list[str]:
    """Its own defaults, but for what must be equal. With `-np` given, each slot has `-c` / `-np` tokens of its own."""
    return [
        *(binary, "-m", str(shape.model), "--host", "127.0.0.1", "--port", str(port), "-t", str(shape.threads)),
        *("-np", str(shape.slots), "-c", str(shape.slots * shape.context), "--no-webui", *extra),
    ]


def pestle_command(binary: str, shape: ServerShape, port: int, extra: Sequence[str]) -> list[str]:
    """Pestle's `--ctx-size` is tokens a slot."""
    return [
        *(
            binary,
            "serve",
            str(shape.model),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--threads",
            str(shape.threads),
        ),
        *("--parallel", str(shape.slots), "--ctx-size", str(shape.context), *extra),
    ]


def default_model() -> Path:
    """Return the embedded default model as Q8_0, rebuilt and quantized where that has not been done."""
    script = Path(__file__).parents[1] / "rebuild_default_checkpoint.py"
    rebuilt = subprocess.run([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, check=False)
    if rebuilt.returncode:
        raise ServerFailedError("the default model could not be rebuilt: see above; give --model FILE.gguf")
    settings = ServeSettings(cache_dir=os.environ.get("LLM_CACHE_DIR", ""))
    return prepare_model(rebuilt.stdout.strip(), settings.quantization, cache_folder(settings))


def pestle_binary() -> str:
    """Find the `pestle` beside the Python that runs this."""
    return str(Path(sys.executable).with_name("pestle"))


@contextmanager
def running(name: str, command: Sequence[str], port: int) -> Iterator[Server]:
    """Start a server, wait until it is ready, and end it in any case."""
    with ExitStack() as stack:
        log = stack.enter_context(tempfile.NamedTemporaryFile(prefix=f"bench-{name}-", suffix=".log"))
        server = Server(name, command, port, log)
        stack.callback(server.stop)
        server.wait_ready()
        yield server
