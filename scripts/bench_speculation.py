"""Measure what prompt lookup gains, and what it costs where nothing repeats, in paired runs of the real engine.

    python scripts/bench_speculation.py MODEL.gguf [--streams 1,8] [--tokens 160] [--rounds 5] [--threads N]
                                        [--loads edit,summary,correct,quote,prose] [--guesses 15]

Two engines of one process, without and with speculation, get the same load and take turns every few steps, so that what
else the machine does meets both. Tokens a second are those of all streams from when the last one has its first token
until the first one ends. `prose` is sampled (temperature 0.8, top-k 40, top-p 0.95), so that it hardly repeats itself;
others are greedy. The ratio is that of all tokens a second; the spread is that of the rounds.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, fields
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
_STEPS_A_TURN = 10


@dataclass
class Count:
    """What an engine has done so far, and in how many seconds."""

    tokens: int = 0
    guessed: int = 0
    accepted: int = 0
    seconds: float = 0.0

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


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

    def begin(self, load: Load, tokens: int, seed: int) -> None:
        """Ask for an answer on each stream, and step until all have begun; each prompt is a little different."""
        for stream in range(self._streams):
            self._request += 1
            text = (
                f"<|im_start|>system\nYou are helpful. ({seed}.{stream})<|im_end|>\n<|im_start|>user\n{load.message}"
                f"<|im_end|>\n<|im_start|>assistant\n{load.begun}"
            )
            prompt = self._vocabulary.tokenize(text, parse_special=True).astype("<i4").tobytes()
            sampled = Sampling(temperature=0.8, top_k=40, top_p=0.95, seed=8 * seed + stream)
            self._engine.submit(Generate(self._request, prompt, tokens, sampled if load.sampled else GREEDY))
        begun: set[int] = set()
        while len(begun) < self._streams:
            self._engine.step()
            begun.update(piece.request for step in self._steps for piece in step.pieces)
            self._steps.clear()

    def go_on(self, count: Count) -> bool:
        """Take a few steps; return whether an answer has ended."""
        started = time.perf_counter()
        ended = False
        for _ in range(_STEPS_A_TURN):
            self._engine.step()
            step = self._steps.pop()
            count.tokens += step.load.tokens_generated
            count.guessed += step.load.guessed_tokens
            count.accepted += step.load.accepted_tokens
            ended = any(piece.finish_reason for piece in step.pieces)
            if ended:
                break
        count.seconds += time.perf_counter() - started
        return ended

    def end(self) -> None:
        """Cancel what still runs."""
        for request in range(self._request - self._streams + 1, self._request + 1):
            self._engine.submit(Cancel(request))
        self._engine.step()
        self._steps.clear()

    def _publish(self, message: object) -> None:
        if isinstance(message, Step):
            self._steps.append(message)

    def close(self) -> None:
        """Free the context."""
        self._context.close()


def one_round(plain: Bench, guessing: Bench, load: Load, tokens: int, seed: int) -> tuple[Count, Count]:
    """Answer the load with both engines, in turns, until one has ended an answer."""
    counts = {plain: Count(), guessing: Count()}
    for bench in counts:
        bench.begin(load, tokens, seed)
    order = [plain, guessing]
    ended = False
    while not ended:
        for bench in order:
            ended = bench.go_on(counts[bench]) or ended
        order.reverse()
    for bench in counts:
        bench.end()
    return counts[plain], counts[guessing]


def compare(model: Model, streams: int, arguments: argparse.Namespace) -> None:
    """Run all loads with so many streams and print a line for each."""
    threads = thread_count(arguments.threads)
    plain, guessing = (Bench(model, streams, threads, guesses) for guesses in (0, arguments.guesses))
    try:
        for load in arguments.loads.split(","):
            without, with_guesses, ratios = Count(), Count(), []
            for seed in range(arguments.rounds):
                counts = one_round(plain, guessing, LOADS[load], arguments.tokens, seed)
                ratios.append(counts[1].speed / counts[0].speed)
                for total, count in zip((without, with_guesses), counts, strict=True):
                    for field in fields(Count):
                        setattr(total, field.name, getattr(total, field.name) + getattr(count, field.name))
            print(
                f"{streams} streams, {load:8}: {without.speed:6.1f} tokens/s without, {with_guesses.speed:6.1f} with; "
                f"ratio {with_guesses.speed / without.speed:.3f}, from {min(ratios):.3f} to {max(ratios):.3f}; "
                f"{with_guesses.accepted} of {with_guesses.guessed} guesses right",
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
    parser.add_argument("--rounds", type=int, default=5)
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
