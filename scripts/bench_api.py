"""Measure the API process alone: how many events a second it streams on one core, and what CPU an event costs.

    python scripts/bench_api.py [--streams 32] [--tokens 2000] [--runs 5]

The real API process (uvicorn, Litestar, the pool) is pinned to one core. Only its worker is replaced: by a generator
that waits for all streams and then sends a token for each of them as fast as they are taken. The client reads from
plain sockets on another core. Each run asks for few and for many tokens, so that the cost of a request and that of an
event can be told apart; medians are printed. CPU is that of /proc/PID/schedstat (Linux).
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import msgspec
from bench import peer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from app.messages import Hello, LoadModel

SHORT = 50  # tokens of the answers that show what a request costs
FIRST_CORE, OTHER_CORE = 0, 1
SEND_BUFFER = 4096  # bytes: the generator stays few steps ahead, or tokens would be merged into fewer events
DEADLINE = 120.0
SETTLE = 0.1  # seconds in which the answers begin
VOCABULARY = 49152


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--streams", type=int, default=32, metavar="N")
    parser.add_argument("--tokens", type=int, default=2000, metavar="N", help="of each answer")
    parser.add_argument("--runs", type=int, default=5, metavar="N")
    arguments = parser.parse_args()
    if os.cpu_count() == 1:
        parser.error("this takes two cores: one for the API process, one for what is around it")
    port = peer.free_port()
    model = peer.default_model()
    command = [sys.executable, __file__, "serve", str(model), str(port), str(arguments.streams)]
    with subprocess.Popen(command) as server:
        try:
            wait_for(port)
            os.sched_setaffinity(0, {OTHER_CORE})
            report(server.pid, port, model.stem, arguments)
        finally:
            server.send_signal(signal.SIGTERM)
    return 0


def report(pid: int, port: int, model: str, arguments: argparse.Namespace) -> None:
    """Measure and print."""
    rates, events, requests = [], [], []
    ask(port, model, arguments.streams, SHORT)
    for _ in range(arguments.runs):
        few_cpu = cpu_of(pid)
        few = ask(port, model, arguments.streams, SHORT)
        many_cpu = cpu_of(pid)
        began = time.perf_counter()
        many = ask(port, model, arguments.streams, arguments.tokens)
        seconds = time.perf_counter() - began
        used_few, used_many = many_cpu - few_cpu, cpu_of(pid) - many_cpu
        event = (used_many - used_few) / (many - few)
        rates.append(many / seconds)
        events.append(event)
        requests.append((used_few - few * event) / arguments.streams)
    print(
        f"{arguments.streams} streams of {arguments.tokens} tokens: {median(rates):,.0f} events/s on one core, "
        f"{median(events) * 1e6:.1f} us of CPU an event ({min(events) * 1e6:.1f}-{max(events) * 1e6:.1f}), "
        f"{median(requests) * 1e3:.2f} ms a request; medians of {arguments.runs}"
    )


def ask(port: int, model: str, streams: int, tokens: int) -> int:
    """Stream so many answers at once; return how many events came. Raises RuntimeError if an answer is cut short."""
    message = {"role": "user", "content": "Hello"}
    body = json.dumps({"model": model, "messages": [message], "max_tokens": tokens, "stream": True})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
    request = f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n{body}".encode()
    events = ended = 0
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
        for _ in range(streams):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            connection.sendall(request)
            selector.register(connection, selectors.EVENT_READ)
        last = time.monotonic() + DEADLINE
        while ended < streams:
            for key, _ in selector.select(timeout=max(0.0, last - time.monotonic())):
                data = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                events += data.count(b"data: {")
                if not data:
                    selector.unregister(key.fileobj)
                    ended += 1
            if time.monotonic() > last:
                raise RuntimeError(f"{streams - ended} of {streams} answers did not end within {DEADLINE:g} s")
    if events < streams * tokens // 2:
        raise RuntimeError(f"{events} events came for {streams} answers of {tokens} tokens")
    return events


def cpu_of(pid: int) -> float:
    """Return the CPU seconds that a process has used."""
    tasks = Path(f"/proc/{pid}/task")
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir()) / 1e9


def wait_for(port: int) -> None:
    """Wait until the server answers that it is ready. Raises RuntimeError."""
    last = time.monotonic() + 30
    while time.monotonic() < last:
        with contextlib.suppress(OSError), contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as http_:
            http_.request("GET", "/health")
            if http_.getresponse().status == http.client.OK:
                return
        time.sleep(0.05)
    raise RuntimeError("the server did not come up")


def serve(model: Path, port: int, streams: int) -> int:
    """Be the API process, with a generator for a worker."""
    from app.config import ServeSettings  # noqa: PLC0415 - the client does without
    from app.observability.metrics import Metrics  # noqa: PLC0415
    from app.pool.child import python_module  # noqa: PLC0415
    from app.pool.pool import Pool  # noqa: PLC0415
    from app.server.run import run  # noqa: PLC0415

    settings = ServeSettings(model_path=str(model), port=port, parallel=streams, queue=4 * streams)
    metrics = Metrics()
    worker = [sys.executable, __file__, "work"]
    pool = Pool(settings, model, model.stem, metrics, commands=(python_module("app.text"), worker))
    pool.spawn()
    os.sched_setaffinity(0, {FIRST_CORE})  # the children have started with all of them
    return run(pool, settings, metrics)


def work(descriptor: int) -> int:
    """Be the worker: when every slot has a sequence, a token for each in every step until they have what they asked."""
    from app import messages  # noqa: PLC0415

    os.sched_setaffinity(0, {OTHER_CORE})
    connection, frames = socket.socket(fileno=descriptor), messages.FrameReader()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    decode = msgspec.msgpack.Decoder(messages.ToWorker).decode
    slots, running = 0, list[int]()
    while data := connection.recv(1 << 18):
        for message in map(decode, frames.feed(data)):
            if isinstance(message, messages.LoadModel):
                slots = message.slots
                connection.sendall(messages.encode_frame(hello(message)))
            elif isinstance(message, messages.Generate):
                running.append(message.request)
                connection.sendall(messages.encode_frame(messages.Accepted(message.request)))
                if len(running) == slots:
                    time.sleep(SETTLE)
                    for frame in steps(running, message.max_tokens):
                        connection.sendall(frame)
                    running.clear()
    return 0


def hello(load: LoadModel) -> Hello:
    """Return what the worker says of its model."""
    from app.messages import Hello  # noqa: PLC0415

    return Hello(
        child="worker",
        pid=os.getpid(),
        vocabulary_size=VOCABULARY,
        context_length=load.context_length,
        slots=load.slots,
        capabilities=["chat", "completion"],
    )


def steps(requests: list[int], tokens: int) -> Iterator[bytes]:
    """Yield a frame for each step."""
    from app.messages import Load, Piece, Step, encode_frame  # noqa: PLC0415

    load = Load(
        running=len(requests), waiting=0, kv_tokens=1, kv_capacity=1000, prompt_tokens_computed=0,
        tokens_generated=len(requests), preemptions=0, step_seconds=0.001,
    )  # fmt: skip
    for drawn in range(1, tokens + 1):
        reason: Any = "length" if drawn == tokens else None
        yield encode_frame(Step([Piece(request, " word", drawn, reason) for request in requests], load))


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "work":
        sys.exit(work(int(sys.argv[2])))
    if len(sys.argv) > 1 and sys.argv[1] == "serve":
        sys.exit(serve(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
    sys.exit(main())
