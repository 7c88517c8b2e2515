"""From start to exit code: bind, load, overload, drain. A real process with the real model."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

Serve = Callable[..., contextlib.AbstractContextManager[Any]]


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


def post(url: str, **fields: Any) -> Any:
    """Send a chat request of the only model; returns the open response."""
    model = get(f"{url}/v1/models")["data"][0]["id"]
    body = {"model": model, "messages": [{"role": "user", "content": "Count to ten."}], "ignore_eos": True, **fields}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    return urllib.request.urlopen(request, timeout=100)


def status(url: str) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


@contextlib.contextmanager
def reading(response: Any) -> Iterator[list[bytes]]:
    """Read a stream's lines on a thread; the list grows meanwhile and is complete after the block."""
    lines: list[bytes] = []
    reader = threading.Thread(target=lambda: lines.extend(response))
    with response:
        lines.append(response.readline())
        reader.start()
        try:
            yield lines
        finally:
            reader.join(60)


def test_sigterm_lets_streams_finish(serve: Serve, default_model: Path, eventually: Callable[..., None]) -> None:
    with serve(default_model, "--parallel", "2", "--ctx-size", "512", "--drain-timeout", "60") as server:
        with reading(post(server.url, max_tokens=60, stream=True)) as lines:
            server.process.send_signal(signal.SIGTERM)
            eventually(lambda: status(f"{server.url}/health")[0] == 503)
            assert status(f"{server.url}/health")[1]["status"] == "draining"
            assert status(f"{server.url}/livez")[0] == 200
            with pytest.raises(urllib.error.HTTPError) as caught:
                post(server.url, max_tokens=1)
            with caught.value as refusal:
                assert refusal.code == 503
                assert int(refusal.headers["retry-after"]) >= 1
                assert json.load(refusal)["error"]["code"] == "draining"
        assert lines[-2:] == [b"data: [DONE]\n", b"\n"]
        assert server.process.wait(30) == 0


def test_what_outlasts_the_drain_gets_an_error(serve: Serve, default_model: Path) -> None:
    with serve(default_model, "--parallel", "2", "--ctx-size", "2048", "--drain-timeout", "0.2") as server:
        with reading(post(server.url, max_tokens=2000, stream=True)) as lines:
            server.process.send_signal(signal.SIGINT)
        assert json.loads(lines[-2].removeprefix(b"data: "))["error"]["code"] == "draining"
        assert server.process.wait(30) == 0


def test_a_second_signal_means_now(serve: Serve, default_model: Path, eventually: Callable[..., None]) -> None:
    with serve(default_model, "--parallel", "2", "--ctx-size", "2048", "--drain-timeout", "600") as server:
        with reading(post(server.url, max_tokens=2000, stream=True)):
            server.process.send_signal(signal.SIGTERM)
            eventually(lambda: status(f"{server.url}/health")[0] == 503)
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(30) == 130
        assert time.monotonic() - began < 10


def test_overload_is_a_quick_no(serve: Serve, default_model: Path) -> None:
    def ask(_: int) -> tuple[int, str | None]:
        try:
            with post(server.url, max_tokens=8) as answer:
                return (answer.status, None) if json.load(answer)["choices"] else (0, None)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers["retry-after"]

    with serve(default_model, "--parallel", "1", "--ctx-size", "256", "--queue", "1") as server:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, range(8)))
        assert {code for code, _ in answers} == {200, 429}
        assert all(int(after or 0) >= 1 for code, after in answers if code == 429)
        assert ask(0) == (200, None)


def test_serving_goes_on_when_nobody_reads_the_output(default_model: Path, tmp_path: Path) -> None:
    without_suffix = tmp_path / "SmolLM2-0.1B"
    without_suffix.symlink_to(default_model)
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "app.cli", "serve", str(without_suffix), "--port", "0", "--log-format", "json"]
    with subprocess.Popen(command, stdout=write, stderr=subprocess.PIPE, text=True) as process:
        os.close(write)
        assert process.stderr is not None
        try:
            url = next(line["url"] for line in map(json.loads, process.stderr) if line["message"] == "ready")
            assert [model["id"] for model in get(f"{url}/v1/models")["data"]] == ["SmolLM2-0.1B"]
        finally:
            process.terminate()
        assert process.wait(30) == 0
        assert "Traceback" not in process.stderr.read()


def test_a_taken_port_is_a_usage_error(default_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        finished = subprocess.run(
            [sys.executable, "-m", "app.cli", "serve", str(default_model), "--port", str(port)],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert finished.returncode == 2
    assert f"port {port} of 127.0.0.1 is taken" in finished.stderr
    assert "--port" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_host_that_is_not_ours_is_a_usage_error(default_model: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "app.cli", "serve", str(default_model), "--port", "0", "--host", "192.0.2.1"],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.returncode == 2
    assert "192.0.2.1" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_model_that_cannot_be_loaded_is_bad_input(default_model: Path, tmp_path: Path) -> None:
    strange = tmp_path / "strange.gguf"
    data = default_model.read_bytes()
    name = b"general.architecture" + (8).to_bytes(4, "little") + (5).to_bytes(8, "little") + b"llama"
    assert data.count(name) == 1
    strange.write_bytes(data.replace(name, name[:-5] + b"limbo"))
    finished = subprocess.run(
        [sys.executable, "-m", "app.cli", "serve", str(strange), "--port", "0"],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.returncode == 3
    assert "limbo" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert "Chat page" not in finished.stdout


def test_a_worker_that_keeps_dying_ends_the_server(serve: Serve, default_model: Path) -> None:
    with serve(default_model, "--parallel", "1", "--ctx-size", "256") as server:
        parent = psutil.Process(server.process.pid)
        deadline = time.monotonic() + 100
        while server.process.poll() is None:
            assert time.monotonic() < deadline
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in parent.children():
                    if "app.worker" in child.cmdline():
                        child.kill()
            time.sleep(0.05)
        assert server.process.returncode == 1
    assert "worker" in server.stderr[-1]
    assert not any("Traceback" in line for line in server.stderr)
