"""Writes the texts on which two tokenizers are compared: many scripts, code, emoji, odd spaces. Pure, always the same.

Only characters are used that Unicode has had for long: over newer ones, two libraries may rightly disagree.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable

COUNT = 10_000


def _parted(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_WORDS = _parted(
    "the The THE a in of and to hello Hello world World it's It's don't DON'T we'll they've I'm you're he'd HE'D "
    "O'Neill's rock'n'roll co-operate e.g. tokenizer unbelievable antidisestablishmentarianism iPhone CamelCaseWord "
    "snake_case_word kebab-case x1 v2.0 3D 4x4 1st 2nd naïve café Café résumé über straße Ærø Žižek łódź İstanbul "
    "señor ça où Größe Ärger Ω µ ﬁne"
)
_SENTENCES = _parted(
    "Съешь ещё этих мягких французских булок, да выпей чаю. Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία. דג סקרן שט בים מאוכזב. "
    "نص حكيم له سر قاطع وذو شأن عظيم. ऋषियों को सताने वाले दुष्ट राक्षसों का राजा। আমি বাংলায় গান গাই। "
    "யாமறிந்த மொழிகளிலே தமிழ்மொழி போல் เป็นมนุษย์สุดประเสริฐเลิศคุณค่า ខ្ញុំអាចញ៉ាំកញ្ចក់បាន ကျွန်တော် ကျွန်မ "
    "いろはにほへと ちりぬるを カタカナ ｶﾀｶﾅ 東京特許許可局 我能吞下玻璃而不傷身體。 敏捷的棕色狐狸跳过懒狗 "
    "키스의 고유조건은 입술끼리 만나야 한다 "
    "Хай живе Україна! Բարեւ աշխարհ გამარჯობა მსოფლიო ሰላም ለዓለም Xin chào thế giới Zażółć gęślą jaźń Příliš žluťoučký "
    "kůň ສະບາຍດີ ជំរាបសួរ Kæmi ný öxi hér ykist þjófum nú bæði víl og ádrepa"
)
_CODE = (
    "def f(x: int) -> str:\n    return f\"{x!r}\"\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i]; }\n",
    "if (a != b && c == d || !e) {\n\treturn NULL;\n}\r\n",
    "SELECT * FROM t WHERE id=42 AND name LIKE '%x%';",
    '{"key": [1, 2.5, -3e-7, true, null], "s": "a\\nb"}',
    "<div class=\"a\">&nbsp;&lt;b&gt;</div>\n",
    "$ ls -la | grep '^d' > /dev/null 2>&1\n",
    "// TODO(me): fix\n/* ... */\n#include <stdio.h>\n",
    "lambda x: x ** 2 // 3 % 5 ^ ~y << 1",
    "https://example.com/a/b?c=d&e=f#g user@mail.org C:\\Users\\me",
    "| a | b |\n|---|---|\n| 1 | 2 |\n",
    "#### Title\n\n- [x] item\n  * nested\n\n```py\n",
    "\\begin{equation} E = mc^2 \\end{equation}",
)  # fmt: skip
_EMOJI = _parted(
    "😀 🙂 😂 👍 👍🏽 👩🏿 👨‍👩‍👧‍👦 👩🏽‍💻 🏳️‍🌈 🇩🇪 🇯🇵 ❤️ ☺️ 1️⃣ #️⃣ 🦙 🚀 ✨ ☃ ♥ ✓ → ⇒ ∞ ∑ √ "
    "≤ € £ ¥ © ® ™ ° ± × ÷ … – — “ ” ‘ ’ « » ¿ ¡"
)
_SPACES = (
    *(" ", "  ", "   ", "    ", "        ", " " * 17, "\t", "\t\t", "\t\n ", " \t ", " \n", "\n ", "\v", "\f"),
    *("\n", "\n\n", "\n\n\n", "\r\n", "\r\n\r\n", "\r", "\u2028"),
    *("\u00a0", " \u00a0 ", "\u3000", "\u2003", "\u2009 ", "\u200b", "\ufeff"),
)
_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
_CONTRACTIONS = (
    "'s",
    "'S",
    "'t",
    "'T",
    "'re",
    "'RE",
    "'Re",
    "'ve",
    "'VE",
    "'m",
    "'M",
    "'ll",
    "'LL",
    "'d",
    "'D",
    "'x",
    "''",
    "’s",
)
_RANGES = (  # letters of scripts that have cases, marks or neither
    (0x00C0, 0x00D6), (0x00D8, 0x00F6), (0x0100, 0x017E), (0x0391, 0x03A1), (0x03B1, 0x03C9), (0x0410, 0x044F),
    (0x0531, 0x0556), (0x05D0, 0x05EA), (0x0621, 0x063A), (0x0905, 0x0939), (0x0E01, 0x0E30), (0x10D0, 0x10F0),
    (0x1E00, 0x1E95), (0x3041, 0x3096), (0x30A1, 0x30FA), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0x20000, 0x2A6D6),
)  # fmt: skip
_DIGITS = ("0123456789", "٠١٢٣٤٥٦٧٨٩", "०१२३४५६७८९", "０１２３４５６７８９", "½¼²³ⅣⅫ①")
_ODD = (
    "\x00",
    "\x01",
    "\x07",
    "\x1b[0m",
    "\x7f",
    "\u0085",
    "\u00ad",
    "\u200d",
    "\u200e",
    "\ufe0f",
    "\ue000",
    "\ufffd",
    "\U000f0000",
    "\U0001d538",
)
_MARKS = "\u0300\u0301\u0308\u0327\u0323\u094d\u093f\u0e31\u0e49\u05b8\u064e"


def texts(count: int = COUNT) -> list[str]:
    """Return so many different texts, most of them short; the first ones are the same for any count."""
    choose = random.Random(0)  # noqa: S311 - not for secrets, but for the same texts on every machine
    kinds = [kind for kind, weight in _KINDS for _ in range(weight)]
    joints = ("", "", "", " ", " ", "\n", *_SPACES)
    made = {"": None}  # keeps the order
    while len(made) < count:
        parts = [choose.choice(kinds)(choose) for _ in range(choose.choice((1, 1, 2, 3, 3, 4, 6)))]
        made[choose.choice(joints).join(parts)] = None
    return list(made)


def _some(choose: random.Random, letters: str, most: int) -> str:
    return "".join(choose.choices(letters, k=choose.randint(1, most)))


def _letters(choose: random.Random) -> str:
    first, last = choose.choice(_RANGES)
    text = "".join(chr(choose.randint(first, last)) for _ in range(choose.randint(1, 6)))
    return text.title() if choose.random() < 0.2 else text


def _ascii_word(choose: random.Random) -> str:
    word = _some(choose, "etaoinshrdlucmfwypvbgkjqxz", 9)
    return choose.choice((str, str, str.title, str.upper, str.swapcase))(word)


def _normal_form(choose: random.Random) -> str:
    text = choose.choice(_WORDS) + " " + choose.choice(_SENTENCES)
    return unicodedata.normalize(choose.choice(("NFC", "NFD")), text)


def _surrogates(choose: random.Random) -> str:
    """Make what a text with half of a surrogate pair becomes before it is tokenized."""
    broken = choose.choice(_WORDS) + chr(choose.randint(0xD800, 0xDFFF)) + choose.choice(_WORDS)
    return broken.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


_KINDS: tuple[tuple[Callable[[random.Random], str], int], ...] = (
    (lambda choose: choose.choice(_WORDS), 6),
    (lambda choose: " " + choose.choice(_WORDS), 6),
    (_ascii_word, 6),
    (lambda choose: choose.choice(_SENTENCES), 4),
    (_letters, 4),
    (_normal_form, 2),
    (lambda choose: choose.choice(_CODE), 2),
    (lambda choose: choose.choice(_EMOJI), 3),
    (lambda choose: choose.choice(_SPACES), 3),
    (lambda choose: _some(choose, _PUNCTUATION, 5), 3),
    (lambda choose: _ascii_word(choose) + choose.choice(_CONTRACTIONS), 3),
    (lambda choose: _some(choose, choose.choice(_DIGITS[:1] * 4 + _DIGITS), 9), 4),
    (lambda choose: choose.choice(_WORDS) + choose.choice(_MARKS), 1),
    (lambda choose: choose.choice(_ODD), 1),
    (_surrogates, 1),
)
