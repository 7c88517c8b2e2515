"""llama.cpp's grammars (GBNF) as the Lark that llguidance reads.

GBNF has no words: `[a-z]+ "x"` takes "abx". Lark's terminals take as much as they can, so that they may stand for one
character only; or for the whole grammar, as one regular expression, when no rule leads back to itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from app.errors import GrammarRefusedError
from app.guidance import lark_string

MAX_RULES = 2000
MAX_NESTING = 64

_RULE_START = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_SPACE = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_SPACE_AND_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_LINE_END = re.compile(r"\r?\n|\r|\Z")
_BOUNDS = re.compile(r"\{[ \t]*(\d{1,9})?[ \t]*(,)?[ \t]*(\d{1,9})?[ \t]*\}")
_TOKEN = re.compile(r"<[^<>\s]+>")
_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))", re.DOTALL)
_SIMPLE_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"} | {character: character for character in '"\\[]-^/'}
_OPERATORS = {"*": "*", "+": "+", "?": "?"}
_PLAIN = re.compile(r"[A-Za-z0-9]")


@dataclass(slots=True)
class _Rule:
    """A rule's body as Lark; other rules' names are filled in when their kind is known."""

    parts: list[str | _Reference] = field(default_factory=list)
    has_tokens: bool = False

    @property
    def references(self) -> list[str]:
        return [part.name for part in self.parts if isinstance(part, _Reference)]


@dataclass(slots=True, frozen=True)
class _Reference:
    name: str


def is_gbnf(text: str) -> bool:
    """Tell GBNF from Lark: some line begins a rule with `name ::=`."""
    return _RULE_START.search(text) is not None


def lark_from_gbnf(text: str) -> str:
    """Return the grammar in Lark, its `root` as `start`.

    Raises GrammarRefusedError with the line of what is no GBNF, and for rules that are missing.
    """
    rules = _Parser(text).parse()
    if "root" not in rules:
        raise GrammarRefusedError("the GBNF grammar has no rule 'root', which is where an answer begins")
    reached = _reached_from_root(rules)
    as_terminals = not any(rules[name].has_tokens for name in reached) and _is_without_recursion(rules, reached)
    names = {name: _lark_name(name, number, as_terminals) for number, name in enumerate(reached)}
    lines = [f"start: {names['root']}"]
    for name in reached:
        body = "".join(names[part.name] if isinstance(part, _Reference) else part for part in rules[name].parts)
        lines.append(f"{names[name]}: {body}")
    return "\n".join(lines) + "\n"


class _Parser:
    """Reads rules one after the other, writing Lark as it goes."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._rule = _Rule()

    def parse(self) -> dict[str, _Rule]:
        """Return the rules by name. Raises GrammarRefusedError."""
        rules: dict[str, _Rule] = {}
        self._skip(_SPACE_AND_LINES)
        while self._at < len(self._text):
            name = self._name()
            self._skip(_SPACE)
            if not self._text.startswith("::=", self._at):
                raise self._error("a rule is written as name ::= ...")
            self._at += 3
            if name in rules or len(rules) == MAX_RULES:
                raise self._error(f"the rule {name!r} is there twice" if name in rules else f"over {MAX_RULES} rules")
            self._skip(_SPACE_AND_LINES)
            self._rule = rules[name] = _Rule()
            self._alternatives(0)
            self._skip(_SPACE)
            if not _LINE_END.match(self._text, self._at):
                raise self._error("this is no literal, class, group, token or name of a rule")
            self._skip(_SPACE_AND_LINES)
        return rules

    def _alternatives(self, depth: int) -> None:
        space = _SPACE_AND_LINES if depth else _SPACE
        self._sequence(depth)
        self._skip(space)
        while self._peek() == "|":
            self._at += 1
            self._emit(" | ")
            self._skip(_SPACE_AND_LINES)
            self._sequence(depth)
            self._skip(space)

    def _sequence(self, depth: int) -> None:
        space = _SPACE_AND_LINES if depth else _SPACE
        empty = True
        while self._element(depth):
            empty = False
            self._skip(_SPACE)
            self._repetition()
            self._skip(space)
            self._emit(" ")
        if empty:
            self._emit('""')

    def _element(self, depth: int) -> bool:
        """Read a literal, class, group, token or reference; return whether there was one."""
        character = self._peek()
        if character == '"':
            self._emit(lark_string(self._literal()))
        elif character == "[":
            self._emit(self._character_class())
        elif character == ".":
            self._at += 1
            self._emit("/(?s:.)/")
        elif character == "(":
            self._group(depth)
        elif character == "<":
            self._token()
        elif _NAME.match(character):
            self._rule.parts.append(_Reference(self._name()))
        else:
            return False
        return True

    def _group(self, depth: int) -> None:
        if depth == MAX_NESTING:
            raise self._error(f"groups are nested more than {MAX_NESTING} deep")
        self._at += 1
        self._emit("(")
        self._skip(_SPACE_AND_LINES)
        self._alternatives(depth + 1)
        if self._peek() != ")":
            raise self._error("a group is not closed by )")
        self._at += 1
        self._emit(")")

    def _repetition(self) -> None:
        if operator := _OPERATORS.get(self._peek()):
            self._at += 1
            self._emit(operator)
        elif self._peek() == "{":
            bounds = _BOUNDS.match(self._text, self._at)
            if bounds is None or not (bounds[1] or bounds[3]):
                raise self._error("a repetition is {m}, {m,}, {m,n} or {,n}")
            self._at = bounds.end()
            least = bounds[1] or "0"
            self._emit(f"{{{least},{bounds[3] or ''}}}" if bounds[2] else f"{{{least}}}")

    def _token(self) -> None:
        token = _TOKEN.match(self._text, self._at)
        if token is None:
            raise self._error("a token is written as <name> or <[id]>")
        self._at = token.end()
        self._rule.has_tokens = True
        self._emit(token[0])

    def _literal(self) -> str:
        self._at += 1
        characters = []
        while self._peek() != '"':
            characters.append(self._character("a literal", '"'))
        self._at += 1
        return "".join(characters)

    def _character_class(self) -> str:
        self._at += 1
        negated = self._peek() == "^"
        self._at += negated
        members = []
        while self._peek() != "]":
            first = self._character("a class", "]")
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                last = self._character("a class", "]")
                if last < first:
                    raise self._error(f"the range {first}-{last} is the wrong way round")
                members.append(f"{_class_member(first)}-{_class_member(last)}")
            else:
                members.append(_class_member(first))
        self._at += 1
        if not members:
            return "/(?s:.)/" if negated else "/[a&&b]/"
        return f"/[{'^' if negated else ''}{''.join(members)}]/"

    def _character(self, where: str, end: str) -> str:
        """Read one character, which may be escaped."""
        character = self._peek()
        if not character or (character in "\r\n" and end == '"'):
            raise self._error(f"{where} is not closed by {end}")
        if character != "\\":
            self._at += 1
            return character
        escape = _ESCAPE.match(self._text, self._at)
        if escape is None:
            raise self._error("an escape is cut off")
        if (simple := escape[4]) is not None:
            if simple not in _SIMPLE_ESCAPES:
                raise self._error(f"there is no escape \\{simple}")
            character = _SIMPLE_ESCAPES[simple]
        else:
            code = int(escape[1] or escape[2] or escape[3], 16)
            if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
                raise self._error(f"U+{code:04X} is no character")
            character = chr(code)
        self._at = escape.end()
        return character

    def _name(self) -> str:
        name = _NAME.match(self._text, self._at)
        if name is None:
            raise self._error("here should be the name of a rule")
        self._at = name.end()
        return name[0]

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _skip(self, space: re.Pattern[str]) -> None:
        match = space.match(self._text, self._at)
        self._at = match.end() if match else self._at

    def _emit(self, lark: str) -> None:
        self._rule.parts.append(lark)

    def _error(self, what: str) -> GrammarRefusedError:
        line = self._text.count("\n", 0, self._at) + 1
        return GrammarRefusedError(f"line {line} of the GBNF grammar: {what} (at {self._text[self._at :][:20]!r})")


