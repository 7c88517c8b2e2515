"""Measure what prompt lookup gains, and what it costs where nothing repeats, in paired runs of the real engine.

    python scripts/bench_speculation.py MODEL.gguf [--streams 1,8] [--tokens 160] [--pairs 5] [--threads N]
                                        [--loads edit,summary,correct,quote,prose] [--guesses 15]

A pair is one run without and one with speculation, in turns of who goes first, by two engines of one process on the
same model. Tokens a second are those of all streams from when the last one has its first token until the first one
ends. `prose` is sampled (temperature 0.8, top-k 40, top-p 0.95), so that it hardly repeats itself; others are greedy.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from app.llama.context import Context  # noqa: E402 - found through the line above
from app.llama.device import thread_count  # noqa: E402
from app.llama.model import Model  # noqa: E402
from app.messages import Cancel, Generate, Sampling, Step  # noqa: E402
from app.worker.engine import Engine  # noqa: E402
from app.worker.speculation import Speculation, guesses_in_step  # noqa: E402

CODE = """\
STOCK = {
    "apple": {"price": 3, "count": 10, "unit": "kg"},
    "pear": {"price": 4, "count": 7, "unit": "kg"},
    "bread": {"price": 2, "count": 30, "unit": "loaf"},
    "milk": {"price": 1, "count": 45, "unit": "litre"},
    "cheese": {"price": 9, "count": 12, "unit": "kg"},
    "butter": {"price": 5, "count": 20, "unit": "pack"},
    "rice": {"price": 2, "count": 60, "unit": "kg"},
    "salt": {"price": 1, "count": 80, "unit": "pack"},
}
"""
REPORT = """\
The harbour of Veldt was built in 1874 by the engineer Anna Brandt, after two storms had destroyed the old wooden
piers. It has four basins. The northern basin takes ships of up to 200 metres and handles grain and timber. The southern
basin is used by the fishing fleet, which lands about 14,000 tonnes of herring a year. The third basin holds the
shipyard of Kessler and Sons, where 320 people repair ferries. The fourth basin was filled in 1988 and is now a park
with a lighthouse museum.
"""


class Load(NamedTuple):
    """A user's message, how the answer begins, and whether tokens are sampled."""

    message: str
    begun: str = ""
    sampled: bool = False


LOADS = {
    "edit": Load(
        f'Rename "count" to "amount" in this code, and give me the whole code:\n\n```python\n{CODE}```',
        '```python\nSTOCK = {\n    "apple": {"price": 3, "amount": 10,',
    ),
    "summary": Load(f"Summarize this text:\n\n{REPORT}"),
    "correct": Load(
        f"Fix the spelling in this text and give me the whole text:\n\n{REPORT.replace('basin', 'bassin')}"
    ),
    "quote": Load(f"Repeat this text word for word:\n\n{REPORT}"),
    "prose": Load("Tell me a story about an old clockmaker and a boy who could not sleep.", sampled=True),
}
GREEDY = Sampling(temperature=0)


class Speed(NamedTuple):
    """Tokens a second of one run, tokens guessed and accepted."""

    tokens: float
    guessed: int
    accepted: int


class Bench:
    """An engine that gets the same load again and again."""

    def __init__(self, model: Model, streams: int, threads: int, guesses: int) -> None:
        rows = streams + guesses_in_step(streams, guesses)
        self._vocabulary = model.vocabulary
        self._context = Context(
            model, slots=streams, context_length=2048, batch_size=512, threads=threads, logits_rows=rows
        )
        speculation = Speculation(guesses, guesses_in_step(streams, guesses)) if guesses else None
        self._steps: list[Step] = []
        self._engine = Engine(model, self._context, self._publish, speculation=speculation)
        self._engine.warm_up()
        self._streams = streams
        self._request = 0

    def run(self, load: Load, tokens: int, seed: int) -> Speed:
        """Answer the message on each stream; each prompt is a little different."""
        self._steps.clear()
        for stream in range(self._streams):
            self._request += 1
            text = (
                f"<|im_start|>system\nYou are helpful. ({seed}.{stream})<|im_end|>\n<|im_start|>user\n{load.message}"
                f"<|im_end|>\n<|im_start|>assistant\n{load.begun}"
            )
            prompt = self._vocabulary.tokenize(text, parse_special=True).astype("<i4").tobytes()
            sampled = Sampling(temperature=0.8, top_k=40, top_p=0.95, seed=8 * seed + stream)
            self._engine.submit(Generate(self._request, prompt, tokens, sampled if load.sampled else GREEDY))
        first = self._request - self._streams + 1
        begun: set[int] = set()
        drawn = guessed = accepted = 0
        started = ended = 0.0
        while not ended:
            self._engine.step()
            if not self._steps:
                continue
            step = self._steps.pop()
            if len(begun) < self._streams:
                begun.update(piece.request for piece in step.pieces)
                started = time.perf_counter()
                continue
            drawn += step.load.tokens_generated
            guessed += step.load.guessed_tokens
            accepted += step.load.accepted_tokens
            if any(piece.finish_reason for piece in step.pieces):
                ended = time.perf_counter()
        for request in range(first, first + self._streams):
            self._engine.submit(Cancel(request))
        self._engine.step()
        return Speed(drawn / (ended - started), guessed, accepted)

    def _publish(self, message: object) -> None:
        if isinstance(message, Step):
            self._steps.append(message)

    def close(self) -> None:
        """Free the context."""
        self._context.close()


def compare(model: Model, streams: int, arguments: argparse.Namespace) -> None:
    """Run all loads with so many streams and print a line for each."""
    threads = thread_count(arguments.threads)
    plain, guessing = (Bench(model, streams, threads, guesses) for guesses in (0, arguments.guesses))
    try:
        for load in arguments.loads.split(","):
            ratios, speeds = [], []
            for pair in range(arguments.pairs):
                order = (plain, guessing) if pair % 2 else (guessing, plain)
                found = {bench: bench.run(LOADS[load], arguments.tokens, pair) for bench in order}
                ratios.append(found[guessing].tokens / found[plain].tokens)
                speeds.append((found[plain].tokens, found[guessing].tokens))
            off, on = (statistics.median(column) for column in zip(*speeds, strict=True))
            last = found[guessing]
            print(
                f"{streams} streams, {load:8}: {off:6.1f} tokens/s without, {on:6.1f} with; ratio "
                f"{statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}; "
                f"last run: {last.accepted} of {last.guessed} guesses right",
                flush=True,
            )
    finally:
        plain.close()
        guessing.close()


def main() -> int:
    """Read the arguments, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--streams", default="1,8")
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--loads", default=",".join(LOADS))
    parser.add_argument("--guesses", type=int, default=15)
    parser.add_argument(
        "--sampled", action="store_true", help="temperature 0.8, top-k 40, top-p 0.95 instead of greedy"
    )
    arguments = parser.parse_args()
    with Model(arguments.model, device="cpu") as model:
        for streams in arguments.streams.split(","):
            compare(model, int(streams), arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
