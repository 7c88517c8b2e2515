"""Measure what a JSON schema costs a step, against free text, in paired runs of the real engine.

    python scripts/bench_structured.py MODEL.gguf [--rows 8] [--tokens 64] [--pairs 5] [--threads N] [--greedy]

A pair is one run of each, in turns of who goes first. CPU time is the process's own, of all threads; wall time means
something on an idle machine only. A step is one token of every row; prompts are not counted.
"""

from __future__ import annotations

import argparse
import json
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
from app.messages import CompileGrammar, Generate, Sampling, Step  # noqa: E402
from app.text.grammar_check import GrammarChecker  # noqa: E402
from app.worker.engine import Engine  # noqa: E402

SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "kind": {"enum": ["person", "place", "thing"]},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 4},
        },
        "required": ["name", "age", "kind", "tags"],
        "additionalProperties": False,
    },
}
PROMPT = "Here is a list of some interesting people, with their names and ages, in JSON:\n"


class Cost(NamedTuple):
    """Seconds of a median step."""

    cpu: float
    wall: float


def measure(model: Model, rows: int, tokens: int, sampling: Sampling, threads: int, grammar: str | None) -> Cost:
    """Run one batch of equal prompts and return the cost of a step in which every row draws a token."""
    drawn = 0

    def publish(message: object) -> None:
        nonlocal drawn
        drawn = message.load.tokens_generated if isinstance(message, Step) else drawn

    prompt = model.vocabulary.tokenize(PROMPT).astype("<i4").tobytes()
    cpu, wall = [], []
    with Context(model, slots=rows, context_length=1024, batch_size=512, threads=threads) as context:
        engine = Engine(model, context, publish)
        for request in range(rows):
            engine.submit(Generate(request, prompt, tokens, sampling, ignore_eos=grammar is None, grammar=grammar))
        for _ in range(tokens + 8 * rows):
            started = time.process_time(), time.perf_counter()
            engine.step()
            if drawn == rows:
                cpu.append(time.process_time() - started[0])
                wall.append(time.perf_counter() - started[1])
            if len(cpu) >= tokens - rows:
                break
    return Cost(statistics.fmean(cpu), statistics.median(wall))


def main() -> int:
    """Read the arguments, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--greedy", action="store_true", help="temperature 0 instead of 0.8 with top-k 40, top-p 0.95")
    arguments = parser.parse_args()
    threads = thread_count(arguments.threads)
    sampling = Sampling(temperature=0) if arguments.greedy else Sampling(temperature=0.8, top_k=40, top_p=0.95, seed=1)
    ratios: list[Cost] = []
    with Model(arguments.model, device="cpu") as model:
        asked = CompileGrammar(1, "json_schema", json.dumps(SCHEMA), "schema")
        grammar, _ = GrammarChecker(model.vocabulary).compiled(asked)
        for pair in range(arguments.pairs):
            order = (None, grammar) if pair % 2 else (grammar, None)
            costs = {
                given: measure(model, arguments.rows, arguments.tokens, sampling, threads, given) for given in order
            }
            free, held = costs[None], costs[grammar]
            ratios.append(Cost(held.cpu / free.cpu, held.wall / free.wall))
            print(
                f"pair {pair + 1}: CPU {free.cpu * 1e3:.2f} ms free, {held.cpu * 1e3:.2f} ms with json_schema "
                f"({ratios[-1].cpu:.3f}x); wall {free.wall * 1e3:.2f} and {held.wall * 1e3:.2f} ms "
                f"({ratios[-1].wall:.3f}x)",
                flush=True,
            )
    for name in Cost._fields:
        values = sorted(getattr(ratio, name) for ratio in ratios)
        print(f"{name}: {statistics.median(values):.3f}x, from {values[0]:.3f} to {values[-1]:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
