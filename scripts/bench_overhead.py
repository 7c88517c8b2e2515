"""Measure what the engine adds to llama.cpp: where the time of a step of streams goes.

    python scripts/bench_overhead.py MODEL.gguf [--streams 1,8,32] [--steps 300] [--device cpu|cuda] [--threads N]

The real engine in this process, greedy streams, no HTTP. Each step is split into `llama_decode`, sampling (numpy over
the logits), and the rest, which is Python: scheduling, the batch, detokenizing, and encoding the frame that leaves.
Printed are the medians in ms and the rest's share of the whole. Exit code 0.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import msgspec  # noqa: E402 - the line above finds what follows
import numpy as np  # noqa: E402

from app.llama.context import Context  # noqa: E402
from app.llama.device import thread_count  # noqa: E402
from app.llama.model import Model  # noqa: E402
from app.messages import Generate, Sampling, Step  # noqa: E402
from app.worker import drawing  # noqa: E402
from app.worker.engine import Engine  # noqa: E402
from app.worker.sampling import batch as sampling_batch  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

PROMPT = 128


class Stopwatch:
    """Adds up the seconds of a function's calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.seconds = 0.0
        self._function = function

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Call the function."""
        started = time.perf_counter()
        try:
            return self._function(*arguments, **named)
        finally:
            self.seconds += time.perf_counter() - started


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--streams", default="1,8,32", metavar="N,N", help="how many at once, one table line each")
    parser.add_argument("--steps", type=int, default=300, metavar="N")
    parser.add_argument("--device", choices=["cpu", "cuda", "metal"], default="cpu")
    parser.add_argument("--threads", type=int, default=0, metavar="N")
    arguments = parser.parse_args()
    print(
        f"{'streams':>7}{'step':>9}{'decode':>9}{'sampling':>10}{'Python':>9}  ms, medians of {arguments.steps} steps"
    )
    with Model(arguments.model, device=arguments.device) as model:
        for streams in map(int, arguments.streams.split(",")):
            whole, decode, sampling = measured(model, streams, arguments)
            rest = whole - decode - sampling
            print(
                f"{streams:>9}{whole * 1e3:9.3f}{decode * 1e3:9.3f}{sampling * 1e3:9.3f}{rest * 1e3:9.3f}"
                f"  Python is {rest / whole:.1%} of the step",
                flush=True,
            )
    return 0


def measured(model: Model, streams: int, arguments: argparse.Namespace) -> tuple[float, float, float]:
    """Return the medians of a step's seconds, of those in llama_decode, and of those in sampling."""
    with Context(
        model,
        slots=streams,
        context_length=PROMPT + arguments.steps + 64,
        batch_size=2048,
        threads=thread_count(arguments.threads),
        flash_attention="auto" if arguments.device == "cpu" else "on",
    ) as context:
        encoder, frame = msgspec.msgpack.Encoder(), bytearray()
        is_full = False  # whether the last step was one token of every stream

        def publish(message: Any) -> None:
            nonlocal is_full
            encoder.encode_into(message, frame)
            if isinstance(message, Step):
                load = message.load
                is_full = load.tokens_generated == streams and not load.prompt_tokens_computed

        engine = Engine(model, context, publish)
        for request in range(streams):
            prompt = np.arange(100 + request, 100 + request + PROMPT, dtype=np.int32).tobytes()
            answer = {"max_tokens": arguments.steps + 32, "ignore_eos": True, "sampling": Sampling(temperature=0)}
            engine.submit(Generate(request, prompt, **answer))
        decode, sample = Stopwatch(context.decode), Stopwatch(sampling_batch.sample)
        times: list[tuple[float, float, float]] = []
        with patch.object(context, "decode", decode), patch.object(drawing, "sample", sample):
            while len(times) < arguments.steps:
                before, started = (decode.seconds, sample.seconds), time.perf_counter()
                engine.step()
                seconds = time.perf_counter() - started
                if is_full:
                    times.append((seconds, decode.seconds - before[0], sample.seconds - before[1]))
    whole, in_decode, in_sampling = (median(column) for column in zip(*times, strict=True))
    return whole, in_decode, in_sampling


if __name__ == "__main__":
    sys.exit(main())
