"""Measure embeddings a second against llama-server, in pairs on the same GGUF.

    LLAMA_SERVER=.../llama-server python scripts/bench_embeddings.py FILE.gguf [--runs 5] [--load singles] [--seconds 4]

Loads: `singles` (8 clients, a sentence in each request), `batches` (2 clients, 64 sentences in each request), `long`
(2 clients, 8 texts of some 250 tokens). Both servers run all the time and take turns; the order of a pair alternates.
Exit codes: 0 done, 2 usage, 3 a server did not come up or refuses.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from bench.embedding import both_servers, model_name, sentences
from bench.peer import Server, ServerFailedError

_SENTENCES_OF_A_LONG_TEXT = 9


@dataclass(frozen=True)
class Shape:
    """A load: so many clients, each sending one request of `inputs` texts after the other."""

    clients: int
    inputs: int
    sentences: int = 1  # of a text


LOADS = {"singles": Shape(8, 1), "batches": Shape(2, 64), "long": Shape(2, 8, _SENTENCES_OF_A_LONG_TEXT)}


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("model", type=Path, metavar="FILE.gguf")
    parser.add_argument("--runs", type=int, default=5, help="pairs (default 5)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each run (default 4)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--load", action="append", choices=LOADS, help="which (default: all)")
    parser.add_argument("--slots", type=int, default=16, help="llama-server's -np (default 16)")
    arguments = parser.parse_args()
    binary = os.environ.get("LLAMA_SERVER", "llama-server")
    try:
        with both_servers(
            arguments.model, binary, threads=arguments.threads, rerank=False, slots=arguments.slots
        ) as servers:
            for name in arguments.load or LOADS:
                _measure(name, LOADS[name], servers, arguments.runs, arguments.seconds)
    except (ServerFailedError, ConnectionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    return 0


def _measure(name: str, shape: Shape, servers: tuple[Server, Server], runs: int, seconds: float) -> None:
    bodies = [_bodies(model_name(server), shape) for server in servers]
    for server, own in zip(servers, bodies, strict=True):
        _rate(server, own, shape, seconds / 4)  # warm
    pairs = []
    for number in range(runs):
        order = (0, 1) if number % 2 == 0 else (1, 0)
        rates = {place: _rate(servers[place], bodies[place], shape, seconds) for place in order}
        pairs.append((rates[0], rates[1]))
    ratios = [ours / theirs for ours, theirs in pairs]
    ours, theirs = (statistics.median(rates) for rates in zip(*pairs, strict=True))
    print(
        f"{name:8} {shape.clients} x {shape.inputs} texts: pestle {ours:.1f}, llama-server {theirs:.1f} a second; "
        f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {runs} pairs)",
        flush=True,
    )


def _bodies(model: str, shape: Shape) -> list[bytes]:
    parts = sentences()
    texts = [
        " ".join(parts[(start + offset) % len(parts)] for offset in range(shape.sentences))
        for start in range(len(parts))
    ]
    chunks = [[texts[(start + offset) % len(texts)] for offset in range(shape.inputs)] for start in range(len(texts))]
    return [json.dumps({"model": model, "input": chunk, "encoding_format": "base64"}).encode() for chunk in chunks]


def _rate(server: Server, bodies: list[bytes], shape: Shape, seconds: float) -> float:
    """Return the texts a second of all clients together."""
    waiting = itertools.cycle(bodies)
    started = time.perf_counter()

    def client(_number: int) -> int:
        done = 0
        with closing(http.client.HTTPConnection("127.0.0.1", server.target.port, timeout=120)) as connection:
            while time.perf_counter() - started < seconds:
                connection.request("POST", "/v1/embeddings", next(waiting), {"content-type": "application/json"})
                response = connection.getresponse()
                answer = response.read()
                if response.status != 200:
                    raise ServerFailedError(f"{server.name} answers {response.status}: {answer[:300].decode()}")
                done += shape.inputs
        return done

    with ThreadPoolExecutor(shape.clients) as threads:
        done = sum(threads.map(client, range(shape.clients)))
    return done / (time.perf_counter() - started)


if __name__ == "__main__":
    sys.exit(main())
