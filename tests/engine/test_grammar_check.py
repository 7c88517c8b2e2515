"""Grammars as the text child compiles them: what they let through, token by token, and what is refused and why."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from app.errors import GrammarRefusedError
from app.guidance import Constraint, GrammarTokenizer
from app.llama.model import VocabularyModel
from app.messages import CompileGrammar, GrammarKind
from app.text.gbnf import is_gbnf, lark_from_gbnf
from app.text.grammar_check import MAX_DEPTH, MAX_SOURCE_BYTES, GrammarChecker

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {"node": {"type": "object", "properties": {"v": {"enum": [1, "é", None]}, "l": {"$ref": "#/$defs/node"}}}},
    "$ref": "#/$defs/node",
}
ARITHMETIC = """
root ::= (expr "=" ws term "\\n")+   # as llama.cpp's own example
expr ::= term ([-+*/] term)*
term ::= ident | num | "(" ws expr ")" ws
ident ::= [a-z] [a-z0-9_]* ws
num ::= [0-9]+ ws
ws ::= [ \\t\\n]*
"""
LETS_THROUGH: list[tuple[GrammarKind, str, list[str], list[str]]] = [
    (
        "json_schema",
        json.dumps(PERSON),
        ['{"name":"Zoë \\u0001","age":150}', '{\n  "name": "日本",\n  "age": 0\n}'],
        ['{"name":"a"}', '{"name":"a","age":151}', '{"name":"a","age":1,"x":1}', '{"name":"a",  "age":1}', "[]", " {"],
    ),
    (
        "json_schema",
        json.dumps(TREE),
        ['{"v":"é","l":{"v":null}}', "{}"],
        ['{"v":2}', '{"v":"e"}', '{"l":{"l":3}}'],
    ),
    ("regex", r"^\d{3}-(foo|bar)?$", ["123-", "555-foo"], ["12-", "123-fo", "1234", ""]),
    ("regex", r"[^/]+/\p{L}{2}", ["a b/éß"], ["a//", "/ab", "a/1b"]),
    (
        "choice",
        '["yes","no","yes, sir","\\"\\\\ \\u007f é"]',
        ["yes", "yes, sir", '"\\ \x7f é'],
        ["ye", "yes,", "nope"],
    ),
    ("choice", '["yes","yes, sir","\\"\\\\ \\u007f é"]', ["yes", "yes, sir", '"\\ \x7f é'], ["ye", "yes,", "no"]),
    ("grammar", 'start: "a" b\nb: "x" | b "y"', ["ax", "axyyy"], ["a", "ay", "axx"]),
    ("grammar", 'start: "n=" %json {"type": "integer"}', ["n=-12"], ["n=", "n=1.5"]),
    ("grammar", 'root ::= name "x"\nname ::= [a-z]+', ["ax", "abxx"], ["x", "ab", "aX"]),
    ("grammar", 'root ::= ("a" | "b"){2,3} [^a-c\\]] .\r\n', ["ab]x"[:2] + "dx", "bbbé\n"], ["adx", "ab]x", "aacx"]),
    ("grammar", 'root ::= "\\x41\\u00e9\\U0001F600" [\\u3041-\\u309F]*', ["Aé😀", "Aé😀ひ"], ["Aé", "Aé😀カ"]),
    ("grammar", 'root ::= root "a" | ""', ["", "aaa"], ["b", "ab"]),
    ("grammar", ARITHMETIC, ["x1=5\n", "(a+b)*2 = c\ny=1\n"], ["x1=\n", "=1\n", "(a=1\n"]),
]


@pytest.fixture(scope="module")
def model(default_model: Path) -> Iterator[VocabularyModel]:
    with VocabularyModel(default_model) as model:
        yield model


@pytest.fixture(scope="module")
def compiled(model: VocabularyModel) -> Callable[[GrammarKind, str], str]:
    checker = GrammarChecker(model.vocabulary)
    return lambda kind, source: checker.compiled(CompileGrammar(1, kind, source, "field"))[0]


@pytest.fixture(scope="module")
def tokenizer(model: VocabularyModel) -> GrammarTokenizer:
    return GrammarTokenizer(model.vocabulary)


def lets_through(model: VocabularyModel, constraint: Constraint, text: str) -> bool:
    """Follow a text byte by byte (every byte is a token of this vocabulary): does the grammar take it, and end?"""
    single = {piece: token for token, piece in enumerate(model.vocabulary.pieces) if len(piece) == 1}
    for byte in text.encode():
        constraint.accept(single[bytes([byte])])
        if constraint.error is not None:
            return False
    constraint.compute()
    return bool(constraint.allowed[sorted(model.vocabulary.eog)].any())


@pytest.mark.parametrize(
    ("kind", "source", "good", "bad"),
    LETS_THROUGH,
    ids=[f"{kind} {source[:30]!r}" for kind, source, *_ in LETS_THROUGH],
)
def test_a_grammar_lets_through_what_it_says(
    model: VocabularyModel,
    compiled: Callable[[GrammarKind, str], str],
    tokenizer: GrammarTokenizer,
    kind: GrammarKind,
    source: str,
    good: list[str],
    bad: list[str],
) -> None:
    grammar = compiled(kind, source)
    for text in good:
        assert lets_through(model, Constraint(tokenizer, grammar), text), text
    for text in bad:
        assert not lets_through(model, Constraint(tokenizer, grammar), text), text


def test_a_mask_allows_exactly_the_tokens_that_a_grammar_takes(
    model: VocabularyModel, compiled: Callable[[GrammarKind, str], str], tokenizer: GrammarTokenizer
) -> None:
    grammar = compiled("regex", "[a-c]{1,4}z?")
    constraint = Constraint(tokenizer, grammar)
    constraint.compute()
    allowed = {model.vocabulary.pieces[token] for token in np.flatnonzero(constraint.allowed)}
    pieces = set(model.vocabulary.pieces)
    expected = {piece for piece in pieces if piece and not piece.strip(b"abcz") and _fits(piece)}
    assert allowed == expected
    assert len(allowed) > 10


def _fits(piece: bytes) -> bool:
    letters = piece[:-1] if piece.endswith(b"z") else piece
    return 1 <= len(letters) <= 4 and not letters.strip(b"abc")


def test_what_is_forced_is_cut_as_the_model_knows_it(
    model: VocabularyModel, compiled: Callable[[GrammarKind, str], str], tokenizer: GrammarTokenizer
) -> None:
    text = "The capital of France is Paris."
    constraint = Constraint(tokenizer, compiled("choice", json.dumps([text])))
    tokens = []
    while not constraint.finished:
        constraint.compute()
        (token,) = np.flatnonzero(constraint.allowed)
        tokens.append(int(token))
        constraint.accept(int(token))
    assert tokens == model.vocabulary.tokenize(text).tolist()


@pytest.mark.parametrize(
    ("kind", "source", "reason"),
    [
        ("json_schema", "{", "not valid JSON"),
        ("json_schema", "[1]", "JSON object"),
        ("json_schema", '{"type":"strin"}', "strin"),
        ("json_schema", '{"uniqueItems":true}', "uniqueItems"),
        ("json_schema", '{"x-guidance":{"lenient":true},"not":{}}', "not"),
        ("json_schema", '{"$ref":"https://example.org/x"}', "does not fetch"),
        ("json_schema", '{"$ref":"#"}', "no answer can satisfy"),
        ("json_schema", '{"type":"string","pattern":"(?=a)b"}', "look-around"),
        ("json_schema", '{"type":"string","format":"postcode"}', "postcode"),
        ("json_schema", '{"enum":[]}', "empty"),
        ("json_schema", '{"items":' * MAX_DEPTH + "{}" + "}" * MAX_DEPTH, "nested"),
        ("json_schema", '{"a":' * 50_000 + "1" + "}" * 50_000, "bytes"),
        ("json_schema", '{"a":' * 9000 + "1" + "}" * 9000, "nested"),
        ("json_schema", json.dumps({"anyOf": [{"pattern": f"a{n}"} for n in range(300)]}), "patterns"),
        ("json_schema", json.dumps({"pattern": "a" * 9000}), "regular expression"),
        ("regex", "(a", "unclosed group"),
        ("regex", "(" * 200 + ")" * 200, "nested"),
        ("regex", "((a{1000}){1000}){1000}", "too many"),
        ("choice", "[]", "0 choices"),
        ("choice", '["a",""]', "empty"),
        ("choice", json.dumps([str(n) for n in range(2000)]), "2000 choices"),
        ("grammar", "start: unknown", "unknown"),
        ("grammar", "hello", "Expected"),
        ("grammar", "start: " + "(" * 1000 + '"a"' + ")" * 1000, "deeply nested"),
        ("grammar", "start: a0\n" + "\n".join(f"a{n}: a{n + 1} a{n + 1}" for n in range(60)) + '\na60: "x"', "items"),
        ("grammar", "start: A0\n" + "\n".join(f"A{n}: A{n + 1} A{n + 1}" for n in range(60)) + '\nA60: "x"', "too big"),
        ("grammar", "x" * (MAX_SOURCE_BYTES + 1), "bytes"),
        ("grammar", 'rot ::= "a"', "root"),
        ("grammar", 'root ::= "a" other', "other"),
        ("grammar", 'root ::= "a" (', "line 1"),
        ("grammar", 'root ::= "a\nb ::= "c"', "not closed"),
        ("grammar", 'a ::= "b"\nroot ::= [z-a]', "line 2"),
        ("grammar", 'root ::= "\\q"', "escape"),
        ("grammar", "root ::= " + "(" * 100 + '"a"' + ")" * 100, "nested"),
        ("grammar", 'root ::= "a"\nroot ::= "b"', "twice"),
        ("grammar", "root ::= a\n" + "\n".join(f'a{n} ::= "x"' for n in range(3000)), "rules"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_the_reason(
    compiled: Callable[[GrammarKind, str], str], kind: GrammarKind, source: str, reason: str
) -> None:
    started = time.process_time()
    with pytest.raises(GrammarRefusedError) as caught:
        compiled(kind, source)
    assert caught.value.param == "field"
    assert reason in caught.value.message
    assert len(caught.value.message) < 1000
    assert time.process_time() - started < 5


def test_gbnf_is_told_from_lark() -> None:
    assert is_gbnf('# comment\n  root ::= "a"')
    assert is_gbnf('some-rule\t::= "a"')
    assert not is_gbnf('start: "::="\nother: "x" // root ::= "a"')


def test_only_reached_rules_are_translated() -> None:
    recursive = lark_from_gbnf('unused ::= broken\nroot ::= "a" b | root\nb ::= [0-9]')
    assert recursive == 'start: r0_root\nr0_root: "a" r1_b  | r0_root \nr1_b: /[0-9]/ \n'
    regular = lark_from_gbnf('root ::= b "x"\nb ::= [0-9]+')
    assert regular == 'start: T0_ROOT\nT0_ROOT: T1_B "x" \nT1_B: /[0-9]/+ \n'


def test_a_text_too_long_for_the_tokenizer_is_cut_greedily(tokenizer: GrammarTokenizer) -> None:
    long = "a" * 50_000
    assert tokenizer.native.decode_str(tokenizer.native.tokenize_str(long)) == long


def test_children_without_grammars_never_load_llguidance() -> None:
    code = "import sys, app.text.main, app.worker.main, app.pool.pool; sys.exit('llguidance' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
