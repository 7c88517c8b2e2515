"""A trivial SSE server with no model: it measures the generator itself, and stands in for a server in its tests.

Every event is one write and one HTTP chunk, as a server that streams token by token would send it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import Any

from bench.load import run_async

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"


def chunk(event: str) -> bytes:
    """Frame one event."""
    data = f"data: {event}\n\n".encode()
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def _delta(delta: dict[str, str], finish: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    common = {"id": "chatcmpl-0123456789abcdef", "object": "chat.completion.chunk", "created": 1, "model": "source"}
    return json.dumps({**common, "choices": [choice], "usage": None}, separators=(",", ":"))


FIRST = chunk(_delta({"role": "assistant", "content": ""}))
EVENT = chunk(_delta({"content": " word"}))


def last_chunks(tokens: int) -> bytes:
    """Finish reason, usage, [DONE] and the end of the body."""
    usage = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": tokens + 1}}
    return chunk(_delta({}, "length")) + chunk(json.dumps(usage)) + chunk("[DONE]") + b"0\r\n\r\n"


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, interval_s: float) -> None:
    """Send `max_tokens` events, `interval_s` apart; as fast as the reader takes them with 0."""
    loop = asyncio.get_running_loop()
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
        )
        body: dict[str, Any] = json.loads(await reader.readexactly(length))
        tokens = int(body["max_tokens"])
        writer.write(HEAD + FIRST)
        due = loop.time()
        for _ in range(tokens):
            due += interval_s
            await asyncio.sleep(max(0.0, due - loop.time()))
            writer.write(EVENT)
            if writer.transport.get_write_buffer_size():
                await writer.drain()
        writer.write(last_chunks(tokens))
        await writer.drain()
    except (ConnectionError, asyncio.IncompleteReadError):
        return
    finally:
        writer.close()


async def serve(interval_s: float, seconds: float) -> None:
    """Print the port, then serve on loopback for so many seconds."""
    server = await asyncio.start_server(
        lambda reader, writer: _answer(reader, writer, interval_s), "127.0.0.1", 0, backlog=1024
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await asyncio.sleep(seconds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--interval", type=float, default=0.0)
    parser.add_argument("--seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    run_async(serve(arguments.interval, arguments.seconds))
