"""Send mutated and hostile schemas and grammars through the real children, and prove that no worker dies.

    python scripts/prove_grammars.py MODEL.gguf [--count 1000] [--seed 1]

Half of them are schemas, half grammars and regular expressions, cut, doubled, nested and shuffled at random. Each must
be followed (a few tokens of an answer are drawn) or refused within the deadline, while another stream goes on.
Exit codes: 0 all were, 1 a worker died or an answer was wrong, 2 usage.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from app.config import ServeSettings  # noqa: E402 - found through the line above
from app.errors import PestleError, RequestError  # noqa: E402
from app.messages import GrammarKind, Sampling  # noqa: E402
from app.observability.metrics import Metrics  # noqa: E402
from app.pool.pool import Limits, Pool  # noqa: E402
from app.pool.request import GenerationRequest, GrammarSource, PoolState, TextPrompt  # noqa: E402

DEADLINE = 10.0  # seconds that the pool gives the text child
SCHEMAS: list[Any] = [
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer", "minimum": 0}},
        "required": ["name"],
        "additionalProperties": False,
    },
    {"$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"},
    {"anyOf": [{"enum": ["a", 1, None]}, {"type": "array", "items": {"type": "number"}, "minItems": 1}]},
    {"allOf": [{"type": "string", "pattern": "^(a|b)+c{1,40}$"}, {"minLength": 3, "maxLength": 60}]},
    {"type": "object", "patternProperties": {"^x-[a-z]+$": {"type": "boolean"}}, "minProperties": 1},
]
TEXTS: list[tuple[GrammarKind, str]] = [
    ("grammar", 'root ::= "(" root ")" | item{1,9}\nitem ::= [a-z]+ (" " [0-9]* | "\\u00e9")'),
    ("grammar", 'start: a | b\na: "x" a "y" | \nb: /[a-z]{2,30}/ ("," b)?\nC: "q" | C2\nC2: /[^"]+/'),
    ("grammar", 'start: "n=" %json {"type": "integer"} start?'),
    ("regex", r"(a|b{2,9})*[^c-z]+(\d{1,30}|\p{L})?x*"),
]
KEYS = ["type", "items", "properties", "anyOf", "allOf", "oneOf", "enum", "pattern", "minLength", "maxItems", "$ref"]
VALUES: list[Any] = [None, -1, 10**9, 1e308, "", "^(a+)+$", "#/$defs/n", [], {}, True, "string", ["a"] * 50]


def mutated(value: Any, draw: random.Random, depth: int = 0) -> Any:
    """Return a schema with random places changed, doubled, nested or gone."""
    if draw.random() < 0.08:
        return draw.choice(VALUES)
    if draw.random() < 0.05 and depth < 60:
        return {draw.choice(KEYS): mutated(value, draw, depth + draw.randrange(1, 20))}
    if isinstance(value, dict):
        pairs = [(draw.choice(KEYS) if draw.random() < 0.06 else key, inner) for key, inner in value.items()]
        return {key: mutated(inner, draw, depth + 1) for key, inner in pairs if draw.random() > 0.05}
    if isinstance(value, list):
        times = draw.choice([1, 1, 1, 2, 40])
        return [mutated(inner, draw, depth + 1) for inner in value * times]
    return value


def mangled(text: str, draw: random.Random) -> str:
    """Return a grammar with random pieces cut out, doubled, repeated often or moved."""
    for _ in range(draw.randrange(1, 5)):
        start = draw.randrange(len(text) + 1)
        piece = text[start : start + draw.randrange(1, 12)]
        way = draw.randrange(4)
        if way == 0:
            text = text[:start] + text[start + len(piece) :]
        elif way == 1:
            text = text[:start] + piece * draw.choice([2, 30, 2000]) + text[start:]
        elif way == 2:
            text = text[:start] + draw.choice(["(", "[", "{9,}", "{1,99999}", "*", "|", '"', "\\", "\n"]) + text[start:]
        else:
            place = draw.randrange(len(text) + 1)
            text = text[:place] + piece + text[place:]
    return text


def sources(count: int, seed: int) -> list[GrammarSource]:
    """Return the grammars to try, the same for the same seed."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        if number % 2:
            kind, text = draw.choice(TEXTS)
            found.append(GrammarSource(kind, mangled(text, draw), "field"))
        else:
            found.append(GrammarSource("json_schema", json.dumps(mutated(draw.choice(SCHEMAS), draw)), "field"))
    return found


def request(grammar: GrammarSource | None, max_tokens: int) -> GenerationRequest:
    """Return a request for one answer."""
    return GenerationRequest(
        prompts=[TextPrompt("Answer:")],
        max_tokens=max_tokens,
        sampling=Sampling(seed=1),
        stop=[],
        ignore_eos=grammar is None,
        top_logprobs=None,
        request_id="proof",
        grammar=grammar,
    )


async def outcome(pool: Pool, source: GrammarSource, verdicts: list[float]) -> str:
    """Return what became of one grammar; add the seconds until it was taken or refused."""
    started = time.monotonic()
    try:
        generation = await pool.open(request(source, 12))
    except RequestError as error:
        if error.param != "field":
            return f"WRONG: an error about {error.param}: {error.message}"
        return "refused past the deadline" if "takes longer" in error.message else "refused"
    finally:
        verdicts.append(time.monotonic() - started)
    try:
        (piece,) = await generation.collect()
    except PestleError as error:
        return f"failed in the answer: {error.code}" if isinstance(error, RequestError) else f"WRONG: {error.message}"
    finally:
        await generation.aclose()
    return f"followed to {piece.finish_reason}"


async def prove(model: Path, count: int, seed: int) -> int:
    """Run the proof; return the exit code."""
    settings = ServeSettings(parallel=3, queue=8, ctx_size=2048, threads=1)
    pool = Pool(settings, model, "proof", Metrics(), limits=Limits(text_deadline=DEADLINE))
    pool.spawn()
    await pool.start()
    while pool.state is not PoolState.READY:  # noqa: ASYNC110 - a script
        await asyncio.sleep(0.01)
    worker, text = pool.child_pids["worker"], pool.child_pids["text"]
    outcomes: collections.Counter[str] = collections.Counter()
    verdicts: list[float] = []
    deaths, tokens = 0, 0
    stream = await pool.open(request(None, 1500))
    for source in sources(count, seed):
        if not stream.completion_tokens < 1500:
            tokens += stream.completion_tokens
            await stream.aclose()
            stream = await pool.open(request(None, 1500))
        what = await outcome(pool, source, verdicts)
        outcomes[what] += 1
        if what.startswith("WRONG"):
            print(what, source, file=sys.stderr)
        if pool.child_pids["text"] != text:
            deaths, text = deaths + 1, pool.child_pids["text"]
    tokens += stream.completion_tokens
    worker_lives = pool.child_pids["worker"] == worker and stream.error is None
    failed = not worker_lives or any(what.startswith("WRONG") for what in outcomes)
    await stream.aclose()
    await pool.close()
    for what, times in outcomes.most_common():
        print(f"{times:6} {what}")
    print(f"the worker {'lives' if worker_lives else 'DIED'}; text child restarts: {deaths}")
    print(f"slowest verdict: {max(verdicts):.2f} s; tokens of the other stream meanwhile: {tokens}")
    return int(failed)


def main() -> int:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    return asyncio.run(prove(arguments.model, arguments.count, arguments.seed))


if __name__ == "__main__":
    sys.exit(main())
