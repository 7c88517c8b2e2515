"""Grammars on tokens: which of a vocabulary's tokens may come next. The only module that imports llguidance.

Importing it costs 25 ms, and the first tokenizer 0.1 s for 50,000 tokens: whoever never gets a grammar should not.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from app.errors import GrammarRefusedError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from app.llama.vocab import Vocabulary

_WORD_BITS = 32
_LONGEST_TOKENIZED = 2048  # bytes; some pre-tokenizers recurse for each byte, and this runs beside the decode
_LONGEST_REASON = 600  # characters of llguidance's own words
_EXPLANATIONS = {
    "NoExtension": "no answer can satisfy it",
    "NoExtensionBias": "no answer can satisfy it",
    "ParserTooComplex": "it is too ambiguous to be followed token by token",
    "LexerTooComplex": "its regular expressions are too complex to be followed token by token",
}
_LEADS = (b"\n", b"\x02", b"!")  # what stands before a text whose tokenizer would put a space there

# The time and memory that one sequence's grammar may take: 50,000 states of the lexer are some 80 MiB, a step's fuel
# and items some 20 ms.
_LIMITS = LLParserLimits(
    max_items_in_row=2000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)

# One space, or a line feed with an indentation: enough for every layout, and no endless run of white space.
_WHITESPACE = r" |\n[ \t]{0,20}"
_JSON_RULES = {"whitespace_pattern": _WHITESPACE, "lenient": False, "coerce_one_of": False}


class GrammarTokenizer:
    """A vocabulary as llguidance knows it. Belongs to the model: use it only while that is open."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Build it, holding Python's lock in two stretches. Raises GrammarRefusedError for a vocabulary without end."""
        if not vocabulary.eog:
            raise GrammarRefusedError("this model has no token that ends an answer, so that no grammar can end either")
        self.size = vocabulary.size
        canonical = _CanonicalTokens(vocabulary)
        whole = LLTokenizer(TokenizerWrapper(canonical), eos_token=sorted(vocabulary.eog), slices=[])
        canonical.greedy = whole.greedy_tokenize
        self.native = whole.with_slices(LLTokenizer.general_slices())


class Constraint:
    """One sequence's place in a grammar: what may come next, and whether it is at its end.

    Not for two threads at once. After an error it stays in error.
    """

    def __init__(self, tokenizer: GrammarTokenizer, grammar: str) -> None:
        """Compile, without Python's lock. Raises GrammarRefusedError with llguidance's reason."""
        self._matcher = LLMatcher(tokenizer.native, grammar, log_level=0, limits=_LIMITS)
        words = -(-tokenizer.size // _WORD_BITS)
        self._bits = np.zeros(words, "<u4")
        self._size = tokenizer.size
        self.allowed: npt.NDArray[np.bool_] = np.zeros(tokenizer.size, np.bool_)
        if self.error is not None:
            raise GrammarRefusedError(self.error)

    @property
    def error(self) -> str | None:
        """Why the grammar cannot go on, in llguidance's words."""
        return _reason(self._matcher.get_error()) if self._matcher.is_error() else None

    @property
    def finished(self) -> bool:
        """Whether the grammar is complete and nothing more can follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def compute(self) -> None:
        """Compute `allowed`, shape (vocabulary,): whether each token may come next. Drops Python's lock.

        Tokens that end the answer are among them when the grammar is complete.
        """
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        bits = self._bits.view(np.uint8)
        self.allowed = np.unpackbits(bits, count=self._size, bitorder="little").view(np.bool_)

    def accept(self, token: int) -> None:
        """Go on by one token that ends nothing."""
        self._matcher.consume_token(token)


class _CanonicalTokens:
    """Text that a grammar forces, as the model's own tokenizer would cut it: models know those tokens best."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._pieces = vocabulary.pieces
        self.tokens = [
            piece or vocabulary.token_to_piece(token, special=True) for token, piece in enumerate(self._pieces)
        ]
        self.special_token_ids = [token for token, piece in enumerate(self._pieces) if not piece]
        self.eos_token_id = min(vocabulary.eog)
        self.bos_token_id = vocabulary.bos
        self.greedy: Callable[[str], list[int]] = lambda _: []
        self._lead = next((lead for lead in (b"", *_LEADS) if self._after(lead, b"a") is not None), None)

    def __call__(self, text: bytes) -> list[int]:
        """Return tokens that join to this text; not the tokenizer's own where it would change the text."""
        if self._lead is not None and len(text) <= _LONGEST_TOKENIZED:
            tokens = self._after(self._lead, text)
            if tokens is not None:
                return tokens
        return self.greedy(text.decode("utf-8", "replace"))

    def _after(self, lead: bytes, text: bytes) -> list[int] | None:
        """Return the text's tokens as they come after the lead; None when they don't join to it."""
        before: list[int] = self._vocabulary.tokenize(lead).tolist() if lead else []
        tokens: list[int] = self._vocabulary.tokenize(lead + text).tolist()
        rest = tokens[len(before) :]
        joined = b"".join(self._pieces[token] for token in rest)
        return rest if tokens[: len(before)] == before and joined == text else None


def json_schema_grammar(schema: dict[str, Any]) -> str:
    """Return the grammar of the JSON documents that a schema allows; whether it compiles is seen when it is used.

    Keywords that llguidance lacks are an error then, also when the schema's own `x-guidance` asks to be lenient.
    """
    return LLMatcher.grammar_from_json_schema(
        schema, defaults={"whitespace_pattern": _WHITESPACE}, overrides={"lenient": False, "coerce_one_of": False}
    )


def lark_json(schema: dict[str, Any]) -> str:
    """Return a JSON schema as the body of a rule of Lark, with the same rules as `json_schema_grammar`."""
    return f"%json {json.dumps({**schema, 'x-guidance': _JSON_RULES})}"


def regex_grammar(pattern: str) -> str:
    """Return the grammar of the texts that a regular expression matches from their start to their end."""
    return LLMatcher.grammar_from_regex(pattern)


def choice_grammar(choices: list[str]) -> str:
    """Return the grammar of exactly these texts, none of them empty."""
    return lark_grammar("start: CHOICE\nCHOICE: " + " | ".join(map(lark_string, choices)))


def lark_grammar(source: str) -> str:
    """Return the grammar that this Lark describes; whether it is Lark is seen when it is used."""
    return json.dumps({"grammars": [{"lark_grammar": source}]}, ensure_ascii=False)


def lark_string(text: str) -> str:
    """Return a text as a literal of Lark."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _reason(words: str) -> str:
    reason = " ".join(words.replace("<non-verbose/>", "").split())
    reason = _EXPLANATIONS.get(reason, reason)
    return reason if len(reason) <= _LONGEST_REASON else reason[:_LONGEST_REASON] + "…"
