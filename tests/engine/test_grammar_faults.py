"""Hostile grammars against the real children: 400s within the deadline, no worker dies, streams go on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.errors import GrammarRefusedError
from app.messages import GrammarKind
from app.pool.pool import Limits
from app.pool.request import GrammarSource
from tests.engine.test_pool import answer, kill, request, run, running, until

HOSTILE: list[tuple[GrammarKind, str]] = [
    ("regex", "((a{1000}){1000}){1000}"),
    ("regex", "(" * 4000),
    ("json_schema", '{"items":' * 20_000 + "{}" + "}" * 20_000),
    ("json_schema", json.dumps({"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(2000)}})),
    ("grammar", "start: " + "(" * 50_000 + '"a"' + ")" * 50_000),
    ("grammar", "start: A0\n" + "\n".join(f"A{n}: A{n + 1} A{n + 1}" for n in range(60)) + '\nA60: "x"'),
    ("grammar", "root ::= " + "(" * 50_000),
]


def test_hostile_grammars_are_refused_while_a_stream_goes_on(default_model: Path) -> None:
    async def play() -> None:
        async with running(default_model) as pool:
            children = pool.child_pids
            stream = await pool.open(request(max_tokens=400))
            for kind, source in HOSTILE:
                with pytest.raises(GrammarRefusedError) as caught:
                    await pool.open(request(grammar=GrammarSource(kind, source, "field")))
                assert caught.value.param == "field"
            assert stream.completion_tokens > 0
            assert stream.error is None
            await stream.aclose()
            assert await answer(pool, request(grammar=GrammarSource("choice", '["yes"]', "x"))) == ["yes"]
            assert pool.child_pids["worker"] == children["worker"]

    run(play())


def test_a_grammar_past_its_deadline_ends_the_text_child_and_itself_only(default_model: Path) -> None:
    async def play() -> None:
        async with running(default_model, Limits(text_deadline=0.3)) as pool:
            children = pool.child_pids
            slow = GrammarSource("regex", "((a{1000}){1000}){1000}", "guided_regex")
            with pytest.raises(GrammarRefusedError, match="takes longer than") as caught:
                await pool.open(request(grammar=slow))
            assert caught.value.param == "guided_regex"
            await until(lambda: pool.child_pids["text"] != children["text"])
            assert pool.child_pids["worker"] == children["worker"]

    run(play())


def test_a_worker_that_dies_is_replaced_and_follows_the_grammar_again(default_model: Path) -> None:
    async def play() -> None:
        numbers = "[" + ", ".join(str(n) for n in range(60)) + "]"
        asked = request(max_tokens=250, grammar=GrammarSource("choice", json.dumps([numbers]), "x"))
        async with running(default_model) as pool:
            worker = pool.child_pids["worker"]
            generation = await pool.open(asked)
            kill(pool, "worker")
            assert [piece.text for piece in await generation.collect()] == [numbers]
            await generation.aclose()
            assert pool.child_pids["worker"] != worker

    run(play())