def _reached_from_root(rules: dict[str, _Rule]) -> list[str]:
    reached = {"root": None}
    waiting = ["root"]
    while waiting:
        name = waiting.pop()
        for other in rules[name].references:
            if other not in rules:
                raise GrammarRefusedError(f"the GBNF grammar's rule {name!r} names {other!r}, which is no rule")
            if other not in reached:
                reached[other] = None
                waiting.append(other)
    return list(reached)


def _is_without_recursion(rules: dict[str, _Rule], names: list[str]) -> bool:
    open_references = {name: len(set(rules[name].references)) for name in names}
    users: dict[str, list[str]] = {name: [] for name in names}
    for name in names:
        for other in set(rules[name].references):
            users[other].append(name)
    resolved = [name for name, count in open_references.items() if not count]
    for name in resolved:  # grows while it is read
        for user in users[name]:
            open_references[user] -= 1
            if not open_references[user]:
                resolved.append(user)
    return len(resolved) == len(names)


def _lark_name(name: str, number: int, terminal: bool) -> str:
    clean = re.sub(r"[^a-z0-9]", "_", name.lower())
    return f"T{number}_{clean}".upper() if terminal else f"r{number}_{clean}"


def _class_member(character: str) -> str:
    return character if _PLAIN.fullmatch(character) else f"\\x{{{ord(character):X}}}"
