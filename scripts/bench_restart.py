"""Measure how soon a restarted server answers a long prompt that it knew: its first token against that of a cold start.

    python scripts/bench_restart.py [--model FILE.gguf] [--tokens 4000] [--runs 3] [--threads N]

Each run starts Pestle with an empty `--cache-disk`, sends a prompt of that many tokens twice removed by a restart, and
compares the times to the first event with text. Exit codes: 0 the ratio is at most 0.1, 1 it is not, 3 a server failed.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from bench import peer
from bench.workload import WORDS, model_name

FLOOR = 0.1
_SETTLE_SECONDS = 60.0


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--model", type=Path, metavar="FILE", help="default: the embedded model")
    parser.add_argument("--tokens", type=int, default=4000, metavar="N", help="of the prompt, about")
    parser.add_argument("--runs", type=int, default=3, metavar="N")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--pestle", default=peer.pestle_binary(), metavar="FILE")
    arguments = parser.parse_args()
    model = arguments.model or peer.default_model()
    ratios = []
    try:
        for run in range(arguments.runs):
            words = random.Random(run).choices(WORDS, k=arguments.tokens)  # a token each
            with tempfile.TemporaryDirectory(prefix="bench-restart-") as cache:
                cold = first_token(model, arguments, cache, " ".join(words))
                warm = first_token(model, arguments, cache, " ".join(words))
            ratios.append(warm / cold)
            print(f"run {run + 1}: cold {cold * 1e3:.0f} ms, after a restart {warm * 1e3:.0f} ms, {ratios[-1]:.3f}x")
    except (peer.ServerFailedError, OSError, RuntimeError) as error:
        print(f"bench_restart: {error}", file=sys.stderr)
        return 3
    print(f"median {median(ratios):.3f}x, from {min(ratios):.3f} to {max(ratios):.3f}; at most {FLOOR} is asked")
    return 0 if median(ratios) <= FLOOR else 1


def first_token(model: Path, arguments: argparse.Namespace, cache: str, prompt: str) -> float:
    """Start a server on this cache, send the prompt, and return the seconds until its first text; it is ended then."""
    port = peer.free_port()
    shape = peer.ServerShape(model, arguments.threads, slots=1, context=arguments.tokens + 512)
    command = peer.pestle_command(arguments.pestle, shape, port, ["--cache-disk", "4096", "--cache-dir", cache])
    with peer.running("pestle", command, port) as server:
        body = {"model": model_name(server.target), "prompt": prompt, "max_tokens": 4, "stream": True}
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        started = time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        if answer.status != http.client.OK:
            raise RuntimeError(f"the server answered {answer.status}: {answer.read().decode()}")
        while not (line := answer.readline()).startswith(b"data: "):
            if not line:
                raise RuntimeError("the stream ended before its first event")
        seconds = time.perf_counter() - started
        if b'"error"' in line:
            raise RuntimeError(f"the stream began with an error: {line.decode()}")
        answer.read()
        connection.close()
        wait_until_still(Path(cache))
    return seconds


def wait_until_still(folder: Path) -> None:
    """Wait until the files in a folder have not grown for a second: what was left in the slot is being written."""
    began, size, still = time.monotonic(), -1, 0.0
    while time.monotonic() - began < _SETTLE_SECONDS:
        now = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        still = still if now == size and now else time.monotonic()
        size = now
        if time.monotonic() - still > 1:
            return
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
